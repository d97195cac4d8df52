"""The steps of a promotion that make a proven version answer: its copy, the intention, the switch, and what others read."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.settings import Settings
from tasks.gates import Decision, Limits
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from tasks.proof import Proof
    from tasks.registry import TrainedModel
    from tasks.swap import Swap
    from tasks.transaction import Intention, Place


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def settle_switches(here: Settings, model: str) -> None:
    """What a killed promotion or rollback left between routing table, ledger, alias and event is completed."""
    from tasks.transaction import settle

    settle(place_of(here, model), who())


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def announce(
    here: Settings, candidate: "TrainedModel", decision: Decision, figures: Mapping[str, float]
) -> "Intention":
    """The intention to switch, with the evidence, on S3: from here on a crash is completed or has changed nothing."""
    from tasks.transaction import PROMOTED, intend

    evidence = {"mlflow_run": candidate.run_id, **figures, "gates": [vars(gate) for gate in decision.gates]}
    said = [gate.measured for gate in decision.gates if gate.name == "approval"]
    why = "; ".join(["all gates held", *said])
    return intend(place_of(here, candidate.name), PROMOTED, candidate.version, who(), why, evidence)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def conclude(here: Settings, intention: "Intention", swap: "Swap") -> None:
    """Ledger, alias, event: what others read. Each is harmless to repeat."""
    from tasks.transaction import complete, settle, take_back

    place = place_of(here, intention.model)
    if not swap.undone:
        gates = [*intention.evidence["gates"], *(vars(gate) for gate in swap.gates)]
        complete(place, intention, swap.written, {**swap.figures, "gates": gates})
    elif swap.back:
        take_back(place, intention, swap.written, swap.back, "; ".join(gate.measured for gate in swap.gates))
    else:
        settle(place, intention.who)


def place_of(here: Settings, model: str) -> "Place":
    from tasks.transaction import Place

    return Place(here.serving_root, here.store, here.mlflow_tracking_uri, model)


def who() -> str:
    return f"flow-run/{flow_run.get_id() or 'by-hand'}"


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def keep_copy(here: Settings, staged: Path, proof: "Proof") -> None:
    """The proven version on S3, its seal last, before it is announced: what a lost server is restored from."""
    from tasks.version_store import upload_version

    upload_version(here.store, staged, proof.golden)


@task(cache_policy=NO_CACHE)
def switch(here: Settings, staged: Path, proof: "Proof", limits: Limits, intention: "Intention") -> "Swap":
    """Publish, load, check the golden images on exactly this version, route, under a probe load."""
    from tasks.swap import swap

    return swap(
        here.serving_root,
        here.triton,
        staged,
        proof.golden,
        proof.images,
        here.cpu_accelerator,
        late_ms=limits.max_p99_ms,
        capture_share=here.capture_share,
        revision=intention.revision,
    )
