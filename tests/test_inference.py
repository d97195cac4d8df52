"""One way to run a network, in both runtimes."""

import subprocess
from typing import get_args

import numpy as np
import onnx
import pytest

from tasks.inference import Accelerator, open_network

RUNTIMES = get_args(Accelerator)


def pixels(count: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("accelerator", RUNTIMES)
def test_an_image_is_judged_alike_alone_and_in_any_company(small_network, accelerator):
    network, images = open_network(small_network(), accelerator), pixels(8)
    together = network(images)["probabilities"]
    alone = np.concatenate([network(images[i : i + 1])["probabilities"] for i in range(8)])
    assert together.dtype == np.float32 and together.shape == (8, 3)
    np.testing.assert_allclose(alone, together, atol=1e-6)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)


def test_both_runtimes_give_the_same_numbers_in_full_precision(small_network):
    images = pixels(16)
    found = [open_network(small_network(), a)(images, ("probabilities", "embedding")) for a in RUNTIMES]
    for name in ("probabilities", "embedding"):
        # bfloat16, which OpenVINO would choose by itself on some processors, differs by 1e-2
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accelerator", RUNTIMES)
def test_only_what_was_asked_for_is_returned(small_network, accelerator):
    network = open_network(small_network(), accelerator)
    assert list(network(pixels(2))) == ["probabilities"]
    assert list(network(pixels(2), ("embedding",))) == ["embedding"]
    assert network.output_shapes == {"probabilities": (3,), "embedding": (256,)}


@pytest.mark.parametrize("accelerator", RUNTIMES)
def test_a_later_call_leaves_earlier_answers_alone(small_network, accelerator):
    network = open_network(small_network(), accelerator)
    first = network(pixels(2, 1))["probabilities"]
    kept = first.copy()
    network(pixels(2, 2))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("accelerator", RUNTIMES)
@pytest.mark.parametrize(
    "images",
    [
        pixels(2).astype(np.float32),
        pixels(0),
        pixels(1)[0],
        np.zeros((1, 16, 16, 3), np.uint8),
        np.zeros((1, 3, 32, 32), np.uint8),
    ],
    ids=["float", "none", "no batch", "16 px", "channels first"],
)
def test_images_of_another_kind_are_refused_with_both_shapes(small_network, accelerator, images):
    with pytest.raises(ValueError, match=r"images are \w+ \[.*the network takes uint8 \[N>=1, \(32, 32, 3\)\]"):
        open_network(small_network(), accelerator)(images)


@pytest.mark.parametrize("accelerator", RUNTIMES)
def test_an_output_that_does_not_exist_is_named(small_network, accelerator):
    with pytest.raises(ValueError, match=r"\['attention'\] are not among"):
        open_network(small_network(), accelerator)(pixels(1), ("probabilities", "attention"))


def test_a_missing_file_and_an_unknown_runtime_are_named(small_network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no network at .*gone.onnx"):
        open_network(tmp_path / "gone.onnx")
    with pytest.raises(ValueError, match="'tensorrt' is not one of openvino, onnxruntime"):
        open_network(small_network(), "tensorrt")


@pytest.mark.parametrize("accelerator", RUNTIMES)
def test_a_damaged_network_is_an_error_and_no_answer(small_network, tmp_path, accelerator):
    model = onnx.load(small_network())
    del model.graph.node[3:]
    onnx.save(model, tmp_path / "cut.onnx")
    with pytest.raises(Exception, match=r"\S"):  # each runtime has exceptions of its own
        open_network(tmp_path / "cut.onnx", accelerator)


def test_the_serving_environment_gives_the_very_same_bytes(small_network, triton_python, tmp_path):
    """Another numpy, the same runtimes: what is proven here is what is served there."""
    np.save(tmp_path / "pixels.npy", pixels(8))
    script = (
        "import sys, numpy as np; from pathlib import Path; from tasks.inference import open_network;"
        "[np.save(f'{sys.argv[2]}/{a}.npy', open_network(Path(sys.argv[1]), a)(np.load(f'{sys.argv[2]}/pixels.npy'))"
        "['probabilities']) for a in ('openvino', 'onnxruntime')]"
    )
    subprocess.run([triton_python, "-c", script, small_network(), tmp_path], check=True, timeout=120)
    for accelerator in RUNTIMES:
        there = np.load(tmp_path / f"{accelerator}.npy")
        np.testing.assert_array_equal(open_network(small_network(), accelerator)(pixels(8))["probabilities"], there)
