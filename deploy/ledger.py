"""`tirewatch ledger | who-was | trace | approve | reject`: who answered when and why, and who may answer next."""

import getpass
import json
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.dataset import AsJson, State, add_row, say, settings_of, table_of

if TYPE_CHECKING:
    from tasks.engine_passport import EnginePassport
    from tasks.ledger import Entry
    from tasks.trace import Trace

_Model = Annotated[str, typer.Argument(help="Public name of the model")]
_Waiting = Annotated[int, typer.Argument(help="Version that waits for approval")]
_Why = Annotated[str, typer.Option(help="Your reason; it stands in the ledger for ever", prompt=True)]
_Who = Annotated[str, typer.Option(help="Your name, as the recipe knows it; without it, that of this account")]


def ledger(model: _Model, as_json: AsJson = False, state: State = None) -> None:
    """Who was champion, since when, why and by whom; exit code 1 when the history does not join."""
    from tasks.ledger import breaks, read_ledger

    with settings_of(state) as here:
        entries = read_ledger(here.store, model)
    found = breaks(entries)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
    else:
        table = table_of("since", "version", "before", "what", "why", "who")
        for entry in entries:
            before = str(entry.previous or "-")
            add_row(table, entry.at[:19], str(entry.version), before, entry.action, entry.why, entry.who)
        say(table)
        for each in found:
            say(f"the history does not join: {each}")
    if found:
        raise typer.Exit(1)


def who_was(
    model: _Model,
    at: Annotated[
        str, typer.Option(help="Moment, such as 2026-03-01T14:30 or 2026-03-01; UTC unless it says otherwise")
    ],
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """Which version answered at a moment, from when to when, and why it was allowed to."""
    from tasks.ledger import champion_at, read_ledger
    from tasks.rollout import beside

    with settings_of(state) as here:
        moment = _moment(at)
        entries, others = read_ledger(here.store, model), beside(here.store, model, moment)
        entry = champion_at(entries, moment)
        if entry is None:
            first = (
                f"the first, v{entries[0].version}, began at {entries[0].at[:19]}" if entries else "it never had one"
            )
            raise LookupError(f"{model} had no champion at {moment:%Y-%m-%d %H:%M:%S} UTC: {first}")
    until = next((each.at for each in entries if each.number == entry.number + 1), None)
    if as_json:
        typer.echo(json.dumps({**asdict(entry), "until": until, "beside": others}, indent=1))
        return
    say(f"{model} v{entry.version}, from {entry.at[:19]} to {until[:19] if until else 'now'} (UTC)")
    for version, step in others.items():
        say(f"beside it v{version} answered {step} (progressive delivery)")
    say(f"{entry.action} by {entry.who}: {entry.why}")
    _say_evidence(entry)


def _moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no moment: write 2026-03-01T14:30, or 2026-03-01T14:30+02:00") from None
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)


