"""monitoring/causes.py: planted changes to real pictures, through a real network, must come out under their own names."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from monitoring.calibration import Kernel, Sample, calibrate
from monitoring.causes import camera_signs, find_causes, label_shift_weights, odd_rows
from monitoring.drift import DriftResult, compare
from monitoring.features import STATISTICS, image_statistics
from tasks.decision import DecisionRule, decide, score
from tasks.images import UnreadableImage, decode, decode_full
from tasks.recipe import Augmentation, TrainConfig
from tasks.samples import Samples

SIZE, WINDOW, RATE = 32, 150, 0.01
Sampler = Callable[..., Sample]


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()


def photographed(image: bytes, gain: float = 1.0, blur: float = 0.0, channels: Sequence[float] = (1, 1, 1)) -> bytes:
    """The same thing before another camera."""
    pixels = decode_full(image).astype(np.float32) * gain * np.array(channels, np.float32)
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return png(cv2.GaussianBlur(pixels, (0, 0), blur) if blur else pixels)


def sampler_of(training: list[tuple[bytes, int]], rule: DecisionRule, folder: Path, epochs: int) -> Sampler:
    """A small network trained on these pictures and exported; `sampler(pictures)` is what drift sees of them, through the
    runtime that serves.
    """
    from tasks.inference import open_network
    from tasks.onnx_export import export_onnx
    from tasks.training import train

    config = TrainConfig(
        architecture="cnn",
        pretrained=False,
        image_size=SIZE,
        epochs=epochs,
        batch_size=16,
        learning_rate=2e-3,
        head_rate=1,
        defect_labels=rule.defect_labels,
        augmentation=Augmentation(flip_vertical=False, quarter_turns=False, brightness=0, contrast=0),
        precision="float32",
    )
    pixels = np.stack([decode(image, SIZE) for image, _ in training])
    truth = np.array([label for _, label in training])
    samples = Samples(pixels, truth, np.array([str(row) for row in range(len(truth))]))
    some = slice(None, None, 5)
    validation = Samples(pixels[some], truth[some], samples.sha256[some])
    trained = train(samples, validation, rule.labels, config, lambda epoch: None, None)
    export_onnx(trained.network, SIZE, folder / "network.onnx")
    network = open_network(folder / "network.onnx", threads=2)

    def sample(pictures: Sequence[bytes], given: Sequence[int] | None = None) -> Sample:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda image: image_statistics(decode_full(image)), pictures))
        outputs = network(np.stack([decode(image, SIZE) for image in pictures]), ("probabilities", "embedding"))
        return Sample(
            np.array([[each[name] for name in STATISTICS] for each in found], np.float32),
            outputs["embedding"],
            score(outputs["probabilities"], rule),
            decide(outputs["probabilities"], rule),
            rule.labels,
            rule.defect_labels,
            None if given is None else np.array(given),
        )

    return sample


class Plant:
    """Pictures by kind, shuffled once; `take` gives others every time until none are left."""

    def __init__(self, kinds: dict[str, list[bytes]]) -> None:
        self._left = {kind: list(pictures) for kind, pictures in kinds.items()}

    def take(self, **counts: int) -> list[bytes]:
        taken = [self._left[kind].pop() for kind, count in counts.items() for _ in range(count)]
        random.Random(len(taken)).shuffle(taken)
        return taken


def verdict(reference: Sample, window: Sample) -> DriftResult:
    return compare(reference, window, RATE, minimum=50)


def cause(result: DriftResult) -> str:
    return result.causes[0].name if result.causes else result.verdict


# scikit-learn's digits: 0 to 5 are known, 6 to 9 are products of the future. No class is a defect.

KNOWN = ("0", "1", "2", "3", "4", "5")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sampler, Sample, dict[str, list[bytes]]]:
    """(sampler, reference, other pictures by kind)."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.default_rng(0).permutation(len(scans.target))
    grown = (
        cv2.resize(scans.images[row].astype(np.float32) * 12, (48, 48), interpolation=cv2.INTER_CUBIC) for row in order
    )
    noise = np.random.default_rng(1)
    pictures = [
        png(np.repeat((one[:, :, None] + 30 + noise.normal(0, 4, (48, 48, 1))).clip(0, 255).astype(np.uint8), 3, 2))
        for one in grown
    ]
    kinds: dict[str, list[bytes]] = {str(digit): [] for digit in range(10)}
    for row, picture in zip(order, pictures, strict=True):
        kinds[str(scans.target[row])].append(picture)
    training = [(kinds[kind].pop(), label) for label, kind in enumerate(KNOWN) for _ in range(60)]
    validation = [(kinds[kind].pop(), label) for label, kind in enumerate(KNOWN) for _ in range(35)]
    random.Random(0).shuffle(validation)
    sampler = sampler_of(training, DecisionRule(KNOWN), tmp_path_factory.mktemp("digits"), epochs=10)
    return sampler, sampler([each for each, _ in validation], [label for _, label in validation]), kinds


