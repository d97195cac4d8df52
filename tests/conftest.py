"""Real services for the tests: started once a session, on free ports, in a temporary directory, ended with it."""

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ |= {"DO_NOT_TRACK": "1", "PREFECT_LOGGING_TO_API_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"  # its row meets other start-up writes: "database is locked"

from deploy import services
from tasks.storage import Store

SHARED = Path(__file__).parents[2] / "shared" / "data"
KEY, SECRET = "tirewatch", "tirewatch-test-secret"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs that lie beside the checkout where the project is developed; their licences forbid shipping them."""
    if not SHARED.is_dir():
        pytest.skip(f"the photographs are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def photograph() -> Callable[..., bytes]:
    """`photograph(seed, size=32, kind="JPEG")`: an encoded picture of its own for every seed, the same in every run."""
    import io

    import numpy as np
    from PIL import Image

    def encoded(seed: int, size: int = 32, kind: str = "JPEG") -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR).save(out, kind)
        return out.getvalue()

    return encoded


@dataclass
class Running:
    service: services.Service
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(5)


def start(service: services.Service, log: Path, timeout: float = 60) -> Running:
    """The service, ready; its output goes to `log`."""
    service.directory.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            service.command,
            env=services.environment_of(service),
            cwd=service.directory,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(service.ready_url, timeout=2) as answer:
                if answer.status < 300:
                    return Running(service, process)
        except OSError:
            time.sleep(0.1)
    Running(service, process).stop()
    raise RuntimeError(f"{service.name} was not ready in {timeout:.0f} s:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def start_service() -> Callable[..., Running]:
    """`start`, for tests of a service of their own; they stop what they started."""
    return start


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A real S3 (SeaweedFS) with one empty bucket."""
    import boto3

    directory = tmp_path_factory.mktemp("s3")
    running = start(services.seaweedfs(directory, services.free_ports(11), KEY, SECRET), directory / "s3.log")
    made = Store("tirewatch", running.service.url, KEY, SECRET)
    client = boto3.client(
        "s3",
        endpoint_url=made.endpoint_url,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name=made.region,
    )
    for _ in range(50):  # the gateway answers a moment before the filer behind it does
        try:
            client.create_bucket(Bucket=made.bucket)
            break
        except client.exceptions.ClientError:
            time.sleep(0.2)
    yield made
    running.stop()


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server."""
    import mlflow

    directory = tmp_path_factory.mktemp("mlflow")
    running = start(services.mlflow(directory, services.free_ports(1)[0]), directory / "mlflow.log", 120)
    mlflow.set_tracking_uri(running.service.url)
    yield running.service.url
    running.stop()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect API server with triggers and actions, on a temporary database."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield
