"""What each service of the embedded stack is: command, environment, port, readiness. Values; `local.py` runs them."""

import os
import random
import socket
import sys
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# For questions to services of this machine: the proxy of a company network is no way to them.
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))

GIVES_WAY = 5  # a third of the processor time of one that does not, where both want it
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",  # a forgotten server address must fail, not start a hidden server
}


@dataclass(frozen=True)
class Service:
    """One long-running process of the stack.

    ready_url: answers 2xx once the service can be used; empty where a running process is all there is to see.
    after: URLs that must answer 2xx before the command is started.
    adopts: its children outlive it (flow runs of a worker), so a restart leaves them alone.
    nice: what is added to its niceness. What stores, computes and displays gives way to the server.
    """

    name: str
    command: tuple[str, ...]
    ready_url: str = ""
    url: str = ""
    env: dict[str, str] = field(default_factory=dict)
    directory: Path = Path()
    after: tuple[str, ...] = ()
    adopts: bool = False
    nice: int = 0


def is_free(port: int) -> bool:
    """Whether nobody listens on this loopback port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection in TIME_WAIT is nobody
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int, avoid: Iterable[int] = ()) -> list[int]:
    """Distinct loopback ports nobody listens on now, below the range the kernel gives to outgoing connections: a port
    from that range may be somebody's client connection by the time the service binds it.
    """
    taken = set(avoid)
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 12_000):
        if len(found) == count:
            break
        if port not in taken and is_free(port):
            found.append(port)
    return found


def _bin(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _uvicorn(app: str, port: int, *flags: str) -> tuple[str, ...]:
    shutdown = ("--timeout-graceful-shutdown", "5")  # an open connection of a browser must not hold up `down`
    return (sys.executable, "-m", "uvicorn", app, "--host", "127.0.0.1", "--port", str(port), *shutdown, *flags)


def seaweedfs(state: Path, ports: Iterable[int], access_key: str, secret_key: str) -> Service:
    """S3. Eleven ports: every listener of `weed mini` is set, so that two stacks never meet."""
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc, iceberg, lance, admin = ports
    flags = {
        "dir": state / "s3",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.port": s3,
        "s3.port.grpc": s3_grpc,
        "s3.port.iceberg": iceberg,
        "s3.port.lance": lance,
        "master.port": master,
        "master.port.grpc": master_grpc,
        "volume.port": volume,
        "volume.port.grpc": volume_grpc,
        "filer.port": filer,
        "filer.port.grpc": filer_grpc,
        "admin.port": admin,
        "admin.ui": "false",
        "webdav": "false",
        "master.telemetry": "false",
    }
    return Service(
        name="s3",
        command=(_bin("weed"), "mini", *(f"-{flag}={value}" for flag, value in flags.items())),
        ready_url=f"http://127.0.0.1:{s3}/healthz",
        url=f"http://127.0.0.1:{s3}",
        env={"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key},
        directory=state,  # `notification.toml` is read from the working directory
        nice=GIVES_WAY,
    )


def mlflow(state: Path, port: int) -> Service:
    """Tracking and registry on SQLite; artifacts through the server, on local disk."""
    return Service(
        name="mlflow",
        command=_uvicorn("deploy.mlflow_app:create_app", port, "--factory"),
        ready_url=f"http://127.0.0.1:{port}/health",
        url=f"http://127.0.0.1:{port}",
        # What `mlflow server` hands to its own uvicorn child. Without that parent the server is up in 7 s instead of 13 s
        # and leaves no job directory in /dev/shm when it is killed (measured with 3.17.2; test_local.py holds the names).
        env={
            **QUIET,
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{state / 'mlflow.db'}",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(state / "mlflow-artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
        },
        directory=state,
        nice=GIVES_WAY,
    )


def prefect(state: Path, port: int) -> Service:
    """Orchestration on SQLite, the way `prefect server start` runs it, without the command in front of it."""
    return Service(
        name="prefect",
        command=_uvicorn("prefect.server.api.server:create_app", port, "--factory"),
        ready_url=f"http://127.0.0.1:{port}/api/health",
        url=f"http://127.0.0.1:{port}",
        env={
            **QUIET,
            "PREFECT_HOME": str(state / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": str(port),
            # Runs of 90 days ago go, with their logs and artifacts: a sweep alone leaves 4,000 runs a month. Only events do by
            # default.
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        },
        directory=state,
        nice=GIVES_WAY,
    )


def triton(source: Path, python: Path, root: Path, ports: Iterable[int], admin_key_file: Path) -> Service:
    """Inference. Version 2 of `selfcheck` appears when known bytes came back unchanged and everything routed is loaded."""
    http, grpc, metrics = ports
    return Service(
        name="triton",
        command=(
            *(str(python), str(source / "triton" / "launch.py"), "--root", str(root)),
            *("--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)),
            *("--admin-key-file", str(admin_key_file)),
        ),
        ready_url=f"http://127.0.0.1:{http}/v2/models/selfcheck/versions/2/ready",
        url=f"http://127.0.0.1:{http}",
        directory=root,
    )


def bridge(state: Path, port: int, env: dict[str, str]) -> Service:
    """Outside events in, Prefect events out."""
    return Service(
        name="bridge",
        command=_uvicorn("bridge.app:create_app", port, "--factory", "--no-access-log"),
        ready_url=f"http://127.0.0.1:{port}/health",
        url=f"http://127.0.0.1:{port}",
        env=env,
        directory=state,
    )


def worker(state: Path, pool: str, prefect_url: str, health_port: int, env: dict[str, str]) -> Service:
    """A process worker of one work pool, with its health endpoint."""
    return Service(
        name=f"worker-{pool}",
        command=(
            *(sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"),
            *("--name", f"worker-{pool}", "--with-healthcheck", "--install-policy", "never"),
        ),
        ready_url=f"http://127.0.0.1:{health_port}/health",
        env={
            **env,
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_WORKER_WEBSERVER_PORT": str(health_port),
            "PREFECT_WORKER_QUERY_SECONDS": "1",  # the default of 10 s is most of the time from event to run
        },
        directory=state,
        after=(f"{prefect_url}/api/health",),
        adopts=True,
        nice=GIVES_WAY,
    )


def watchdog(state: Path, env: dict[str, str]) -> Service:
    """Infers a known image through every front door and restarts a server that does not answer it."""
    return Service(
        name="watchdog", command=(sys.executable, "-m", "deploy.watchdog", str(state)), env=env, directory=state
    )


def environment_of(service: Service) -> dict[str, str]:
    """The full environment the service starts with."""
    return {**os.environ, **past_proxies(os.environ), **service.env}


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep requests to this machine off a proxy named in the environment: every service asks others of
    them over loopback, which a proxy elsewhere cannot reach.
    """
    hosts = [host for name in ("no_proxy", "NO_PROXY") for host in environment.get(name, "").split(",") if host.strip()]
    value = ",".join(dict.fromkeys((*hosts, "127.0.0.1", "localhost")))
    return {"no_proxy": value, "NO_PROXY": value}
