"""prefect.yaml as data: what it names exists, and what it passes is accepted."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from deploy.recipes import flow_of, for_recipe, read_prefect_yaml
from deploy.register import HEARTBEATS_MISSED

FILE = Path(__file__).parents[1] / "prefect.yaml"
PARSED = read_prefect_yaml(FILE)
EVERY: list[dict[str, Any]] = PARSED["deployments"]
RECIPES = ("tire", "solar_cells", "digits")
PUBLISHED = (
    "elpv",
    "tyre_condition",
    "cifar10",
)  # run by hand for docs/results.md: no event starts them, nothing is served
DEPLOYMENTS = [found for found in EVERY if found["name"] not in ("line", *PUBLISHED)]  # those of a recipe
# Event -> kind of resource and payload, as docs/architecture.md lists them.
EVENTS = {
    "tirewatch.batch.sealed": ("dataset", {"dataset", "batch", "prefix"}),
    "tirewatch.dataset.version.created": ("dataset", {"dataset", "version", "digest"}),
    "tirewatch.model.registered": ("model", {"model", "version", "dataset", "dataset_version"}),
}
STARTED_BY = {
    "ingest": "tirewatch.batch.sealed",
    "train": "tirewatch.dataset.version.created",
    "promote": "tirewatch.model.registered",
}


def name_of(deployment: dict[str, Any]) -> str:
    return f"{flow_of(deployment)}/{deployment['name']}"


def flow_behind(deployment: dict[str, Any]) -> Any:
    module, _, function = deployment["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), function)


def test_every_recipe_has_every_deployment() -> None:
    flows = {flow_of(deployment) for deployment in DEPLOYMENTS}
    assert flows >= {"ingest", "train", "promote", "rollback"}
    assert sorted(map(name_of, DEPLOYMENTS)) == sorted(f"{flow}/{recipe}" for flow in flows for recipe in RECIPES)


def test_a_published_set_is_taken_in_and_trained_by_hand_alone() -> None:
    found = [deployment for deployment in EVERY if deployment["name"] in PUBLISHED]
    assert sorted(map(name_of, found)) == sorted(f"{flow}/{name}" for flow in ("ingest", "train") for name in PUBLISHED)
    assert not any("triggers" in deployment for deployment in found)


def test_the_events_are_the_ones_that_the_architecture_lists() -> None:
    text = (FILE.parent / "docs" / "architecture.md").read_text()
    for event, (kind, payload) in EVENTS.items():
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{event}`")]
        assert f"`tirewatch.{kind}.<" in row
        assert set(re.findall(r"`(\w+)`", row.split("|")[3])) == payload


@pytest.mark.parametrize("deployment", [d for d in DEPLOYMENTS if flow_of(d) in STARTED_BY], ids=name_of)
def test_a_deployment_is_started_by_the_event_of_its_own_recipe(deployment: dict[str, Any]) -> None:
    [trigger] = deployment["triggers"]
    [event] = trigger["expect"]
    assert event == STARTED_BY[flow_of(deployment)]
    kind, payload = EVENTS[event]
    assert trigger["match"] == {"prefect.resource.id": f"tirewatch.{kind}.{deployment['name']}"}
    assert trigger["parameters"]["occasion"] == "event {{ event.id }}", "so that a repeated event does nothing twice"
    used = {match for value in trigger["parameters"].values() for match in re.findall(r"event\.payload\.(\w+)", value)}
    assert used <= payload


@pytest.mark.parametrize("deployment", EVERY, ids=name_of)
def test_parameters_are_accepted_by_the_flow(deployment: dict[str, Any]) -> None:
    flow = flow_behind(deployment)
    from_event = {
        "occasion": "event 1",
        "prefix": "incoming/x/y/",
        "dataset": "x",
        "model": "x",
        "dataset_version": 3,
        "version": 3,
    }
    asked = [name for trigger in deployment.get("triggers", ()) for name in trigger["parameters"]]
    by_hand = {"rollback": {"why": "x"}, "ingest": {"prefix": "incoming/x/y/"}}
    triggered = {**by_hand.get(flow.name, {}), **{name: from_event[name] for name in asked}}
    given = {**deployment.get("parameters", {}), **triggered}
    flow.validate_parameters(given)
    with pytest.raises(Exception, match="epocs"):
        flow.validate_parameters({**given, "epocs": 3})


@pytest.mark.parametrize("deployment", [d for d in EVERY if flow_of(d) == "labels"], ids=name_of)
def test_labels_are_judged_by_the_training_of_their_own_recipe(deployment: dict[str, Any]) -> None:
    [train] = [found for found in EVERY if name_of(found) == f"train/{deployment['name']}"]
    assert deployment["parameters"]["config"] == train["parameters"]["config"]


@pytest.mark.parametrize("deployment", [d for d in EVERY if flow_of(d) in ("tune", "scenario")], ids=name_of)
def test_a_search_starts_from_what_the_recipe_trains_with(deployment: dict[str, Any]) -> None:
    from tasks.candidates import Scenario, configurations
    from tasks.recipe import TrainConfig
    from tasks.search_space import Search, check_space

    [train] = [found for found in EVERY if name_of(found) == f"train/{deployment['name']}"]
    given = deployment["parameters"]
    assert given["config"] == train["parameters"]["config"]
    config = TrainConfig.model_validate(given["config"])
    if flow_of(deployment) == "tune":
        assert check_space(Search.model_validate(given["search"]), config)
    else:
        assert len(configurations(Scenario.model_validate(given["scenario"]), config)) == 3


@pytest.mark.parametrize("deployment", EVERY, ids=name_of)
def test_the_parameter_form_is_described_and_bounded(deployment: dict[str, Any]) -> None:
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(flow_behind(deployment)).model_dump_for_openapi()
    for name, parameter in schema["properties"].items():
        assert parameter.get("description") or "$ref" in str(parameter), f"{name} has no description"
    for definition in schema.get("definitions", {}).values():
        for name, field in definition.get("properties", {}).items():
            assert field.get("description") or "$ref" in str(field), f"{name} has no description"


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=name_of)
def test_a_deployment_runs_one_at_a_time_in_the_right_pool(deployment: dict[str, Any]) -> None:
    assert deployment["work_pool"]["name"] == ("gpu" if flow_of(deployment) in ("train", "tune", "scenario") else "cpu")
    assert deployment["concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_limit"]["collision_strategy"] == "ENQUEUE"
    assert deployment["enforce_parameter_schema"] is True
    assert deployment["name"] in deployment["tags"]


def test_every_run_sends_heartbeats_whatever_its_worker_was_started_with() -> None:
    """Without them nobody notices that its process was killed, and it holds its claims for ever."""
    for deployment in EVERY:
        every = float(deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 3 * every <= HEARTBEATS_MISSED, name_of(deployment)


def test_drift_has_a_schedule_that_waits_to_be_switched_on() -> None:
    drifts = [deployment for deployment in DEPLOYMENTS if flow_of(deployment) == "drift"]
    assert len(drifts) == len(RECIPES)
    for deployment in drifts:
        [schedule] = deployment["schedules"]
        assert (schedule["cron"], schedule["active"]) == ("*/15 * * * *", False)
        assert not deployment.get("triggers"), "no event starts it: it looks at what has come in"


def test_what_events_lose_is_looked_for_every_ten_minutes() -> None:
    [line] = [found for found in EVERY if found["name"] == "line"]
    assert name_of(line) == "sweep/line"
    [schedule] = line["schedules"]
    assert schedule["cron"] == "*/10 * * * *" and schedule.get("active", True)


def test_a_new_recipe_is_the_template_under_another_name() -> None:
    made = for_recipe(PARSED, "photographs", config={"defect_labels": ["worn"]})
    flows = {flow_of(deployment) for deployment in DEPLOYMENTS}
    assert sorted(map(name_of, made["deployments"])) == sorted(f"{flow}/photographs" for flow in flows)
    assert "solar_cells" not in str(made["deployments"])
    [train] = [found for found in made["deployments"] if flow_of(found) == "train"]
    [original] = [found for found in DEPLOYMENTS if name_of(found) == "train/solar_cells"]
    assert train["parameters"]["dataset"] == "photographs"
    assert train["parameters"]["config"] == {**original["parameters"].get("config", {}), "defect_labels": ["worn"]}
    for other in (found for found in made["deployments"] if flow_of(found) in ("tune", "scenario", "labels")):
        assert other["parameters"]["config"] == train["parameters"]["config"], name_of(other)
    assert train["triggers"][0]["match"] == {"prefect.resource.id": "tirewatch.dataset.photographs"}
    assert "photographs" not in str(PARSED)
    for deployment in made["deployments"]:
        test_parameters_are_accepted_by_the_flow(deployment)


def test_an_unknown_template_is_named_with_the_known_ones() -> None:
    with pytest.raises(LookupError, match=r"'cars'.*digits, solar_cells, tire"):
        for_recipe(PARSED, "x", template="cars")
