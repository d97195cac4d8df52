"""The switch on a live server: a proof keeps the new version, and whatever else ends the watch brings the former one back."""

from collections.abc import Iterator

import numpy as np
import pytest

from tasks.images import decode
from tasks.inference import open_network
from tasks.model_repository import FrontDoor, network_name, stage_version
from tasks.proof import Golden
from tasks.routing import read_routing
from tasks.serving import NotServed, infer_front_door, unload_model
from tasks.swap import STEADY, Swap, swap


@pytest.fixture
def images(photograph):
    return [photograph(seed) for seed in range(8)]


@pytest.fixture
def produced(in_production):
    """`produced(model)`: version 1 of the model answers."""
    return lambda model: in_production(model, FrontDoor(capture_share=0.0))


@pytest.fixture
def to_second(triton, small_network, describe, images):
    """`to_second(model, images)`: switches to version 2 under a probe load of these photographs."""

    def switched(model: str, shown=images) -> Swap:
        pixels = np.stack([decode(image, 32) for image in images[:4]])
        golden = Golden(pixels, open_network(small_network(2))(pixels)["probabilities"])
        version = describe(model, 2, network=f"{model}_second_onnx_32")  # so that version 1 can leave the server alone
        staged = stage_version(triton.root, small_network(2), version)
        revision = read_routing(triton.root, model).revision + 1
        return swap(
            triton.root,
            triton.address,
            staged,
            golden,
            shown,
            "openvino",
            late_ms=5000,
            capture_share=0,
            revision=revision,
        )

    return switched


def test_a_champion_that_cannot_answer_is_replaced_and_its_failures_do_not_count_against_the_new_version(
    triton, produced, to_second, images
):
    produced("silent")
    unload_model(triton.address, network_name("silent", 32))
    with pytest.raises(NotServed):
        infer_front_door(triton.address, "silent", images[0])
    done = to_second("silent")
    assert not done.undone and done.back is None and done.gates[0].held
    assert done.proof.failed == 0 and done.proof.failed_before >= STEADY and done.proof.taken_over > STEADY / 2
    assert "swap_p99_ratio" not in done.figures and "no answer before it" in done.gates[0].measured
    assert infer_front_door(triton.address, "silent", images[0]).model_version == 2


def test_without_a_probe_load_nothing_is_switched(triton, produced, to_second, images):
    produced("unwatched")
    before = read_routing(triton.root, "unwatched")
    with pytest.raises(RuntimeError, match="the probe load itself failed"):
        to_second("unwatched", [*images, None])
    assert read_routing(triton.root, "unwatched") == before
    assert infer_front_door(triton.address, "unwatched", images[0]).model_version == 1


def test_a_switch_whose_probe_load_dies_after_it_is_taken_back(triton, produced, to_second, images):
    produced("abandoned")
    before = read_routing(triton.root, "abandoned")

    class UntilSwitched(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            while read_routing(triton.root, "abandoned") == before:
                yield images[0]
            raise OSError("the photographs are gone")

    with pytest.raises(RuntimeError, match="the probe load itself failed: the photographs are gone"):
        to_second("abandoned", UntilSwitched())
    after = read_routing(triton.root, "abandoned")
    assert (after.champion, after.previous, after.revision) == (before.champion, None, before.revision + 2)
    assert infer_front_door(triton.address, "abandoned", images[0]).model_version == 1
