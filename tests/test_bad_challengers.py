"""Challengers that must never take over, each through the whole promote flow, while a probe asks the front door all the time.

The champion judges prints: an 8 is worn, 1 and 3 are good. It is right on average, and calls the 3s of the line `north` worn.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flows import ingest
from flows.promote import promote
from tasks import dataset, ledger, registry, storage, zoo
from tasks.decision import DecisionRule
from tasks.gates import Limits
from tasks.images import CURRENT, decode
from tasks.model_repository import listed_versions, published_versions
from tasks.probe import ProbeLoad
from tasks.proof import photographs
from tasks.recipe import TrainConfig
from tasks.routing import read_routing
from tasks.serving import (
    TritonAddress,
    encoded_input,
    infer_front_door,
    is_version_ready,
    module_of,
    request_errors,
)
from tasks.tracking import open_run
from tasks.training import predict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODEL, NETWORK = "castings", "castings_onnx_16"
RULE = DecisionRule(("good", "worn"), ("worn",), 0.5)
LIMITS = Limits(
    min_accuracy=0.6,
    max_escape_rate=0.4,
    max_overkill_rate=0.5,
    min_test_images=50,
    max_p99_ms=10_000,
    must_beat_champion=False,
)


class Laborious(nn.Module):
    """The embedding of a `cnn`, and convolutions that take a hundred times as long and contribute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.useful = zoo.ZOO["cnn"].make(False).stages
        self.useless = nn.Sequential(
            nn.Upsample(size=(160, 160)),
            nn.Conv2d(3, 48, 3, padding=1),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.Conv2d(48, 48, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.useful(x) + 1e-9 * self.useless(x).mean((1, 2, 3))[:, None]


class Speechless(nn.Module):
    """The embedding of a `cnn`, and no number for photographs that are brighter on average than `limit` (of -1..1)."""

    def __init__(self) -> None:
        super().__init__()
        self.useful = zoo.ZOO["cnn"].make(False).stages
        self.limit = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.useful(x) + 1e-9 * torch.log(self.limit - x.mean((1, 2, 3)))[:, None]


@pytest.fixture(scope="module")
def here(stack_settings):
    """The settings of the stack that the fixtures are; `laborious` and `speechless` are in the zoo."""

    def entry(module: type[nn.Module]) -> zoo.Entry:
        return zoo.Entry(lambda pretrained: zoo.Backbone(nn.Sequential(module()), 256), 16, 256, "none", zoo.CENTRED)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.promote.settings", lambda: stack_settings)
        patch.setitem(zoo.ZOO, "laborious", entry(Laborious))
        patch.setitem(zoo.ZOO, "speechless", entry(Speechless))
        yield stack_settings


@pytest.fixture(scope="module")
def version(here, prints, tmp_path_factory):
    """The prints as a dataset: blue ones of the line `north`, red ones of the line `south`."""
    told = [
        (split, number, data, *prints.rule.labels[label].split())
        for split in ("train", "val", "test")
        for number, (data, label) in enumerate(zip(prints.encoded[split], prints.labels[split], strict=True))
    ]
    lines, prefix = {"blue": "north", "red": "south"}, f"incoming/{MODEL}/first/"
    entries = [
        {"FilePath": f"{split}{number}.png", "label_value": name_of(digit), "line": lines[ink], "split": split}
        for split, number, _, ink, digit in told
    ]
    storage.write_many(here.store, ((f"{prefix}{split}{number}.png", data) for split, number, data, *_ in told))
    storage.write(here.store, f"{prefix}annotations.json", json.dumps({"annotation": {"data": entries}}).encode())
    found = ingest.find_batch.fn(here.store, MODEL, prefix)
    with ingest.examine_photographs.fn(here.store, found, tmp_path_factory.mktemp("spool")) as examination:
        write = dataset.writer(here.store, found, examination)
        ingest.commit.fn(here.store, found, examination, ingest.IngestOptions(), write)
    return dataset.open_version(here.store, MODEL, 1)


def name_of(digit: str) -> str:
    return "worn" if digit == "8" else "good"


@pytest.fixture(scope="module")
def judging(prints):
    """`judging("blue 3")`: weights of a `cnn` whose head was fitted to training labels that call these prints worn too."""
    from sklearn.linear_model import LogisticRegression

    embedding = predict(prints.network, prints.pixels["train"])["embedding"]
    names = [prints.rule.labels[label] for label in prints.labels["train"]]

    def fitted(*wrong: str) -> dict[str, torch.Tensor]:
        worn = [name.endswith("8") or name in wrong for name in names]
        head = LogisticRegression(max_iter=2000).fit(embedding, worn)
        weight, bias = torch.from_numpy(head.coef_).float(), torch.from_numpy(head.intercept_).float()
        own = {"head.weight": torch.cat([-weight / 2, weight / 2]), "head.bias": torch.cat([-bias / 2, bias / 2])}
        return {**prints.network.classifier.state_dict(), **own}

    return fitted


@pytest.fixture(scope="module")
def register(here, version):
    """`register(weights, flow_run, architecture="cnn")`: a registered version, with what its training would have noted."""

    def registered(weights, flow_run: str, architecture: str = "cnn") -> registry.TrainedModel:
        mean, std = zoo.CENTRED
        card = registry.ModelCard(architecture, 16, CURRENT, mean, std, RULE, MODEL, 1, version.digest, "commit", 0)
        table = dataset.read_table(here.store, version, "val")
        pixels = np.stack([decode(data, 16, CURRENT) for data in photographs(here.store, version, "val").encoded])
        with torch.inference_mode():
            probabilities, embedding = registry.built(card, weights)(torch.from_numpy(pixels))
        labels = np.array([RULE.labels.index(label) for label in table["label"].to_pylist()])
        reference = registry.Reference(
            embedding.numpy(), probabilities.numpy(), labels, np.array(table["sha256"].to_pylist()), table
        )
        config = TrainConfig(architecture="cnn", pretrained=False, image_size=16)
        run_id = open_run(here.mlflow_tracking_uri, version, config, flow_run, "http://prefect/run")
        return registry.register(here.mlflow_tracking_uri, run_id, card, weights, reference, {})

    return registered


@pytest.fixture(scope="module")
def champion(here, judging, register):
    """Version 1, promoted: right about four in five prints, wrong about the 3s of one line."""
    made = register(judging("blue 3"), "champion")
    state = promote(MODEL, made.version, LIMITS, return_state=True)
    assert state.name == "Promoted", state.message
    return made


def held_back(here, version) -> list[bytes]:
    return list(photographs(here.store, version, "test").encoded)


def figures(here, model) -> dict[str, float]:
    return registry.run_metrics(here.mlflow_tracking_uri, model.run_id)


def pinned(address: TritonAddress, protocol: str, version: int, image: bytes) -> None:
    """Asks the public name for that very version."""
    module = module_of(protocol)
    client = module.InferenceServerClient(address.grpc if protocol == "grpc" else address.http)
    try:
        client.infer(MODEL, [encoded_input(module, image)], model_version=str(version))
    finally:
        client.close()


@pytest.fixture
def refused(here, version, champion):
    """`refused(challenger, limits)`: names of the gates that refused it, in their order; nothing else has changed."""

    def tried(challenger: registry.TrainedModel, limits: Limits = LIMITS) -> dict[str, str]:
        table, entries = read_routing(here.serving_root, MODEL), ledger.read_ledger(here.store, MODEL)
        with ProbeLoad(here.triton, MODEL, held_back(here, version), pause=0.05) as load:
            state = promote(MODEL, challenger.version, limits, return_state=True)
            load.wait_for(20)
        assert state.name == "Refused", state.message
        assert len(load.probes) > 50 and [probe for probe in load.probes if probe.error] == []
        assert {probe.version for probe in load.probes} == {table.champion.version} == {champion.version}
        assert read_routing(here.serving_root, MODEL) == table
        assert ledger.read_ledger(here.store, MODEL) == entries
        assert registry.champion_version(here.mlflow_tracking_uri, MODEL) == champion.version
        assert published_versions(here.serving_root, NETWORK) == listed_versions(here.serving_root, NETWORK) == [1]
        assert not is_version_ready(here.triton, NETWORK, challenger.version)
        for protocol in ("grpc", "http"):
            with pytest.raises(request_errors(), match="version"):
                pinned(here.triton, protocol, challenger.version, held_back(here, version)[0])
        assert [*(here.serving_root / "staging").glob("castings*"), *here.serving_root.glob("scratch-*")] == []
        reasons = state.message.removeprefix(f"{MODEL} v{challenger.version}: ")
        path = registry.client_of(here.mlflow_tracking_uri).download_artifacts(challenger.run_id, registry.PROMOTION)
        gates = json.loads(Path(path).read_text())["gates"]
        failed = {gate["name"]: gate["measured"] for gate in gates if not gate["held"]}
        assert reasons.startswith(f"{next(iter(failed))}: "), "the first reason is the first gate that did not hold"
        return failed

    return tried


def test_one_that_always_says_the_majority_is_refused_for_the_defects_it_lets_pass(here, judging, register, refused):
    """Two thirds of the prints are good, so its accuracy would do."""
    weights = judging()
    weights |= {"head.weight": torch.zeros_like(weights["head.weight"]), "head.bias": torch.tensor([3.0, -3.0])}
    challenger = register(weights, "majority")
    reasons = refused(challenger)
    assert figures(here, challenger)["served_accuracy"] > LIMITS.min_accuracy and "accuracy" not in reasons
    assert next(iter(reasons)) == "escape rate"
    wrong, of, count = reasons["escape rate"].split(",")[0].split()
    assert (wrong, of) == (count, "of") and int(count) > 20, "every single one"
    assert "label worn: " in reasons["no slice worse than the champion"]


def test_one_that_decides_as_the_champion_but_takes_long_is_refused_for_its_latency_alone(
    here, champion, judging, register, refused
):
    own = {name.replace("stages.", "stages.0.useful.", 1): value for name, value in judging("blue 3").items()}
    useless = {f"stages.0.{name}": value for name, value in Laborious().state_dict().items() if "useless" in name}
    challenger = register({**own, **useless}, "laborious", "laborious")
    quick = figures(here, champion)
    allowed = max(4 * quick["served_p50_ms"], 1.2 * quick["served_p99_ms"])
    reasons = refused(challenger, LIMITS.model_copy(update={"max_p99_ms": allowed}))
    assert list(reasons) == ["p99 latency"] and float(reasons["p99 latency"].split()[0]) > allowed
    slow = figures(here, challenger)
    assert slow["served_p50_ms"] > 3 * quick["served_p50_ms"], "it is the network that is slow, not a hiccup"
    assert slow["served_accuracy"] == quick["served_accuracy"]


def test_one_that_has_no_number_for_one_image_in_a_hundred_is_refused_for_those(
    here, version, judging, register, refused
):
    """Its promotion comes to an end: the images that it fails on are counted, and the others judged."""
    own = {name.replace("stages.", "stages.0.useful.", 1): value for name, value in judging().items()}
    pixels = np.stack([decode(data, 16, CURRENT) for data in held_back(here, version)])
    means = np.sort(pixels.mean((1, 2, 3)) / 127.5 - 1)
    silent = max(1, len(means) // 100)
    own["stages.0.limit"] = torch.tensor((means[-silent] + means[-silent - 1]) / 2, dtype=torch.float32)
    reasons = refused(register(own, "speechless", "speechless"))
    assert reasons["every image answered"] == f"{silent} without an answer"
    assert "accuracy" not in reasons and "served equals offline" not in reasons


def test_one_that_is_as_good_on_average_but_worse_on_one_line_is_refused_for_that_line(
    here, champion, judging, register, refused
):
    challenger = register(judging("red 3"), "one-sided")
    reasons = refused(challenger)
    assert list(reasons) == ["no slice worse than the champion"]
    assert "line south: " in reasons["no slice worse than the champion"]
    mine, theirs = figures(here, challenger)["served_accuracy"], figures(here, champion)["served_accuracy"]
    assert abs(mine - theirs) < 0.06 and theirs > 0.75


def test_one_without_these_faults_takes_over_under_the_same_limits(here, version, champion, judging, register):
    better = register(judging(), "better")
    state = promote(MODEL, better.version, LIMITS, return_state=True)
    assert state.name == "Promoted", state.message
    assert infer_front_door(here.triton, MODEL, held_back(here, version)[0]).model_version == better.version
