import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from botocore.exceptions import ClientError

from tasks import checkpoints
from tasks.checkpoints import (
    Superseded,
    conclude,
    has_checkpoint,
    identity_of,
    keeping,
    newest,
    save,
    undertake,
    unpacked,
)
from tasks.dataset import DatasetVersion
from tasks.recipe import Augmentation, TrainConfig
from tasks.samples import Samples
from tasks.storage import ensure_bucket, list_objects, read, write
from tasks.training import train

CONFIG = TrainConfig(
    architecture="cnn",
    pretrained=False,
    image_size=16,
    epochs=3,
    batch_size=16,
    learning_rate=3e-3,
    augmentation=Augmentation(quarter_turns=True, shift=0.1),
    precision="float32",
    checkpoint_minutes=1e-9,  # after every step
)
VERSION = DatasetVersion(
    "kept", 3, "sha256:abc", "s3://b/kept", ("dark", "light"), {"train": 40, "val": 20, "test": 20}
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Networks this small are slower on several threads, and many times slower while others use the processors."""
    monkeypatch.setattr("tasks.training.processors", lambda: 1)


def samples(count: int, seed: int) -> Samples:
    """Noise around a grey that the class sets."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = (
        random.normal((80 + 60 * labels)[:, None, None, None], 40, (count, 16, 16, 3)).clip(0, 255).astype(np.uint8)
    )
    return Samples(images, labels.astype(np.int64), np.array([f"{seed}-{n}" for n in range(count)]))


def run_through(config, state=None):
    """A training's outcome and its states as the bytes that a checkpoint holds."""
    kept = []

    def keep(state):
        out = io.BytesIO()
        torch.save(state, out)
        kept.append(out.getvalue())

    return train(samples(40, 0), samples(20, 1), VERSION.classes, config, state=state, save=keep), kept


def read_back(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def outcome(trained):
    """What must be the same, bit by bit; the seconds are nobody's."""
    epochs = [replace(epoch, seconds=0.0) for epoch in trained.epochs]
    return epochs, trained.best_epoch, trained.stopped, trained.precision


def same_weights(one, other):
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "schedule": "plateau", "rate_epochs": 1, "loss": "focal", "clip_norm": 0.5},
        {"epochs": 5, "patience": 1, "learning_rate": 0.3, "schedule": "step"},
    ],
)
def test_resumed_at_any_step_a_training_ends_in_the_same_bits(changes):
    config = CONFIG.model_copy(update=changes)
    undisturbed, kept = run_through(config)
    places = [(len(state["epochs"]), state["step"]) for state in map(read_back, kept)]
    assert {step for _, step in places} == {0, 1, 2} and len(set(places)) == len(places) >= 6
    for data, place in zip(kept, places, strict=True):
        resumed, _ = run_through(config, read_back(data))
        assert outcome(resumed) == outcome(undisturbed), place
        assert same_weights(resumed, undisturbed), place


def test_a_resumed_training_that_had_ended_trains_no_further_and_counts_its_time_once():
    undisturbed, kept = run_through(CONFIG)
    told = []
    state = read_back(kept[-1])
    began = time.monotonic()
    again = train(samples(40, 0), samples(20, 1), VERSION.classes, CONFIG, told.append, state=state)
    assert told == [] and same_weights(again, undisturbed)
    assert state["seconds"] <= again.seconds <= state["seconds"] + time.monotonic() - began


def test_keeping_states_changes_nothing():
    plain = train(samples(40, 0), samples(20, 1), VERSION.classes, CONFIG)
    assert same_weights(plain, run_through(CONFIG)[0])


def test_the_identity_is_what_decides_the_result():
    first = identity_of(VERSION, CONFIG, "train/kept")
    same = CONFIG.model_copy(update={"checkpoint_minutes": 7.0, "resume": False})
    assert identity_of(VERSION, same, "train/kept") == first
    others = [
        identity_of(VERSION, CONFIG.model_copy(update={"seed": 8}), "train/kept"),
        identity_of(replace(VERSION, digest="sha256:abd"), CONFIG, "train/kept"),
        identity_of(VERSION, CONFIG, "train/other"),
    ]
    assert len({first, *others}) == 4


@pytest.fixture
def kept_on(store, request):
    """A bucket that keeps versions, as the embedded stack's does, for each test its own."""
    here = replace(store, bucket=f"kept-{abs(hash(request.node.name)) % 10**8}")
    ensure_bucket(here)
    return here


STATES = [{"epochs": [{}] * n, "step": 0, "network": {"w": torch.full((1000,), float(n))}} for n in range(5)]


def work_of(store, run="run-1", running=(), config=CONFIG):
    return undertake(store, VERSION, config, "train/kept", run, lambda owner: owner in running)


def test_the_newest_checkpoint_is_read_and_at_most_two_stay(kept_on):
    work = work_of(kept_on)
    assert not has_checkpoint(work) and newest(work) is None
    for state in STATES:
        save(work, state, "mlflow-run")
    assert torch.equal(newest(work)["network"]["w"], STATES[-1]["network"]["w"])
    stored = [each.key for each in list_objects(kept_on, work.folder)]
    assert [key[-13:] for key in stored] == ["00000004.ckpt", "00000005.ckpt"]
    header = json.loads(read(kept_on, stored[-1]).split(b"\n", 1)[0])
    assert (header["mlflow_run"], header["epochs"]) == ("mlflow-run", 4)


