"""What the recipes reach on real photographs: the mean over seeds and its interval, into docs/results.md.

`python -m benchmarks.results elpv-random` on a running stack (`tirewatch up`). Each seed is one `prefect deployment run` of a
recipe of prefect.yaml, whose configuration was chosen on the validation split and is the same for every seed. The figures
are those that the training flow wrote to MLflow; the test split was read once, by its final evaluation. Photographs go in by
the same door as anybody's: a sealed batch on S3 and the ingest flow with the options of the protocol.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from flows.settings import Settings

PAGE: Final = Path(__file__).parents[1] / "docs" / "results.md"
CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Protocol:
    """A set of photographs, how it is split and which recipe trains on it.

    folders: folder of the set -> split folder of the batch; empty: the photographs lie in class folders and ingest divides
    them by `options`, with another split for every seed. asked: the test accuracy that was the aim.
    """

    recipe: str
    title: str
    asked: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""

    def dataset(self, name: str, seed: int) -> str:
        return name.replace("-", "_") + ("" if self.folders else f"_{seed}")


SHARES: Final = {"val_share": 0.1, "test_share": 0.25}
PROTOCOLS: Final = {
    "elpv-random": Protocol(
        "elpv",
        "Solar cells (elpv-dataset), random stratified 75/25",
        asked=0.875,
        options={**SHARES, "twins": {"hash_distance": 0}},
        notes="The protocol of Deitsch et al. 2019, whose CNN has 0.884: look-alike cells may stand on both sides. 10 % of "
        "all photographs, out of the 75 %, are the validation split. Another random split for every seed.",
    ),
    "elpv-strict": Protocol(
        "elpv",
        "Solar cells, near-duplicates together",
        options={**SHARES, "twins": {"hash_distance": 6, "likeness": 0.97}},
        notes="The same shares, but photographs that count as one picture never stand in two splits.",
    ),
    "tyre-condition": Protocol(
        "tyre_condition",
        "Tires (tyre-condition), tested on its own `val` folder",
        asked=0.90,
        options={"val_share": 0.15, "test_share": 0.0},
        folders={"train": "train", "val": "test"},
        notes="Training photographs whose twin is in the test split are dropped by ingest; 15 % of the rest are the validation "
        "split. HOG features with logistic regression reach 0.827.",
    ),
    "cifar10": Protocol(
        "cifar10",
        "CIFAR-10, 10,000 of its training images",
        asked=0.70,
        options={"val_share": 0.1, "test_share": 0.0, "twins": {"hash_distance": 0}},
        folders={"train": "train", "test": "test"},
        notes="1,000 training and 500 test images of each class, 32x32. VGG11 from random weights. HOG features with logistic "
        "regression reach 0.579.",
    ),
}


@dataclass(frozen=True)
class Trial:
    """One seed: what was typed, what it gave. metrics: the final ones of the MLflow run."""

    seed: int
    commit: str
    command: str
    dataset: str
    digest: str
    splits: dict[str, int]
    classes: int
    metrics: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("folder", nargs="?", type=Path, help="the photographs; the solar cells come with a package")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--registered", type=int, nargs="*", default=[], help="seeds that an interrupted call has trained already"
    )
    parser.add_argument("--state", type=Path, default=Path(".tirewatch"), help="state folder of the running stack")
    parser.add_argument("--page", type=Path, default=PAGE)
    chosen = parser.parse_args()
    here = settings_of(chosen.state)
    protocol, trials = PROTOCOLS[chosen.protocol], []
    if unknown := set(chosen.registered) - set(chosen.seeds):
        parser.error(f"--registered {sorted(unknown)} are not among --seeds {chosen.seeds}")
    with TemporaryDirectory(prefix="tirewatch-results-") as workspace:
        folder = photographs(protocol, chosen.folder, Path(workspace))
        for seed in chosen.seeds:
            dataset = protocol.dataset(chosen.protocol, seed)
            take_in(here, protocol, folder, dataset, seed)
            trials.append(trained(here, protocol, dataset, seed, again=seed not in chosen.registered))
            print(json.dumps(trials[-1].metrics), flush=True)
    text = section(protocol, trials)
    chosen.page.write_text(replaced(chosen.page.read_text() if chosen.page.exists() else "# Results\n", text))
    print(text)


def settings_of(state: Path) -> "Settings":
    """Of the running stack, for this process and for the commands it starts."""
    from deploy.stack import read_stack

    os.environ.update(read_stack(state).environment())
    from flows.settings import Settings

    return Settings()


def photographs(protocol: Protocol, folder: Path | None, workspace: Path) -> Path:
    """A folder as the batch will be, of links. Raises SystemExit where the protocol needs a folder that is not given."""
    if not protocol.folders:
        from tasks.sources import solar_cell_folders

        return solar_cell_folders(workspace)
    if folder is None or not folder.is_dir():
        raise SystemExit(f"{protocol.title}: name the folder of its photographs, not {folder}")
    for part, split in protocol.folders.items():
        for path in sorted((folder / part).rglob("*")):
            if path.is_file():
                link = workspace / split / path.relative_to(folder / part)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
    return workspace


def take_in(here: "Settings", protocol: Protocol, folder: Path, dataset: str, seed: int) -> None:
    """The photographs as a sealed batch through the ingest flow; a batch that was taken in before stays as it is."""
    from tasks.sources import upload_folder

    prefix = upload_folder(here.store, folder, dataset, "photographs")
    options = {**protocol.options, **({} if protocol.folders else {"split_seed": seed})}
    run(
        f"ingest/{protocol.recipe}",
        {"dataset": dataset, "prefix": prefix, "options": options},
    )


def trained(here: "Settings", protocol: Protocol, dataset: str, seed: int, again: bool = True) -> Trial:
    """One seed; not again: the newest version that was registered with it. Raises SystemExit when the flow failed or no
    version has that seed.
    """
    from tasks.dataset import open_version
    from tasks.registry import load_card, newest_version, run_metrics

    deployment, parameters = f"train/{protocol.recipe}", {"dataset": dataset, "seed": seed}
    command = run(deployment, parameters) if again else typed(deployment, parameters)
    newest = newest_version(here.mlflow_tracking_uri, dataset)
    numbers = (newest,) if again else range(newest, 0, -1)
    cards = (load_card(here.mlflow_tracking_uri, dataset, number) for number in numbers)
    found = next(((model, card) for model, card in cards if card.seed == seed), None)
    if found is None:
        raise SystemExit(f"{dataset}: no version of seed {seed} was registered; the newest is version {newest}")
    model, card = found
    version = open_version(here.store, card.dataset, card.dataset_version)
    metrics = run_metrics(here.mlflow_tracking_uri, model.run_id)
    return Trial(
        seed, card.commit[:12], command, dataset, version.digest, version.splits, len(version.classes), metrics
    )


def run(deployment: str, parameters: Mapping[str, Any]) -> str:
    """`prefect deployment run`, waited for; the command as it is typed. Raises SystemExit when the run does not complete."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "run", deployment, *_options(parameters), "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    command = typed(deployment, parameters)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-3000:]}")
    return command


