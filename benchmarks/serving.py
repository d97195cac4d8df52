"""What the way through the server costs: an encoded photograph over loopback gRPC against the bare engine in process.

    python -m benchmarks.serving [--seconds 5]

One network (ResNet-18 at 224 px, random weights), one photograph, two cores or what there is. Four ways, in turns in one run:

bare      the limit: decode and infer in this process, in batches as large as the concurrency allows
door      the front door, which calls the network model (what is served)
one_hop   the same decoding and the same network in one model process, without routing
network   the network model alone, given pixels: what the server costs without any front door

What counts are the ratios against `bare` of the same round (medians): the machine may be busy, and both are slowed alike.
Processor time per photograph, of server and client together, is what a busy machine changes least.
"""

import argparse
import asyncio
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tasks.decision import DecisionRule
from tasks.images import CURRENT, decode
from tasks.inference import Network, open_network
from tasks.model_repository import NETWORK_FILE, install_front_door, stage_version, version_directory
from tasks.scratch import ScratchServer
from tasks.sealed import SealedVersion
from tasks.serving import TritonAddress, load_model

SOURCE: Final = Path(__file__).parents[1]
MODEL, NETWORK, ONE_HOP = "bench", "bench_onnx_224", "one_hop"
SIZE: Final = 224
CONCURRENCY: Final = (1, 8, 32)
WAYS: Final = ("bare", "door", "one_hop", "network")
LARGEST_BATCH: Final = 8
ROUNDS: Final = 5


@dataclass(frozen=True)
class Measured:
    """One way at one concurrency. Milliseconds; cpu_ms: processor time per photograph, of server and client together."""

    images_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each way and concurrency, over all rounds")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tirewatch-serving-") as directory:
        staged = stage_version(Path(directory), network_file(Path(directory)), described())
        python = SOURCE / ".venv-triton" / "bin" / "python"
        with ScratchServer(python, staged, Path(directory)) as server:
            install_one_hop(server)
            rounds = [measure_round(server, chosen.seconds / ROUNDS) for _ in range(ROUNDS)]
    figures = summary(rounds)
    show(figures)
    print(json.dumps(figures))


def network_file(directory: Path) -> Path:
    import torch

    from tasks.model import build_model, image_network
    from tasks.onnx_export import export_onnx

    torch.manual_seed(0)
    export_onnx(image_network("resnet18", build_model("resnet18", 2, pretrained=False)), SIZE, directory / "made.onnx")
    return directory / "made.onnx"


def described() -> SealedVersion:
    rule = DecisionRule(("good", "worn"), ("worn",), 0.5)
    return SealedVersion(MODEL, 1, NETWORK, rule, CURRENT, SIZE, MODEL, 1, "sha256:0", "none", "none", "float32")


def photograph() -> bytes:
    """A JPEG of 640x480 with the detail of a real one (about 75 KB)."""
    from PIL import Image

    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float64)
    out = io.BytesIO()
    Image.fromarray((smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)).save(
        out, "JPEG", quality=80
    )
    return out.getvalue()


def install_one_hop(server: ScratchServer) -> None:
    template = SOURCE / "triton" / "benchmarks" / "one_hop"
    directory = install_front_door(server.root, ONE_HOP, template=template)
    config = (directory / "config.pbtxt").read_text()
    home = version_directory(server.root, NETWORK, 1)
    (directory / "config.pbtxt").write_text(config.replace("${version_directory}", str(home)))
    load_model(server.address, ONE_HOP)


def measure_round(server: ScratchServer, seconds: float) -> dict[int, dict[str, Measured]]:
    """Every way at every concurrency, one after the other; in the next round they come round again."""
    engine = open_network(version_directory(server.root, NETWORK, 1) / NETWORK_FILE, threads=os.cpu_count() or 1)
    image = photograph()
    found: dict[int, dict[str, Measured]] = {}
    for concurrency in CONCURRENCY:
        found[concurrency] = {"bare": bare(engine, image, min(concurrency, LARGEST_BATCH), seconds)}
        for way, model in (("door", MODEL), ("one_hop", ONE_HOP), ("network", NETWORK)):
            given = decode(image, SIZE) if way == "network" else np.frombuffer(image, dtype=np.uint8)
            found[concurrency][way] = through_server(server, model, given, concurrency, seconds)
    return found