@pytest.mark.parametrize("damage", ["cut short", "one byte other", "empty", "another format"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(kept_on, caplog, damage):
    work = work_of(kept_on)
    for state in STATES[:2]:
        save(work, state, "mlflow-run")
    key = list_objects(kept_on, work.folder)[-1].key
    data = read(kept_on, key)
    broken = {
        "cut short": data[: len(data) // 2],
        "one byte other": data[:-300] + bytes([data[-300] ^ 1]) + data[-299:],
        "empty": b"",
        "another format": data.replace(b'"format": 1', b'"format": 9', 1),
    }[damage]
    write(kept_on, key, broken)
    assert len(newest(work)["epochs"]) == 0
    assert "is damaged, taking the one before it" in caplog.text
    with pytest.raises(ValueError):
        unpacked(broken)


def test_what_is_concluded_leaves_nothing_behind_in_no_version(kept_on):
    import boto3

    work = work_of(kept_on)
    for state in STATES[:3]:
        save(work, state, "mlflow-run")
    conclude(work)
    client = boto3.client(
        "s3",
        endpoint_url=kept_on.endpoint_url,
        aws_access_key_id=kept_on.access_key_id,
        aws_secret_access_key=kept_on.secret_access_key,
        region_name="us-east-1",
    )
    left = client.list_object_versions(Bucket=kept_on.bucket, Prefix="checkpoints/")
    assert not left.get("Versions") and not left.get("DeleteMarkers")
    afresh = work_of(kept_on, "run-2")
    assert afresh.resumable and afresh.predecessor is None and not has_checkpoint(afresh)


def test_a_dead_run_is_taken_over_and_a_living_one_is_left_alone(kept_on, caplog):
    first = work_of(kept_on, "run-1")
    save(first, STATES[1], "mlflow-run")
    beside = work_of(kept_on, "run-2", running={"run-1"})
    assert not beside.resumable and newest(beside) is None and keeping(beside, "other") is None
    assert "run run-1 is at work on the same training" in caplog.text
    conclude(beside)
    assert has_checkpoint(first), "who has no right to the checkpoints does not remove them"
    heir = work_of(kept_on, "run-2")
    assert heir.resumable and heir.predecessor == "run-1" and len(newest(heir)["epochs"]) == 1
    assert work_of(kept_on, "run-2", running={"run-2"}).resumable, "the same run again keeps what it has"


def test_who_wants_no_resumption_neither_claims_nor_keeps(kept_on):
    work = work_of(kept_on, config=CONFIG.model_copy(update={"resume": False}))
    assert not work.resumable and keeping(work, "run") is None
    assert list_objects(kept_on, "line/") == []


def test_a_store_that_is_away_costs_a_checkpoint_and_not_the_training(kept_on, caplog):
    work = work_of(kept_on)
    gone = replace(work, store=replace(kept_on, bucket="no-such-bucket"))
    keeping(gone, "run")(STATES[2])
    assert "no checkpoint after 2 epochs" in caplog.text
    keeping(work, "run")(STATES[2])
    assert len(newest(work)["epochs"]) == 2


def test_no_code_in_a_checkpoint_is_run(kept_on):
    import hashlib
    import pickle

    class Trap:
        def __reduce__(self):
            return print, ("code from a checkpoint has run",)

    payload = io.BytesIO()
    torch.save({"epochs": [], "step": Trap()}, payload)
    header = {"format": checkpoints.FORMAT, "sha256": hashlib.sha256(payload.getvalue()).hexdigest()}
    with pytest.raises(pickle.UnpicklingError, match=r"weights_only|Weights only"):
        unpacked(json.dumps(header).encode() + b"\n" + payload.getvalue())


def test_a_run_that_was_thought_dead_writes_nothing_more_and_leaves_its_heir_alone(kept_on):
    first = work_of(kept_on, "run-1")
    keep = keeping(first, "mlflow-run")
    keep(STATES[1])
    heir = work_of(kept_on, "run-2")
    with pytest.raises(Superseded, match="run run-2 has taken this training over from run-1"):
        keep(STATES[2])
    conclude(first)
    assert len(newest(heir)["epochs"]) == 1 and work_of(kept_on, "run-3", running={"run-2"}).resumable is False
    keeping(heir, "mlflow-run")(STATES[3])
    assert len(newest(heir)["epochs"]) == 3


def test_without_the_right_to_list_versions_a_training_is_still_concluded(kept_on, caplog, monkeypatch):
    def refused(store, key):
        raise ClientError({"Error": {"Code": "AccessDenied"}}, "ListObjectVersions")

    work = work_of(kept_on)
    monkeypatch.setattr(checkpoints, "_delete_for_good", refused)
    for state in STATES[:3]:
        keeping(work, "mlflow-run")(state)
    assert len(newest(work)["epochs"]) == 2 and len(list_objects(kept_on, work.folder)) == 2
    assert "s3:ListBucketVersions" in caplog.text and "no checkpoint" not in caplog.text
    conclude(work)
    assert not has_checkpoint(work_of(kept_on, "run-2"))
