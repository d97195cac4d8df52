"""What a stack tells its Prefect server when it starts."""

import asyncio
import os
import subprocess
import sys
import uuid

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Running

from deploy.processes import FLOW_RUN_MARK, flow_runs_of
from deploy.register import crash_orphans
from deploy.stack import POOLS, STACK_MARK


def test_a_run_that_lost_its_process_with_the_stack_is_crashed_and_one_that_lives_goes_on(prefect_server):
    async def states() -> tuple[str, str, list[str]]:
        async with get_client() as client:
            if not [pool for pool in await client.read_work_pools() if pool.name == POOLS[0]]:
                await client.create_work_pool(WorkPoolCreate(name=POOLS[0], type="process"))
            flow = await client.create_flow_from_name("orphaned")
            name = f"orphaned-{uuid.uuid4()}"
            deployment = await client.create_deployment(flow, name, work_pool_name=POOLS[0])
            lost, living = [await client.create_flow_run_from_deployment(deployment, state=Running()) for _ in range(2)]
            crashed = await crash_orphans(client, lambda: {str(living.id)})
            after = [(await client.read_flow_run(run.id)).state.name for run in (lost, living)]
            await crash_orphans(client, set)
            assert lost.name in crashed and living.name not in crashed
            return *after, crashed

    lost, living, _ = asyncio.run(states())
    assert (lost, living) == ("Crashed", "Running")


def test_the_processes_of_a_stack_say_which_runs_they_are():
    stack, run = str(uuid.uuid4()), str(uuid.uuid4())
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeping, env={**os.environ, STACK_MARK: stack, FLOW_RUN_MARK: run}) as process:
        try:
            assert flow_runs_of(stack) == {run}
            assert flow_runs_of(str(uuid.uuid4())) == set()
        finally:
            process.kill()
