"""The embedded stack, started for real: one for the module, and small ones beside it."""

import hashlib
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest

from deploy import journal, local, services
from deploy.processes import processes_of
from deploy.recipes import read_prefect_yaml
from deploy.stack import SERVICE_MARK, SOURCE, STACK_MARK, Stack, StackError, services_of
from deploy.supervisor import Supervisor, configuration
from flows.settings import Settings

SMALL = ("prefect", "mlflow", "triton", "worker-cpu", "worker-gpu", "watchdog")  # left out: S3 and the bridge remain
LEAST = (*SMALL, "s3")  # the bridge alone


def eventually(true: Callable[[], object], within: float = 60, what: str = "") -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"not true within {within:.0f} s: {what}"
        time.sleep(0.2)


def silent(name: str, seconds: float, url: str) -> None:
    pass


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything that `tirewatch up` starts."""
    state = tmp_path_factory.mktemp("stack") / ".tirewatch"
    try:
        yield local.up(state, silent)
    finally:
        local.down(state)


def health(stack: Stack) -> dict[str, bool | None]:
    return {row.name: row.state == "RUNNING" and row.healthy is not False for row in local.status(stack.state)}


def shared_memory_prefix(stack: Stack) -> str:
    """What the regions of this stack's server are called (triton/launch.py)."""
    return f"tirewatch_{hashlib.sha256(str(stack.serving_root).encode()).hexdigest()[:12]}_"


