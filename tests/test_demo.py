"""The demo set: layout, the same bytes every time, exact masks, folders it must not touch."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from cplib.apps import demo

SMALL = {"train": 3, "good": 2, "defective": 6, "size": 64}
TINY = {"train": 1, "good": 1, "defective": 3, "size": 32}
KINDS = [(category, kind) for category, kinds in demo.DEFECTS.items() for kind in kinds]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return demo.make_demo(tmp_path_factory.mktemp("demo") / "new" / "set", **SMALL)


def digests(root):
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_layout_is_that_of_mvtec_ad(root):
    assert names(root.parent) == ["set"]
    assert names(root) == ["LICENSE.txt", "brick", "demo.json", "fabric", "sieve"]
    for category, kinds in demo.DEFECTS.items():
        folder = root / category
        assert len(kinds) == 3
        assert names(folder) == ["ground_truth", "test", "train"]
        assert names(folder / "train") == ["good"]
        assert names(folder / "train" / "good") == ["000.png", "001.png", "002.png"]
        assert names(folder / "test") == sorted([*kinds, "good"])
        assert names(folder / "test" / "good") == ["000.png", "001.png"]
        assert names(folder / "ground_truth") == sorted(kinds)


def test_anomalous_images_are_spread_evenly_over_the_kinds(tmp_path):
    root = demo.make_demo(tmp_path / "set", **(TINY | {"defective": 7}))
    for category, kinds in demo.DEFECTS.items():
        assert [len(names(root / category / "test" / kind)) for kind in kinds] == [3, 2, 2]


def test_the_licence_names_the_photograph(root):
    text = (root / "LICENSE.txt").read_text(encoding="utf-8")
    for word in ("skimage.data.brick()", "CC0"):
        assert word in text


def test_an_image_depends_on_the_seed_and_not_on_how_many_others_there_are(root, tmp_path):
    few = {k: v for k, v in digests(root).items() if k.endswith(".png")}
    many = digests(demo.make_demo(tmp_path / "more", train=4, good=3, defective=9, size=64))
    images = [v for k, v in few.items() if not k.endswith("_mask.png")]
    assert len(set(images)) == len(images) == 3 * (3 + 2 + 6)  # no two are the same
    assert all(few[name] == many[name] for name in few)
    other = digests(demo.make_demo(tmp_path / "other", **SMALL, seed=1))
    assert not [k for k, v in few.items() if other[k] == v and not k.endswith("_mask.png")]


@pytest.mark.parametrize(("category", "kind"), KINDS)
def test_a_mask_is_exactly_where_the_defect_changes_the_image(category, kind):
    for size, index in ((64, 0), (64, 1), (150, 2)):
        clean = demo.paint(category, kind, index, size=size)
        bad, mask = demo.paint_defective(category, kind, index, size=size)
        assert clean.shape == bad.shape == (size, size, 3)
        np.testing.assert_array_equal(mask == 255, (clean != bad).any(axis=-1))
        assert 0.002 < (mask == 255).mean() < 0.4
        change = np.abs(bad.astype(int) - clean)[mask == 255]
        assert change.max() > 30, "a person could not see it"


def test_the_files_hold_what_is_painted(root):
    for category, kind in KINDS:
        bad, mask = demo.paint_defective(category, kind, 1, size=64)
        folder = root / category
        with Image.open(folder / "test" / kind / "001.png") as image:
            np.testing.assert_array_equal(image, bad)
        with Image.open(folder / "ground_truth" / kind / "001_mask.png") as image:
            np.testing.assert_array_equal(image, mask)
            assert set(np.unique(image)) == {0, 255}


@pytest.mark.parametrize("category", demo.DEFECTS)
def test_normal_images_vary_but_are_of_one_kind(category):
    images = np.array([demo.paint(category, "good", i, size=64) for i in range(8)], dtype=float)
    means = images.mean(axis=(1, 2))
    assert means.std(axis=0).min() > 0.5, "all lit alike"
    assert means.std(axis=0).max() < 20, "no two alike"
    assert np.abs(images[1:] - images[:-1]).mean(axis=(1, 2, 3)).min() > 3


def test_a_set_that_is_there_is_kept_and_an_empty_folder_filled(root, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert demo.make_demo(str(root), **SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert "brick" in names(demo.make_demo(tmp_path, **TINY))


def test_a_folder_with_anything_else_is_refused_and_kept(root, tmp_path):
    before = digests(root)
    for change in ({"train": 4}, {"size": 32}, {"seed": 1}):
        with pytest.raises(FileExistsError, match="set exists"):
            demo.make_demo(root, **(SMALL | change))
    assert digests(root) == before
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError) as error:
            demo.make_demo(folder, **SMALL)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_set_that_lost_an_image_is_not_taken_for_whole(tmp_path):
    root = demo.make_demo(tmp_path / "set", **TINY)
    (root / "sieve" / "train" / "good" / "000.png").unlink()
    with pytest.raises(FileExistsError, match="set"):
        demo.make_demo(root, **TINY)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LICENCE", None)
    with pytest.raises(TypeError):
        demo.make_demo(tmp_path / "set", **TINY)
    assert names(tmp_path) == []


@pytest.mark.parametrize("change", [{"train": 0}, {"defective": 2}, {"size": 8}, {"seed": -1}])
def test_arguments_that_make_no_set_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="set"):
        demo.make_demo(tmp_path / "set", **(SMALL | change))
    assert names(tmp_path) == []
