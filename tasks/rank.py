"""One rank of a training in several processes: what torchrun starts, here `python -m tasks.rank <parent> <folder>`.

parent: the process to end with; 0 where a rank is a container of its own, which something else ends.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.loop import Epoch, State
    from tasks.training import Trained


def main() -> None:
    parent, folder = int(sys.argv[1]), Path(sys.argv[2])
    if parent:
        end_with_parent(parent, signal.SIGKILL)
    from torch.distributed.elastic.multiprocessing.errors import record

    record(work)(folder)


def end_with_parent(parent: int, by: signal.Signals) -> None:
    """Linux: this process gets the signal when its parent is gone, however it went; at once when it is gone already."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, by)
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which this one works for, is gone")


def work(folder: Path) -> None:
    """Train this rank's share; rank 0 tells of epochs and states, and leaves the result."""
    import torch
    from torch import distributed
    from torch.distributed.elastic.utils.api import get_env_variable_or_raise

    from tasks.distributed import read_job
    from tasks.process_group import ProcessGroup
    from tasks.training import train_here

    job, keeps = read_job(folder)
    told = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # by torchrun, and by what stands in for it
    rank, count, place, here = (int(get_env_variable_or_raise(name)) for name in told)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(place)
    device = torch.device("cuda", place) if on_gpu else torch.device("cpu")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=count
    )
    teller = Teller(folder)
    trained = train_here(
        ProcessGroup(rank, count, device, here),
        *(job.training, job.validation, job.classes, job.config, teller.epoch, job.weights, job.state),
        save=teller.state if keeps else None,
    )
    if rank == 0:
        teller.result(trained)
    distributed.destroy_process_group()


class Teller:
    """What rank 0 tells the process that launched it: files in order, each whole when its name appears."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, 0

    def epoch(self, epoch: "Epoch") -> None:
        self._tell("epoch.json", lambda path: path.write_text(json.dumps(asdict(epoch))))

    def state(self, state: "State") -> None:
        """Waits while an earlier one has not been taken: states do not pile up faster than they can be kept."""
        import torch

        while any((self.folder / "out").glob("[0-9]*.state.pt")):
            time.sleep(0.02)
        self._tell("state.pt", lambda path: torch.save(state, path))

    def result(self, trained: "Trained") -> None:
        import torch

        torch.save(trained.network.state_dict(), self.folder / "result.pt")
        told = {
            name: getattr(trained, name)
            for name in ("best_epoch", "stopped", "precision", "device", "seconds", "cpu_seconds")
        }
        told["epochs"] = [asdict(epoch) for epoch in trained.epochs]
        hidden = self.folder / ".result.json"
        hidden.write_text(json.dumps(told))
        hidden.rename(self.folder / "result.json")

    def _tell(self, kind: str, write: Callable[[Path], object]) -> None:
        self.told += 1
        hidden = self.folder / "out" / f".{self.told:08d}.{kind}"
        write(hidden)
        hidden.rename(hidden.with_name(hidden.name[1:]))


if __name__ == "__main__":
    main()
