"""One training in several processes of this machine: torchrun as one subprocess that ends with whoever started it.

    <folder>/job.json, *.npy, weights.pt, state.pt      what the ranks are told; photographs are memory-mapped
    <folder>/out/00000003.epoch.json, ...state.pt       what rank 0 tells, in order; taken away as it is read
    <folder>/failure.json                               which rank died first, and of what
    <folder>/result.pt, result.json                     what came of it

`train_in_processes` is the launcher, `require_launchable` says what it can. On several nodes something else starts `tasks.rank`
(docs/training.md).
"""

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tasks.recipe import TrainConfig
from tasks.samples import Samples

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.loop import Epoch, State
    from tasks.training import Trained

SOURCE: Final = Path(__file__).parents[1]
GRACE: Final = 10.0  # seconds torchrun gets to end its ranks before it is killed, and they with it


class RankDied(RuntimeError):
    """A process of a training ended before its work was done; the others were ended with it."""


@dataclass(frozen=True)
class Job:
    """What the processes work on. state: where an interrupted training goes on."""

    training: Samples
    validation: Samples
    classes: tuple[str, ...]
    config: TrainConfig
    weights: "Mapping[str, Tensor] | None" = None
    state: "State | None" = None


def require_launchable(processes: int) -> None:
    """ValueError for more processes than this machine has GPUs, where it has any."""
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f"processes is {processes}, this machine has {torch.cuda.device_count()} GPUs: one process each at most"
        )


def train_in_processes(
    job: Job, on_epoch: "Callable[[Epoch], None] | None", save: "Callable[[State], None] | None"
) -> "Trained":
    """Train with `config.processes` ranks; callbacks run in this process. Raises RankDied, or what a callback raises."""
    with tempfile.TemporaryDirectory(prefix="tirewatch-ranks-") as made:
        folder = Path(made)
        write_job(folder, job, keeps=save is not None)
        with (folder / "output.log").open("wb") as output:
            started = subprocess.Popen(
                _command(folder, job.config.processes), stdout=output, stderr=output, cwd=SOURCE, process_group=0
            )
        try:
            _follow(started, folder, on_epoch, save)
        finally:
            _end(started)
        if not (folder / "result.json").exists():
            raise RankDied(_reason(folder, started.returncode))
        return _result(folder, job)


def write_job(folder: Path, job: Job, keeps: bool) -> None:
    """The job as files that `read_job` reads in every rank."""
    import torch

    (folder / "out").mkdir()
    splits = {
        name: _written(folder, name, split)
        for name, split in (("training", job.training), ("validation", job.validation))
    }
    if job.weights is not None:
        torch.save(dict(job.weights), folder / "weights.pt")
    if job.state is not None:
        torch.save(job.state, folder / "state.pt")
    told = {"config": job.config.model_dump(mode="json"), "classes": job.classes, "splits": splits, "keeps": keeps}
    (folder / "job.json").write_text(json.dumps(told))


def read_job(folder: Path) -> tuple[Job, bool]:
    """The job, its photographs memory-mapped, and whether states are kept."""
    import torch

    told = json.loads((folder / "job.json").read_text())
    training, validation = (_opened(folder, name, told["splits"][name]) for name in ("training", "validation"))
    weights, state = (
        torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        for path in (folder / "weights.pt", folder / "state.pt")
    )
    config = TrainConfig.model_validate(told["config"])
    return Job(training, validation, tuple(told["classes"]), config, weights, state), bool(told["keeps"])


def _written(folder: Path, name: str, samples: Samples) -> dict[str, Any]:
    """Labels and digests beside the job; photographs too, unless they are a file already."""
    np.save(folder / f"{name}-labels.npy", samples.labels)
    np.save(folder / f"{name}-sha256.npy", samples.sha256)
    images = samples.images
    if isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap) and images.filename is not None:
        path = Path(str(images.filename))  # the whole mapping, no part of one: its file may be opened again
        if path.exists():
            return {"path": str(path.resolve()), "offset": images.offset, "shape": images.shape}
    path = folder / f"{name}-images.bin"
    np.ascontiguousarray(images).tofile(path)
    return {"path": str(path), "offset": 0, "shape": images.shape}


def _opened(folder: Path, name: str, told: Mapping[str, Any]) -> Samples:
    images = np.memmap(told["path"], np.uint8, "r", told["offset"], tuple(told["shape"]))
    return Samples(images, np.load(folder / f"{name}-labels.npy"), np.load(folder / f"{name}-sha256.npy"))


def _command(folder: Path, processes: int) -> list[str]:
    # Everything stays on the loopback interface, and the ranks meet through a file: no port is open to others.
    surroundings = ["GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    program = [sys.executable, "-m", "tasks.torchrun", str(os.getpid()), str(processes), str(folder)]
    return ["env", *surroundings, *program]


def _follow(
    started: subprocess.Popen[bytes],
    folder: Path,
    on_epoch: "Callable[[Epoch], None] | None",
    save: "Callable[[State], None] | None",
) -> None:
    """Hand on what rank 0 tells until the ranks are gone."""
    running = True
    while running:
        try:
            started.wait(0.05)
            running = False  # and one last look at what was told before
        except subprocess.TimeoutExpired:
            pass
        for path in sorted((folder / "out").glob("[0-9]*")):
            _hand_on(path, on_epoch, save)
            path.unlink()


def _hand_on(path: Path, on_epoch: "Callable[[Epoch], None] | None", save: "Callable[[State], None] | None") -> None:
    import torch

    from tasks.loop import Epoch

    if path.suffix == ".json" and on_epoch is not None:
        on_epoch(Epoch.from_dict(json.loads(path.read_text())))
    elif path.suffix == ".pt" and save is not None:
        save(torch.load(path, map_location="cpu", weights_only=True))


def _end(started: subprocess.Popen[bytes]) -> None:
    """torchrun ends its ranks on SIGTERM; killed, each rank ends by itself (tasks/rank.py)."""
    if started.poll() is not None:
        return
    started.terminate()
    try:
        started.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def _reason(folder: Path, code: int) -> str:
    told = folder / "failure.json"
    last = (folder / "output.log").read_text(errors="replace").strip()[-1500:]
    if not told.exists():
        return f"torchrun ended with code {code} before the training was done; its last words:\n{last}"
    failure = json.loads(told.read_text())
    how = (
        f"was killed by {signal.Signals(-failure['code']).name}"
        if failure["code"] < 0
        else f"ended: {failure['message']}"
    )
    return f"rank {failure['rank']} of the training {how}; the other ranks were ended with it"


def _result(folder: Path, job: Job) -> "Trained":
    import torch

    from tasks.loop import Epoch
    from tasks.model import build_model, image_network
    from tasks.training import Trained

    told = json.loads((folder / "result.json").read_text())
    network = image_network(
        job.config.architecture, build_model(job.config.architecture, len(job.classes), pretrained=False)
    )
    network.load_state_dict(torch.load(folder / "result.pt", map_location="cpu", weights_only=True))
    epochs = tuple(Epoch.from_dict(each) for each in told.pop("epochs"))
    return Trained(network=network.eval(), epochs=epochs, **told)
