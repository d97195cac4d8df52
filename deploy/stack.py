"""What one embedded stack is: its folder, identity, ports and secrets, and the environment its processes share."""

import json
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy import services

STATE_VERSION: Final = 1
SOURCE: Final = Path(__file__).resolve().parents[1]
BUCKET: Final = "tirewatch"
POOLS: Final = ("cpu", "gpu")

# What people expect; anything else is taken when somebody holds them already.
CONVENTIONAL: Final = {
    "prefect": 4200,
    "mlflow": 5000,
    "s3": 8333,
    "triton_http": 8000,
    "triton_grpc": 8001,
    "triton_metrics": 8002,
    "bridge": 8787,
}
_S3_INTERNAL: Final = (
    *("s3_grpc", "s3_master", "s3_master_grpc", "s3_volume", "s3_volume_grpc"),
    *("s3_filer", "s3_filer_grpc", "s3_iceberg", "s3_lance", "s3_admin"),
)
_INTERNAL: Final = (*_S3_INTERNAL, *(f"worker_{pool}" for pool in POOLS))

# Where the parts of a line are. Whoever sets one of them in the environment means that line, and no stack in some folder.
ADDRESSES: Final = tuple(
    f"TIREWATCH_{name}"
    for name in ("S3_BUCKET", "S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "SERVING_ROOT", "TRITON_HTTP", "TRITON_GRPC")
)

# Every process of a stack carries these two from the moment it is started, and hands them to its children.
STACK_MARK: Final = "TIREWATCH_STACK"
SERVICE_MARK: Final = "TIREWATCH_SERVICE"


class StackError(RuntimeError):
    """The stack cannot be started or reached; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Stack:
    """One stack, as `.tirewatch/stack.json` and `secrets.json` describe it."""

    state: Path
    id: str
    ports: Mapping[str, int]
    secrets: Mapping[str, str]

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}"

    @property
    def serving_root(self) -> Path:
        return self.state / "serving"

    @property
    def socket(self) -> Path:
        """Supervisor's socket. A path above the kernel's 107 bytes cannot be bound, so deep folders use the temporary one."""
        inside = self.state / "supervisor.sock"
        return inside if len(str(inside)) < 90 else Path(tempfile.gettempdir()) / f"tirewatch-{self.id}.sock"

    def log(self, service: str) -> Path:
        return self.state / "logs" / f"{service}.log"

    def environment(self) -> dict[str, str]:
        """What flows, workers and a person at a shell need in order to use this stack."""
        return {
            **services.QUIET,
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_HOME": str(self.state / "prefect-client"),
            # A run whose process died is marked crashed when its heart stops (deploy/register.py).
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.ports['mlflow']}",
            "TIREWATCH_CHECKOUT": str(SOURCE),
            "TIREWATCH_S3_BUCKET": BUCKET,
            "TIREWATCH_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3']}",
            "TIREWATCH_S3_ACCESS_KEY_ID": self.secrets["s3_access_key_id"],
            "TIREWATCH_S3_SECRET_ACCESS_KEY": self.secrets["s3_secret_access_key"],
            "TIREWATCH_S3_REGION": "us-east-1",
            "TIREWATCH_MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.ports['mlflow']}",
            "TIREWATCH_PREFECT_UI_URL": self.prefect_url,
            "TIREWATCH_SERVING_ROOT": str(self.serving_root),
            "TIREWATCH_CACHE_DIR": str(self.state / "cache"),
            "TIREWATCH_SEARCH_STORAGE": f"sqlite:///{self.state / 'search.db'}",
            "TIREWATCH_TRITON_HTTP": f"127.0.0.1:{self.ports['triton_http']}",
            "TIREWATCH_TRITON_GRPC": f"127.0.0.1:{self.ports['triton_grpc']}",
            "TIREWATCH_TRITON_ADMIN_KEY": self.secrets["triton_admin_key"],
            "TIREWATCH_CAPTURE_SHARE": "1.0",  # one machine's traffic is small enough to keep; the spool is bounded
            "TIREWATCH_TRITON_PYTHON": str(triton_python()),
        }


def triton_python() -> Path:
    """Python of the serving environment: the one the environment names, else the one beside this checkout."""
    return Path(os.environ.get("TIREWATCH_TRITON_PYTHON") or SOURCE / ".venv-triton" / "bin" / "python")


def inherited_environment() -> dict[str, str]:
    """The caller's environment without what would leak into a stack: settings of another stack, profile or account."""
    foreign = ("TIREWATCH_", "PREFECT_", "MLFLOW_", "_MLFLOW_", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def services_of(stack: Stack) -> list[services.Service]:
    """Every service of the stack, in the order people read them."""
    ports, env = stack.ports, stack.environment()
    bridge_env = {
        **services.QUIET,
        "TIREWATCH_BRIDGE_TOKEN": stack.secrets["bridge_token"],
        "TIREWATCH_BRIDGE_BUCKET": BUCKET,
        "TIREWATCH_BRIDGE_PREFECT_API_URL": f"{stack.prefect_url}/api",
        "TIREWATCH_BRIDGE_STATE": str(stack.state / "bridge.db"),
    }
    return [
        services.seaweedfs(
            stack.state,
            (ports["s3"], *(ports[name] for name in _S3_INTERNAL)),
            stack.secrets["s3_access_key_id"],
            stack.secrets["s3_secret_access_key"],
        ),
        services.prefect(stack.state, ports["prefect"]),
        services.mlflow(stack.state, ports["mlflow"]),
        services.triton(
            SOURCE,
            triton_python(),
            stack.serving_root,
            (ports["triton_http"], ports["triton_grpc"], ports["triton_metrics"]),
            stack.state / "triton-admin-key",
        ),
        services.bridge(stack.state, ports["bridge"], bridge_env),
        *(services.worker(stack.state, pool, stack.prefect_url, ports[f"worker_{pool}"], env) for pool in POOLS),
        services.watchdog(stack.state, env),
    ]


def read_stack(state: Path) -> Stack:
    """The stack of this state folder. Raises StackError when there is none, or when another version made it."""
    state = state.resolve()
    try:
        described: dict[str, Any] = json.loads((state / "stack.json").read_text())
    except FileNotFoundError:
        raise StackError(f"there is no stack in {state}: start one with `tirewatch up`") from None
    except ValueError as error:
        raise StackError(
            f"{state / 'stack.json'} is damaged ({error}): move {state} away and run `tirewatch up`"
        ) from None
    if described.get("version") != STATE_VERSION:
        raise StackError(
            f"{state} was made by state version {described.get('version')}, this build reads {STATE_VERSION}: "
            f"end it with the build that made it, move the folder away and run `tirewatch up`"
        )
    return Stack(state, described["id"], described["ports"], json.loads((state / "secrets.json").read_text()))


def create_stack(state: Path) -> Stack:
    """A new stack: identity, ports and secrets are chosen once and kept."""
    state = state.resolve()
    (state / "logs").mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    made = {
        "s3_access_key_id": "tirewatch",
        "s3_secret_access_key": secrets.token_urlsafe(24),
        "bridge_token": secrets.token_urlsafe(24),
        "triton_admin_key": secrets.token_urlsafe(24),
    }
    stack = Stack(state, secrets.token_hex(8), choose_ports(), made)
    write_private(state / "secrets.json", json.dumps(made, indent=2))
    write_private(state / "triton-admin-key", made["triton_admin_key"])
    save_stack(stack)
    return stack


def save_stack(stack: Stack) -> None:
    described = {"version": STATE_VERSION, "id": stack.id, "ports": dict(stack.ports)}
    write_private(stack.state / "stack.json", json.dumps(described, indent=2))
    write_private(stack.state / "env", _shell_lines(stack))


def _shell_lines(stack: Stack) -> str:
    """What a person's shell sources: the environment, the commands of this installation, and the stack's S3 for every AWS tool,
    so that `aws s3 cp` cannot reach the account that the shell was set up for.
    """
    env = stack.environment()
    aws = {
        "AWS_ACCESS_KEY_ID": env["TIREWATCH_S3_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": env["TIREWATCH_S3_SECRET_ACCESS_KEY"],
        "AWS_ENDPOINT_URL_S3": env["TIREWATCH_S3_ENDPOINT_URL"],
        "AWS_DEFAULT_REGION": env["TIREWATCH_S3_REGION"],
        "AWS_REGION": env["TIREWATCH_S3_REGION"],
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted({**env, **aws}.items())]
    commands = shlex.quote(str(Path(sys.executable).parent))
    return "\n".join(["unset AWS_PROFILE AWS_SESSION_TOKEN", *lines, f'export PATH={commands}:"$PATH"']) + "\n"


def choose_ports() -> dict[str, int]:
    """A port for every listener: the conventional one when it is free, a random free one otherwise."""
    conventional = {name: port for name, port in CONVENTIONAL.items() if services.is_free(port)}
    others = [name for name in (*CONVENTIONAL, *_INTERNAL) if name not in conventional]
    return conventional | dict(zip(others, services.free_ports(len(others)), strict=True))


def write_private(path: Path, text: str) -> None:
    """The text in a file only its owner reads, whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # made with mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(name).replace(path)