def bare(engine: Network, image: bytes, batch: int, seconds: float) -> Measured:
    """Decode a batch on all cores, run it, and again. The latency is that of the batch: nobody waits in a queue."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each: Callable[..., Any] = map if batch == 1 else pool.map

        def once() -> None:
            engine(np.stack([*each(lambda data: decode(data, SIZE), [image] * batch)]))

        once()  # each batch size is compiled at its first use
        taken: list[float] = []
        began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            started = time.perf_counter()
            once()
            taken.append(time.perf_counter() - started)
    return _measured(taken, batch, time.perf_counter() - began, time.process_time() - cpu)


def through_server(
    server: ScratchServer, model: str, given: NDArray[np.uint8], concurrency: int, seconds: float
) -> Measured:
    asyncio.run(closed_loop(server.address, model, given, concurrency, 0.1))  # connections, first batches
    cpu, began = time.process_time() + server.cpu_seconds(), time.perf_counter()
    taken = asyncio.run(closed_loop(server.address, model, given, concurrency, seconds))
    elapsed = time.perf_counter() - began
    return _measured(taken, 1, elapsed, time.process_time() + server.cpu_seconds() - cpu)


def _measured(taken: list[float], images: int, elapsed: float, cpu: float) -> Measured:
    p50, p99 = np.percentile(taken, [50, 99]) * 1000
    count = len(taken) * images
    return Measured(count / elapsed, float(p50), float(p99), cpu / count * 1000)


async def closed_loop(
    address: TritonAddress, model: str, given: NDArray[np.uint8], concurrency: int, seconds: float
) -> list[float]:
    """Seconds of each request; every lane sends its next one when it has its answer."""
    import tritonclient.grpc.aio as grpc

    tensor = grpc.InferInput("image", [1, *given.shape], "UINT8")
    tensor.set_data_from_numpy(given[None])
    taken: list[float] = []
    end = time.perf_counter() + seconds

    async def lane(client: Any) -> None:
        while time.perf_counter() < end:
            started = time.perf_counter()
            await client.infer(model, [tensor])
            taken.append(time.perf_counter() - started)

    client = grpc.InferenceServerClient(address.grpc)
    try:
        await asyncio.gather(*(lane(client) for _ in range(concurrency)))
    finally:
        await client.close()
    return taken


def summary(rounds: list[dict[int, dict[str, Measured]]]) -> dict[str, Any]:
    """Medians over the rounds, of the figures and of their ratios against `bare` of the same round."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for concurrency in CONCURRENCY:
        table[str(concurrency)] = {}
        for way in WAYS:
            turns = [(found[concurrency][way], found[concurrency]["bare"]) for found in rounds]
            figures = {name: [asdict(mine)[name] for mine, _ in turns] for name in asdict(turns[0][0])}
            medians = {name: round(statistics.median(values), 2) for name, values in figures.items()}
            medians["speed_ratio"] = _median(mine.images_per_second / limit.images_per_second for mine, limit in turns)
            medians["cpu_ratio"] = _median(mine.cpu_ms / limit.cpu_ms for mine, limit in turns)
            medians["added_p50_ms"] = _median(mine.p50_ms - limit.p50_ms for mine, limit in turns)
            table[str(concurrency)][way] = medians
    return {
        "concurrency": table,
        "limit": "bare: decode and infer in process, batches of min(concurrency, 8)",
        "network": f"resnet18, {SIZE} px, float32, OpenVINO",
        "jpeg_bytes": len(photograph()),
        "rounds": len(rounds),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("openvino", "tritonclient", "numpy")}
        | {"python": sys.version.split()[0]},
    }


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def show(figures: dict[str, Any]) -> None:
    table = Table(title=f"A photograph of {figures['jpeg_bytes'] // 1000} KB over gRPC, {figures['network']}")
    for column in ("in flight", "way", "img/s", "of bare", "p50 ms", "p99 ms", "cpu ms", "of bare"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for concurrency, ways in figures["concurrency"].items():
        for way, row in ways.items():
            speed, cpu = f"{row['speed_ratio']:.2f}", f"{row['cpu_ratio']:.2f}"
            numbers = [f"{row[name]:.1f}" for name in ("images_per_second", "p50_ms", "p99_ms", "cpu_ms")]
            table.add_row(concurrency, way, numbers[0], speed, numbers[1], numbers[2], numbers[3], cpu)
        table.add_section()
    Console(width=88).print(table)


if __name__ == "__main__":
    main()
