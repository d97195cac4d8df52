"""The page of a label examination, and the sheet of pictures beside a review. Pure: values in, Markdown and pictures out."""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from tasks.images import decode
from tasks.label_review import Findings

SIDE: Final = 128  # pixels of a picture on the page
SMALL: Final = 64  # and in the table
_GAP, _CAPTION, _COLUMNS = 8, 34, 6
_LETTER: Final = 7  # pixels of a letter of the captions
MAX_SHEET: Final = 400_000  # bytes of the pictures on a page: Prefect keeps them in its database
MAX_SMALL: Final = 3_600  # bytes of one in the table: 60 of them, as text, stay below 300 kB
WEAK: Final = (
    0.7  # agreement below which most doubts are the judge's own: on CIFAR-10 0.54, a third of all labels doubted
)
_WEAK: Final = (
    "\n\n**The judge is weak here**: most of these doubts will be its own mistakes. Examine again with the judge `training`, "
    "or with a larger image_size, before a person spends time on them."
)
_QUALITIES: Final = (85, 70, 50, 30)


def page(findings: Findings, shown: Sequence[Mapping[str, Any]], sheet: bytes | None, review: str, offered: int) -> str:
    """The Markdown artifact. shown: rows of the ranking; sheet: JPEG of their pictures; review: where the review batch lies."""
    parts = [
        f"# {headline(findings)}",
        _how_sure(findings),
        "## What to do\n\n" + _what_to_do(findings, review, offered),
        "## Which classes are confused\n\n" + _noise(findings),
    ]
    if shown and sheet:
        picture = f"![the most doubtful labels](data:image/jpeg;base64,{b64encode(sheet).decode()})"
        parts += [f"## The {len(shown)} most doubtful labels\n\n{picture}", _listed(shown)]
    return "\n\n".join(parts)


def headline(findings: Findings) -> str:
    """One line: how many labels are doubted."""
    of = f"{findings.dataset} v{findings.version}"
    if not findings.suspects:
        return f"No label of {of} is doubted"
    return f"{findings.suspects} of {findings.photographs} labels of {of} are doubted"


def _how_sure(findings: Findings) -> str:
    splits = ", ".join(findings.method["splits"])
    told = ("network", "image_size", "folds", "rounds", "seed")
    method = ", ".join(f"{name.replace('_', ' ')} {findings.method[name]}" for name in told if name in findings.method)
    return (
        f"Each of the {findings.photographs} labels ({splits}) was judged by models that had seen neither the photograph nor "
        f"another of its group (judge {findings.method['judge']}, {method}). They would have given {findings.agreement:.1%} of "
        f"the labels themselves. Confident learning takes about {findings.error_rate:.1%} of all labels for wrong; what the "
        "judge cannot tell apart counts into that number too, so it is an upper estimate where the judge is weak."
        + (_WEAK if findings.agreement < WEAK else "")
    )


def _what_to_do(findings: Findings, review: str, offered: int) -> str:
    if not offered:
        return "Nothing: no doubted label is left that nobody has looked at."
    name = findings.dataset
    return (
        f"`tirewatch labels review {name}@{findings.version} FOLDER` brings the {offered} most doubtful photographs, a sheet "
        f"of them and an `annotations.json` with the suggestions; edit it, then `tirewatch labels submit FOLDER {name}`. The "
        f"same file lies at `{review}`. A suggestion is no correction: a person decides, and ingest makes the next version."
    )


def _noise(findings: Findings) -> str:
    rows = ["| labelled | probably | photographs, about | of those labelled so |", "| --- | --- | ---: | ---: |"]
    told = [each for each in findings.noise if each.photographs >= 0.5][:20]
    if not told:
        return "None, as far as can be seen."
    rows += [f"| {_cell(e.given)} | {_cell(e.likely)} | {e.photographs:.0f} | {e.share:.1%} |" for e in told]
    return "\n".join(rows)


def _listed(shown: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| | labelled | probably | sure | split | sha256 | file |", "| ---: | --- | --- | ---: | --- | --- | --- |"]
    for row in shown:
        file = _cell(str(row["source_key"]).rsplit("/", 1)[-1])
        names = f"{_cell(row['given'])} | **{_cell(row['suggested'])}** | {row['suggested_confidence']:.2f}"
        rows.append(f"| {row['rank']} | {names} | {row['split']} | {row['sha256'][:12]} | {file} |")
    return "\n".join(rows)


def table(rows: Sequence[Mapping[str, Any]], photographs: Sequence[bytes]) -> list[dict[str, str]]:
    """The rows of the table artifact: every suspect that is offered for review, the first of them with a small picture.

    Prefect's page takes the text of a cell for Markdown, which is how a picture gets into one.
    """
    pictures = [*map(_small, photographs), *[""] * len(rows)]
    return [
        {
            "rank": str(row["rank"]),
            "photograph": picture,
            "labelled": _cell(row["given"]),
            "probably": _cell(row["suggested"]),
            "sure": f"{row['suggested_confidence']:.2f}",
            "split": row["split"],
            "source": _cell(row["source_key"]),
            "sha256": row["sha256"],
        }
        for row, picture in zip(rows, pictures, strict=False)
    ]


def _small(photograph: bytes) -> str:
    data = _jpeg(Image.fromarray(decode(photograph, SMALL)), MAX_SMALL)
    return f"![](data:image/jpeg;base64,{b64encode(data).decode()})"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def sheet(
    rows: Sequence[Mapping[str, Any]], photographs: Sequence[bytes], side: int = SIDE, most: int = MAX_SHEET
) -> bytes:
    """JPEG of the photographs, `side` pixels each, with rank, given and suggested label over them; at most `most` bytes, by
    lowering the quality. Raises ValueError without a photograph.
    """
    if not rows:
        raise ValueError("a sheet needs at least one photograph")
    lines = -(-len(rows) // _COLUMNS)
    step, height = side + _GAP, side + _CAPTION + _GAP
    canvas = Image.new("RGB", (min(len(rows), _COLUMNS) * step - _GAP, lines * height - _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    letters, font = int(side / _LETTER), _font()
    for at, (row, data) in enumerate(zip(rows, photographs, strict=True)):
        left, top = at % _COLUMNS * step, at // _COLUMNS * height
        first, second = f"{row['rank']}: {row['given']}", f"→ {row['suggested']} {row['suggested_confidence']:.2f}"
        draw.text((left, top), _short(first, letters), fill="black", font=font)
        draw.text((left, top + 15), _short(second, letters), fill=(190, 0, 0), font=font)
        canvas.paste(Image.fromarray(decode(data, side)), (left, top + _CAPTION))
    return _jpeg(canvas, most)


def _jpeg(image: Image.Image, most: int) -> bytes:
    """At most `most` bytes where a quality that can be looked at allows it."""
    for quality in _QUALITIES:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality, optimize=True)
        if out.tell() <= most:
            break
    return out.getvalue()


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib carries it: Pillow's own font lacks arrows and most alphabets, in which classes are named."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
