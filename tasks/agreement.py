"""How far several people agree about the same photographs, whom to trust, and which label their votes add up to. Pure.

Cohen's kappa for two people (Cohen 1960), Fleiss' for all (Fleiss 1971; with unequal numbers of votes as Gwet 2014 has it),
CROWDLAB for labels and people (Goh, Tkachenko, Mueller 2022), by cleanlab. A kappa of 1 is full agreement, 0 that of chance.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

COLUMNS: Final = ("sha256", "annotator", "label")
_NONE: Final = -1  # this person did not label that photograph


@dataclass(frozen=True)
class Votes:
    """Who calls what how. table int [N, M]: index into `classes` of what annotator M calls photograph N; -1: nothing."""

    sha256: tuple[str, ...]
    annotators: tuple[str, ...]
    classes: tuple[str, ...]
    table: NDArray[np.int64]


@dataclass(frozen=True)
class PairAgreement:
    """Two people. photographs: those that both labelled; same: share of these with one label; kappa: NaN where chance alone
    explains full agreement (both used one label only).
    """

    first: str
    second: str
    photographs: int
    same: float
    kappa: float


@dataclass(frozen=True)
class Annotator:
    """One person against the consensus. quality: CROWDLAB's estimate that a label of theirs is right; NaN without it."""

    name: str
    photographs: int
    agreement: float
    quality: float


@dataclass(frozen=True)
class Consensus:
    """labels int [N]: the label that the votes add up to, as an index into the classes. quality float [N]: how sure.

    annotators: the least trusted first.
    """

    labels: NDArray[np.int64]
    quality: NDArray[np.float64]
    annotators: tuple[Annotator, ...]


