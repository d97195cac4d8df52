"""Which flow run this is, for which deployment, and whether another one is still alive."""

from typing import Final

_BY_HAND: Final = "by-hand"


def this_run() -> str:
    """Id of the flow run this is called in."""
    from prefect.runtime import flow_run

    return str(flow_run.get_id() or _BY_HAND)


def this_stage() -> str:
    """`<flow>/<deployment>` of the flow run this is called in: `train/tire`; `train/by-hand` without a deployment."""
    from prefect.runtime import deployment, flow_run

    return f"{flow_run.get_flow_name() or _BY_HAND}/{deployment.get_name() or _BY_HAND}"


def is_alive(run: str) -> bool:
    """Whether the flow run may still end well by itself: it exists and has not ended, or it ended `Completed`.

    A run whose process was killed is alive until its missing heartbeats are noticed. Call it synchronously.
    """
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        identity = UUID(run)
    except ValueError:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(identity).state
    except ObjectNotFound:
        return False
    return state is None or not state.is_final() or state.is_completed()
