"""Real services for the tests: started once a session, on free ports, in a temporary directory, ended with it."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

os.environ |= {"DO_NOT_TRACK": "1", "PREFECT_LOGGING_TO_API_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"  # its row meets other start-up writes: "database is locked"

from deploy import services
from deploy.running import Running, start
from tasks.storage import Store

if TYPE_CHECKING:
    from flows.ingest import Ingested, IngestOptions

SOURCE = Path(__file__).parents[1]
SHARED = SOURCE.parent / "shared" / "data"
sys.path.append(str(Path(__file__).parent))  # importlib mode puts no folder of tests there
pytest_plugins = ("serving_fixtures",)
KEY, SECRET = "tirewatch", "tirewatch-test-secret"


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Flows of the tests decode into a temporary folder, not into the cache of a stack in this checkout."""
    os.environ["TIREWATCH_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


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
def prefect_server() -> Iterator[None]:
    """A real Prefect API server with triggers and actions, on a temporary database."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield


@pytest.fixture(scope="session")
def prefect_api(prefect_server: None) -> str:
    """Address of that server's API."""
    from prefect.settings import PREFECT_API_URL

    return str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def sealed_events(prefect_api: str) -> Callable[..., list[dict[str, Any]]]:
    """`sealed_events(dataset, count=1, within=15)`: the `tirewatch.batch.sealed` events of the dataset that Prefect has
    stored; waits until there are `count`, at most `within` seconds.
    """
    import httpx

    def found(dataset: str, count: int = 1, within: float = 15) -> list[dict[str, Any]]:
        now = datetime.now(UTC)
        wanted = {
            "occurred": {
                "since": (now - timedelta(hours=1)).isoformat(),
                "until": (now + timedelta(hours=1)).isoformat(),
            },
            "event": {"name": ["tirewatch.batch.sealed"]},
            "resource": {"id": [f"tirewatch.dataset.{dataset}"]},
        }
        deadline = time.monotonic() + within
        while True:
            answer = httpx.post(f"{prefect_api}/events/filter", json={"filter": wanted, "limit": 50}).json()
            if answer["total"] >= count or time.monotonic() > deadline:
                events: list[dict[str, Any]] = answer["events"]
                assert len(events) == answer["total"], "more than one page"
                return events
            time.sleep(0.2)

    return found


BRIDGE_TOKEN = "a-token-for-the-tests"


@pytest.fixture(scope="session")
def start_bridge() -> Callable[..., Running]:
    """`start_bridge(folder, prefect_api, **settings)`: the bridge as a process on the state in `folder`; settings by their
    field names. Its token is `a-token-for-the-tests`, its log `folder/bridge.log`. The test stops it.
    """

    def started(folder: Path, prefect_api: str, **settings: object) -> Running:
        chosen = {
            "token": BRIDGE_TOKEN,
            "prefect_api_url": prefect_api,
            "state": folder / "bridge.db",
            "answer_within": 1.5,
            **settings,
        }
        env = {f"TIREWATCH_BRIDGE_{name.upper()}": str(value) for name, value in chosen.items()}
        return start(services.bridge(folder, services.free_ports(1)[0], env), folder / "bridge.log")

    return started


class Gateway:
    """A proxy in front of a real server that a test can cut: `before` and `after` get the request's path and headers, ahead
    of asking the server and ahead of handing on its answer; where one returns False the connection just ends. What `instead`
    returns for a path is answered with 200 in place of the server, as a login page on the way would.
    """

    def __init__(self, upstream: str) -> None:
        self.before: Callable[[str, Mapping[str, str]], bool] = lambda path, headers: True
        self.after: Callable[[str, Mapping[str, str]], bool] = lambda path, headers: True
        self.instead: Callable[[str], bytes | None] = lambda path: None
        gateway, host = self, upstream.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.close_connection = True
                if not gateway.before(self.path, dict(self.headers)):
                    return
                if (other := gateway.instead(self.path)) is not None:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(other)))
                    self.end_headers()
                    self.wfile.write(other)
                    return
                connection = HTTPConnection(host, timeout=60)
                connection.request("POST", self.path, body, {**dict(self.headers), "Host": host, "Connection": "close"})
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if not gateway.after(self.path, dict(self.headers)):
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with suppress(OSError):  # whoever asked may be gone
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def gateway() -> Iterator[Callable[[str], Gateway]]:
    """`gateway("http://127.0.0.1:4200")`: a proxy in front of it."""
    made: list[Gateway] = []

    def proxy(upstream: str) -> Gateway:
        made.append(Gateway(upstream))
        return made[-1]

    yield proxy
    for each in made:
        each.stop()


@pytest.fixture
def configured(store: "Store", monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A flow's process as `tirewatch up` starts it: the settings come from the environment."""
    from flows.settings import settings

    for name in ("bucket", "endpoint_url", "access_key_id", "secret_access_key"):
        monkeypatch.setenv(f"TIREWATCH_S3_{name.upper()}", str(getattr(store, name)))
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "Ingested"]:
    """`ingested(store, dataset, batch, {path: bytes})`: the batch uploaded and taken in, without a Prefect run around it."""
    from flows import ingest
    from tasks import dataset, storage

    def taken_in(
        store: Store, name: str, batch: str, files: dict[str, bytes], options: "IngestOptions | None" = None
    ) -> "Ingested":
        prefix = f"incoming/{name}/{batch}/"
        storage.write_many(store, ((prefix + path, data) for path, data in files.items()))
        found = ingest.find_batch.fn(store, name, prefix)
        with ingest.examine_photographs.fn(store, found, tmp_path_factory.mktemp("spool")) as examination:
            write = dataset.writer(store, found, examination)
            return ingest.commit.fn(store, found, examination, options or ingest.IngestOptions(), write)

    return taken_in
