"""Why production moved: the camera, the product mix or the defect rate. Three different people act on the three.

In this order, because each explains what follows it:
1. camera      the photographs themselves changed, nearly all of them together, whatever was on them;
2. product mix the network sees things unlike its training, within a class too, while a good part stays as it was;
3. defect rate the classes are as ever and only their shares moved.

The shares are taken out first: the class shares of the window are estimated from the decisions and the confusion of the
reference (label shift; Lipton et al., ICML 2018), and the reference is weighted to them. What is still far apart then is no
matter of the defect rate. First honest version: a change-over of *all* products whose photographs also differ in brightness
or sharpness looks like a camera, which is why the action says to look at the pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from monitoring.calibration import EMBEDDING, LABELS, SCORE, Floats, Kernel, Sample, distances
from monitoring.features import STATISTICS

Name = Literal["camera", "product_mix", "defect_rate", "unknown"]

MOST_CHANGED: Final = 0.5  # beyond this share of changed photographs it is the camera and no product among others
_MASSES: Final = (0.25, 0.5, 0.75)  # of the reference, in a region where the window is looked for
_CONFIDENCE: Final = 0.95
_AT_LEAST: Final = 25  # newest rows that say what is happening now


@dataclass(frozen=True)
class Cause:
    """One cause, with what shows it and what to do, a sentence each."""

    name: Name
    evidence: str
    action: str


def find_causes(
    reference: Sample, window: Sample, thresholds: Mapping[str, float], kernel: Kernel
) -> tuple[Cause, ...]:
    """What explains that some distance is beyond its threshold, the most urgent first; never empty.

    The rows of the window are in order of time: whether a camera changed is asked of the newer half.
    """
    found = distances(reference, window, kernel)
    answers_moved = [name for name in (LABELS, SCORE) if found[name] > thresholds[name]]
    weights = label_shift_weights(reference, window) if answers_moved else None
    beyond = _beyond(reference, window, thresholds, kernel, weights)
    photographic = [name for name in STATISTICS if name in beyond]
    if photographic:
        newest = window.rows(np.arange(len(window))[-max(_AT_LEAST, len(window) // 2) :])
        unchanged = max(unchanged_share(reference, newest, None), unchanged_share(reference, newest, weights))
        if unchanged < 1 - MOST_CHANGED or EMBEDDING not in beyond:
            return (_camera(reference, newest, photographic, unchanged),)
    causes = [_unlike_training(beyond[EMBEDDING])] if EMBEDDING in beyond else []
    if LABELS in answers_moved:
        causes.append(_shares_moved(reference, window, weights))
    return tuple(causes) or (_unknown(answers_moved),)


def label_shift_weights(reference: Sample, window: Sample) -> NDArray[np.float64]:
    """[N] weights of the reference rows under which its true classes have the shares that the window must have."""
    from scipy.optimize import nnls

    if reference.truth is None:
        raise ValueError("the reference has no true classes: it cannot tell a defect rate from anything else")
    classes = len(reference.labels)
    given = np.bincount(reference.truth, minlength=classes).astype(float)
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (reference.label, reference.truth), 1.0)
    confusion /= np.maximum(given, 1)
    decided = np.bincount(window.label, minlength=classes) / len(window)
    # The last row asks the shares to sum to one: a poor confusion matrix alone may leave them at any scale.
    shares, _ = nnls(np.vstack([confusion, np.ones(classes)]), np.append(decided, 1.0))
    shares[given == 0] = 0
    if shares.sum() <= 0:
        return np.ones(len(reference))
    per_class = np.divide(shares / shares.sum(), given, out=np.zeros(classes), where=given > 0)
    return np.asarray(per_class[reference.truth] * len(reference))


def unchanged_share(reference: Sample, window: Sample, weights: NDArray[Any] | None) -> float:
    """At most this share [0, 1] of the window can be photographs as in the reference (confidence 0.95 for each look).

    A product among others leaves the rest in place: a quarter of the reference's brightness range holds at least a quarter of
    that rest. A camera deserts it. (Mixture proportion: Blanchard, Lee and Scott, JMLR 2010, on half-lines.)
    """
    return min(
        _least_ratio(sign * reference.statistics[:, column], sign * window.statistics[:, column], weights)
        for column in range(len(STATISTICS))
        for sign in (1, -1)
    )


def _least_ratio(reference: Floats, window: Floats, weights: NDArray[Any] | None) -> float:
    from scipy.stats import beta

    order = np.argsort(reference, kind="stable")
    mass = np.ones(len(reference)) if weights is None else weights[order]
    cumulated = np.cumsum(mass) / mass.sum()
    least = 1.0
    for wanted in _MASSES:
        edge = reference[order][min(int(np.searchsorted(cumulated, wanted)), len(order) - 1)]
        share = float(
            cumulated[np.searchsorted(reference[order], edge, side="right") - 1]
        )  # with those equal to the edge
        inside = int((window <= edge).sum())
        if inside < len(window):
            most = float(beta.ppf(_CONFIDENCE, inside + 1, len(window) - inside))
            least = min(least, most / share)
    return least


def _beyond(
    reference: Sample,
    window: Sample,
    thresholds: Mapping[str, float],
    kernel: Kernel,
    weights: NDArray[Any] | None,
) -> dict[str, float]:
    """Distances to the weighted reference that are beyond their thresholds.

    Both kinds of distance grow like sqrt(1/n + 1/N) by chance, so fewer effective rows raise the threshold by that.
    """
    size, rows = len(window), float(len(reference))
    effective = rows if weights is None else float(weights.sum() ** 2 / (weights**2).sum())
    scale = float(np.sqrt((1 / size + 1 / effective) / (1 / size + 1 / rows)))
    found = distances(reference, window, kernel, weights)
    return {name: value for name, value in found.items() if value > thresholds[name] * scale}


def _camera(reference: Sample, newest: Sample, moved: Sequence[str], unchanged: float) -> Cause:
    signs = camera_signs(reference, newest, moved)
    share = (
        f"At least {1 - unchanged:.0%} of the newest photographs changed" if unchanged < 1 else "Photographs changed"
    )
    return Cause(
        "camera",
        f"{share}, whatever is on them: {', '.join(sign for sign, _ in signs)}.",
        f"Fix the camera, do not retrain: {'; '.join(check for _, check in signs)}. Judge again what was judged since."
        " If the pictures show products that were never photographed before, label a batch of them instead.",
    )


def camera_signs(reference: Sample, window: Sample, moved: Sequence[str]) -> list[tuple[str, str]]:
    """(what is seen, what to check) of photographic statistics that moved."""
    before, after = (np.median(each.statistics, axis=0) for each in (reference, window))
    change = {name: float(b - a) for name, a, b in zip(STATISTICS, before, after, strict=True)}
    ratio = {name: float(b / a) if a > 0 else 1.0 for name, a, b in zip(STATISTICS, before, after, strict=True)}
    channels = [change[name] for name in ("red", "green", "blue")]
    together = min(channels) >= 0 or max(channels) <= 0
    signs = []
    if {"brightness", "red", "green", "blue"} & set(moved) and together:
        way = "brighter" if change["brightness"] > 0 else "darker"
        signs.append((f"{way} (brightness x {ratio['brightness']:.2f})", "check exposure time, gain and lamps"))
    elif {"red", "green", "blue"} & set(moved):
        signs.append(("another tint", "check white balance and the colour of the lamps"))
    if "sharpness" in moved and ratio["sharpness"] < 1:
        signs.append((f"blurred (sharpness x {ratio['sharpness']:.2f})", "check focus, vibration and dirt on the lens"))
    elif "sharpness" in moved:
        signs.append(
            (f"sharper or noisier (sharpness x {ratio['sharpness']:.2f})", "check gain, sensor and sharpening")
        )
    if "aspect" in moved:
        signs.append((f"another format (width / height {after[-1]:.2f})", "check resolution, cropping and mounting"))
    if not signs:
        signs.append((f"other {' and '.join(moved)}", "check lamps, gain and image settings"))
    return signs


def _unlike_training(distance: float) -> Cause:
    return Cause(
        "product_mix",
        f"The network sees photographs unlike its training within its classes too (embedding distance {distance:.3f}), "
        "while the rest of the photographs is as it was.",
        "Look at the most unusual photographs, label a batch of them and ingest it; training follows by itself. "
        "Until then have a person judge these products.",
    )


def _shares_moved(reference: Sample, window: Sample, weights: NDArray[Any] | None) -> Cause:
    if not reference.defects:
        return Cause(
            "product_mix",
            f"The shares of the known classes moved: {_greatest_change(reference, window)}.",
            "Nothing to repair and no reason to retrain when this mix is meant; the classes are those of the training.",
        )
    mask = np.isin(reference.labels, reference.defects)
    before = float(mask[reference.label].mean())
    after = float(mask[window.label].mean())
    estimated = ""
    if weights is not None and reference.truth is not None:
        share = float(np.average(mask[reference.truth], weights=weights))
        estimated = f", corrected for the errors the model is known to make {share:.0%}"
    return Cause(
        "defect_rate",
        f"Judged defective: {after:.0%} of the photographs against {before:.0%} of the training reference{estimated}.",
        "Look for the reason in production, not in the model: material, tools, shift. Do not retrain; "
        "have a sample of the rejected ones confirmed by a person.",
    )


def _greatest_change(reference: Sample, window: Sample) -> str:
    before, after = (np.bincount(each.label, minlength=len(each.labels)) / len(each) for each in (reference, window))
    most = np.argsort(-np.abs(after - before))[:2]
    return ", ".join(f"{reference.labels[i]} {before[i]:.0%} -> {after[i]:.0%}" for i in most)


def _unknown(moved: Sequence[str]) -> Cause:
    what = "how sure the model is" if moved else "no single property of the photographs"
    return Cause(
        "unknown",
        f"What moved is {what}; camera, product mix and defect rate are within their bounds.",
        "Have a person judge fifty of the photographs and compare with the answers before anything is changed.",
    )
