"""How fast photographs reach the network, and what the training loop costs beside the network itself.

    python -m benchmarks.training [folder of class folders]      without a folder: 2,000 generated JPEGs of 320x240 pixels

load     a dataset version on S3 to samples, the first time (decoded into the cache) and every other time (mapped from it)
input    from the samples by index to normalised tensors, as the loop does it, against two others: the limit, a bare memory map
         with a vectorised normalisation, on one thread both; and torchvision's ImageFolder in a DataLoader of two workers
step     an epoch of EfficientNet-Lite0 by `tasks.training.train` against a bare PyTorch loop on normalised tensors in memory,
         in float32 both; with the augmentation off, with the default one, and with all of it
         In all these epochs the photographs decoded are counted: there are none.

Everything is measured in short rounds in turns; the figures are medians.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tasks.recipe import Augmentation, TrainConfig
from tasks.storage import Store

if TYPE_CHECKING:
    from tasks.dataset import DatasetVersion
    from tasks.sample_cache import Cache
    from tasks.samples import Samples

COUNT: Final = 2000
SIDE: Final = 160
BATCH: Final = 32
ROUNDS: Final = 7
STEPS: Final = 4  # in one epoch of the comparison of steps
KEY, SECRET = "tirewatch", "benchmark-secret"
LIMITS: Final = {"input_against_limit": 0.9, "input_against_dataloader": 3.0, "step_against_bare": 0.95}

NOTHING: Final = Augmentation(flip_horizontal=False, brightness=0, contrast=0)
EVERYTHING: Final = Augmentation(
    flip_vertical=True, quarter_turns=True, rotation=20, shift=0.05, saturation=0.2, hue=0.05, exposure=0.3
)
AUGMENTATIONS: Final = {"off": NOTHING, "default": Augmentation(), "everything": EVERYTHING}


def generated(folder: Path) -> None:
    """JPEGs, each its own picture, in two class folders."""
    import cv2

    def make(number: int) -> None:
        random = np.random.default_rng(number)
        coarse = cv2.resize(random.integers(0, 256, (9, 12, 3), np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
        grain = random.integers(0, 30, (240, 320, 1), np.uint8)
        _, jpeg = cv2.imencode(".jpg", cv2.add(coarse, grain.repeat(3, axis=2)), [cv2.IMWRITE_JPEG_QUALITY, 85])
        path = folder / ("good", "worn")[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg.tobytes())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(COUNT)))


def given(source: Path, folder: Path) -> None:
    """Links to the first photographs of each class folder below `source`, at any depth, without their splits."""
    found = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    for number, path in enumerate(found[:: max(1, len(found) // COUNT)]):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / f"{number:06d}{path.suffix}").symlink_to(path.resolve())


def ingested(store: Store, folder: Path) -> "DatasetVersion":
    from flows import ingest as flow
    from tasks.dataset import writer
    from tasks.sources import upload_folder

    prefix = upload_folder(store, folder, "photographs", "batch")
    batch = flow.find_batch.fn(store, "photographs", prefix)
    options = flow.IngestOptions(max_quarantined_share=0.5)
    with tempfile.TemporaryDirectory() as spool, flow.examine_photographs.fn(store, batch, Path(spool)) as examination:
        return flow.commit.fn(store, batch, examination, options, writer(store, batch, examination)).version


@contextmanager
def decodes() -> Iterator[list[int]]:
    """A list whose one number is how many photographs have been decoded meanwhile."""
    from unittest.mock import patch

    from tasks.images import decode

    count = [0]

    def counted(*arguments: Any) -> NDArray[np.uint8]:
        count[0] += 1
        return decode(*arguments)

    with patch("tasks.samples.decode", counted):
        yield count


def load_figures(store: Store, dataset: "DatasetVersion", cache: "Cache") -> tuple["Samples", dict[str, Any]]:
    """The training split: seconds of the first load and of every other one, and how many photographs each decoded."""
    from tasks.sample_cache import load_samples

    seconds, counts = [], []
    for _ in range(1 + 3):
        with decodes() as decoded:
            began = time.perf_counter()
            found = load_samples(store, dataset, "train", SIDE, cache)
            seconds.append(time.perf_counter() - began)
        counts += decoded
    again = statistics.median(seconds[1:])
    return found, {
        "photographs": len(found),
        "first_load_seconds": round(seconds[0], 3),
        "other_load_seconds": round(again, 3),
        "load_ratio": round(seconds[0] / again, 1),
        "decoded_by_each_load": counts,
    }


def in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each way measured once a round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


@contextmanager
def as_in_training(count: int) -> Iterator[None]:
    """Threads and memory as the loop has them; for the peers as well, which gain by it."""
    from tasks.machine import memory_kept, threads

    with threads(count), memory_kept():
        yield


def rate(one: Callable[[NDArray[np.int64]], Any], count: int) -> float:
    """Photographs a second over an epoch in random order."""
    order = np.random.default_rng(1).permutation(count)
    batches = [order[start : start + BATCH] for start in range(0, count, BATCH)]
    began = time.perf_counter()
    for chosen in batches:
        one(chosen)
    return count / (time.perf_counter() - began)


def input_figures(samples: "Samples", folder: Path) -> dict[str, Any]:
    import torch

    from tasks.augmentation import augment
    from tasks.model import build_model, image_network
    from tasks.samples import processors

    network = image_network("efficientnet_lite0", build_model("cnn", 2, pretrained=False))
    draws = torch.Generator().manual_seed(1)
    assert isinstance(samples.images, np.memmap) and samples.images.filename
    bare: Any = np.memmap(str(samples.images.filename), mode="r").reshape(samples.images.shape)
    mean, std = network.mean, network.std

    def ours(how: Augmentation) -> Callable[[NDArray[np.int64]], Any]:
        return lambda chosen: network.normalise(augment(torch.from_numpy(samples.images[chosen]), how, draws))

    def limit(chosen: NDArray[np.int64]) -> Any:
        return torch.from_numpy(bare[chosen]).permute(0, 3, 1, 2).float().sub_(mean).div_(std)

    count = len(samples)
    with as_in_training(1):
        one = in_turns({"ours": lambda: rate(ours(NOTHING), count), "limit": lambda: rate(limit, count)}, ROUNDS)
    with as_in_training(processors()):
        others = {name: lambda how=how: rate(ours(how), count) for name, how in AUGMENTATIONS.items()}
        all_threads = in_turns({**others, "dataloader": dataloader(folder)}, 3)
    found = {name: statistics.median(speeds) for name, speeds in all_threads.items()}
    return {
        "input_images_per_second": round(statistics.median(one["ours"])),
        "limit_images_per_second": round(statistics.median(one["limit"])),
        "input_against_limit": ratio(one["ours"], one["limit"]),
        "input_images_per_second_all_threads": {name: round(found[name]) for name in AUGMENTATIONS},
        "dataloader_images_per_second": round(found["dataloader"]),
        "input_against_dataloader": ratio(all_threads["off"], all_threads["dataloader"]),
        "input_against_dataloader_one_thread": round(statistics.median(one["ours"]) / found["dataloader"], 2),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios round by round: what slows the machine for a while slows both."""
    return round(statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)), 3)