def s3_client(stack: Stack) -> Any:
    env = stack.environment()
    return boto3.client(
        "s3",
        endpoint_url=env["TIREWATCH_S3_ENDPOINT_URL"],
        aws_access_key_id=env["TIREWATCH_S3_ACCESS_KEY_ID"],
        aws_secret_access_key=env["TIREWATCH_S3_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )


def test_every_service_runs_and_answers_a_real_request(stack: Stack) -> None:
    assert all(health(stack).values())
    assert set(health(stack)) == {service.name for service in services_of(stack)}


def test_what_stores_computes_and_displays_gives_way_to_the_server(stack: Stack) -> None:
    def lowered(service: str) -> set[int]:
        return {process.nice() - psutil.Process().nice() for process in processes_of(stack.id, service)}

    # Of Triton's processes none brings up a network here.
    for service in ("triton", "bridge", "watchdog"):
        assert lowered(service) == {0}, service
    for service in ("s3", "mlflow", "prefect", "worker-cpu", "worker-gpu"):
        assert lowered(service) == {services.GIVES_WAY}, service


def test_up_again_changes_nothing(stack: Stack) -> None:
    before = {name: program.pid for name, program in Supervisor(stack).programs().items()}
    assert local.up(stack.state, silent) == stack
    assert {name: program.pid for name, program in Supervisor(stack).programs().items()} == before


def test_the_environment_is_exactly_what_the_settings_read(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: value for name, value in stack.environment().items() if name.startswith("TIREWATCH_")}
    fields = {f"TIREWATCH_{field.upper()}" for field in Settings.model_fields}
    choices = {"CPU_ACCELERATOR", "TRAINING_LIMIT", "RAY_ADDRESS", "CACHE_GB"}  # left to whoever runs the stack
    assert set(given) - {"TIREWATCH_CHECKOUT"} == fields - {f"TIREWATCH_{name}" for name in choices}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert Settings().store.endpoint_url == f"http://127.0.0.1:{stack.ports['s3']}"


def test_the_env_file_of_a_person_holds_no_mark_of_the_stack(stack: Stack) -> None:
    text = (stack.state / "env").read_text()
    assert "export PREFECT_API_URL=" in text
    assert STACK_MARK not in text.replace("TIREWATCH_STACK_", "")  # or `down` would end the shell that sourced it
    assert SERVICE_MARK not in text


def test_secrets_are_for_their_owner_only(stack: Stack) -> None:
    holders = ["secrets.json", "stack.json", "env", "triton-admin-key", "notification.toml", "services/s3.json"]
    for name in holders:
        assert stat.S_IMODE((stack.state / name).stat().st_mode) == 0o600, name
    for secret in list(stack.secrets.values())[1:]:  # the first is the access key id
        for process in processes_of(stack.id):
            # Triton 24.10 takes the key of its restricted APIs as a flag and from nowhere else.
            if process.name() != "tritonserver":
                assert secret not in " ".join(process.cmdline())


def test_the_bucket_keeps_versions(stack: Stack) -> None:
    assert s3_client(stack).get_bucket_versioning(Bucket="tirewatch")["Status"] == "Enabled"


def test_mlflow_keeps_its_database_and_artifacts_in_the_state_folder(stack: Stack) -> None:
    """Holds the names of the variables that MLflow's own command hands to its server."""
    url = f"http://127.0.0.1:{stack.ports['mlflow']}"
    made = httpx.post(f"{url}/api/2.0/mlflow/experiments/create", json={"name": "kept"})
    assert made.status_code == 200, made.text
    found = httpx.get(f"{url}/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": "kept"})
    assert found.json()["experiment"]["artifact_location"].startswith("mlflow-artifacts:/")
    assert (stack.state / "mlflow.db").stat().st_size > 0
    put = httpx.put(f"{url}/api/2.0/mlflow-artifacts/artifacts/probe/a.txt", content=b"kept")
    assert put.status_code == 200
    assert (stack.state / "mlflow-artifacts" / "probe" / "a.txt").read_bytes() == b"kept"


def test_prefect_knows_pools_limits_automations_and_deployments(stack: Stack) -> None:
    api = f"{stack.prefect_url}/api"
    pools = {pool["name"]: pool for pool in httpx.post(f"{api}/work_pools/filter", json={}).json()}
    assert pools["gpu"]["concurrency_limit"] == 1
    assert pools["cpu"]["concurrency_limit"] is None
    assert httpx.get(f"{api}/v2/concurrency_limits/gpu").json()["limit"] == 1
    deployments = httpx.post(f"{api}/deployments/filter", json={"limit": 100}).json()
    described = read_prefect_yaml(SOURCE / "prefect.yaml")["deployments"]
    assert len(deployments) == len(described)
    automations = {found["name"]: found for found in httpx.post(f"{api}/automations/filter", json={}).json()}
    assert automations["crash runs whose process died"]["enabled"]
    assert len(automations) == 1 + sum(len(each.get("triggers", ())) for each in described)


@pytest.mark.parametrize("versioned", ["plain", "in parts", "again"])
def test_a_sealed_batch_starts_ingest(stack: Stack, versioned: str) -> None:
    """S3 -> webhook -> bridge -> Prefect event -> run; the batch is empty of photographs, so ingest refuses it."""
    client, prefix = s3_client(stack), f"incoming/tire/{versioned.replace(' ', '-')}/"
    client.put_object(Bucket="tirewatch", Key=f"{prefix}good/not an image.jpg", Body=b"text")
    if versioned == "in parts":
        upload = client.create_multipart_upload(Bucket="tirewatch", Key=f"{prefix}_SUCCESS")["UploadId"]
        where = {"Bucket": "tirewatch", "Key": f"{prefix}_SUCCESS", "UploadId": upload}
        part = client.upload_part(**where, PartNumber=1, Body=b"x" * 100)
        client.complete_multipart_upload(**where, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    else:
        client.put_object(Bucket="tirewatch", Key=f"{prefix}_SUCCESS", Body=b"")
    if versioned == "again":  # the same marker twice is one event
        client.put_object(Bucket="tirewatch", Key=f"{prefix}_SUCCESS", Body=b"")

    def runs() -> list[dict[str, Any]]:
        found = httpx.post(f"{stack.prefect_url}/api/flow_runs/filter", json={"limit": 100}).json()
        return [run for run in found if run["parameters"].get("prefix") == prefix]

    eventually(lambda: runs() and runs()[0]["state_type"] in ("FAILED", "COMPLETED"), 60, f"a run for {prefix}")
    assert len(runs()) == 1
    assert runs()[0]["parameters"]["dataset"] == "tire"


@pytest.mark.parametrize(
    "name", ["s3", "prefect", "mlflow", "triton", "bridge", "worker-cpu", "worker-gpu", "watchdog", "journal"]
)
def test_a_killed_service_is_named_and_mended(stack: Stack, name: str) -> None:
    if name == "journal":
        [killed] = list(processes_of(stack.id, name))
    else:
        killed = psutil.Process(Supervisor(stack).programs()[name].pid)
    before = len(journal.entries(stack.state))
    killed.kill()
    killed.wait(10)
    eventually(lambda: Supervisor(stack).programs()[name].pid not in (0, killed.pid), 30, f"{name} has a new process")
    eventually(lambda: health(stack).get(name, True), 90, f"{name} answers again")
    eventually(lambda: len(journal.entries(stack.state)) >= before + 2, 15, "the journal tells both")
    told = [entry for entry in journal.entries(stack.state)[before:] if entry.service == name]
    assert [entry.event for entry in told] == ["ended", "running"]
    assert f"{name} (pid {killed.pid}) ended by itself" in told[0].text
    if name != "journal":
        [row] = [row for row in local.status(stack.state) if row.name == name]
        assert row.restarts == 1


def test_what_a_killed_service_left_behind_is_ended_before_it_starts_again(stack: Stack) -> None:
    marks = {**os.environ, STACK_MARK: stack.id, SERVICE_MARK: "bridge"}
    orphan = psutil.Popen(["sleep", "600"], env=marks, start_new_session=True)
    other = psutil.Popen(["sleep", "600"], env={**marks, SERVICE_MARK: "worker-cpu"}, start_new_session=True)
    os.kill(Supervisor(stack).programs()["bridge"].pid, signal.SIGKILL)
    assert orphan.wait(20) == -signal.SIGTERM
    eventually(lambda: health(stack)["bridge"], 30)
    assert other.poll() is None  # somebody else's child, for example a flow run
    other.kill()
    other.wait()


def test_services_that_a_killed_supervisor_left_are_replaced(tmp_path: Path) -> None:
    state = tmp_path / ".tirewatch"
    try:
        stack = local.up(state, silent, without=LEAST)
        [supervisor] = processes_of(stack.id, "supervisord")
        left = Supervisor(stack).programs()["bridge"].pid
        supervisor.kill()
        supervisor.wait(10)
        assert psutil.pid_exists(left)
        assert local.up(state, silent, without=LEAST).ports == stack.ports
        eventually(lambda: not psutil.pid_exists(left), 10)
    finally:
        local.down(state)
    assert processes_of(stack.id) == []


def test_two_stacks_run_side_by_side(stack: Stack, tmp_path: Path) -> None:
    deep = tmp_path / ("a folder with a long name " * 4) / ".tirewatch"  # too long for a unix socket, and with spaces
    try:
        second = local.up(deep, silent, without=SMALL)
        assert not set(second.ports.values()) & set(stack.ports.values())
        assert health(second)["s3"]
        assert health(second)["bridge"]
        s3_client(second).put_object(Bucket="tirewatch", Key="only/here", Body=b"1")
        assert s3_client(stack).list_objects_v2(Bucket="tirewatch", Prefix="only/")["KeyCount"] == 0
    finally:
        local.down(deep)
    assert processes_of(second.id) == []
    assert health(stack)["s3"]


def test_a_port_held_by_somebody_else_is_named_with_its_holder(tmp_path: Path) -> None:
    state = tmp_path / ".tirewatch"
    try:
        stack = local.up(state, silent, without=LEAST)
        local.down(state)
        with socket.create_server(("127.0.0.1", stack.ports["bridge"])):
            with pytest.raises(
                StackError, match=rf"port {stack.ports['bridge']}.*bridge.*process {os.getpid()}.*--new-ports"
            ):
                local.up(state, silent, without=LEAST)
            moved = local.up(state, silent, without=LEAST, new_ports=True)
        assert moved.ports["bridge"] != stack.ports["bridge"]
        assert moved.id == stack.id
    finally:
        local.down(state)


def test_a_service_that_does_not_start_fails_up_with_the_end_of_its_log(tmp_path: Path) -> None:
    state = tmp_path / ".tirewatch"
    (state / "bridge.db").mkdir(parents=True)  # the bridge cannot open its file
    try:
        with pytest.raises(StackError, match=r"(?s)bridge does not start.*unable to open database file"):
            local.up(state, silent, without=LEAST)
    finally:
        local.down(state)


def test_state_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text(json.dumps({"version": 0, "id": "x", "ports": {}}))
    with pytest.raises(StackError, match="state version 0, this build reads 1"):
        local.up(tmp_path, silent, without=SMALL)


def test_a_missing_serving_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIREWATCH_TRITON_PYTHON", str(tmp_path / "none" / "python"))
    with pytest.raises(StackError, match=r"none/python is missing: run `make install`"):
        local.up(tmp_path / ".tirewatch", silent)
    assert not (tmp_path / ".tirewatch").exists()


def test_an_unknown_service_to_leave_out_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"no service 'minio'; there are s3, prefect, mlflow"):
        local.up(tmp_path / ".tirewatch", silent, without=["minio"])


def test_percent_signs_and_spaces_in_the_folder_survive_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from supervisor.options import ServerOptions

    state = tmp_path / "100% of it"
    stack = Stack(state, "0123", dict.fromkeys(local.choose_ports(), 1), dict.fromkeys(_SECRETS, "secret"))
    state.mkdir()
    (state / "logs").mkdir()
    monkeypatch.chdir(state)  # where supervisord is started
    path = state / "supervisord.conf"
    path.write_text(configuration(stack, services_of(stack)))
    options = ServerOptions()
    options.realize(["-c", str(path)])
    groups = {group.name: group for group in options.process_group_configs}
    [s3] = groups["s3"].process_configs
    assert Path(s3.stdout_logfile).resolve() == state / "logs" / "s3.log"
    assert str(state) in s3.command


def test_at_last_a_flow_run_outlives_its_worker_and_down_leaves_nothing(stack: Stack) -> None:
    marks = {**os.environ, STACK_MARK: stack.id, SERVICE_MARK: "worker-cpu"}
    run = psutil.Popen(["sleep", "600"], env=marks, start_new_session=True)
    Supervisor(stack).restart_program("worker-cpu")
    eventually(lambda: health(stack)["worker-cpu"], 60)
    assert run.poll() is None
    triton = shared_memory_prefix(stack)
    assert any(path.name.startswith(triton) for path in Path("/dev/shm").iterdir())
    leftovers = local.down(stack.state)
    assert run.pid in leftovers
    run.wait(5)
    assert processes_of(stack.id) == []
    assert not any(path.name.startswith(triton) for path in Path("/dev/shm").iterdir())
    assert all(services.is_free(port) for port in stack.ports.values())
    assert local.down(stack.state) == []


_SECRETS = ("s3_access_key_id", "s3_secret_access_key", "bridge_token", "triton_admin_key")
