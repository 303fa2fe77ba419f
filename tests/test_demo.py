"""The embedded demo set: layout, determinism, exact masks, and folders it must not touch."""

import hashlib
import json
import time

import numpy as np
import pytest
from PIL import Image

from cplib import demo

SMALL = {"train": 3, "good": 2, "defective": 6, "size": 64}
KINDS = [(category, kind) for category, kinds in demo.DEFECTS.items() for kind in kinds]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return demo.make_demo(tmp_path_factory.mktemp("demo") / "new" / "set", **SMALL)


def _digests(root):
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_layout_is_that_of_mvtec_ad(root):
    assert _names(root) == ["LICENSE.txt", "brick", "coin", "demo.json", "fabric", "gear"]
    for category, kinds in demo.DEFECTS.items():
        folder = root / category
        assert _names(folder) == ["ground_truth", "test", "train"]
        assert _names(folder / "train") == ["good"]
        assert _names(folder / "train" / "good") == ["000.png", "001.png", "002.png"]
        assert _names(folder / "test") == sorted([*kinds, "good"])
        assert _names(folder / "test" / "good") == ["000.png", "001.png"]
        assert _names(folder / "ground_truth") == sorted(kinds)
        for kind in kinds:
            assert _names(folder / "test" / kind) == ["000.png", "001.png"]
            assert _names(folder / "ground_truth" / kind) == ["000_mask.png", "001_mask.png"]


def test_pictures_are_rgb_and_masks_are_black_and_white(root):
    for path in root.rglob("*.png"):
        with Image.open(path) as picture:
            is_mask = path.name.endswith("_mask.png")
            assert (picture.mode, picture.size) == ("L" if is_mask else "RGB", (64, 64)), path
            if is_mask:
                assert set(np.unique(picture)) == {0, 255}, path


def test_nothing_is_left_beside_the_set(root):
    assert _names(root.parent) == ["set"]


def test_licence_names_both_photographs(root):
    text = (root / "LICENSE.txt").read_text(encoding="utf-8")
    for word in ("skimage.data.brick()", "CC0", "skimage.data.coins()", "Brooklyn Museum"):
        assert word in text


def test_every_category_has_three_kinds_of_defect():
    assert set(demo.DEFECTS) == {"brick", "fabric", "coin", "gear"}
    assert all(len(set(kinds)) >= 3 for kinds in demo.DEFECTS.values())


def test_defects_are_spread_evenly_over_the_kinds(tmp_path):
    root = demo.make_demo(tmp_path / "set", train=1, good=1, defective=7, size=32)
    for category, kinds in demo.DEFECTS.items():
        assert [len(_names(root / category / "test" / kind)) for kind in kinds] == [3, 2, 2]


def test_same_arguments_same_bytes(root, tmp_path):
    assert _digests(demo.make_demo(tmp_path / "other", **SMALL)) == _digests(root)


def test_a_picture_does_not_depend_on_how_many_others_there_are(root, tmp_path):
    more = demo.make_demo(tmp_path / "more", train=4, good=3, defective=9, size=64)
    few, many = _digests(root), _digests(more)
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 4 * (3 + 2 + 2 * 6)
    assert all(few[name] == many[name] for name in pictures)


def test_another_seed_makes_other_pictures(root, tmp_path):
    other = _digests(demo.make_demo(tmp_path / "other", **SMALL, seed=1))
    same = [k for k, v in _digests(root).items() if other[k] == v and not k.endswith("_mask.png")]
    assert same == ["LICENSE.txt"]


def test_no_two_pictures_are_the_same(root):
    pictures = [v for k, v in _digests(root).items() if "/train/" in k or "/test/" in k]
    assert len(set(pictures)) == len(pictures) == 4 * (3 + 2 + 6)


@pytest.mark.parametrize(("category", "kind"), KINDS)
@pytest.mark.parametrize("size", [64, 150])
def test_mask_is_exactly_where_the_defect_changes_the_picture(category, kind, size):
    for index in range(4):
        clean = demo.paint(category, kind, index, size=size)
        bad, mask = demo.paint_defective(category, kind, index, size=size)
        assert clean.shape == bad.shape == (size, size, 3)
        assert mask.shape == (size, size)
        np.testing.assert_array_equal(mask == 255, (clean != bad).any(axis=-1))
        assert 0.002 < (mask == 255).mean() < 0.4
        change = np.abs(bad.astype(int) - clean)[mask == 255]
        assert change.max() > 30, "a person could not see it"


@pytest.mark.parametrize(("category", "kind"), KINDS)
def test_files_hold_what_the_painter_returns(root, category, kind):
    bad, mask = demo.paint_defective(category, kind, 1, size=64)
    np.testing.assert_array_equal(_pixels(root / category / "test" / kind / "001.png"), bad)
    truth = root / category / "ground_truth" / kind / "001_mask.png"
    np.testing.assert_array_equal(_pixels(truth), mask)


@pytest.mark.parametrize("category", demo.DEFECTS)
def test_normal_pictures_vary_but_are_of_one_kind(category):
    pictures = np.array([demo.paint(category, "good", i, size=64) for i in range(8)], dtype=float)
    means = pictures.mean(axis=(1, 2))
    assert means.std(axis=0).min() > 0.5, "all lit alike"
    assert means.std(axis=0).max() < 20, "no two alike"
    assert np.abs(pictures[1:] - pictures[:-1]).mean(axis=(1, 2, 3)).min() > 3


def test_second_call_returns_at_once_and_writes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    start = time.perf_counter()
    assert demo.make_demo(str(root), **SMALL) == root
    assert time.perf_counter() - start < 0.5
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path):
    demo.make_demo(tmp_path, train=1, good=1, defective=3, size=32)
    assert json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["train"] == 1


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError) as error:
        demo.make_demo(tmp_path, **SMALL)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert _names(tmp_path) == ["holiday.png"]
    assert (tmp_path / "holiday.png").read_bytes() == b"mine"


def test_a_file_in_the_way_is_refused_and_kept(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(FileExistsError, match="set"):
        demo.make_demo(tmp_path / "set", **SMALL)
    assert (tmp_path / "set").read_text() == "mine"


@pytest.mark.parametrize("change", [{"train": 4}, {"size": 32}, {"seed": 1}])
def test_a_set_made_with_other_arguments_is_refused_and_kept(root, change):
    before = _digests(root)
    with pytest.raises(FileExistsError, match="set"):
        demo.make_demo(root, **(SMALL | change))
    assert _digests(root) == before


def test_a_set_that_lost_a_picture_is_not_taken_for_whole(tmp_path):
    options = {"train": 1, "good": 1, "defective": 3, "size": 32}
    root = demo.make_demo(tmp_path / "set", **options)
    (root / "coin" / "train" / "good" / "000.png").unlink()
    with pytest.raises(FileExistsError, match="set"):
        demo.make_demo(root, **options)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LICENCE", None)
    with pytest.raises(TypeError):
        demo.make_demo(tmp_path / "set", train=1, good=1, defective=3, size=32)
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    "change", [{"train": 0}, {"good": 0}, {"defective": 2}, {"size": 8}, {"seed": -1}]
)
def test_arguments_that_make_no_set_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="set"):
        demo.make_demo(tmp_path / "set", **(SMALL | change))
    assert _names(tmp_path) == []
