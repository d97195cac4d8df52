"""Photograph -> statistics that say what a camera, a lamp or a product mix changed. Pure: pixels in, numbers out."""

import math
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

STATISTICS: Final = ("brightness", "contrast", "sharpness", "saturation", "entropy", "red", "green", "blue", "aspect")
_LONGEST_SIDE: Final = 512  # sharpness depends on scale, and statistics of a 40-megapixel picture cost a second


def luma_of(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB -> [H, W]: what the eye sees of it without colour. Both functions below begin with it."""
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def image_statistics(pixels: NDArray[np.uint8], luma: NDArray[np.uint8] | None = None) -> dict[str, float]:
    """[H, W, 3] uint8 RGB -> one number for each of STATISTICS. `luma`: `luma_of(pixels)`, where it is at hand.

    Measured on the picture scaled down to at most 512 on its longer side, colours by a whole factor.

    brightness, contrast: mean and standard deviation of the luma, 0 to 1. sharpness: variance of the Laplacian of the luma in
    grey levels (Pech-Pacheco et al., ICPR 2000). saturation: mean of HSV saturation, 0 to 1. entropy: of the luma's
    histogram, 0 to 8 bits. red, green, blue: channel means, 0 to 1. aspect: width / height.
    """
    height, width = pixels.shape[:2]
    fine = _scaled_down(luma_of(pixels) if luma is None else luma)
    coarse = _reduced(pixels, math.ceil(max(height, width) / _LONGEST_SIDE))
    mean, deviation = cv2.meanStdDev(fine)
    edges = cv2.Laplacian(fine, cv2.CV_16S)
    shares = cv2.calcHist([fine], [0], None, [256], [0, 256]).ravel().astype(np.float64) / fine.size
    present = shares[shares > 0]
    red, green, blue, _ = cv2.mean(coarse)
    return {
        "brightness": float(mean[0, 0]) / 255,
        "contrast": float(deviation[0, 0]) / 255,
        "sharpness": cv2.norm(edges, cv2.NORM_L2SQR) / edges.size - cv2.mean(edges)[0] ** 2,
        "saturation": cv2.mean(cv2.cvtColor(coarse, cv2.COLOR_RGB2HSV))[1] / 255,
        "entropy": max(0.0, float(-(present * np.log2(present)).sum())),
        "red": red / 255,
        "green": green / 255,
        "blue": blue / 255,
        "aspect": width / height,
    }


def perceptual_hash(pixels: NDArray[np.uint8], luma: NDArray[np.uint8] | None = None) -> int:
    """[H, W, 3] uint8 RGB -> 64-bit pHash: signs of the 8x8 lowest DCT coefficients of the 32x32 luma about their median.

    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010. Near-duplicates differ in few bits,
    but few differing bits prove nothing by themselves: a hash proposes, pixels decide.
    """
    square = cv2.resize(luma_of(pixels) if luma is None else luma, (32, 32), interpolation=cv2.INTER_AREA).astype(
        np.float32
    )
    lowest = cv2.dct(square)[:8, :8].ravel()
    bits = lowest > np.median(lowest[1:])  # without the mean, which would drown the rest
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _scaled_down(luma: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """By a whole factor over the pixel area as far as that goes, then linearly: a quarter of the time of one area step."""
    height, width = luma.shape
    longest = max(height, width)
    if longest <= _LONGEST_SIDE:
        return luma
    scale = _LONGEST_SIDE / longest
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    reduced = _reduced(luma, longest // _LONGEST_SIDE)
    return np.asarray(cv2.resize(reduced, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def _reduced(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Means over factor x factor pixels; what is left over at the right and lower edge does not count."""
    if factor == 1:
        return pixels
    height, width = (max(1, side // factor) for side in pixels.shape[:2])
    whole = pixels[: height * factor, : width * factor]
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
