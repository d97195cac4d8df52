"""Two hundred switches of champion under load: does a request notice, does the server grow, is each written down?

    python -m benchmarks.swap [--swaps 200] [--watched 60]

Four versions of one small network take turns behind one front door, so that each promotion really loads one version and
unloads another; every tenth switch is a rollback (benchmarks/switching.py). Real S3, MLflow, Prefect and Triton; all of it,
and the load (benchmarks/load.py), runs on the same cores.

closed   1 to 32 requests in flight over gRPC and HTTP: nothing fails, and nobody is answered by a version that was routed at
         no moment of the request, or with another version's score
open     half of the rate that 16 in flight reached in the same run, at planned moments: p99 of the requests in the window of a
         switch (from staging to half a second after everything was told) against p99 of those outside of every window
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.load import Asked, Load
from benchmarks.switching import SIZE, STEPS, Bench, Switch, stack, switch
from tasks.ledger import breaks, read_ledger
from tasks.model_repository import network_name
from tasks.registry import champion_version
from tasks.routing import read_routing
from tasks.transaction import Place

AFTERWARDS: Final = 0.5  # seconds that still belong to the window of a switch
REST: Final = 1.5  # seconds without a switch after each window of the open loop
LOADED: Final = 3  # versions on the server after a promotion: champion, previous, and the one that is leaving the table
WARM: Final = 20  # switches before the server's memory must have stopped growing
SAME: Final = 1e-3  # scores of one version in batches of different sizes differ by 1e-6
MOST_RATIO: Final = 1.5
MOST_GROWTH: Final = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--swaps", type=int, default=200, help="under the closed loop")
    parser.add_argument("--watched", type=int, default=60, help="further ones, under the open loop")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for the capacity, and for the first steady stretch"
    )
    chosen = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tirewatch-swap-") as directory, stack(Path(directory)) as bench:
        figures = measure(bench, chosen.swaps, chosen.watched, chosen.seconds, Path(directory) / "loads")
    figures["minutes"] = round((time.monotonic() - began) / 60, 1)
    show(figures)
    print(json.dumps(figures))


def measure(bench: Bench, swaps: int, watched: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Capacity, then the switches under the closed loop, then those under the open one; every figure."""
    model = bench.place.model
    capacity = answered_per_second(bench, seconds, folder / "capacity")
    pushed, quiet, samples = [], [], []
    with Load(bench.address, model, bench.images, folder / "closed") as closed:
        for number in range(1, swaps + 1):
            done = switch(bench, number)
            pushed.append(done)
            samples.append(memory(bench))
    with Load(bench.address, model, bench.images, folder / "open", rate=capacity / 2) as opened:
        time.sleep(seconds)
        for number in range(swaps + 1, swaps + watched + 1):
            quiet.append(switch(bench, number))
            time.sleep(AFTERWARDS + REST)
    every = [*pushed, *quiet]
    return {
        **counted({"closed": closed.asked, "open": opened.asked}, every, bench.scores),
        **latencies(opened.asked, quiet),
        **growth(samples),
        **written_down(bench.place, every),
        "capacity_per_second": round(capacity, 1),
        "parts_s": parts_of(every),
        "network": f"cnn, {SIZE} px, float32, OpenVINO",
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("openvino", "tritonclient", "mlflow", "prefect")},
    }


def answered_per_second(bench: Bench, seconds: float, folder: Path) -> float:
    """The rate of 16 in flight, after a first second."""
    with Load(bench.address, bench.place.model, bench.images, folder, levels=(16,)) as load:
        time.sleep(seconds + 1)
    if load.asked.failed:
        raise RuntimeError(f"requests fail before anything is switched: {load.asked.errors}")
    rows = load.asked.rows
    rows = rows[rows["sent"] > rows["sent"].min() + 1]
    return float(len(rows) / (rows["answered"].max() - rows["sent"].min()))


