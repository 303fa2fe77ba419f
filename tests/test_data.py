"""Tests of cplib.data on small folders in the MVTec layout, and on the real one where at hand."""

import dataclasses
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cplib import data
from cplib.data import DataError, Images, categories, fingerprint, load

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "mvtec256"
COUNTS = {"bottle": (209, 20, 63), "screw": (320, 41, 119), "transistor": (213, 60, 40)}
LEFT_WHITE = np.repeat(np.array([[255, 255, 0, 0]], np.uint8), 4, axis=1).repeat(8, axis=0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep every test's cache in its own folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CPLIB_CACHE", str(folder))
    return folder


def write(path, pixels=LEFT_WHITE, mode=None, **options):
    """Write an array or a PIL image to `path`, making its folder."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = picture if mode is None else picture.convert(mode)
    picture.save(path, **options)
    return path


def noise(seed, height=12, width=10):
    """An RGB array of random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def root(tmp_path):
    """Two kinds of defects, three training pictures, masks on the left half."""
    folder = tmp_path / "set" / "nut"
    for index in range(3):
        write(folder / f"train/good/{index:03d}.png", noise(index))
    for index in range(2):
        write(folder / f"test/good/{index:03d}.png", noise(10 + index))
        write(folder / f"test/scratch/{index:03d}.png", noise(20 + index))
        write(folder / f"test/bent/{index:03d}.png", noise(30 + index))
        mask = np.zeros((12, 10), np.uint8)
        mask[:, :5] = 255
        for kind in ("scratch", "bent"):
            write(folder / f"ground_truth/{kind}/{index:03d}_mask.png", mask)
    return folder.parent


def one(tmp_path, name="000.png"):
    """The path of the only training picture of category `one`."""
    return tmp_path / "single" / "one" / "train" / "good" / name


def pixels_of(tmp_path, size):
    """The pixels of the only training picture of category `one`, (3, H, W)."""
    images = load(tmp_path / "single", "one", "train", size)
    assert len(images) == 1
    return images.pixels[0]


def assert_error(call, *parts):
    """The call raises a DataError of one line that holds every one of `parts`."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    for part in parts:
        assert str(part) in message


# --- what is loaded ---------------------------------------------------------------------------


def test_train_split(root):
    images = load(root, "nut", "train", (12, 10))
    assert images.pixels.dtype == torch.uint8
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [0, 0, 0]
    assert images.kinds == ("good",) * 3
    assert images.names == ("train/good/000.png", "train/good/001.png", "train/good/002.png")
    assert images.masks is None
    expected = np.stack([noise(index) for index in range(3)]).transpose(0, 3, 1, 2)
    assert np.array_equal(images.pixels.numpy(), expected)


def test_test_split(root):
    images = load(root, "nut", "test", (12, 10))
    assert len(images) == 6
    assert images.kinds == ("good", "good", "bent", "bent", "scratch", "scratch")
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert images.names[1:3] == ("test/good/001.png", "test/bent/000.png")
    assert images.masks.dtype == torch.bool
    assert images.masks.shape == (6, 12, 10)
    assert not images.masks[:2].any()
    assert images.masks[2:, :, :5].all()
    assert not images.masks[2:, :, 5:].any()
    assert np.array_equal(images.pixels[2].numpy(), noise(30).transpose(2, 0, 1))


def test_default_size_is_256(root):
    assert load(root, "nut", "train").pixels.shape == (3, 3, 256, 256)


def test_images_are_frozen(root):
    images = load(root, "nut", "train", 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.pixels = None


def test_categories(root):
    write(root / "cable/train/good/0.png")
    (root / "notes").mkdir()
    (root / "license.txt").write_text("text")
    write(root / ".hidden/train/good/0.png")
    assert categories(root) == ["cable", "nut"]
    assert categories(str(root)) == ["cable", "nut"]


def test_test_split_may_lack_good_or_defects(root):
    shutil.rmtree(root / "nut/test/good")
    assert load(root, "nut", "test", 8).labels.tolist() == [1, 1, 1, 1]
    write(root / "nut/test/good/000.png")
    shutil.rmtree(root / "nut/test/scratch")
    shutil.rmtree(root / "nut/test/bent")
    images = load(root, "nut", "test", 8)
    assert images.labels.tolist() == [0]
    assert images.masks is not None
    assert not images.masks.any()


def test_no_ground_truth_folder_means_no_masks(root):
    assert load(root, "nut", "test", 8).masks is not None
    shutil.rmtree(root / "nut/ground_truth")
    assert load(root, "nut", "test", 8).masks is None


def test_masks_of_good_pictures_go_with_the_ground_truth_folder(root):
    for kind in ("bent", "scratch"):
        shutil.rmtree(root / "nut/test" / kind)
    assert load(root, "nut", "test", 8).masks is not None
    shutil.rmtree(root / "nut/ground_truth")
    assert load(root, "nut", "test", 8).masks is None


def test_contamination_is_a_defect_like_any_other(root):
    write(root / "nut/test/contamination/000.png")
    write(root / "nut/ground_truth/contamination/000_mask.png", LEFT_WHITE)
    images = load(root, "nut", "test", 8)
    assert images.kinds == ("good",) * 2 + ("bent",) * 2 + ("contamination",) + ("scratch",) * 2
    assert images.labels[4] == 1


def test_hidden_and_other_files_are_ignored(root):
    before = fingerprint(load(root, "nut", "test", 8))
    for folder in ("train/good", "test", "test/good", "test/bent", "ground_truth/bent"):
        for name in ("Thumbs.db", ".DS_Store", "._000.png", "readme.txt"):
            (root / "nut" / folder / name).write_bytes(b"no picture")
    (root / "nut/test/.checkpoints").mkdir()
    (root / "nut/test/empty").mkdir()
    (root / "nut/test/good/folder.png").mkdir()
    assert fingerprint(load(root, "nut", "test", 8)) == before
    assert len(load(root, "nut", "train", 8)) == 3


def test_order_is_by_name_whatever_the_order_of_writing(tmp_path):
    for name in ("b.png", "a.PNG", "c.png", "B.png"):
        write(one(tmp_path, name))
    names = load(tmp_path / "single", "one", "train", 8).names
    assert names == tuple(f"train/good/{name}" for name in ("B.png", "a.PNG", "b.png", "c.png"))


# --- formats and modes ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "Bmp", "tif", "TIFF", "tiff", "webp"])
def test_lossless_formats(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    write(one(tmp_path, f"a.{suffix}"), noise(1), **options)
    assert np.array_equal(pixels_of(tmp_path, (12, 10)).numpy(), noise(1).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "JpEg"])
def test_jpeg(tmp_path, suffix):
    write(one(tmp_path, f"a.{suffix}"), np.full((12, 10, 3), (200, 100, 50), np.uint8))
    pixels = pixels_of(tmp_path, (12, 10)).int()
    assert (pixels - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() <= 4


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("RGB", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("CMYK", "tif"),
        ("L", "tif"),
        ("RGBA", "webp"),
    ],
)
def test_modes_become_rgb(tmp_path, mode, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    write(one(tmp_path, f"a.{suffix}"), LEFT_WHITE, mode, **options)
    expected = torch.from_numpy(LEFT_WHITE).int().expand(3, 8, 16)
    assert (pixels_of(tmp_path, (8, 16)).int() - expected).abs().max() <= 1


@pytest.mark.filterwarnings("error")
def test_palette_colours_and_transparency(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 150, 100])
    picture.putpixel((1, 0), 1)
    write(one(tmp_path), picture, transparency=bytes([0, 128]))
    assert pixels_of(tmp_path, (1, 2))[:, 0].T.tolist() == [[10, 20, 30], [200, 150, 100]]


def test_alpha_is_dropped_not_blended(tmp_path):
    write(one(tmp_path), np.full((2, 2, 4), (10, 20, 30, 0), np.uint8))
    assert pixels_of(tmp_path, 2)[:, 0, 0].tolist() == [10, 20, 30]


def test_cmyk_jpeg(tmp_path):
    colour = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    write(one(tmp_path, "a.jpg"), colour)
    red, green, blue = pixels_of(tmp_path, 16)[:, 8, 8].tolist()
    assert red > 240
    assert max(green, blue) < 20


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    write(one(tmp_path, f"a.{suffix}"), levels)
    assert pixels_of(tmp_path, (1, 8))[0, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_16_bit_big_endian(tmp_path):
    levels = np.array([[0, 257, 65535]], ">u2")
    write(one(tmp_path, "a.tif"), Image.frombytes("I;16B", (3, 1), levels.tobytes()))
    assert pixels_of(tmp_path, (1, 3))[0, 0].tolist() == [0, 1, 255]


@given(st.integers(0, 65535))
def test_16_bit_scaling_rounds_to_nearest(value):
    picture = Image.fromarray(np.full((1, 1), value, np.uint16))
    assert abs(int(np.asarray(data._eight_bit(picture))[0, 0]) - value * 255 / 65535) <= 0.5


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_is_an_error(tmp_path, dtype):
    path = write(one(tmp_path, "a.tif"), np.full((4, 4), 1000, dtype))
    assert_error(lambda: pixels_of(tmp_path, 4), path, "32 bits", "expected")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    picture = Image.fromarray(LEFT_WHITE)  # 16 wide, 8 high, left half white
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(one(tmp_path, f"a.{suffix}"), picture.convert("RGB"), exif=exif)
    turned = orientation >= 5
    pixels = pixels_of(tmp_path, (16, 8) if turned else (8, 16))[0].float()
    halves = pixels.chunk(2, dim=0 if turned else 1)
    white_first = orientation in (1, 4, 5, 6)
    first, last = halves if white_first else halves[::-1]
    assert first.mean() > 240
    assert last.mean() < 15


def test_exif_orientation_of_16_bit(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    write(one(tmp_path), np.array([[0, 257, 65535]], np.uint16), exif=exif)
    assert pixels_of(tmp_path, (1, 3))[0, 0].tolist() == [255, 1, 0]


def test_first_frame_only(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}
    write(one(tmp_path, "a.tif"), frames[0], **options)
    write(one(tmp_path, "b.webp"), frames[0], lossless=True, **options)
    write(one(tmp_path, "c.png"), frames[0], **options)
    images = load(tmp_path / "single", "one", "train", 4)
    assert images.pixels[:, :, 0, 0].tolist() == [[255, 0, 0]] * 3


# --- sizes ------------------------------------------------------------------------------------


def test_size_is_height_then_width(tmp_path):
    write(one(tmp_path), LEFT_WHITE)
    pixels = pixels_of(tmp_path, (64, 32))
    assert pixels.shape == (3, 64, 32)
    assert (pixels[:, :, :12] == 255).all()
    assert (pixels[:, :, 20:] == 0).all()


def test_masks_follow_the_size(root):
    images = load(root, "nut", "test", (24, 40))
    assert images.masks.shape == (6, 24, 40)
    assert images.masks[2:, :, :20].all()
    assert not images.masks[2:, :, 20:].any()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_any_resolution_to_any_size(tmp_path_factory, height, width, down, across):
    folder = tmp_path_factory.mktemp("sizes")
    picture = noise(0, height, width)
    write(folder / "one/train/good/0.png", picture)
    pixels = load(folder, "one", "train", (down, across), cache=folder / "cache").pixels[0]
    assert pixels.shape == (3, down, across)
    wanted = Image.fromarray(picture).resize((across, down), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(wanted))


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.tile(np.array([[0, 255]], np.uint8), (64, 32))
    write(one(tmp_path), stripes)
    assert (pixels_of(tmp_path, 8).int() - 127).abs().max() < 12


def test_size_takes_lists_and_numpy_integers(root):
    assert load(root, "nut", "train", [6, 5]).pixels.shape == (3, 3, 6, 5)
    assert load(root, "nut", "train", np.int64(7)).pixels.shape == (3, 3, 7, 7)


@pytest.mark.parametrize("size", [0, -1, (0, 4), (4, -4), 2.5, "8", None, (4,), (4, 4, 4)])
def test_a_size_that_is_none(root, size):
    assert_error(lambda: load(root, "nut", "train", size), repr(size), "expected")


# --- masks ------------------------------------------------------------------------------------


def mask_of(root):
    """The mask of the first picture of kind `bent`, at the size of the picture."""
    return load(root, "nut", "test", (12, 10)).masks[2]


@pytest.mark.parametrize("name", ["000_mask.bmp", "000.png", "000_mask.TIF", "000.Jpg"])
def test_mask_names(root, name):
    (root / "nut/ground_truth/bent/000_mask.png").unlink()
    mask = np.zeros((12, 10), np.uint8)
    mask[:8] = 255
    write(root / "nut/ground_truth/bent" / name, mask)
    assert mask_of(root)[:8].all()
    assert not mask_of(root)[8:].any()


def test_mask_is_cut_at_one_half(root):
    mask = np.full((12, 10), 127, np.uint8)
    mask[0] = 128
    write(root / "nut/ground_truth/bent/000_mask.png", mask)
    assert mask_of(root)[0].all()
    assert not mask_of(root)[1:].any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_mask_modes(root, mode):
    mask = np.zeros((12, 10), np.uint8)
    mask[3] = 255
    write(root / "nut/ground_truth/bent/000_mask.png", mask, mode)
    assert mask_of(root)[3].all()
    assert mask_of(root).sum() == 10


def test_16_bit_mask(root):
    mask = np.full((12, 10), 32000, np.uint16)
    mask[3] = 65535
    write(root / "nut/ground_truth/bent/000_mask.png", mask)
    assert mask_of(root).sum() == 10


def test_missing_mask(root):
    path = root / "nut/ground_truth/bent/001_mask.png"
    path.unlink()
    assert_error(lambda: load(root, "nut", "test", 8), path, "missing", "test/bent/001.png")


def test_missing_mask_folder(root):
    shutil.rmtree(root / "nut/ground_truth/scratch")
    wanted = root / "nut/ground_truth/scratch/000_mask.png"
    assert_error(lambda: load(root, "nut", "test", 8), wanted, "missing")


def test_mask_of_another_size(root):
    path = write(root / "nut/ground_truth/bent/001_mask.png", np.zeros((10, 12), np.uint8))
    assert_error(lambda: load(root, "nut", "test", 8), path, "12x10", "expected 10x12")


def test_damaged_mask(root):
    path = root / "nut/ground_truth/bent/001_mask.png"
    path.write_bytes(b"nothing")
    assert_error(lambda: load(root, "nut", "test", 8), path)


# --- errors -----------------------------------------------------------------------------------


def test_root_that_is_missing_or_a_file(tmp_path):
    for root in (tmp_path / "nowhere", write(tmp_path / "file.png")):
        assert_error(lambda root=root: categories(root), root, "expected")
        assert_error(lambda root=root: load(root, "nut", "train"), root, "expected")


def test_root_without_categories(root):
    layout = "<category>/{train/good"
    assert_error(lambda: categories(root / "nut"), root / "nut", layout)
    assert_error(lambda: load(root / "nut", "bottle", "train"), root / "nut", layout)


@pytest.mark.parametrize("category", ["bolt", "", ".", "..", "nut/train", "NUT", "a\nb"])
def test_category_that_does_not_exist(root, category):
    write(root / "cable/train/good/0.png")
    assert_error(lambda: load(root, category, "train"), root, repr(category), "cable, nut")


def test_empty_or_missing_train_good(root):
    folder = root / "nut/train/good"
    for picture in folder.iterdir():
        picture.unlink()
    (folder / "Thumbs.db").touch()
    assert_error(lambda: load(root, "nut", "train"), folder, "no pictures", "expected <root>")
    shutil.rmtree(folder)
    assert_error(lambda: load(root, "nut", "train"), folder, "expected a folder of <root>")


def test_empty_or_missing_test(root):
    folder = root / "nut/test"
    shutil.rmtree(folder)
    assert_error(lambda: load(root, "nut", "test"), folder, "expected a folder of <root>")
    (folder / "good").mkdir(parents=True)
    assert_error(lambda: load(root, "nut", "test"), folder, "no pictures", "expected <root>")


@pytest.mark.parametrize("split", ["val", "", "Train", None])
def test_unknown_split(root, split):
    assert_error(lambda: load(root, "nut", split), root, repr(split), "'train' or 'test'")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_truncated_picture(root, suffix):
    path = write(root / f"nut/train/good/001a.{suffix}", noise(5, 64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_error(lambda: load(root, "nut", "train"), path, "expected a whole picture")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"P5 1 1 255 0"])
def test_unreadable_picture(root, content):
    path = root / "nut/train/good/001.png"
    path.write_bytes(content)
    assert_error(lambda: load(root, "nut", "train"), path, "expected a whole picture")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_cut_png_never_passes_for_another_picture(tmp_path_factory, draws):
    path = tmp_path_factory.mktemp("cut") / "one/train/good/0.png"
    whole = write(path, noise(3)).read_bytes()
    path.write_bytes(whole[: draws.draw(st.integers(0, len(whole) - 1))])
    try:
        images = load(path.parents[3], "one", "train", (12, 10), cache=path.parents[3] / "cache")
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert np.array_equal(images.pixels[0].numpy(), noise(3).transpose(2, 0, 1))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write(root / "nut/train/good/001.png", noise(0, 30, 30))
    assert_error(lambda: load(root, "nut", "train"), path, "bomb")


def test_a_reason_of_two_lines_becomes_one(root, monkeypatch):
    def broken(*_, **__):
        raise OSError("first\nsecond")

    monkeypatch.setattr(data.Image, "open", broken)
    path = root / "nut/train/good/000.png"
    assert_error(lambda: load(root, "nut", "train"), path, "first second")


def test_link_that_leads_nowhere(root):
    path = root / "nut/train/good/001a.png"
    try:
        path.symlink_to(root / "nowhere.png")
    except OSError:
        pytest.skip("no symbolic links on this file system")
    assert_error(lambda: load(root, "nut", "train"), path, "expected")


def test_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)


# --- cache ------------------------------------------------------------------------------------


def entries(folder):
    """The files of a cache folder."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def refuse(*_):
    """A decoder that must not be called."""
    raise AssertionError("decoded although the cache holds it")


def same(one, other):
    """Whether two sets of images agree in every field."""
    assert (one.masks is None) == (other.masks is None)
    tensors = zip((one.pixels, one.labels), (other.pixels, other.labels), strict=True)
    equal = all(torch.equal(left, right) for left, right in tensors)
    equal &= one.masks is None or torch.equal(one.masks, other.masks)
    return equal and one.kinds == other.kinds and one.names == other.names


@pytest.mark.parametrize("split", ["train", "test"])
def test_second_load_comes_from_the_cache(root, cache, monkeypatch, split):
    first = load(root, "nut", split, 8)
    assert len(entries(cache)) == 1
    monkeypatch.setattr(data, "_read", refuse)
    second = load(root, "nut", split, 8)
    assert same(first, second)
    assert second.pixels.dtype == torch.uint8
    assert second.labels.dtype == torch.int64
    assert isinstance(second.kinds, tuple)
    assert isinstance(second.names, tuple)
    assert fingerprint(first) == fingerprint(second)


def test_cache_folder_can_be_given(root, cache, tmp_path, monkeypatch):
    load(root, "nut", "train", 8, cache=str(tmp_path / "given"))
    assert entries(cache) == []
    monkeypatch.setattr(data, "_read", refuse)
    load(root, "nut", "train", 8, cache=tmp_path / "given")


def test_default_cache_folder(root, tmp_path, monkeypatch):
    monkeypatch.delenv("CPLIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(root, "nut", "train", 8)
    assert len(entries(tmp_path / "xdg" / "cplib")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    load(root, "nut", "train", 8)
    assert len(entries(tmp_path / ".cache" / "cplib")) == 1


def test_size_split_and_root_have_their_own_entries(root, cache, tmp_path):
    load(root, "nut", "train", 8)
    load(root, "nut", "train", (8, 9))
    load(root, "nut", "test", 8)
    shutil.copytree(root, tmp_path / "copy")
    load(tmp_path / "copy", "nut", "train", 8)
    assert len(entries(cache)) == 4
    load(root, "nut", "train", (8, 8))
    assert len(entries(cache)) == 4


def test_relative_and_absolute_root_share_an_entry(root, cache, monkeypatch):
    first = load(root, "nut", "train", 8)
    monkeypatch.chdir(root)
    assert same(load(".", "nut", "train", 8), first)
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("name", ["test/bent/000.png", "ground_truth/bent/000_mask.png"])
def test_a_changed_file_is_decoded_again(root, name):
    before = load(root, "nut", "test", (12, 10))
    write(root / "nut" / name, np.full((12, 10), 255, np.uint8))
    after = load(root, "nut", "test", (12, 10))
    assert not same(before, after)
    assert bool((after.pixels[2] == 255).all()) == name.startswith("test/")
    assert bool(after.masks[2].all()) == name.startswith("ground_truth/")


def test_a_file_of_equal_size_is_decoded_again(root):
    path = write(root / "nut/train/good/001.bmp", noise(1))
    load(root, "nut", "train", (12, 10))
    state = path.stat()
    write(path, noise(2))
    assert path.stat().st_size == state.st_size
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1000))
    pixels = load(root, "nut", "train", (12, 10)).pixels
    assert np.array_equal(pixels[1].numpy(), noise(2).transpose(2, 0, 1))


def test_added_renamed_and_removed_files(root):
    load(root, "nut", "train", 8)
    path = write(root / "nut/train/good/009.png", noise(9))
    assert load(root, "nut", "train", 8).names[-1] == "train/good/009.png"
    path = path.rename(path.with_name("008.png"))
    assert load(root, "nut", "train", 8).names[-1] == "train/good/008.png"
    path.unlink()
    assert len(load(root, "nut", "train", 8)) == 3


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flip", "zeros", "folder"])
def test_a_damaged_entry_is_ignored_and_rewritten(root, cache, monkeypatch, damage):
    first = load(root, "nut", "test", 8)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    contents = {
        "empty": b"",
        "text": b"no tensors here",
        "cut": whole[:-7],
        "flip": bytes(flipped),
        "zeros": bytes(len(whole)),
    }
    entry.unlink()
    if damage == "folder":
        entry.mkdir()
    else:
        entry.write_bytes(contents[damage])
    assert same(load(root, "nut", "test", 8), first)
    assert entries(cache) == [entry]
    if damage != "folder":
        monkeypatch.setattr(data, "_read", refuse)
        assert same(load(root, "nut", "test", 8), first)


def test_a_cache_that_cannot_be_written_is_skipped(root, tmp_path):
    blocked = write(tmp_path / "file.png") / "cache"
    first = load(root, "nut", "train", 8, cache=blocked)
    assert same(first, load(root, "nut", "train", 8, cache=blocked))
    assert not blocked.exists()


def test_a_full_disk_leaves_nothing_behind(root, cache, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "save_file", full)
    assert len(load(root, "nut", "train", 8)) == 3
    assert entries(cache) == []


def test_changing_tensors_leaves_the_cache_alone(root):
    first = fingerprint(load(root, "nut", "train", 8))
    load(root, "nut", "train", 8).pixels.zero_()
    assert fingerprint(load(root, "nut", "train", 8)) == first


def test_oldest_entries_are_dropped(root, cache, monkeypatch):
    other = write(cache / "weights.png")
    load(root, "nut", "train", 40)
    load(root, "nut", "train", 41)
    first, second = sorted(
        (path for path in entries(cache) if path != other), key=lambda path: path.stat().st_mtime_ns
    )
    os.utime(first, (1000, 1000))
    os.utime(second, (2000, 2000))
    load(root, "nut", "train", 40)  # a hit makes it the younger one
    monkeypatch.setattr(data, "CACHE_BYTES", int(first.stat().st_size * 2.5))
    load(root, "nut", "train", 42)
    assert first.exists()
    assert not second.exists()
    assert other.exists()
    monkeypatch.setattr(data, "CACHE_BYTES", 1)
    load(root, "nut", "train", 43)
    assert len(entries(cache)) == 2


def test_concurrent_loads_agree(root, cache):
    results = []

    def load_one():
        results.append(fingerprint(load(root, "nut", "test", 32)))

    threads = [threading.Thread(target=load_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(results)) == 1
    assert len(entries(cache)) == 1


def test_errors_are_not_cached(root, cache):
    path = root / "nut/train/good/001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    assert_error(lambda: load(root, "nut", "train", 8), path)
    assert entries(cache) == []
    path.write_bytes(whole)
    assert len(load(root, "nut", "train", 8)) == 3


def test_nothing_is_pickled():
    source = Path(data.__file__).read_text(encoding="utf-8")
    assert not re.search(r"pickle|torch\.(save|load)|LOAD_TRUNCATED", source)


# --- fingerprint ------------------------------------------------------------------------------


def sample(masks=True):
    """Images whose every byte is written here."""
    return Images(
        pixels=torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2),
        labels=torch.tensor([0, 1]),
        kinds=("good", "bent"),
        masks=torch.arange(8).reshape(2, 2, 2) > 5 if masks else None,
        names=("test/good/000.png", "test/bent/000.png"),
    )


def test_fingerprint_is_the_same_everywhere():
    assert fingerprint(sample()) == "35a624d8cbcbac07"
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(sample(masks=False)))


