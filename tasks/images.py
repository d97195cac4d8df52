"""Decode and resize: the preprocessing contract.

One function, `decode`, turns an encoded photograph into what the network sees: in training, evaluation, drift and
serving. Implementations are frozen and numbered: a sealed version names the one it was trained with; none is ever
edited, only added. numpy and codecs only: the serving environment imports this module as well, and both environments
pin the same codec and resizer wheels.
"""

import base64
import hashlib
import io
from collections.abc import Callable
from typing import Any, Final

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

MIN_SIDE: Final = 8  # scikit-learn's digits are 8x8; anything smaller shows nothing
MAX_PIXELS: Final = 50_000_000  # a bound on memory: 150 MB decoded
MAX_BYTES: Final = 64 * 2**20
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_ORIENTATION: Final = 274  # EXIF tag


class UnreadableImage(ValueError):
    """The bytes are not an image this contract accepts. `reason` is one stable word for counting and quarantine:
    empty, too_many_bytes, not_an_image, unsupported_format, too_small, too_large, truncated.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["UnreadableImage"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


def probe(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) by the header alone. Raises UnreadableImage for what can be refused without decoding."""
    if not data:
        raise UnreadableImage("empty", "the image is empty (0 bytes): send the encoded file")
    if len(data) > MAX_BYTES:
        raise UnreadableImage("too_many_bytes", f"{len(data)} bytes are more than the limit of {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data)) as header:
            kind, (width, height) = str(header.format), header.size
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too_large", f"{error}; the limit is {MAX_PIXELS} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError) as error:
        known = "/".join(FORMATS)
        start = data[:8].hex(" ")
        raise UnreadableImage("not_an_image", f"no readable {known} image; it begins with {start}") from error
    if kind == "MPO":  # what many phones write: a JPEG with a second picture behind it
        kind = "JPEG"
    if kind not in FORMATS:
        raise UnreadableImage("unsupported_format", f"format {kind} is not one of {', '.join(FORMATS)}: convert it")
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            "too_large", f"{width}x{height} pixels are more than the limit of {MAX_PIXELS}: scale it down"
        )
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage("too_small", f"{width}x{height} pixels: each side needs at least {MIN_SIDE}")
    return kind, width, height


def decode_full(data: bytes) -> Pixels:
    """Encoded photograph -> [H, W, 3] uint8 RGB at its own size, EXIF orientation applied. Raises UnreadableImage."""
    return decode_with_format(data)[1]


def decode_with_format(data: bytes) -> tuple[str, Pixels]:
    """The same, with the format that the content has, one of FORMATS."""
    kind, _, _ = probe(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = int(image.getexif().get(_ORIENTATION, 1) or 1)
            if kind == "JPEG" and image.mode in ("RGB", "L"):
                # libjpeg-turbo straight into RGB; strict: a truncated file is an error, not half a grey picture.
                pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
            else:
                pixels = _pillow_rgb(image)
    except UnreadableImage:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise UnreadableImage("truncated", f"the {kind} file is truncated or damaged: {error}") from None
    return kind, _upright(pixels, orientation)


def _pillow_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: keep the upper byte
        deep = np.asarray(image)
        if deep.dtype == np.float32:
            raise UnreadableImage(
                "unsupported_format", "floating-point pixels have no fixed white: save as 8 or 16 bit"
            )
        grey = (np.clip(deep, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))  # palette, alpha, CMYK, 1-bit and 8-bit grey


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    turned: Any = pixels
    if orientation in (2, 4, 5, 7):
        turned = np.fliplr(turned)
    if orientation in (3, 4):
        turned = np.rot90(turned, 2)
    elif orientation in (5, 8):
        turned = np.rot90(turned, 1)
    elif orientation in (6, 7):
        turned = np.rot90(turned, -1)
    return np.ascontiguousarray(turned, dtype=np.uint8)


def _resize_area_v1(pixels: Pixels, size: int) -> Pixels:
    """Whole picture onto a square, pixel-area resampling: the mode in which OpenCV 4 and 5 agree to the bit."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA), dtype=np.uint8)


IMPLEMENTATIONS: Final[dict[str, Callable[[Pixels, int], Pixels]]] = {"resize-area-v1": _resize_area_v1}
CURRENT: Final = "resize-area-v1"


def decode(data: bytes, size: int, implementation: str = CURRENT) -> Pixels:
    """Encoded photograph -> [size, size, 3] uint8 RGB, as the named implementation frozen in this module defines it.

    Raises UnreadableImage for bad bytes and ValueError for an implementation this build does not carry.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"preprocessing {implementation!r} is not among this build's {sorted(IMPLEMENTATIONS)}: update the server"
        )
    return IMPLEMENTATIONS[implementation](decode_full(data), size)


# A 64x48 JPEG of our own making, and the digest of its pixels at 32x32 under each implementation: a server checks
# itself with it before it serves, so a codec that rounds differently is found by us and not by the customer.
_GOLDEN_JPEG: Final = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0"
    "Hyc5PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy"
    "MjL/wAARCAAwAEADASIAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQID"
    "AAQRBRIhMUEGE1FhByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlq"
    "c3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3"
    "+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAAAAAAECAwQFBgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEI"
    "FEKRobHBCSMzUvAVYnLRChYkNOEl8RcYGRomJygpKjU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImK"
    "kpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExcbHyMnK0tPU1dbX2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDx"
    "CK19quRWvtV6K19quRWvtWlNmdDElGK19quxWvtWjbWqYbeufSrQhjXotaPFQpvldz6rBYWtWpKrFqz/AOG7FCK19quRWvtUwAXoK1Yr"
    "X2rtwuIjWvy9D0Hz0Lc73KMVr7Vcitfar0Vr7VcitfavTps9GhiTg4rX2q7Fa+1XYrX2q7Fa+1fM02fidDEmVJF5QX3pla95YTyiPyY9"
    "2M55A9PWq40bUG6W/wD4+v8AjWNaEpTbSP07JMfho4GnGdSKeujavuyhXXxWvtWENB1Nult/4+v+NdvFa+1d2XQlFy5lbb9QzPGUpOHs"
    "5J77O/YoxWvtVyO2AGTwB3q9HbADJ4A71BLmY7EGIx+tb5jmtHLqPPPWT2Xf/gd2GErObOXitfarkVr7VeitfarkVr7V51Nn4hQxJRit"
    "farsVr7VeitfarkVr7V2U2ezQxJRitfarkdsAMngDvV6O2AGTwBUEuZjsTiMfrXNmOa0cuo889ZPZd/+B3Z7mErObKMuZjsTiMfrT4rX"
    "2q9Fa+1XIrX2r83xGMrYus61Z3b/AA8l5H0+GxCirI//2Q=="
)
_GOLDEN_DIGEST: Final = {
    "resize-area-v1": "aac489e3c04556707ba0c056fadd39f8a11c0990d005fe78388c7e6ec3f0c2eb",
}


def self_check(implementation: str) -> None:
    """Raises RuntimeError when this machine's codecs do not reproduce the frozen pixels of the implementation."""
    found = hashlib.sha256(decode(_GOLDEN_JPEG, 32, implementation).tobytes()).hexdigest()
    if found != _GOLDEN_DIGEST[implementation]:
        raise RuntimeError(
            f"preprocessing {implementation!r} gives other pixels here (sha256 {found[:12]}, expected "
            f"{_GOLDEN_DIGEST[implementation][:12]}): install the codec wheels this project pins"
        )
