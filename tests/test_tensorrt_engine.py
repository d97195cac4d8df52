"""Engines: really built with TensorRT for RTX, which needs no card; plans of TensorRT where there is one."""

import hashlib
import importlib.util
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from tasks.engine_passport import (
    EnginePassport,
    EngineServer,
    matches,
    mismatches,
    read_passport,
    write_passport,
)
from tasks.export import Export, export_network
from tasks.inference import open_network
from tasks.model import build_model, image_network
from tasks.parity import compare
from tasks.quantize import Calibration
from tasks.recipe import ARCHITECTURES
from tasks.tensorrt_engine import EngineOptions, NoEngine, build_engine
from tasks.tensorrt_graph import for_tensorrt
from tasks.zoo import ZOO

RTX = EngineOptions("tensorrt_rtx", largest=8)
PLAN = EnginePassport(
    "tensorrt",
    "10.13.2",
    "a" * 64,
    "b" * 64,
    "float16",
    "8.6",
    "NVIDIA A10",
    (1, 8, 8),
    False,
    False,
    None,
    "2026",
    40.0,
)
SERVER = EngineServer("tensorrt", "10.13.2", "8.6", "NVIDIA A10")


@pytest.fixture(scope="module")
def made(prints, tmp_path_factory):
    """`made(precision)`: the trained network as ONNX in this precision."""
    files = {}

    def exported(precision):
        if precision not in files:
            folder = tmp_path_factory.mktemp(precision)
            calibration = Calibration(prints.pixels["train"][:64])
            files[precision] = export_network(
                prints.network, 16, folder, Export(precision=precision), lambda: calibration
            )
        return files[precision]

    return exported


