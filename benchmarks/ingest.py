"""How fast a batch becomes a dataset version: the whole ingest, everything checked, against two ways people do it today.

(a) The straightforward reference: boto3 downloads in threads, sha256, JPEG decode, the same statistics, one Lance append.
(b) `dvc add && dvc push` of the same files, where `dvc` is on the PATH: it neither decodes nor checks.
Every measurement is a process of its own, so that its peak memory is its own; all of them use one SeaweedFS in a temporary
folder. `python -m benchmarks.ingest [photographs]`; with `--memory` also an ingest of ten times as many, for its peak memory
(minutes, and 4 GB of disk for 50,000).
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.storage import Store

COUNT = 5000
ROUNDS = 3
KEY, SECRET = "tirewatch", "benchmark-secret"


def photographs(folder: Path, count: int) -> None:
    """`count` JPEGs of about 40 KB and 640x480 pixels, each its own picture, in two class folders."""
    import cv2
    import numpy as np

    def make(number: int) -> None:
        random = np.random.default_rng(number)
        coarse = cv2.resize(random.integers(0, 256, (12, 16, 3), np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
        grain = cv2.resize(random.integers(0, 40, (240, 320, 3), np.uint8), (640, 480))
        _, jpeg = cv2.imencode(".jpg", cv2.add(coarse, grain), [cv2.IMWRITE_JPEG_QUALITY, 70])
        path = folder / ("good", "worn")[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg.tobytes())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(count)))


def ours(store: Store, dataset: str) -> None:
    """The flow's own steps in their order, without the Prefect server: no events, no page."""
    from flows import ingest as flow
    from tasks.dataset import writer

    batch = flow.find_batch.fn(store, dataset, f"incoming/{dataset}/batch/")
    options = flow.IngestOptions(max_quarantined_share=0)
    with (
        tempfile.TemporaryDirectory() as spool,
        flow.examine_photographs.fn(store, batch, Path(spool)) as examination,
    ):
        flow.commit.fn(store, batch, examination, options, writer(store, batch, examination))


def straightforward(store: Store, dataset: str) -> None:
    """What one would write in an afternoon: everything in memory, one append."""
    import hashlib
    import threading

    import boto3
    import cv2
    import lance
    import numpy as np
    import pyarrow as pa

    from monitoring.features import image_statistics

    cv2.setNumThreads(1)  # faster here by a quarter: the reference gets what helps it
    local = threading.local()

    def client() -> Any:
        if not hasattr(local, "s3"):
            local.s3 = boto3.session.Session().client(
                "s3",
                endpoint_url=store.endpoint_url,
                aws_access_key_id=KEY,
                aws_secret_access_key=SECRET,
                region_name=store.region,
            )
        return local.s3

    def row(key: str) -> dict[str, Any]:
        data = client().get_object(Bucket=store.bucket, Key=key)["Body"].read()
        pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        told = {"image": data, "sha256": hashlib.sha256(data).hexdigest(), "label": key.split("/")[3], "key": key}
        return told | image_statistics(np.asarray(pixels, np.uint8))

    keys: list[str] = []
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=f"incoming/{dataset}/"):
        keys += [each["Key"] for each in page["Contents"] if each["Key"].endswith(".jpg")]
    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(row, keys))
    lance.write_dataset(
        pa.Table.from_pylist(rows),
        store.uri(f"plain/{dataset}.lance"),
        storage_options=store.lance_options,
        mode="append",
    )


WAYS = {"ours": ours, "straightforward": straightforward}


