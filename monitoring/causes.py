"""Why production moved: the camera, the product mix or the defect rate. Three different people act on the three.

The class shares are taken out first: those of the window are estimated from the decisions and the confusion of the reference
(label shift; Lipton et al., ICML 2018), and the reference is weighted to them. What is still far apart then is no matter of
the defect rate. A camera changes every photograph a little or much, a new product changes some of them altogether: so the odd
photographs, which in their statistics look like none of the training, are set aside, and the rest is asked. Where the rest has
moved too, or hardly anything recent is not odd, it is the camera; where the rest is as it was, it is what was photographed.

First honest version: a change to *nothing but* new products that are also darker or softer looks like a camera, which is why
the action says to look at the pictures.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from monitoring.calibration import EMBEDDING, LABELS, SCORE, Floats, Kernel, Sample, distances
from monitoring.features import STATISTICS

Name = Literal["camera", "product_mix", "defect_rate", "unknown"]

USUAL: Final = 0.95  # share of the training photographs that are not odd
ALL_ODD: Final = 0.9  # hardly any photograph is as before
SOME_ODD: Final = 0.1  # twice what training has itself
_SHARPNESS: Final = STATISTICS.index("sharpness")
_LEAST_SCALE: Final = 0.05  # of a statistic that is the same in all of the training, such as the format
_NEIGHBOUR: Final = 3  # the distance to this nearest training photograph says how odd one is
_LEAST_NEWEST: Final = 25  # rows that say what is happening now
_LEAST_REST: Final = 10  # rows that are not odd and can be asked whether they moved
_LABEL_A_BATCH: Final = (
    "Look at the most unusual photographs, label a batch of them and ingest it; training follows by itself. "
    "Until then have a person judge these products."
)


@dataclass(frozen=True)
class Cause:
    """One cause, with what shows it and what to do, a sentence each."""

    name: Name
    evidence: str
    action: str


def find_causes(
    reference: Sample, window: Sample, thresholds: Mapping[str, float], kernel: Kernel
) -> tuple[Cause, ...]:
    """What explains that some distance is beyond its threshold; one cause in this version. Rows of the window by time."""
    found = distances(reference, window, kernel)
    moved = [name for name, value in found.items() if value > thresholds[name]]
    weights = label_shift_weights(reference, window) if {LABELS, SCORE} & set(moved) else None

    def beyond(rows: Sample) -> dict[str, float]:
        return _beyond(reference, rows, len(window), thresholds, kernel, weights)

    left = beyond(window)
    if set(STATISTICS) & {*moved, *left} and (cause := _cause_in_photographs(reference, window, moved, beyond)):
        return (cause,)
    if EMBEDDING in left:
        return (_unlike_training(left[EMBEDDING]),)
    if LABELS in moved:
        return (_shares_moved(reference, window, weights),)
    if SCORE in moved and _sureness(window) < _sureness(reference):
        return (_less_sure(reference, window),)
    return (_unknown(moved),)


def _cause_in_photographs(
    reference: Sample, window: Sample, moved: Sequence[str], beyond: Callable[[Sample], dict[str, float]]
) -> Cause | None:
    """Camera or product, by what the photographs that are not odd do; None: neither."""
    odd = odd_rows(reference, window)
    rest = window.rows(~odd)
    shifted = [name for name in STATISTICS if name in beyond(rest)] if len(rest) >= _LEAST_REST else []
    # A camera that broke an hour ago took good photographs before, so what happens now is asked of the newest ones.
    newest = max(_LEAST_NEWEST, len(window) // 4)
    odd_now = float(odd[-newest:].mean())
    signs = camera_signs(reference, window.rows(np.arange(len(window))[-newest:]), shifted or moved)
    if signs and (shifted or odd_now >= ALL_ODD):
        return _camera(signs, odd_now)
    return _odd_products(float(odd.mean()), shifted) if odd.mean() > SOME_ODD else None


def odd_rows(reference: Sample, window: Sample) -> NDArray[np.bool_]:
    """[n]: which photographs of the window are farther from all of the training, in their statistics, than those are."""
    from scipy.spatial import KDTree

    known, asked = _standardised(reference.statistics, reference.statistics, window.statistics)
    tree = KDTree(known)
    itself_and_neighbours, _ = tree.query(known, k=[_NEIGHBOUR + 1])
    usual = np.quantile(itself_and_neighbours[:, 0], USUAL)
    return np.asarray(tree.query(asked, k=[_NEIGHBOUR])[0][:, 0] > usual)


def _standardised(of: Floats, *samples: Floats) -> list[NDArray[np.float64]]:
    """In robust units of the sample `of`: centred on the median, scaled by half the middle 68 %."""

    def even(values: Floats) -> NDArray[np.float64]:
        found = values.astype(np.float64)
        found[:, _SHARPNESS] = np.log1p(found[:, _SHARPNESS])  # varies by factors, not by steps
        return found

    base = even(of)
    low, high = np.percentile(base, [16, 84], axis=0)
    scale = np.where(high > low, (high - low) / 2, np.maximum(base.std(axis=0), _LEAST_SCALE))
    return [(even(each) - np.median(base, axis=0)) / scale for each in samples]


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


def _beyond(
    reference: Sample,
    window: Sample,
    calibrated_for: int,
    thresholds: Mapping[str, float],
    kernel: Kernel,
    weights: NDArray[Any] | None,
) -> dict[str, float]:
    """Distances to the weighted reference that are beyond their thresholds.

    Both kinds of distance grow like sqrt(1/n + 1/N) by chance, so fewer effective rows raise the threshold by that.
    """
    rows = float(len(reference))
    effective = rows if weights is None else float(weights.sum() ** 2 / (weights**2).sum())
    scale = float(np.sqrt((1 / len(window) + 1 / effective) / (1 / calibrated_for + 1 / rows)))
    found = distances(reference, window, kernel, weights)
    return {name: value for name, value in found.items() if value > thresholds[name] * scale}


def camera_signs(reference: Sample, window: Sample, moved: Collection[str]) -> list[tuple[str, str]]:
    """(what is seen, what to check) for what a camera does to photographs; empty where nothing that moved is of that kind."""
    before, after = (np.median(each.statistics, axis=0) for each in (reference, window))
    change = {name: float(b - a) for name, a, b in zip(STATISTICS, before, after, strict=True)}
    ratio = {name: float(b / a) if a > 0 else 1.0 for name, a, b in zip(STATISTICS, before, after, strict=True)}
    channels = [change[name] for name in ("red", "green", "blue")]
    tint = bool({"red", "green", "blue"} & set(moved))
    exposed = (tint or "brightness" in moved) and (min(channels) >= 0 or max(channels) <= 0)
    signs = []
    if exposed:
        way = "brighter" if change["brightness"] > 0 else "darker"
        signs.append(
            (f"{way} (brightness x {ratio['brightness']:.2f})", "check exposure time, gain, aperture and lamps")
        )
    elif tint:
        signs.append(("another tint", "check white balance and the colour of the lamps"))
    # Twice the exposure is four times the variance of the Laplacian: only what goes beyond that is a matter of the lens.
    sharper = ratio["sharpness"] / (ratio["brightness"] ** 2 if exposed and ratio["brightness"] > 0 else 1.0)
    if "sharpness" in moved and sharper < 0.75:
        signs.append((f"blurred (sharpness x {ratio['sharpness']:.2g})", "check focus, vibration and dirt on the lens"))
    elif "sharpness" in moved and sharper > 2 and ratio["sharpness"] > 1.33:
        signs.append((f"sharper or noisier (sharpness x {ratio['sharpness']:.2g})", "check sensor gain and sharpening"))
    if "aspect" in moved:
        signs.append((f"another format (width / height {after[-1]:.2f})", "check resolution, cropping and mounting"))
    return signs


def _camera(signs: Sequence[tuple[str, str]], odd: float) -> Cause:
    who = f"{odd:.0%} of the newest photographs look like none of the training" if odd >= ALL_ODD else "All are shifted"
    return Cause(
        "camera",
        f"{who}: {', '.join(sign for sign, _ in signs)}.",
        f"Fix the camera, do not retrain: {'; '.join(check for _, check in signs)}. Judge again what was judged since. "
        "(If the pictures below show products that were never photographed before, label a batch of them instead.)",
    )


def _odd_products(share: float, shifted: Sequence[str]) -> Cause:
    others = (
        f"the others moved in {' and '.join(shifted)}, not as a camera would move them"
        if shifted
        else "the others are as before"
    )
    return Cause(
        "product_mix", f"{share:.0%} of the photographs look like none of the training; {others}.", _LABEL_A_BATCH
    )


def _unlike_training(distance: float) -> Cause:
    return Cause(
        "product_mix",
        f"What the network sees is unlike its training, within its classes too (embedding distance {distance:.3f}), and no "
        "change of a camera explains it.",
        _LABEL_A_BATCH,
    )


def _sureness(sample: Sample) -> float:
    """Mean probability, 0 to 1, of what the model holds for true: a defect or none, or the top class."""
    return float((np.maximum(sample.score, 1 - sample.score) if sample.defects else sample.score).mean())


def _less_sure(reference: Sample, window: Sample) -> Cause:
    sure = f"{_sureness(window):.0%} sure of its answers on average, against {_sureness(reference):.0%} in training"
    return Cause(
        "product_mix", f"The model is {sure}, although the photographs are as bright and sharp as ever.", _LABEL_A_BATCH
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
    return Cause(
        "unknown",
        f"What moved is {', '.join(moved)}, and neither a camera nor a product nor the defect rate explains it.",
        "Have a person judge fifty of the photographs and compare with the answers before anything is changed.",
    )
