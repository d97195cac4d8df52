"""What a label is judged by: the rows of a dataset version, and out-of-sample probabilities of every one of them.

Two ways. Features of a network that has not seen these labels, and a linear model upon them: seconds for thousands of
photographs. Or the recipe's own training, once for every fold: minutes to hours, for photographs whose features say too little.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.dataset import DatasetVersion, open_rows, read_rows, readable_record
from tasks.images import CURRENT
from tasks.recipe import TrainConfig
from tasks.samples import Samples, read_samples
from tasks.storage import Store

if TYPE_CHECKING:
    from tasks.labels import Probabilities
    from tasks.model import ImageNetwork

_COLUMNS: Final = ("sha256", "label", "group", "split", "source_key")
_ROWS: Final = 256  # photographs in memory at a time
_VALIDATION: Final = 6  # a sixth of what a fold may learn from decides when its training stops


@dataclass(frozen=True)
class LabelledRows:
    """The rows of some splits in order of sha256, without their photographs.

    labels int64 [N]: index into classes. groups int64 [N]: equal for photographs of one group. The rest [N]: as in the dataset.
    """

    sha256: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    splits: tuple[str, ...]
    sources: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sha256)


def read_labels(store: Store, version: DatasetVersion, splits: Sequence[str]) -> LabelledRows:
    """The labels of the splits; classes that none of their photographs has are left out. ValueError for empty splits."""
    found: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for rows in read_rows(store, version, splits, _COLUMNS, 65536):
        for name in _COLUMNS:
            found[name] += rows.column(name).to_pylist()
    if not found["sha256"]:
        raise ValueError(
            f"{version.name} v{version.version} has no photograph in {', '.join(splits)}: name other splits"
        )
    classes, labels = np.unique(found["label"], return_inverse=True)
    _, groups = np.unique(found["group"], return_inverse=True)
    told = (tuple(found[name]) for name in ("sha256", "split", "source_key"))
    sha256, split, source = told
    return LabelledRows(
        sha256, labels.astype(np.int64), groups.astype(np.int64), split, source, tuple(classes.tolist())
    )


def features_of(
    store: Store,
    version: DatasetVersion,
    splits: Sequence[str],
    network: "ImageNetwork",
    image_size: int,
    preprocessing: str = CURRENT,
    progress: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Embeddings [N, D] of the photographs, in order of sha256; a few hundred photographs in memory at a time."""
    from tasks.training import predict

    parts = []
    for rows in read_rows(store, version, splits, ["image", "label", "sha256"], _ROWS):
        samples = read_samples([rows], rows.num_rows, version.classes, image_size, preprocessing)
        parts.append(predict(network, samples.images)["embedding"])
        progress(sum(map(len, parts)))
    return np.concatenate(parts)


def photographs_of(store: Store, version: DatasetVersion, sha256: Sequence[str]) -> dict[str, bytes]:
    """sha256 -> the photograph's bytes. Raises LookupError naming one that the version does not hold."""
    table = open_rows(store, readable_record(store, version.name, version.version))
    places = {digest: place for place, digest in enumerate(table.to_table(columns=["sha256"])["sha256"].to_pylist())}
    if missing := [digest for digest in sha256 if digest not in places]:
        raise LookupError(f"{version.name} v{version.version} does not hold the photograph {missing[0]}")
    if not sha256:
        return {}
    images = table.take([places[digest] for digest in sha256], columns=["image"])["image"]
    return {digest: image.as_py() for digest, image in zip(sha256, images, strict=True)}


@dataclass(frozen=True)
class TrainingFold:
    """Rows: what a training learns from, what decides when it stops, and what it then judges. No group is in two of them."""

    learnt: NDArray[np.int64]
    watched: NDArray[np.int64]
    held: NDArray[np.int64]


def training_folds(rows: LabelledRows, config: TrainConfig, folds: int, seed: int) -> tuple[TrainingFold, ...]:
    """All trainings that judge the labels, so that none is paid for before it is known that the last one can be done.

    Raises ValueError naming what is missing.
    """
    from tasks.labels import folds_of, groups_needed
    from tasks.training import check_labels

    labels, groups, found = rows.labels, rows.groups, []
    for rest, held in folds_of(labels, groups, folds, seed, left=groups_needed(_VALIDATION)):
        learnt, watched = next(folds_of(labels[rest], groups[rest], _VALIDATION, config.seed))
        found.append(TrainingFold(rest[learnt], rest[watched], held))
        check_labels(labels[rest[learnt]], labels[rest[watched]], rows.classes, _judging(config))
    return tuple(found)


def groups_to_train(folds: int) -> int:
    """The fewest groups of a class that can be judged by trainings: one to learn from, one to watch, and the held ones."""
    from tasks.labels import groups_needed

    return groups_needed(folds, left=groups_needed(_VALIDATION))


def by_trainings(
    samples: Samples,
    folds: Sequence[TrainingFold],
    classes: tuple[str, ...],
    config: TrainConfig,
    report: Callable[[str], None],
) -> "Probabilities":
    """[N, C] out of sample by one training of the recipe for each fold; what a fold holds out is only predicted."""
    from tasks.training import predict, train

    def part(rows: NDArray[np.int64]) -> Samples:
        return Samples(samples.images[rows], samples.labels[rows], samples.sha256[rows])

    found = np.full((len(samples.labels), len(classes)), np.nan)
    for fold in folds:
        trained = train(part(fold.learnt), part(fold.watched), classes, _judging(config))
        best = trained.epochs[trained.best_epoch - 1].validation.accuracy
        report(f"{len(fold.learnt)} photographs learnt, {len(fold.held)} judged; validation accuracy {best:.3f}")
        found[fold.held] = predict(trained.network, part(fold.held).images)["probabilities"]
    return found


def _judging(config: TrainConfig) -> TrainConfig:
    """The recipe for a judge: no threshold, so no defects, and nothing that a version has learnt of the labels before."""
    frozen = config.frozen_stages if config.pretrained else 0
    return config.model_copy(update={"defect_labels": (), "continue_from": None, "frozen_stages": frozen})
