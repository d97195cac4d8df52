"""What a stack tells its Prefect server when it starts."""

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.settings.models.server.services import ServerServicesDBVacuumSettings
from prefect.states import Running
from typer.testing import CliRunner

from deploy.cli import app
from deploy.processes import FLOW_RUN_MARK, flow_runs_of
from deploy.register import ZOMBIES, crash_orphans
from deploy.services import free_ports, prefect
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


def test_any_prefect_server_gets_pools_limits_and_the_automation_and_keeps_what_it_has(prefect_server):
    async def server() -> tuple[dict[str, int | None], list[str]]:
        async with get_client() as client:
            pools = {pool.name: pool.concurrency_limit for pool in await client.read_work_pools() if pool.name in POOLS}
            return pools, [each.name for each in await client.read_automations_by_name(ZOMBIES)]

    async def clear(pools: Sequence[str]) -> None:
        async with get_client() as client:
            for pool in pools:
                with suppress(ObjectNotFound):
                    await client.delete_work_pool(pool)
            for automation in await client.read_automations_by_name(ZOMBIES):
                await client.delete_automation(automation.id)

    async def two_gpus() -> None:
        async with get_client() as client:
            await client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=2))

    asyncio.run(clear(POOLS))
    try:
        first = CliRunner().invoke(app, ["register"])
        assert first.exit_code == 0 and "work pool gpu: made" in first.stdout, first.output
        assert asyncio.run(server()) == ({"cpu": None, "gpu": 1}, [ZOMBIES])
        asyncio.run(two_gpus())
        again = CliRunner().invoke(app, ["register"])
        assert again.exit_code == 0 and "work pool gpu: is there, left as it is" in again.stdout
        assert asyncio.run(server()) == ({"cpu": None, "gpu": 2}, [ZOMBIES])
    finally:
        asyncio.run(clear(POOLS))


def test_a_prefect_server_that_does_not_answer_is_named(prefect_server):
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    with temporary_settings({PREFECT_API_URL: nobody}):
        result = CliRunner().invoke(app, ["register"])
    assert result.exit_code == 1 and f"the Prefect server at {nobody} did not take it" in result.stderr


VACUUM = "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"


def test_the_embedded_server_forgets_runs_that_ended_long_ago(tmp_path):
    settings = ServerServicesDBVacuumSettings(enabled=prefect(tmp_path, 4200).env[VACUUM])
    assert settings.enabled_vacuum_types == {"events", "flow_runs", "orphans"}
    assert settings.retention_period == timedelta(days=90)