def memory(bench: Bench, within: float = 15.0) -> int | None:
    """Bytes of the server and its model processes, what several of them map counted once (PSS), as soon as the version that
    was unloaded is gone; None where fewer versions are loaded than usual, as after a rollback, or more stay on.
    """
    launcher, network = psutil.Process(bench.server), network_name(bench.place.model, SIZE)
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        found = versions = 0
        try:
            for process in (launcher, *launcher.children(recursive=True)):
                versions += any(part.startswith(f"{network}_") for part in process.cmdline())
                found += process.memory_full_info().pss
        except psutil.NoSuchProcess:  # it went while it was looked at
            versions = LOADED + 1
        if versions <= LOADED:
            return found if versions == LOADED else None
        time.sleep(0.2)
    return None


def counted(loads: Mapping[str, Asked], switches: Sequence[Switch], scores: NDArray[np.float32]) -> dict[str, Any]:
    """What went wrong with the requests of all loads, and what asking cost."""
    return {
        "swaps": len(switches),
        "requests": {name: len(asked.rows) for name, asked in loads.items()},
        "failed": sum(asked.failed for asked in loads.values()),
        "misrouted": sum(misrouted(asked.rows, switches, scores) for asked in loads.values()),
        "errors": [error for asked in loads.values() for error in asked.errors][:5],
        "load_share_of_a_core": {name: round(asked.share, 2) for name, asked in loads.items()},
    }


def misrouted(rows: NDArray[Any], switches: Sequence[Switch], scores: NDArray[np.float32]) -> int:
    """Answers by a version that was routed at no moment between sending and answer, or with a score that is not its own.

    rows: requests in any order; switches: one after the other, the first of them from the version that was in force.
    """
    rows = rows[rows["error"] < 0]
    allowed = np.zeros(len(rows), dtype=bool)
    begins = [-np.inf, *(each.switching for each in switches)]
    ends = [*(each.switched for each in switches), np.inf]
    reigning = [switches[0].old, *(each.new for each in switches)] if switches else []
    for champion, since, until in zip(reigning, begins, ends, strict=False):
        allowed |= (rows["version"] == champion) & (rows["answered"] >= since) & (rows["sent"] <= until)
    known = np.isin(rows["version"], np.arange(1, len(scores)))
    own = scores[np.where(known, rows["version"], 1), rows["image"]]
    allowed &= known & (np.abs(rows["score"] - own) <= SAME)
    return int((~allowed).sum())


def latencies(asked: Asked, switches: Sequence[Switch]) -> dict[str, Any]:
    """Milliseconds from the planned moment to the answer, of requests that touch the window of a switch and of the others."""
    rows, waited = asked.rows, asked.milliseconds
    touched = np.zeros(len(rows), dtype=bool)
    for each in switches:
        touched |= (rows["planned"] <= each.ended + AFTERWARDS) & (rows["answered"] >= each.began)
    if touched.all() or not touched.any():
        raise ValueError(f"{touched.sum()} of {len(rows)} requests lie in the windows of switches: nothing to compare")
    during, steady = np.percentile(waited[touched], [50, 99]), np.percentile(waited[~touched], [50, 99])
    return {
        "steady_p50_ms": round(float(steady[0]), 1),
        "steady_p99_ms": round(float(steady[1]), 1),
        "swap_p50_ms": round(float(during[0]), 1),
        "swap_p99_ms": round(float(during[1]), 1),
        "p99_ratio": round(float(during[1] / steady[1]), 2),
        "requests_in_windows": int(touched.sum()),
        "window_s": round(statistics.median(each.ended + AFTERWARDS - each.began for each in switches), 1),
        "sent_late_p99_ms": round(float(np.percentile(rows["sent"] - rows["planned"], 99) * 1000), 1),
    }


