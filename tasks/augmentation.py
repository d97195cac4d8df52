"""How training photographs are varied: whole batches at once, each photograph on its own.

What is asked is drawn first (`drawn`), then done (`varied`): every movement together as one affine map of the coordinates,
every change of colour together as one affine map of the colours. So a batch is read once however much is asked, and no
photograph is resampled or clipped twice.
"""

import math
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from tasks.recipe import Augmentation

LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601
TO_YIQ: Final = (LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
GAMMA: Final = (
    2.2  # stored values are about light ** (1 / GAMMA): a stop more light is a factor of 2 ** (1 / GAMMA) of them
)


@dataclass(frozen=True)
class Variation:
    """What happens to each of N photographs; on the CPU, None where the recipe does not ask for it.

    mirrored (left and right), flipped (top and bottom): bool [N]; turns: quarter turns against the clock, int64 [N]; shift:
    pixels down and right that the view moves, int64 [2, N]; angle: degrees against the clock, float [N]; contrast, brightness,
    saturation, zoom: shares in -reach..reach; hue: share of the colour circle; exposure: stops; all float [N]. erased: top,
    left, bottom, right of what is covered, in pixels, int64 [4, N].
    """

    mirrored: Tensor | None = None
    flipped: Tensor | None = None
    turns: Tensor | None = None
    shift: Tensor | None = None
    contrast: Tensor | None = None
    brightness: Tensor | None = None
    angle: Tensor | None = None
    saturation: Tensor | None = None
    hue: Tensor | None = None
    exposure: Tensor | None = None
    zoom: Tensor | None = None
    erased: Tensor | None = None

    def of(self, some: slice) -> "Variation":
        """The variation of some of the photographs."""
        held = ((field.name, getattr(self, field.name)) for field in fields(self))
        return Variation(**{name: values[..., some] for name, values in held if values is not None})


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """uint8 [N, S, S, 3] -> float32 [N, S, S, 3] in 0..255, each photograph varied on its own.

    The generator lives on the CPU, so the same seed gives the same variations on every device.
    """
    return varied(images, drawn(len(images), images.shape[1], how, generator))


def drawn(count: int, side: int, how: Augmentation, generator: torch.Generator) -> Variation:
    """Variations for `count` photographs of `side` pixels. Only what is asked for draws from the generator."""

    def chosen(asked: bool) -> Tensor | None:
        return torch.rand(count, generator=generator) < 0.5 if asked else None

    def within(reach: float) -> Tensor | None:
        return (torch.rand(count, generator=generator) * 2 - 1) * reach if reach else None

    pixels = round(how.shift * side)
    return Variation(
        mirrored=chosen(how.flip_horizontal),
        flipped=chosen(how.flip_vertical),
        turns=torch.randint(0, 4, (count,), generator=generator) if how.quarter_turns else None,
        shift=torch.randint(-pixels, pixels + 1, (2, count), generator=generator) if how.shift else None,
        contrast=within(how.contrast),
        brightness=within(how.brightness),
        angle=within(how.rotation),
        saturation=within(how.saturation),
        hue=within(how.hue),
        exposure=within(how.exposure),
        zoom=within(how.zoom),
        erased=_covered(count, side, how.erase, generator) if how.erase else None,
    )


def _covered(count: int, side: int, share: float, generator: torch.Generator) -> Tensor:
    """[4, N]: a square for each photograph, its area between nothing and `share`, its middle anywhere, cut off at the edges."""
    half = torch.rand(count, generator=generator).sqrt() * math.sqrt(share) * side / 2
    middle = torch.rand(2, count, generator=generator) * side
    return torch.cat([middle - half, middle + half]).round().long().clamp_(0, side)


def varied(images: Tensor, variation: Variation) -> Tensor:
    """uint8 [N, S, S, 3] -> float32 [N, S, S, 3] in 0..255, in channels-last memory. What moves in from outside the picture is
    its edge, repeated.
    """
    if all(getattr(variation, field.name) is None for field in fields(variation)):
        return images.to(torch.float32)
    with torch.autocast(images.device.type, enabled=False):  # half a precision is half a grey level
        # Colour planes: sampling and mixing take half the time on them.
        planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        moves = _moves(variation, len(images), images.shape[1])
        if moves is not None:
            exact = variation.angle is None and variation.zoom is None
            planes = _moved(planes, moves.to(images.device), exact)
        planes = _recoloured(planes, variation)
        if variation.erased is not None:
            planes = _erased(planes, variation.erased.to(images.device))
        return planes.permute(0, 2, 3, 1).contiguous()


def _erased(planes: Tensor, squares: Tensor) -> Tensor:
    """[N, 3, S, S] -> the same with a square of each in the photograph's mean colour (DeVries and Taylor, "Cutout", 2017)."""
    along = torch.arange(planes.shape[2], device=planes.device)
    top, left, bottom, right = squares[:, :, None]
    inside = ((along >= top) & (along < bottom))[:, None, :, None] & ((along >= left) & (along < right))[:, None, None]
    return torch.where(inside, planes.mean(dim=(2, 3), keepdim=True), planes)


def _moves(variation: Variation, count: int, side: int) -> Tensor | None:
    """[N, 2, 3]: where the pixel at (x, y, 1) is taken from, both in -1..1 from the middle; None: nothing moves."""
    of = variation
    if all(each is None for each in (of.mirrored, of.flipped, of.turns, of.shift, of.angle, of.zoom)):
        return None
    moves = torch.eye(2).repeat(count, 1, 1)
    for axis, turned_over in ((0, of.mirrored), (1, of.flipped)):
        if turned_over is not None:
            moves[turned_over, axis, axis] = -1.0
    if of.turns is not None:
        quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        moves = moves @ torch.stack([torch.linalg.matrix_power(quarter, turns) for turns in range(4)])[of.turns]
    if of.angle is not None:
        cosine, sine = of.angle.deg2rad().cos(), of.angle.deg2rad().sin()
        moves = moves @ torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2)
    if of.zoom is not None:
        moves = moves / (1 + of.zoom).view(-1, 1, 1)
    by = torch.zeros(count, 2, 1) if of.shift is None else of.shift.flip(0).T[:, :, None] * (2 / side)
    return torch.cat([moves, moves @ by], 2)


