"""A scenario on real services: candidates registered, one announced, nothing trained twice."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mlflow import MlflowClient

from flows import scenario as module
from flows.scenario import scenario
from flows.settings import settings
from tasks import registry
from tasks.candidates import Candidate, Scenario
from tasks.claims import verdicts
from tasks.recipe import Augmentation, TrainConfig
from tasks.storage import Store

QUICK = TrainConfig(
    architecture="cnn",
    pretrained=False,
    image_size=16,
    epochs=1,
    batch_size=16,
    augmentation=Augmentation(flip_horizontal=False),
    precision="float32",
    minimum_accuracy=0,
    minimum_balanced_accuracy=0,
)
TWO = Scenario(
    candidates=(
        Candidate(name="long", overrides={"epochs": 4, "learning_rate": 0.003}),
        Candidate(name="hopeless", overrides={"minimum_accuracy": 1.0}),
        Candidate(name="short"),
    ),
    metric="loss",
)


@pytest.fixture
def here(store: Store, mlflow_uri: str, configured: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TIREWATCH_MLFLOW_TRACKING_URI", mlflow_uri)
    settings.cache_clear()
    yield
    settings.cache_clear()


def batch(photograph: Callable[..., bytes], **splits: range) -> dict[str, bytes]:
    """A sealed batch of two classes with its splits given."""
    files = {
        f"{split}/{label}/{number}.png": photograph(number + shift, kind="PNG")
        for label, shift in (("cut", 0), ("good", 500))
        for split, numbers in splits.items()
        for number in numbers
    }
    return {**files, "_SUCCESS": b""}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "here")
def test_the_best_candidate_is_announced_and_a_killed_scenario_trains_only_what_is_missing(
    store: Store,
    mlflow_uri: str,
    ingested: Callable[..., Any],
    photograph: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ingested(store, "candidates", "batch", batch(photograph, train=range(42), val=range(42, 60), test=range(60, 70)))
    trained, told, train = [], [], module.train

    def dies_at_third(*given: Any, **named: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(given[2])
        return train(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", dies_at_third)
        with pytest.raises(KeyboardInterrupt):
            scenario("candidates", TWO, config=QUICK)
    client = MlflowClient(mlflow_uri)
    assert len(client.search_model_versions("name = 'candidates'")) == 1
    assert registry.newest_registration(mlflow_uri, "candidates") is None, "a candidate waits until it is chosen"

    def counted(*given: Any, **named: Any) -> Any:
        trained.append(given[2])
        return train(*given, **named)

    monkeypatch.setattr(module, "train", counted)
    announce = module.announce
    monkeypatch.setattr(module, "announce", lambda model, version: (told.append(model), announce(model, version)))
    state = scenario("candidates", TWO, config=QUICK, return_state=True)
    assert state.is_completed(), state.message
    assert len(trained) == 3 and trained[2] == QUICK, "the first two were trained by the killed run"
    versions = {int(each.version): each for each in client.search_model_versions("name = 'candidates'")}
    losses = {n: registry.run_metrics(mlflow_uri, each.run_id)["val_nll"] for n, each in versions.items()}
    assert len(losses) == 2 and state.result().version == min(losses, key=lambda n: losses[n])
    assert [model.version for model in told] == [state.result().version], "one is announced"
    assert registry.newest_version(mlflow_uri, "candidates") == state.result().version

    again = scenario("candidates", TWO, config=QUICK, return_state=True)
    assert again.result() == state.result() and len(trained) == 3


@pytest.mark.usefixtures("prefect_server", "here")
def test_candidates_that_failed_are_no_verdict(
    store: Store,
    ingested: Callable[..., Any],
    photograph: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ingested(store, "unlucky", "batch", batch(photograph, train=range(12), val=range(12, 18)))
    monkeypatch.setenv("TIREWATCH_TRAINING_LIMIT", "no-such-limit")
    settings.cache_clear()
    candidates = (Candidate(name="a"), Candidate(name="b", overrides={"minimum_accuracy": 1.0}))
    state = scenario("unlucky", Scenario(candidates=candidates, metric="loss"), config=QUICK, return_state=True)
    assert state.is_failed() and "nothing is decided about unlucky v1: a failed: " in state.message
    assert verdicts(store, "scenario/by-hand") == {}
