"""Slices and doubted labels of a test split, from a real dataset version on S3."""

from dataclasses import replace

import numpy as np
import pytest

from tasks.cohorts import examined, self_doubted, with_cohorts
from tasks.dataset import open_version, read_table
from tasks.decision import DecisionRule
from tasks.evidence import Evidence
from tasks.label_evidence import read_labels
from tasks.label_review import Findings, identity_of, keep, ranking
from tasks.labels import opinion
from tasks.parity import Rung

RULE = DecisionRule(("cut", "good"), ("cut",), 0.5)
NAME = "cohorts"


@pytest.fixture(scope="module")
def dataset(store, tmp_path_factory, photograph):
    from flows import ingest
    from tasks import dataset, storage

    files = {
        f"{split}/{label}/{number}.png": photograph(number + shift + far, kind="PNG")
        for split, far, count in (("train", 0, 8), ("val", 100, 12), ("test", 200, 30))
        for label, shift in (("cut", 0), ("good", 1000))
        for number in range(count)
    }
    prefix = f"incoming/{NAME}/first/"
    storage.write_many(store, ((prefix + path, data) for path, data in files.items()))
    found = ingest.find_batch.fn(store, NAME, prefix)
    with ingest.examine_photographs.fn(store, found, tmp_path_factory.mktemp("spool")) as examination:
        options = ingest.IngestOptions()
        ingest.commit.fn(store, found, examination, options, dataset.writer(store, found, examination))
    return open_version(store, NAME, 1)


@pytest.fixture
def found(store, dataset):
    """Everything decided right, with a confidence of 0.9; three photographs are said to be the other class."""
    truth = np.array([RULE.labels.index(label) for label in read_table(store, dataset, "test")["label"].to_pylist()])
    told = truth.copy()
    told[[3, 17, 40]] = 1 - told[[3, 17, 40]]
    probabilities = np.full((len(truth), 2), 0.1, dtype=np.float32)
    probabilities[np.arange(len(truth)), told] = 0.9
    probabilities[17] = np.where(np.arange(2) == told[17], 0.99, 0.01)
    rung = Rung("served", 1, 0.0, 0.0, 0)
    return Evidence(RULE, truth, told, told, (rung,), rung, 1.0, probabilities=probabilities)


def test_every_test_photograph_falls_into_one_slice_of_each_column(store, dataset, found):
    parts = with_cohorts(found, store, dataset).parts
    labels = read_table(store, dataset, "test")["label"].to_pylist()
    assert parts["label cut"].tolist() == [label == "cut" for label in labels]
    columns = {name.split(" ")[0] for name in parts}
    assert {"label", "brightness"} <= columns
    for column in columns:
        assert (sum(mask.astype(int) for name, mask in parts.items() if name.startswith(f"{column} ")) == 1).all()


def test_without_an_examination_the_served_probabilities_doubt_the_labels_they_contradict(store, dataset, found):
    suspects = with_cohorts(found, store, dataset).suspects
    assert suspects.by == "by the candidate itself"
    assert suspects.order[0] == 17 and set(suspects.order.tolist()) == {3, 17, 40}


def test_photographs_without_an_answer_are_not_doubted(found):
    served, probabilities = found.served.copy(), found.probabilities.copy()
    served[17], probabilities[17] = -1, np.nan
    silent = replace(found, served=served, probabilities=probabilities)
    assert set(self_doubted(silent).order.tolist()) == {3, 40}
    assert self_doubted(replace(found, probabilities=None)) is None


def test_a_champion_must_doubt_the_label_too(found):
    champion = found.truth.copy()
    champion[[17, 20]] = 1 - champion[[17, 20]]
    suspects = self_doubted(replace(found, champion=champion))
    assert (suspects.by, suspects.order.tolist()) == ("by candidate and champion", [17])


def test_what_the_labels_flow_doubts_comes_first_once_it_has_looked_at_the_split(store, dataset, found):
    def examine(splits):
        rows = read_labels(store, dataset, splits)
        probabilities = np.full((len(rows), 2), 0.05)
        given = rows.labels.copy()
        given[5] = 1 - given[5]
        probabilities[np.arange(len(rows)), given] = 0.95
        opened = opinion(rows.labels, probabilities, rows.classes)
        method = {"judge": "pretrained", "splits": list(splits)}
        identity = identity_of(dataset, method)
        facts = (len(rows), int(opened.suspect.sum()), opened.error_rate, opened.agreement, opened.noise)
        findings = Findings(NAME, 1, dataset.digest, identity, method, rows.classes, *facts)
        keep(store, findings, ranking(rows, probabilities, opened))
        return rows.sha256[5]

    table = read_table(store, dataset, "test")
    assert examined(store, dataset, table) is None
    examine(["train", "val"])
    assert examined(store, dataset, table) is None, "that run did not look at the test split"
    doubted = examine(["test"])
    suspects = with_cohorts(found, store, dataset).suspects
    assert suspects.by == "by the labels flow"
    assert [table["sha256"][place].as_py() for place in suspects.order] == [doubted]


def test_evidence_about_another_split_is_refused(store, dataset, found):
    with pytest.raises(ValueError, match="cohorts v1 has 60 test photographs and the evidence is about 59"):
        with_cohorts(replace(found, truth=found.truth[1:]), store, dataset)
