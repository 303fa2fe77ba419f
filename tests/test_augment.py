"""The augmentations against the paper's definitions, measured on pictures of coordinates.

In these pictures red holds a pixel's column and green its row, so that a pasted pixel tells where
it came from.
"""

import colorsys
import functools
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from cplib import augment, config
from cplib.augment import (
    confetti,
    cutout,
    cutpaste,
    cutpaste_scar,
    cutpaste_union,
    jitter,
    pretext_batch,
    rotate,
    scar,
    shift_hue,
    translate,
)
from cplib.config import Run
from cplib.train import options

SIZES = [(64, 64), (48, 96), (96, 48), (128, 40)]  # height, width
SCAR_SIZES = [(64, 64), (40, 96), (96, 40)]
DRAWS = 600


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_pictures(n=4, h=16, w=16, seed=0):
    return torch.rand(n, 3, h, w, generator=generator(seed))


def coordinates(n, h, w):
    """Pictures whose red is the column and green the row, in units of 1/256; blue is one."""
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    picture = torch.stack([column / 256, row / 256, torch.ones(h, w)])
    return picture.expand(n, 3, h, w).contiguous()


def extent(used):
    """First position and length of the True ones in each row of (n, k), which have no gap."""
    first, length = used.int().argmax(1), used.sum(1)
    last = used.shape[1] - 1 - used.flip(1).int().argmax(1)
    assert torch.equal(last - first + 1, length)
    return first, length


@functools.cache
def pasted(h, w):
    """CutPaste on pictures of coordinates: the result and where it differs, without jitter."""
    x = coordinates(DRAWS, h, w)
    made = cutpaste(x, generator(), jitter=0.0)
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
    made = cutpaste_scar(x, generator(), jitter=0.0, **options)
    changed = (made != x).any(1)
    found = []
    for picture, where in zip(made, changed, strict=True):
        target = where.nonzero().numpy()
        source = (picture[[1, 0]][:, where].T * 256).round().long().numpy()
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


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_patch_is_a_filled_rectangle(h, w):
    _, height, _, width = rectangles(h, w)
    assert torch.equal(pasted(h, w)[1].sum((1, 2)), height * width)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_patch_covers_2_to_15_percent_of_the_picture(h, w):
    _, height, _, width = rectangles(h, w)
    share = height * width / (h * w)
    assert 0.02 <= share.min() < 0.03
    assert 0.13 < share.max() <= 0.15
    assert share.mean().item() == pytest.approx(0.085, abs=0.01)


