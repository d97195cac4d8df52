"""The space of a search, its slots in the storage, and what is chosen among candidates: without a service."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.candidates import Candidate, Scenario, Trained, choose, configurations, value_of
from tasks.recipe import ThresholdRule, TrainConfig
from tasks.registry import TrainedModel
from tasks.sample_cache import Cache
from tasks.search_processes import Job, run_search
from tasks.search_report import page
from tasks.search_space import Range, Search, Values, budget_of, check_space, grid, left_out, with_overrides
from tasks.storage import Store
from tasks.tuning import (
    ATTEMPTS,
    best_of,
    drawn,
    lay_out,
    lay_out_again,
    objective_of,
    open_storage,
    open_study,
    standing,
    take,
)

PLAIN = TrainConfig(architecture="cnn", pretrained=False, image_size=32)
RATES = {"learning_rate": Range(low=1e-4, high=1e-2, log=True)}


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (
            {"learning_rat": Range(low=0.1, high=0.2)},
            "cannot vary 'learning_rat'; it can vary architecture, pretrained",
        ),
        ({"augmentation.blur": Range(low=0.1, high=0.2)}, "'augmentation.blur'.*augmentation.flip_horizontal"),
        ({"seed": Values(values=(1, 2))}, "cannot vary 'seed'"),
        ({"threshold.recall": Values(values=(0.9, 0.95))}, "cannot vary 'threshold.recall'"),
        (
            {"learning_rate": Range(low=-1, high=0.1)},
            "space, learning_rate: .*learning_rate: Input should be greater than 0",
        ),
        ({"batch_size": Range(low=8.5, high=64)}, "batch_size takes whole numbers"),
        ({"architecture": Values(values=("cnn", "resnet1"))}, "space, architecture: .*resnet1"),
        ({"optimizer": Range(low=0, high=1)}, "optimizer is no number"),
        ({"loss": Values(values=("focal", "cross_entropy"))}, "loss changes what the validation loss is"),
    ],
)
def test_a_space_that_the_recipe_does_not_allow_is_refused_by_name(space: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_space(Search(space=space), PLAIN)


def test_a_value_is_allowed_where_some_combination_allows_it() -> None:
    space = {"architecture": Values(values=("cnn", "resnet18")), "pretrained": Values(values=(True, False))}
    assert len(check_space(Search(space=space), PLAIN)) == 3, "a pretrained cnn does not exist"
    with pytest.raises(ValueError, match="no pretrained weights for cnn"):
        check_space(Search(space={"pretrained": Values(values=(True,))}), PLAIN)


def test_ranges_that_are_none_are_refused() -> None:
    for wrong, says in (
        ({"space": {}}, "at least 1"),
        ({"space": {"learning_rate": {"low": 2, "high": 1}}}, "must be below"),
        ({"space": {"shift": {"low": 0, "high": 1, "log": True}}}, "low above 0"),
    ):
        with pytest.raises(ValidationError, match=says):
            Search.model_validate(wrong)


def test_overrides_reach_nested_fields_and_keep_the_rest() -> None:
    made = with_overrides(PLAIN, {"augmentation.shift": 0.1, "batch_size": 64})
    assert (made.augmentation.shift, made.batch_size, made.architecture) == (0.1, 64, "cnn")
    assert made.augmentation.contrast == PLAIN.augmentation.contrast
    with pytest.raises(ValueError, match=r"no field 'augmentation\.shif'"):
        with_overrides(PLAIN, {"augmentation.shif": 0.1})


def test_a_grid_holds_every_combination_once_and_needs_steps() -> None:
    space: dict[str, Values | Range] = {"batch_size": Values(values=(8, 16)), "frozen_stages": Range(low=0, high=2)}
    every = grid(Search(space=space, sampler="grid"))
    assert len(every) == 6 == len({tuple(each.items()) for each in every})
    with pytest.raises(ValueError, match="cannot enumerate learning_rate"):
        check_space(Search(space=RATES, sampler="grid"), PLAIN)


CUBE: dict[str, Values | Range] = {
    "batch_size": Values(values=(8, 16, 32)),
    "frozen_stages": Range(low=0, high=2),
    "weight_decay": Values(values=(0.0, 0.05, 0.1)),
}


def run_all(study: Any, search: Search) -> list[int]:
    """Every slot that a worker gets, told with a loss."""
    lay_out(study, search, 1)
    slots = []
    while trial := take(study, "me:1", search):
        drawn(study, trial, search)
        slots.append(trial.user_attrs["slot"])
        trial.set_user_attr("figures", {"loss": 1.0 + trial.number})
        study.tell(trial, 1.0 + trial.number)
    return slots


def test_a_grid_without_a_budget_is_tried_whole_and_others_twenty_times_or_by_the_clock() -> None:
    assert [budget_of(Search(space=CUBE, sampler=sampler)) for sampler in ("grid", "random", "tpe")] == [27, 20, 20]  # type: ignore[arg-type]
    part, whole = (Search(space=CUBE, sampler="grid", trials=trials) for trials in (20, 99))
    assert (budget_of(part), budget_of(whole)) == (20, 27)
    assert "20 of 27 combinations: leave trials empty" in left_out(part) and left_out(whole) == ""
    assert budget_of(Search(space=CUBE, minutes=5)) is None and budget_of(Search(space=CUBE, minutes=5, trials=7)) == 7


def test_the_page_says_how_much_of_a_grid_was_tried(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    for trials, says in ((20, "grid sampler (20 of 27 combinations), 20 complete"), (None, "(27 of 27 combinations)")):
        search = Search(space=CUBE, sampler="grid", trials=trials)
        study = open_study(storage, "s", search)
        assert len(run_all(study, search)) == (20 if trials else 7)
        assert says in page("x", search, standing(study, "loss"), {}, {}, "all are done", b"", "link")


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_a_resumption_with_a_smaller_budget_begins_nothing_beyond_it(tmp_path: Path, sampler: Any) -> None:
    large = Search(space=CUBE, sampler=sampler, trials=8)
    study = open_study(open_storage(f"sqlite:///{tmp_path}/s.db"), "s", large)
    lay_out(study, large, 1)
    small = large.model_copy(update={"trials": 3})
    assert run_all(study, small) == [0, 1, 2]
    job = Job("", "s", "", "", Store("bucket"), Cache(tmp_path, 0), "x", 1, PLAIN, small)
    assert run_search(study, job, print) == "all trials are done", "and no worker is started for the rest"
    assert run_all(study, large) == [3, 4, 5, 6, 7], "what waited is there for a larger budget"


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
def test_workers_share_the_slots_and_none_is_run_twice_or_beyond_the_budget(tmp_path: Path, sampler: Any) -> None:
    space: dict[str, Values | Range] = {
        "batch_size": Values(values=(8, 16, 32)),
        "weight_decay": Values(values=(0.0, 0.1)),
    }
    search = Search(space=space, sampler=sampler, trials=5, seed=2)

    def searched(name: str, workers: int) -> list[dict[str, Any]]:
        studies = [open_study(open_storage(f"sqlite:///{tmp_path}/{name}.db"), "s", search) for _ in range(workers)]
        lay_out(studies[0], search, workers)
        lay_out(studies[0], search, workers)
        found: dict[int, dict[str, Any]] = {}
        while trials := [(study, trial) for study in studies if (trial := take(study, "me:1", search))]:
            for study, trial in trials:
                found[trial.user_attrs["slot"]] = drawn(study, trial, search)
                study.tell(trial, float(found[trial.user_attrs["slot"]]["batch_size"]))
        assert sorted(found) == list(range(5)) and len(studies[0].get_trials()) == 5
        return [found[slot] for slot in range(5)]

    alone, together = searched("alone", 1), searched("together", 2)
    if sampler == "tpe":
        assert alone == searched("again", 1), "the seed decides, where the order of the results is the same"
    else:
        assert alone == together, "the seed of a slot decides, whoever takes it"
    if sampler == "grid":
        assert len({tuple(each.items()) for each in alone}) == 5


def test_workers_that_reach_for_the_same_slots_at_once_never_get_one_twice(tmp_path: Path) -> None:
    search = Search(space={"learning_rate": RATES["learning_rate"]}, trials=60, sampler="random")
    address = f"sqlite:///{tmp_path}/search.db"
    lay_out(open_study(open_storage(address), "raced", search), search, 0)

    def worker(name: str) -> list[int]:
        study = open_study(open_storage(address), "raced", search)
        taken = []
        while trial := take(study, name, search):
            taken.append(trial.number)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [number for numbers in pool.map(worker, "abcd") for number in numbers]
    assert sorted(taken) == list(range(60))


def test_the_slot_of_a_dead_worker_waits_again_with_its_values_and_is_given_up_in_the_end(tmp_path: Path) -> None:
    search = Search(space=RATES, trials=1, sampler="random")
    study = open_study(open_storage(f"sqlite:///{tmp_path}/s.db"), "s", search)
    lay_out(study, search, 1)
    values = []
    for attempt in range(1, ATTEMPTS + 1):
        trial = take(study, f"me:{attempt}", search)
        assert trial is not None and trial.user_attrs["attempts"] == attempt
        values.append(drawn(study, trial, search))
        assert lay_out_again(study, study.get_trials()[trial.number], died=True) == (attempt < ATTEMPTS)
    assert take(study, "me:9", search) is None and values[0] == values[1] == values[2]
    [tried] = standing(study, "loss")
    assert (tried.state, tried.reason) == ("failed", "its process died") and best_of([tried], "loss") is None


def test_whatever_the_metric_optuna_minimises() -> None:
    assert objective_of("loss", {"loss": 0.3}) == 0.3 and objective_of("f1", {"f1": 0.9}) == -0.9


def registered(name: str, value: float, evaluated: str = "a") -> Trained:
    return Trained(name, "registered", 1.0, TrainedModel("x", 1, "r"), value, {}, evaluated)


def test_the_direction_of_the_metric_decides_and_only_equal_evaluations_are_compared() -> None:
    both = [registered("first", 0.2), registered("second", 0.4), Trained("third", "below minimum", value=None)]
    for metric, name in (("escape_bound", "first"), ("cost", "first"), ("loss", "first"), ("recall", "second")):
        chosen = choose(both, metric)  # type: ignore[arg-type]
        assert chosen is not None and chosen.name == name, metric
    foreign = choose([*both, registered("foreign", 0.9, "b")], "recall")
    assert foreign is not None and foreign.name == "second"
    assert choose([Trained("third", "below minimum")], "recall") is None


def test_cost_weighs_misses_and_over_kill_by_the_threshold_rule() -> None:
    point = {"escapes": 2, "overkills": 5, "escape_upper": 0.3}
    evaluation = {"validation": {"operating": point, "figures": {"recall": 0.8}}, "calibration": {"nll_after": 0.5}}
    rule = ThresholdRule(miss_cost=10, overkill_cost=1)
    assert [value_of(m, evaluation, rule) for m in ("cost", "escape_bound", "loss", "recall")] == [25, 0.3, 0.5, 0.8]


def test_candidates_are_checked_before_any_work() -> None:
    for candidates, metric, says in (
        ((Candidate(name="a"), Candidate(name="a")), "recall", "two candidates are called 'a'"),
        ((Candidate(name="a"), Candidate(name="b")), "recall", "'a' and 'b' are the same"),
        ((Candidate(name="a", overrides={"epocs": 3}),), "recall", "candidate 'a': the recipe has no field 'epocs'"),
        ((Candidate(name="a"),), "cost", "needs defect_labels"),
    ):
        with pytest.raises(ValueError, match=says):
            configurations(Scenario(candidates=candidates, metric=metric), PLAIN)
