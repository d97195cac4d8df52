"""tasks/images.py: the preprocessing contract."""

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.images import CURRENT, MAX_PIXELS, UnreadableImage, decode, decode_full, probe, self_check

ROOT = Path(__file__).parents[1]
SERVER_PYTHON = ROOT / ".venv-triton" / "bin" / "python"
Photograph = Callable[..., bytes]

# What both environments do with the files named on standard input: sha256 of the pixels, or the reason why there are none.
DECODE_ALL = """
import hashlib, json, sys
from pathlib import Path
from tasks.images import UnreadableImage, decode, decode_full
def seen(path):
    try:
        data = Path(path).read_bytes()
        whole = (decode_full(data), decode(data, 160), decode(data, 61))
        return [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in whole]
    except UnreadableImage as error:
        return error.reason
print(json.dumps({path: seen(path) for path in json.load(sys.stdin)}))
"""


def encode(pixels: np.ndarray, kind: str, **options: object) -> bytes:  # type: ignore[type-arg]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory, photograph: Photograph) -> Path:
    """Files of every format and mode that the contract names, and of every kind that it refuses."""
    folder = tmp_path_factory.mktemp("images")
    colour = np.asarray(Image.open(io.BytesIO(photograph(1, 200, "PNG"))))
    picture = Image.fromarray(colour)
    turned = Image.Exif()
    for orientation in range(1, 9):
        turned[274] = orientation
        picture.resize((90, 60)).save(folder / f"turned{orientation}.jpg", exif=turned)
    for mode, kind in [("L", "png"), ("LA", "png"), ("P", "png"), ("1", "png"), ("RGBA", "png"), ("RGBA", "webp")]:
        picture.convert(mode).save(folder / f"{mode}.{kind}")
    for mode, kind in [("L", "jpg"), ("CMYK", "jpg"), ("RGB", "bmp"), ("RGB", "tiff"), ("RGB", "webp")]:
        picture.convert(mode).save(folder / f"{mode}.{kind}")
    picture.save(folder / "progressive.jpg", progressive=True, quality=30, subsampling=2)
    picture.save(folder / "wrong.png", "JPEG")
    Image.fromarray(colour[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    (folder / "cut.jpg").write_bytes(photograph(2, 300)[:-900])
    (folder / "cut.png").write_bytes(photograph(2, 300, "PNG")[:-900])
    (folder / "text.jpg").write_text("no photograph")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("1", (10_000, 6_000)).save(folder / "sixty-megapixels.png")
    return folder


def seen_by(python: Path | str, paths: list[str]) -> dict[str, list[str] | str]:
    done = subprocess.run(
        [str(python), "-c", DECODE_ALL], input=json.dumps(paths), capture_output=True, text=True, cwd=ROOT, check=True
    )
    found: dict[str, list[str] | str] = json.loads(done.stdout)
    return found


def here(paths: list[str]) -> dict[str, list[str] | str]:
    def seen(path: str) -> list[str] | str:
        try:
            data = Path(path).read_bytes()
            whole = (decode_full(data), decode(data, 160), decode(data, 61))
        except UnreadableImage as error:
            return error.reason
        return [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in whole]

    return {path: seen(path) for path in paths}


@pytest.mark.skipif(not SERVER_PYTHON.exists(), reason="the serving environment is not installed: make install")
def test_both_environments_see_the_same_pixels_and_refuse_the_same_files(every_kind: Path) -> None:
    paths = [str(path) for path in sorted(every_kind.iterdir())]
    expected = here(paths)
    assert sum(isinstance(each, list) for each in expected.values()) >= 20
    assert seen_by(SERVER_PYTHON, paths) == expected


@pytest.mark.shared_data
@pytest.mark.skipif(not SERVER_PYTHON.exists(), reason="the serving environment is not installed: make install")
def test_both_environments_see_the_same_pixels_of_real_photographs(shared_data: Path) -> None:
    folders = ("tyre-condition/val", "magnetic-tile/MT_Fray", "mnist")
    pictures = [
        sorted(p for p in (shared_data / each).rglob("*") if p.suffix in {".jpg", ".png", ".jpeg"}) for each in folders
    ]
    paths = [str(path) for some in pictures for path in some[:60]]
    assert len(paths) > 100
    assert seen_by(SERVER_PYTHON, paths) == here(paths)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.jpg", "truncated"),
        ("cut.png", "truncated"),
        ("text.jpg", "not_an_image"),
        ("empty.jpg", "empty"),
        ("pixel.png", "too_small"),
        ("sixty-megapixels.png", "too_large"),
    ],
)
def test_what_is_no_usable_image_is_refused_with_its_reason(every_kind: Path, name: str, reason: str) -> None:
    with pytest.raises(UnreadableImage) as refused:
        decode((every_kind / name).read_bytes(), 64)
    assert refused.value.reason == reason


