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
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefect import Task, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.approval import approved
from flows.delivery import check_delivery, deliver
from flows.settings import Settings, settings
from flows.switch import announce, conclude, keep_copy, settle_switches, switch
from tasks.approval import Approval
from tasks.delivery import Delivery
from tasks.engine_stage import engine_gates
from tasks.events import emit
from tasks.export import Export
from tasks.gates import Decision, Gate, Limits, as_markdown, decide_promotion
from tasks.routing import read_routing
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from tasks.claims import Subject
    from tasks.ledger import Entry
    from tasks.proof import Proof
    from tasks.registry import ModelCard, TrainedModel
    from tasks.routing import RoutingTable
    from tasks.transaction import Intention

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
    if done := promoted_before(here, candidate, table, occasion):
        return done
    staged = kept(export, approval)(here, candidate, card, artifact)
    if is_lost := not staged.exists():  # while a person decided; what is made anew is proven anew
        staged = export(here, candidate, card, artifact)
    proof = (prove if is_lost else kept(prove, approval))(here, candidate, card, staged, limits)
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
        return refused(here, candidate, decision.reasons)
    keep_copy(here, staged, proof)
    intention = announce(here, candidate, decision, proof.figures)
    if intention.previous != proof.against:
        discard(staged)
        return outdated(here, candidate, decision, proof, intention)
    swap = switch(here, staged, proof, limits, intention)
    decision = Decision((*decision.gates, *swap.gates))
    record(here, candidate, decision, {**proof.figures, **swap.figures})
    conclude(here, intention, swap)
    if swap.undone:
        return refused(here, candidate, decision.reasons)
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


def promoted_before(
    here: Settings, candidate: "TrainedModel", table: "RoutingTable | None", occasion: str | None
) -> State[Any] | None:
    """The end of a run whose candidate is champion already, or was it once and comes again by an event; None: it is proven."""
    if table and table.champion.version == candidate.version:
        decided(here, candidate, "promoted")
        return Completed(name="Unchanged", message=f"{candidate.name} v{candidate.version} is the champion already")
    if occasion and (ended := former_reign(here, candidate)):
        return not_again(here, candidate, *ended)
    return None


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def former_reign(here: Settings, candidate: "TrainedModel") -> "tuple[Entry, Entry] | None":
    """With which entries of the ledger the version became champion since it was registered, and was replaced."""
    from tasks.ledger import ended_reign, read_ledger
    from tasks.registry import client_of

    found = client_of(here.mlflow_tracking_uri).get_model_version(candidate.name, str(candidate.version))
    since = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return ended_reign(read_ledger(here.store, candidate.name), candidate.version, since)


def not_again(here: Settings, candidate: "TrainedModel", began: "Entry", ended: "Entry") -> State[Any]:
    """The verdict of a run that died after its switch. Whoever withdrew the version since then meant it."""
    from tasks.transaction import UNDONE

    if ended.action == UNDONE:
        return refused(here, candidate, [ended.why])
    decided(here, candidate, "promoted")
    told = (
        f"champion from {began.at} until {ended.at}: {ended.action} to v{ended.version} by {ended.who}, {ended.why!r}"
    )
    return Completed(
        name="Unchanged",
        message=f"{candidate.name} v{candidate.version} was {told}; to promote it again, start this deployment by hand",
    )


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
    from tasks.runs import is_running, this_run
    from tasks.staging import Owner

    def calibrate() -> Calibration:
        dataset = open_version(here.store, card.dataset, card.dataset_version)
        return calibration_of(here.store, dataset, card.image_size, card.preprocessing, artifact.calibration_images)

    require_runnable(artifact, here.cpu_accelerator)
    owner = Owner(this_run(), is_running)
    network = load_network(here.mlflow_tracking_uri, candidate.name, candidate.version)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_network(network, card.image_size, Path(folder), artifact, calibrate)
        sealed = sealed_version(candidate, card, artifact.precision, exported.passport)
        staged = stage_version(here.serving_root, exported.file, sealed, exported.beside, owner)
    return stage_engine(here.serving_root, staged, artifact, log.info, here.store, owner)


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
    evidence = with_cohorts(proof.evidence, here.store, dataset)
    return replace(proof, evidence=evidence, against=route.version if route else None)


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


def refused(here: Settings, candidate: "TrainedModel", reasons: Sequence[str]) -> State[Any]:
    """Nothing changed for anybody; the reasons are in the artifact, in MLflow, in the event and in the state."""
    tell_refusal(here, candidate, reasons)
    decided(here, candidate, "refused", reasons)
    return Completed(name="Refused", message=f"{candidate.name} v{candidate.version}: {'; '.join(reasons)}")


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def tell_refusal(here: Settings, candidate: "TrainedModel", reasons: Sequence[str]) -> None:
    """The event, before the verdict: after it nobody would send the event again. Repeated by this run it has the same id."""
    emit(
        "tirewatch.model.refused",
        f"tirewatch.model.{candidate.name}",
        {"model": candidate.name, "version": candidate.version, "reasons": list(reasons)},
        occasion=str(flow_run.get_id()),
    )


def outdated(
    here: Settings, candidate: "TrainedModel", decision: Decision, proof: "Proof", intention: "Intention"
) -> State[Any]:
    """The champion changed while the candidate was proven. Nothing is decided, so that it can be proven against the new one."""
    was, now = (f"v{version}" if version else "no champion" for version in (proof.against, intention.previous))
    changed = Gate("champion as compared with", False, f"{now} came meanwhile", was)
    record(here, candidate, Decision((*decision.gates, changed)), proof.figures)
    leave(here, candidate)
    return Completed(
        name="Outdated",
        message=f"{candidate.name} v{candidate.version} was compared with {was}, and {now} came meanwhile: nothing has "
        "changed; `sweep/line` sends its event again, or start this deployment by hand",
    )


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def leave(here: Settings, candidate: "TrainedModel") -> None:
    """Another run may take the candidate on, if it was this one that had."""
    from tasks.claims import claimant, release
    from tasks.runs import this_run

    if claimant(here.store, subject_of(candidate)) == this_run():
        release(here.store, subject_of(candidate))


def discard(staged: Path) -> None:
    """A candidate that was not switched to leaves nothing behind on the server's disk."""
    shutil.rmtree(staged, ignore_errors=True)
