import copy
import hashlib
import shutil
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
import torch

from tasks.decision import DecisionRule
from tasks.export import Export, export_network
from tasks.gates import Limits, decide_promotion
from tasks.images import CURRENT
from tasks.model_repository import FRONT_DOOR_TEMPLATE, install_front_door, publish_version, stage_version
from tasks.network_forms import artifact_runs, run_all, torch_run
from tasks.onnx_export import export_onnx
from tasks.parity import Step, climb, compare, golden_indices
from tasks.proof import Bench, Photographs, prove, recorded, steps
from tasks.quantize import Calibration
from tasks.registry import Reference
from tasks.sealed import read_sealed

RULE = DecisionRule(("defective", "good"), ("defective",), 0.5)


def binary(scores):
    scores = np.asarray(scores, dtype=np.float32)
    return np.stack([scores, 1 - scores], axis=1)


def test_differences_and_flips_are_counted():
    rung = compare("onnx", binary([0.2, 0.49, 0.9]), binary([0.2, 0.51, 0.8]), RULE)
    assert (rung.flips, rung.images) == (1, 3)
    assert rung.largest_difference == pytest.approx(0.1, abs=1e-6)
    assert rung.flip_share == pytest.approx(1 / 3)


def test_an_image_without_a_number_is_a_flip_and_said():
    rung = compare("onnx", binary([0.2, 0.9]), binary([float("nan"), 0.9]), RULE)
    assert not rung.held and (rung.flips, rung.silent, rung.largest_difference) == (1, 1, 0.0)
    assert rung.measured.endswith("; 1 without a number")
    assert not compare("onnx", binary([float("nan")]), binary([float("nan")]), RULE).held


def test_an_image_that_a_network_fails_on_is_silent_and_one_that_fails_on_all_is_an_error():
    def run(pixels):
        if (pixels > 200).any():
            raise RuntimeError("too bright")
        return binary(pixels[:, 0, 0, 0] / 255)

    pixels = np.full((3, 8, 8, 3), 51, np.uint8)
    pixels[1] = 255
    encoded = [cv2.imencode(".png", image)[1].tobytes() for image in pixels]
    (found,) = run_all([run], encoded, 8, CURRENT)
    assert np.isnan(found[1]).all() and found[[0, 2], 0].tolist() == pytest.approx([0.2, 0.2])
    with pytest.raises(RuntimeError, match="too bright"):
        run_all([run], encoded[1:2], 8, CURRENT)


def test_a_rung_with_other_images_is_an_error():
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(2, 2\)"):
        compare("onnx", binary([0.2]), binary([0.2, 0.3]), RULE)


def test_a_rung_of_equal_precision_is_stopped_by_more_than_rounding_and_a_reduced_one_by_flips_only():
    steps = [
        Step("PyTorch", binary([0.2, 0.9])),
        Step("ONNX", binary([0.21, 0.9]), limit=1e-3),
        Step("int8", binary([0.25, 0.9])),
        Step("Triton", binary([0.55, 0.9]), limit=1e-3),
    ]
    rungs = climb(steps, RULE)
    assert [(rung.name, rung.held, rung.flips) for rung in rungs] == [
        ("PyTorch -> ONNX", False, 0),
        ("ONNX -> int8", True, 0),
        ("int8 -> Triton", False, 1),
    ]
    assert "differences to 1e-02" in rungs[0].measured and rungs[0].demanded.endswith("at most 1e-03")


def test_no_golden_image_is_no_evidence():
    (rung,) = climb([Step("PyTorch", np.empty((0, 2))), Step("ONNX", np.empty((0, 2)), limit=1e-3)], RULE)
    assert not rung.held


def test_golden_images_are_clear_stratified_and_the_same_every_time():
    scores = np.concatenate([np.linspace(0.5, 0.56, 20), np.linspace(0.6, 1.0, 300), np.linspace(0.0, 0.4, 40)])
    labels = ["defective"] * 320 + ["good"] * 40
    chosen = golden_indices(binary(scores), labels, RULE)
    assert len(chosen) == 128
    assert np.array_equal(chosen, golden_indices(binary(scores), labels, RULE))
    assert (np.abs(scores[chosen] - 0.5) >= 0.05 - 1e-6).all()
    assert sum(labels[i] == "good" for i in chosen) == 40  # all of the scarce label, the rest from the other


def test_golden_images_of_a_multi_class_rule_have_a_clear_winner():
    rule = DecisionRule(("a", "b", "c"))
    probabilities = np.array([[0.34, 0.33, 0.33], [0.8, 0.1, 0.1], [0.1, 0.5, 0.4]])
    assert golden_indices(probabilities, ["a", "a", "b"], rule).tolist() == [1, 2]


# --- planted faults: each is stopped at the rung where it was planted ---------------------------------------------


@pytest.fixture
def staged(prints, tmp_path, describe):
    """`staged(network, calibrated_on)`: a sealed version, in INT8 where it is told what to calibrate on."""

    def made(network=None, calibrated_on=None):
        how = Export(precision="float32" if calibrated_on is None else "int8")
        exported = export_network(network or prints.network, 16, tmp_path, how, lambda: Calibration(calibrated_on))
        told = describe("prints", 3, rule=prints.rule, image_size=16, network="prints_onnx_16", precision=how.precision)
        return stage_version(tmp_path / "live", exported.file, told, exported.beside)

    return made


