"""What was found about the labels of a dataset version, on S3, and what people decided about it.

    labels/<dataset>/v<n>/<digest>.parquet      every photograph, the most doubtful label first; digest: of version and options
    labels/<dataset>/v<n>/findings.json         which of them counts, and its figures; written last
    labels/<dataset>/confirmed/<batch>.json     labels that a person looked at and kept
    review/<dataset>/v<n>/annotations.json      the suspects as a batch that corrects, for a person to edit

Nothing here has a time or a random part: the same version and options leave the same bytes, however often they are run.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.batch import ANNOTATIONS, INCOMING
from tasks.labels import NoisePair
from tasks.storage import Store, list_objects, read, write

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion
    from tasks.label_evidence import LabelledRows
    from tasks.labels import Opinion, Probabilities

HOW: Final = (
    "label_value is what the photograph will be called. Leave it to accept the suggestion; write another class; write the "
    "given_label again to confirm that it is right (it is not asked again); delete the line to leave it open."
)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_LOOSE_COMMA: Final = re.compile(rb",(\s*\])")


@dataclass(frozen=True)
class Findings:
    """One examination of a version's labels.

    method: what judged them. identity: digest of version and options. suspects: how many labels are doubted. error_rate: the
    estimated share of wrong labels. agreement: share of the labels that the judge would have given. noise: by class pair.
    """

    dataset: str
    version: int
    digest: str
    identity: str
    method: dict[str, Any]
    classes: tuple[str, ...]
    photographs: int
    suspects: int
    error_rate: float
    agreement: float
    noise: tuple[NoisePair, ...]

    @property
    def ranking_key(self) -> str:
        return f"{_folder(self.dataset, self.version)}/{self.identity}.parquet"

    @property
    def review_prefix(self) -> str:
        return f"review/{self.dataset}/v{self.version}/"


def _folder(dataset: str, version: int) -> str:
    return f"labels/{dataset}/v{version}"


def identity_of(version: "DatasetVersion", method: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that are equal for equal labels and equal options."""
    told = json.dumps([version.name, version.digest, dict(method)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def ranking(rows: "LabelledRows", probabilities: "Probabilities", opinion: "Opinion") -> pa.Table:
    """One row a photograph, the most doubtful label first. probabilities: of each class, in their order."""
    order = opinion.order
    label_of = pa.array(rows.classes)

    def named(numbers: Any) -> pa.Array:
        return label_of.take(pa.array(numbers[order]))

    at = order.tolist()
    every = range(len(rows))
    own, other = probabilities[every, rows.labels], probabilities[every, opinion.suggested]
    shown = probabilities[order].astype("float32")
    return pa.table(
        {
            "rank": pa.array(range(1, len(rows) + 1), pa.int64()),
            "sha256": [rows.sha256[row] for row in at],
            "split": [rows.splits[row] for row in at],
            "source_key": [rows.sources[row] for row in at],
            "group": pa.array(rows.groups[order]),
            "given": named(rows.labels),
            "suggested": named(opinion.suggested),
            "quality": pa.array(opinion.quality[order]),
            "given_confidence": pa.array(own[order]),
            "suggested_confidence": pa.array(other[order]),
            "suspect": pa.array(opinion.suspect[order]),
            "probabilities": pa.FixedSizeListArray.from_arrays(pa.array(shown.ravel()), shown.shape[1]),
        }
    )


def keep(store: Store, findings: Findings, ranked: pa.Table) -> None:
    """Writes the ranking, then the findings that make it count."""
    out = io.BytesIO()
    pq.write_table(ranked, out, compression="zstd")
    write(store, findings.ranking_key, out.getvalue())
    told = json.dumps(asdict(findings), indent=1).encode()
    write(store, f"{_folder(findings.dataset, findings.version)}/findings.json", told)


def read_findings(store: Store, dataset: str, version: int) -> Findings:
    """The newest examination of the version. Raises LookupError saying how to make one."""
    try:
        told = json.loads(read(store, f"{_folder(dataset, version)}/findings.json"))
    except FileNotFoundError:
        raise LookupError(
            f"the labels of {dataset} v{version} have not been examined: "
            f"prefect deployment run 'labels/{dataset}' -p dataset_version={version}"
        ) from None
    noise = tuple(NoisePair(**each) for each in told["noise"])
    return Findings(**{**told, "classes": tuple(told["classes"]), "noise": noise})


def read_ranking(store: Store, findings: Findings, columns: Sequence[str] | None = None) -> pa.Table:
    """The ranking, as `ranking` made it, with the column `confirmed`: a person looked at this label and kept it."""
    found = pq.read_table(io.BytesIO(read(store, findings.ranking_key)), columns=list(columns) if columns else None)
    kept = confirmed_labels(store, findings.dataset)
    pairs = zip(found["sha256"].to_pylist(), found["given"].to_pylist(), strict=True)
    return found.append_column(
        "confirmed", pa.array([kept.get(sha256) == given for sha256, given in pairs], pa.bool_())
    )


def open_suspects(ranked: pa.Table) -> pa.Table:
    """The rows of a ranking whose label is doubted and that no person has confirmed, the most doubtful first."""
    return ranked.filter(pc.and_not(ranked["suspect"], ranked["confirmed"]))


def suspects_of(store: Store, version: "DatasetVersion") -> frozenset[str]:
    """sha256 of the photographs of the version whose label is doubted and that nobody has confirmed.

    Raises LookupError when the version's labels have not been examined: no suspects and not looked are two things.
    """
    findings = read_findings(store, version.name, version.version)
    ranked = read_ranking(store, findings, ["sha256", "given", "suspect"])
    return frozenset(open_suspects(ranked)["sha256"].to_pylist())


def review_document(dataset: str, version: int, entries: Iterable[Mapping[str, Any]]) -> bytes:
    """An `annotations.json` that corrects: one entry a line, so that a person can edit and delete lines."""
    lines = ",\n".join(json.dumps(dict(each), ensure_ascii=False) for each in entries)
    head = f'"corrects": true, "dataset": {json.dumps(dataset)}, "dataset_version": {version}, "how": {json.dumps(HOW)}'
    return f'{{"annotation": {{{head}, "data": [\n{lines}\n]}}}}\n'.encode()


def review_entries(suspects: pa.Table) -> list[dict[str, Any]]:
    """Rows of a ranking as entries that correct each label to the suggested one, and say what they correct."""
    return [
        {
            "sha256": row["sha256"],
            "label_value": row["suggested"],
            "given_label": row["given"],
            "given_confidence": round(row["given_confidence"], 3),
            "suggested_confidence": round(row["suggested_confidence"], 3),
            "split": row["split"],
            "source": row["source_key"],
        }
        for row in suspects.to_pylist()
    ]


def offer(store: Store, findings: Findings, ranked: pa.Table, most: int) -> int:
    """Writes the review batch with the first `most` open suspects; how many it holds."""
    chosen = open_suspects(ranked).slice(0, most)
    document = review_document(findings.dataset, findings.version, review_entries(chosen))
    write(store, findings.review_prefix + ANNOTATIONS, document)
    return int(chosen.num_rows)


@dataclass(frozen=True)
class Reviewed:
    """What a person made of a review. entries: those that correct; confirmed: sha256 -> the label that was kept."""

    entries: tuple[dict[str, Any], ...]
    confirmed: dict[str, str]

    @property
    def content(self) -> str:
        """Ten hexadecimal digits of what was decided."""
        told = json.dumps([self.entries, sorted(self.confirmed.items())], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:10]


def reviewed(document: bytes, labels: Mapping[str, str], classes: Sequence[str]) -> Reviewed:
    """The decisions in an edited review file. labels: sha256 -> label in the newest version of the dataset.

    Raises ValueError naming the entry that is wrong: no such photograph, no such class, two labels for one photograph, or one
    that somebody else has relabelled since. A comma left behind by a deleted last line is forgiven.
    """
    entries: list[dict[str, Any]] = []
    confirmed: dict[str, str] = {}
    seen: dict[str, str] = {}
    for number, entry in enumerate(_entries(document), 1):
        sha256, label = entry.get("sha256"), entry.get("label_value")
        place = f"entry {number} of {ANNOTATIONS}"
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or sha256 not in labels:
            raise ValueError(
                f"{place}: sha256 is {sha256!r}, which the dataset does not hold: leave the line as it was"
            )
        if not isinstance(label, str) or label not in classes:
            raise ValueError(
                f"{place} (sha256 {sha256[:12]}): label_value is {label!r}; write one of {', '.join(classes)}"
            )
        if seen.setdefault(sha256, label) != label:
            raise ValueError(
                f"{place} (sha256 {sha256[:12]}): called {seen[sha256]!r} above and {label!r} here: keep one"
            )
        given = entry.get("given_label", labels[sha256])
        if labels[sha256] not in (given, label):
            raise ValueError(
                f"{place} (sha256 {sha256[:12]}): labelled {given!r} when this was made, {labels[sha256]!r} by now: delete "
                "the line, or make the review anew"
            )
        if label == given:
            confirmed[sha256] = label
        elif not any(each["sha256"] == sha256 for each in entries):
            entries.append(entry)
    return Reviewed(tuple(entries), confirmed)


def _entries(document: bytes) -> list[dict[str, Any]]:
    try:
        try:
            told = json.loads(document)
        except ValueError:
            told = json.loads(_LOOSE_COMMA.sub(rb"\1", document))
        entries = told["annotation"]["data"]
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise TypeError("annotation.data is not a list of objects")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{ANNOTATIONS} cannot be read ({error}): mend that place, or make the review anew") from None
    return entries


def submit(store: Store, dataset: str, version: int, decided: Reviewed, batch: str) -> str | None:
    """What was confirmed, and a batch that corrects the rest, whose event starts ingest; its prefix, or None without any.

    Submitting again changes nothing. Raises ValueError when another batch of this name lies there.
    """
    if decided.confirmed:
        told = {"dataset_version": version, "labels": decided.confirmed}
        write(store, f"labels/{dataset}/confirmed/{batch}.json", json.dumps(told, indent=1, sort_keys=True).encode())
    if not decided.entries:
        return None
    prefix = f"{INCOMING}/{dataset}/{batch}/"
    if others := [each.key for each in list_objects(store, prefix) if each.key != prefix + ANNOTATIONS]:
        raise ValueError(f"{prefix} holds other files, such as {others[0]}: choose another name for the batch")
    write(store, prefix + ANNOTATIONS, review_document(dataset, version, decided.entries))
    return prefix


def confirmed_labels(store: Store, dataset: str) -> dict[str, str]:
    """sha256 -> the label that a person has confirmed, by the batch last written for each photograph."""
    files = list_objects(store, f"labels/{dataset}/confirmed/")
    files.sort(key=lambda each: (each.modified.timestamp() if each.modified else 0.0, each.key))
    kept: dict[str, str] = {}
    for each in files:
        kept |= json.loads(read(store, each.key))["labels"]
    return kept


def write_review_folder(folder: Path, document: bytes, photographs: Iterable[tuple[str, bytes]], sheet: bytes) -> None:
    """`annotations.json`, `sheet.jpg` and `photographs/<name>`: the folder a person reviews. Raises FileExistsError."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is there already and not empty: name a new folder, or empty this one")
    (folder / "photographs").mkdir(parents=True, exist_ok=True)
    for name, data in photographs:
        (folder / "photographs" / name).write_bytes(data)
    (folder / "sheet.jpg").write_bytes(sheet)
    (folder / ANNOTATIONS).write_bytes(document)  # last: what is there is complete
