"""`tirewatch version ...`: a version as one signed file, for a plant without network, and its activation there."""

import getpass
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from deploy.dataset import State, say, settings_of

if TYPE_CHECKING:
    from flows.settings import Settings
    from tasks.version_transfer import Plant

app: Final = typer.Typer(
    no_args_is_help=True, help="A version as one signed file: key, export, verify, import, activate."
)

_Trusted = Annotated[
    Path | None, typer.Option("--trusted", help="trusted.pem of who must have signed it", exists=True, dir_okay=False)
]
_Unsigned = Annotated[bool, typer.Option("--unsigned", help="Accept an archive whose maker nobody vouches for")]


@app.command("key")
def key(folder: Annotated[Path, typer.Argument(help="Folder for signing.pem and trusted.pem")]) -> None:
    """Make a pair of keys: signing.pem stays with who exports, trusted.pem goes to the plants."""
    from tasks.archive import key_id, make_keys, trusted_key

    with _told():
        signing, trusted = make_keys(folder)
        say(f"{signing} signs (keep it to yourself), {trusted} verifies; its id is {key_id(trusted_key(trusted))}")


@app.command("export")
def export(
    model: Annotated[str, typer.Argument(help="Public name of the model")],
    version: Annotated[int, typer.Argument(help="A published version of it")],
    file: Annotated[Path, typer.Argument(help="The archive to write, .tar")],
    key: Annotated[Path | None, typer.Option(help="signing.pem; without it the archive is not signed")] = None,
    state: State = None,
) -> None:
    """Sealed networks, card, evidence, ledger and golden photographs of a version in one file."""
    from tasks.archive import signing_key
    from tasks.version_transfer import export_version

    with _plant(state) as plant:
        digests = export_version(plant, model, version, file, signing_key(key) if key else None)
    size = file.stat().st_size / 1e6
    say(f"{file}: {model} v{version}, {len(digests)} members, {size:.1f} MB, {'signed' if key else 'not signed'}")


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="An archive", exists=True, dir_okay=False)],
    trusted: _Trusted = None,
    unsigned: _Unsigned = False,
) -> None:
    """Check every byte of an archive and say what it holds; needs no stack."""
    from tasks.archive import open_archive, trusted_key

    _require_choice(trusted, unsigned)
    with _told():
        archive = open_archive(file, trusted_key(trusted) if trusted else None)
        about = archive.about
        by = f"signed by {archive.signed_by}" if archive.signed_by else "signature not checked"
        say(
            f"{about['model']} v{about['version']} ({', '.join(about['networks'])}), {len(archive.digests)} members whole, {by}"
        )


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="An archive", exists=True, dir_okay=False)],
    trusted: _Trusted = None,
    unsigned: _Unsigned = False,
    state: State = None,
) -> None:
    """Check an archive, publish its version beside the others and register it; nothing routes to it yet."""
    from tasks.archive import trusted_key
    from tasks.version_transfer import import_version

    _require_choice(trusted, unsigned)
    with _plant(state) as plant:
        done = import_version(plant, file, trusted_key(trusted) if trusted else None)
    say(f"{done.model} v{done.version} is published in {', '.join(done.networks)} and registered; {done.rung.measured}")
    if done.rehearsal:
        say(f"it is a rehearsal and cannot be champion: {done.rehearsal}")
    else:
        say(f"to let it answer here: tirewatch version activate {done.model} {done.version}")


@app.command("activate")
def activate(
    model: Annotated[str, typer.Argument(help="Public name of the model")],
    version: Annotated[int, typer.Argument(help="An imported version of it")],
    why: Annotated[str, typer.Option(help="Your reason; it stands in the ledger for ever", prompt=True)],
    state: State = None,
) -> None:
    """Let an imported version take over here: compared on its golden photographs, switched to under a probe load."""
    from tasks.activation import activate as activated

    who = f"user/{getpass.getuser()}@{socket.gethostname()}"
    with settings_of(state) as here:
        try:
            done = activated(_plant_of(here), here.triton, model, version, who, why, here.capture_share)
        except RuntimeError as error:  # the server refused it, decided otherwise, or another switch came first
            raise ValueError(f"{model} v{version} does not answer: {error}") from error
    told = "; ".join(gate.measured for gate in done.swap.gates)
    if done.swap.undone:
        raise typer.Exit(_failed(f"{model} v{version} was taken back: {told}"))
    before = f" instead of v{done.swap.previous}; {told}" if done.swap.previous else ", the first version here"
    say(f"{model} v{version} answers{before}")
    say(f"golden photographs on this machine: {done.rung.measured}")


def _failed(why: str) -> int:
    typer.secho(f"error {why}", err=True, fg="red")
    return 1


def _require_choice(trusted: Path | None, unsigned: bool) -> None:
    if (trusted is None) != unsigned:
        raise typer.BadParameter(
            "say whose signature you trust (--trusted trusted.pem), or that you need none (--unsigned)"
        )


@contextmanager
def _plant(state: Path | None) -> "Iterator[Plant]":
    with settings_of(state) as here:
        yield _plant_of(here)


def _plant_of(here: "Settings") -> "Plant":
    from tasks.version_transfer import Plant

    return Plant(here.serving_root, here.store, here.mlflow_tracking_uri, here.cpu_accelerator)


@contextmanager
def _told() -> "Iterator[None]":
    """What people can mend ends in one sentence and exit code 1."""
    try:
        yield
    except (ValueError, FileExistsError) as error:
        raise typer.Exit(_failed(str(error))) from None
