"""What lies under `staging/` belongs to somebody: it stays as long as that one may come back to it, and goes afterwards."""

import subprocess
import sys

from tasks.staging import THIS_PROCESS, Owner, fresh_directory

RUNS = {"waiting": True, "dead": False}


def owner(run: str) -> Owner:
    return Owner(run, RUNS.__getitem__)


def test_what_a_run_that_may_come_back_staged_stays_and_what_a_dead_one_left_goes(tmp_path):
    waiting, dead = (fresh_directory(tmp_path, "tire_onnx_32", 1, owner(run)) for run in ("waiting", "dead"))
    other = fresh_directory(tmp_path, "tire_onnx_32", 11, owner("dead"))
    made = fresh_directory(tmp_path, "tire_onnx_32", 1, owner("new"))
    assert waiting.exists() and made.exists() and other.exists() and not dead.exists()


def test_a_run_that_stages_again_begins_anew_and_takes_away_what_its_delivery_left(tmp_path):
    first = fresh_directory(tmp_path, "tire_onnx_32", 1, owner("waiting"))
    twin = first.with_name(f"{first.name}-delivered")
    twin.mkdir()
    again = fresh_directory(tmp_path, "tire_onnx_32", 1, owner("waiting"))
    assert again.exists() and not first.exists() and not twin.exists()


def test_what_a_process_staged_stays_as_long_as_it_lives(tmp_path):
    command = (
        "from pathlib import Path; from tasks.staging import THIS_PROCESS, fresh_directory; "
        f"print(fresh_directory(Path({str(tmp_path)!r}), 'n', 1, THIS_PROCESS), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", command], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin and process.stdout
        staged = tmp_path / process.stdout.readline().strip()
        fresh_directory(tmp_path, "n", 1, THIS_PROCESS)
        assert staged.is_dir()
        process.stdin.close()
        process.wait()
    fresh_directory(tmp_path, "n", 1, THIS_PROCESS)
    assert not staged.exists()


def test_who_cannot_ask_for_runs_leaves_what_they_staged_alone(tmp_path):
    staged = fresh_directory(tmp_path, "n", 1, owner("dead"))
    fresh_directory(tmp_path, "n", 1, THIS_PROCESS)
    assert staged.exists()
