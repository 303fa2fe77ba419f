"""The augmentations against the paper's definitions, measured on images of coordinates.

In these images red holds a pixel's column and green its row, so that a pasted pixel tells where
it came from.
"""

import colorsys
import functools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from cplib import augment
from cplib.augment import (
    METHODS,
    confetti,
    count,
    cutout,
    cutpaste,
    cutpaste_scar,
    cutpaste_union,
    example_batch,
    jitter,
    pasted_copies,
    rotate,
    scar,
    shift_and_crop,
    shift_hue,
)
from cplib.run import Run
from cplib.train import augmentation_kwargs

SIZES = [(64, 64), (48, 96), (128, 40)]  # height, width
DRAWS = 600


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made_by(make, x, seed=0, **options):
    """What an augmentation makes of images with the draws of a seed."""
    return make(x, torch.rand(len(x), count(make), generator=generator(seed)), **options)


def random_images(n=4, h=16, w=16, seed=0):
    return torch.rand(n, 3, h, w, generator=generator(seed))


def coordinates(n, h, w):
    """Images whose red is the column and green the row, in units of 1/256; blue is one."""
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    image = torch.stack([column / 256, row / 256, torch.ones(h, w)])
    return image.expand(n, 3, h, w).contiguous()


def extent(used):
    """First position and length of the True ones in each row of (n, k), which have no gap."""
    first, length = used.int().argmax(1), used.sum(1)
    last = used.shape[1] - 1 - used.flip(1).int().argmax(1)
    assert torch.equal(last - first + 1, length)
    return first, length


@functools.cache
def pasted(h, w):
    """CutPaste on images of coordinates: the result and where it differs, without jitter."""
    x = coordinates(DRAWS, h, w)
    made = made_by(cutpaste, x, jitter=0.0)
    changed = (made != x).any(1)
    kept = changed.any((1, 2))  # a patch that lands where it was cut leaves no trace
    assert kept.sum() > 0.98 * DRAWS
    return made[kept], changed[kept]


@functools.cache
def rectangles(h, w):
    """Top, height, left and width of every patch."""
    _, changed = pasted(h, w)
    return *extent(changed.any(2)), *extent(changed.any(1))


@functools.cache
def scars(h, w, **options):
    """Each scar of a large batch as (rows and columns pasted to, rows and columns cut from)."""
    x = coordinates(DRAWS, h, w)
    made = made_by(cutpaste_scar, x, jitter=0.0, **options)
    changed = (made != x).any(1)
    found = []
    for image, where in zip(made, changed, strict=True):
        target = where.nonzero().numpy()
        source = (image[[1, 0]][:, where].T * 256).round().long().numpy()
        # A pixel may land where it was cut and leave no trace; near it others move very little.
        if len(target) and np.abs(target - source).max(1).min() > 2:
            found.append((target, source))
    assert len(found) > DRAWS / 2
    return found


def turn_of(target, source):
    """The angle in degrees that turns a scar's source into its target, by least squares."""
    (ty, tx), (sy, sx) = (target - target.mean(0)).T, (source - source.mean(0)).T
    return math.degrees(math.atan2((sx * ty - sy * tx).sum(), (sx * tx + sy * ty).sum()))


# Patches


def check_rectangles(changed):
    """Filled, of 2 to 15 percent of the image, and an aspect of 0.3 to 3.3 up to a pixel."""
    (_, height), (_, width) = extent(changed.any(2)), extent(changed.any(1))
    assert torch.equal(changed.sum((1, 2)), height * width)
    share = height * width / changed[0].numel()
    assert 0.02 <= share.min() < 0.03
    assert 0.13 < share.max() <= 0.15
    assert share.mean().item() == pytest.approx(0.085, abs=0.01)
    assert ((height - 1) / (width + 1) < 3.3).all()
    assert ((height + 1) / (width - 1).clamp(min=1) > 0.3).all()


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_patches_have_the_areas_and_aspects_of_the_paper(h, w):
    check_rectangles(pasted(h, w)[1])