@given(st.integers(12, 80), st.integers(12, 80), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_a_patch_covers_its_share_at_any_size(h, w, seed):
    x = coordinates(64, h, w)
    changed = (cutpaste(x, generator(seed), jitter=0.0) != x).any(1)
    share = changed.flatten(1).float().mean(1)
    share = share[share > 0]
    assert len(share) > 32
    assert share.min() >= 0.02 - 1e-6
    assert share.max() <= 0.15 + 1e-6


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_the_aspect_of_a_patch_is_in_its_range_up_to_a_pixel(h, w):
    _, height, _, width = rectangles(h, w)
    assert ((height - 1) / (width + 1) < 3.3).all()
    assert ((height + 1) / (width - 1).clamp(min=1) > 0.3).all()


def test_the_whole_range_of_aspects_is_drawn():
    _, height, _, width = rectangles(64, 64)
    assert (height / width).min() < 0.36
    assert (height / width).max() > 3


def test_tall_and_wide_patches_are_drawn_equally_often():
    _, height, _, width = rectangles(64, 64)
    assert (height > width).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert (height < width).float().mean().item() == pytest.approx(0.48, abs=0.08)


def test_aspects_above_one_are_uniform_and_not_their_logarithms():
    x = coordinates(DRAWS, 96, 96)
    options = {"area": (0.1, 0.12), "aspect": (1.0, 3.3)}
    changed = (cutpaste(x, generator(), jitter=0.0, **options) != x).any(1)
    ratio = changed.any(2).sum(1) / changed.any(1).sum(1)
    assert ratio[ratio > 1.1].mean().item() == pytest.approx((1.1 + 3.3) / 2, abs=0.15)


@pytest.mark.parametrize("area", [(0.05, 0.06), (0.2, 0.5)])
def test_the_area_option_is_kept(area):
    x = coordinates(200, 64, 64)
    made = cutpaste(x, generator(), area=area, jitter=0.0)
    share = (made != x).any(1).flatten(1).float().mean(1)
    assert area[0] <= share[share > 0].min()
    assert share.max() <= area[1]


@pytest.mark.parametrize(("h", "w"), [(9, 20), (20, 20)])
def test_a_patch_of_exactly_the_largest_area_is_pasted_whole(h, w):
    x = coordinates(400, h, w)
    changed = (cutpaste(x, generator(), area=(0.15, 0.15), jitter=0.0) != x).any(1)
    counts, boxes = changed.sum((1, 2)), changed.any(2).sum(1) * changed.any(1).sum(1)
    assert torch.equal(counts, boxes)
    assert counts.max() == round(0.15 * h * w)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_patches_are_pasted_over_the_whole_picture(h, w):
    top, height, left, width = rectangles(h, w)
    where = pasted(h, w)[1].any(0)
    assert where.float().mean() > 0.97  # a corner is reached by one patch in thousands
    assert where.any(0).all()
    assert where.any(1).all()
    assert ((top + height / 2) / h).mean().item() == pytest.approx(0.5, abs=0.03)
    assert ((left + width / 2) / w).mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_patches_are_cut_from_the_whole_picture(h, w):
    made, changed = pasted(h, w)
    column, row = (made[:, :2] * 256).round().long().movedim(1, 0)
    used = torch.zeros(h, w, dtype=torch.bool)
    used[row[changed], column[changed]] = True
    assert used.float().mean() > 0.97
    assert used.any(0).all()
    assert used.any(1).all()


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_patch_is_a_rectangle_of_the_same_picture(h, w):
    made, _ = pasted(h, w)
    for picture, top, height, left, width in zip(made, *rectangles(h, w), strict=True):
        patch = picture[:, top : top + height, left : left + width]
        x, y = (patch[:2, 0, 0] * 256).round().long()
        source = coordinates(1, h, w)[0, :, y : y + height, x : x + width]
        assert torch.equal(patch, source)


def test_a_patch_never_comes_from_another_picture():
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 32, 32) / 8
    for make in (cutpaste, cutpaste_scar):
        assert torch.equal(make(x, generator(), jitter=0.0), x)


@pytest.mark.parametrize(("make", "lost"), [(cutpaste, 0), (cutpaste_scar, 0.02)])
def test_jitter_changes_the_pasted_pixels_and_no_other(make, lost):
    x = random_pictures(32, 48, 80)
    plain, coloured = make(x, generator(), jitter=0.0), make(x, generator(), jitter=0.3)
    inside, changed = (plain != x).any(1), (coloured != x).any(1)
    assert (inside & (coloured == plain).all(1)).sum() < 0.02 * inside.sum()
    # A scar may cross the place it was cut from and, without jitter, leave no trace there.
    assert (changed & ~inside).sum() <= lost * inside.sum()


def test_a_pasted_patch_is_the_source_under_one_change_of_colours():
    x = torch.full((64, 3, 48, 48), 0.5)
    x[:, 0] = 0.6
    made = cutpaste(x, generator(), jitter=0.2)
    for picture, where in zip(made, (made != x).any(1), strict=True):
        assert (picture[:, where].amax(1) - picture[:, where].amin(1)).max() < 1e-6


def test_the_colours_of_a_patch_depend_on_nothing_outside_it():
    grey = torch.full((200, 3, 32, 32), 0.5)
    white = grey.clone()
    white[:, :, 0, 0] = 1
    one, other = (cutpaste(x, generator(), jitter=0.3)[:, :, 1:, 1:] for x in (grey, white))
    same = (one == other).flatten(1).all(1)
    assert same.float().mean() > 0.95  # all but the patches that were cut at that corner


# Scars


@pytest.mark.parametrize(("h", "w"), SCAR_SIZES)
def test_a_scar_comes_from_one_upright_rectangle_of_2_to_16_by_10_to_25_pixels(h, w):
    spans = np.array([np.ptp(source, axis=0) + 1 for _, source in scars(h, w)])
    assert (spans.max(0) == (25, 16)).all()
    assert (spans.min(0) >= (8, 1)).all()  # a turned scar may miss a row or a column at its edge