def answers(data, pixels, folder):
    """What a graph answers in onnxruntime."""
    (folder / "graph.onnx").write_bytes(data)
    return open_network(folder / "graph.onnx", "onnxruntime")(pixels)["probabilities"]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_the_graph_that_tensorrt_gets_computes_the_same(made, prints, tmp_path, precision):
    pixels = prints.pixels["test"][:32]
    file = made(precision).file
    served = answers(file.read_bytes(), pixels, tmp_path)
    np.testing.assert_allclose(answers(for_tensorrt(file), pixels, tmp_path), served, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_an_engine_is_built_without_a_card_in_every_precision_and_says_what_it_is(made, tmp_path, precision):
    exported, told = made(precision), []
    digest = exported.passport.get("calibration_digest")
    passport = build_engine(exported.file, tmp_path / "engine", RTX, precision, digest, told.append)
    assert passport.onnx_sha256 == hashlib.sha256(exported.file.read_bytes()).hexdigest()
    assert passport.engine_sha256 == hashlib.sha256((tmp_path / "engine").read_bytes()).hexdigest()
    assert (passport.precision, passport.profile, passport.compute_capability) == (precision, (1, 8, 8), "8.9")
    assert passport.device == "none" and (passport.calibration_digest is not None) == (precision == "int8")
    assert "MB built in" in told[-1]
    write_passport(tmp_path, passport)
    assert read_passport(tmp_path) == passport


def test_half_precision_makes_a_smaller_engine(made, tmp_path):
    sizes = {}
    for precision in ("float32", "float16"):
        build_engine(made(precision).file, tmp_path / precision, RTX, precision)
        sizes[precision] = (tmp_path / precision).stat().st_size
    assert sizes["float16"] < 0.75 * sizes["float32"]


def test_a_build_tells_how_far_it_is(made, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.tensorrt_engine.TOLD_EVERY", 0.0)
    told = []
    build_engine(made("float32").file, tmp_path / "engine", RTX, "float32", tell=told.append)
    lines = [line for line in told if " of " in line and "MB" not in line]
    assert len(lines) > 5 and all(line.startswith("tensorrt_rtx ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_network_of_the_zoo_becomes_an_engine_with_a_dynamic_batch(architecture, tmp_path):
    torch.manual_seed(0)
    size = max(32, ZOO[architecture].smallest)
    network = image_network(architecture, build_model(architecture, 3, pretrained=False))
    calibration = Calibration(np.random.default_rng(0).integers(0, 256, (16, size, size, 3), dtype=np.uint8))
    for precision in (
        "float32",
        "float16",
    ):  # in INT8 each was built by hand (docs/export.md): calibrating takes longest
        folder = tmp_path / precision
        folder.mkdir()
        exported = export_network(network, size, folder, Export(precision=precision), lambda: calibration)
        options = EngineOptions("tensorrt_rtx", smallest=1, best=4, largest=16)
        passport = build_engine(exported.file, folder / "engine", options, precision)
        assert passport.profile == (1, 4, 16) and (folder / "engine").stat().st_size > 100_000


NO_CARD = "needs a CUDA card and the extra `gpu`: TensorRT builds and runs plans on the card that serves them"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None or not torch.cuda.is_available(), reason=NO_CARD)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_plan_decides_like_the_onnx_network_and_knows_its_card(made, prints, tmp_path, precision):
    from tasks.engine_run import OpenedEngine
    from tasks.tensorrt_engine import server_of

    options = EngineOptions("tensorrt", timing_cache=tmp_path / "cache")
    passport = build_engine(made(precision).file, tmp_path / "model.plan", options, precision)
    assert matches(passport, server_of("tensorrt")) and len(list((tmp_path / "cache").iterdir())) == 1
    pixels = prints.pixels["test"]
    found = OpenedEngine(tmp_path / "model.plan", "tensorrt", 8)(pixels)
    rung = compare("plan", open_network(made("float32").file)(pixels)["probabilities"], found, prints.rule)
    assert rung.flips == 0 and rung.largest_difference < 0.02


def test_a_graph_that_tensorrt_cannot_take_is_refused_with_its_own_words(made, tmp_path):
    model = onnx.load(made("float32").file)
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.op_type = "Bernoulli"
            node.ClearField("attribute")
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(NoEngine, match=r"odd.onnx: .*Bernoulli"):
        build_engine(tmp_path / "odd.onnx", tmp_path / "engine", RTX, "float32")
    assert not (tmp_path / "engine").exists()


def test_cards_and_profiles_that_do_not_exist_are_named(made, tmp_path):
    with pytest.raises(NoEngine, match=r"75, .*89.* not 9\.0"):
        options = EngineOptions("tensorrt_rtx", compute_capability="9.0")
        build_engine(made("float32").file, tmp_path / "engine", options, "float32")
    with pytest.raises(ValueError, match="0 <= 8 <= 8 does not hold"):
        EngineOptions("tensorrt", smallest=0)


def test_a_missing_library_says_what_to_install(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(NoEngine, match=r"tirewatch\[rtx\]"):
        build_engine(made("float32").file, tmp_path / "engine", RTX, "float32")


def test_an_engine_runs_where_version_and_card_are_those_it_was_built_for():
    assert matches(PLAN, SERVER)
    assert mismatches(PLAN, replace(SERVER, builder="tensorrt_rtx")) == (
        "built by tensorrt, and the server has tensorrt_rtx",
    )
    both = mismatches(PLAN, replace(SERVER, version="11.1.0", compute_capability="8.9", device="NVIDIA L4"))
    assert both == (
        "built by tensorrt 10.13.2, and the server has 11.1.0",
        "built for compute capability 8.6, and the server's NVIDIA L4 has 8.9",
    )


@pytest.mark.parametrize(
    ("changes", "server", "runs"),
    [
        ({"version_compatible": True}, {"version": "11.1.0"}, True),
        ({"version_compatible": True}, {"version": "10.9.0"}, False),  # never backwards
        ({"version_compatible": True}, {"version": "10.2.0"}, False),  # 10.13 is later than 10.2
        ({"hardware_compatible": True}, {"compute_capability": "9.0"}, True),
        ({"hardware_compatible": True}, {"compute_capability": "12.0"}, True),
        ({"hardware_compatible": True}, {"compute_capability": "7.5"}, False),  # before Ampere
        ({}, {"device": "another card of the same capability"}, True),
    ],
)
def test_compatible_engines_run_on_later_versions_and_other_cards(changes, server, runs):
    assert matches(replace(PLAN, **changes), replace(SERVER, **server)) is runs


def test_engines_of_one_making_are_told_from_others():
    elsewhere = replace(PLAN, builder_version="11.1.0", compute_capability="8.9", device="NVIDIA L4", built_at="2027")
    assert PLAN.is_of(elsewhere) and elsewhere.is_of(PLAN)
    for change in (
        {"onnx_sha256": "c" * 64},
        {"profile": (1, 4, 4)},
        {"precision": "int8"},
        {"version_compatible": True},
    ):
        assert not PLAN.is_of(replace(PLAN, **change)), change


def test_a_damaged_passport_is_named(tmp_path):
    write_passport(tmp_path, PLAN).write_text("{}")
    with pytest.raises(ValueError, match=r"engine.json is no engine passport"):
        read_passport(tmp_path)