@given(st.integers(12, 80), st.integers(12, 80), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_a_patch_covers_its_share_at_any_size(h, w, seed):
    x = coordinates(64, h, w)
    share = (made_by(cutpaste, x, seed, jitter=0.0) != x).any(1).flatten(1).float().mean(1)
    assert (share > 0).sum() > 32
    assert 0.02 - 1e-6 <= share[share > 0].min() <= share.max() <= 0.15 + 1e-6


def test_tall_and_wide_patches_of_all_aspects_are_drawn_equally_often():
    _, height, _, width = rectangles(64, 64)
    assert (height / width).min() < 0.36
    assert (height / width).max() > 3
    assert (height > width).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert (height < width).float().mean().item() == pytest.approx(0.48, abs=0.08)


def test_aspects_above_one_are_uniform_and_not_their_logarithms():
    x = coordinates(DRAWS, 96, 96)
    options = {"area": (0.1, 0.12), "aspect": (1.0, 3.3)}
    changed = (made_by(cutpaste, x, jitter=0.0, **options) != x).any(1)
    ratio = changed.any(2).sum(1) / changed.any(1).sum(1)
    assert ratio[ratio > 1.1].mean().item() == pytest.approx((1.1 + 3.3) / 2, abs=0.15)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_patches_are_pasted_over_and_cut_from_the_whole_image(h, w):
    top, height, left, width = rectangles(h, w)
    made, changed = pasted(h, w)
    column, row = (made[:, :2] * 256).round().long().movedim(1, 0)
    source = torch.zeros(h, w, dtype=torch.bool)
    source[row[changed], column[changed]] = True
    for used in (changed.any(0), source):
        assert used.float().mean() > 0.97  # a corner is reached by one patch in thousands
        assert used.any(0).all()
        assert used.any(1).all()
    assert ((top + height / 2) / h).mean().item() == pytest.approx(0.5, abs=0.03)
    assert ((left + width / 2) / w).mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_patch_is_a_rectangle_of_the_same_image(h, w):
    made, _ = pasted(h, w)
    for image, top, height, left, width in zip(made, *rectangles(h, w), strict=True):
        patch = image[:, top : top + height, left : left + width]
        x, y = (patch[:2, 0, 0] * 256).round().long()
        source = coordinates(1, h, w)[0, :, y : y + height, x : x + width]
        assert torch.equal(patch, source)


def test_a_patch_never_comes_from_another_image():
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 32, 32) / 8
    for make in (cutpaste, cutpaste_scar):
        assert torch.equal(made_by(make, x, jitter=0.0), x)


def test_a_patch_of_exactly_the_largest_area_is_pasted_whole():
    x = coordinates(400, 9, 20)
    changed = (made_by(cutpaste, x, area=(0.15, 0.15), jitter=0.0) != x).any(1)
    boxes = changed.any(2).sum(1) * changed.any(1).sum(1)
    assert torch.equal(changed.sum((1, 2)), boxes)
    assert boxes.max() == 27  # 0.15 * 180 is 26.999...


@pytest.mark.parametrize(("make", "lost"), [(cutpaste, 0), (cutpaste_scar, 0.02)])
def test_jitter_changes_the_pasted_pixels_and_no_other(make, lost):
    x = random_images(32, 48, 80)
    plain, coloured = made_by(make, x, jitter=0.0), made_by(make, x, jitter=0.3)
    inside, changed = (plain != x).any(1), (coloured != x).any(1)
    assert (inside & (coloured == plain).all(1)).sum() < 0.02 * inside.sum()
    # A scar may cross the place it was cut from and, without jitter, leave no trace there.
    assert (changed & ~inside).sum() <= lost * inside.sum()


def test_a_pasted_patch_is_the_source_under_one_change_of_colours():
    x = torch.full((64, 3, 48, 48), 0.5)
    x[:, 0] = 0.6
    made = made_by(cutpaste, x, jitter=0.2)
    for image, where in zip(made, (made != x).any(1), strict=True):
        assert (image[:, where].amax(1) - image[:, where].amin(1)).max() < 1e-6


# Scars


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_scar_comes_from_one_upright_rectangle_of_2_to_16_by_10_to_25_pixels(h, w):
    spans = np.array([np.ptp(source, axis=0) + 1 for _, source in scars(h, w)])
    assert (spans.max(0) == (25, 16)).all()
    assert (spans.min(0) >= (8, 1)).all()  # a turned scar may miss a row or a column at its edge
    assert spans.mean(0).tolist() == pytest.approx([17.5, 9], abs=1)  # drawn evenly


