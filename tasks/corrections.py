"""Which stored photographs get another label by a batch that corrects, decided before anything else is. Pure."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.batch import Batch, Finding

if TYPE_CHECKING:
    from tasks.checks import Known
    from tasks.examination import Photograph


@dataclass(frozen=True)
class Relabelled:
    """A stored photograph, the label it has in the dataset, and the one that it gets. Everything else of its row stays."""

    sha256: str
    was: str
    label: str


@dataclass(frozen=True)
class Corrected:
    """rows: in order of sha256. findings: what could not be corrected. rest: photographs that are no correction."""

    rows: tuple[Relabelled, ...]
    findings: tuple[Finding, ...]
    rest: tuple["Photograph", ...]


def corrected(
    batch: Batch, photographs: "Sequence[Photograph]", known: "Known", new_classes: bool = False
) -> Corrected:
    """What the batch corrects. Photographs that the dataset lacks, or holds under this label already, are no corrections.

    A photograph that the batch corrects to two labels keeps the one it has, and every place that named it is a finding.
    """
    if not batch.corrects:
        return Corrected((), (), tuple(photographs))
    findings: list[Finding] = []
    claims: dict[str, list[tuple[str, str]]] = defaultdict(list)  # sha256 -> where it is named, and as what
    rest = [each for each in photographs if each.sha256 not in known.labels]
    for photograph in photographs:
        if photograph.sha256 in known.labels:
            claims[photograph.sha256].append((photograph.item.name, photograph.item.label))
    for each in batch.corrections:
        if each.sha256 in known.labels:
            claims[each.sha256].append((each.name, each.label))
        else:
            missing = f"no photograph of {batch.dataset} has the sha256 {each.sha256}: upload it, or name another"
            findings.append(Finding("unknown_photograph", each.name, missing, each.sha256))
    rows = []
    for sha256, named in sorted(claims.items()):
        found = _one_claim(sha256, named, known, new_classes)
        if isinstance(found, Relabelled):
            rows.append(found)
        else:
            findings.extend(found)
    return Corrected(tuple(rows), tuple(findings), tuple(rest))


def _one_claim(
    sha256: str, named: Sequence[tuple[str, str]], known: "Known", new_classes: bool
) -> Relabelled | list[Finding]:
    was, labels = known.labels[sha256], {label for _, label in named}
    if len(labels) > 1:
        places = ", ".join(f"{name} ({label})" for name, label in named)
        message = f"the same photograph corrected to several labels: {places}"
        return [Finding("contradictory_labels", name, message, sha256) for name, _ in named]
    (label,) = labels
    if label == was:
        message = "the dataset holds these bytes already, under this label"
        return [Finding("already_known", name, message, sha256) for name, _ in named]
    if label not in known.classes and not new_classes:
        message = f"class {label!r} is not one of {', '.join(known.classes)}: correct it, or allow new_classes"
        return [Finding("unknown_class", name, message, sha256) for name, _ in named]
    return Relabelled(sha256, was, label)
