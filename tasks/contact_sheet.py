"""A few photographs of each class on one small picture: the glance that finds a swapped label or a wrong camera."""

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.images import Pixels, decode

TILE: Final = 72
PER_CLASS: Final = 8
MAX_CLASSES: Final = 12
_GAP: Final = 2


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
