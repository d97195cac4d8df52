"""A few photographs on one small picture: of each class, the glance that finds a swapped label or a wrong camera; or of single
decisions, each beside what it was painted with.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.images import Pixels, decode

TILE: Final = 72
PER_CLASS: Final = 8
MAX_CLASSES: Final = 12
_GAP: Final = 2
PAIR_TILE: Final = 112
PAIRS_A_ROW: Final = 4
_LINE, _LETTER = 16, 13  # pixels of one line of text, and of its letters
_APART: Final = 10


def contact_sheet(rows: Sequence[Sequence[bytes]]) -> bytes:
    """One row of encoded photographs for each class -> PNG; at most PER_CLASS a row and MAX_CLASSES rows."""
    shown = [row[:PER_CLASS] for row in rows[:MAX_CLASSES]]
    columns = max((len(row) for row in shown), default=0)
    if not columns:
        raise ValueError("a contact sheet needs at least one photograph")
    step = TILE + _GAP
    sheet: NDArray[np.uint8] = np.full((len(shown) * step - _GAP, columns * step - _GAP, 3), 255, np.uint8)
    for line, row in enumerate(shown):
        for column, data in enumerate(row):
            sheet[line * step : line * step + TILE, column * step : column * step + TILE] = _tile(data)
    written, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    if not written:
        raise RuntimeError(f"OpenCV could not encode a contact sheet of {sheet.shape}")
    return png.tobytes()


def _tile(data: bytes) -> Pixels:
    return decode(data, TILE)


@dataclass(frozen=True)
class Pair:
    """A photograph [S, S, 3] and the same one painted over, uint8 RGB, with the lines to write below it."""

    photograph: Pixels
    painted: Pixels
    lines: tuple[str, ...]


def pair_sheet(blocks: Sequence[tuple[str, Sequence[Pair]]]) -> bytes:
    """Blocks of pairs, each under its heading and PAIRS_A_ROW a row -> PNG with a palette: one byte a pixel at most."""
    from PIL import Image, ImageDraw, ImageFont

    wide = 2 * PAIR_TILE + _GAP
    high = PAIR_TILE + _LINE * max((len(pair.lines) for _, pairs in blocks for pair in pairs), default=0) + _APART
    heights = [_LINE + _GAP + -(-len(pairs) // PAIRS_A_ROW) * high for _, pairs in blocks]
    sheet = Image.new("RGB", (PAIRS_A_ROW * (wide + _APART) - _APART, sum(heights)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    pen.font = ImageFont.load_default(_LETTER)
    for (heading, pairs), height in zip(blocks, heights, strict=True):
        pen.text((0, top), heading, fill="black")
        for place, pair in enumerate(pairs):
            left = place % PAIRS_A_ROW * (wide + _APART)
            above = top + _LINE + _GAP + place // PAIRS_A_ROW * high
            for offset, pixels in ((0, pair.photograph), (PAIR_TILE + _GAP, pair.painted)):
                sheet.paste(Image.fromarray(_resized(pixels)), (left + offset, above))
            for number, line in enumerate(pair.lines):
                pen.text((left, above + PAIR_TILE + number * _LINE), _fitting(pen.textlength, line, wide), fill="black")
        top += height
    out = io.BytesIO()
    sheet.quantize(256).save(out, "PNG", optimize=True)
    return out.getvalue()


def _resized(pixels: Pixels) -> Pixels:
    finer = cv2.INTER_AREA if pixels.shape[0] > PAIR_TILE else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(pixels, (PAIR_TILE, PAIR_TILE), interpolation=finer), dtype=np.uint8)


def _fitting(length: Callable[[str], float], text: str, wide: int) -> str:
    """The text, cut at its end where it is wider than that."""
    if length(text) <= wide:
        return text
    kept = next((n for n in range(len(text), 0, -1) if length(text[:n] + "...") <= wide), 0)
    return text[:kept] + "..."
