import math
import time

import numpy as np
import pytest
import torch

from tasks.augmentation import augment
from tasks.decision import DecisionRule
from tasks.evaluation import evaluate
from tasks.losses import Loss
from tasks.optimization import EarlyStopping, RateSchedule, learning_rate_factor
from tasks.recipe import Augmentation, TrainConfig
from tasks.samples import Samples
from tasks.temperature import fit_temperature
from tasks.training import predict, train

STILL = Augmentation(flip_horizontal=False, brightness=0, contrast=0)
QUICK = TrainConfig(
    architecture="cnn",
    pretrained=False,
    image_size=16,
    epochs=2,
    batch_size=16,
    learning_rate=3e-3,
    augmentation=STILL,
    precision="float32",
)
CLASSES = ("dark", "light")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Networks this small are slower on several threads, and many times slower while others use the processors."""
    monkeypatch.setattr("tasks.training.processors", lambda: 1)


def samples(count: int, seed: int = 0, classes: int = 2) -> Samples:
    """Noise around a grey that the class sets."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    level = 80 + 80 * labels / max(classes - 1, 1)
    images = random.normal(level[:, None, None, None], 30, (count, 16, 16, 3)).clip(0, 255).astype(np.uint8)
    return Samples(images, labels.astype(np.int64), np.array([f"{seed}-{n}" for n in range(count)]))