@pytest.mark.parametrize("make", [partial(cutpaste_scar, jitter=0.3), scar])
@pytest.mark.parametrize(("width", "length"), [(16, 10), (8, 25)])
def test_no_scar_is_clipped_at_the_edge(make, width, length):
    x = random_images(DRAWS, 36, 30)
    made = made_by(make, x, width=(width, width), length=(length, length))
    counts = (made != x).any(1).sum((1, 2)) / (width * length)
    assert counts.min() > 0.92
    assert counts.max() < 1.12


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_scar_is_turned_by_at_most_45_degrees_either_way_and_not_stretched(h, w):
    turns = []
    for target, source in scars(h, w):
        if (np.ptp(source, axis=0) < (15, 4)).any():
            continue
        angle = turn_of(target, source)
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        dy, dx = (target - target.mean(0)).T
        back = np.stack([cos * dy - sin * dx, cos * dx + sin * dy], 1)
        assert np.abs(back - (source - source.mean(0))).max() < 1.5
        turns.append(angle)
    assert -48 < min(turns) < -38
    assert 38 < max(turns) < 48
    assert np.mean(turns) == pytest.approx(0, abs=6)


def test_the_angle_of_a_scar_can_be_chosen():
    found = [s for s in scars(64, 64, angle=10.0) if np.ptp(s[1][:, 0]) >= 15]
    assert 5 < max(abs(turn_of(*scar)) for scar in found) <= 12


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_scars_reach_every_edge_and_are_cut_from_everywhere(h, w):
    target = np.concatenate([target for target, _ in scars(h, w)])
    source = np.concatenate([source for _, source in scars(h, w)])
    for used in (target, source):
        assert len(np.unique(used @ (w, 1))) > 0.85 * h * w
        assert (used.min(0) <= 1).all()
        assert (used.max(0) >= (h - 2, w - 2)).all()
        assert np.abs(used.mean(0) / (h, w) - 0.5).max() < 0.03


@pytest.mark.parametrize(("size", "widest", "longest"), [(128, 8, 12), (64, 4, 6)])
def test_scars_scale_with_the_size_of_a_run(size, widest, longest):
    run = Run(method="cutpaste_scar", category="brick", size=size)
    chosen = augmentation_kwargs(run)["cutpaste_scar"]
    x = coordinates(200, size, size)
    made = made_by(cutpaste_scar, x, **(chosen | {"jitter": 0.0}))
    spans = [
        np.ptp((image[:2, where] * 256).round().numpy(), axis=1) + 1
        for image, where in zip(made, (made != x).any(1), strict=True)
        if where.any()
    ]
    assert np.max(spans, axis=0).tolist() == [widest, longest]


def scar_sizes(size, n=4000):
    """Widths and lengths, each (n, 1), of the scars of a run of that size."""
    chosen = augmentation_kwargs(Run(method="scar", category="brick", size=size))["scar"]
    u = torch.rand(n, 5, generator=generator())
    return augment._scar(torch.zeros(1, 3, size, size), **chosen, u=u)[:2]


@pytest.mark.parametrize(
    ("size", "widths", "lengths"),
    [(64, range(1, 5), range(2, 7)), (32, range(1, 3), range(1, 4)), (8, [1], [1])],
)
def test_every_whole_width_and_length_of_a_scar_is_equally_likely(size, widths, lengths):
    for found, wanted in zip(scar_sizes(size), (widths, lengths), strict=True):
        values, counts = found.unique(return_counts=True)
        assert values.tolist() == list(wanted)
        assert (counts / 4000).tolist() == pytest.approx([1 / len(wanted)] * len(wanted), abs=0.03)


LAST = 1 - 2**-24  # the largest draw