@pytest.fixture
def stopped_here(prints, staged):
    """`stopped_here(network, calibrated_on, trained)`: the rungs below the server that do not hold."""

    def climbed(network=None, calibrated_on=None, trained=None):
        directory = staged(network, calibrated_on)
        forms = {"PyTorch": torch_run(prints.network)}
        forms |= artifact_runs(directory, read_sealed(directory).precision, "openvino")
        found = {name: run(prints.pixels["val"]) for name, run in forms.items()}
        names = [prints.rule.labels[n] for n in prints.labels["val"]]
        golden = golden_indices(found["PyTorch"], names, prints.rule)
        written = recorded(trained, [prints.encoded["val"][n] for n in golden])
        rungs = climb(steps(written, {name: values[golden] for name, values in found.items()}, {}), prints.rule)
        assert all(rung.images > 60 for rung in rungs)
        return [rung.name for rung in rungs if not rung.held]

    return climbed


@pytest.fixture
def proven(prints, staged, tmp_path, triton_python):
    """`proven(calibrated_on, trained)`: the evidence about a sound version, down to a scratch server's answers, as the gates
    see it: rungs, and the names of those that do not hold.
    """

    def climbed(calibrated_on=None, trained=None):
        splits = [
            Photographs(prints.encoded[part][:60], [prints.rule.labels[n] for n in prints.labels[part][:60]])
            for part in ("val", "test")
        ]
        bench = Bench(tmp_path / "live", triton_python, "openvino", 4)
        evidence = prove(*splits, prints.network, staged(None, calibrated_on), None, bench, trained).evidence
        stopped = [rung.name for rung in evidence.rungs if not rung.held]
        gates = [gate for gate in decide_promotion(evidence, Limits()).gates if gate.name.startswith("parity ")]
        assert [(gate.name, gate.held) for gate in gates] == [(f"parity {r.name}", r.held) for r in evidence.rungs]
        return [rung.name for rung in evidence.rungs], stopped

    return climbed


def wrong(network, damage):
    """A copy of the network with something done to it."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        damage(other)
    return other


def noted(prints, network):
    """What training would have written down about the validation split."""
    with torch.inference_mode():
        probabilities = network(torch.from_numpy(prints.pixels["val"]))[0].numpy()
    digests = np.array([hashlib.sha256(data).hexdigest() for data in prints.encoded["val"]])
    return Reference(np.zeros((len(digests), 1), np.float32), probabilities, prints.labels["val"], digests, None)


def test_a_sound_int8_version_climbs_every_rung(proven, prints):
    rungs, stopped = proven(prints.pixels["train"][:128], noted(prints, prints.network))
    below = ["training -> PyTorch", "PyTorch -> ONNX", "ONNX -> int8"]
    assert rungs == [*below, "int8 -> Triton", "Triton -> front door"] and stopped == []


def perturb(network):
    network.classifier.stages[1][0].weight[5] *= 1.5


def swap_colours(network):
    network.classifier.stages[0][0].weight.copy_(network.classifier.stages[0][0].weight.flip(1))


def test_a_weight_that_changed_after_training_is_stopped_at_pytorch(stopped_here, prints):
    assert stopped_here(trained=noted(prints, wrong(prints.network, perturb))) == ["training -> PyTorch"]


@pytest.mark.parametrize("fault", [perturb, swap_colours])
def test_a_weight_or_colours_changed_in_the_export_are_stopped_at_onnx(stopped_here, prints, fault):
    assert stopped_here(wrong(prints.network, fault), trained=noted(prints, prints.network)) == ["PyTorch -> ONNX"]


def test_int8_calibrated_on_noise_is_stopped_at_int8(stopped_here, prints):
    """A camera that looked at a grey cap: sensor noise, and nothing of what the network will see."""
    noise = np.random.default_rng(0).normal(128, 2, (128, 16, 16, 3)).astype(np.uint8)
    assert stopped_here(calibrated_on=noise) == ["ONNX -> int8"]
    assert stopped_here(calibrated_on=prints.pixels["train"][:128]) == []


@pytest.mark.slow
def test_another_network_on_the_server_is_stopped_at_triton(proven, prints, tmp_path, monkeypatch):
    def copied(source, root, runtime):
        export_onnx(wrong(prints.network, perturb), 16, tmp_path / "other.onnx")
        sealed = replace(read_sealed(source), files={})
        return publish_version(root, stage_version(root, tmp_path / "other.onnx", sealed), runtime)

    monkeypatch.setattr("tasks.scratch.copy_version", copied)
    assert proven()[1] == ["ONNX -> Triton"]


IMPORTED = (
    "import UnreadableImage, self_check\nfrom tasks.images import decode as decoded\n\n\ndef decode(data, size, how):\n"
)
SWAPPED = "    return np.ascontiguousarray(decoded(data, size, how)[..., ::-1])\n"
NEAREST = (
    "    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]\n"
    "    return np.ascontiguousarray(cv2.resize(picture, (size, size), interpolation=cv2.INTER_NEAREST))\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("door", [SWAPPED, NEAREST], ids=["swapped colours", "wrong resize"])
def test_another_preprocessing_in_the_server_is_stopped_at_the_front_door(proven, tmp_path, monkeypatch, door):
    template = shutil.copytree(FRONT_DOOR_TEMPLATE, tmp_path / "door")
    program = template / "1" / "model.py"
    before = program.read_text()
    program.write_text(before.replace("import UnreadableImage, decode, self_check", IMPORTED + door))
    assert program.read_text() != before
    monkeypatch.setattr("tasks.scratch.install_front_door", partial(install_front_door, template=template))
    assert proven()[1] == ["Triton -> front door"]
