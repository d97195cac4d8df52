"""Trainings in several processes: real torchrun, real ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tasks.distributed import Job, RankDied, read_job, write_job
from tasks.losses import make_loss
from tasks.process_group import ProcessGroup
from tasks.recipe import Augmentation, TrainConfig
from tasks.samples import Samples
from tasks.training import train

ROOT = Path(__file__).parents[1]
CLASSES = ("dark", "light")
TWO = TrainConfig(
    architecture="tinyvgg",  # neither batch norm nor dropout: nothing depends on who has which photographs
    pretrained=False,
    image_size=16,
    epochs=4,
    batch_size=16,
    learning_rate=1e-3,
    patience=100,
    augmentation=Augmentation(quarter_turns=True, shift=0.1),
    precision="float32",
    processes=2,
)
ONE = TWO.model_copy(update={"processes": 1})


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr("tasks.training.processors", lambda: 1)


def samples(count: int, seed: int) -> Samples:
    """Noise around a grey that the class sets, hard enough that the loss is far from nothing."""
    random = np.random.default_rng(seed)
    labels = (random.random(count) < 0.3).astype(np.int64)
    images = random.normal((100 + 12 * labels)[:, None, None, None], 60, (count, 16, 16, 3)).clip(0, 255)
    return Samples(images.astype(np.uint8), labels, np.array([f"{seed}-{n}" for n in range(count)]))


TRAINING, VALIDATION = samples(75, 0), samples(37, 1)


def losses(trained):
    return np.array([[epoch.train_loss, epoch.validation_loss] for epoch in trained.epochs])


def test_shares_are_contiguous_nearly_equal_and_complete():
    for count, processes in ((16, 2), (15, 4), (5, 3), (33, 8)):
        shares = [ProcessGroup(rank, processes).share(count) for rank in range(processes)]
        assert [n for share in shares for n in range(count)[share]] == list(range(count))
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_mean_loss_does_not_depend_on_how_a_batch_is_shared(kind, weighted):
    config = ONE.model_copy(update={"loss": kind, "class_weights": weighted})
    loss = make_loss(TRAINING.labels, 2, config)
    logits, labels = torch.randn(15, 2), torch.from_numpy(TRAINING.labels[:15])
    whole = loss.total(logits, labels, True) / loss.weight_of(TRAINING.labels[:15])
    shares = [ProcessGroup(rank, 4).share(15) for rank in range(4)]
    parts = sum(loss.total(logits[share], labels[share], True) for share in shares) / loss.weight_of(
        TRAINING.labels[:15]
    )
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)


def test_ranks_open_the_mapped_photographs_themselves_and_copy_what_is_no_file(tmp_path):
    mapped = np.memmap(tmp_path / "split.bin", np.uint8, "w+", 128, TRAINING.images.shape)
    mapped[:] = TRAINING.images
    mapped.flush()
    opened = np.memmap(tmp_path / "split.bin", np.uint8, "r", 128, TRAINING.images.shape)
    training = Samples(opened, TRAINING.labels, TRAINING.sha256)
    part = Samples(opened[20:57], VALIDATION.labels, VALIDATION.sha256)  # a view: its offset is not its own
    folder = tmp_path / "job"
    folder.mkdir()
    write_job(folder, Job(training, part, CLASSES, TWO), keeps=True)
    assert not (folder / "training-images.bin").exists() and (folder / "validation-images.bin").exists()
    job, keeps = read_job(folder)
    assert keeps and job.config == TWO and job.classes == CLASSES and job.state is None
    np.testing.assert_array_equal(job.training.images, TRAINING.images)
    np.testing.assert_array_equal(job.validation.images, TRAINING.images[20:57])
    np.testing.assert_array_equal(job.training.labels, TRAINING.labels)
    assert job.validation.sha256.tolist() == VALIDATION.sha256.tolist()


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one():
    one, told = train(TRAINING, VALIDATION, CLASSES, ONE), []
    two = train(TRAINING, VALIDATION, CLASSES, TWO, told.append)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    assert losses(one)[0, 0] > 0.1, "a loss of nothing would agree with anything"
    assert told == list(two.epochs) and two.stopped == one.stopped == "all 4 epochs done"
    for name, ours in one.network.state_dict().items():
        torch.testing.assert_close(two.network.state_dict()[name], ours, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_training_of_two_processes_goes_on_in_the_same_bits():
    """cnn: batch norm's running statistics and each rank's own dropout go on too."""
    config = TWO.model_copy(update={"architecture": "cnn", "checkpoint_minutes": 1e-9, "epochs": 2})
    kept = []
    undisturbed = train(TRAINING, VALIDATION, CLASSES, config, save=kept.append)
    places = {(len(state["epochs"]), state["step"]): state for state in kept}
    assert set(places) == {(e, s) for e in (0, 1) for s in range(5)} - {(0, 0)} | {(2, 0)}
    resumed = train(TRAINING, VALIDATION, CLASSES, config, state=places[1, 3])
    assert np.array_equal(losses(resumed), losses(undisturbed))
    ours, theirs = resumed.network.state_dict(), undisturbed.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def ranks() -> list[psutil.Process]:
    """torchrun's children below this process."""
    return [
        each for each in psutil.Process().children(recursive=True) if "tasks.rank" in " ".join(each.cmdline() or [""])
    ]


