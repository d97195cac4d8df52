"""What else is known about the test photographs: which slices they fall into, and whose labels are doubted.

Doubts come from the labels flow where it has examined the test split: its judge never saw the candidate. Elsewhere from
confident learning on the candidate's own served probabilities, which are out of sample on this split; there the champion must
decide against the label too, else the candidate would excuse itself where it alone is wrong. The gate says which it was.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.dataset import DatasetVersion, read_table
from tasks.evidence import Evidence, Suspects
from tasks.slices import parts, thirds
from tasks.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa


def with_cohorts(evidence: Evidence, store: Store, dataset: DatasetVersion) -> Evidence:
    """The evidence about the test split of the dataset version, with its slices and its doubted labels."""
    rows = read_table(store, dataset, "test")
    if rows.num_rows != len(evidence.truth):
        raise ValueError(
            f"{dataset.name} v{dataset.version} has {rows.num_rows} test photographs and the evidence is about "
            f"{len(evidence.truth)}: promote the version again"
        )
    edges = thirds(read_table(store, dataset, "val"))
    return replace(
        evidence,
        parts={f"{column} {value}": mask for column, value, mask in parts(rows, edges)},
        suspects=examined(store, dataset, rows) or self_doubted(evidence),
    )


def examined(store: Store, dataset: DatasetVersion, rows: "pa.Table") -> Suspects | None:
    """What the labels flow doubts among the rows and no person has confirmed; None where it has not looked at this split."""
    from tasks.label_review import open_suspects, read_findings, read_ranking

    try:
        findings = read_findings(store, dataset.name, dataset.version)
    except LookupError:
        return None
    if "test" not in findings.method.get("splits", ()):
        return None
    ranked = read_ranking(store, findings, ["sha256", "given", "suspect"])
    places = {sha256: place for place, sha256 in enumerate(rows["sha256"].to_pylist())}
    doubted = [places[each] for each in open_suspects(ranked)["sha256"].to_pylist() if each in places]
    return Suspects(np.array(doubted, dtype=np.int64), "by the labels flow")


def self_doubted(evidence: Evidence) -> Suspects | None:
    """What confident learning on the served probabilities doubts and the champion, if there is one; None without any."""
    if evidence.probabilities is None:
        return None
    answered = np.flatnonzero(evidence.served >= 0)
    doubted = answered[_doubted(evidence.probabilities[answered], evidence.truth[answered])]
    if evidence.champion is None:
        return Suspects(doubted, "by the candidate itself")
    agreed = evidence.champion[doubted] != evidence.truth[doubted]
    return Suspects(doubted[agreed], "by candidate and champion")


def _doubted(probabilities: NDArray[np.float32], truth: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the suspects, the most doubtful first. Classes that no photograph has are left out."""
    from tasks.labels import opinion

    present, labels = np.unique(truth, return_inverse=True)
    if len(present) < 2:
        return np.empty(0, dtype=np.int64)
    chosen = probabilities[:, present].astype(np.float64) + 1e-12
    found = opinion(labels, chosen / chosen.sum(axis=1, keepdims=True), [str(each) for each in present])
    return found.order[found.suspect[found.order]]
