"""What is known about a candidate before it may answer: every rung of the parity ladder, the served test split, the
champion on the same photographs. Measures; `gates` judges.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tasks.dataset import DatasetVersion, read_rows
from tasks.decision import DecisionRule, decide
from tasks.evaluation import upper_bound
from tasks.gates import Evidence, accuracy, escapes_and_overkills
from tasks.inference import Accelerator
from tasks.model_repository import front_doors
from tasks.network_forms import artifact_run, artifact_runs, decoded, each_alone, run_all, torch_run
from tasks.parity import RETRAINED, ROUNDING, Step, climb, compare, golden_indices
from tasks.scratch import ScratchServer
from tasks.sealed import SealedVersion, read_sealed
from tasks.serving import (
    NotServed,
    ServedEvaluation,
    TritonAddress,
    evaluate_served,
    infer_network,
    requests_answered,
)
from tasks.storage import Store

if TYPE_CHECKING:
    from tasks.model import ImageNetwork
    from tasks.registry import Reference

SAME_PRECISION: Final = ("PyTorch", "ONNX")
PROBED: Final = 256  # test photographs the probe load asks about during a switch
GOLDEN_POOL: Final = 2000  # validation images among which the golden ones are looked for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photographs:
    """Encoded photographs of one split in their fixed order (by sha256), with their labels."""

    encoded: Sequence[bytes]
    labels: Sequence[str]


def photographs(store: Store, version: DatasetVersion, split: str, limit: int | None = None) -> Photographs:
    """The split, or its first `limit` photographs. Raises LookupError for an empty split."""
    encoded: list[bytes] = []
    labels: list[str] = []
    for batch in read_rows(store, version, [split], ["image", "label"]):
        encoded += batch.column("image").to_pylist()
        labels += batch.column("label").to_pylist()
        if limit is not None and len(encoded) >= limit:
            break
    if not encoded:
        raise LookupError(f"{version.name} v{version.version} has no photographs in its {split} split")
    return Photographs(encoded[:limit], labels[:limit])


def truth_of(labels: Sequence[str], rule: DecisionRule) -> NDArray[np.int64]:
    """[N] label indices. Raises ValueError naming labels the rule does not know."""
    unknown = sorted(set(labels) - set(rule.labels))
    if unknown:
        raise ValueError(f"the photographs are labelled {unknown}, which the model ({list(rule.labels)}) does not know")
    index = {label: position for position, label in enumerate(rule.labels)}
    return np.array([index[label] for label in labels], dtype=np.int64)


def in_label_order(decisions: NDArray[np.int64], theirs: DecisionRule, ours: DecisionRule) -> NDArray[np.int64]:
    """Decisions of another version in our label indices; -1 for a label we do not have (it cannot be right here)."""
    index = {label: position for position, label in enumerate(ours.labels)}
    table = np.array([index.get(label, -1) for label in theirs.labels], dtype=np.int64)
    translated: NDArray[np.int64] = table[decisions]
    return translated


@dataclass(frozen=True)
class Golden:
    """Images that must come out the same on every rung: pixels uint8 [G, S, S, 3] and the sealed artifact's own
    probabilities float32 [G, C] for them.
    """

    pixels: NDArray[np.uint8]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Proof:
    """The evidence the gates judge, the golden images for the check after the load, encoded photographs of the test split
    for the load during the switch, and the figures people read. against: version of the champion it was compared with.
    """

    evidence: Evidence
    golden: Golden
    images: tuple[bytes, ...]
    figures: dict[str, float]
    against: int | None = None


@dataclass(frozen=True)
class Bench:
    """Where a candidate is proven: Python of the serving environment, CPU runtime, requests in flight. live: the server in
    production, whose load meanwhile is told beside the latencies.
    """

    serving_root: Path
    serving_python: Path
    accelerator: Accelerator
    concurrency: int
    live: TritonAddress | None = None


def gather(
    store: Store,
    dataset: DatasetVersion,
    network: "ImageNetwork",
    staged: Path,
    champion: Path | None,
    bench: Bench,
    trained: "Reference | None" = None,
) -> Proof:
    """Everything the gates ask for, about the sealed directory `staged`; `champion` is the sealed directory in force.
    trained: what training wrote down about the validation split, for the lowest rung of the ladder.
    """
    validation, test = photographs(store, dataset, "val", GOLDEN_POOL), photographs(store, dataset, "test")
    return prove(validation, test, network, staged, champion, bench, trained)


def prove(
    validation: Photographs,
    test: Photographs,
    network: "ImageNetwork",
    staged: Path,
    champion: Path | None,
    bench: Bench,
    trained: "Reference | None" = None,
) -> Proof:
    """As `gather`, about photographs at hand: golden images come out of `validation`, everything else is measured on `test`."""
    sealed = read_sealed(staged)
    runs = {"PyTorch": torch_run(network), **artifact_runs(staged, sealed.precision, bench.accelerator)}
    on_validation, on_test = (
        dict(zip(runs, run_all([*runs.values()], split.encoded, sealed.image_size, sealed.preprocessing), strict=True))
        for split in (validation, test)
    )
    chosen = golden_indices(on_validation["PyTorch"], validation.labels, sealed.rule).tolist()
    golden = [validation.encoded[index] for index in chosen]
    pixels = np.concatenate(list(decoded(golden, sealed.image_size, sealed.preprocessing)))
    in_process = {name: found[chosen] for name, found in on_validation.items()}
    with ScratchServer(bench.serving_python, staged, bench.serving_root, bench.accelerator) as server:
        answers = {
            "Triton": network_answers(server.address, sealed, pixels),
            "front door": evaluate_served(
                server.address, sealed.model, golden, sealed, bench.concurrency
            ).probabilities,
        }
        with beside(bench) as load:
            served = evaluate_served(server.address, sealed.model, test.encoded, sealed, bench.concurrency)
    final = [*runs][-1]
    evidence = Evidence(
        rule=sealed.rule,
        truth=truth_of(test.labels, sealed.rule),
        served=served.decisions,
        offline=np.where(np.isfinite(on_test[final]).all(axis=1), decide(on_test[final], sealed.rule), -1),
        rungs=climb(steps(recorded(trained, golden), in_process, answers), sealed.rule),
        test_rung=compare(f"PyTorch -> {final}", on_test["PyTorch"], on_test[final], sealed.rule),
        p99_ms=served.p99_ms,
        probabilities=served.probabilities,
        champion=None if champion is None else champion_decisions(champion, test, sealed.rule, bench.accelerator),
    )
    figures = figures_of(evidence, served) | load
    return Proof(evidence, Golden(pixels, in_process[final]), tuple(test.encoded[:PROBED]), figures)


@contextmanager
def beside(bench: Bench) -> Iterator[dict[str, float]]:
    """What else the machine did in the block, filled in at its end: requests a second that the live server answered, and the
    machine's load over the last minute (runnable processes for each processor).
    """
    found: dict[str, float] = {}
    models = front_doors(bench.serving_root)
    before, began = _answered(bench.live, models), time.monotonic()
    yield found
    after, seconds = _answered(bench.live, models), time.monotonic() - began
    if before is not None and after is not None:
        found["live_requests_per_second"] = max(after - before, 0) / seconds
    found["machine_load"] = os.getloadavg()[0] / (os.cpu_count() or 1)


def _answered(live: TritonAddress | None, models: Sequence[str]) -> int | None:
    try:
        return requests_answered(live, models) if live else None
    except NotServed as gone:  # a first version is proven before the server serves anything
        log.warning("the live server's load is not known: %s", gone)
        return None


def steps(
    training: NDArray[np.float32] | None,
    in_process: Mapping[str, NDArray[np.float32]],
    answers: Mapping[str, NDArray[np.float32]],
) -> list[Step]:
    """The ladder from what training wrote down, through every form of the network here, to what the server answers. Only a
    reduced form may move probabilities; between equal ones nothing but rounding is allowed.
    """
    found = [Step(name, values, ROUNDING if name in SAME_PRECISION else None) for name, values in in_process.items()]
    found += [Step(name, values, ROUNDING) for name, values in answers.items()]
    if training is None:
        return found
    return [Step("training", training), replace(found[0], limit=RETRAINED), *found[1:]]


def recorded(trained: "Reference | None", golden: Sequence[bytes]) -> NDArray[np.float32] | None:
    """[G, C] what training wrote down for these photographs; None where it wrote nothing about one of them."""
    if trained is None:
        return None
    places = {digest: place for place, digest in enumerate(trained.sha256.tolist())}
    rows = [places.get(hashlib.sha256(photograph).hexdigest(), -1) for photograph in golden]
    return None if -1 in rows else trained.probabilities[rows]


def network_answers(
    address: TritonAddress, sealed: SealedVersion, pixels: NDArray[np.uint8], batch: int = 8
) -> NDArray[np.float32]:
    """Probabilities [N, C] of exactly this version of the network model, for decoded pixels; NaN for an image that it refuses.
    Raises NotServed where it refuses all of them.
    """

    def asked(some: NDArray[np.uint8]) -> NDArray[np.float32]:
        return infer_network(address, sealed.network, sealed.version, some)

    starts = range(0, len(pixels), batch)
    return each_alone(lambda every: np.concatenate([asked(every[start : start + batch]) for start in starts]), pixels)


def champion_decisions(
    directory: Path, test: Photographs, ours: DecisionRule, accelerator: Accelerator
) -> NDArray[np.int64]:
    """What the version in force decides on the same photographs, in our label order. Its rows never changed split, so
    it was not trained on any of them.
    """
    sealed = read_sealed(directory)
    (probabilities,) = run_all(
        [artifact_run(directory, accelerator)], test.encoded, sealed.image_size, sealed.preprocessing
    )
    return in_label_order(decide(probabilities, sealed.rule), sealed.rule, ours)


def figures_of(evidence: Evidence, served: ServedEvaluation) -> dict[str, float]:
    """The figures of the served evaluation, under the names they have in MLflow."""
    figures = {
        "served_accuracy": accuracy(evidence.served, evidence.truth),
        "served_images": float(len(evidence.truth)),
        "served_p50_ms": served.p50_ms,
        "served_p95_ms": served.p95_ms,
        "served_p99_ms": served.p99_ms,
        "served_images_per_second": served.throughput,
        "served_differs_from_offline": float((evidence.served != evidence.offline).sum()),
    }
    if evidence.rule.defect_labels:
        escapes, overkills = escapes_and_overkills(evidence)
        figures["served_escapes"], figures["served_overkills"] = float(escapes.wrong), float(overkills.wrong)
        figures["served_escape_upper"] = upper_bound(escapes.wrong, escapes.count)
        figures["served_overkill_upper"] = upper_bound(overkills.wrong, overkills.count)
    if evidence.champion is not None:
        figures["champion_accuracy"] = accuracy(evidence.champion, evidence.truth)
    return figures


def check_golden(address: TritonAddress, sealed: SealedVersion, golden: Golden) -> None:
    """Ask exactly this version of the network model for the golden images. Raises RuntimeError when a decision differs
    from the sealed artifact's: the server then runs something else than what was proven.
    """
    answers = network_answers(address, sealed, golden.pixels, batch=1)  # the version in force has requests between them
    rung = compare("sealed -> live", golden.probabilities, answers, sealed.rule)
    if rung.flips:
        raise RuntimeError(
            f"{sealed.network} version {sealed.version} on the live server decides {rung.flips} of {rung.images} golden "
            f"images differently (probabilities differ by up to {rung.largest_difference:.2e}): it is not routed to"
        )
