"""Which stage a flow run belongs to, asked in real flow runs."""

import pytest
from prefect import flow, task

from tasks.runs import artifact_key, this_stage

pytestmark = pytest.mark.usefixtures("prefect_server")


@task
def asked() -> str:
    return this_stage()


@flow
def inner() -> str:
    return asked()


@flow
def outer() -> tuple[str, str]:
    return asked(), inner()


def test_a_run_inside_another_one_is_of_the_stage_of_that_one():
    assert inner() == "inner/by-hand"
    assert outer() == ("outer/by-hand", "outer/by-hand")


def test_the_key_of_an_artifact_takes_any_name():
    assert artifact_key("training", "Tire_b 7") == "training-tire-b-7"
