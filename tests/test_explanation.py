import io
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tasks.contact_sheet import Pair, pair_sheet
from tasks.decision import DecisionRule
from tasks.explanation import choose, explain, heat_maps, last_spatial_place, overlay
from tasks.model import build_model, image_network
from tasks.recipe import Augmentation, TrainConfig
from tasks.samples import Samples
from tasks.training import predict, train

SIZE, SPOT = 32, 8
CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


def plates(count: int, seed: int, corner: str | None = None) -> Samples:
    """Noisy grey plates, every second one with a bright spot in a corner (any one, or the given)."""
    random = np.random.default_rng(seed)
    images = random.normal(110, 12, (count, SIZE, SIZE, 3)).clip(0, 255).astype(np.uint8)
    labels = np.arange(count) % 2
    for image in (images[number] for number in np.flatnonzero(labels)):
        down, right = CORNERS[corner] if corner else list(CORNERS.values())[random.integers(0, 4)]
        y, x = (2 + place * (SIZE - SPOT - 4) for place in (down, right))
        image[y : y + SPOT, x : x + SPOT] = random.integers(215, 255)
    return Samples(images, labels.astype(np.int64), np.array([f"{seed}-{n}" for n in range(count)]))


@pytest.fixture(scope="module")
def inspector():
    """A tiny network that really has learned to see the spots."""
    still = Augmentation(flip_horizontal=False, brightness=0, contrast=0)
    config = TrainConfig(
        **{"architecture": "cnn", "pretrained": False, "image_size": SIZE, "epochs": 6, "batch_size": 16},
        **{"learning_rate": 2e-3, "precision": "float32", "augmentation": still, "stop_at_accuracy": 1.0},
    )
    trained = train(plates(160, 1), plates(40, 2), ("plain", "spotted"), config)
    assert trained.epochs[trained.best_epoch - 1].validation.accuracy > 0.95
    return trained.network


@pytest.mark.parametrize("corner", CORNERS)
def test_the_heat_is_where_the_defect_was_planted(inspector, corner):
    samples = plates(16, 3, corner)
    defects = samples.images[samples.labels == 1]
    heat = heat_maps(inspector, defects, np.ones(len(defects), dtype=np.int64))
    assert heat is not None and heat.shape == (8, SIZE, SIZE)
    assert heat.min() >= 0 and heat.max() == pytest.approx(1)
    half = SIZE // 2
    down, right = CORNERS[corner]
    quarters = {
        name: heat[:, y * half : (y + 1) * half, x * half : (x + 1) * half].mean() for name, (y, x) in CORNERS.items()
    }
    others = max(value for name, value in quarters.items() if name != corner)
    assert quarters[corner] > 3 * others, quarters
    hottest = [np.unravel_index(each.argmax(), each.shape) for each in heat]
    assert all((y >= half, x >= half) == (bool(down), bool(right)) for y, x in hottest)


def test_another_class_is_spoken_for_by_another_place(inspector):
    defects = plates(8, 4, "top left").images[1::2]
    spotted, plain = (heat_maps(inspector, defects, np.full(4, label)) for label in (1, 0))
    assert spotted is not None and plain is not None
    assert plain[:, :12, :12].mean() < 0.5 * spotted[:, :12, :12].mean()


def test_a_network_with_frozen_stages_is_explained_too(inspector):
    defects = plates(4, 5, "bottom right").images[1::2]
    before = heat_maps(inspector, defects, np.ones(2, dtype=np.int64))
    inspector.classifier.stages.requires_grad_(False)
    try:
        after = heat_maps(inspector, defects, np.ones(2, dtype=np.int64))
    finally:
        inspector.classifier.stages.requires_grad_(True)
    np.testing.assert_array_equal(before, after)


def test_explaining_leaves_the_network_as_it_was(inspector):
    samples = plates(8, 6)
    inspector.zero_grad()
    before = predict(inspector, samples.images)["probabilities"]
    heat_maps(inspector, samples.images, samples.labels)
    assert not inspector.training and all(parameter.grad is None for parameter in inspector.parameters())
    np.testing.assert_array_equal(before, predict(inspector, samples.images)["probabilities"])


SPATIAL = {"tinyvgg": 64, "cnn": 64, "vgg11": 64, "resnet18": 64, "efficientnet_lite0": 64, "efficientnet_b0": 64}


