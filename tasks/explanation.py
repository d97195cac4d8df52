"""Where a network looked: Grad-CAM heat maps (Selvaraju et al., ICCV 2017; captum's) of single decisions.

The heat says which part of a photograph spoke for the decided class. It is a reason to look closer and no proof: two networks
with equal answers may show different heat.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.contact_sheet import Pair, pair_sheet
from tasks.decision import score

if TYPE_CHECKING:
    from torch import nn

    from tasks.judgement import Finding
    from tasks.model import ImageNetwork

GOOD_GRID: Final = 4  # a coarser map than 4x4 says hardly more than "left" or "right"
COLOURS: Final = 3  # a map with no more channels than that is the photograph itself, not features of it
SHOWN: Final = 8  # errors, and as many right decisions
STRENGTH: Final = 0.6  # how far the hottest pixel is painted over
_BATCH: Final = 16


@dataclass(frozen=True)
class Place:
    """The layer whose maps are weighed, and their height and width."""

    layer: "nn.Module"
    grid: tuple[int, int]


def explain(network: "ImageNetwork", images: NDArray[np.uint8], finding: "Finding") -> bytes | str:
    """A PNG with the heat of the worst errors and of a sample of right decisions, or why there is none.

    images: uint8 [N, S, S, 3], the photographs of the finding in its order. What is explained is the decided class.
    """
    chosen = choose(finding.probabilities, finding.decided, finding.truth)
    shown = [*chosen.errors, *chosen.right]
    heat = heat_maps(network, np.asarray(images[shown]), finding.decided[shown])
    if heat is None:
        return "No heat maps: this network has no stage that keeps the places of a photograph apart."
    painted = dict(zip(shown, heat, strict=True))

    def pair(position: int) -> Pair:
        photograph = np.asarray(images[position])
        return Pair(photograph, overlay(photograph, painted[position]), _told(finding, position))

    blocks = (("Worst errors", chosen.errors), ("Right decisions, a sample of each class", chosen.right))
    return pair_sheet([(heading, [pair(place) for place in places]) for heading, places in blocks if places])


def _told(finding: "Finding", position: int) -> tuple[str, ...]:
    labels, decided, truth = finding.rule.labels, finding.decided[position], finding.truth[position]
    score_of_it = score(finding.probabilities[position : position + 1], finding.rule)[0]
    said = f"said {labels[decided]}, score {score_of_it:.2f}"
    return (said, f"is {labels[truth]}") if decided != truth else (said,)


def heat_maps(
    network: "ImageNetwork", images: NDArray[np.uint8], classes: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """uint8 [N, S, S, 3] and the class [N] to explain for each -> heat [N, S, S] from 0 to 1, the hottest pixel of each at 1.

    None when the network has no stage that keeps places apart, as an MLP has none. A photograph where nothing speaks for the
    class is 0 everywhere.
    """
    import torch
    from captum.attr import LayerGradCam  # type: ignore[import-untyped]

    network = network.cpu().eval()
    place = last_spatial_place(network, images[:1]) if len(images) else None
    if place is None:
        return None
    cam, parts = LayerGradCam(network.classifier, place.layer), []
    for start in range(0, len(images), _BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(images[start : start + _BATCH]))
        # Of the input too, so that there is a gradient where the first stages are frozen.
        normalised = network.normalise(batch).contiguous().requires_grad_()
        targets = torch.from_numpy(np.ascontiguousarray(classes[start : start + _BATCH]))
        parts.append(cam.attribute(normalised, targets, relu_attributions=True).detach().numpy()[:, 0])
    side = images.shape[1]
    return np.stack([_at_full_size(each, side) for part in parts for each in part])


def _at_full_size(coarse: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    fine = cv2.resize(coarse.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    hottest = float(fine.max())
    return np.asarray(fine / hottest if hottest > 0 else fine, dtype=np.float32)


def last_spatial_place(network: "ImageNetwork", image: NDArray[np.uint8]) -> Place | None:
    """The deepest layer whose maps have at least 4x4 places, else at least 2x2; None when there is none. image: [1, S, S, 3].

    Found by looking at what one photograph leaves behind, so that it holds for any network. The last layer that ran is taken:
    an activation that works in place has already changed what the layers before it left.
    """
    import torch

    seen: list[Place] = []

    def note(layer: "nn.Module", _: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return
        if output.ndim == 3:  # tokens: from here on a transformer mixes all places
            seen.clear()
        if output.ndim == 4 and output.shape[1] > COLOURS:
            seen.append(Place(layer, (int(output.shape[2]), int(output.shape[3]))))

    with _hooked(network.classifier.stages, note), torch.no_grad():
        network.classifier.embed(network.normalise(torch.from_numpy(np.ascontiguousarray(image))))
    for least in (GOOD_GRID, 2):
        fine = [place for place in seen if min(place.grid) >= least]
        if fine:
            return fine[-1]
    return None


@contextmanager
def _hooked(stages: "nn.Module", note: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(note) for layer in stages.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [S, S, 3] RGB and heat [S, S] -> the photograph, painted where the heat is and as it was elsewhere."""
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[:, :, ::-1]
    share = STRENGTH * heat[:, :, None]
    return np.asarray(image * (1 - share) + colours * share, dtype=np.uint8)


@dataclass(frozen=True)
class Chosen:
    """Positions of the photographs to show: errors, the worst first; right decisions, class by class in turn."""

    errors: tuple[int, ...]
    right: tuple[int, ...]


def choose(probabilities: NDArray[Any], decided: NDArray[Any], truth: NDArray[Any], count: int = SHOWN) -> Chosen:
    """The errors that gave the truth the least probability, and a sample of right decisions: the first ones of each class.

    Rows stand in the order of their sha256, so the first ones are as good as drawn, and the same in every run.
    """
    wrong = np.flatnonzero(decided != truth)
    worst = wrong[np.argsort(probabilities[wrong, truth[wrong]], kind="stable")]
    by_class = [np.flatnonzero((decided == truth) & (truth == label)) for label in np.unique(truth)]
    return Chosen(tuple(worst[:count].tolist()), tuple(_in_turn(by_class, count)))


def _in_turn(groups: Sequence[NDArray[np.int64]], count: int) -> list[int]:
    longest = max((len(group) for group in groups), default=0)
    return [int(group[place]) for place in range(longest) for group in groups if place < len(group)][:count]
