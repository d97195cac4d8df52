"""What a line needs on its Prefect server: work pools, the GPU limit, the automation for runs whose process died; on that of a
stack also the blocks of the embedded store and the deployments of prefect.yaml. By name, so running it twice is harmless.

`python -m deploy.register <state>` is run by `up`; it waits for the server. `tirewatch register` is for any other server.
"""

import asyncio
import shlex
import sys
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from deploy.launch import wait_for
from deploy.processes import flow_runs_of
from deploy.recipes import deploy_all
from deploy.stack import POOLS, SOURCE, Stack, read_stack

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

LIMITS: Final = {"gpu": 1}  # runs of one work pool at a time
HEARTBEATS_MISSED: Final = 180  # seconds; a heartbeat comes every 30 s (prefect.yaml)
STARTING: Final = 60.0  # seconds from the moment a worker takes a run to that run's process, at most
ZOMBIES: Final = "crash runs whose process died"


async def register_line() -> list[str]:
    """Pools, limits and the automation on the Prefect server that is configured; what was made and what was there. A pool or a
    limit that exists keeps its settings: it may be of another type, or for more GPUs.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    told = []
    async with get_client() as client:
        for pool in POOLS:
            try:
                limit = LIMITS.get(pool)
                await client.create_work_pool(WorkPoolCreate(name=pool, type="process", concurrency_limit=limit))
                told.append(f"work pool {pool}: made")
            except ObjectAlreadyExists:
                told.append(f"work pool {pool}: is there, left as it is")
        for name, limit in LIMITS.items():
            try:
                await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
                told.append(f"limit {name}: made, {limit} at a time")
            except ObjectAlreadyExists:
                told.append(f"limit {name}: is there, left as it is")
        await register_automations(client)
    return [*told, f"automation `{ZOMBIES}`: after {HEARTBEATS_MISSED} s without a heartbeat"]


async def register_pools(client: "PrefectClient") -> None:
    """Process work pools, and the global limits of the same names for use inside flows."""
    from prefect.client.schemas.actions import (
        GlobalConcurrencyLimitCreate,
        GlobalConcurrencyLimitUpdate,
        WorkPoolCreate,
        WorkPoolUpdate,
    )
    from prefect.exceptions import ObjectAlreadyExists

    template = _job_template()
    for pool in POOLS:
        limit = LIMITS.get(pool)
        wanted = WorkPoolCreate(name=pool, type="process", base_job_template=template, concurrency_limit=limit)
        try:
            await client.create_work_pool(wanted)
        except ObjectAlreadyExists:  # the worker makes a bare one when it is faster
            await client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template, concurrency_limit=limit))
    for name, limit in LIMITS.items():
        try:
            await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))
        except ObjectAlreadyExists:
            await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=limit))


def _job_template() -> dict[str, Any]:
    """The process worker's own template with the command spelt out: left empty, the worker imports Prefect once more in
    a process that only prepares the working directory, which costs 2 s from event to run.
    """
    from copy import deepcopy

    from prefect.workers.process import ProcessWorker

    template = deepcopy(ProcessWorker.get_default_base_job_template())
    template["variables"]["properties"]["command"]["default"] = shlex.join((sys.executable, "-m", "prefect.engine"))
    return template


async def register_automations(client: "PrefectClient") -> None:
    """A run whose heart stopped is marked Crashed: a killed process cannot report its own end."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    automation = AutomationCore(
        name=ZOMBIES,
        description="A flow run that sent heartbeats and sends none any more lost its process.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=HEARTBEATS_MISSED,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"The process of this run gave no sign of life for {HEARTBEATS_MISSED} s",
            )
        ],
    )
    existing = await client.read_automations_by_name(ZOMBIES)
    if existing:
        await client.update_automation(existing[0].id, automation)
    else:
        await client.create_automation(automation)


async def crash_orphans(client: "PrefectClient", alive: Callable[[], Collection[str]]) -> list[str]:
    """Runs that were under way when the stack ended lost their processes with it, and their hearts stopped while nobody
    listened: marked Crashed, else they would hold their deployment's place for ever. alive: ids of runs that have a process,
    asked after the runs were listed. Names of the runs that had none.
    """
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    under_way = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    found = await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=under_way))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=list(POOLS))),
    )
    living, now = alive(), datetime.now(UTC)
    orphans = [run for run in found if str(run.id) not in living and not _is_starting(run, now)]
    for run in orphans:
        await client.set_flow_run_state(run.id, Crashed(message="The process of this run ended with its stack"))
    return [run.name for run in orphans]


def _is_starting(run: "FlowRun", now: datetime) -> bool:
    """Whether its worker may be just about to start its process."""
    state = run.state
    return state is not None and state.is_pending() and (now - state.timestamp).total_seconds() < STARTING


async def register_all(stack: Stack) -> None:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        await register_pools(client)
        await register_automations(client)
        for name in await crash_orphans(client, lambda: flow_runs_of(stack.id)):
            print(f"{name} had lost its process when the stack ended: marked Crashed")


def register_blocks(stack: Stack) -> None:
    """`aws-credentials/tirewatch` and `s3-bucket/tirewatch`, for result storage and for people's own flows."""
    from prefect_aws import AwsClientParameters, AwsCredentials, S3Bucket
    from pydantic import SecretStr

    env = stack.environment()
    credentials = AwsCredentials(
        aws_access_key_id=env["TIREWATCH_S3_ACCESS_KEY_ID"],
        aws_secret_access_key=SecretStr(env["TIREWATCH_S3_SECRET_ACCESS_KEY"]),
        region_name=env["TIREWATCH_S3_REGION"],
        aws_client_parameters=AwsClientParameters(endpoint_url=env["TIREWATCH_S3_ENDPOINT_URL"]),
    )
    credentials.save("tirewatch", overwrite=True)
    S3Bucket(bucket_name=env["TIREWATCH_S3_BUCKET"], credentials=credentials).save("tirewatch", overwrite=True)


def main() -> None:
    import prefect.client.orchestration
    import prefect.flows  # noqa: F401  imported while the server starts

    stack = read_stack(Path(sys.argv[1]))
    wait_for([f"{stack.prefect_url}/api/health"])
    asyncio.run(register_all(stack))
    deploy_all(SOURCE / "prefect.yaml")
    register_blocks(stack)


if __name__ == "__main__":
    main()