def _moved(planes: Tensor, moves: Tensor, exact: bool) -> Tensor:
    """[N, 3, S, S] -> the same, each pixel taken from where `moves` says; exact: they lead from pixel to pixel."""
    count, _, side, _ = planes.shape
    along = (torch.arange(side, device=planes.device) * 2 + 1) / side - 1
    grid = torch.empty(count, side, side, 2, device=planes.device)
    for axis in (0, 1):  # four times faster than in one: the broadcast runs along the rows and not over pairs
        across, down, from_middle = moves[:, axis, :, None, None].unbind(1)
        torch.add(down * along[:, None] + from_middle, across * along, out=grid[..., axis])
    mode = "nearest" if exact else "bilinear"
    return grid_sample(planes, grid, mode=mode, padding_mode="border", align_corners=False)


def _recoloured(planes: Tensor, variation: Variation) -> Tensor:
    """[N, 3, S, S] -> the same, with another exposure, hue and saturation, contrast about the photograph's mean, brightness: in
    that order, and clipped at the end.
    """
    of, device = variation, planes.device
    if all(each is None for each in (of.contrast, of.brightness, of.saturation, of.hue, of.exposure)):
        return planes
    light = _factor(None if of.exposure is None else 2 ** (of.exposure / GAMMA), device)
    contrast = _factor(None if of.contrast is None else 1 + of.contrast, device)
    offset = _factor(None if of.brightness is None else 255 * of.brightness, device, neutral=0.0)
    mixing = _mixing(of)
    if of.contrast is not None:
        middle = planes.mean(dim=(2, 3))
        middle = middle if mixing is None else (mixing.to(device) @ middle[:, :, None])[:, :, 0]
        offset = offset + (1 - contrast) * light * middle.mean(dim=1).view(-1, 1, 1, 1)
    if mixing is None:
        return (planes * (light * contrast)).add_(offset).clamp_(0, 255)
    matrices = mixing.to(device) * (light * contrast).view(-1, 1, 1)
    return torch.baddbmm(offset.view(-1, 1, 1), matrices, planes.flatten(2)).clamp_(0, 255).view_as(planes)


def _factor(values: Tensor | None, device: torch.device, neutral: float = 1.0) -> Tensor:
    """[N, 1, 1, 1], or [1, 1, 1, 1] of the neutral value."""
    return (torch.tensor([neutral]) if values is None else values).to(device).view(-1, 1, 1, 1)


def _mixing(variation: Variation) -> Tensor | None:
    """[N, 3, 3]: RGB to RGB; None: colours stay. Saturation goes from and to the luma; hue turns about the greys in YIQ."""
    luma, yiq = torch.tensor(LUMA), torch.tensor(TO_YIQ)
    mixing: Tensor | None = None
    if variation.hue is not None:
        cosine, sine = (part(variation.hue * 2 * math.pi) for part in (torch.cos, torch.sin))
        one, none = torch.ones_like(cosine), torch.zeros_like(cosine)
        turned = torch.stack([one, none, none, none, cosine, sine, none, -sine, cosine], 1).view(-1, 3, 3)
        mixing = torch.linalg.inv(yiq) @ turned @ yiq
    if variation.saturation is not None:
        share = (1 + variation.saturation).view(-1, 1, 1)
        faded = share * torch.eye(3) + (1 - share) * luma
        mixing = faded if mixing is None else faded @ mixing
    return mixing
