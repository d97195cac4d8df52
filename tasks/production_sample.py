"""Both sides of a drift look as numbers and pictures: the training reference, and a window of captured production."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np

from monitoring.calibration import Sample
from monitoring.capture import CaptureRecord
from monitoring.drift import DriftResult, exemplars, save_evidently
from monitoring.features import STATISTICS, image_statistics
from tasks.contact_sheet import contact_sheet
from tasks.dataset import open_version, read_rows
from tasks.decision import decide, score
from tasks.images import decode_full
from tasks.registry import ModelCard, Reference, TrainedModel, client_of, run_page
from tasks.storage import Store


def of_reference(reference: Reference, card: ModelCard) -> Sample:
    """The validation split, as the version's own training run stored it."""
    columns = [reference.statistics.column(name).to_numpy() for name in STATISTICS]
    return Sample(
        statistics=np.stack(columns, axis=1).astype(np.float32),
        embedding=reference.embedding,
        score=score(reference.probabilities, card.rule),
        label=decide(reference.probabilities, card.rule),
        labels=card.rule.labels,
        defects=card.rule.defect_labels,
        truth=reference.labels,
    )


def of_records(records: Sequence[CaptureRecord], card: ModelCard) -> Sample:
    """Captured production, in order of time; the statistics by the very code that made those of the reference."""
    classes, width = len(card.rule.labels), len(records[0].embedding) if records else 1
    probabilities = np.array([record.probabilities for record in records], np.float32).reshape(-1, classes)
    with ThreadPoolExecutor() as pool:  # the codecs release the GIL
        found = list(pool.map(_statistics, records))
    return Sample(
        statistics=np.array(found, np.float32).reshape(-1, len(STATISTICS)),
        embedding=np.array([record.embedding for record in records], np.float32).reshape(-1, width),
        score=score(probabilities, card.rule) if records else np.empty(0, np.float32),
        label=decide(probabilities, card.rule) if records else np.empty(0, np.int64),
        labels=card.rule.labels,
        defects=card.rule.defect_labels,
    )


def _statistics(record: CaptureRecord) -> list[float]:
    assert isinstance(record.image, bytes)
    found = image_statistics(decode_full(record.image))
    return [found[name] for name in STATISTICS]


def contact_sheet_of(
    store: Store,
    card: ModelCard,
    before: Sample,
    after: Sample,
    reference: Reference,
    records: Sequence[CaptureRecord],
) -> bytes | None:
    """PNG: typical and unusual photographs of training, then of production. None when training was too large to look up."""
    if len(before) != len(reference.sha256):
        return None
    chosen = exemplars(before, after)
    sides = (chosen.training_typical, chosen.training_unusual)
    wanted = {str(reference.sha256[row]) for rows in sides for row in rows}
    photographs: dict[str, bytes] = {}
    version = open_version(store, card.dataset, card.dataset_version)
    for batch in read_rows(store, version, ["val"], ["sha256", "image"]):
        for digest, image in zip(batch.column("sha256").to_pylist(), batch.column("image"), strict=True):
            if digest in wanted:
                photographs[digest] = image.as_py()
    training = [[photographs[str(reference.sha256[row])] for row in rows] for rows in sides]
    production = [
        [image for row in rows if isinstance(image := records[row].image, bytes)]
        for rows in (chosen.production_typical, chosen.production_unusual)
    ]
    return contact_sheet([*training, *production])


def log_evidently(
    tracking_uri: str, trained: TrainedModel, before: Sample, after: Sample, result: DriftResult, now: datetime
) -> str:
    """Evidently's page as artifact `drift/<time>.html` of the version's run; its address in the MLflow UI."""
    name = f"{now:%Y%m%d-%H%M%S}.html"
    with tempfile.TemporaryDirectory(prefix="tirewatch-drift-") as directory:
        path = Path(directory) / name
        save_evidently(before, after, result, path)
        client_of(tracking_uri).log_artifact(trained.run_id, str(path), "drift")
    return f"{run_page(tracking_uri, trained.run_id)}/artifacts/drift/{name}"