@pytest.mark.parametrize(("architecture", "size"), SPATIAL.items())
def test_every_convolutional_network_of_the_zoo_has_heat(architecture, size):
    torch.manual_seed(1)
    network = image_network(architecture, build_model(architecture, 3, pretrained=False)).eval()
    images = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    place = last_spatial_place(network, images[:1])
    assert place is not None and min(place.grid) >= 4
    heat = heat_maps(network, images, np.array([0, 2]))
    assert heat is not None and heat.shape == (2, size, size) and np.isfinite(heat).all()


def test_where_the_last_stage_is_one_pixel_the_heat_comes_from_a_finer_one():
    network = image_network("cnn", build_model("cnn", 2, pretrained=False)).eval()
    place = last_spatial_place(network, np.zeros((1, 16, 16, 3), dtype=np.uint8))
    assert place is not None and place.grid == (4, 4)


@pytest.mark.parametrize(("architecture", "size"), [("mlp", 32), ("vit_b_16", 224)])
def test_a_network_that_keeps_no_places_apart_says_so(architecture, size):
    network = image_network(architecture, build_model(architecture, 2, pretrained=False)).eval()
    images = np.zeros((1, size, size, 3), dtype=np.uint8)
    assert heat_maps(network, images, np.zeros(1, dtype=np.int64)) is None
    rule = DecisionRule(("good", "worn"), ("worn",), 0.5)
    finding = SimpleNamespace(
        **{"rule": rule, "truth": np.array([0]), "decided": np.array([1]), "probabilities": np.array([[0.2, 0.8]])}
    )
    told = explain(network, images, finding)
    assert isinstance(told, str) and "no stage that keeps the places" in told


def test_the_worst_errors_come_first_and_right_ones_are_of_every_class():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.01, 0.99], [0.3, 0.7], [0.8, 0.2]])
    truth, decided = np.array([0, 0, 1, 0, 1, 0]), np.array([0, 1, 1, 1, 1, 0])
    chosen = choose(probabilities, decided, truth, count=2)
    assert chosen.errors == (3, 1), "3 gave the truth 0.01, 1 gave it 0.4"
    assert chosen.right == (0, 2), "one of each class"
    assert choose(probabilities, decided, truth, count=4).right == (0, 2, 5, 4)


def test_the_overlay_paints_where_the_heat_is_and_nowhere_else():
    photograph = np.full((20, 20, 3), 120, dtype=np.uint8)
    heat = np.zeros((20, 20), dtype=np.float32)
    heat[:5, :5] = 1.0
    painted = overlay(photograph, heat)
    assert np.array_equal(painted[6:], photograph[6:]) and np.array_equal(painted[:, 6:], photograph[:, 6:])
    red, _, blue = painted[:5, :5].reshape(-1, 3).mean(axis=0)
    assert red > blue, "hot is red"


def test_the_sheet_shows_photograph_and_heat_side_by_side_under_its_heading():
    photograph, painted = np.full((40, 40, 3), 60, np.uint8), np.full((40, 40, 3), 200, np.uint8)
    pairs = [Pair(photograph, painted, ("said worn 0.93", "is good")) for _ in range(5)]
    sheet = np.asarray(Image.open(io.BytesIO(pair_sheet([("Worst errors", pairs)]))).convert("L"))
    tiles = cv2.connectedComponents((sheet == 60).astype(np.uint8))[0] - 1
    assert sheet.shape[1] == 4 * 226 + 3 * 10
    assert (np.abs(sheet.astype(int) - 200) < 3).sum() >= 5 * 112 * 112 * 0.99
    assert tiles >= 5


def test_an_explanation_of_a_finding_is_one_small_picture(inspector):
    samples = plates(40, 7)
    probabilities = predict(inspector, samples.images)["probabilities"]
    rule = DecisionRule(("plain", "spotted" * 20), ("spotted" * 20,), 0.5)
    finding = SimpleNamespace(
        **{"rule": rule, "truth": samples.labels, "decided": 1 - samples.labels, "probabilities": probabilities}
    )
    png = explain(inspector, samples.images, finding)
    assert isinstance(png, bytes) and len(png) < 400_000
    with Image.open(io.BytesIO(png)) as sheet:
        assert sheet.format == "PNG" and sheet.size[0] > 800