@pytest.mark.parametrize("side", [64, 256])
def test_100_000_patches_and_scars_are_within_the_papers_ranges(side):
    x, draw = torch.zeros(1, 3, side, side), generator()
    u = torch.rand(100_000, 4, generator=draw)
    u[:16] = torch.cartesian_prod(*[torch.tensor([0, LAST])] * 4)
    height, width = augment._patch_size(x, (0.02, 0.15), (0.3, 3.3), u[:, :1], u[:, 1:2])
    share, ratio = height * width / side**2, height / width
    assert share.min() >= 0.02 and share.max() <= 0.15
    assert ((height - 1) / (width + 1)).max() < 3.3 and ((height + 1) / (width - 1)).min() > 0.3
    assert share.mean().item() == pytest.approx(0.085, abs=0.001)
    assert (ratio > 1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    corner = augment._whole(0, side - height, u[:, 2:3]), augment._whole(0, side - width, u[:, 3:])
    assert min(v.min() for v in corner) == 0
    assert all((v + size <= side).all() for v, size in zip(corner, (height, width), strict=True))
    for u in torch.rand(25, 4000, 5, generator=draw):
        u[:32] = torch.cartesian_prod(*[torch.tensor([0, LAST])] * 5)
        wide, long, target, inside, _, _ = augment._scar(x, (2, 16), (10, 25), 45.0, u)
        assert {*wide.flatten().tolist()} == {*range(2, 17)}
        assert {*long.flatten().tolist()} == {*range(10, 26)}
        assert target.min() >= 0 and target.max() < side**2
        covered = inside.sum(1, keepdim=True) / (wide * long)
        assert covered.min() > 0.6 and covered.max() < 1.5  # of thin ones few pixels' centres
        assert covered.mean().item() == pytest.approx(1, abs=0.01)


MAKERS = [cutpaste, cutpaste_scar, cutpaste_union, cutout, confetti, scar, shift_and_crop]
MAKERS += [partial(cutout, fill="color"), partial(jitter, strength=(0.1,) * 4)]


@pytest.mark.parametrize("make", MAKERS)
def test_every_image_of_a_batch_has_its_own_draw(make):
    x = random_images(1, 64, 64).expand(32, -1, -1, -1)
    assert len({image.numpy().tobytes() for image in made_by(make, x)}) >= 28


@pytest.mark.parametrize("make", MAKERS)
def test_the_generator_alone_decides_what_is_made(make):
    x, state = random_images(8, 40, 48), torch.get_rng_state()
    before, made = x.clone(), made_by(make, x, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert torch.equal(made_by(make, x, 3), made)
    assert not torch.equal(made_by(make, x, 4), made)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_type_and_range_stay(make, dtype):
    made = made_by(make, random_images(16, 40, 48).to(dtype))
    assert (made.shape, made.dtype) == ((16, 3, 40, 48), dtype)
    assert 0 <= made.min() <= made.max() <= 1


def test_an_image_too_small_for_a_patch_or_a_scar_is_refused():
    with pytest.raises(ValueError, match="2x3 pixels is too small for a patch"):
        made_by(cutpaste, random_images(1, 2, 3))
    for h, w in ((29, 64), (64, 29)):
        with pytest.raises(ValueError, match=f"{h}x{w} pixels is too small for a scar of 16x25"):
            made_by(cutpaste_scar, random_images(1, h, w))


# The other ways to damage an image (Tables 1, 4 and 5)


def footprints(make, n=300, h=48, w=80, **options):
    """Where each of many images of noise was changed, and the images before and after."""
    x = 0.2 + 0.6 * random_images(n, h, w)
    made = made_by(make, x, **options)
    return (made != x).any(1), x, made


def test_cutout_changes_a_rectangle_like_cutpastes():
    check_rectangles(footprints(cutout)[0])


def test_a_cutout_is_grey_or_its_images_mean_or_of_a_random_colour():
    found = {}
    for fill in ("grey", "mean", "color"):
        changed, x, made = footprints(cutout, fill=fill)
        inside = [image[:, where] for image, where in zip(made, changed, strict=True)]
        assert all((pixels == pixels[:, :1]).all() for pixels in inside)
        found[fill] = torch.stack([pixels[:, 0] for pixels in inside])
    assert (found["grey"] == 0.5).all()
    torch.testing.assert_close(found["mean"], x.mean((2, 3)))
    assert len(found["color"].unique(dim=0)) == 300
    assert found["color"].min() < 0.05 < 0.95 < found["color"].max()


def test_confetti_adds_and_subtracts_one_or_two_blobs_of_the_sides_asked_for():
    """Without blur each blob is a turned rectangle of one colour."""
    grey = torch.full((300, 3, 96, 96), 0.5)
    made = made_by(confetti, grey, side=(20, 30), blur=0.1)
    darker, other = made == 0, (made > 0) & (made != 0.5)
    assert (darker.all(1) == darker.any(1)).float().mean() > 0.98  # of every channel, not of one
    for part, second in ((darker.all(1), 0.12), (other.any(1), 0.23)):
        area = part.sum((1, 2)).float()  # cut off at the border, and under other blobs
        assert 250 < area.median() < 900 * (1 + second)
        assert area.max() <= 2 * 900 + 200
        assert (area > 900 + 100).float().mean().item() == pytest.approx(second / 3, abs=0.1)
    colours = [
        image[:, where].unique(dim=1).shape[1]
        for image, where in zip(made, other.any(1), strict=True)
    ]
    assert max(colours) < 60  # one or two, and what the thin blur mixes of them at the edges


def test_confetti_is_blurred_and_leaves_far_pixels_as_they_were():
    grey = torch.full((20, 3, 128, 128), 0.5)
    sharp, soft = (made_by(confetti, grey, side=(9, 20), blur=b) for b in (0.1, 5.7))
    steepest = [made.diff(dim=3).abs().max().item() for made in (sharp, soft)]
    assert steepest[1] < 0.2 < steepest[0]
    assert ((soft == 0.5).all(1).float().mean((1, 2)) > 0.3).all()


def test_a_drawn_scar_has_one_colour_and_the_shape_of_a_scar():
    changed, _, made = footprints(scar)
    for image, where in zip(made, changed, strict=True):
        pixels = image[:, where]
        assert (pixels == pixels[:, :1]).all()
    counts = changed.sum((1, 2)).float()
    assert counts.mean().item() == pytest.approx(9 * 17.5, rel=0.15)
    assert counts.max() <= 1.1 * 16 * 25


def test_rotation_turns_by_quarters():
    x = random_images(2, 16, 16)
    for quarters in range(4):
        assert torch.equal(made_by(rotate(quarters), x), x.rot90(quarters, (2, 3)))


def test_the_union_is_a_patch_or_a_scar_half_of_the_time_each():
    x = random_images(600, 64, 64)
    chosen = {"patch": {"area": (0.14, 0.15)}, "thin": {"width": (2, 3)}}
    share = (made_by(augment.cutpaste_union, x, **chosen) != x).any(1).float().mean((1, 2))
    large, thin = share > 0.13, share < 0.03
    assert (large | thin).all()
    assert large.float().mean().item() == pytest.approx(0.5, abs=0.07)


# Jitter


def only(component, strength):
    """The strengths with this one of brightness, contrast, saturation and hue alone."""
    return tuple(strength if i == component else 0.0 for i in range(4))


def muted(n=64):
    """Images far from black and white, so that nothing is clamped."""
    return 0.4 + random_images(n, 8, 8) / 5


BLENDS = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]


def contrast(x):
    return x.flatten(1).std(1)


MEASURES = [
    lambda x: x.flatten(1).sum(1),
    contrast,
    lambda x: (x[:, 0] - x[:, 1]).flatten(1).norm(dim=1),
]


@pytest.mark.parametrize("component", range(3))
def test_each_blend_is_torchvisions_with_a_factor_in_its_range(component):
    x = muted()
    made = made_by(jitter, x, strength=only(component, 0.4))
    factors = MEASURES[component](made) / MEASURES[component](x)
    for image, before, factor in zip(made, x, factors, strict=True):
        expected = BLENDS[component](before, factor.item())
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)
    assert 0.6 - 1e-3 <= factors.min() < 0.68
    assert 1.32 < factors.max() <= 1.4 + 1e-3


