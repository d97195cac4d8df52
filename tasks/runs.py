"""Which flow run this is, for which deployment, what its artifacts are called, and whether another run is still alive."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

_BY_HAND: Final = "by-hand"


def this_run() -> str:
    """Id of the flow run this is called in."""
    from prefect.runtime import flow_run

    return str(flow_run.get_id() or _BY_HAND)


def this_stage() -> str:
    """`<flow>/<deployment>` of the flow run this is called in: `train/tire`; `train/by-hand` without a deployment.

    A run inside another one works for that one: a training of `tune/tire` is of the stage `tune/tire`. Call it synchronously.
    """
    from prefect.runtime import deployment

    return f"{_outermost_flow() or _BY_HAND}/{deployment.get_name() or _BY_HAND}"


def _outermost_flow() -> str | None:
    """Name of the flow whose run this is, or is a part of. Prefect gives a nested run the deployment of the outermost one."""
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    outermost = flow_run.get_root_flow_run_id()
    if outermost is None or outermost == flow_run.get_id():
        name: str | None = flow_run.get_flow_name()
        return name
    with get_client(sync_client=True) as client:
        return client.read_flow(client.read_flow_run(UUID(outermost)).flow_id).name


def artifact_key(*words: str) -> str:
    """Of lower-case letters, digits and dashes, as Prefect wants them: `training`, `tire_b` -> `training-tire-b`."""
    return "".join(letter if letter.isalnum() else "-" for letter in "-".join(words).lower())


def is_alive(run: str) -> bool:
    """Whether the flow run may still end well by itself: it exists and has not ended, or it ended `Completed`.

    A run whose process was killed is alive until its missing heartbeats are noticed. Call it synchronously.
    """
    known, state = _state_of(run)
    return known and (state is None or not state.is_final() or state.is_completed())


def is_running(run: str) -> bool:
    """Whether the flow run exists and has not ended, in whatever way. Call it synchronously."""
    known, state = _state_of(run)
    return known and (state is None or not state.is_final())


def _state_of(run: str) -> "tuple[bool, State | None]":
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        identity = UUID(run)
    except ValueError:
        return False, None
    try:
        with get_client(sync_client=True) as client:
            return True, client.read_flow_run(identity).state
    except ObjectNotFound:
        return False, None
