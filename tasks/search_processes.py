"""The workers of a search: started, watched and replaced, until the budget is used up. A killed one is only itself."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tasks.recipe import TrainConfig
from tasks.search_space import Search
from tasks.storage import Store

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from tasks.sample_cache import Cache

log = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).parents[1]
_LOOK: Final = 1.0  # seconds between looks at the workers and their trials
_FRUITLESS: Final = 3  # workers in one place: somebody may kill one that waits, three in a row cannot work
_SLACK: Final = 5.0  # seconds a worker gets to end


class WorkerDied(RuntimeError):
    """Workers end without having begun a trial: the next one would too."""


@dataclass(frozen=True)
class Job:
    """What a worker is told; on its standard input, because of the credentials in it."""

    storage: str
    study: str
    study_run: str
    tracking_uri: str
    store: Store
    cache: "Cache"
    dataset: str
    dataset_version: int
    config: TrainConfig
    search: Search
    index: int = 0

    @property
    def workers(self) -> int:
        return self.search.workers

    def to_json(self) -> str:
        told = {name: getattr(self, name) for name in ("storage", "study", "study_run", "tracking_uri", "dataset")}
        models = {"config": self.config.model_dump(mode="json"), "search": self.search.model_dump(mode="json")}
        cache = {"folder": str(self.cache.folder), "limit": self.cache.limit}
        numbers = {"dataset_version": self.dataset_version, "index": self.index}
        return json.dumps({**told, **models, **numbers, "store": asdict(self.store), "cache": cache})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        from tasks.sample_cache import Cache

        told: dict[str, Any] = json.loads(text)
        return cls(
            **{
                **told,
                "store": Store(**told["store"]),
                "cache": Cache(Path(told["cache"]["folder"]), told["cache"]["limit"]),
                "config": TrainConfig.model_validate(told["config"]),
                "search": Search.model_validate(told["search"]),
            }
        )


@dataclass
class Worker:
    """A running worker process and what it said."""

    index: int
    process: "subprocess.Popen[bytes]"
    output: Path
    fruitless: int = 0  # workers in this place, one after the other, that ended before their first trial

    @property
    def name_ends(self) -> str:
        return f":{self.process.pid}"

    @property
    def last_words(self) -> str:
        return self.output.read_text(errors="replace").strip()[-1500:]


def run_search(study: "Study", job: Job, told: Callable[["FrozenTrial"], None]) -> str:
    """Fill the slots of the budget with workers of this machine; why it ended. `told` gets each trial that ends.

    Whoever calls this is the only one at work on the study, so trials that look running are those of dead workers. However it
    ends, no worker stays, and the slots of unfinished trials wait again. Raises WorkerDied.
    """
    from optuna.storages import fail_stale_trials

    from tasks.tuning import lay_out, slots_of

    began, before = time.monotonic(), float(study.user_attrs.get("seconds", 0.0))
    limit, slots = None if job.search.minutes is None else job.search.minutes * 60, slots_of(job.search)
    _set_free(study, job, died=True)
    known = {each.number for each in study.get_trials(deepcopy=False) if each.state.is_finished()}
    workers: dict[int, Worker] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tirewatch-search-")))
        stack.callback(_set_free, study, job, died=False)  # last but one: after the workers are gone
        stack.callback(_end, workers)
        while True:
            lay_out(study, job.search, job.workers)
            fail_stale_trials(study)
            finished = [each for each in study.get_trials(deepcopy=False) if each.state.is_finished()]
            for trial in finished:
                if trial.number not in known:
                    told(trial)
                    known.add(trial.number)
            used = before + time.monotonic() - began
            study.set_user_attr("seconds", used)
            if limit is not None and used >= limit:
                return f"the time of {job.search.minutes:g} minutes is used up"
            left = [each for each in study.get_trials(deepcopy=False) if not each.state.is_finished()]
            if not any(each.user_attrs["slot"] < slots for each in left):
                return "all trials are done"
            _replace_dead(study, job, workers, folder)
            time.sleep(_LOOK)


def _replace_dead(study: "Study", job: Job, workers: dict[int, Worker], folder: Path) -> None:
    """Every place has a running worker; what a dead one held waits again."""
    for index in range(job.workers):
        worker = workers.get(index)
        if worker is not None and worker.process.poll() is None:
            continue
        fruitless = 0
        if worker is not None:
            log.warning("worker %d ended with %s: %s", index, worker.process.returncode, worker.last_words[-400:])
            mine = [each for each in study.get_trials(deepcopy=False) if _is_of(each, worker)]
            fruitless = 0 if mine else worker.fruitless + 1
            if fruitless == _FRUITLESS:
                raise WorkerDied(
                    f"{fruitless} workers of the search ended before their first trial; last words:\n{worker.last_words}"
                )
            for trial in mine:
                _free(study, job, trial, died=True)
        workers[index] = _start(replace(job, index=index), folder, fruitless)


def _start(job: Job, folder: Path, fruitless: int) -> Worker:
    output = folder / f"worker-{job.index}-{time.monotonic_ns()}.log"
    with output.open("wb") as file:
        command = [sys.executable, "-m", "tasks.search_worker", str(os.getpid())]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, cwd=SOURCE, process_group=0
        )
    assert process.stdin is not None
    try:
        process.stdin.write(job.to_json().encode())
        process.stdin.close()
    except BrokenPipeError:  # it died at once; what it said is looked at with the next glance
        log.warning("worker %d did not take its job", job.index)
    return Worker(job.index, process, output, fruitless)


def _end(workers: dict[int, Worker]) -> None:
    for worker in workers.values():
        worker.process.terminate()
    for worker in workers.values():
        try:
            worker.process.wait(_SLACK)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def _set_free(study: "Study", job: Job, died: bool) -> None:
    """Trials that nobody is at work on any more wait again."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        _free(study, job, trial, died)


def _free(study: "Study", job: Job, trial: "FrozenTrial", died: bool) -> None:
    from tasks.search_runs import close_trial_run
    from tasks.tuning import lay_out_again

    if trial.state.is_finished():
        return
    lay_out_again(study, trial, died)
    if run := trial.user_attrs.get("run"):
        close_trial_run(job.tracking_uri, run, "KILLED", "died" if died else "interrupted")


def _is_of(trial: "FrozenTrial", worker: Worker) -> bool:
    return str(trial.user_attrs.get("worker", "")).endswith(worker.name_ends)