@pytest.mark.parametrize(("h", "w"), SCAR_SIZES)
def test_a_scar_has_about_as_many_pixels_as_its_width_times_its_length(h, w):
    counts = np.array([len(target) for target, _ in scars(h, w)])
    areas = np.array([np.prod(np.ptp(source, axis=0) + 1) for _, source in scars(h, w)])
    large = areas > 40
    assert (counts[large] > 0.8 * areas[large]).all()
    assert (counts[large] < 1.35 * areas[large]).all()
    assert (counts / areas).mean() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("make", [partial(cutpaste_scar, jitter=0.3), scar])
@pytest.mark.parametrize(("width", "length"), [(16, 10), (8, 25)])
def test_no_scar_is_clipped_at_the_edge(make, width, length):
    x = random_pictures(DRAWS, 36, 30)
    made = make(x, generator(), width=(width, width), length=(length, length))
    counts = (made != x).any(1).sum((1, 2)) / (width * length)
    assert counts.min() > 0.92
    assert counts.max() < 1.12


def test_scar_lengths_and_widths_are_drawn_evenly():
    spans = np.array([np.ptp(source, axis=0) + 1 for _, source in scars(64, 64)])
    assert spans[:, 0].mean() == pytest.approx(17.5, abs=1)
    assert spans[:, 1].mean() == pytest.approx(9, abs=1)


@pytest.mark.parametrize(("h", "w"), SCAR_SIZES)
def test_a_scar_is_turned_by_at_most_45_degrees_either_way(h, w):
    long = [s for s in scars(h, w) if np.ptp(s[1][:, 0]) >= 15 and np.ptp(s[1][:, 1]) >= 4]
    turns = np.array([turn_of(*scar) for scar in long])
    assert np.abs(turns).max() < 48
    assert turns.min() < -38
    assert turns.max() > 38
    assert turns.mean() == pytest.approx(0, abs=6)


@pytest.mark.parametrize("angle", [0.0, 10.0])
def test_the_angle_option_is_kept(angle):
    found = [s for s in scars(64, 64, angle=angle) if np.ptp(s[1][:, 0]) >= 15]
    assert max(abs(turn_of(*scar)) for scar in found) <= angle + 2


@pytest.mark.parametrize(("h", "w"), SCAR_SIZES)
def test_a_scar_is_turned_and_not_stretched(h, w):
    for target, source in scars(h, w)[:100]:
        angle = math.radians(turn_of(target, source))
        if np.ptp(source, axis=0).min() < 3:
            continue
        cos, sin = math.cos(angle), math.sin(angle)
        dy, dx = (target - target.mean(0)).T
        back = np.stack([cos * dy - sin * dx, cos * dx + sin * dy], 1)
        assert np.abs(back - (source - source.mean(0))).max() < 1.5


@pytest.mark.parametrize(("h", "w"), SCAR_SIZES)
def test_scars_reach_every_edge_and_are_cut_from_everywhere(h, w):
    target = np.concatenate([target for target, _ in scars(h, w)])
    source = np.concatenate([source for _, source in scars(h, w)])
    for used in (target, source):
        assert len(np.unique(used @ (w, 1))) > 0.85 * h * w
        assert (used.min(0) <= 1).all()
        assert (used.max(0) >= (h - 2, w - 2)).all()
        assert np.abs(used.mean(0) / (h, w) - 0.5).max() < 0.03


def test_a_scar_carries_no_black_fill():
    x = 0.5 + random_pictures(200, 48, 64) / 2
    assert cutpaste_scar(x, generator(), jitter=0.0).min() >= 0.5


@pytest.mark.parametrize("size", [64, 128, 256])
def test_scars_scale_with_the_size_of_a_run(size):
    lengths = options(Run(method="cutpaste_scar", category="brick", size=size))["cutpaste_scar"]
    assert lengths["width"] == (2 * size / 256, 16 * size / 256)
    assert lengths["length"] == (10 * size / 256, 25 * size / 256)


