import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from tasks.augmentation import Variation, augment, drawn, varied
from tasks.recipe import Augmentation

NOTHING = Augmentation(flip_horizontal=False, brightness=0, contrast=0)
MOVES = NOTHING.model_copy(update={"flip_horizontal": True, "flip_vertical": True, "quarter_turns": True, "shift": 0.2})
EVERYTHING = Augmentation(
    flip_vertical=True,
    quarter_turns=True,
    rotation=180,
    shift=0.1,
    zoom=0.3,
    erase=0.2,
    saturation=0.5,
    hue=0.5,
    exposure=1.0,
)
RECIPES = st.builds(
    Augmentation,
    flip_horizontal=st.booleans(),
    flip_vertical=st.booleans(),
    quarter_turns=st.booleans(),
    rotation=st.sampled_from((0, 15, 180)),
    shift=st.sampled_from((0, 0.1, 0.25)),
    zoom=st.sampled_from((0, 0.5)),
    erase=st.sampled_from((0, 0.5)),
    brightness=st.sampled_from((0, 0.5)),
    contrast=st.sampled_from((0, 0.5)),
    saturation=st.sampled_from((0, 1)),
    hue=st.sampled_from((0, 0.5)),
    exposure=st.sampled_from((0, 2)),
)


def pictures(count=6, side=20, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def only(picture, **change):
    """One picture under one variation, as uint8-ranged floats [S, S, 3]."""
    return varied(picture[None], Variation(**{name: torch.tensor([value]) for name, value in change.items()}))[0]


def smooth(side=64, low=60, high=190):
    """A picture without sharp edges, in tones that a moderate change does not clip."""
    coarse = torch.from_numpy(np.random.default_rng(5).integers(low, high, (1, 3, 5, 5))).float()
    return (
        torch.nn.functional.interpolate(coarse, side, mode="bicubic")
        .clamp(low, high)[0]
        .permute(1, 2, 0)
        .to(torch.uint8)
    )


def by_torchvision(change, picture, *values, **options):
    return getattr(functional, change)(picture.permute(2, 0, 1), *values, **options).permute(1, 2, 0).float()


@settings(max_examples=60, deadline=None)
@given(how=RECIPES, side=st.sampled_from((1, 7, 16)), count=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_every_recipe_keeps_shape_and_range_and_is_repeatable(how, side, count, seed):
    images = pictures(count, side, seed)
    before = images.clone()
    first = augment(images, how, seeded(seed))
    assert first.shape == images.shape and first.dtype == torch.float32 and first.is_contiguous()
    assert first.min() >= 0 and first.max() <= 255 and torch.isfinite(first).all()
    assert torch.equal(first, augment(images, how, seeded(seed))), "same seed, same pixels"
    assert torch.equal(images, before), "the decoded photographs stay as they are"


def test_nothing_asked_is_nothing_done_and_nothing_drawn():
    generator = seeded()
    state = generator.get_state()
    assert torch.equal(augment(pictures(), NOTHING, generator), pictures().float())
    assert torch.equal(generator.get_state(), state)


@settings(max_examples=40, deadline=None)
@given(how=RECIPES)
def test_a_neutral_draw_changes_no_pixel(how):
    """What was asked for, but came out as zero: the identity again (to rounding where it is resampled or mixed)."""
    drew = drawn(4, 16, how, seeded())
    neutral = {name: torch.zeros_like(value) for name, value in vars(drew).items() if value is not None}
    torch.testing.assert_close(
        varied(pictures(4, 16), Variation(**neutral)), pictures(4, 16).float(), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("side", [16, 21])
def test_movements_go_from_pixel_to_pixel(side):
    """Against slices of the picture: mirrored, flipped, turned, then the view shifted with its edge repeated."""
    images, drew = pictures(40, side), drawn(40, side, MOVES, seeded())
    found = varied(images, drew)
    for number, image in enumerate(images.numpy()):
        expected = image[:, ::-1] if drew.mirrored[number] else image
        expected = expected[::-1] if drew.flipped[number] else expected
        expected = np.rot90(expected, int(drew.turns[number]))
        rows, columns = ((np.arange(side) + int(by)).clip(0, side - 1) for by in drew.shift[:, number])
        np.testing.assert_array_equal(found[number].numpy(), expected[rows][:, columns])
    assert {int(turns) for turns in drew.turns} == {0, 1, 2, 3} and 0 < drew.mirrored.sum() < 40
    assert drew.shift.abs().max() == round(0.2 * side)


def inner(picture):
    """The disc that stays inside the square however it is turned."""
    side = len(picture)
    y, x = torch.meshgrid(*2 * [torch.arange(side) - (side - 1) / 2], indexing="ij")
    return picture[torch.hypot(y, x) < side / 2 - 2]


@pytest.mark.parametrize("angle", [30.0, -75.0, 180.0])
def test_rotation_turns_by_any_angle_as_torchvision_does(angle):
    picture = smooth()
    expected = by_torchvision("rotate", picture, angle, interpolation=functional.InterpolationMode.BILINEAR)
    assert (inner(only(picture, angle=angle)) - inner(expected)).abs().max() < 1.5
    assert (inner(only(picture, angle=angle)) - inner(picture.float())).abs().max() > 20, "the picture did turn"


@pytest.mark.parametrize("change", [-0.3, 0.5])
def test_zoom_enlarges_about_the_middle_as_torchvision_does(change):
    picture = smooth()
    expected = by_torchvision(
        "affine",
        picture,
        angle=0,
        translate=[0, 0],
        scale=1 + change,
        shear=[0, 0],
        interpolation=functional.InterpolationMode.BILINEAR,
    )
    seen = slice(16, 48)  # what a picture shrunk to 0.7 still fills
    found = only(picture, zoom=change)
    assert (found - expected)[seen, seen].abs().max() < 1.5
    assert (found - picture.float())[seen, seen].abs().max() > 20, "the picture did change"


def test_what_is_erased_is_one_square_of_the_mean_colour_and_no_larger_than_asked():
    how = NOTHING.model_copy(update={"erase": 0.25})
    before = pictures(200, 20).float()
    after = augment(pictures(200, 20), how, seeded())
    shares = []
    for was, now in zip(before, after, strict=True):
        changed = (was != now).any(dim=2)
        rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
        if len(rows):
            square = now[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            torch.testing.assert_close(square, was.mean(dim=(0, 1)).expand_as(square), atol=1e-3, rtol=0)
        shares.append(float(changed.float().mean()))
    assert max(shares) <= 0.26 and max(shares) > 0.2 and min(shares) < 0.03


def test_rotation_leaves_no_black_corners():
    bright = torch.full((24, 24, 3), 200, dtype=torch.uint8)
    torch.testing.assert_close(only(bright, angle=45.0), bright.float())


@pytest.mark.parametrize("change", [-0.6, 0.7])
def test_saturation_is_torchvisions(change):
    picture = smooth(low=90, high=160)
    expected = by_torchvision("adjust_saturation", picture, 1 + change)
    assert (only(picture, saturation=change) - expected).abs().max() < 1.5


def test_no_saturation_is_grey():
    grey = only(smooth(), saturation=-1.0)
    torch.testing.assert_close(grey[..., 0], grey[..., 2], atol=0.01, rtol=0)


def test_hue_turns_red_to_green_to_blue_and_keeps_greys_and_brightness():
    red = torch.tensor([150, 100, 100], dtype=torch.uint8).expand(4, 4, 3)
    assert only(red, hue=1 / 3)[0, 0].argmax() == by_torchvision("adjust_hue", red, 1 / 3)[0, 0].argmax() == 1
    assert only(red, hue=-1 / 3)[0, 0].argmax() == by_torchvision("adjust_hue", red, -1 / 3)[0, 0].argmax() == 2
    luma = torch.tensor([0.299, 0.587, 0.114])
    picture = smooth(low=100, high=150)
    torch.testing.assert_close(only(picture, hue=0.3) @ luma, picture.float() @ luma, atol=0.01, rtol=0)
    grey = torch.full((4, 4, 3), 90, dtype=torch.uint8)
    torch.testing.assert_close(only(grey, hue=0.2), grey.float(), atol=0.01, rtol=0)


def test_exposure_counts_in_stops_of_light():
    """A stop doubles the light, and light is about the stored value to the power of 2.2."""
    grey = torch.full((4, 4, 3), 100, dtype=torch.uint8)
    light = (only(grey, exposure=1.0) / 255) ** 2.2
    torch.testing.assert_close(light, 2 * (grey.float() / 255) ** 2.2)
    assert only(grey, exposure=2.0).max() > only(grey, exposure=1.0).max() > 100 > only(grey, exposure=-1.0).max()
    assert only(torch.full_like(grey, 250), exposure=1.0).max() == 255


def test_contrast_stretches_about_the_mean_and_brightness_adds():
    picture = smooth(low=90, high=160).float()
    expected = (picture - picture.mean()) * 1.4 + picture.mean()
    torch.testing.assert_close(only(picture.to(torch.uint8), contrast=0.4), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(only(picture.to(torch.uint8), brightness=-0.1), picture - 25.5, atol=0.01, rtol=0)


def test_the_contrast_of_a_recoloured_picture_is_about_its_new_mean():
    picture, change = smooth(low=90, high=160), {"saturation": -0.5, "hue": 0.2, "exposure": 0.1}
    before, after = only(picture, **change), only(picture, contrast=0.3, **change)
    torch.testing.assert_close(after, (before - before.mean()) * 1.3 + before.mean(), atol=0.01, rtol=0)


def test_each_photograph_is_varied_on_its_own_and_all_of_the_reach_is_used():
    same = smooth(side=16)[None].expand(300, -1, -1, -1).contiguous()
    found = augment(same, EVERYTHING, seeded())
    assert len({image.numpy().tobytes() for image in found}) > 290
    drew = drawn(300, 16, EVERYTHING, seeded())
    for name, reach in (
        ("angle", 180),
        ("zoom", 0.3),
        ("saturation", 0.5),
        ("hue", 0.5),
        ("exposure", 1),
        ("contrast", 0.1),
    ):
        values = getattr(drew, name)
        assert values.min() < -0.95 * reach and values.max() > 0.95 * reach and values.abs().max() <= reach, name


def test_a_part_of_the_batch_is_varied_as_it_is_in_the_whole():
    images, drew = pictures(8, 16), drawn(8, 16, EVERYTHING, seeded())
    some = slice(3, 6)
    torch.testing.assert_close(varied(images[some], drew.of(some)), varied(images, drew)[some], atol=1e-3, rtol=0)


def test_half_precision_around_it_does_not_make_it_coarse():
    plain = augment(pictures(), EVERYTHING, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(pictures(), EVERYTHING, seeded()), plain)