def test_other_pictures_of_the_same_digits_are_quiet(digits) -> None:
    sampler, reference, kinds = digits
    plant = Plant(kinds)
    for _ in range(3):
        assert verdict(reference, sampler(plant.take(**dict.fromkeys(KNOWN, 25)))).verdict == "quiet"


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"gain": 1.3}, "brighter"),
        ({"gain": 0.7}, "darker"),
        ({"blur": 1.5}, "blurred"),
        ({"gain": 0.6, "blur": 2.0}, "darker"),
        ({"channels": (1.15, 1.0, 0.85)}, "tint"),
    ],
)
def test_another_camera_is_called_a_camera_and_how_it_differs(digits, change: dict[str, object], sign: str) -> None:
    sampler, reference, kinds = digits
    window = [photographed(image, **change) for image in Plant(kinds).take(**dict.fromkeys(KNOWN, 25))]
    result = verdict(reference, sampler(window))
    assert cause(result) == "camera", result.causes
    assert sign in result.causes[0].evidence
    assert result.causes[0].action.startswith("Fix the camera, do not retrain")


def test_a_camera_that_broke_a_while_ago_is_found_behind_the_good_photographs(digits) -> None:
    sampler, reference, kinds = digits
    window = Plant(kinds).take(**dict.fromkeys(KNOWN, 25))
    since = int(0.6 * len(window))
    window[since:] = [photographed(image, 0.6, 2) for image in window[since:]]
    assert cause(verdict(reference, sampler(window))) == "camera"


