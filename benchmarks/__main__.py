"""`make bench`: every benchmark in turn, their tables and figures into build/performance.md. docs/performance.md
says what they mean and what was tried.

A benchmark is a module of this package; run as `python -m benchmarks.<name>` it prints a table for people and, as its
last line, one JSON object with every figure, the limits it was compared with, and the versions. Where it has `held`, it ends
with an error when a figure is below its limit.
"""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "build" / "performance.md"
INTRODUCTION = """# Performance

Written by `make bench`. What counts are the ratios: each is taken against a bare limit or a peer *in the same
run*; absolute figures belong to the machine named beside them.
"""


ALONE = {
    "results",  # takes hours, and photographs that are not shipped
    "load",  # parts of swap.py
    "switching",
}


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if not path.stem.startswith("_") and path.stem not in ALONE
    )


def run(name: str) -> tuple[str, dict[str, Any]]:
    """(what it printed for people, its figures). Raises RuntimeError when it failed or printed no figures."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.rstrip().splitlines()
    try:
        figures: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise RuntimeError(f"benchmarks.{name} ended with {done.returncode}:\n{done.stdout[-2000:]}") from error
    if done.returncode and all(figures.get("held", {}).values()):
        raise RuntimeError(f"benchmarks.{name} ended with {done.returncode} after its figures")
    return "\n".join(lines[:-1]).strip(), figures


def section(name: str, printed: str, figures: dict[str, Any]) -> str:
    """One benchmark's part of the page."""
    measured = f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {platform.python_version()}"
    body = json.dumps(figures, indent=1)
    folded = f"<details><summary>figures</summary>\n\n```json\n{body}\n```\n\n</details>\n"
    return f"## {name}\n\nMeasured {measured}.\n\n```\n{printed}\n```\n\n{folded}"


def main() -> None:
    chosen = sys.argv[1:] or names()
    sections, missed = [], []
    for name in chosen:
        printed, figures = run(name)
        print(printed, flush=True)
        sections.append(section(name, printed, figures))
        missed += [f"{name}: {figure}" for figure, held in figures.get("held", {}).items() if not held]
    if chosen == names():
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text("\n".join([INTRODUCTION, *sections]))
    if missed:
        sys.exit(f"below its limit: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