LONG = TWO.model_copy(update={"epochs": 500})


@pytest.mark.slow
def test_a_killed_rank_ends_the_training_with_its_number_and_leaves_no_orphan():
    def kill_rank_1(epoch):
        if epoch.number == 2:
            [victim] = [each for each in ranks() if each.environ()["RANK"] == "1"]
            seen.extend(ranks())
            victim.kill()

    seen: list[psutil.Process] = []
    began = time.monotonic()
    with pytest.raises(RankDied, match=r"rank 1 of the training was killed by SIGKILL; the other ranks were ended"):
        train(TRAINING, VALIDATION, CLASSES, LONG, kill_rank_1)
    assert len(seen) == 2 and time.monotonic() - began < 120
    assert not any(each.is_running() for each in seen)


@pytest.mark.slow
def test_what_goes_wrong_in_a_rank_is_said_and_what_a_callback_raises_ends_the_ranks():
    hot = LONG.model_copy(
        update={"optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant", "class_weights": False}
    )
    weights = {name: torch.full_like(value, 1e30) for name, value in _weights().items()}
    with pytest.raises(RankDied, match="lower learning_rate 1"):
        train(TRAINING, VALIDATION, CLASSES, hot, weights=weights)

    def away(epoch):
        raise ConnectionError("MLflow does not answer")

    with pytest.raises(ConnectionError, match="MLflow does not answer"):
        train(TRAINING, VALIDATION, CLASSES, LONG, away)
    assert ranks() == []


def _weights():
    from tasks.model import build_model

    return build_model("tinyvgg", 2, pretrained=False).state_dict()


@pytest.mark.slow
def test_ranks_end_with_the_process_that_launched_them_however_it_went():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        + "from test_distributed import TRAINING, VALIDATION, CLASSES, LONG, train\n"
        + "if __name__ == '__main__':\n"
        + "    train(TRAINING, VALIDATION, CLASSES, LONG, lambda epoch: print(epoch.number, flush=True))\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert launcher.stdout is not None and launcher.stdout.readline() == b"1\n"
        family = psutil.Process(launcher.pid).children(recursive=True)
        assert len(family) >= 3, "torchrun and two ranks"
    finally:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    _, alive = psutil.wait_procs(family, timeout=40)
    assert alive == []


def test_a_batch_too_small_to_share_is_refused_by_name():
    with pytest.raises(ValueError, match=r"batch_size 16 shared by 8 processes .* at least 32"):
        TrainConfig(batch_size=16, processes=8)