def growth(samples: Sequence[int | None]) -> dict[str, Any]:
    """Memory after the last switches over that after the first ones that are not warm-up: medians of up to eight samples."""
    settled = [each for each in samples[min(WARM, len(samples) // 2) :] if each is not None]
    if len(settled) < 2:
        raise ValueError(f"{len(settled)} samples of the server's memory after the warm-up: switch more often")
    few = min(8, len(settled) // 2)
    first, last = statistics.median(settled[:few]), statistics.median(settled[-few:])
    return {
        "memory_samples": len(settled),
        "memory_first_mb": round(first / 2**20, 1),
        "memory_last_mb": round(last / 2**20, 1),
        "memory_growth": round(last / first - 1, 4),
    }


def written_down(place: Place, switches: Sequence[Switch]) -> dict[str, Any]:
    """Whether ledger, table and alias tell of exactly these switches, in their order, after the one that began it all."""
    entries, table = read_ledger(place.store, place.model), read_routing(place.root, place.model)
    told = [(entry.previous, entry.version) for entry in entries[1:]]
    made = [(each.old, each.new) for each in switches]
    assert table is not None
    return {
        "ledger_entries": len(told),
        "ledger_differs": sum(one != other for one, other in zip(told, made, strict=False))
        + abs(len(told) - len(made)),
        "ledger_breaks": len(breaks(entries)),
        "tables": table.revision - 1,
        "alias_follows": champion_version(place.tracking_uri, place.model) == table.champion.version,
    }


def parts_of(switches: Sequence[Switch]) -> dict[str, dict[str, float]]:
    """Median seconds of each step of a promotion, over the first and the last twenty: what grows with the history shows."""
    promotions = [each.parts for each in switches if set(each.parts) == set(STEPS)]
    return {
        name: {step: round(statistics.median(parts[step] for parts in some), 3) for step in STEPS}
        for name, some in (("first", promotions[:20]), ("last", promotions[-20:]))
    }


def verdicts(figures: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(figure, measured, bound, held), one for each thing that must be true."""
    swaps = figures["swaps"]
    grown, ratio = figures["memory_growth"], figures["p99_ratio"]
    requests = sum(figures["requests"].values())
    return [
        ("failed requests", f"{figures['failed']} of {requests:,}", "0", figures["failed"] == 0),
        ("misrouted answers", f"{figures['misrouted']}", "0", figures["misrouted"] == 0),
        (
            "p99 during a swap / steady",
            f"{ratio:.2f} ({figures['swap_p99_ms']:.1f} / {figures['steady_p99_ms']:.1f} ms)",
            f"at most {MOST_RATIO}",
            ratio <= MOST_RATIO,
        ),
        (
            f"server memory after the first {WARM}",
            f"{grown:+.1%} ({figures['memory_first_mb']:.0f} -> {figures['memory_last_mb']:.0f} MB)",
            f"at most {MOST_GROWTH:+.0%}",
            grown <= MOST_GROWTH,
        ),
        (
            "ledger entries",
            f"{figures['ledger_entries']}, {figures['ledger_differs']} differ, {figures['ledger_breaks']} breaks",
            f"{swaps}, none",
            (figures["ledger_entries"], figures["ledger_differs"], figures["ledger_breaks"]) == (swaps, 0, 0),
        ),
        (
            "routing tables",
            f"{figures['tables']}, the alias {'follows' if figures['alias_follows'] else 'names another'}",
            f"{swaps}, follows",
            figures["tables"] == swaps and figures["alias_follows"],
        ),
    ]


def show(figures: Mapping[str, Any]) -> None:
    """The verdicts, then where the time of a promotion goes."""
    table = Table("figure", "measured", "bound", "held", title=f"{figures['swaps']} swaps, {figures['network']}")
    for name, measured, bound, held in verdicts(figures):
        table.add_row(name, measured, bound, "yes" if held else "NO")
    steps = Table("seconds, median of", *STEPS)
    for name, parts in figures["parts_s"].items():
        steps.add_row(f"{name} twenty", *(f"{parts[step]:.3f}" for step in STEPS))
    console = Console(width=100)
    console.print(table)
    console.print(steps)
    shares = figures["load_share_of_a_core"]
    console.print(
        f"{figures['capacity_per_second']:.0f} requests/s with 16 in flight; asking took {shares['closed']:.2f} (closed) and "
        f"{shares['open']:.2f} (open) of one of {figures['cores']} cores, requests left {figures['sent_late_p99_ms']} ms late "
        f"(p99); a window lasted {figures['window_s']} s and {figures['requests_in_windows']:,} requests touched one"
    )
    for error in figures["errors"]:
        console.print(error, style="red")


if __name__ == "__main__":
    main()
