"""Trials of a search in an Optuna storage that its workers share: slots to fill, what became of each, what is best.

The budget is laid out as waiting trials (slots) before any work: workers take them, so none runs more than were asked for, and
what a dead worker held is laid out again. The seed of a slot decides what is drawn for it, whoever takes it and whenever.
"""

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tasks.recipe import NOT_IDENTITY, TrainConfig
from tasks.search_space import Range, Scalar, Search, Values, budget_of, grid, whole

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

    from tasks.dataset import DatasetVersion

log = logging.getLogger(__name__)

ATTEMPTS: Final = 3  # of one slot whose worker dies each time: then the slot is what kills them
HEARTBEAT: Final = 5  # seconds
GRACE: Final = 30  # seconds without one: the worker is taken for dead. A busy machine may delay one for long
_FORMAT: Final = 1  # of what is stored; another one is another study
_LOCKED: Final = 60.0  # seconds that SQLite waits for another process


@dataclass(frozen=True)
class Tried:
    """What became of one slot. value: the metric (higher or lower is better, as it is); None unless the trial was completed.

    state: complete, pruned, failed, running or waiting. config: the whole configuration, to be trained again by hand.
    """

    slot: int
    number: int
    state: str
    value: float | None
    overrides: Mapping[str, Scalar]
    config: Mapping[str, Any]
    losses: Mapping[int, float]
    figures: Mapping[str, float]
    seconds: float
    run_id: str
    reason: str


def identity_of(version: "DatasetVersion", config: TrainConfig, search: Search) -> str:
    """Name of the study: the dataset and what decides which trials are made and how they are judged, the budget excepted."""
    told = {
        "digest": version.digest,
        "config": config.model_dump(mode="json", exclude=NOT_IDENTITY),
        "search": search.model_dump(mode="json", exclude={"trials", "minutes", "workers"}),
        "format": _FORMAT,
    }
    return f"{version.name}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}"


def open_storage(url: str) -> "RDBStorage":
    """The storage of all searches, made where it is a SQLite file that is not there yet."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage

    arguments: dict[str, Any] = {"pool_pre_ping": True}
    in_a_file = url.startswith("sqlite:///")
    if in_a_file:
        Path(url.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
        arguments = {"connect_args": {"timeout": _LOCKED}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats; Optuna's version is pinned
        storage = RDBStorage(
            url,
            engine_kwargs=arguments,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=_found_dead,
        )
    if in_a_file:
        _one_at_a_time(storage)
    return storage


def _one_at_a_time(storage: "RDBStorage") -> None:
    """Transactions take SQLite's lock when they begin. Python's driver takes it at the first writing statement, and SQLite
    knows no SELECT FOR UPDATE: two workers both read that a trial waits, and both took it (37 of 60, with four workers).
    """
    from sqlalchemy import event

    def begin_by_hand(connection: Any, record: object) -> None:
        connection.isolation_level = None

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "connect", begin_by_hand)
    event.listen(storage.engine, "begin", begin)
    storage.engine.dispose()  # connections that were opened before


def open_study(storage: "RDBStorage", name: str, search: Search) -> "Study":
    """The study, with its finished trials where it was begun before. Its objective is minimised: `objective_of`."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(storage=storage, study_name=name, load_if_exists=True, pruner=_pruner(search))


def lay_out(study: "Study", search: Search, spare: int) -> None:
    """Make the slots of the budget that are not there yet; where time alone is the budget, as many as keep `spare` waiting."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    made, budget = len({each.user_attrs["slot"] for each in trials}), budget_of(search)
    if budget is None:
        budget = made + max(0, spare - sum(each.state == TrialState.WAITING for each in trials))
    wanted: Sequence[Mapping[str, Scalar]] = grid(search) if search.sampler == "grid" else [{}] * budget
    for slot in range(made, budget):
        study.enqueue_trial(dict(wanted[slot]), user_attrs={"slot": slot, "attempts": 1})


def slots_of(search: Search) -> float:
    """How many slots are to be tried, from the first on: an earlier run with a larger budget may have laid out more."""
    budget = budget_of(search)
    return math.inf if budget is None else budget


def take(study: "Study", worker: str, search: Search) -> "Trial | None":
    """A waiting slot of the budget, now this worker's; None where none is waiting. Of several workers one gets it."""
    import optuna
    from optuna.trial import TrialState

    storage = study._storage  # `Study.ask` would make a trial beyond the budget where none is waiting
    slots = slots_of(search)
    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if waiting.user_attrs["slot"] >= slots:
            continue
        try:
            storage.record_heartbeat(waiting._trial_id)  # type: ignore[attr-defined]  # first: who dies next is missed
            if not storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                continue
        except optuna.exceptions.UpdateFinishedTrialError:
            continue
        trial = optuna.Trial(study, waiting._trial_id)
        trial.set_user_attr("worker", worker)
        return trial
    return None