def test_hue_is_shifted_within_its_range():
    x = random_images(64, 4, 4)
    made = made_by(jitter, x, strength=only(3, 0.2))
    shifts = []
    for image, before in zip(made, x, strict=True):
        vivid = (before.amax(0) - before.amin(0)).flatten().argmax()
        hues = [colorsys.rgb_to_hsv(*p.flatten(1)[:, vivid].tolist())[0] for p in (before, image)]
        shifts.append((hues[1] - hues[0] + 0.5) % 1 - 0.5)
    assert -0.2 - 1e-6 <= min(shifts) < -0.15
    assert 0.15 < max(shifts) <= 0.2 + 1e-6


@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), st.floats(-1, 1))
def test_shift_hue_turns_the_hue_of_a_colour_and_nothing_else(colour, shift):
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    made = shift_hue(torch.tensor(colour).view(1, 3, 1, 1), torch.tensor(shift)).flatten().tolist()
    expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
    assert made == pytest.approx(expected, abs=1e-5)


def test_jitter_is_torchvisions_in_the_order_brightness_contrast_saturation_hue():
    x, u = random_images(64, 6, 6), torch.rand(64, 4, generator=generator(1))
    strength = torch.tensor([0.6, 0.5, 0.9, 0.2])
    factors = torch.tensor([1, 1, 1, 0]) + strength * (2 * u - 1)
    steps = [*BLENDS, TF.adjust_hue]
    for image, made, own in zip(x, jitter(x, u, strength=strength.tolist()), factors, strict=True):
        pairs = zip(steps, own.tolist(), strict=True)
        expected = functools.reduce(lambda y, step: step[0](y, step[1]), pairs, image)
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-3)


