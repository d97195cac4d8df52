"""promote with `delivery`, as its users run it: a model in production, clients that ask, a candidate that comes in by steps."""

import threading
import uuid
from dataclasses import replace

import cv2
import numpy as np
import pytest
from prefect.client.orchestration import get_client

from flows import delivery as delivery_step
from flows.promote import promote
from tasks import ledger, registry, rollout
from tasks.dataset import open_version
from tasks.decision import DecisionRule
from tasks.delivery import Canary, Delivery
from tasks.gates import Limits
from tasks.recipe import TrainConfig
from tasks.routing import read_routing
from tasks.serving import NotServed, infer_front_door
from tasks.tracking import open_run

pytestmark = pytest.mark.slow
LIMITS = Limits(min_accuracy=0.3, min_test_images=20, max_p99_ms=10_000, must_beat_champion=False)
HOW = Delivery(shadow_requests=30, canary=(Canary(share=0.5),), canary_requests=20, minutes=4, max_late_rate=0.5)


@pytest.fixture(scope="module")
def here(stack_settings):
    found = stack_settings.model_copy(update={"capture_share": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.promote.settings", lambda: found)
        patch.setattr(rollout, "LOOK_EVERY", 0.5)
        patch.setattr(delivery_step, "PAGE_EVERY", 0.0)
        yield found


@pytest.fixture
def clients(here, prints):
    """`clients(model, images)`: somebody asks it until the test ends; (versions that answered, refusals)."""
    stop, threads = threading.Event(), []

    def asking(model: str, images: list[bytes] = prints.encoded["test"]) -> tuple[set[int], list[str]]:
        versions: set[int] = set()
        refused: list[str] = []

        def ask() -> None:
            number = 0
            while not stop.wait(0.02):
                number += 1
                try:
                    said = {"tire_id": f"T{number}"}
                    image = images[number % len(images)]
                    versions.add(infer_front_door(here.triton, model, image, parameters=said).model_version)
                except NotServed as error:
                    refused.append(str(error))

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        return versions, refused

    yield asking
    stop.set()
    for thread in threads:
        thread.join(30)


def pages(key: str) -> list[str]:
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": [key]}}}).json()
    return [each["data"] for each in found]


def test_a_good_candidate_comes_in_by_steps_and_takes_over(here, register_prints, clients):
    register_prints("stepwise", versions=2)
    first = promote("stepwise", 1, LIMITS, delivery=HOW, return_state=True)
    assert first.name == "Promoted", first.message  # nobody to be compared with: switched to at once
    versions, refused = clients("stepwise")
    second = promote("stepwise", 2, LIMITS, delivery=HOW, return_state=True)
    assert second.name == "Promoted", second.message
    assert versions == {1, 2} and refused == []
    evidence = ledger.read_ledger(here.store, "stepwise")[-1].evidence
    assert evidence["live_requests_per_second"] > 1 and evidence["machine_load"] > 0  # beside the latencies
    gates = [gate["name"] for gate in evidence["gates"]]
    assert [name for name in gates if name.startswith("delivery")] == [
        "delivery, shadow",
        "delivery, canary, 0.5 of the requests",
    ]
    table = read_routing(here.serving_root, "stepwise")
    assert (table.champion.version, table.previous.version, table.challenger) == (2, 1, None)
    shown = pages("delivery-stepwise")
    assert any("# stepwise v2: delivered" in page for page in shown)
    assert any("Step: shadow" in page for page in shown)


@pytest.fixture
def register_red_as_defects(here, register_prints):
    """`register_red_as_defects(name)`: version 2 has version 1's weights, and red prints as defects from a score of 0.3 on: on
    the test split not one decision differs, on photographs without colours about a quarter.
    """

    def registered(name: str) -> None:
        model, card = register_prints(name)
        uri = here.mlflow_tracking_uri
        rule = DecisionRule(
            card.rule.labels, tuple(label for label in card.rule.labels if label.startswith("red")), 0.3
        )
        run = open_run(uri, open_version(here.store, name, 1), TrainConfig(), str(uuid.uuid4()), "http://prefect/run")
        weights = registry.load_weights(uri, name, model.version, card.architecture, card.rule.labels)
        reference = registry.load_reference(uri, name, model.version)
        registry.register(uri, run, replace(card, rule=rule), weights, reference, {})

    return registered


def without_colours(encoded: bytes) -> bytes:
    """As a camera whose colour channels are one."""
    grey = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR).mean(axis=2, keepdims=True)
    return cv2.imencode(".png", np.repeat(grey, 3, axis=2).astype(np.uint8))[1].tobytes()


def test_one_that_every_gate_lets_pass_and_production_does_not_is_refused_with_the_rate_as_its_reason(
    here, register_red_as_defects, prints, clients
):
    register_red_as_defects("contradicted")
    loose = LIMITS.model_copy(update={"max_escape_rate": 0.9, "max_overkill_rate": 0.9, "min_defects": 5})
    assert promote("contradicted", 1, loose, return_state=True).name == "Promoted"
    versions, refused = clients("contradicted", [without_colours(image) for image in prints.encoded["test"]])
    how = HOW.model_copy(update={"shadow_requests": 2000})
    state = promote("contradicted", 2, loose, delivery=how, return_state=True)
    assert state.name == "Refused" and "labelled otherwise than by the champion" in state.message, state.message
    assert "accuracy" not in state.message and state.message.count("demanded") == 1
    assert versions == {1} and refused == []
    assert [entry.version for entry in ledger.read_ledger(here.store, "contradicted")] == [1]
    assert any("# contradicted v2: withdrawn" in page for page in pages("delivery-contradicted"))


def test_a_delivery_that_could_see_nothing_is_refused_before_any_work(here, register_prints, monkeypatch):
    blind = here.model_copy(update={"capture_share": 0.0})
    monkeypatch.setattr("flows.promote.settings", lambda: blind)
    state = promote("unseen_by_capture", 1, LIMITS, delivery=HOW, return_state=True)
    assert state.is_failed() and "TIREWATCH_CAPTURE_SHARE" in state.message
