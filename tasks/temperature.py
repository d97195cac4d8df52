"""Scores that mean what they say: one temperature divides the logits of a finished network. numpy and scipy only.

Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017) changes no ranking of the classes of a
photograph, only how sure the network says it is.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

LEAST, MOST = 0.05, 20.0
UNCHANGED: Final = 1.0


@dataclass(frozen=True)
class Calibration:
    """The temperature, and the mean negative log-likelihood of the split it was fitted on before (temperature 1) and after."""

    temperature: float
    nll_before: float
    nll_after: float


def fit_temperature(logits: NDArray[Any], truth: NDArray[np.int64], weights: NDArray[Any] | None = None) -> Calibration:
    """The temperature in [0.05, 20] for [N, C] logits and [N] true classes; never worse than temperature 1 by likelihood.
    weights: what each photograph [N] counts; all the same when left out.

    Each target leaves 1 / (N + C) to the classes that are not the truth, as Platt (1999) does for his sigmoid: a few dozen
    photographs that all are right would else ask for temperature 0, and for scores of exactly 0 and 1.
    """
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits, dtype=np.float64)
    if len(truth) == 0 or logits.shape[:1] != truth.shape:
        raise ValueError(f"a temperature needs photographs: logits of shape {logits.shape} for {len(truth)} labels")
    if not np.isfinite(logits).all():
        raise ValueError("the logits hold values that are not finite: the model has diverged")
    targets = _softened(truth, logits.shape[1])

    def loss(log_temperature: float) -> float:
        return _cross_entropy(logits / np.exp(log_temperature), targets, weights)

    # In the inverse temperature the loss is convex, so in its logarithm it has one minimum: a bounded search finds it.
    found = minimize_scalar(loss, bounds=(np.log(LEAST), np.log(MOST)), method="bounded", options={"xatol": 1e-4})
    temperature = float(np.exp(found.x))
    before, after = (negative_log_likelihood(logits / t, truth, weights) for t in (UNCHANGED, temperature))
    return Calibration(temperature, before, after) if after < before else Calibration(UNCHANGED, before, before)


def negative_log_likelihood(
    logits: NDArray[Any], truth: NDArray[np.int64], weights: NDArray[Any] | None = None
) -> float:
    """Mean over the photographs, in nats; [N, C] logits, [N] true classes, [N] weights of the mean."""
    return _cross_entropy(np.asarray(logits, dtype=np.float64), np.eye(logits.shape[1])[truth], weights)


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """[N, C] logits -> probabilities."""
    from scipy.special import softmax as of

    probabilities: NDArray[np.float32] = of(np.asarray(logits, dtype=np.float64), axis=1).astype(np.float32)
    return probabilities


def _softened(truth: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    left = 1.0 / (len(truth) + classes)
    return np.where(np.eye(classes, dtype=bool)[truth], 1.0 - left, left / (classes - 1))


def _cross_entropy(
    logits: NDArray[np.float64], targets: NDArray[np.float64], weights: NDArray[Any] | None = None
) -> float:
    from scipy.special import log_softmax

    return float(np.average(-(targets * log_softmax(logits, axis=1)).sum(axis=1), weights=weights))