def test_a_format_outside_the_contract_is_refused_by_name(photograph: Photograph) -> None:
    with pytest.raises(UnreadableImage, match="GIF is not one of JPEG, PNG"):
        probe(photograph(1, 32, "GIF"))


def test_sixty_megapixels_are_refused_before_they_are_decoded(
    every_kind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_PIXELS < 10_000 * 6_000
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("the pixels were decoded"))
    with pytest.raises(UnreadableImage, match="10000x6000"):
        decode((every_kind / "sixty-megapixels.png").read_bytes(), 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_stands_upright(orientation: int) -> None:
    """Pillow's own transposition is the reference."""
    from PIL import ImageOps

    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:8, :8] = (255, 0, 0)
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(pixels, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected is not None
    np.testing.assert_array_equal(decode_full(data), np.asarray(expected.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(decode_full(encode(deep, "PNG"))[:, :, 0], (deep >> 8).astype(np.uint8))


def test_a_picture_of_the_right_size_is_not_resampled(photograph: Photograph) -> None:
    data = photograph(3, 64, "PNG")
    np.testing.assert_array_equal(decode(data, 64), decode_full(data))


def test_shrinking_by_a_whole_factor_is_the_mean_of_the_area() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mean = pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(decode(encode(pixels, "PNG"), 16) - mean).max() <= 1


def test_an_implementation_this_build_lacks_is_named(photograph: Photograph) -> None:
    with pytest.raises(ValueError, match=r"'resize-cubic-v9'.*resize-area-v1"):
        decode(photograph(1), 32, "resize-cubic-v9")


def test_the_self_check_finds_a_codec_that_rounds_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    import simplejpeg

    self_check(CURRENT)
    exact = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *given, **how: exact(*given, **how) ^ 1)
    with pytest.raises(RuntimeError, match="gives other pixels here"):
        self_check(CURRENT)


def test_an_unreadable_image_survives_the_way_between_processes() -> None:
    import pickle

    again = pickle.loads(pickle.dumps(UnreadableImage("truncated", "cut off")))
    assert (again.reason, str(again)) == ("truncated", "cut off")


FUZZ = """
import io, resource, sys, time
import numpy as np
from PIL import Image
from tasks.images import UnreadableImage, decode_full

resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))  # a header that promises 40,000 x 40,000 must not be believed
random = np.random.default_rng(20261121)
seeds = []
for mode in ("RGB", "L", "P", "CMYK", "RGBA", "I;16", "1"):
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"):
        pixels = Image.fromarray(random.integers(0, 256, (24, 31, 3), dtype=np.uint8))
        out = io.BytesIO()
        try:
            (pixels if mode == "RGB" else pixels.convert("L").convert(mode)).save(out, kind)
        except (OSError, ValueError, KeyError):
            continue
        seeds.append(out.getvalue())

def mutated(data):
    changed = bytearray(data)
    for _ in range(random.integers(1, 9)):
        at = int(random.integers(len(changed))) if random.random() < 0.5 else int(random.integers(min(64, len(changed))))
        what = random.integers(6)
        if what == 0:
            changed[at] ^= 1 << int(random.integers(8))
        elif what == 1:
            changed[at] = int(random.choice([0, 1, 127, 128, 255]))
        elif what == 2:
            del changed[at:]
        elif what == 3:
            changed[at:at] = random.integers(0, 256, int(random.integers(1, 40)), dtype=np.uint8).tobytes()
        elif what == 4:
            changed[at : at + 4] = random.choice([b"\\xff\\xff\\xff\\xff", b"\\x7f\\xff\\xff\\xff", b"\\0\\0\\0\\0"])
        else:
            del changed[at : at + int(random.integers(1, 40))]
        if not changed:
            break
    return bytes(changed)

outcomes, slowest = {}, 0.0
for number in range(10_000):
    data = mutated(seeds[number % len(seeds)])
    began = time.perf_counter()
    try:
        pixels = decode_full(data)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        outcome = "accepted"
    except UnreadableImage as error:
        assert str(error)
        outcome = error.reason
    slowest = max(slowest, time.perf_counter() - began)
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
assert slowest < 10, slowest
print(outcomes, len(seeds), round(slowest, 3))
"""


def test_ten_thousand_damaged_files_are_accepted_or_refused_with_a_reason_in_bounded_memory() -> None:
    done = subprocess.run([sys.executable, "-c", FUZZ], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'accepted'" in done.stdout and "'truncated'" in done.stdout and "'not_an_image'" in done.stdout
