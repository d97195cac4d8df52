"""A batch examined and written by the workers of a real Ray cluster on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.services import free_ports
from flows import fan_out, ingest
from flows.ingest import IngestOptions
from flows.settings import settings
from tasks import storage
from tasks.batch import read_batch
from tasks.dataset import newest_version
from tasks.examination import Photograph, Reread, examined, read_again
from tasks.storage import Store

Made = Callable[..., bytes]


def pictures(photograph: Made, count: int) -> dict[str, bytes]:
    return {f"{'good' if n % 3 else 'bad'}/{n}.jpg": photograph(n) for n in range(count)}


def upload(store: Store, name: str, files: dict[str, bytes]) -> str:
    prefix = f"incoming/{name}/b1/"
    storage.write_many(store, ((prefix + path, data) for path, data in files.items()))
    return prefix


def test_a_photograph_that_was_replaced_after_it_was_examined_is_named(store: Store, photograph: Made) -> None:
    prefix = upload(store, "replaced", pictures(photograph, 6))
    batch = read_batch(store, "replaced", prefix)
    seen = [each for each in examined(store, batch.items, lambda data: 0) if isinstance(each, Photograph)]
    assert [len(data) for data in read_again(store, seen)] == [each.size for each in seen]
    storage.write(store, prefix + "good/4.jpg", photograph(99))
    with pytest.raises(ValueError, match=r"replaced/b1/good/4.jpg was replaced while its batch was ingested"):
        list(read_again(store, seen))
    [replaced] = [each for each in seen if each.item.name == "good/4.jpg"]
    with pytest.raises(ValueError, match="run the batch again"):
        Reread(store).bytes_of(replaced)


def test_without_prefect_ray_the_error_names_the_setting_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with (
        pytest.raises(RuntimeError, match=r"TIREWATCH_RAY_ADDRESS is 'auto'.*tirewatch\[ray\]"),
        fan_out.ray_cluster("auto"),
    ):
        pass


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head with two workers; it ends with the process that holds it."""
    port, *others = free_ports(4)
    folder = tmp_path_factory.mktemp("ray")
    ports = ("--ray-client-server-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port")
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
    command += [f"{name}={value}" for name, value in zip(ports, others, strict=True)]
    command += ["--object-store-memory=200000000", f"--temp-dir={folder}"]
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    head = subprocess.Popen(command, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + 60
        while "Ray runtime started" not in (folder / "log").read_text():
            assert head.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ray_workers_make_the_same_version_as_threads(
    store: Store,
    prefect_server: str,
    ray_address: str,
    photograph: Made,
    monkeypatch: pytest.MonkeyPatch,
    configured: None,
) -> None:
    monkeypatch.setattr(fan_out, "PART", 10)
    sent = {**pictures(photograph, 36), "good/text.jpg": b"no picture", "good/again.jpg": photograph(1)}
    ends = []
    for bucket, address in (("threads", ""), ("on-ray", ray_address)):
        here = replace(store, bucket=bucket)
        storage.ensure_bucket(here)
        monkeypatch.setenv("TIREWATCH_S3_BUCKET", bucket)
        monkeypatch.setenv("TIREWATCH_RAY_ADDRESS", address)
        settings.cache_clear()
        state = ingest.ingest("spread", upload(here, "spread", sent), IngestOptions(), return_state=True)
        assert state.is_completed(), state.message
        ends.append(newest_version(here, "spread"))
    threads, on_ray = ends
    assert threads and on_ray
    assert sum(on_ray.splits.values()) == 36
    assert (on_ray.digest, on_ray.splits) == (threads.digest, threads.splits)
