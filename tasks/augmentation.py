"""How training photographs are varied: whole batches at once, each photograph on its own."""

import torch
from torch import Tensor

from tasks.recipe import Augmentation


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """uint8 [N, S, S, 3] -> float32 [N, S, S, 3] in 0..255, each photograph varied on its own.

    The generator lives on the CPU, so the same seed gives the same variations on every device.
    """
    count = len(images)

    def chosen() -> Tensor:
        return (torch.rand(count, generator=generator) < 0.5).to(images.device).view(-1, 1, 1, 1)

    def drawn(reach: float) -> Tensor:
        return ((torch.rand(count, generator=generator) * 2 - 1) * reach).to(images.device).view(-1, 1, 1, 1)

    if how.flip_horizontal:
        images = torch.where(chosen(), images.flip(2), images)
    if how.flip_vertical:
        images = torch.where(chosen(), images.flip(1), images)
    if how.quarter_turns:
        turns = torch.randint(0, 4, (count,), generator=generator).tolist()
        images = torch.stack([image.rot90(turn, (0, 1)) for image, turn in zip(images, turns, strict=True)])
    if how.shift:
        images = _shifted(images, how.shift, generator)
    varied = images.to(torch.float32)
    if how.contrast:
        middle = varied.mean(dim=(1, 2, 3), keepdim=True)
        varied = (varied - middle) * (1 + drawn(how.contrast)) + middle
    if how.brightness:
        varied = varied + 255 * drawn(how.brightness)
    return varied.clamp_(0, 255) if how.contrast or how.brightness else varied


def _shifted(images: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """Each photograph moved by up to `reach` of its side, its edge pixels repeated into the gap."""
    count, side = images.shape[0], images.shape[1]
    offsets = torch.randint(-round(reach * side), round(reach * side) + 1, (2, count, 1), generator=generator)
    rows, columns = (torch.arange(side) + offsets).clamp(0, side - 1).to(images.device)
    return images[torch.arange(count, device=images.device).view(-1, 1, 1), rows[:, :, None], columns[:, None, :]]
