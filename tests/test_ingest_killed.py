"""The ingest flow, killed with SIGKILL before and after every single write it makes to S3; then the event comes again."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from tasks.batch import content_of
from tasks.claims import Subject, claimant, read_verdict
from tasks.dataset import digest_of, newest_record, open_rows
from tasks.storage import Store, ensure_bucket, list_objects, write_many

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]
PREFIX = "incoming/kill/batch/"
# Dies at the write of the given number, before or after it; prints the number of writes when it is not reached.
RUN = """
import os, signal, sys
import obstore
from flows.ingest import ingest

number, after = int(sys.argv[1]), sys.argv[2] == "after"
done = 0

def counted(function):
    def write(*given, **how):
        global done
        done += 1
        if done == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = function(*given, **how)
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    return write

obstore.put, obstore.delete = counted(obstore.put), counted(obstore.delete)
state = ingest("kill", "incoming/kill/batch/", occasion=sys.argv[3], return_state=True)
print("state", state.name)
print("writes", done)
"""


def run(store: Store, number: int, when: str, occasion: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "TIREWATCH_S3_BUCKET": store.bucket,
        "TIREWATCH_S3_ENDPOINT_URL": store.endpoint_url or "",
        "TIREWATCH_S3_ACCESS_KEY_ID": store.access_key_id or "",
        "TIREWATCH_S3_SECRET_ACCESS_KEY": store.secret_access_key or "",
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", RUN, str(number), when, occasion]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


def filled(store: Store, name: str, photograph: Callable[..., bytes]) -> Store:
    """A bucket of its own with the batch: good photographs, one that is broken and a duplicate."""
    here = replace(store, bucket=name)
    ensure_bucket(here)
    files = {
        f"{label}/{number}.jpg": photograph(number + shift)
        for label, shift in (("cut", 0), ("good", 500))
        for number in range(8)
    }
    files |= {"good/broken.jpg": photograph(900)[:200], "good/again.jpg": photograph(501), "_SUCCESS": b""}
    write_many(here, ((PREFIX + file, data) for file, data in files.items()))
    return here


def end_of(store: Store) -> dict[str, object]:
    """Everything an ingest leaves that others read."""
    record = newest_record(store, "kill")
    assert record is not None
    rows = open_rows(store, record).to_table(columns=["sha256", "label", "split", "group"])
    subject = Subject("ingest/kill", f"batch/{content_of(store, 'kill', PREFIX).removeprefix('sha256:')[:16]}")
    verdict = read_verdict(store, subject)
    return {
        "version": (record.version.version, record.version.digest, record.version.splits),
        "digest is that of the rows": digest_of(rows) == record.version.digest,
        "rows": sorted(rows.to_pylist(), key=lambda row: row["sha256"]),
        "quarantined": [each.key for each in list_objects(store, "quarantine/")],
        "announced": [each.key for each in list_objects(store, "datasets/kill/announced/")],
        "verdict": verdict and (verdict.outcome, verdict.figures),
    }


def crash(run_id: str) -> None:
    """What the automation does with a run whose heartbeats ended."""
    with get_client(sync_client=True) as client:
        body = {"state": {"type": "CRASHED"}, "force": True}
        client.request("POST", "/flow_runs/{id}/set_state", path_params={"id": run_id}, json=body).raise_for_status()


@pytest.mark.usefixtures("prefect_server")
def test_whichever_write_it_dies_at_the_next_run_ends_as_an_undisturbed_one(
    store: Store, photograph: Callable[..., bytes]
) -> None:
    undisturbed = filled(store, "kill-never", photograph)
    done = run(undisturbed, 0, "before", "event 0")
    assert "state Completed" in done.stdout, done.stderr[-2000:]
    writes = int(done.stdout.split("writes ")[1])
    assert writes >= 5, "claim, quarantine, record, note of the event, verdict"
    expected = end_of(undisturbed)
    assert expected["digest is that of the rows"] and expected["quarantined"]
    for number in range(1, writes + 1):
        for when in ("before", "after"):
            here = filled(store, f"kill-{number}-{when}", photograph)
            killed = run(here, number, when, "event 1")
            assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr[-2000:]
            record = newest_record(here, "kill")
            if record is not None:  # a reader sees nothing or all of it
                rows = open_rows(here, record).to_table(columns=["sha256", "label", "split"])
                assert digest_of(rows) == record.version.digest and rows.num_rows == 16
            subject = Subject("ingest/kill", f"batch/{content_of(here, 'kill', PREFIX).removeprefix('sha256:')[:16]}")
            if owner := claimant(here, subject):
                crash(owner)
            again = run(here, 0, "before", "event 1 again")
            assert "state Completed" in again.stdout or "state Unchanged" in again.stdout, again.stderr[-2000:]
            assert end_of(here) == expected, f"killed {when} write {number}"
