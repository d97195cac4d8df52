"""Who decides about a subject of the line: claimed before work begins, decided once, and kept.

    line/<stage>/<subject>/claim-0001.json   the flow run that works on it; a higher number took over from a dead one
    line/<stage>/<subject>/verdict.json      what became of it: registered, below minimum, promoted, refused, ...

Events come twice or late and runs die, so what follows an event claims its subject by a conditional write first: of any number
of runs one works, and a subject without a verdict is visible to `flows/sweep.py`. A stage is a deployment
(`train/tire`), because several deployments may follow the same event.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from tasks.storage import Store, delete, list_objects, read, write, write_if_absent

PREFIX: Final = "line"


@dataclass(frozen=True)
class Subject:
    """What a stage decides about, such as `train/tire` and `tire/v00000003`; both become parts of a key."""

    stage: str
    name: str

    @property
    def folder(self) -> str:
        return f"{PREFIX}/{self.stage}/{self.name}/"

    @property
    def verdict_key(self) -> str:
        return f"{self.folder}verdict.json"


def batch_subject(prefix: str, content: str) -> Subject:
    """What ingest decides about: the batch at `incoming/<dataset>/<batch>/`, with its content digest."""
    _, dataset, batch = prefix.strip("/").split("/")
    return Subject(f"ingest/{dataset}", f"{batch}/{content.removeprefix('sha256:')[:16]}")


def version_subject(stage: str, name: str, version: int) -> Subject:
    """What training and promotion decide about: a version of a dataset or of a model."""
    return Subject(stage, f"{name}/v{version:08d}")


@dataclass(frozen=True)
class Verdict:
    """What a stage decided about a subject. run: the flow run that did; figures: what others may want to know of it."""

    outcome: str
    run: str
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    figures: dict[str, Any] = field(default_factory=dict)


def read_verdict(store: Store, subject: Subject) -> Verdict | None:
    """The verdict about the subject, or None where none has been made."""
    try:
        return Verdict(**json.loads(read(store, subject.verdict_key)))
    except FileNotFoundError:
        return None


def write_verdict(store: Store, subject: Subject, verdict: Verdict) -> None:
    """Writes the verdict down. A later one, by hand, replaces it: the bucket keeps the former version."""
    write(store, subject.verdict_key, json.dumps(asdict(verdict), indent=1).encode())


def verdicts(store: Store, stage: str) -> dict[str, Verdict]:
    """Subject name -> verdict, for every subject that the stage has decided about."""
    folder = f"{PREFIX}/{stage}/"
    found = [each.key for each in list_objects(store, folder) if each.key.endswith("/verdict.json")]
    return {
        key.removeprefix(folder).removesuffix("/verdict.json"): Verdict(**json.loads(read(store, key))) for key in found
    }


def verdict_times(store: Store, stage: str) -> Iterator[tuple[str, datetime]]:
    """First part of the subject's name (a batch, a dataset, a model) and when its verdict was written, for every verdict of
    the stage: from the listing alone, by the store's clock.
    """
    folder = f"{PREFIX}/{stage}/"
    for each in list_objects(store, folder):
        if each.key.endswith("/verdict.json") and each.modified is not None:
            yield each.key.removeprefix(folder).split("/")[0], each.modified


def claimant(store: Store, subject: Subject) -> str | None:
    """The flow run that claimed the subject last."""
    claims = _claims(store, subject)
    return json.loads(read(store, claims[-1]))["run"] if claims else None


def claim(store: Store, subject: Subject, run: str, is_alive: Callable[[str], bool]) -> bool:
    """True when `run` may work on the subject: it is the first, or its claimant is not alive any more.

    Of several runs at once exactly one is told True. The same run asking again (a retry) keeps its claim.
    """
    while True:
        claims = _claims(store, subject)
        if claims:
            owner = json.loads(read(store, claims[-1]))["run"]
            if owner == run:
                return True
            if is_alive(owner):
                return False
        told = {"run": run, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        if write_if_absent(store, f"{subject.folder}claim-{len(claims) + 1:04d}.json", json.dumps(told).encode()):
            return True


def release(store: Store, subject: Subject) -> None:
    """The work is done and may be done anew: nobody claims the subject any more."""
    delete(store, _claims(store, subject))


def _claims(store: Store, subject: Subject) -> list[str]:
    return [each.key for each in list_objects(store, subject.folder) if "/claim-" in each.key]


def reason_to_leave(store: Store, subject: Subject, run: str, is_alive: Callable[[str], bool], what: str) -> str | None:
    """Why `run` must leave the subject alone: it is decided, or another run is at it. None: it is claimed for `run` now."""
    if made := read_verdict(store, subject):
        return f"{subject.stage} has decided about {what}: {made.outcome}, run {made.run}"
    if not claim(store, subject, run, is_alive):
        return f"another run of {subject.stage} is at work on {what}"
    return None