def timed(way: str, store: Store, dataset: str) -> dict[str, float]:
    """Seconds and peak memory of one ingest, in a process of its own; imports are not counted."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--one", way, store.endpoint_url or "", dataset]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(way: str, endpoint: str, dataset: str) -> None:
    """What the process of `timed` does."""
    for module in ("boto3", "lance", "flows.ingest", "tasks.checks", "tasks.dataset"):
        import_module(module)

    began = time.perf_counter()
    WAYS[way](Store("tirewatch", endpoint, KEY, SECRET), dataset)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def dvc(store: Store, folder: Path, repository: Path) -> float | None:
    """Seconds of `dvc add && dvc push`; None where dvc is not installed."""
    program = shutil.which("dvc")
    if program is None:
        return None
    shutil.copytree(folder, repository / "photographs")

    def say(*arguments: str) -> None:
        subprocess.run([str(program), *arguments], cwd=repository, check=True, capture_output=True)

    say("init", "--no-scm")
    say("remote", "add", "-d", "s3", f"s3://{store.bucket}/{repository.name}")
    for name, value in (("endpointurl", store.endpoint_url), ("access_key_id", KEY), ("secret_access_key", SECRET)):
        say("remote", "modify", "s3", name, str(value))
    began = time.perf_counter()
    say("add", "photographs")
    say("push")
    return time.perf_counter() - began


def main() -> None:
    from deploy import services
    from deploy.running import running
    from tasks.storage import ensure_bucket

    if sys.argv[1:2] == ["--one"]:
        return one(*sys.argv[2:5])
    count = next((int(given) for given in sys.argv[1:] if given.isdigit()), COUNT)
    with tempfile.TemporaryDirectory(prefix="tirewatch-ingest-") as directory:
        workspace = Path(directory)
        photographs(workspace / "photographs", count)
        service = services.seaweedfs(workspace / "s3", services.free_ports(11), KEY, SECRET)
        with running(service, workspace / "s3.log"):
            store = Store("tirewatch", service.url, KEY, SECRET)
            ensure_bucket(store)
            figures = measure(store, workspace, count, "--memory" in sys.argv)
    show(figures)
    print(json.dumps(figures))
    return None


def measure(store: Store, workspace: Path, count: int, memory: bool) -> dict[str, Any]:
    """The two ways in turn, several rounds, then dvc as often, then memory with ten times the photographs."""
    from tasks.sources import upload_folder

    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(ROUNDS):
        for way, each in taken.items():
            dataset = f"{way}-{number}"
            upload_folder(store, workspace / "photographs", dataset, "batch")
            each.append(timed(way, store, dataset))
    many = None
    if memory:
        photographs(workspace / "many", 10 * count)
        upload_folder(store, workspace / "many", "many", "batch")
        shutil.rmtree(workspace / "many")
        many = timed("ours", store, "many")["peak_mb"]
    speed = {way: statistics.median(count / each["seconds"] for each in found) for way, found in taken.items()}
    peers = [dvc(store, workspace / "photographs", workspace / f"dvc-{number}") for number in range(ROUNDS)]
    peer = statistics.median(each for each in peers if each) if all(peers) else None
    sizes = [path.stat().st_size for path in (workspace / "photographs").rglob("*.jpg")]
    return {
        "photographs": count,
        "mean_bytes": round(statistics.mean(sizes)),
        "ours_images_per_second": round(speed["ours"], 1),
        "straightforward_images_per_second": round(speed["straightforward"], 1),
        "ratio_straightforward": round(speed["ours"] / speed["straightforward"], 3),
        "limit_straightforward": 1.5,
        "dvc_images_per_second": round(count / peer, 1) if peer else None,
        "ratio_dvc": round(speed["ours"] / (count / peer), 3) if peer else None,
        "limit_dvc": 1.3,
        "peak_mb": round(max(each["peak_mb"] for each in taken["ours"]), 1),
        "peak_mb_of_ten_times": round(many, 1) if many else None,
        "limit_peak_ratio": 1.2,
        "peak_mb_straightforward": round(max(each["peak_mb"] for each in taken["straightforward"]), 1),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("pylance", "obstore", "boto3", "simplejpeg")},
    }


def show(figures: dict[str, Any]) -> None:
    table = Table(title=f"{figures['photographs']} photographs of {figures['mean_bytes'] // 1000} KB")
    for column in ("way", "img/s", "ours against it", "peak MB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    table.add_row("tirewatch, everything checked", str(figures["ours_images_per_second"]), "", str(figures["peak_mb"]))
    for way in ("straightforward", "dvc"):
        speed, ratio = figures[f"{way}_images_per_second"], figures[f"ratio_{way}"]
        memory = str(figures.get(f"peak_mb_{way}", ""))
        table.add_row(way, str(speed or "not installed"), str(ratio or ""), memory)
    Console(width=88).print(table)


if __name__ == "__main__":
    main()
