"""What became of a batch, for its record and for people: figures, findings, pictures."""

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from tasks.batch import SPLITS
from tasks.batch_statistics import picture
from tasks.contact_sheet import MAX_CLASSES, PER_CLASS, contact_sheet
from tasks.examination import columns_of
from tasks.summary import Spread, spread

if TYPE_CHECKING:
    from tasks.batch import Batch
    from tasks.checks import Known, Plan
    from tasks.dataset import DatasetVersion
    from tasks.examination import Examination

_EXAMPLES: Final = 5  # findings kept of each rule
_SHOWN: Final = 20  # quarantined files listed on the run's page; all of them are under quarantine/


@dataclass(frozen=True)
class Ingested:
    """What a batch has become. counts: findings by reason. rows: label -> split -> rows that this batch added.

    relabelled: "old label -> new label" -> corrected photographs. carved: splits that were taken out of the given train rows
    because none was given. examples: some quarantined files. found: reason -> some findings, as (file, message). before, now:
    how the image statistics of the dataset were distributed, and those of the new rows are.
    """

    batch: str
    version: "DatasetVersion"
    created: bool
    new_rows: int
    relabelled: dict[str, int]
    quarantined: int
    counts: dict[str, int]
    rows: dict[str, dict[str, int]]
    carved: tuple[str, ...]
    examples: tuple[str, ...]
    found: dict[str, list[tuple[str, str]]]
    before: dict[str, Spread]
    now: dict[str, Spread]


def report_of(batch: "Batch", planned: "Plan", known: "Known") -> dict[str, Any]:
    """What the version's record keeps about the run that made it: plain values, bounded in size."""
    rows = Counter((photograph.item.label, split) for photograph, split in planned.rows)
    found: dict[str, list[tuple[str, str]]] = {}
    for each in planned.findings:
        if len(some := found.setdefault(each.reason, [])) < _EXAMPLES:
            some.append((each.name, each.message))
    values = columns_of(photograph for photograph, _ in planned.rows)
    return {
        "prefix": batch.prefix,
        "new_rows": len(planned.rows),
        "relabelled": dict(Counter(f"{each.was} -> {each.label}" for each in planned.relabelled)),
        "quarantined": len(planned.quarantined),
        "counts": dict(Counter(each.reason for each in planned.findings).most_common()),
        "rows": {
            label: {split: count for (of, split), count in sorted(rows.items()) if of == label}
            for label in sorted({label for label, _ in rows})
        },
        "carved": list(planned.carved),
        "examples": [f"{each.name}: {each.message}" for each in planned.quarantined[:_SHOWN]],
        "found": found,
        "before": {name: asdict(each) for name, each in known.spreads.items()},
        "now": {name: asdict(each) for name, each in ((name, spread(some)) for name, some in values.items())},
    }


def ingested(batch: str, version: "DatasetVersion", created: bool, report: Mapping[str, Any]) -> Ingested:
    """The same out of a report; of one that was written by an earlier release as far as it goes."""
    return Ingested(
        batch=batch,
        version=version,
        created=created,
        new_rows=report["new_rows"],
        relabelled=report.get("relabelled", {}),
        quarantined=report["quarantined"],
        counts=report["counts"],
        rows=report["rows"],
        carved=tuple(report["carved"]),
        examples=tuple(report["examples"]),
        found={reason: [(name, told) for name, told in some] for reason, some in report.get("found", {}).items()},
        before=_spreads(report.get("before", {})),
        now=_spreads(report.get("now", {})),
    )


def _spreads(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Spread]:
    return {name: Spread(**{**each, "quantiles": tuple(each["quantiles"])}) for name, each in told.items()}


def pictures_of(examination: "Examination") -> dict[str, list[bytes]]:
    """Label -> a few photographs of the batch, always the same ones."""
    chosen: dict[str, list[bytes]] = {
        label: [] for label in sorted({each.item.label for each in examination.photographs})
    }
    for each in sorted(examination.photographs, key=lambda photograph: photograph.sha256):
        if len(chosen[each.item.label]) < PER_CLASS:
            chosen[each.item.label].append(examination.bytes_of(each))
    return dict(list(chosen.items())[:MAX_CLASSES])


def checks_table(result: Ingested) -> list[dict[str, str]]:
    """Every rule with what it found, for a table artifact; those that found most first."""
    from tasks.checks import RULES

    table = []
    for reason, (severity, meaning) in sorted(RULES.items(), key=lambda rule: -result.counts.get(rule[0], 0)):
        examples = "; ".join(f"{name}: {told}" for name, told in result.found.get(reason, [])[:2])
        found = str(result.counts.get(reason, 0))
        table.append(
            {"rule": reason, "outcome": severity, "found": found, "what it is": meaning, "for example": examples}
        )
    return table


def as_markdown(result: Ingested, examination: "Examination") -> str:
    """What became of the batch, with a contact sheet of its photographs and where its statistics lie."""
    from tasks.checks import RULES

    version = result.version
    lines = [
        f"# {result.batch}: {version.name} v{version.version}",
        f"{result.new_rows} new photographs, {result.quarantined} files quarantined. `{version.digest}`",
        _table(
            ("class", *SPLITS),
            [(label, *(str(splits.get(split, 0)) for split in SPLITS)) for label, splits in result.rows.items()]
            + [("**all of the version**", *(f"**{version.splits[split]}**" for split in SPLITS))],
        ),
    ]
    if result.relabelled:
        lines.append(_table(("label corrected", "photographs"), [(k, str(n)) for k, n in result.relabelled.items()]))
    if result.carved:
        lines.append(f"No {' and '.join(result.carved)} split was given: taken out of the given train rows, by group.")
    if result.counts:
        found = [(reason, str(count), *RULES[reason]) for reason, count in result.counts.items()]
        lines.append(_table(("found", "files", "outcome", "what it is"), found))
    if result.examples:
        lines.append(f"## Quarantined\n\nAll of them: `quarantine/{version.name}/{result.batch}/`\n")
        lines.append("\n".join(f"- {_escaped(example)}" for example in result.examples))
    shifted = result.found.get("shifted", [])
    if shifted:
        lines.append("## Unlike the dataset so far\n")
        lines.append("\n".join(f"- {_escaped(told)}" for _, told in shifted))
    if any(each.count for each in result.now.values()):
        png = picture(result.before, result.now, [name for name, _ in shifted])
        lines.append(f"## Image statistics\n\n{_png('statistics', png)}")
    if pictures := pictures_of(examination):
        rows = ", ".join(_escaped(label) for label in pictures)
        lines.append(f"## Photographs\n\nRows: {rows}\n\n{_png('photographs', contact_sheet(list(pictures.values())))}")
    return "\n\n".join(lines)


def _png(name: str, png: bytes) -> str:
    return f"![{name}](data:image/png;base64,{b64encode(png).decode()})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in shown)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