@pytest.mark.parametrize(("size", "widest", "longest"), [(128, 8, 12), (64, 4, 6)])
def test_scars_of_small_pictures_are_small(size, widest, longest):
    chosen = options(Run(method="cutpaste_scar", category="brick", size=size))["cutpaste_scar"]
    x = coordinates(200, size, size)
    made = cutpaste_scar(x, generator(), **(chosen | {"jitter": 0.0}))
    spans = []
    for picture, where in zip(made, (made != x).any(1), strict=True):
        column, row = (picture[:2, where] * 256).round()
        spans.append(
            (np.ptp(column.numpy()) + 1, np.ptp(row.numpy()) + 1) if where.any() else (0, 0)
        )
    assert np.max(spans, axis=0).tolist() == [widest, longest]


# Both


MAKERS = [cutpaste, cutpaste_scar, cutpaste_union, cutout, confetti, scar, jitter, translate]
MAKERS += [partial(cutout, fill="color")]


@pytest.mark.parametrize("make", MAKERS)
def test_the_source_is_not_modified(make):
    x = random_pictures(8, 40, 48)
    before = x.clone()
    make(x, generator())
    assert torch.equal(x, before)


@pytest.mark.parametrize("make", MAKERS)
def test_every_picture_of_a_batch_has_its_own_draw(make):
    x = random_pictures(1, 64, 64).expand(32, -1, -1, -1)
    assert len({picture.numpy().tobytes() for picture in make(x, generator())}) >= 28


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_seed_gives_the_same_pictures(make):
    x = random_pictures(8, 40, 48)
    assert torch.equal(make(x, generator(3)), make(x, generator(3)))


@pytest.mark.parametrize("make", MAKERS)
def test_another_seed_gives_other_pictures(make):
    x = random_pictures(8, 40, 48)
    assert not torch.equal(make(x, generator(3)), make(x, generator(4)))