def test_fingerprint_ignores_where_the_folder_lies(root, tmp_path):
    shutil.copytree(root, tmp_path / "elsewhere")
    first = fingerprint(load(root, "nut", "test", 8))
    assert fingerprint(load(tmp_path / "elsewhere", "nut", "test", 8)) == first


def test_fingerprint_ignores_memory_order():
    images = sample()
    strided = images.pixels.contiguous(memory_format=torch.channels_last)
    assert fingerprint(dataclasses.replace(images, pixels=strided)) == fingerprint(images)


def test_fingerprint_sees_every_field():
    images = sample()
    changes = [
        {"pixels": images.pixels + 1},
        {"pixels": images.pixels.reshape(2, 3, 1, 4)},
        {"labels": torch.tensor([1, 1])},
        {"kinds": ("good", "cut")},
        {"masks": ~images.masks},
        {"masks": torch.zeros_like(images.masks)},
        {"masks": None},
        {"names": ("test/good/001.png", "test/bent/000.png")},
    ]
    prints = {fingerprint(dataclasses.replace(images, **change)) for change in changes}
    assert len(prints | {fingerprint(images)}) == len(changes) + 1


@given(st.integers(0, 23), st.integers(1, 255))
def test_fingerprint_sees_every_pixel(position, change):
    images = sample()
    pixels = images.pixels.clone()
    pixels.view(-1)[position] += change
    assert fingerprint(dataclasses.replace(images, pixels=pixels)) != fingerprint(images)


# --- the real pictures ------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="no MVTec AD pictures in ../shared/mvtec256")
@pytest.mark.parametrize("category", COUNTS)
def test_official_counts(category):
    train, good, defective = COUNTS[category]
    assert len(load(REAL, category, "train", 32)) == train
    images = load(REAL, category, "test", 256)
    assert (images.labels == 0).sum() == good == images.kinds.count("good")
    assert (images.labels == 1).sum() == defective
    assert images.masks.flatten(1).any(dim=1).tolist() == images.labels.bool().tolist()


@pytest.mark.skipif(not REAL.is_dir(), reason="no MVTec AD pictures in ../shared/mvtec256")
def test_second_load_is_quick(monkeypatch):
    first = load(REAL, "screw", "train")
    monkeypatch.setattr(data, "_read", refuse)
    start = time.perf_counter()
    second = load(REAL, "screw", "train")
    assert time.perf_counter() - start < 1
    assert same(first, second)
    assert torch.equal(second.pixels[:, 0], second.pixels[:, 2])  # grey pictures stay grey
