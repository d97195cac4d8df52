"""`tirewatch ledger | who-was | trace | approve | reject` on a real S3, Triton and Prefect server."""

import json
import re
import time

import pytest
from prefect import flow
from prefect.runtime import flow_run
from typer.testing import CliRunner, Result

from deploy import dataset as commands
from deploy.cli import app
from tasks import production, storage
from tasks.approval import Approval, ask, judged, open_requests, wait_for_answer
from tasks.engine_passport import PASSPORT_FILE, EnginePassport, write_passport
from tasks.ledger import append, key_of
from tasks.model_repository import (
    FrontDoor,
    install_front_door,
    network_name,
    publish_version,
    stage_version,
    version_directory,
)
from tasks.routing import Route, promoted, write_routing
from tasks.serving import infer_front_door, load_model
from tasks.version_store import upload_version

MODEL = "traced"


@pytest.fixture
def run(store, triton, prefect_server, monkeypatch):
    """`run("ledger", "tire")`, in a shell that addresses the line."""
    found = {
        f"TIREWATCH_S3_{name.upper()}": getattr(store, name) for name in ("bucket", "endpoint_url", "access_key_id")
    }
    found |= {"TIREWATCH_S3_SECRET_ACCESS_KEY": store.secret_access_key, "TIREWATCH_SERVING_ROOT": str(triton.root)}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(commands.console, "width", 400)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def words(result: Result) -> str:
    return re.sub(r" +", " ", result.output)


@pytest.fixture
def history(store):
    """Version 1 since the first of March 2026, version 2 since the tenth, taken back on the eleventh."""
    model = f"m{time.monotonic_ns()}"
    gates = [{"name": "escape rate", "held": True, "measured": "0 of 60", "demanded": "at most 0.05"}]
    for version, action, why, day in (
        (1, "promoted", "all gates held", "01"),
        (2, "promoted", "all gates held", "10"),
        (1, "rolled-back", "it missed cuts", "11"),
    ):
        evidence = {"mlflow_run": f"run-{version}", "served_accuracy": 0.9375, "gates": gates}
        append(store, model, action, version, "flow-run/x", why, evidence, f"2026-03-{day}T12:00:00.000+00:00")
    return model


def test_the_ledger_lists_who_was_champion_since_when_and_why(run, history):
    result = run("ledger", history)
    assert result.exit_code == 0
    assert [line.split()[:4] for line in result.stdout.splitlines()[1:]] == [
        ["2026-03-01T12:00:00", "1", "-", "promoted"],
        ["2026-03-10T12:00:00", "2", "1", "promoted"],
        ["2026-03-11T12:00:00", "1", "2", "rolled-back"],
    ]
    assert "it missed cuts" in result.output
    assert [entry["version"] for entry in json.loads(run("ledger", history, "--json").stdout)] == [1, 2, 1]


def test_a_history_that_does_not_join_is_an_error(run, store, history):
    entry = json.loads(storage.read(store, key_of(history, 2)))
    storage.write(store, key_of(history, 2), json.dumps({**entry, "previous": 9}).encode())
    result = run("ledger", history)
    assert result.exit_code == 1
    assert "the history does not join: entry 2 follows on v9, entry 1 names v1" in result.output


@pytest.mark.parametrize(
    ("at", "told"),
    [
        ("2026-03-05", "v1, from 2026-03-01T12:00:00 to 2026-03-10T12:00:00 (UTC)"),
        ("2026-03-10T13:30+02:00", "v1, from 2026-03-01T12:00:00 to 2026-03-10T12:00:00 (UTC)"),
        ("2026-03-10T14:30+02:00", "v2, from 2026-03-10T12:00:00 to 2026-03-11T12:00:00 (UTC)"),
        ("2026-09-01T00:00", "v1, from 2026-03-11T12:00:00 to now (UTC)"),
    ],
)
def test_who_answered_at_a_moment_is_told_with_the_evidence(run, history, at, told):
    result = run("who-was", history, "--at", at)
    assert result.exit_code == 0 and f"{history} {told}" in result.output
    assert "escape rate 0 of 60 at most 0.05" in words(result) and "served_accuracy 0.9375" in result.output
    assert json.loads(run("who-was", history, "--at", at, "--json").stdout)["version"] == int(told[1])


@pytest.mark.parametrize(
    ("at", "told"),
    [
        ("2026-02-28", "had no champion at 2026-02-28 00:00:00 UTC: the first, v1, began at 2026-03-01T12:00:00"),
        ("soon", "'soon' is no moment: write 2026-03-01T14:30"),
    ],
)
def test_a_moment_without_a_champion_and_one_that_is_none_end_in_a_sentence(run, history, at, told):
    result = run("who-was", history, "--at", at)
    assert result.exit_code == 1 and told in result.stderr and "Traceback" not in result.output


