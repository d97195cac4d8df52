"""What is wrong with the photographs of a batch, and in which split the good ones go.

`plan` is the decision: pure, repeatable, told what `tasks/examination.py` found and what the dataset already holds.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from tasks.batch import SPLITS, Batch, BatchRefused, Finding, extension
from tasks.batch_statistics import outliers, shifts
from tasks.corrections import Relabelled, corrected
from tasks.examination import Examination, Photograph, columns_of
from tasks.split import SplitRule, assigned, carved_from, carved_splits
from tasks.summary import Spread
from tasks.twins import NO_TWINS, Twins

Severity = Literal["quarantined", "dropped", "noted"]

# Severity: quarantined = not ingested, a record names it; dropped = redundant, counted only; noted = ingested all the same.
RULES: Final[dict[str, tuple[Severity, str]]] = {
    "empty": ("quarantined", "a file of 0 bytes"),
    "too_many_bytes": ("quarantined", "a file larger than the preprocessing accepts"),
    "not_an_image": ("quarantined", "no image, whatever the name says"),
    "unsupported_format": ("quarantined", "an image format the preprocessing does not accept"),
    "too_small": ("quarantined", "fewer pixels than show anything"),
    "too_large": ("quarantined", "more pixels than the preprocessing accepts"),
    "truncated": ("quarantined", "an image that ends too early or is damaged"),
    "no_label": ("quarantined", "a file in no class folder"),
    "bad_annotation": ("quarantined", "an annotation that cannot be understood"),
    "contradictory_annotations": ("quarantined", "one file annotated with different contents"),
    "annotation_without_file": ("quarantined", "an annotation whose file is not there"),
    "file_without_annotation": ("quarantined", "a file that no annotation names"),
    "contradictory_labels": ("quarantined", "the same bytes under two labels in the batch"),
    "contradicts_dataset": ("quarantined", "bytes the dataset already holds under another label"),
    "unknown_photograph": ("quarantined", "a correction of a photograph the dataset does not hold"),
    "unknown_class": ("quarantined", "a class the dataset does not have"),
    "bridges_splits": ("quarantined", "a group whose photographs would stand in two splits"),
    "twin_bridges_splits": ("quarantined", "one picture that would stand in two splits, by twins of it in the dataset"),
    "duplicate": ("dropped", "the same bytes again in the same split"),
    "twin_across_splits": ("dropped", "the same picture is in a split that is held out from training more strictly"),
    "already_known": ("dropped", "bytes the dataset already holds under the same label"),
    "wrong_extension": ("noted", "the extension names another format than the content has"),
    "ignored_file": ("noted", "no photograph by its extension"),
    "small_class": ("noted", "a class with very few photographs"),
    "imbalance": ("noted", "a class with many times the photographs of another"),
    "near_duplicate": ("noted", "nearly the same picture as another: both go to the same split"),
    "twins_disagree": ("noted", "nearly the same picture as another, under another label"),
    "large_group": ("noted", "more near-duplicates than one group may have: not merged"),
    "shifted": ("noted", "an image statistic of the batch lies elsewhere than that of the dataset"),
    "outlier": ("noted", "a photograph unlike all others in an image statistic"),
}
SMALL_CLASS: Final = 5
IMBALANCE: Final = 20  # photographs of the largest class for each of the smallest
_EXTENSIONS: Final = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "PNG": {".png"},
    "WEBP": {".webp"},
    "BMP": {".bmp", ".dib"},
    "TIFF": {".tif", ".tiff"},
}


@dataclass(frozen=True)
class Known:
    """What the dataset holds already, as far as the batch meets it.

    labels: sha256 -> label. groups: group -> split. rows: (label, split) -> number of rows. carved: splits that are taken
    out of given train rows because no batch gave them. spreads: how the image statistics of its rows are distributed.
    """

    classes: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    carved: tuple[str, ...] = ()
    spreads: Mapping[str, Spread] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What becomes of the batch: new rows in order of sha256 with their splits, stored rows that get another label, and
    every finding.
    """

    rows: tuple[tuple[Photograph, str], ...]
    findings: tuple[Finding, ...]
    carved: tuple[str, ...]
    new_classes: bool = False
    relabelled: tuple[Relabelled, ...] = ()

    @property
    def quarantined(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if RULES[each.reason][0] == "quarantined")