@pytest.fixture(scope="module")
def digits() -> list[Samples]:
    """scikit-learn's 1,797 scans at 32 pixels: train, validation, test."""
    import cv2
    from sklearn.datasets import load_digits

    scans = load_digits()
    grey = [cv2.resize((scan * 15).astype(np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC) for scan in scans.images]
    images = np.repeat(np.stack(grey)[..., None], 3, axis=3)
    order = np.random.default_rng(0).permutation(len(images))
    parts = np.split(order, [1257, 1527])
    return [Samples(images[p], scans.target[p].astype(np.int64), p.astype(str)) for p in parts]


def test_a_network_learns_the_digits(digits):
    training, validation, test = digits
    names = tuple(str(n) for n in range(10))
    config = QUICK.model_copy(
        update={
            "image_size": 32,
            "epochs": 6,
            "batch_size": 64,
            "augmentation": Augmentation(flip_horizontal=False, shift=0.05),
        }
    )
    trained = train(training, validation, names, config)
    found = evaluate(predict(trained.network, test.images)["probabilities"], test.labels, DecisionRule(names))
    assert found.figures.accuracy >= 0.97, found.figures
    assert trained.epochs[-1].train_loss < 0.5 * trained.epochs[0].train_loss


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    config = QUICK.model_copy(update={"augmentation": Augmentation(quarter_turns=True, shift=0.1)})
    first, again, other = (
        train(samples(48), samples(24, 1), CLASSES, config.model_copy(update={"seed": seed})).network.state_dict()
        for seed in (7, 7, 8)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.head.weight"], other["classifier.head.weight"])


def test_training_leaves_the_global_random_state_and_threads_alone():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(samples(32), samples(16, 1), CLASSES, QUICK)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_the_returned_weights_are_those_of_the_epoch_that_calibration_leaves_the_lowest_loss():
    # A rate this high makes the loss jump about; the returned network must be the best epoch's, not the last one's.
    config = QUICK.model_copy(
        update={"epochs": 6, "learning_rate": 0.3, "schedule": "constant", "patience": 100, "class_weights": False}
    )
    validation = samples(60, 1)
    trained = train(samples(64), validation, CLASSES, config)
    refined = [epoch.refined_loss for epoch in trained.epochs]
    assert trained.best_epoch == 1 + int(np.argmin(refined))
    logits = np.log(predict(trained.network, validation.images)["probabilities"].clip(1e-30))
    assert fit_temperature(logits, validation.labels).nll_after == pytest.approx(min(refined), rel=1e-3)
    assert all(epoch.refined_loss <= epoch.validation_loss + 1e-6 for epoch in trained.epochs)


def test_best_loss_never_rises_and_patience_counts_epochs_without_a_clear_gain():
    watch = EarlyStopping(patience=2, min_delta=0.1)
    trace = [(1.0, 0.5), (1.2, 0.9), (0.95, 0.6), (0.94, 0.99)]
    best, kept, reasons = [], [], []
    for loss, accuracy in trace:
        kept.append(watch.is_best(loss))
        best.append(watch.best_loss)
        reasons.append(watch.reason(loss, accuracy))
    assert best == [1.0, 1.0, 0.95, 0.94] and kept == [True, False, True, True]
    assert reasons[:2] == [None, None] and reasons[2] == "no better validation loss for 2 epochs"


def test_training_stops_when_both_asked_qualities_are_reached():
    watch = EarlyStopping(patience=9, min_delta=0, stop_at_accuracy=0.9, stop_at_loss=0.3)
    for loss, accuracy, stops in ((0.2, 0.8, False), (0.5, 0.95, False), (0.3, 0.9, True)):
        watch.is_best(loss)
        assert bool(watch.reason(loss, accuracy)) is stops


@pytest.mark.parametrize(
    ("asked", "stops"), [({"stop_at_loss": 0.3}, True), ({"stop_at_accuracy": 0.9}, False), ({}, False)]
)
def test_one_asked_quality_stops_alone(asked, stops):
    watch = EarlyStopping(patience=9, min_delta=0, **asked)
    watch.is_best(0.2)
    assert bool(watch.reason(0.2, 0.8)) is stops


def test_a_long_run_stops_at_quality_instead_of_using_its_epochs():
    config = QUICK.model_copy(update={"epochs": 50, "stop_at_accuracy": 0.95})
    trained = train(samples(160), samples(40, 1), CLASSES, config)
    assert len(trained.epochs) < 50 and trained.stopped.startswith("quality reached: accuracy")


def test_a_time_budget_drops_epochs_and_still_ends_the_schedule():
    config = QUICK.model_copy(update={"epochs": 500, "max_minutes": 2 / 60, "patience": 100})
    trained = train(samples(64), samples(32, 1), CLASSES, config)
    assert 1 <= len(trained.epochs) < 500 and trained.stopped.startswith("no further epoch fits into the 0.0333")
    assert trained.seconds < 6
    assert trained.epochs[-1].learning_rate < 0.3 * config.learning_rate


def test_an_epoch_that_was_held_up_does_not_take_the_later_ones_their_time():
    config = QUICK.model_copy(update={"epochs": 12, "max_minutes": 15 / 60, "patience": 100})
    held_up = lambda epoch: time.sleep(2) if epoch.number == 1 else None  # noqa: E731  counts for the second
    trained = train(samples(64), samples(32, 1), CLASSES, config, held_up)
    assert (len(trained.epochs), trained.stopped) == (12, "all 12 epochs done")


def test_every_epoch_is_reported_as_it_ends():
    seen = []
    trained = train(samples(32), samples(16, 1), CLASSES, QUICK, seen.append)
    assert tuple(seen) == trained.epochs and [epoch.number for epoch in seen] == [1, 2]


def test_given_weights_are_where_training_starts():
    first = train(samples(160), samples(40, 1), CLASSES, QUICK.model_copy(update={"epochs": 6}))
    weights = first.network.classifier.state_dict()
    config = QUICK.model_copy(update={"epochs": 1, "learning_rate": 1e-6})
    onward = train(samples(160), samples(40, 1), CLASSES, config, weights=weights)
    fresh = train(samples(160), samples(40, 1), CLASSES, config)
    assert onward.epochs[0].train_loss < 0.5 * fresh.epochs[0].train_loss


def test_frozen_stages_do_not_move_and_the_rest_does():
    first = train(samples(32), samples(16, 1), CLASSES, QUICK)
    weights = {name: value.clone() for name, value in first.network.classifier.state_dict().items()}
    config = QUICK.model_copy(update={"frozen_stages": 2})
    after = train(samples(32), samples(16, 1), CLASSES, config, weights=weights).network.classifier.state_dict()
    frozen = [name for name in weights if name.startswith(("stages.0.", "stages.1."))]
    assert frozen and all(torch.equal(weights[name], after[name]) for name in frozen)
    assert not torch.equal(weights["stages.2.0.weight"], after["stages.2.0.weight"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_every_precision_trains(precision):
    config = QUICK.model_copy(update={"precision": precision, "epochs": 8})
    trained = train(samples(160), samples(40, 1), CLASSES, config)
    assert trained.precision in ("float32", "bfloat16") and precision in ("auto", trained.precision)
    assert trained.epochs[-1].validation.accuracy >= 0.9


def test_timing_the_precisions_changes_nothing_but_the_speed():
    plain = QUICK.model_copy(update={"epochs": 25, "patience": 100})
    timed = train(samples(32), samples(16, 1), CLASSES, plain.model_copy(update={"precision": "auto"}))
    named = train(samples(32), samples(16, 1), CLASSES, plain.model_copy(update={"precision": timed.precision}))
    assert [e.train_loss for e in timed.epochs] == [e.train_loss for e in named.epochs]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_every_optimizer_lowers_the_loss(optimizer):
    config = QUICK.model_copy(update={"optimizer": optimizer, "epochs": 5, "learning_rate": 1e-2})
    epochs = train(samples(160), samples(40, 1), CLASSES, config).epochs
    assert epochs[-1].train_loss < epochs[0].train_loss


@pytest.mark.parametrize(
    ("training", "validation", "classes", "message"),
    [
        (samples(3), samples(4, 1), CLASSES, "3 photographs, fewer than one batch of 16"),
        (samples(20, classes=1), samples(4, 1), CLASSES, r"no photograph of \['light'\]"),
        (samples(20, classes=1), samples(4, 1, 1), ("dark",), "at least two"),
        (samples(20), samples(0, 1), CLASSES, "validation split is empty"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_before_any_work(training, validation, classes, message):
    with pytest.raises(ValueError, match=message):
        train(training, validation, classes, QUICK)


def test_a_defect_label_that_no_class_carries_is_refused():
    with pytest.raises(ValueError, match=r"defect labels \['worn'\] are not among the labels"):
        train(samples(20), samples(8, 1), CLASSES, QUICK.model_copy(update={"defect_labels": ("worn",)}))


@pytest.mark.parametrize(
    ("defects", "validation", "message"),
    [
        (("dark", "light"), samples(8, 1), "every label of .* is a defect"),
        (("light",), samples(8, 1, classes=1), "0 defects and 8 good parts: an operating threshold needs both"),
    ],
)
def test_what_could_be_trained_but_never_judged_is_refused_before_any_work(defects, validation, message):
    told = []
    with pytest.raises(ValueError, match=message):
        train(
            samples(20), validation, CLASSES, QUICK.model_copy(update={"defect_labels": defects}), on_epoch=told.append
        )
    assert told == []


def test_a_loss_that_explodes_names_the_learning_rate():
    config = QUICK.model_copy(update={"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "epochs": 30})
    hot = samples(64)
    weights = train(hot, samples(16, 1), CLASSES, QUICK).network.classifier.state_dict()
    weights["head.weight"] = torch.full_like(weights["head.weight"], float("inf"))
    with pytest.raises(RuntimeError, match="lower learning_rate 1"):
        train(hot, samples(16, 1), CLASSES, config, weights=weights)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_schedules_stay_within_the_peak_and_one_cycle_rises_first(schedule):
    factors = [learning_rate_factor(schedule, p) for p in np.linspace(0, 1, 101)]
    assert max(factors) == pytest.approx(1.0) and min(factors) > 0
    assert (factors[0] < 0.1) is (schedule == "one_cycle")
    assert (factors[-1] < 0.01) is (schedule != "constant")
    assert factors.index(max(factors)) == (25 if schedule == "one_cycle" else 0)


def test_a_stepped_rate_falls_every_so_many_epochs():
    schedule = RateSchedule("step", factor=0.5, epochs=2)
    assert [schedule.at(epoch, 0.9) for epoch in range(1, 7)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_a_rate_on_a_plateau_falls_after_epochs_without_a_better_loss_and_counts_anew():
    schedule, rates = RateSchedule("plateau", factor=0.1, epochs=2), []
    for epoch, loss in enumerate((1.0, 0.8, 0.9, 0.85, 0.84, 0.7, 0.7, 0.7), 1):
        rates.append(schedule.at(epoch, 0.0))
        schedule.epoch_ended(loss)
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])
    assert schedule.at(9, 1.0) == pytest.approx(0.01)
    other = RateSchedule("plateau", factor=0.1, epochs=2)
    other.restore(schedule.state())
    assert other == schedule


@pytest.mark.parametrize("schedule", ["step", "plateau"])
def test_a_training_follows_its_schedule(schedule):
    config = QUICK.model_copy(
        update={"schedule": schedule, "rate_epochs": 1, "rate_factor": 0.1, "epochs": 4, "learning_rate": 0.3}
    )
    epochs = train(samples(48), samples(24, 1), CLASSES, config.model_copy(update={"patience": 100})).epochs
    rates = [epoch.learning_rate for epoch in epochs]
    if schedule == "step":
        assert rates == pytest.approx([0.3, 0.03, 0.003, 0.0003])
    else:
        best = np.minimum.accumulate([epoch.refined_loss for epoch in epochs])
        falls = np.cumsum([0, *(best[1:-1] == best[:-2])]) if len(best) > 2 else [0]
        assert rates[1:] == pytest.approx([0.3 * 0.1**fall for fall in falls])


def test_the_focal_loss_is_that_of_the_paper_and_cross_entropy_without_its_exponent():
    logits = torch.tensor([[2.0, -1.0, 0.3], [0.1, 0.2, 0.3]])
    labels, weight = torch.tensor([0, 2]), torch.tensor([1.0, 1.0, 2.0])
    p = torch.softmax(logits, 1)[torch.arange(2), labels]
    expected = (-((1 - p) ** 2) * p.log() * weight[labels]).sum()
    assert float(Loss("focal", weight, 0.1, 2.0).total(logits, labels, True)) == pytest.approx(float(expected))
    plain = Loss("cross_entropy", weight, 0.0, 2.0).total(logits, labels, True)
    assert float(Loss("focal", weight, 0.1, 0.0).total(logits, labels, True)) == pytest.approx(float(plain))
    sure = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
    Loss("focal", None, 0.0, 0.5).total(sure, torch.tensor([0]), True).backward()
    assert sure.grad.isfinite().all(), "what is certain gives no gradient, and not one that is no number"


def test_smoothing_is_for_training_only():
    logits, labels = torch.tensor([[4.0, 0.0]]), torch.tensor([0])
    loss = Loss("cross_entropy", None, 0.2, 2.0)
    assert loss.total(logits, labels, True) > 5 * loss.total(logits, labels, False)


def test_the_gradient_is_no_longer_than_the_recipe_says():
    config = QUICK.model_copy(
        update={"optimizer": "sgd", "learning_rate": 1.0, "clip_norm": 1e-4, "schedule": "constant", "epochs": 1}
    )
    config = config.model_copy(update={"weight_decay": 0.0})
    first = train(samples(32), samples(16, 1), CLASSES, QUICK).network.classifier.state_dict()
    weights = {name: value.clone() for name, value in first.items()}
    after = train(samples(32), samples(16, 1), CLASSES, config, weights=weights).network.classifier
    moved = [float((p.detach() - weights[name]).norm()) for name, p in after.named_parameters()]
    # Two steps of at most the length 1e-4, with Nesterov momentum 0.9: (1 + 0.9) and (1 + 0.9 + 0.81) of it.
    assert 0 < sum(each**2 for each in moved) ** 0.5 <= (1.9 + 2.71) * 1e-4 * 1.01


def test_the_deterministic_mode_is_on_while_training_and_off_again_after():
    seen = []
    config = QUICK.model_copy(update={"deterministic": True})
    train(samples(32), samples(16, 1), CLASSES, config, lambda _: seen.append(deterministic_now()))
    assert seen == [True, True] and not deterministic_now()


def deterministic_now() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _varied(how: Augmentation, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return augment(images, how, torch.Generator().manual_seed(seed))


def test_turns_and_flips_only_move_pixels():
    images = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8)
    how = Augmentation(flip_vertical=True, quarter_turns=True, brightness=0, contrast=0)
    varied = _varied(how, images)
    assert torch.equal(varied.flatten(1).sort(1).values, images.float().flatten(1).sort(1).values)
    poses = {
        (turn, flip)
        for image, moved in zip(images.float(), varied, strict=True)
        for turn in range(4)
        for flip in (False, True)
        if torch.equal((image.flip(1) if flip else image).rot90(turn, (0, 1)), moved)
    }
    assert len(poses) == 8, "all eight poses of a square occur"


def test_without_augmentation_pixels_pass_unchanged():
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(_varied(STILL, images), images.float())


def test_a_shift_moves_by_at_most_its_share_and_repeats_the_edge():
    images = torch.zeros((200, 20, 20, 3), dtype=torch.uint8)
    images[:, 10, 10] = 255
    moved = _varied(STILL.model_copy(update={"shift": 0.1}), images)[..., 0].nonzero()
    assert {int(d) for d in (moved[:, 1:] - 10).unique()} == {-2, -1, 0, 1, 2}
    edge = torch.full((50, 20, 20, 3), 7, dtype=torch.uint8)
    assert (_varied(STILL.model_copy(update={"shift": 0.2}), edge) == 7).all()


def test_brightness_and_contrast_stay_in_range_and_vary_each_photograph_on_its_own():
    images = torch.randint(0, 256, (32, 8, 8, 3), dtype=torch.uint8)
    varied = _varied(STILL.model_copy(update={"brightness": 0.3, "contrast": 0.3}), images)
    assert varied.min() >= 0 and varied.max() <= 255
    change = (varied.mean((1, 2, 3)) - images.float().mean((1, 2, 3))).round(decimals=1)
    assert len(change.unique()) > 20 and math.isfinite(float(change.sum()))
