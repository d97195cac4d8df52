"""monitoring/features.py: image statistics and the perceptual hash."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from monitoring.features import STATISTICS, image_statistics, perceptual_hash

Pixels = NDArray[np.uint8]


@pytest.fixture
def scene() -> Pixels:
    rng = np.random.default_rng(5)
    coarse = cv2.resize(rng.integers(40, 200, (12, 16, 3), dtype=np.uint8), (320, 240))
    return np.asarray(coarse + rng.integers(0, 12, coarse.shape, dtype=np.uint8), dtype=np.uint8)


def changed(before: Pixels, after: Pixels) -> dict[str, float]:
    """Statistic -> new value relative to the old."""
    old, new = image_statistics(before), image_statistics(after)
    return {name: new[name] / old[name] for name in STATISTICS}


def test_a_flat_grey_picture_has_the_numbers_one_can_name() -> None:
    found = image_statistics(np.full((20, 40, 3), 51, np.uint8))
    assert tuple(found) == STATISTICS
    expected = {"brightness": 0.2, "red": 0.2, "green": 0.2, "blue": 0.2, "aspect": 2.0}
    assert found == pytest.approx({**dict.fromkeys(STATISTICS, 0.0), **expected}, abs=1e-6)


def test_pure_red_is_saturated_and_only_red() -> None:
    found = image_statistics(np.full((8, 8, 3), (255, 0, 0), np.uint8))
    assert (found["saturation"], found["red"], found["green"], found["blue"]) == pytest.approx((1, 1, 0, 0))


def test_two_equally_frequent_greys_hold_one_bit() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[::2] = 200
    assert image_statistics(pixels)["entropy"] == pytest.approx(1.0)


def test_blur_costs_sharpness_and_little_else(scene: Pixels) -> None:
    found = changed(scene, np.asarray(cv2.GaussianBlur(scene, (0, 0), 3), dtype=np.uint8))
    assert found["sharpness"] < 0.6
    assert 0.97 < found["brightness"] < 1.03


def test_a_brighter_lamp_moves_brightness_and_not_aspect(scene: Pixels) -> None:
    found = changed(scene, np.minimum(scene.astype(np.uint16) + 40, 255).astype(np.uint8))
    assert found["brightness"] > 1.2
    assert found["aspect"] == 1


def test_sharpness_is_the_laplacians_variance(scene: Pixels) -> None:
    luma = cv2.cvtColor(scene, cv2.COLOR_RGB2GRAY)
    assert image_statistics(scene)["sharpness"] == pytest.approx(float(cv2.Laplacian(luma, cv2.CV_64F).var()), rel=1e-4)


def test_the_hash_survives_scaling_and_recompression_and_tells_pictures_apart(scene: Pixels) -> None:
    smaller = np.asarray(cv2.resize(scene, (160, 120), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    worse = cv2.imdecode(cv2.imencode(".jpg", smaller, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR)
    turned = np.ascontiguousarray(np.rot90(scene, 2))
    assert 0 <= perceptual_hash(scene) < 2**64
    assert (perceptual_hash(scene) ^ perceptual_hash(np.asarray(worse, dtype=np.uint8))).bit_count() <= 6
    assert (perceptual_hash(scene) ^ perceptual_hash(turned)).bit_count() > 16


@pytest.mark.parametrize("shape", [(8, 8, 3), (3000, 10, 3), (1, 1, 3)])
def test_extreme_shapes_give_finite_numbers(shape: tuple[int, int, int]) -> None:
    assert all(np.isfinite(value) for value in image_statistics(np.full(shape, 7, np.uint8)).values())
