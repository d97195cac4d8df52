"""Confident learning on arrays, what a person decides, and how far people agree."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tasks.agreement import Votes, collected, consensus, fleiss_kappa, pair_agreements, read_votes
from tasks.label_evidence import LabelledRows, groups_to_train, training_folds
from tasks.label_report import page
from tasks.label_report import table as suspects_table
from tasks.label_review import Findings, review_document, reviewed
from tasks.labels import by_features, folds_of, groups_needed, opinion, require_judgeable
from tasks.recipe import TrainConfig

Labels = NDArray[np.int64]
CLASSES = ("cut", "good", "worn")
ONE, TWO, THREE = ("a" * 64, "b" * 64, "c" * 64)


def clouds(count: int, twins: int = 1, spread: float = 1.0) -> tuple[NDArray[np.float32], Labels, Labels]:
    """Features of three classes, their labels, and groups of `twins` almost equal rows."""
    random = np.random.default_rng(5)
    labels = np.arange(count) // twins % 3
    centres = random.normal(size=(3, 12)) * 2
    one = np.repeat(random.normal(size=(-(-count // twins), 12)), twins, axis=0)[:count]
    features = centres[labels] + spread * one + 0.01 * random.normal(size=(count, 12))
    return features.astype(np.float32), labels, np.arange(count) // twins


def test_flipped_labels_come_first_with_the_true_class_as_suggestion() -> None:
    features, labels, groups = clouds(600)
    wrong = np.random.default_rng(1).choice(600, 30, replace=False)
    noisy = labels.copy()
    noisy[wrong] = (noisy[wrong] + 1) % 3
    probabilities, _ = by_features(features, noisy, groups, 3, folds=5, rounds=2, seed=0)
    found = opinion(noisy, probabilities, CLASSES)
    assert len(set(found.order[:30].tolist()) & set(wrong.tolist())) >= 28
    assert found.suspect[wrong].mean() > 0.9 and found.suspect.sum() < 45
    assert (found.suggested[wrong] == labels[wrong]).mean() > 0.9
    assert 0.03 < found.error_rate < 0.07
    pairs = {(pair.given, pair.likely): pair.photographs for pair in found.noise}
    turned = [("good", "cut"), ("worn", "good"), ("cut", "worn")]
    assert sum(pairs[pair] for pair in turned) > 4 * (sum(pairs.values()) - sum(pairs[pair] for pair in turned))


def test_clean_labels_of_classes_far_apart_are_not_doubted() -> None:
    features, labels, groups = clouds(300, spread=0.1)
    found = opinion(labels, by_features(features, labels, groups, 3, 5, 1, 0)[0], CLASSES)
    assert (found.suspect.sum(), found.agreement) == (0, 1.0)
    assert found.error_rate < 0.01


def test_a_twin_with_the_same_wrong_label_does_not_vouch_for_it() -> None:
    """Twelve photographs of each group, all wrong alike: only a judge that sees none of the group can say so."""
    features, labels, groups = clouds(720, twins=12)
    noisy = labels.copy()
    noisy[groups == 7] = (noisy[groups == 7] + 1) % 3
    apart = by_features(features, noisy, groups, 3, 5, 1, 0)[0][groups == 7, (labels[groups == 7][0] + 1) % 3]
    alone = np.arange(720)
    together = by_features(features, noisy, alone, 3, 5, 1, 0)[0][groups == 7, (labels[groups == 7][0] + 1) % 3]
    assert apart.mean() < 0.2
    assert together.mean() > 2 * apart.mean()


def test_no_group_stands_on_both_sides_and_every_class_is_learnt_in_every_fold() -> None:
    labels = np.array([0] * 40 + [1] * 40 + [2] * 4)
    groups = np.concatenate([np.arange(40) // 2, 20 + np.arange(40) // 4, [90, 90, 91, 91]])
    seen = np.zeros(84, int)
    for seed in range(5):
        for rest, held in folds_of(labels, groups, 5, seed):
            assert not set(groups[rest]) & set(groups[held])
            assert set(labels[rest]) == {0, 1, 2}
            seen[held] += 1
    assert (seen == 5).all()


def test_the_same_seed_gives_the_same_probabilities() -> None:
    features, labels, groups = clouds(120, spread=2)
    first, again, other = (by_features(features, labels, groups, 3, 4, 2, seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 0], ("good",), r"the only class is \['good'\]"),
        ([0, 0, 1, 1], ("good", "worn"), r"class 'worn' has photographs of 1 group"),
        ([0, 0, 0, 0], ("good", "worn"), r"class 'worn' has photographs of 0 group"),
    ],
)
def test_what_no_cross_validation_can_judge_is_refused(
    labels: list[int], classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_judgeable(np.array(labels), np.array([0, 1, 2, 2])[: len(labels)], classes)


@pytest.mark.parametrize(
    ("groups", "needed", "more_splits", "remedies"),
    [
        (1, 2, True, "needs 2 at least, so add photographs of it, or review more splits"),
        (1, 3, False, "needs 3 at least, so add photographs of it"),
        (2, 3, False, "needs 3 at least, so add photographs of it, or set judge to pretrained, which needs 2"),
    ],
)
def test_a_class_of_too_few_groups_is_named_with_what_helps(
    groups: int, needed: int, more_splits: bool, remedies: str
) -> None:
    labels, group = np.array([0] * 9 + [1] * 4), np.array([*range(9), *(100 + n % groups for n in range(4))])
    with pytest.raises(ValueError) as error:
        require_judgeable(labels, group, ("good", "worn"), needed, more_splits)
    assert str(error.value).startswith(f"class 'worn' has photographs of {groups} group(s)")
    assert str(error.value).endswith(remedies)


def rare(groups: int) -> LabelledRows:
    """40 photographs of one class, and two of each group of another."""
    labels = np.array([0] * 40 + [1] * 2 * groups)
    of = np.concatenate([np.arange(40) // 2, 50 + np.arange(2 * groups) // 2])
    told = ("",) * len(labels)
    return LabelledRows(told, labels, of, told, told, ("good", "worn"))


@pytest.mark.parametrize("folds", [2, 3, 5, 8])
def test_as_many_groups_as_are_asked_for_are_enough_to_train_every_fold(folds: int) -> None:
    needed = groups_to_train(folds)
    assert needed == (4 if folds == 2 else 3) and groups_needed(folds) == 2
    rows, config = rare(needed), TrainConfig(batch_size=8, defect_labels=("worn",))
    for seed in range(8):
        found = training_folds(rows, config.model_copy(update={"seed": seed}), folds, seed)
        assert sorted(row for fold in found for row in fold.held.tolist()) == list(range(len(rows)))
        for fold in found:
            assert set(rows.labels[fold.learnt]) == {0, 1} and len(fold.watched)
            parts = [set(rows.groups[part]) for part in (fold.learnt, fold.watched, fold.held)]
            assert sum(map(len, parts)) == len(set.union(*parts)), "no group is in two parts"
    with pytest.raises(ValueError, match=rf"the rarest class has {needed - 1}: add photographs of it"):
        training_folds(rare(needed - 1), config, folds, 0)


def test_what_one_of_the_trainings_would_be_refused_for_is_said_before_the_first() -> None:
    with pytest.raises(ValueError, match="fewer than one batch of 64"):
        training_folds(rare(4), TrainConfig(batch_size=64), 5, 0)


def test_probabilities_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 2\).*4 labels of 3 classes"):
        opinion(np.array([0, 1, 2, 0]), np.full((4, 2), 0.5), CLASSES)


def edited(*entries: dict[str, str], comma: str = "") -> bytes:
    document = review_document("tire", 3, entries)
    return document.replace(b"\n]}}", comma.encode() + b"\n]}}")


def entry(sha256: str, label: str, given: str = "good") -> dict[str, str]:
    return {"sha256": sha256, "label_value": label, "given_label": given}


KNOWN = {ONE: "good", TWO: "good", THREE: "worn"}


def test_a_review_says_what_is_corrected_and_what_is_confirmed() -> None:
    found = reviewed(edited(entry(ONE, "worn"), entry(TWO, "good"), comma=","), KNOWN, CLASSES)
    assert [(each["sha256"], each["label_value"]) for each in found.entries] == [(ONE, "worn")]
    assert found.confirmed == {TWO: "good"}


def test_a_review_that_is_submitted_after_its_ingest_says_the_same_again() -> None:
    document = edited(entry(ONE, "worn"), entry(TWO, "good"))
    assert reviewed(document, {**KNOWN, ONE: "worn"}, CLASSES) == reviewed(document, KNOWN, CLASSES)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"{", "annotations.json cannot be read"),
        (b'{"annotation": {"data": 3}}', "not a list of objects"),
        (edited(entry("f" * 64, "worn")), r"entry 1 .*sha256 is 'ffff.*does not hold"),
        (edited({"label_value": "worn"}), r"entry 1 .*sha256 is None"),
        (
            edited(entry(ONE, "wron")),
            r"entry 1 \S+ \S+ \(sha256 aaaaaaaaaaaa\): label_value is 'wron'; write one of cut, good, worn",
        ),
        (edited(entry(ONE, "worn"), entry(ONE, "cut")), r"entry 2 .*called 'worn' above and 'cut' here"),
        (edited(entry(THREE, "cut")), r"labelled 'good' when this was made, 'worn' by now"),
    ],
)
def test_a_review_that_was_edited_wrongly_names_the_entry(document: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reviewed(document, KNOWN, CLASSES)


def votes(table: list[list[int]], classes: int) -> Votes:
    made = np.array(table)
    names = tuple(str(number) for number in range(classes))
    people = tuple(f"p{column:02d}" for column in range(made.shape[1]))
    return Votes(tuple(f"{row:064x}" for row in range(len(made))), people, names, made)


# Ten subjects, fourteen raters, five categories: the worked example of the article "Fleiss' kappa" (0.210).
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_fleiss_kappa_is_that_of_the_worked_example() -> None:
    table = [[number for number, count in enumerate(row) for _ in range(count)] for row in FLEISS]
    assert fleiss_kappa(votes(table, 5)) == pytest.approx(0.210, abs=0.0005)


def test_fleiss_kappa_of_equally_many_votes_is_that_of_statsmodels() -> None:
    from statsmodels.stats.inter_rater import aggregate_raters
    from statsmodels.stats.inter_rater import fleiss_kappa as by_statsmodels

    table = np.random.default_rng(2).integers(0, 3, (40, 4)) * np.random.default_rng(3).integers(0, 2, (40, 1))
    assert fleiss_kappa(votes(table.tolist(), 3)) == pytest.approx(by_statsmodels(aggregate_raters(table)[0]))


def test_fleiss_kappa_of_two_raters_is_scotts_pi() -> None:
    table = [[0, 0]] * 45 + [[0, 1]] * 15 + [[1, 0]] * 25 + [[1, 1]] * 15
    assert fleiss_kappa(votes(table, 2)) == pytest.approx((0.60 - 0.545) / (1 - 0.545))


# Twelve subjects, four raters of whom none rated all: Gwet, Handbook of Inter-Rater Reliability (4th edition), page 120.
# irrCAC says of them: agreement 0.81818, by chance 0.23872, kappa 0.76117.
GWET = [
    [1, 1, 0, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4],
    [4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [0, 5, 5, 5], [0, 0, 1, 1], [0, 0, 3, 0],
]  # fmt: skip


def test_fleiss_kappa_of_unequally_many_votes_is_that_of_gwets_example() -> None:
    """A photograph with one vote says nothing about agreement, but it does about how often a label is given."""
    table = (np.array(GWET) - 1).tolist()
    assert fleiss_kappa(votes(table, 5)) == pytest.approx(0.76117, abs=0.000005)
    assert fleiss_kappa(votes([*table, [-1, -1, -1, -1]], 5)) == fleiss_kappa(votes(table, 5))
    assert fleiss_kappa(votes([*table, [-1, 0, -1, -1]], 5)) != fleiss_kappa(votes(table, 5))


def test_cohens_kappa_is_that_of_the_worked_example() -> None:
    """Fifty proposals, two readers (article "Cohen's kappa"): kappa 0.4."""
    table = [[1, 1]] * 20 + [[1, 0]] * 5 + [[0, 1]] * 10 + [[0, 0]] * 15
    [pair] = pair_agreements(votes(table, 2))
    assert (pair.photographs, pair.same) == (50, 0.7)
    assert pair.kappa == pytest.approx(0.4)


def test_agreement_on_one_label_alone_has_no_kappa() -> None:
    same = votes([[1, 1], [1, 1]], 2)
    assert np.isnan(pair_agreements(same)[0].kappa) and np.isnan(fleiss_kappa(same))


def test_the_careless_annotator_is_found_and_outvoted() -> None:
    random = np.random.default_rng(3)
    truth = random.integers(0, 3, 300)
    table = np.stack([truth] * 4, axis=1)
    for column, share in enumerate((0.05, 0.08, 0.1, 0.5)):
        wrong = random.random(300) < share
        table[wrong, column] = (truth[wrong] + random.integers(1, 3, wrong.sum())) % 3
    absent = random.random(table.shape) < 0.3
    absent[absent.all(axis=1), 0] = False  # everything has one vote at least
    table[absent] = -1
    model = np.full((300, 3), 0.1)
    model[np.arange(300), truth] = 0.8
    asked = votes(table.tolist(), 3)
    by_model, by_count = consensus(asked, model), consensus(asked)
    assert by_model.annotators[0].name == "p03"
    assert by_model.annotators[0].quality < 0.7 < by_model.annotators[1].quality
    assert (by_model.labels == truth).mean() > 0.97 > (by_count.labels == truth).mean() > 0.85
    assert by_count.annotators[0].name == "p03"


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    def written(*rows: tuple[str, ...], header: tuple[str, ...] = ("sha256", "annotator", "label")) -> Path:
        path = tmp_path / "votes.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return written


def test_votes_are_read_and_an_equal_one_twice_counts_once(table: Callable[..., Path]) -> None:
    path = table((ONE, "ada", "good"), (ONE, "bob", "worn"), (TWO, "ada", "worn"), (ONE, "ada", "good"))
    found = read_votes(path)
    assert (found.annotators, found.classes) == (("ada", "bob"), ("good", "worn"))
    assert found.table.tolist() == [[0, 1], [1, -1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(ONE, "ada", "good"), (ONE, "", "good")], r"votes.csv, line 3: annotator is blank"),
        ([(ONE, "ada", "good"), (ONE, "bob")], r"votes.csv, line 3: label is blank"),
        ([(ONE, "ada", "good"), (ONE, "bob", "odd")], r"line 3: label 'odd' is not one of cut, good, worn"),
        (
            [(ONE, "ada", "good"), (ONE, "ada", "worn")],
            r"line 3: 'ada' calls photograph aaaaaaaaaaaa 'worn', and 'good' in",
        ),
        ([(ONE, "ada", "good"), (TWO, "bob", "worn")], r"no photograph has labels of two people"),
        ([], r"no photograph has labels of two people"),
    ],
)
def test_votes_that_cannot_be_used_are_named(
    table: Callable[..., Path], rows: list[tuple[str, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_votes(table(*rows), CLASSES)


def test_a_table_with_other_columns_says_which_are_missing(table: Callable[..., Path]) -> None:
    with pytest.raises(
        ValueError, match=r"lacks the column annotator, sha256: the columns are sha256, annotator, label"
    ):
        read_votes(table(header=("file", "who", "label")))


def test_votes_may_come_from_anywhere_with_their_place() -> None:
    told = [("row 1", ONE, "ada", "good"), ("row 2", ONE, "bob", None)]
    with pytest.raises(ValueError, match="row 2: label is blank"):
        collected(told)


def test_a_review_document_is_one_entry_a_line_and_an_annotation_that_corrects() -> None:
    document = edited(entry(ONE, "worn"), entry(TWO, "cut"))
    told = json.loads(document)["annotation"]
    assert (told["corrects"], told["dataset_version"], len(told["data"])) == (True, 3, 2)
    assert sum(line.startswith(b'{"sha256"') for line in document.splitlines()) == 2


def test_the_table_of_the_noisiest_photographs_stays_below_300_kb() -> None:
    """Sixty thumbnails is the most there can be; noise is what JPEG can do least about."""
    noise, files = np.random.default_rng(0), []
    for _ in range(60):
        out = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(out, "PNG")
        files.append(out.getvalue())
    row = {"rank": 1, "given": "good", "suggested": "worn", "suggested_confidence": 0.9, "split": "train"}
    rows = suspects_table([{**row, "source_key": "incoming/tire/b/good/1.jpg", "sha256": ONE}] * 100, files)
    assert [bool(each["photograph"]) for each in rows] == [True] * 60 + [False] * 40
    assert len(json.dumps(rows)) < 300_000


@pytest.mark.parametrize(("agreement", "weak"), [(0.54, True), (0.8, False)])
def test_the_page_says_when_the_judge_itself_is_weak(agreement: float, weak: bool) -> None:
    method = {"judge": "pretrained", "splits": ["train"], "folds": 5, "seed": 0}
    findings = Findings("tire", 3, "sha256:0", "0", method, CLASSES, 100, 30, 0.3, agreement, ())
    assert ("The judge is weak here" in page(findings, [], None, "s3://b/review/tire/v3/", 30)) is weak
