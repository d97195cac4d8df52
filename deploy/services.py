"""What each service of the embedded stack is: command, environment, port, readiness. Values; `local.py` runs them."""

import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",  # a forgotten server address must fail, not start a hidden server
}


@dataclass(frozen=True)
class Service:
    """One long-running process of the stack. `ready_url` answers 2xx once it can be used; empty for workers."""

    name: str
    command: tuple[str, ...]
    ready_url: str = ""
    url: str = ""
    env: dict[str, str] = field(default_factory=dict)
    directory: Path = Path()


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports nobody listens on now."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def _bin(name: str) -> str:
    return str(Path(sys.executable).parent / name)


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
    )


def mlflow(state: Path, port: int) -> Service:
    """Tracking and registry on SQLite; artifacts through the server, on local disk."""
    return Service(
        name="mlflow",
        command=(
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{state / 'mlflow.db'}"),
            *("--artifacts-destination", str(state / "mlflow-artifacts")),
        ),
        ready_url=f"http://127.0.0.1:{port}/health",
        url=f"http://127.0.0.1:{port}",
        env=QUIET,
        directory=state,
    )


def environment_of(service: Service) -> dict[str, str]:
    """The full environment the service starts with."""
    return {**os.environ, **service.env}
