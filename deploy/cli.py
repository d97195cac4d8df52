"""`tirewatch`: the embedded stack and the demo, from the command line."""

import asyncio
import getpass
import os
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Final, NoReturn

import httpx
import typer
from rich.console import Console
from rich.table import Table

from deploy import journal, local
from deploy.archive import app as version_app
from deploy.dataset import State as Addressed
from deploy.dataset import app as dataset_app
from deploy.dataset import settings_of, upload
from deploy.labels import app as labels_app
from deploy.ledger import approve, ledger, reject, trace, who_was
from deploy.quarantine import app as quarantine_app
from deploy.restore import restore
from deploy.services import past_proxies
from deploy.stack import Stack, StackError, read_stack

app: Final = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.add_typer(dataset_app, name="dataset")
app.add_typer(labels_app, name="labels")
app.add_typer(quarantine_app, name="quarantine")
app.add_typer(version_app, name="version")
for command in (upload, ledger, who_was, trace, approve, reject, restore):
    app.command()(command)
console: Final = Console()

State = Annotated[Path, typer.Option(help="State folder of the stack")]
_STATE: Final = Path(".tirewatch")


def fail(error: Exception) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error[/] {error}", markup=True, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@app.command()
def up(
    state: State = _STATE,
    without: Annotated[list[str] | None, typer.Option(help="Leave out this service; may be repeated")] = None,
    new_ports: Annotated[bool, typer.Option("--new-ports", help="Choose all ports anew")] = False,
) -> None:
    """Start the stack, or complete one that runs: S3, Prefect, MLflow, Triton, bridge, workers, watchdog."""
    started = time.monotonic()

    def report(name: str, seconds: float, url: str) -> None:
        console.print(f"[green]✓[/] {name:<12} {seconds:5.1f} s  {url}", highlight=False, soft_wrap=True)

    try:
        stack = local.up(state, report, without=without or (), new_ports=new_ports)
    except StackError as error:
        fail(error)
    console.print(f"up after {time.monotonic() - started:.1f} s; for this shell: source {_shown(stack.state / 'env')}")


@app.command()
def down(state: State = _STATE) -> None:
    """End every process of the stack; its data stays."""
    try:
        leftovers = local.down(state)
    except StackError as error:
        fail(error)
    console.print(f"down; ended {len(leftovers)} process(es) that were left over" if leftovers else "down")


@app.command()
def status(state: State = _STATE) -> None:
    """State, health and address of every service; exit code 1 unless all run and answer."""
    try:
        rows = local.status(state)
        stack = read_stack(state)
    except StackError as error:
        fail(error)
    table = Table(box=None, pad_edge=False)
    for column in ("service", "state", "health", "restarts", "pid", "up for", "url"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        health = "-" if row.healthy is None else "[green]ok[/]" if row.healthy else "[red]no answer[/]"
        running = f"[green]{row.state}[/]" if row.state == "RUNNING" else f"[red]{row.state}[/]"
        table.add_row(row.name, running, health, str(row.restarts), str(row.pid or ""), _age(row.uptime), row.url)
    console.print(table, soft_wrap=True)
    _print_last_events(stack)
    if any(row.state != "RUNNING" or row.healthy is False for row in rows):
        raise typer.Exit(1)


def _print_last_events(stack: Stack) -> None:
    notable = [entry for entry in journal.entries(stack.state) if entry.event not in ("up", "down")][-5:]
    for entry in notable:
        console.print(f"[dim]{entry.at[:19]}[/] {entry.text}", highlight=False, soft_wrap=True)


@app.command()
def logs(
    service: Annotated[str | None, typer.Argument(help="A service; without it, what happened to all of them")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what is added")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many lines of the end")] = 100,
    state: State = _STATE,
) -> None:
    """Print the log of a service, or the events of the whole stack."""
    try:
        stack = read_stack(state)
    except StackError as error:
        fail(error)
    if service is None and not follow:
        for entry in journal.entries(stack.state)[-lines:]:
            typer.echo(f"{entry.at[:19]} {entry.service:<12} {entry.text}")
        return
    path = stack.log(service) if service else stack.state / "events.jsonl"
    if not path.exists():
        known = sorted(found.stem for found in (stack.state / "logs").glob("*.log"))
        fail(StackError(f"there is no log of {service!r}; there are {', '.join(known)}"))
    _print_file(path, lines, follow)


def _print_file(path: Path, lines: int, follow: bool) -> None:
    with path.open(errors="replace") as file:
        typer.echo("".join(deque(file, maxlen=lines)), nl=False)
        while follow:
            try:
                added = file.read()
                if added:
                    typer.echo(added, nl=False)
                elif path.stat().st_size < file.tell():  # rotated
                    return _print_file(path, lines, follow)
                else:
                    time.sleep(0.3)
            except KeyboardInterrupt:
                return None
    return None


@app.command()
def demo(
    data: Annotated[
        str | None, typer.Option(help="A folder of class folders, or `digits`; without it, the solar cells")
    ] = None,
    defect: Annotated[str, typer.Option(help="Classes that count as a defect, separated by commas")] = "",
    stop: Annotated[bool, typer.Option("--stop", envvar="CI", help="Take the stack down at the end")] = False,
    state: State = _STATE,
) -> None:
    """From nothing to a served answer: photographs, dataset, model, server."""
    from deploy.demo import run_demo

    raise typer.Exit(run_demo(state, data, [name for name in defect.split(",") if name], stop))


@app.command()
def register() -> None:
    """Make work pools, limits and the automation for killed runs on the Prefect server that PREFECT_API_URL names."""
    from prefect.settings import PREFECT_API_URL

    from deploy.register import register_line

    address = PREFECT_API_URL.value()
    if not address:
        fail(StackError("no Prefect server is named: export PREFECT_API_URL=http://<server>:4200/api"))
    try:
        told = asyncio.run(register_line())
    except (OSError, httpx.HTTPError, RuntimeError) as error:
        fail(StackError(f"the Prefect server at {address} did not take it: {type(error).__name__} {error}"))
    typer.echo("\n".join([*told, f"now {address} takes `prefect deploy --all`"]))


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="Public name of the model")],
    why: Annotated[str, typer.Option(help="What was wrong; it stands in the ledger for ever", prompt=True)],
    state: Addressed = None,
) -> None:
    """The previous champion answers again; routing, alias, threshold and drift reference come back together."""
    from tasks.rollback import NothingToRollBack, roll_back
    from tasks.routing import RoutingChanged

    started = time.monotonic()
    try:
        with settings_of(state) as here:
            who = f"user/{getpass.getuser()}"
            done = roll_back(here.serving_root, here.triton, here.store, here.mlflow_tracking_uri, model, who, why)
    except (NothingToRollBack, RoutingChanged) as error:
        fail(error)
    took = time.monotonic() - started
    console.print(f"{model} v{done.version} answers again instead of v{done.withdrawn} ({took:.1f} s)", highlight=False)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def main() -> None:
    os.environ.update(past_proxies(os.environ))
    app()


if __name__ == "__main__":
    main()
