"""Painted anomalies: exactly the mask, alike for a place in the row, of the shapes asked for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from cplib.study import synthetic
from cplib.study.synthetic import FILLS, SHAPES, digit_images, natural_images, outline, paint

AREAS = {"square": 0.5, "ellipse": np.pi / 8, "heart": 3.6595 / 2.5**2}  # of the box


def plain(n=2, height=64, width=64, value=0):
    return torch.full((n, 3, height, width), value, dtype=torch.uint8)


def box(mask):
    """First row and column of a mask, and its height and width."""
    rows, columns = (np.flatnonzero(np.asarray(mask).any(axis)) for axis in (1, 0))
    return rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1


# What is painted


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    fill=st.sampled_from([*FILLS]),
    sides=st.tuples(st.integers(64, 90), st.integers(64, 90)),
    least=st.integers(1, 5),
)
def test_exactly_the_mask_is_painted(shape, fill, sides, least):
    dark, light = plain(1, *sides, 0), plain(1, *sides, 255)
    on_dark, masks = paint(dark, shape, fill, least=least)
    on_light, same = paint(light, shape, fill, least=least)
    # What is painted does not depend on what lies below: equal there, and only there.
    assert torch.equal((on_dark == on_light).all(1), masks)
    assert torch.equal(masks, same)
    if fill == "color":  # one colour a shape
        assert {len(on_dark[i][:, mask].unique(dim=1).T) for i, mask in enumerate(masks)} == {1}
    assert masks.flatten(1).any(1).all()
    assert (on_dark.masked_fill(masks[:, None], 0) == 0).all()
    assert (dark == 0).all()  # the normal image is left alone


def test_an_image_is_painted_alike_each_time_and_unlike_the_others():
    for fill in FILLS:
        few, many = (paint(plain(n), "heart", fill, least=1) for n in (2, 7))
        assert torch.equal(few[0], many[0][:2])
        assert len({mask.numpy().tobytes() for mask in many[1]}) == 7


def test_every_normal_image_is_painted_as_often_as_it_takes():
    x = torch.arange(5, dtype=torch.uint8).view(-1, 1, 1, 1).expand(5, 3, 64, 64)
    for least, expected in ((1, 5), (5, 5), (6, 10)):
        painted, masks = paint(x, "square", "color", least=least)
        assert len(painted) == len(masks) == expected
        for i, (image, mask) in enumerate(zip(painted, ~masks, strict=True)):
            assert set(image[:, mask].flatten().tolist()) == {i % 5}


def test_all_shapes_and_fills_lie_at_the_same_place():
    centres = {}
    for shape in SHAPES[1:]:
        masks = [paint(plain(8, 96, 80), shape, fill, least=1)[1] for fill in FILLS]
        assert torch.equal(*masks)
        centres[shape] = np.array([np.mean(np.nonzero(m.numpy()), axis=1) for m in masks[0]])
    assert abs(centres["square"] - centres["ellipse"]).max() < 0.6  # pixels
    assert abs(centres["square"] - centres["heart"]).max() < 3  # its middle lies off its circle's


def test_sizes_places_and_turns_are_spread():
    masks = paint(plain(1, 100, 200), "square", "color", least=400, side=(0.2, 0.5))[1]
    share = masks.float().mean(0)
    corners = [share[:50, :100], share[:50, 100:], share[50:, :100], share[50:, 100:]]
    means = np.array([float(c.mean()) for c in corners])
    np.testing.assert_allclose(means / means.mean(), 1, atol=0.2)
    sides = np.array([np.sqrt(2 * int(mask.sum())) for mask in masks])  # of the box around any turn
    assert 19 <= sides.min() <= 22
    assert 48 <= sides.max() <= 51
    widths = np.array([box(mask)[3] for mask in masks]) / sides
    assert widths.min() < 0.75  # upright
    assert widths.max() > 0.97  # on a corner


def test_shapes_have_their_forms_and_no_turn_cuts_one_off():
    square, ellipse, heart = (outline(shape, 101) for shape in ("square", "ellipse", "heart"))
    assert box(square)[2:] == (71, 71)
    assert square[15:86, 15:86].all()
    assert box(ellipse)[2:] == (51, 101)
    assert np.array_equal(heart, heart[:, ::-1])
    lobes = [np.count_nonzero(np.diff(np.pad(row.astype(int), 1)) == 1) for row in heart]
    rows = np.flatnonzero(heart.any(1))
    assert lobes[rows[0] + 2] == 2  # above
    assert rows[-1] >= 99  # and the tip at the bottom
    assert heart[-3].sum() < 10
    np.testing.assert_array_equal(outline("heart", 51, np.pi), outline("heart", 51)[::-1, ::-1])
    for shape, area in AREAS.items():
        turned = [outline(shape, 101, turn).mean() for turn in np.linspace(0, np.pi, 5)]
        assert turned == pytest.approx([area] * 5, rel=0.02)


# What it is made of


def test_the_digits_are_scikit_learns_and_many_are_drawn():
    np.testing.assert_allclose(digit_images() / 255 * 16, load_digits().images, atol=0.1)
    masks = paint(plain(40), "digit", "color", least=1, side=(0.5, 0.5))[1]
    assert len({int(mask.sum()) for mask in masks}) > 20


def test_mnist_that_is_not_there_is_named_and_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("CPLIB_MNIST", str(tmp_path / "gone"))
    monkeypatch.setattr(synthetic, "digit_images", digit_images.__wrapped__)  # no cache
    with pytest.raises(ValueError, match=r"no MNIST.*gone"):
        paint(plain(), "digit", "color")
    assert not (tmp_path / "gone").exists()


def test_a_natural_filling_is_a_piece_of_a_natural_image():
    painted, masks = paint(plain(1, 64, 80), "heart", "natural", least=12)
    used = [source(p.numpy(), m.numpy()) for p, m in zip(painted, masks, strict=True)]
    assert len({photo for photo, *_ in used}) > 1
    assert len(set(used)) == len(used)


def source(image, mask):
    """The natural image and the place in it that a painted piece was cut from."""
    top, left, height, width = box(mask)
    inside = mask[top : top + height, left : left + width]
    piece = image[:, top : top + height, left : left + width][:, inside]
    for i, photo in enumerate(natural_images(64)):
        views = np.lib.stride_tricks.sliding_window_view(photo, (height, width), axis=(1, 2))
        same = (views[..., inside] == piece[:, None, None]).all((0, 3))
        if same.any():
            return i, *np.argwhere(same)[0]
    raise AssertionError("a piece of none of them")


def test_what_cannot_be_painted_is_named():
    for x, kind, named in (
        (plain(), ("star", "color"), "star"),
        (plain(), ("heart", "plaid"), "plaid"),
        (plain(2, 20, 60), ("heart", "color"), "20x60"),
        (plain(0), ("heart", "color"), "0 images"),
    ):
        with pytest.raises(ValueError, match=named):
            paint(x, *kind)
