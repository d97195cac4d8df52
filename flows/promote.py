"""promote: a registered candidate becomes the version that answers, or is refused with its reasons.

Makes: an ONNX network with normalisation inside, proven against PyTorch and on a scratch server; a sealed version in the
Triton model repository; a new routing table; the alias `champion`; a ledger entry. Needs: S3, MLflow, the live Triton.
By hand: `prefect deployment run 'promote/tire' -p version=7`. A run that an event started (it has an `occasion`) proves a
version only when its deployment has not yet decided about it.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import Task, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.delivery import check_delivery, deliver
from flows.settings import Settings, settings
from tasks.approval import Approval
from tasks.delivery import Delivery
from tasks.engine_stage import engine_gates
from tasks.events import emit
from tasks.export import Export
from tasks.gates import Decision, Gate, Limits, as_markdown, decide_promotion, list_of
from tasks.routing import read_routing
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from tasks.approval import Answer, Request
    from tasks.claims import Subject
    from tasks.proof import Proof
    from tasks.registry import ModelCard, TrainedModel
    from tasks.swap import Swap
    from tasks.transaction import Intention, Place

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


@flow(name="promote", flow_run_name="promote {model}")
def promote(
    model: str,
    version: int | None = None,
    limits: Limits = Limits(),
    artifact: Export = Export(),
    approval: Approval | None = None,
    delivery: Delivery | None = None,
    occasion: str | None = None,
) -> State[Any]:
    """Prove a registered version on the served engine and switch to it; or refuse it, with every reason.

    Args:
        model: Registered model, and public name of the Triton model.
        version: Registered version; the newest one when left empty.
        limits: What the candidate must prove.
        artifact: In which form it is served: precision, what its ranges are measured on, and an engine it must come with.
        approval: Whether a person must agree before the switch, and who may. Empty: the gates alone decide.
        delivery: The steps in which it enters production: shadow, then canaries. Empty: it is switched to at once.
        occasion: The event that started this run. Empty by hand: then the version is proven whatever was decided before.
    """
    here = settings()
    check_delivery(here, delivery)
    candidate, card = kept(find_candidate, approval)(here, model, version)
    if occasion and (why := reason_to_wait(here, candidate)):
        return Completed(name="Unchanged", message=why)
    settle_switches(here, model)
    table = read_routing(here.serving_root, model)
    if table and table.champion.version == candidate.version:
        decided(here, candidate, "promoted")
        return Completed(name="Unchanged", message=f"{model} v{candidate.version} is the champion already")
    staged = kept(export, approval)(here, candidate, card, artifact)
    proof = kept(prove, approval)(here, candidate, card, staged, limits)
    decision = Decision((*decide_promotion(proof.evidence, limits).gates, *engine_gates(staged, artifact)))
    kept(record, approval)(here, candidate, decision, proof.figures)
    if approval and decision.promote:
        decision = Decision((*decision.gates, approved(here, candidate, decision, approval)))
        record(here, candidate, decision, proof.figures)
    if delivery and decision.promote and table:
        decision = Decision((*decision.gates, *deliver(here, staged, proof, delivery, limits)))
        record(here, candidate, decision, proof.figures)
    if not decision.promote:
        discard(staged)
        return refused(here, candidate, decision)
    keep_copy(here, staged, proof)
    intention = announce(here, candidate, decision, proof.figures)
    swap = switch(here, staged, proof, limits, intention)
    decision = Decision((*decision.gates, *swap.gates))
    record(here, candidate, decision, {**proof.figures, **swap.figures})
    conclude(here, intention, swap)
    if swap.undone:
        return refused(here, candidate, decision)
    decided(here, candidate, "promoted")
    return Completed(
        name="Promoted", message=f"{model} v{candidate.version} answers; before it: {swap.previous or 'nothing'}"
    )


def of_this_run(context: TaskRunContext, parameters: Mapping[str, Any]) -> str:
    """Under which a run that is suspended for its approval finds a result again: it is resumed from its first line."""
    return f"{context.task_run.flow_run_id}-{context.task.name}"


def kept(step: Task[P, R], approval: Approval | None) -> Task[P, R]:
    """The step, done once in a run, however often a person lets the run wait."""
    if approval is None:
        return step
    return step.with_options(persist_result=True, cache_policy=CacheKeyFnPolicy(cache_key_fn=of_this_run))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def find_candidate(here: Settings, model: str, version: int | None) -> "tuple[TrainedModel, ModelCard]":
    """The registered version and its card. Raises LookupError naming what is registered."""
    from tasks.registry import load_card, newest_version

    uri = here.mlflow_tracking_uri
    return load_card(uri, model, version if version is not None else newest_version(uri, model))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def reason_to_wait(here: Settings, candidate: "TrainedModel") -> str | None:
    """Why this deployment must not prove the candidate now: it has decided about it, or another run is at it."""
    from tasks.claims import reason_to_leave
    from tasks.runs import is_alive, this_run

    what = f"{candidate.name} v{candidate.version}"
    return reason_to_leave(here.store, subject_of(candidate), this_run(), is_alive, what)


def subject_of(candidate: "TrainedModel") -> "Subject":
    """What this deployment decides about: the registered version."""
    from tasks.claims import version_subject
    from tasks.runs import this_stage

    return version_subject(this_stage(), candidate.name, candidate.version)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def decided(here: Settings, candidate: "TrainedModel", outcome: str, reasons: Sequence[str] = ()) -> None:
    """Writes down what became of the candidate here: repeated events and `sweep` read it."""
    from tasks.claims import Verdict, write_verdict
    from tasks.runs import this_run

    write_verdict(here.store, subject_of(candidate), Verdict(outcome, this_run(), figures={"reasons": list(reasons)}))


@task(cache_policy=NO_CACHE)
def export(here: Settings, candidate: "TrainedModel", card: "ModelCard", artifact: Export) -> Path:
    """The candidate as a sealed directory in staging: ONNX network and `version.json`. Nothing serves it yet."""
    import tempfile

    from tasks.dataset import open_version
    from tasks.engine_stage import stage_engine
    from tasks.export import export_network, require_runnable, sealed_version
    from tasks.model_repository import stage_version
    from tasks.quantize import Calibration, calibration_of
    from tasks.registry import load_network

    def calibrate() -> Calibration:
        dataset = open_version(here.store, card.dataset, card.dataset_version)
        return calibration_of(here.store, dataset, card.image_size, card.preprocessing, artifact.calibration_images)

    require_runnable(artifact, here.cpu_accelerator)
    network = load_network(here.mlflow_tracking_uri, candidate.name, candidate.version)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_network(network, card.image_size, Path(folder), artifact, calibrate)
        sealed = sealed_version(candidate, card, artifact.precision, exported.passport)
        staged = stage_version(here.serving_root, exported.file, sealed, exported.beside)
    return stage_engine(here.serving_root, staged, artifact, log.info, here.store)


@task(cache_policy=NO_CACHE)
def prove(here: Settings, candidate: "TrainedModel", card: "ModelCard", staged: Path, limits: Limits) -> "Proof":
    """The parity ladder, the served test split in a scratch server, and the champion on the same photographs."""
    from tasks.cohorts import with_cohorts
    from tasks.dataset import open_version
    from tasks.model_repository import version_directory
    from tasks.proof import Bench, gather
    from tasks.registry import load_network, load_reference

    table = read_routing(here.serving_root, candidate.name)
    route = table.champion if table else None
    champion = version_directory(here.serving_root, route.network, route.version) if route else None
    dataset = open_version(here.store, card.dataset, card.dataset_version)
    proof = gather(
        here.store,
        dataset,
        load_network(here.mlflow_tracking_uri, candidate.name, candidate.version),
        staged,
        champion,
        Bench(here.serving_root, here.triton_python, here.cpu_accelerator, limits.evaluation_concurrency, here.triton),
        load_reference(here.mlflow_tracking_uri, candidate.name, candidate.version),
    )
    return replace(proof, evidence=with_cohorts(proof.evidence, here.store, dataset))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def record(here: Settings, candidate: "TrainedModel", decision: Decision, figures: Mapping[str, float]) -> None:
    """Every figure to the candidate's MLflow run; the table of gates to the Prefect UI."""
    from tasks.registry import log_promotion

    verdict = "promoted" if decision.promote else "refused"
    summary = {"verdict": verdict, "gates": [vars(gate) for gate in decision.gates], **figures}
    log_promotion(here.mlflow_tracking_uri, candidate, figures, summary)
    create_markdown_artifact(
        key=f"promotion-{candidate.name.replace('_', '-')}",
        markdown=as_markdown(f"{candidate.name} v{candidate.version}", decision, figures),
        description=f"{candidate.name} v{candidate.version}: {verdict}",
    )