def read_votes(path: Path, classes: Sequence[str] = ()) -> Votes:
    """A CSV file with the columns sha256, annotator and label, one vote a line. classes: those allowed; empty: those found.

    Raises ValueError with the line of what cannot be used.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a CSV file with the columns {', '.join(COLUMNS)}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := set(COLUMNS) - set(rows.fieldnames or ()):
            raise ValueError(
                f"{path} lacks the column {', '.join(sorted(missing))}: the columns are {', '.join(COLUMNS)}"
            )
        try:
            told = [
                (f"{path.name}, line {rows.line_num}", row["sha256"], row["annotator"], row["label"]) for row in rows
            ]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV file in UTF-8 (line {rows.line_num}): {error}") from None
    return collected(told, classes)


def collected(votes: Iterable[tuple[str, str | None, str | None, str | None]], classes: Sequence[str] = ()) -> Votes:
    """Votes of (where it stands, sha256, annotator, label). A repeated equal vote counts once.

    Raises ValueError naming the place of a blank, an unknown class or a second, other label of the same person, and where
    nobody shares a photograph with anybody.
    """
    given: dict[tuple[str, str], tuple[str, str]] = {}  # (photograph, person) -> (label, place)
    for place, *values in votes:
        told = [(value or "").strip() for value in values]
        if not all(told):
            blank = ", ".join(name for name, value in zip(COLUMNS, told, strict=True) if not value)
            raise ValueError(f"{place}: {blank} is blank")
        sha256, annotator, label = told
        if classes and label not in classes:
            raise ValueError(f"{place}: label {label!r} is not one of {', '.join(classes)}")
        before = given.setdefault((sha256, annotator), (label, place))
        if before[0] != label:
            raise ValueError(
                f"{place}: {annotator!r} calls photograph {sha256[:12]} {label!r}, and {before[0]!r} in {before[1]}: keep one"
            )
    return _tabled(given, classes)


def _tabled(given: Mapping[tuple[str, str], tuple[str, str]], classes: Sequence[str]) -> Votes:
    photographs = sorted({photograph for photograph, _ in given})
    people = sorted({person for _, person in given})
    names = tuple(classes) or tuple(sorted({label for label, _ in given.values()}))
    table = np.full((len(photographs), len(people)), _NONE, dtype=np.int64)
    row, column, number = ({each: at for at, each in enumerate(every)} for every in (photographs, people, names))
    for (photograph, person), (label, _) in given.items():
        table[row[photograph], column[person]] = number[label]
    if len(people) < 2 or not (np.count_nonzero(table >= 0, axis=1) > 1).any():
        raise ValueError(
            f"no photograph has labels of two people (photographs: {len(photographs)}; annotators: "
            f"{', '.join(people) or 'none'}): agreement needs photographs that several people labelled"
        )
    return Votes(tuple(photographs), tuple(people), names, table)


def pair_agreements(votes: Votes) -> tuple[PairAgreement, ...]:
    """Every pair of people who share a photograph, the least agreement first."""
    from sklearn.metrics import cohen_kappa_score

    found = []
    for first, second in combinations(range(len(votes.annotators)), 2):
        both = votes.table[(votes.table[:, [first, second]] >= 0).all(axis=1)][:, [first, second]]
        if len(both) == 0:
            continue
        one_label = len(np.unique(both)) == 1
        kappa = float("nan") if one_label else float(cohen_kappa_score(both[:, 0], both[:, 1]))
        same = float((both[:, 0] == both[:, 1]).mean())
        found.append(PairAgreement(votes.annotators[first], votes.annotators[second], len(both), same, kappa))
    return tuple(sorted(found, key=lambda each: (each.same, each.first, each.second)))


def fleiss_kappa(votes: Votes) -> float:
    """Agreement of all beyond chance; NaN where only one label occurs. Of unequal numbers of votes as Gwet has it (Handbook of
    Inter-Rater Reliability, 4th edition, 2014; `fleiss.kappa.raw` of his R package irrCAC): the agreement is that of the
    photographs with two votes or more, the share of a label is the mean over all photographs, each of which counts once.
    """
    counts = np.stack([(votes.table == number).sum(axis=1) for number in range(len(votes.classes))], axis=1)
    counts = counts[counts.sum(axis=1) > 0]
    shares = (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0)
    several = counts[counts.sum(axis=1) > 1]
    raters = several.sum(axis=1)
    observed = float(((several * (several - 1)).sum(axis=1) / (raters * (raters - 1))).mean())
    by_chance = float((shares**2).sum())
    return float("nan") if by_chance > 1 - 1e-12 else (observed - by_chance) / (1 - by_chance)


def consensus(votes: Votes, probabilities: NDArray[np.float64] | None = None) -> Consensus:
    """The label of each photograph. With out-of-sample `probabilities` [N, C] by CROWDLAB, which weighs people and model by
    how often they are right; without, the majority, and between equal numbers of votes the class that is voted for more often.
    """
    return _majority(votes) if probabilities is None else _crowdlab(votes, probabilities)


def _majority(votes: Votes) -> Consensus:
    counts = np.stack([(votes.table == number).sum(axis=1) for number in range(len(votes.classes))], axis=1)
    labels = (counts + counts.sum(axis=0) / (counts.sum() + 1)).argmax(axis=1)
    quality = counts[np.arange(len(labels)), labels] / counts.sum(axis=1)
    return Consensus(labels, quality, _people(votes, labels, {}))


def _crowdlab(votes: Votes, probabilities: NDArray[np.float64]) -> Consensus:
    import pandas as pd
    from cleanlab.multiannotator import get_label_quality_multiannotator  # type: ignore[import-untyped]

    table = pd.DataFrame(votes.table, columns=list(votes.annotators), dtype=float).mask(votes.table == _NONE)
    found = get_label_quality_multiannotator(table, probabilities, verbose=False)
    judged = found["label_quality"]
    labels = judged["consensus_label"].to_numpy(dtype=np.int64)
    quality = found["annotator_stats"]["annotator_quality"].to_dict()
    return Consensus(labels, judged["consensus_quality_score"].to_numpy(dtype=float), _people(votes, labels, quality))


def _people(votes: Votes, labels: NDArray[np.int64], quality: Mapping[str, float]) -> tuple[Annotator, ...]:
    found = []
    for column, name in enumerate(votes.annotators):
        voted = votes.table[:, column] >= 0
        agreement = float((votes.table[voted, column] == labels[voted]).mean())
        found.append(Annotator(name, int(voted.sum()), agreement, float(quality.get(name, float("nan")))))
    by_trust = defaultdict(float, quality)
    return tuple(sorted(found, key=lambda each: (by_trust[each.name], each.agreement, each.name)))
