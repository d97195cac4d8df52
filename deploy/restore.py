"""`tirewatch restore`: what a server served, again, from S3; for a lost disk or a new machine."""

from typing import TYPE_CHECKING, Annotated

import typer

from deploy.dataset import State, say, settings_of

if TYPE_CHECKING:
    from tasks.restore import Restored


def restore(
    models: Annotated[
        list[str] | None, typer.Argument(help="Public names of models; without one, all that have a ledger")
    ] = None,
    state: State = None,
) -> None:
    """Champion and previous version of every model on this server again, from S3; nothing is done where they are."""
    from tasks.model_repository import FrontDoor, Runtime
    from tasks.restore import Server, restorable
    from tasks.restore import restore as restored
    from tasks.transaction import Place

    failed = False
    with settings_of(state) as here:
        server = Server(
            here.triton, Runtime(accelerator=here.cpu_accelerator), FrontDoor(capture_share=here.capture_share)
        )
        chosen = models or restorable(here.store)
        for model in chosen:
            try:
                done = restored(Place(here.serving_root, here.store, here.mlflow_tracking_uri, model), server)
            except (
                LookupError,
                ValueError,
                OSError,
                RuntimeError,
            ) as error:  # the other models are restored all the same
                say(f"{model} is not restored: {error}")
                failed = True
            else:
                _say(model, done)
        if not chosen:
            say("no model ever had a champion: there is nothing to restore")
    if failed:
        raise typer.Exit(1)


def _say(model: str, done: "Restored") -> None:
    table = done.table
    back = f", a rollback goes back to v{table.previous.version}" if table.previous else ""
    if not done.changed:
        say(f"{model}: v{table.champion.version} answers{back}; everything is there, nothing was changed")
        return
    fetched = ", ".join(f"{route.network}/{route.version}" for route in done.fetched) or "nothing"
    golden = f"; {done.golden} golden images decided as they were proven" if done.golden else ""
    say(f"{model}: v{table.champion.version} answers{back}; fetched {fetched}{golden}")
    for note in done.notes:
        say(f"{model}: {note}")
