"""The command line: what people read when something is not as it should be, and the commands on a small stack."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from deploy import dataset, journal
from deploy.cli import app
from deploy.processes import processes_of
from deploy.stack import Stack, create_stack, read_stack

OTHERS = ("s3", "prefect", "mlflow", "triton", "worker-cpu", "worker-gpu", "watchdog")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_commands_are_listed_with_what_they_do() -> None:
    text = run("--help").output
    for command in ("up", "down", "status", "logs", "demo"):
        assert re.search(rf"\b{command}\b +[A-Z]\w+", text), command


@pytest.mark.parametrize("command", ["down", "status", "logs"])
def test_a_folder_without_a_stack_gets_one_sentence(command: str, tmp_path: Path) -> None:
    result = run(command, "--state", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"error there is no stack in .*none: start one with `tirewatch up`\n", result.stderr)


def test_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{")
    result = run("status", "--state", str(tmp_path))
    assert result.exit_code == 1
    assert "stack.json is damaged" in result.stderr
    assert "Traceback" not in result.output


def test_up_names_the_missing_serving_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIREWATCH_TRITON_PYTHON", str(tmp_path / "python"))
    result = run("up", "--state", str(tmp_path / ".tirewatch"))
    assert result.exit_code == 1
    assert "make install" in result.stderr


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stack of the bridge alone, started from the command line."""
    folder = tmp_path_factory.mktemp("cli") / ".tirewatch"
    result = run("up", "--state", str(folder), *(f"--without={name}" for name in OTHERS))
    assert result.exit_code == 0, result.output
    assert re.search(r"✓ bridge +\d+\.\d s  http://127\.0\.0\.1:\d+", result.output)
    yield folder
    run("down", "--state", str(folder))


def test_status_shows_what_runs_and_fails_while_something_does_not(state: Path) -> None:
    result = run("status", "--state", str(state))
    assert re.search(r"bridge +RUNNING +ok +0 +\d+", result.output)
    assert re.search(r"mlflow +DOWN", result.output)
    assert result.exit_code == 1


def test_logs_of_a_service_end_with_its_last_lines(state: Path) -> None:
    stack = read_stack(state)
    with stack.log("bridge").open("a") as file:
        file.write("".join(f"line {index}\n" for index in range(500)))
    assert run("logs", "bridge", "-n", "2", "--state", str(state)).output == "line 498\nline 499\n"


def test_logs_without_a_service_tell_what_happened(state: Path) -> None:
    journal.record(state, "triton", "restarted", "triton is restarted: three known images were not answered")
    output = run("logs", "--state", str(state)).output
    assert re.search(r"^\S+ triton +triton is restarted: three known images", output, re.MULTILINE)
    assert "triton is restarted" in run("status", "--state", str(state)).output


def test_an_unknown_service_is_named_with_those_that_have_logs(state: Path) -> None:
    result = run("logs", "tirton", "--state", str(state))
    assert result.exit_code == 1
    assert re.search(r"no log of 'tirton'; there are bridge,.*supervisord", result.stderr)


def test_restarts_are_counted_since_the_last_up(tmp_path: Path) -> None:
    for service, event in (
        ("s3", "ended"),
        ("stack", "up"),
        ("s3", "ended"),
        ("s3", "running"),
        ("triton", "restarted"),
    ):
        journal.record(tmp_path, service, event, "")
    assert journal.restarts(journal.entries(tmp_path)) == {"s3": 1, "triton": 1}


def test_every_line_of_the_journal_is_json_for_machines(state: Path) -> None:
    for line in (state / "events.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"at", "service", "event", "text"}


def test_down_leaves_no_process_and_can_be_said_twice(state: Path) -> None:
    stack = read_stack(state)
    assert processes_of(stack.id)
    assert run("down", "--state", str(state)).output == "down\n"
    assert processes_of(stack.id) == []
    assert run("down", "--state", str(state)).exit_code == 0


@pytest.fixture
def demo_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A folder with the stack of an old demo in it, and nothing exported."""
    stack = create_stack(tmp_path / ".tirewatch")
    for name in stack.environment():
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the command sets
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return stack


PRODUCTION = {"TIREWATCH_S3_BUCKET": "photographs", "TIREWATCH_MLFLOW_TRACKING_URI": "http://mlflow.plant"}


@pytest.mark.parametrize(
    ("exported", "given", "bucket", "told"),
    [
        (PRODUCTION, [], "photographs", "the environment: s3://photographs/, MLflow http://mlflow.plant, Triton "),
        ({"TIREWATCH_CAPTURE_SHARE": "0.5"}, [], "tirewatch", "the stack .tirewatch: s3://tirewatch/ at http://127"),
        ({}, [], "tirewatch", "the stack .tirewatch: s3://tirewatch/ at http://127.0.0.1:"),
        (PRODUCTION, ["--state", ".tirewatch"], "tirewatch", ""),
    ],
    ids=["addresses are exported", "a setting that is no address", "nothing is exported", "--state"],
)
def test_a_command_is_for_what_the_environment_addresses_unless_a_stack_is_named(
    demo_here: Stack,
    monkeypatch: pytest.MonkeyPatch,
    exported: dict[str, str],
    given: list[str],
    bucket: str,
    told: str,
) -> None:
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    command = Typer()

    @command.command()
    def where(state: dataset.State = None) -> None:
        with dataset.settings_of(state) as here:
            print(here.s3_bucket)

    result = CliRunner().invoke(command, given)
    assert (result.exit_code, result.stdout) == (0, f"{bucket}\n"), result.output
    assert result.stderr.startswith(told) and result.stderr.count("\n") == bool(told)


def test_a_shell_that_sources_the_stack_reaches_it_with_aws_tools_too_and_finds_the_commands(demo_here: Stack) -> None:
    """Else `aws s3 cp` of a shell that is set up for an account would upload the photographs there."""
    account = {"AWS_PROFILE": "company", "AWS_SESSION_TOKEN": "token", "AWS_ACCESS_KEY_ID": "AKIACOMPANY"}
    asked = (
        "import boto3; s3 = boto3.client('s3'); print(s3.meta.endpoint_url, s3._request_signer._credentials.access_key)"
    )
    done = subprocess.run(
        ["bash", "-c", f'source .tirewatch/env && command -v tirewatch python && python -c "{asked}"'],
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.cwd()), **account},
        capture_output=True,
        text=True,
        check=True,
    )
    here = Path(sys.executable).parent
    reached = f"http://127.0.0.1:{demo_here.ports['s3']} {demo_here.secrets['s3_access_key_id']}"
    assert done.stdout.splitlines() == [f"{here}/tirewatch", f"{here}/python", reached]