@pytest.mark.parametrize("new", [60, 100, 150])
def test_digits_that_were_never_seen_are_another_product_mix(digits, new: int) -> None:
    sampler, reference, kinds = digits
    window = Plant(kinds).take(**dict.fromkeys(KNOWN, (WINDOW - new) // 6), **{"8": new // 2, "9": new - new // 2})
    result = verdict(reference, sampler(window))
    assert cause(result) == "product_mix", result.causes
    assert "label a batch" in result.causes[0].action


def test_another_mix_of_known_digits_is_told_with_its_shares_and_no_one_needs_to_act(digits) -> None:
    sampler, reference, kinds = digits
    result = verdict(reference, sampler(Plant(kinds).take(**{"0": 75, "1": 75})))
    assert cause(result) == "product_mix"
    assert "shares of the known classes" in result.causes[0].evidence
    assert "no reason to retrain" in result.causes[0].action


# Real photographs of tires.


def readable(paths: Sequence[Path]) -> list[bytes]:
    found = []
    for path in paths:
        try:
            decode_full(path.read_bytes())
        except UnreadableImage:
            continue
        found.append(path.read_bytes())
    return found


@pytest.fixture(scope="module")
def tires(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sampler, Sample, dict[str, list[bytes]]]:
    kinds = {}
    for kind, folder in (("bad", "defective_tyres"), ("good", "good_tyres")):
        paths = sorted((shared_data / "tyre-condition").glob(f"*/{folder}/*"))
        random.Random(0).shuffle(paths)
        kinds[kind] = readable(paths)
    tiles = sorted((shared_data / "magnetic-tile" / "MT_Free").rglob("*.jpg"))
    kinds["tile"] = readable(tiles[:150])
    training = [(kinds[kind].pop(), label) for label, kind in enumerate(("bad", "good")) for _ in range(150)]
    validation = [(kinds[kind].pop(), label) for label, kind in enumerate(("bad", "good")) for _ in range(100)]
    random.Random(0).shuffle(validation)
    rule = DecisionRule(("bad", "good"), ("bad",), 0.5)
    sampler = sampler_of(training, rule, tmp_path_factory.mktemp("tires"), epochs=6)
    return sampler, sampler([each for each, _ in validation], [label for _, label in validation]), kinds


@pytest.mark.shared_data
def test_other_tires_are_quiet(tires) -> None:
    sampler, reference, kinds = tires
    assert verdict(reference, sampler(Plant(kinds).take(bad=75, good=75))).verdict == "quiet"


@pytest.mark.shared_data
@pytest.mark.parametrize(("gain", "blur"), [(0.7, 0), (1.5, 0), (1, 1.5), (0.45, 3.3), (1.5, 2.5)])
def test_a_camera_that_changes_before_tires_is_a_camera(tires, gain: float, blur: float) -> None:
    sampler, reference, kinds = tires
    window = [photographed(image, gain, blur) for image in Plant(kinds).take(bad=75, good=75)]
    result = verdict(reference, sampler(window))
    assert cause(result) == "camera", result.causes
    assert ("blurred" in result.causes[0].evidence) == (blur > 0)


@pytest.mark.shared_data
@pytest.mark.parametrize("tiles", [45, 75, 105])
def test_tiles_between_the_tires_are_another_product_mix(tires, tiles: int) -> None:
    sampler, reference, kinds = tires
    tires_left = (WINDOW - tiles) // 2
    result = verdict(reference, sampler(Plant(kinds).take(bad=tires_left, good=tires_left, tile=tiles)))
    assert cause(result) == "product_mix", result.causes


@pytest.mark.shared_data
@pytest.mark.parametrize(("bad", "good"), [(150, 0), (0, 150)])
def test_more_or_fewer_bad_tires_are_a_defect_rate(tires, bad: int, good: int) -> None:
    sampler, reference, kinds = tires
    result = verdict(reference, sampler(Plant(kinds).take(bad=bad, good=good)))
    assert cause(result) == "defect_rate", result.causes
    assert "Do not retrain" in result.causes[0].action


# The parts.


def made(statistics: np.ndarray, truth: np.ndarray | None, label: np.ndarray) -> Sample:
    count = len(statistics)
    embedding = np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32)
    return Sample(
        statistics.astype(np.float32), embedding, label.astype(np.float32), label, ("good", "bad"), ("bad",), truth
    )


def test_class_shares_are_corrected_by_the_errors_the_model_is_known_to_make() -> None:
    rng = np.random.default_rng(1)
    truth = (np.arange(4000) % 2).astype(np.int64)
    label = np.where(rng.random(4000) < 0.2, 1 - truth, truth)  # every fifth answer is wrong
    after = (rng.random(4000) < 0.9).astype(np.int64)
    answers = np.where(rng.random(4000) < 0.2, 1 - after, after)
    nothing = np.zeros((4000, len(STATISTICS)))
    weights = label_shift_weights(made(nothing, truth, label), made(nothing, None, answers))
    assert answers.mean() == pytest.approx(0.74, abs=0.02)
    assert np.average(truth, weights=weights) == pytest.approx(0.9, abs=0.03)


def test_a_reference_without_true_classes_says_that_they_are_missing() -> None:
    sample = made(np.zeros((40, len(STATISTICS))), None, np.zeros(40, np.int64))
    with pytest.raises(ValueError, match="no true classes"):
        label_shift_weights(sample, sample)


def test_about_a_twentieth_of_ordinary_photographs_is_odd_and_all_of_a_strange_kind() -> None:
    rng = np.random.default_rng(2)
    reference, ordinary, strange = (
        made(rng.normal(mean, 1, (400, len(STATISTICS))).clip(-3), None, np.zeros(400, np.int64)) for mean in (5, 5, 12)
    )
    assert 0.01 < odd_rows(reference, ordinary).mean() < 0.12
    assert odd_rows(reference, strange).all()


def test_twice_the_light_explains_four_times_the_sharpness() -> None:
    def row(brightness: float, sharpness: float) -> Sample:
        values = dict.fromkeys(STATISTICS, 1.0) | dict.fromkeys(("brightness", "red", "green", "blue"), brightness)
        values["sharpness"] = sharpness
        return made(np.array([list(values.values())] * 30), None, np.zeros(30, np.int64))

    moved = ("brightness", "red", "green", "blue", "sharpness")
    assert [sign[:8] for sign, _ in camera_signs(row(0.2, 100), row(0.4, 400), moved)] == ["brighter"]
    assert [sign[:7] for sign, _ in camera_signs(row(0.2, 100), row(0.4, 100), moved)] == ["brighte", "blurred"]
    assert camera_signs(row(0.2, 100), row(0.2, 100), ("saturation", "entropy")) == []


def test_what_fits_no_cause_is_called_unknown_with_its_names() -> None:
    rng = np.random.default_rng(3)
    before, after = (
        made(rng.normal(5, 1, (200, len(STATISTICS))), np.arange(200) % 2, np.arange(200) % 2) for _ in range(2)
    )
    after.statistics[:, STATISTICS.index("entropy")] += 0.5
    kernel = Kernel.of(before.embedding)
    thresholds = calibrate(before, 200, RATE, kernel, 500)
    (found,) = find_causes(before, after, thresholds, kernel)
    assert found.name == "unknown" and "entropy" in found.evidence