@pytest.mark.parametrize("make", MAKERS)
def test_the_global_random_state_is_neither_used_nor_touched(make):
    x, state = random_pictures(8, 40, 48), torch.get_rng_state()
    make(x, generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_type_stay(make, dtype):
    made = make(random_pictures(3, 40, 48).to(dtype), generator())
    assert (made.shape, made.dtype) == ((3, 3, 40, 48), dtype)


@pytest.mark.parametrize("make", MAKERS)
def test_pictures_stay_between_zero_and_one(make):
    made = make(random_pictures(64, 40, 48), generator())
    assert made.min() >= 0
    assert made.max() <= 1


def test_a_picture_too_small_for_a_patch_is_refused():
    with pytest.raises(ValueError, match="2x3 pixels is too small for a patch"):
        cutpaste(random_pictures(1, 2, 3), generator())


@pytest.mark.parametrize(("h", "w"), [(29, 64), (64, 29)])
def test_a_picture_too_small_for_a_scar_is_refused(h, w):
    with pytest.raises(ValueError, match=f"{h}x{w} pixels is too small for a scar of 16x25"):
        cutpaste_scar(random_pictures(1, h, w), generator())


# The other ways to damage a picture (Tables 1, 4 and 5)


def footprints(make, n=300, h=48, w=80, **options):
    """Where each of many pictures of noise was changed, and the pictures before and after."""
    x = 0.2 + 0.6 * random_pictures(n, h, w)
    made = make(x, generator(), **options)
    return (made != x).any(1), x, made


def test_cutout_changes_a_rectangle_like_cutpastes():
    changed, _, _ = footprints(cutout)
    (_, height), (_, width) = extent(changed.any(2)), extent(changed.any(1))
    share = changed.flatten(1).float().mean(1)
    assert torch.equal(changed.sum((1, 2)), height * width)
    assert share.min() >= 0.02
    assert share.max() <= 0.15
    assert ((height - 1) / (width + 1) < 3.3).all()
    assert ((height + 1) / (width - 1).clamp(min=1) > 0.3).all()


def colours(fill):
    """The colour (n, 3) that fills each cutout, which has one, and the pictures before."""
    changed, x, made = footprints(cutout, fill=fill)
    inside = [picture[:, where] for picture, where in zip(made, changed, strict=True)]
    assert all((pixels == pixels[:, :1]).all() for pixels in inside)
    return torch.stack([pixels[:, 0] for pixels in inside]), x


def test_a_grey_cutout_is_grey():
    assert (colours("grey")[0] == 0.5).all()


def test_a_mean_cutout_has_the_mean_colour_of_its_picture():
    found, x = colours("mean")
    torch.testing.assert_close(found, x.mean((2, 3)))


def test_a_cutout_of_random_colour_has_one_of_its_own():
    found, _ = colours("color")
    assert len(found.unique(dim=0)) == len(found)
    assert found.min() < 0.05
    assert found.max() > 0.95


def test_confetti_adds_and_subtracts_one_or_two_blobs_of_the_sides_asked_for():
    """Without blur each blob is a turned rectangle of one colour."""
    grey = torch.full((300, 3, 96, 96), 0.5)
    made = confetti(grey, generator(), side=(20, 30), blur=0.1)
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
    sharp, soft = (confetti(grey, generator(), side=(9, 20), blur=b) for b in (0.1, 5.7))
    steepest = [made.diff(dim=3).abs().max().item() for made in (sharp, soft)]
    assert steepest[1] < 0.2 < steepest[0]
    assert ((soft == 0.5).all(1).float().mean((1, 2)) > 0.3).all()


def test_a_drawn_scar_has_one_colour_and_the_shape_of_a_scar():
    changed, _, made = footprints(scar)
    for picture, where in zip(made, changed, strict=True):
        pixels = picture[:, where]
        assert (pixels == pixels[:, :1]).all()
    counts = changed.sum((1, 2)).float()
    assert counts.mean().item() == pytest.approx(9 * 17.5, rel=0.15)
    assert counts.max() <= 1.1 * 16 * 25


@pytest.mark.parametrize("quarters", range(4))
def test_rotation_turns_by_quarters(quarters):
    x = random_pictures(2, 16, 16)
    assert torch.equal(rotate(quarters)(x, generator()), x.rot90(quarters, (2, 3)))


def test_the_union_is_a_patch_or_a_scar_half_of_the_time_each():
    x = random_pictures(1000, 96, 96)
    chosen = {"patch": {"area": (0.14, 0.15)}, "thin": {"width": (2, 3)}}
    share = (augment.cutpaste_union(x, generator(), **chosen) != x).any(1).float().mean((1, 2))
    large, thin = share > 0.13, share < 0.012
    assert (large | thin).all()
    assert large.float().mean().item() == pytest.approx(0.5, abs=0.06)


# Jitter


def only(component, strength):
    """The strengths with this one of brightness, contrast, saturation and hue alone."""
    return tuple(strength if i == component else 0.0 for i in range(4))


def muted(n=64):
    """Pictures far from black and white, so that nothing is clamped."""
    return 0.4 + random_pictures(n, 8, 8) / 5


BLENDS = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]


def colour_spread(x):
    return (x[:, 0] - x[:, 1]).flatten(1).norm(dim=1)


def brightness(x):
    return x.flatten(1).sum(1)


def contrast(x):
    return x.flatten(1).std(1)


@pytest.mark.parametrize(
    ("component", "measure"), [(0, brightness), (1, contrast), (2, colour_spread)]
)
def test_each_blend_is_torchvisions_with_a_factor_in_its_range(component, measure):
    x = muted()
    made = jitter(x, generator(), strength=only(component, 0.4))
    factors = measure(made) / measure(x)
    for picture, before, factor in zip(made, x, factors, strict=True):
        expected = BLENDS[component](before, factor.item())
        torch.testing.assert_close(picture, expected, rtol=0, atol=1e-3)
    assert 0.6 - 1e-3 <= factors.min() < 0.68
    assert 1.32 < factors.max() <= 1.4 + 1e-3


def test_hue_is_shifted_within_its_range_and_as_torchvision_does():
    x = random_pictures(64, 4, 4)
    made = jitter(x, generator(), strength=only(3, 0.2))
    shifts = []
    for picture, before in zip(made, x, strict=True):
        vivid = (before.amax(0) - before.amin(0)).flatten().argmax()
        hues = [colorsys.rgb_to_hsv(*p.flatten(1)[:, vivid].tolist())[0] for p in (before, picture)]
        shifts.append((hues[1] - hues[0] + 0.5) % 1 - 0.5)
        expected = TF.adjust_hue(before, shifts[-1])
        torch.testing.assert_close(picture, expected, rtol=0, atol=1e-4)
    assert -0.2 - 1e-6 <= min(shifts) < -0.15
    assert 0.15 < max(shifts) <= 0.2 + 1e-6


