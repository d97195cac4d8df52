"""What the processes of one training tell each other. Alone, a process tells itself, which costs nothing.

Every method but `share` is a meeting: all processes call it, in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class ProcessGroup:
    """Process `rank` of `count`; the first one decides, reports and keeps. here: how many of them share this machine."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU
    here: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of so many photographs: contiguous, nearly equal, all parts together everything."""
        bounds = np.linspace(0, count, self.count + 1).round().astype(int)
        return slice(int(bounds[self.rank]), int(bounds[self.rank + 1]))

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network with its gradients averaged over the processes in every backward pass."""
        if self.count == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(network, device_ids=[self.device] if self.device.type == "cuda" else None)

    def total(self, part: NDArray[Any]) -> NDArray[Any]:
        """The sum of everybody's array, element by element."""
        if self.count == 1:
            return part
        together = torch.from_numpy(part.copy()).to(self.device)
        torch.distributed.all_reduce(together)
        return together.cpu().numpy()

    def agreed(self, values: Sequence[float]) -> tuple[float, ...]:
        """The first process's values: what depends on a clock must not differ between processes."""
        if self.count == 1:
            return tuple(values)
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(told, 0)
        return tuple(told.tolist())

    def everybodys(self, value: Any) -> list[Any]:
        """One value from each process, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def share_buffers(self, network: nn.Module) -> None:
        """The first process's buffers (running statistics of batch norms) for all, so that all validate one network."""
        if self.count > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's global random state: that of the CPU, and of the GPU where there is one."""
    found = {"cpu": torch.get_rng_state()}
    return {**found, "cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else found


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