def plan(
    batch: Batch,
    examination: Examination,
    known: Known,
    split: SplitRule,
    new_classes: bool = False,
    twins: Twins = NO_TWINS,
) -> Plan:
    """Decides for every file of the batch. The same batch on the same dataset gives the same plan."""
    findings = [*batch.findings, *examination.findings]
    findings += [found for each in examination.photographs if (found := _wrong_extension(each))]
    corrections = corrected(batch, examination.photographs, known, new_classes)
    kept, contradictory = _contradictions(corrections.rest, known)
    kept, unknown = _unknown_classes(kept, known, new_classes)
    kept, redundant = _duplicates(kept, known)
    kept, crossing = _crossing_twins(twins.grouped(kept), twins)
    known = replace(known, groups={**known.groups, **twins.homes})
    kept, bridging = _bridges(kept, known)
    findings += [*corrections.findings, *contradictory, *unknown, *redundant, *crossing, *bridging]
    findings += twins.findings
    carved = carved_splits(kept, known)
    rows = sorted(assigned(kept, known, split, carved, batch.dataset), key=lambda row: row[0].sha256)
    findings += [*_small_classes(rows, known), *_statistics(rows, known)]
    return Plan(tuple(rows), tuple(findings), carved, new_classes, corrections.rows)


def refuse_if_too_bad(batch: Batch, found: Plan, max_share: float) -> None:
    """Raises BatchRefused when more than `max_share` of the batch's files are quarantined: then the upload is at fault."""
    bad = found.quarantined
    seen = {each.name for each in batch.items} | {each.name for each in batch.corrections} | {each.name for each in bad}
    if len(bad) <= max_share * len(seen):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(each.reason for each in bad).most_common())
    first = "; ".join(f"{each.name}: {each.message}" for each in bad[:3])
    raise BatchRefused(
        f"{len(bad)} of {len(seen)} files of {batch.prefix} are bad ({reasons}), more than the allowed share of "
        f"{max_share:.0%}; nothing was changed. For example {first}. Repair the batch, or raise max_quarantined_share"
    )


_Checked = tuple[list[Photograph], list[Finding]]


def _contradictions(photographs: Sequence[Photograph], known: Known) -> _Checked:
    labels: dict[str, set[str]] = defaultdict(set)
    names: dict[str, list[str]] = defaultdict(list)
    for each in photographs:
        labels[each.sha256].add(each.item.label)
        names[each.sha256].append(f"{each.item.name} ({each.item.label})")
    kept, findings = [], []
    for each in photographs:
        stored = known.labels.get(each.sha256, each.item.label)
        if len(labels[each.sha256]) > 1:
            both = "the same bytes under several labels: " + ", ".join(names[each.sha256])
            findings.append(Finding("contradictory_labels", each.item.name, both, each.sha256))
        elif stored != each.item.label:
            other = f"labelled {each.item.label!r} here, {stored!r} in the dataset"
            findings.append(Finding("contradicts_dataset", each.item.name, other, each.sha256))
        else:
            kept.append(each)
    return kept, findings


def _unknown_classes(photographs: Sequence[Photograph], known: Known, new_classes: bool) -> _Checked:
    if new_classes or not known.classes:  # the first batch defines the classes
        return list(photographs), []
    kept, findings = [], []
    for each in photographs:
        if each.item.label in known.classes:
            kept.append(each)
        else:
            remedy = (
                f"class {each.item.label!r} is not one of {', '.join(known.classes)}: move it, or allow new_classes"
            )
            findings.append(Finding("unknown_class", each.item.name, remedy, each.sha256))
    return kept, findings