@pytest.mark.parametrize("shift", [-0.5, -0.3, -0.01, 0.0, 0.1, 0.25, 0.5])
def test_shift_hue_is_torchvisions(shift):
    x = random_pictures(4, 16, 16)
    expected = TF.adjust_hue(x, shift)
    torch.testing.assert_close(shift_hue(x, torch.tensor(shift)), expected, rtol=0, atol=1e-5)


@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), st.floats(-1, 1))
def test_shift_hue_turns_the_hue_of_a_colour_and_nothing_else(colour, shift):
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    made = shift_hue(torch.tensor(colour).view(1, 3, 1, 1), torch.tensor(shift)).flatten().tolist()
    expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
    assert made == pytest.approx(expected, abs=1e-5)


def test_grey_has_no_hue_to_shift():
    grey = torch.linspace(0, 1, 9).view(1, 1, 3, 3).expand(1, 3, 3, 3)
    assert torch.equal(shift_hue(grey, torch.tensor(0.3)), grey)


@given(st.lists(st.floats(0, 1.5), min_size=3, max_size=3), st.floats(0, 0.5), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_jitter_stays_between_zero_and_one(strengths, hue, seed):
    x = random_pictures(8, 6, 6, seed).round(decimals=1)
    made = jitter(x, generator(seed), strength=(*strengths, hue))
    assert torch.isfinite(made).all()
    assert made.min() >= -1e-6
    assert made.max() <= 1 + 1e-6


def test_no_strength_changes_nothing():
    x = random_pictures()
    assert torch.equal(jitter(x, generator(), strength=(0, 0, 0, 0)), x)


def test_strengths_of_zero_beside_others_change_nothing_of_theirs():
    grey = muted(8).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    made = jitter(grey, generator(), strength=only(2, 0.5))
    torch.testing.assert_close(made, grey, rtol=0, atol=1e-6)


def test_every_one_of_the_24_orders_comes_up(monkeypatch):
    factors = {0.6: 1.6, 0.5: 1.5, 0.9: 1.9, 0.2: 0.2}
    monkeypatch.setattr(augment, "_uniform", lambda low, high, n, g: torch.full((n, 1), high))
    x = random_pictures(1, 6, 6)
    made = jitter(x.expand(1200, -1, -1, -1), generator(), strength=tuple(factors))
    steps = list(zip([*BLENDS, TF.adjust_hue], factors.values(), strict=True))
    counts = []
    for order in itertools.permutations(steps):
        expected = functools.reduce(lambda y, step: step[0](y, step[1]), order, x)
        counts.append(((made - expected).abs().amax((1, 2, 3)) < 2e-3).sum().item())
    assert len(counts) == 24
    assert sum(counts) == 1200  # each picture is the result of one order and of no other
    assert min(counts) > 20


def test_contrast_takes_its_mean_from_weighted_pixels_alone():
    x, weight = muted(16), torch.zeros(16, 8, 8, dtype=torch.bool)
    weight[:, :3, 2:7] = True
    made = jitter(x, generator(), strength=only(1, 0.4), weight=weight)
    inside = x[:, :, :3, 2:7]
    factors = contrast(made[:, :, :3, 2:7]) / contrast(inside)
    for picture, before, factor in zip(made, inside, factors, strict=True):
        expected = TF.adjust_contrast(before, factor.item())
        torch.testing.assert_close(picture[:, :3, 2:7], expected, rtol=0, atol=1e-3)


def test_pixels_without_weight_do_not_change_the_others():
    x, weight = muted(8), torch.zeros(8, 8, 8, dtype=torch.bool)
    weight[:, 2:5] = True
    other = torch.where(weight.unsqueeze(1), x, 1.0)
    made = [jitter(v, generator(), strength=(0.4,) * 4, weight=weight) for v in (x, other)]
    assert torch.equal(made[0][:, :, 2:5], made[1][:, :, 2:5])


def test_jitter_takes_rows_of_pixels_as_it_takes_pictures():
    x = random_pictures(4, 6, 5)
    rows = jitter(x.flatten(2), generator(), strength=(0.3,) * 4)
    torch.testing.assert_close(rows.view_as(x), jitter(x, generator(), strength=(0.3,) * 4))


# Translation


def shifts_of(x, made, reach_y, reach_x):
    """The one (dy, dx) for each picture by which it is the reflected source, moved."""
    h, w = x.shape[2:]
    padded = F.pad(x.double(), (reach_x, reach_x, reach_y, reach_y), mode="reflect")
    found = []
    for source, picture in zip(padded, made.double(), strict=True):
        windows = source.unfold(1, h, 1).unfold(2, w, 1)
        equal = (windows == picture[:, None, None]).all(4).all(3).all(0)
        assert equal.sum() == 1
        dy, dx = equal.nonzero()[0].tolist()
        found.append((dy - reach_y, dx - reach_x))
    return found


@pytest.mark.parametrize(("h", "w", "reach_y", "reach_x"), [(24, 40, 3, 5), (40, 16, 5, 2)])
def test_translation_is_a_whole_shift_with_reflected_border(h, w, reach_y, reach_x):
    x = random_pictures(300, h, w)
    shifts = shifts_of(x, translate(x, generator(), share=0.125), reach_y, reach_x)
    assert {dy for dy, _ in shifts} == set(range(-reach_y, reach_y + 1))
    assert {dx for _, dx in shifts} == set(range(-reach_x, reach_x + 1))


def test_translation_takes_whole_numbers():
    x = (random_pictures(20, 16, 24) * 255).byte()
    made = translate(x, generator(), share=0.25)
    assert made.dtype == torch.uint8
    assert len(set(shifts_of(x, made, 4, 6))) > 5


def test_a_share_of_zero_moves_nothing():
    x = random_pictures()
    assert torch.equal(translate(x, generator(), share=0.0), x)


# The batch


def test_the_methods_are_those_that_runs_can_be_trained_with():
    assert set(augment.METHODS) == set(config.TRAINED)


@pytest.mark.parametrize("method", config.TRAINED)
def test_a_batch_holds_every_picture_once_in_each_class(method):
    x, classes = random_pictures(5, 40, 40), len(augment.METHODS[method])
    images, labels = pretext_batch(x, method, generator())
    assert images.shape == (5 * classes, 3, 40, 40)
    assert labels.tolist() == [label for label in range(classes) for _ in range(5)]
    assert classes == {"rotation": 4, "cutpaste_3way": 3}.get(method, 2)


@pytest.mark.parametrize("method", config.TRAINED)
def test_class_zero_is_the_picture_as_it_is_and_the_others_are_not(method):
    x = random_pictures(5, 40, 40)
    images, labels = pretext_batch(x, method, generator())
    assert torch.equal(images[labels == 0], x)
    for label in range(1, int(labels.max()) + 1):
        assert (images[labels == label] != x).flatten(1).any(1).all()


def test_the_classes_of_cutpaste_3way_are_a_large_patch_and_a_scar():
    x = random_pictures(64, 128, 128)
    images, labels = pretext_batch(x, "cutpaste_3way", generator())
    shares = [(images[labels == k] != x).any(1).float().mean().item() for k in (1, 2)]
    assert shares[0] == pytest.approx(0.085, abs=0.02)
    assert shares[1] == pytest.approx(9 * 17.5 / 128**2, rel=0.3)


def test_options_reach_the_augmentation_they_name():
    x = random_pictures(32, 64, 64)
    chosen = {"cutpaste": {"area": (0.3, 0.31)}, "cutpaste_scar": {"width": (2, 2)}}
    images, labels = pretext_batch(x, "cutpaste_3way", generator(), chosen)
    shares = [(images[labels == k] != x).any(1).float().mean((1, 2)) for k in (1, 2)]
    assert shares[0].max() > 0.29
    assert shares[1].max() < 2.7 * 25 / 64**2


def test_a_normal_picture_is_returned_as_it_is():
    x = random_pictures()
    assert torch.equal(augment.normal(x, generator()), x)


def test_an_unknown_method_is_refused():
    with pytest.raises(KeyError, match="nonsense"):
        pretext_batch(random_pictures(), "nonsense", generator())


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="sizes"):
        pretext_batch(random_pictures(), "cutpaste", generator(), {"cutpaste": {"sizes": 1}})