def approved(here: Settings, candidate: "TrainedModel", decision: Decision, approval: Approval) -> Gate:
    """The run waits for a person, who sees the table of gates above the form; the answer as a gate of its own."""
    from tasks.approval import wait_for_answer

    request = ask_for_approval(here, candidate, approval)
    page = f"# {candidate.name} v{candidate.version} holds every gate: may it take over?\n\n{list_of(decision)}\n"
    return hear(here, request, wait_for_answer(request, page))


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def ask_for_approval(here: Settings, candidate: "TrainedModel", approval: Approval) -> "Request":
    """The question, written down once for this run."""
    from tasks.approval import ask
    from tasks.runs import this_run

    table = read_routing(here.serving_root, candidate.name)
    champion = table.champion.version if table else None
    return ask(here.store, candidate.name, candidate.version, this_run(), approval, champion)


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def hear(here: Settings, request: "Request", answer: "Answer | None") -> Gate:
    """The answer, written down, and whether it lets the version take over."""
    from tasks.approval import judged

    table = read_routing(here.serving_root, request.model)
    return judged(here.store, request, answer, table.champion.version if table else None)


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


def refused(here: Settings, candidate: "TrainedModel", decision: Decision) -> State[Any]:
    """Nothing changed for anybody; the reasons are in the artifact, in MLflow, in the event and in the state."""
    decided(here, candidate, "refused", decision.reasons)
    emit(
        "tirewatch.model.refused",
        f"tirewatch.model.{candidate.name}",
        {"model": candidate.name, "version": candidate.version, "reasons": list(decision.reasons)},
        occasion=str(flow_run.get_id()),
    )
    return Completed(name="Refused", message=f"{candidate.name} v{candidate.version}: {'; '.join(decision.reasons)}")


def discard(staged: Path) -> None:
    """A refused candidate leaves nothing behind on the server's disk."""
    shutil.rmtree(staged)


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