def test_contrast_takes_its_mean_from_weighted_pixels_alone():
    x, weight = muted(16), torch.zeros(16, 8, 8, dtype=torch.bool)
    weight[:, :3, 2:7] = True
    made = made_by(jitter, x, strength=only(1, 0.4), weight=weight)
    inside = x[:, :, :3, 2:7]
    factors = contrast(made[:, :, :3, 2:7]) / contrast(inside)
    for image, before, factor in zip(made, inside, factors, strict=True):
        expected = TF.adjust_contrast(before, factor.item())
        torch.testing.assert_close(image[:, :3, 2:7], expected, rtol=0, atol=1e-3)


def test_jitter_and_translation_of_nothing_change_nothing():
    x = random_images()
    assert torch.equal(made_by(jitter, x, strength=(0, 0, 0, 0)), x)
    assert torch.equal(made_by(shift_and_crop, x, share=0.0), x)


@pytest.mark.parametrize(("h", "w", "reach_y", "reach_x"), [(24, 40, 3, 5), (40, 16, 5, 2)])
def test_translation_is_a_whole_shift_with_reflected_border(h, w, reach_y, reach_x):
    x = (random_images(200, h, w) * 255).byte()  # as training does
    padded = F.pad(x.float(), (reach_x, reach_x, reach_y, reach_y), mode="reflect").byte()
    shifts = []
    for source, image in zip(padded, made_by(shift_and_crop, x, share=0.125), strict=True):
        windows = source.unfold(1, h, 1).unfold(2, w, 1)
        equal = (windows == image[:, None, None]).all(4).all(3).all(0)
        assert equal.sum() == 1
        shifts += equal.nonzero().tolist()
    assert {dy for dy, _ in shifts} == set(range(2 * reach_y + 1))
    assert {dx for _, dx in shifts} == set(range(2 * reach_x + 1))


def test_a_crop_is_a_square_from_anywhere_in_the_image():
    x = coordinates(400, 12, 20)
    made = made_by(shift_and_crop, x, share=0.0, side=8)
    corners = (made[:, :2, 0, 0] * 256).long()
    for image, (left, top) in zip(made, corners, strict=True):
        assert torch.equal(image, x[0, :, top : top + 8, left : left + 8])
    assert len(corners.unique(dim=0)) == 5 * 13
    with pytest.raises(ValueError, match="an image of 12x20 pixels is smaller than a 13-px patch"):
        made_by(shift_and_crop, x, share=0.0, side=13)


# The batch


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_holds_every_image_as_it_is_and_once_in_each_other_class(method):
    x, classes = random_images(5, 40, 40), {"rotation": 4, "cutpaste_3way": 3}.get(method, 2)
    images, labels = example_batch(x, method)
    assert images.shape == (5 * classes, 3, 40, 40)
    assert labels.tolist() == [label for label in range(classes) for _ in range(5)]
    assert torch.equal(images[:5], x)
    for label in range(1, classes):
        assert (images[labels == label] != x).flatten(1).any(1).all()


def test_options_reach_the_augmentation_they_name_or_are_refused():
    x = random_images(32, 64, 64)
    chosen = {"cutpaste": {"area": (0.3, 0.31)}, "cutpaste_scar": {"width": (2, 2)}}
    images, labels = example_batch(x, "cutpaste_3way", chosen)
    shares = [(images[labels == k] != x).any(1).float().mean((1, 2)) for k in (1, 2)]
    assert 0.29 < shares[0].max() <= 0.31
    assert shares[1].max() < 2.7 * 25 / 64**2
    with pytest.raises(TypeError, match="sizes"):
        example_batch(x, "cutpaste", {"cutpaste": {"sizes": 1}})


def test_pasted_copies_differ_from_their_images_only_where_something_was_pasted():
    normal = torch.randint(0, 256, (4, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    for copies in pasted_copies(normal, {}):
        changed = (copies != normal).any(1).flatten(1).float().mean(1)
        assert copies.dtype == torch.uint8 and ((changed > 0) & (changed < 0.6)).all()
    again = pasted_copies(normal, {}, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(pasted_copies(normal, {}), again, strict=True))