# --- trace ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(store, triton, small_network, describe, photograph, tmp_path_factory):
    """Two requests that a real front door answered and captured; one of them went to S3 since."""
    network = network_name(MODEL, 32)
    passport = EnginePassport(
        *("tensorrt_rtx", "1.7.1", "a" * 64, "b" * 64, "float32", "8.9", "none"),
        *((1, 8, 8), False, False, None, "2026-11-21T10:00:00+00:00", 2.5),
    )
    beside = {PASSPORT_FILE: write_passport(tmp_path_factory.mktemp("engine"), passport)}
    publish_version(triton.root, stage_version(triton.root, small_network(1), describe(MODEL, 1), beside))
    write_routing(triton.root, promoted(None, MODEL, Route(network, 1)))
    load_model(triton.address, network, 1)
    install_front_door(triton.root, MODEL, FrontDoor(instances=1, capture_share=1.0))
    load_model(triton.address, MODEL)
    append(store, MODEL, "promoted", 1, "flow-run/x", "all gates held", {}, "2026-01-01T00:00:00.000+00:00")
    spool = triton.root / "spool" / MODEL

    def ask_about(name: str, seed: int) -> str:
        infer_front_door(triton.address, MODEL, photograph(seed), parameters={"request_id": name, "tire_id": "T-1"})
        for _ in range(100):
            if len(list(spool.glob("[0-9]*.npz"))) == 1:
                break
            time.sleep(0.05)
        return name

    ask_about("archived", 11)
    assert production.collect(store, spool, MODEL) == 1
    return ask_about("spooled", 12)


@pytest.mark.parametrize(("name", "seed", "where"), [("archived", 11, "s3://"), ("spooled", 12, "spool")])
def test_a_request_is_traced_to_its_photograph_version_data_and_commit_and_its_score_comes_out_again(
    run, answered, photograph, describe, name, seed, where
):
    import hashlib

    result = run("trace", name, "--json")
    assert result.exit_code == 0, result.output
    told, sealed = json.loads(result.stdout), describe(MODEL, 1)
    assert told["image_sha256"] == hashlib.sha256(photograph(seed)).hexdigest() and where in told["where"]
    assert (told["version"], told["tire_id"]) == (1, "T-1")
    origin = told["origin"]
    assert (origin["rule"]["threshold"], origin["dataset_digest"]) == (0.6, sealed.dataset_digest)
    assert (origin["run_id"], origin["commit"], origin["passport"]) == ("run-1", "commit", {"torch": "2"})
    assert (origin["engine"]["builder"], origin["engine"]["compute_capability"]) == ("tensorrt_rtx", "8.9")
    assert told["ledger"]["version"] == 1 and told["ledger"]["why"] == "all gates held"
    assert told["reproduced"]["equal"] and told["reproduced"]["score"] == told["score"]
    shown = words(run("trace", name, "--model", MODEL))
    assert "engine tensorrt_rtx 1.7.1 for compute capability 8.9, float32" in shown
    assert "verdict the same to the last bit" in shown and "v1, promoted 2026-01-01" in shown


def test_a_version_that_left_the_disk_is_traced_with_the_sealed_network_that_s3_holds(run, store, triton, answered):
    directory = version_directory(triton.root, network_name(MODEL, 32), 1)
    upload_version(store, directory)
    away = directory.rename(triton.root / "away")
    try:
        told = json.loads(run("trace", "archived", "--json").stdout)
    finally:
        away.rename(directory)
    assert told["reproduced"]["equal"] and told["reproduced"]["by"] == f"the sealed network {MODEL}_onnx_32/1"
    assert told["origin"]["engine"]["builder"] == "tensorrt_rtx"


def test_a_score_that_the_network_does_not_give_again_is_told_and_is_an_error(run, store, triton, answered):
    from dataclasses import replace

    from monitoring.capture import read_spool, write_record

    spool = triton.root / "spool" / MODEL
    [(_, record)] = read_spool(spool)
    forged = write_record(spool, replace(record, request_id="forged", score=record.score / 2), 7)
    try:
        result = run("trace", "forged")
        assert result.exit_code == 1 and "differs by" in result.output
    finally:
        forged.unlink()


def test_a_request_that_was_not_captured_is_named(run, answered):
    result = run("trace", "nobody", "--model", MODEL, "--on", "2026-03-01")
    assert result.exit_code == 1
    assert f"no request 'nobody' was captured of {MODEL} on 2026-03-01: 5% of the traffic is sampled" in result.stderr


# --- approval ---------------------------------------------------------------------------------------------------------


@flow(name="wait for a command")
def waits(store, model: str) -> str:
    request = ask(store, model, 7, str(flow_run.get_id()), Approval(minutes=1, who=("anna",)), 1)
    return judged(store, request, wait_for_answer(request, "the table"), 1).measured


def test_a_version_that_waits_is_rejected_by_a_command_of_somebody_who_may(run, store, history):
    import threading

    told: list[Result] = []

    def decide() -> None:
        while not open_requests(store, history):
            time.sleep(0.1)
        told.append(run("approve", history, "8", "--why", "x"))
        told.append(run("approve", history, "7", "--why", "x", "--who", "eve"))
        told.append(run("reject", history, "7", "--why", "the light was odd", "--who", "anna"))

    thread = threading.Thread(target=decide)
    thread.start()
    assert waits(store, history) == "rejected by anna: the light was odd"
    thread.join()
    assert [result.exit_code for result in told] == [1, 1, 0]
    assert f"{history} v8 does not wait for approval; of {history}, v7" in told[0].stderr
    assert "eve may not decide" in told[1].stderr
    assert f"{history} v7: rejected; its run goes on" in told[2].output
    assert run("approve", history, "7", "--why", "x").exit_code == 1, "it was answered"