def _say_evidence(entry: "Entry") -> None:
    """The gates as a table, the figures below."""
    gates: list[dict[str, Any]] = entry.evidence.get("gates", [])
    if gates:
        table = table_of("gate", "measured", "demanded")
        for gate in gates:
            add_row(table, gate["name"], gate["measured"], gate["demanded"])
        say(table)
    for name, value in entry.evidence.items():
        if name != "gates":
            say(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")


def trace(
    request_id: Annotated[str, typer.Argument(help="Id of the request, as the client sent it")],
    model: Annotated[str, typer.Option(help="Public name of the model; without it, all of them are searched")] = "",
    on: Annotated[str, typer.Option(help="Day of the request (UTC), such as 2026-03-01: quicker than all days")] = "",
    as_json: AsJson = False,
    state: State = None,
) -> None:
    """What is behind one answer: photograph, version, threshold, data, run, commit; and its score, computed again."""
    from tasks.trace import captured_models, find_captured
    from tasks.trace import trace as traced

    with settings_of(state) as here:
        day = date.fromisoformat(on) if on else None
        models = [model] if model else captured_models(here.store, here.serving_root)
        every = (find_captured(here.store, here.serving_root, each, request_id, day) for each in models)
        captured = next((each for each in every if each is not None), None)
        if captured is None:
            raise LookupError(
                f"no request {request_id!r} was captured of {', '.join(models) or 'any model'}{f' on {on}' if on else ''}: "
                f"{here.capture_share:.0%} of the traffic is sampled (TIREWATCH_CAPTURE_SHARE)"
            )
        found = traced(captured, here.store, here.serving_root, here.mlflow_tracking_uri, here.cpu_accelerator)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    else:
        _say_trace(found)
    if not found.equal and found.difference > 1e-4:
        raise typer.Exit(1)


def _say_trace(found: "Trace") -> None:
    captured, origin = found.captured, found.origin
    piece = ", ".join(
        f"{name} {value}" for name, value in (("tire", captured.tire_id), ("line", captured.line)) if value
    )
    rows = [
        ("request", f"{captured.request_id} at {captured.at:%Y-%m-%d %H:%M:%S} UTC{f' ({piece})' if piece else ''}"),
        ("answer", f"{captured.label}, score {captured.score!r}, by {captured.model} v{captured.version}"),
        ("photograph", f"sha256 {found.image_sha256}, in {captured.where}"),
        ("threshold", f"{origin.rule.threshold} on {', '.join(origin.rule.defect_labels) or 'no defect class'}"),
        ("preprocessing", f"{origin.preprocessing}, {origin.image_size} px"),
        ("data", f"{origin.dataset} v{origin.dataset_version}, {origin.dataset_digest}"),
        ("training", f"MLflow run {origin.run_id}, commit {origin.commit}"),
        ("network", f"{origin.precision}; {', '.join(f'{name} {value}' for name, value in origin.passport.items())}"),
        *([("engine", _engine(origin.engine))] if origin.engine else []),
        ("champion then", _champion(found)),
        ("score again", f"{found.label}, score {found.score!r}, by {found.by}"),
        ("verdict", "the same to the last bit" if found.equal else f"differs by {found.difference:.2e}"),
    ]
    table = table_of("", "")
    table.show_header = False
    for name, value in rows:
        add_row(table, name, value)
    say(table)


def _engine(passport: "EnginePassport") -> str:
    return (
        f"{passport.builder} {passport.builder_version} for compute capability {passport.compute_capability}, "
        f"{passport.precision}, built {passport.built_at[:19]}, sha256 {passport.engine_sha256}"
    )


def _champion(found: "Trace") -> str:
    if found.entry is None:
        return "none: the version answered before the ledger began"
    told = f"v{found.entry.version}, {found.entry.action} {found.entry.at[:19]} by {found.entry.who}: {found.entry.why}"
    asked = "" if found.entry.version == found.captured.version else " (this request was not answered by the champion)"
    return told + asked


def approve(
    model: _Model,
    version: _Waiting,
    why: _Why,
    who: _Who = "",
    state: State = None,
) -> None:
    """Let a proven version take over."""
    _decide(model, version, "approve", why, who, state)


def reject(
    model: _Model,
    version: _Waiting,
    why: _Why,
    who: _Who = "",
    state: State = None,
) -> None:
    """Refuse a proven version; the champion goes on answering."""
    _decide(model, version, "reject", why, who, state)


def _decide(model: str, version: int, decision: str, why: str, who: str, state: Path | None) -> None:
    from tasks.approval import answer, open_requests

    with settings_of(state) as here:
        waiting = open_requests(here.store, model)
        chosen = [each for each in waiting if each.version == version]
        if not chosen:
            others = ", ".join(f"v{each.version}" for each in waiting) or "nothing does"
            raise LookupError(f"{model} v{version} does not wait for approval; of {model}, {others}")
        try:
            answer(chosen[-1], decision, who or getpass.getuser(), why)
        except RuntimeError as error:  # somebody else was quicker
            raise ValueError(f"{model} v{version} could not be answered: {error}") from error
    say(f"{model} v{version}: {'approved' if decision == 'approve' else 'rejected'}; its run goes on in the Prefect UI")