def dataloader(folder: Path) -> Callable[[], float]:
    """Photographs a second of torchvision's way; the workers are up before the clock starts."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize((SIDE, SIDE)), transforms.ToTensor(), transforms.Normalize(3 * (0.5,), 3 * (0.5,))]
    photographs = ImageFolder(str(folder), transforms.Compose(steps))
    loader = DataLoader(
        photographs,
        BATCH,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="forkserver",  # Lance, which is loaded here, does not survive a fork
    )
    sum(len(images) for images, _ in loader)

    def measured() -> float:
        began = time.perf_counter()
        count = sum(len(images) for images, _ in loader)
        return count / (time.perf_counter() - began)

    return measured


def step_figures(samples: "Samples") -> dict[str, Any]:
    """Photographs a second of whole training steps. Ours are epochs of `train`, its bookkeeping and validation included."""
    from dataclasses import replace

    from tasks.samples import processors
    from tasks.training import train

    count = STEPS * BATCH
    few = replace(samples, images=samples.images[:count], labels=np.arange(count) % 2, sha256=samples.sha256[:count])
    one = replace(few, images=few.images[:1], labels=few.labels[:1], sha256=few.sha256[:1])
    chosen = TrainConfig(
        architecture="efficientnet_lite0",
        pretrained=False,
        image_size=SIDE,
        epochs=3,
        batch_size=BATCH,
        precision="float32",
        schedule="constant",
        checkpoint_minutes=700,
    )

    def ours(how: Augmentation) -> float:
        config = chosen.model_copy(update={"augmentation": how})
        epochs = train(few, one, ("first", "second"), config).epochs
        return count / min(after.seconds - before.seconds for before, after in pairwise(epochs))

    def bare() -> float:
        with as_in_training(processors()):
            return count / min(bare_epochs(few.images, few.labels))

    ways = {name: lambda how=how: ours(how) for name, how in AUGMENTATIONS.items()}
    with decodes() as decoded:
        found = in_turns({"bare": bare, **ways}, 3)
    return {
        "bare_step_images_per_second": round(statistics.median(found["bare"]), 1),
        "step_images_per_second": {name: round(statistics.median(found[name]), 1) for name in AUGMENTATIONS},
        "step_against_bare": {name: ratio(found[name], found["bare"]) for name in AUGMENTATIONS},
        "decoded_in_epochs": decoded[0],
    }


def bare_epochs(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[float]:
    """Seconds of two epochs, after one that warms up, of the shortest loop there is: normalised tensors in memory, in order."""
    import torch

    from tasks.model import build_model

    torch.manual_seed(7)
    network = build_model("efficientnet_lite0", 2, pretrained=False).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    inputs = torch.split(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, BATCH)
    truth = torch.split(torch.from_numpy(labels), BATCH)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for some, classes in zip(inputs, truth, strict=True):
            loss = torch.nn.functional.cross_entropy(network(some), classes)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def main() -> None:
    from deploy import services
    from deploy.running import running
    from tasks.sample_cache import Cache
    from tasks.storage import ensure_bucket

    with tempfile.TemporaryDirectory(prefix="tirewatch-training-") as directory:
        workspace = Path(directory)
        folder = workspace / "photographs"
        given(Path(sys.argv[1]), folder) if sys.argv[1:] else generated(folder)
        service = services.seaweedfs(workspace / "s3", services.free_ports(11), KEY, SECRET)
        with running(service, workspace / "s3.log"):
            store = Store("tirewatch", service.url, KEY, SECRET)
            ensure_bucket(store)
            samples, figures = load_figures(store, ingested(store, folder), Cache(workspace / "cache", 10**10))
        figures |= input_figures(samples, folder) | step_figures(samples)
    figures["limits"], figures["held"] = LIMITS, held(figures)
    figures["cores"] = os.cpu_count()
    figures["versions"] = {name: version(name) for name in ("torch", "torchvision", "numpy", "simplejpeg")}
    show(figures)
    print(json.dumps(figures))
    sys.exit(not all(figures["held"].values()))


def held(figures: dict[str, Any]) -> dict[str, bool]:
    """Whether each ratio, of a group of them the least, is at its limit."""
    groups = {name: found if isinstance(found := figures[name], dict) else {"": found} for name in LIMITS}
    return {name: min(groups[name].values()) >= limit for name, limit in LIMITS.items()}


def show(figures: dict[str, Any]) -> None:
    table = Table(title=f"Training input and step: {figures['photographs']} photographs, {SIDE} px, batches of {BATCH}")
    for column in ("what", "img/s", "against", "img/s", "ratio", "at least"):
        table.add_column(column, justify="left" if column in ("what", "against") else "right")
    speed, limits = figures["input_images_per_second_all_threads"], figures["limits"]
    table.add_row(
        *("input, one thread", str(figures["input_images_per_second"])),
        *("bare memory map, normalised", str(figures["limit_images_per_second"])),
        *(str(figures["input_against_limit"]), str(limits["input_against_limit"])),
    )
    for name in AUGMENTATIONS:
        wanted = str(limits["input_against_dataloader"]) if name == "off" else ""
        against = figures["input_against_dataloader"] if name == "off" else ""
        peer = ("ImageFolder + DataLoader, 2 workers", str(figures["dataloader_images_per_second"]))
        table.add_row(f"input, augmentation {name}", str(speed[name]), *peer, str(against), wanted)
    for name in AUGMENTATIONS:
        bare = ("bare PyTorch loop", str(figures["bare_step_images_per_second"]))
        step, against = figures["step_images_per_second"][name], figures["step_against_bare"][name]
        table.add_row(f"step, augmentation {name}", str(step), *bare, str(against), str(limits["step_against_bare"]))
    console = Console(width=128)
    console.print(table)
    console.print(
        f"first load {figures['first_load_seconds']} s, every other {figures['other_load_seconds']} s; photographs decoded: "
        f"{', '.join(map(str, figures['decoded_by_each_load']))}, and {figures['decoded_in_epochs']} in all epochs"
    )


if __name__ == "__main__":
    main()