def typed(deployment: str, parameters: Mapping[str, Any]) -> str:
    """The command as a person types it."""
    return shlex.join(["prefect", "deployment", "run", deployment, *_options(parameters)])


def _options(parameters: Mapping[str, Any]) -> list[str]:
    return [
        word
        for name, value in parameters.items()
        for word in ("-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval by Student's t); the half is nan for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], math.nan
    half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def section(protocol: Protocol, trials: Sequence[Trial]) -> str:
    """The protocol's part of the page."""
    columns = {
        "test accuracy": "test_accuracy",
        "balanced": "test_balanced_accuracy",
        "AUC": "test_auc",
        "escape rate": "test_escape_rate",
        "over-kill rate": "test_overkill_rate",
        "calibration error": "test_calibration_error",
        "validation accuracy": "val_accuracy",
    }
    shown = {title: name for title, name in columns.items() if all(name in trial.metrics for trial in trials)}
    commits = ", ".join(dict.fromkeys(trial.commit for trial in trials))
    lines = [
        f"## {protocol.title}",
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d}, commit {commits}. {protocol.notes}".rstrip(),
        "",
        f"| seed | train / val / test | {' | '.join(shown)} | minutes | processor minutes |",
        "| --- " * (4 + len(shown)) + "|",
    ]
    for trial in trials:
        splits = " / ".join(str(trial.splits.get(name, 0)) for name in ("train", "val", "test"))
        minutes = (trial.metrics["train_seconds"] / 60, trial.metrics["train_cpu_seconds"] / 60)
        values = [f"{trial.metrics[name]:.4f}" for name in shown.values()]
        lines.append(f"| {trial.seed} | {splits} | {' | '.join(values)} | {minutes[0]:.1f} | {minutes[1]:.1f} |")
    means = [interval([trial.metrics[name] for trial in trials]) for name in shown.values()]
    told = " | ".join(f"**{mean:.4f}** ± {half:.4f}" if math.isfinite(half) else f"{mean:.4f}" for mean, half in means)
    lines.append(f"| mean, 95 % interval | | {told} | | |")
    if protocol.asked is not None:
        mean = means[0][0]
        verdict = "reached" if mean >= protocol.asked else f"missed by {protocol.asked - mean:.4f}"
        lines += ["", f"Asked: {protocol.asked}. {verdict.capitalize()}."]
    commands = "\n".join(trial.command for trial in trials)
    digests = "\n".join(f"{trial.dataset}: {trial.digest}" for trial in trials)
    return "\n".join([*lines, "", "```sh", commands, "```", "", "```", digests, "```", ""])


def replaced(page: str, text: str) -> str:
    """The page with this section in the place of the one under the same heading, or at its end."""
    heading = text.split("\n", 1)[0]
    parts = page.split("\n## ")
    others = [part for part in parts[1:] if f"## {part.split(chr(10), 1)[0]}" != heading]
    found = ["\n## " + part.rstrip("\n") + "\n" for part in others]
    return parts[0].rstrip("\n") + "\n" + "".join(found) + "\n" + text.rstrip("\n") + "\n"


if __name__ == "__main__":
    main()