def _held_out(split: str | None) -> int:
    """The more strictly a split is held out from training, the higher; no given split comes last."""
    return -1 if split is None else SPLITS.index(split)


def _duplicates(photographs: Sequence[Photograph], known: Known) -> _Checked:
    """One of each: that in the most strictly held-out split, then the first by name."""
    best: dict[str, Photograph] = {}
    for each in sorted(photographs, key=lambda photo: (-_held_out(photo.item.split), photo.item.name)):
        best.setdefault(each.sha256, each)
    kept, findings = [], []
    for each in photographs:
        chosen = best[each.sha256]
        if each.sha256 in known.labels:
            findings.append(
                Finding("already_known", each.item.name, "the dataset holds these bytes already", each.sha256)
            )
        elif each is chosen:
            kept.append(each)
        else:
            crosses = chosen.item.split != each.item.split
            reason = "twin_across_splits" if crosses else "duplicate"
            findings.append(Finding(reason, each.item.name, f"the same bytes as {chosen.item.name}", each.sha256))
    return kept, findings


def _crossing_twins(photographs: Sequence[Photograph], twins: Twins) -> _Checked:
    """Photographs with twins in the dataset that stand in two splits: those rows stay, the newcomer cannot join both."""
    kept = [each for each in photographs if each.sha256 not in twins.across]
    findings = [
        Finding("twin_bridges_splits", each.item.name, twins.across[each.sha256], each.sha256)
        for each in photographs
        if each.sha256 in twins.across
    ]
    return kept, findings


def _bridges(photographs: Sequence[Photograph], known: Known) -> _Checked:
    """A group keeps its split in the dataset; a group given in two splits stays on the more strictly held-out side."""
    home: dict[str, str] = {}
    for each in photographs:
        if each.item.split and _held_out(each.item.split) > _held_out(home.get(each.group)):
            home[each.group] = each.item.split
    home |= known.groups
    kept, findings = [], []
    for each in photographs:
        at_home = home.get(each.group)
        if each.item.split and at_home and each.item.split != at_home and not carved_from(each, at_home, known):
            other = f"group {each.group!r} stands in {at_home}, this photograph is given in {each.item.split}"
            reason = "twin_across_splits" if each.twin_group else "bridges_splits"
            findings.append(Finding(reason, each.item.name, other, each.sha256))
        else:
            kept.append(each)
    return kept, findings


def _wrong_extension(photograph: Photograph) -> Finding | None:
    suffix = extension(photograph.item.name)
    if suffix in _EXTENSIONS[photograph.format]:
        return None
    message = f"extension {suffix or 'none'}, content {photograph.format}"
    return Finding("wrong_extension", photograph.item.name, message, photograph.sha256)


def _small_classes(rows: Iterable[tuple[Photograph, str]], known: Known) -> list[Finding]:
    counts = Counter(photograph.item.label for photograph, _ in rows)
    for (label, _), stored in known.rows.items():
        counts[label] += stored
    found = [
        Finding("small_class", label, f"class {label!r} has {count} photographs: too few to train and judge on")
        for label, count in sorted(counts.items())
        if count < SMALL_CLASS
    ]
    if len(counts) > 1:
        (most, largest), (least, smallest) = counts.most_common()[0], counts.most_common()[-1]
        if largest >= IMBALANCE * smallest:
            told = f"class {most!r} has {largest} photographs, {least!r} {smallest}: give the rare class its weight"
            found.append(Finding("imbalance", least, told))
    return found


def _statistics(rows: Sequence[tuple[Photograph, str]], known: Known) -> list[Finding]:
    """Where the batch as a whole, and single photographs of it, lie elsewhere than the dataset."""
    values = columns_of(photograph for photograph, _ in rows)
    found = [Finding("shifted", each.statistic, str(each)) for each in shifts(known.spreads, values)]
    for at, why in outliers(known.spreads or None, values).items():
        photograph, _ = rows[at]
        found.append(Finding("outlier", photograph.item.name, why, photograph.sha256))
    return found
