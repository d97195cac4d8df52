"""Follow the runs that events start: find the run of a deployment for a subject, wait for it, say how it ended."""

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun


class RunFailed(RuntimeError):
    """A run ended in a failed, crashed or cancelled state. The message names the run and its state."""


def find_run(deployment: str, since: datetime, parameters: Mapping[str, Any]) -> "FlowRun | None":
    """The newest run of `flow/deployment` created since then whose parameters include the given ones."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
    )
    from prefect.client.schemas.sorting import FlowRunSort

    flow, name = deployment.split("/")
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name])),
            flow_run_filter=FlowRunFilter(
                expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"after_": since})
            ),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=50,
        )
    return next(
        (run for run in runs if all(run.parameters.get(key) == value for key, value in parameters.items())), None
    )


def wait_for_run(
    deployment: str,
    since: datetime,
    parameters: Mapping[str, Any],
    appear_within: float,
    finish_within: float,
    on_change: Callable[["FlowRun"], None],
) -> "FlowRun":
    """The run, finished. `on_change` is called with every look at it (twice a second).

    Raises TimeoutError when it does not appear or finish in the given seconds, RunFailed when it does not end well.
    """
    deadline = time.monotonic() + appear_within
    run: FlowRun | None = None
    while run is None or run.state is None or not run.state.is_final():
        if time.monotonic() > deadline:
            what = "did not start" if run is None else f"is still {run.state_name}"
            raise TimeoutError(f"{deployment} {what} after {appear_within if run is None else finish_within:.0f} s")
        time.sleep(0.5)
        found = find_run(deployment, since, parameters)
        if run is None and found is not None:
            deadline = time.monotonic() + finish_within
        run = found
        if run is not None:
            on_change(run)
    if not run.state.is_completed():
        raise RunFailed(f"{deployment} run {run.name} ended {run.state.name}: {run.state.message}")
    return run