def drawn(study: "Study", trial: "Trial", search: Search) -> dict[str, Scalar]:
    """What the sampler chooses for the slot, by a seed of the slot's own."""
    study.sampler = _sampler(search, trial.user_attrs["slot"])
    return {name: trial._suggest(name, _distribution(name, dimension)) for name, dimension in search.space.items()}


def lay_out_again(study: "Study", trial: "FrozenTrial", died: bool) -> bool:
    """Give the slot of an unfinished or failed trial to another worker, with the values drawn for it; the trial itself has
    failed. died: it counts as an attempt. False where there have been enough of them.
    """
    import optuna
    from optuna.trial import TrialState

    if not trial.state.is_finished():
        try:
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:  # it ended or was found dead by another process meanwhile
            return False
    attempts = int(trial.user_attrs["attempts"]) + died
    if attempts > ATTEMPTS:
        log.warning("trial %d is given up: its worker died %d times", trial.number, ATTEMPTS)
        return False
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs={"fixed_params": trial.system_attrs.get("fixed_params", {})},
            user_attrs={"slot": trial.user_attrs["slot"], "attempts": attempts},
        )
    )
    return True


def objective_of(metric: str, figures: Mapping[str, float]) -> float:
    """What Optuna minimises: the loss, or the metric with its sign turned; its pruners then compare losses the same way."""
    return figures[metric] if metric == "loss" else -figures[metric]


def standing(study: "Study", metric: str) -> tuple[Tried, ...]:
    """What became of every slot: its newest trial, in the order of the slots."""
    newest: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        newest[trial.user_attrs["slot"]] = trial
    return tuple(_tried(slot, trial, metric) for slot, trial in sorted(newest.items()))


def best_of(tried: Sequence[Tried], metric: str) -> Tried | None:
    """The completed trial with the best value, the earlier one of equals; None where none was completed."""
    complete = [each for each in tried if each.value is not None]
    return min(complete, key=lambda each: (objective_of(metric, each.figures), each.slot), default=None)


def importance_of(study: "Study") -> dict[str, float]:
    """Share of the spread of the objective that each field explains (fANOVA, Hutter et al. 2014); most first.

    PED-ANOVA, Optuna's default, looks at the best tenth only: of 14 trials it named a field without any effect first.
    Empty where too few trials were completed to tell, or all came out the same.
    """
    import optuna
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    varied = (
        [name for name in complete[0].params if len({str(each.params[name]) for each in complete}) > 1]
        if complete
        else []
    )
    if len(complete) < 4 or not varied or len({each.value for each in complete}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, params=varied, evaluator=evaluator)
    return {name: float(value) for name, value in found.items() if not math.isnan(value)}


def winner_of(storage: "RDBStorage", name: str) -> dict[str, Any] | None:
    """What `set_winner` wrote down for the study."""
    import optuna

    told: dict[str, Any] | None = optuna.load_study(study_name=name, storage=storage).user_attrs.get("winner")
    return told


def set_winner(storage: "RDBStorage", name: str, told: Mapping[str, Any]) -> None:
    """Write down which version was trained with the best configuration."""
    import optuna

    optuna.load_study(study_name=name, storage=storage).set_user_attr("winner", dict(told))


def _found_dead(study: "Study", trial: "FrozenTrial") -> None:
    lay_out_again(study, trial, died=True)


def _tried(slot: int, trial: "FrozenTrial", metric: str) -> Tried:
    from optuna.trial import TrialState

    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    told, state = trial.user_attrs, names.get(trial.state, trial.state.name.lower())
    figures = told.get("figures", {})
    return Tried(
        slot=slot,
        number=trial.number,
        state=state,
        value=figures[metric] if state == "complete" else None,
        overrides=told.get("overrides", trial.params),
        config=told.get("config", {}),
        losses=trial.intermediate_values,
        figures=figures,
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        run_id=told.get("run", ""),
        reason=told.get("reason", "its process died" if state == "failed" else ""),
    )


def _sampler(search: Search, slot: int) -> "BaseSampler":
    import optuna

    seed = int.from_bytes(hashlib.sha256(f"{search.seed}/{slot}".encode()).digest()[:4])
    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(3, (budget_of(search) or 30) // 3)))
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(search: Search) -> Any:
    from optuna import pruners

    if search.pruning == "median":
        return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=search.pruning_after)
    if search.pruning == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource=search.pruning_after)
    return pruners.NopPruner()


def _distribution(name: str, dimension: Values | Range) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Values):
        return CategoricalDistribution(dimension.values)
    if whole(name):
        step = int(dimension.step or 1)
        low, high = int(dimension.low), int(dimension.high)
        return IntDistribution(low, low + (high - low) // step * step, log=dimension.log, step=step)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)
