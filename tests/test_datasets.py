"""Data sets on disk: small made folders in each layout, odd files, masks, the cache, fingerprints.

What is done to break the readers on purpose is in test_hostile.py.
"""

import csv
import dataclasses
import hashlib
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cplib import datasets
from cplib.datasets import (
    DataError,
    Images,
    atomic,
    categories,
    fingerprint,
    identify,
    load,
    pixels_digest,
)

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "mvtec256"
COUNTS = {"bottle": (209, 20, 63), "screw": (320, 41, 119), "transistor": (213, 60, 40)}
LEFT_WHITE = np.repeat(np.array([[255, 255, 0, 0]], np.uint8), 4, axis=1).repeat(8, axis=0)
LEFT = np.zeros((12, 10), np.uint8)  # a mask
LEFT[:, :5] = 255


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CPLIB_CACHE", str(folder))
    return folder


def noise(seed, height=12, width=10):
    """An RGB array of random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path, pixels=None, mode=None, **options):
    """Write an array or an image of PIL's; without one, noise that depends on the path."""
    pixels = noise(list(str(path.parts[-3:]).encode())) if pixels is None else pixels
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def make_category(folder, kinds, normal="good", suffix="png", mask="{}_mask.png"):
    """Two normal images to train on, two and two of each kind of anomaly to test on."""
    for i in ("000", "001"):
        for split in ("train", "test"):
            write(folder / split / normal / f"{i}.{suffix}")
        for kind in kinds:
            write(folder / "test" / kind / f"{i}.{suffix}")
            write(folder / "ground_truth" / kind / mask.format(i), LEFT)


@pytest.fixture
def root(tmp_path):
    make_category(tmp_path / "set" / "nut", ("scratch", "bent"))
    return tmp_path / "set"


def one(tmp_path, name="000.png"):
    """The path of the only training image of category `one`."""
    return tmp_path / "single" / "one" / "train" / "good" / name


def pixels_of(tmp_path, size):
    """The pixels of the only training image of category `one`, (3, H, W)."""
    (pixels,) = load(tmp_path / "single", "one", "train", size).pixels
    return pixels


def assert_error(call, *parts):
    """The call raises a DataError of one line that holds every one of `parts`."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert not [part for part in parts if str(part) not in message], message


# What is loaded


def test_the_training_images_are_the_normal_ones_by_name(root):
    for name in ("b.PNG", "B.png"):
        write(root / "nut/train/good" / name)
    images = load(root, "nut", "train", (12, 10))
    names = ("000.png", "001.png", "B.png", "b.PNG")
    assert images.names == tuple(f"train/good/{name}" for name in names)
    assert (images.pixels.dtype, images.labels.dtype) == (torch.uint8, torch.int64)
    assert images.labels.tolist() == [0] * 4
    assert images.kinds == ("good",) * 4
    assert images.masks is None
    for pixels, name in zip(images.pixels, images.names, strict=True):
        with Image.open(root / "nut" / name) as file:
            assert np.array_equal(pixels.permute(1, 2, 0), file)
    assert load(str(root), "nut", "train").pixels.shape == (4, 3, 256, 256)


def test_the_test_images_are_normal_ones_then_each_kind_with_its_masks(root):
    images = load(root, "nut", "test", (24, 40))
    assert images.kinds == ("good", "good", "bent", "bent", "scratch", "scratch")
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert images.names[1:3] == ("test/good/001.png", "test/bent/000.png")
    assert images.masks.dtype == torch.bool
    assert not images.masks[:2].any()
    assert images.masks[2:, :, :20].all()
    assert not images.masks[2:, :, 20:].any()


def test_a_test_set_may_lack_normal_images_or_anomalies_or_masks(root):
    shutil.move(root / "nut/test/good", root / "kept")
    assert load(root, "nut", "test", 8).labels.tolist() == [1, 1, 1, 1]
    shutil.rmtree(root / "nut/test")
    shutil.move(root / "kept", root / "nut/test/good")
    images = load(root, "nut", "test", 8)
    assert images.labels.tolist() == [0, 0]
    assert not images.masks.any()
    shutil.rmtree(root / "nut/ground_truth")
    assert load(root, "nut", "test", 8).masks is None


def test_hidden_files_and_files_of_other_kinds_are_left_out(root):
    before = fingerprint(load(root, "nut", "test", 8))
    for folder in ("train/good", "test", "test/good", "test/bent", "ground_truth/bent"):
        for name in ("Thumbs.db", ".DS_Store", "._000.png", "readme.txt"):
            (root / "nut" / folder / name).write_bytes(b"no image")
    for folder in ("nut/test/.checkpoints", "nut/test/good/folder.png", "notes"):
        (root / folder).mkdir()
    write(root / ".hidden/train/good/0.png")
    assert fingerprint(load(root, "nut", "test", 8)) == before
    assert len(load(root, "nut", "train", 8)) == 2
    assert categories(root) == ["nut"]


# Formats and modes


@pytest.mark.parametrize("suffix", ["png", "Bmp", "TIFF", "tif", "webp"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    write(one(tmp_path, f"a.{suffix}"), noise(1), **options)
    assert np.array_equal(pixels_of(tmp_path, (12, 10)).permute(1, 2, 0), noise(1))


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_jpegs_keep_their_colour(tmp_path, mode):
    write(one(tmp_path, "a.JpEg"), np.full((12, 10, 3), (200, 100, 50), np.uint8), mode)
    pixels = pixels_of(tmp_path, (12, 10)).int()
    assert (pixels - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    write(one(tmp_path, "a.tif" if mode == "CMYK" else "a.png"), LEFT_WHITE, mode)
    expected = torch.from_numpy(LEFT_WHITE).int().expand(3, 8, 16)
    assert (pixels_of(tmp_path, (8, 16)).int() - expected).abs().max() <= 1


@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped_not_blended(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.putpixel((1, 0), 1)
    write(one(tmp_path), image, transparency=bytes([0, 128]))
    assert pixels_of(tmp_path, (1, 2))[:, 0].T.tolist() == [[10, 20, 30], [200, 150, 100]]
    write(one(tmp_path), np.full((2, 2, 4), (10, 20, 30, 0), np.uint8))
    assert pixels_of(tmp_path, 2)[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("suffix", "order"), [("png", "<"), ("tif", "<"), ("tif", ">")])
def test_16_bits_are_scaled_to_the_nearest_of_8_not_clipped(tmp_path, suffix, order):
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], f"{order}u2")
    mode = "I;16B" if order == ">" else "I;16"
    write(one(tmp_path, f"a.{suffix}"), Image.frombytes(mode, (8, 1), levels.tobytes()))
    assert pixels_of(tmp_path, (1, 8))[0, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_32_bits_are_refused(tmp_path):
    path = write(one(tmp_path, "a.tif"), np.full((4, 4), 1000, np.float32))
    assert_error(lambda: pixels_of(tmp_path, 4), path, "32 bits", "expected")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_turned_as_their_exif_data_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(one(tmp_path, f"a.{suffix}"), LEFT_WHITE, "RGB", exif=exif)  # 16 wide, 8 high
    turned = orientation >= 5
    pixels = pixels_of(tmp_path, (16, 8) if turned else (8, 16))[0].float()
    halves = pixels.chunk(2, dim=0 if turned else 1)
    first, last = halves if orientation in (1, 6) else halves[::-1]
    assert first.mean() > 240
    assert last.mean() < 15


@settings(max_examples=20, deadline=None)
@given(*[st.integers(1, 40)] * 4)
def test_an_image_of_any_size_is_resized_to_any_other(tmp_path_factory, h, w, down, across):
    folder, image = tmp_path_factory.mktemp("sizes"), Image.fromarray(noise(0, h, w))
    write(folder / "one/train/good/0.png", image)
    (pixels,) = load(folder, "one", "train", (down, across)).pixels
    wanted = image.resize((across, down), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels.permute(1, 2, 0), wanted)


# Masks


def mask_of(root):
    """The mask of the first image of kind `bent`, at the image's size."""
    return load(root, "nut", "test", (12, 10)).masks[2]


@pytest.mark.parametrize("name", ["000_mask.bmp", "000.png", "000_mask.TIF", "000.Jpg"])
def test_a_mask_has_the_images_name_in_any_format(root, name):
    (root / "nut/ground_truth/bent/000_mask.png").unlink()
    write(root / "nut/ground_truth/bent" / name, 255 - LEFT)
    assert torch.equal(mask_of(root), torch.from_numpy(LEFT == 0))


def palette(colours):
    """The left half as index 1, the rest as index 0."""
    image = Image.fromarray(LEFT // 255).convert("P")
    image.putpalette(colours + [0] * (768 - len(colours)))
    return image


def of_jpeg(mask):
    """A mask that was saved as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "JPEG", quality=80)
    return Image.open(buffer).copy()


HALVES = np.where(np.arange(120).reshape(12, 10) % 20 < 10, 1, 2).astype(np.uint8)  # two classes
MASKS = {
    "one bit": Image.fromarray(LEFT).convert("1"),
    "255": LEFT,
    "1": LEFT // 255,
    "16 bits": LEFT.astype(np.uint16) * 257,
    "16 bits, 1": (LEFT // 255).astype(np.uint16),
    "classes": LEFT // 255 * HALVES,
    "classes far apart": LEFT // 255 * np.where(HALVES == 1, 20, 255).astype(np.uint8),
    "grey and opaque": Image.fromarray(LEFT).convert("LA"),
    "colour": np.stack([LEFT // 2, 0 * LEFT, 0 * LEFT], 2),
    "colour and opaque": Image.fromarray(LEFT).convert("RGBA"),
    "a palette of labels": palette([0, 0, 0, 128, 0, 0]),
    "a palette turned round": palette([255, 255, 255, 0, 0, 0]),
    "a palette without black": palette([9, 9, 9, 200, 0, 0]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_marks_all_that_is_not_background(root, kind):
    write(root / "nut/ground_truth/bent/000_mask.png", MASKS[kind])
    write(root / "nut/ground_truth/bent/001_mask.png", LEFT)  # the folder mixes them
    marked = LEFT == 0 if "round" in kind else LEFT > 0
    masks = load(root, "nut", "test", (12, 10)).masks
    assert torch.equal(masks[2], torch.from_numpy(marked))
    assert masks.view(torch.uint8).unique().tolist() == [0, 1]  # the fingerprint is of the bytes
    assert torch.equal(masks[3], torch.from_numpy(LEFT > 0))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_mask_of_shades_is_cut_at_half_of_the_largest(root, suffix):
    wide = np.zeros((96, 80), np.uint8)
    wide[20:50, 10:30] = 255
    noisy = of_jpeg(wide)
    assert 0 < (np.asarray(noisy)[wide == 0] > 0).mean() < 1
    truth = root / "nut/ground_truth/bent"
    (truth / "000_mask.png").unlink()
    for i in (0, 1):  # all images are of their masks' sizes
        write(root / f"nut/test/bent/00{i}.png", noise(i, 96, 80))
    write(truth / f"000_mask.{suffix}", noisy)
    small = Image.fromarray(wide).resize((30, 37), Image.Resampling.BILINEAR)
    write(truth / "001_mask.png", small.resize((80, 96), Image.Resampling.BILINEAR))
    noisy, resized = load(root, "nut", "test", (96, 80)).masks[2:4].numpy()
    assert (noisy == (wide > 0)).all()
    assert (resized != (wide > 0)).sum() < 60  # of a border of 100 pixels


@pytest.mark.parametrize(
    ("value", "told"), [(0, "marks nothing; the image counts in no"), (255, "marks 100% of")]
)
def test_a_mask_that_marks_nothing_or_nearly_all_is_named(root, value, told):
    path = write(root / "nut/ground_truth/bent/000_mask.png", np.full_like(LEFT, value))
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=f"^{path}: {told}"):
            assert bool(mask_of(root).all()) == bool(value)


def test_a_mask_that_is_missing_damaged_or_of_another_size_is_named(root):
    path = root / "nut/ground_truth/bent/001_mask.png"
    write(path, LEFT.T)
    assert_error(lambda: load(root, "nut", "test", 8), path, "12x10", "expected 10x12")
    path.write_bytes(b"nothing")
    assert_error(lambda: load(root, "nut", "test", 8), path, "expected a whole mask")
    path.unlink()
    assert_error(lambda: load(root, "nut", "test", 8), path, "missing", "test/bent/001.png")
    shutil.rmtree(path.parent)
    assert_error(lambda: load(root, "nut", "test", 8), path.with_name("000_mask.png"), "missing")


def test_a_root_that_holds_no_data_set_is_refused(root, tmp_path):
    for folder in (tmp_path / "nowhere", write(tmp_path / "file.png"), root / "nut"):
        assert_error(lambda folder=folder: categories(folder), folder, "expected", "<category>/")
        assert_error(lambda folder=folder: load(folder, "nut", "train"), folder, "<category>/")
        assert_error(lambda folder=folder: identify(folder), folder, "<category>/")


@pytest.mark.parametrize("category", ["bolt", "", "..", "nut/train", "NUT", "a\nb"])
def test_a_category_that_is_not_there_is_refused(root, category):
    write(root / "cable/train/good/0.png")
    assert_error(lambda: load(root, category, "train"), root, repr(category), "cable, nut")


@pytest.mark.parametrize(("split", "normal"), [("train", "train/good"), ("test", "test")])
def test_an_empty_or_missing_folder_is_named(root, split, normal):
    folder = root / "nut" / normal
    shutil.rmtree(folder)
    assert_error(lambda: load(root, "nut", split), folder, "expected a folder of <root>")
    folder.mkdir()
    (folder / "Thumbs.db").touch()
    assert_error(lambda: load(root, "nut", split), folder, "no images", "expected <root>")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_file_that_is_cut_or_no_image_is_named(root, cache, suffix):
    path = write(root / f"nut/train/good/001a.{suffix}", noise(5, 64, 64))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", b"P5 1 1 255 0"):
        path.write_bytes(content)
        assert_error(lambda: load(root, "nut", "train"), path, "expected a whole image")
    assert not cache.exists()
    path.write_bytes(whole)
    assert len(load(root, "nut", "train", 8)) == 3


def test_a_link_that_leads_nowhere_is_named(root):
    (root / "nut/train/good/001a.png").symlink_to(root / "nowhere.png")
    assert_error(lambda: load(root, "nut", "train"), "001a.png", "expected")


# VisA: folders of normal and anomalous images, the splits in a table, masks of numbers


def write_table(root, rows):
    (root / datasets.VISA).parent.mkdir(parents=True, exist_ok=True)
    with (root / datasets.VISA).open("w", newline="") as file:
        csv.writer(file).writerows([datasets.VISA_COLUMNS, *rows])


@pytest.fixture
def visa(tmp_path):
    """Two objects: three normal images to train on, two and two anomalous ones to test on."""
    root, rows = tmp_path / "VisA", []
    for name in ("candle", "pcb1"):
        for i in (4, 0, 3, 1, 2):  # the table is in no order
            path = write(root / f"{name}/Data/Images/Normal/{i:04d}.JPG").relative_to(root)
            rows.append([name, "train" if i < 3 else "test", "normal", path, ""])
        for i in (1, 0):
            path = write(root / f"{name}/Data/Images/Anomaly/{i:03d}.JPG").relative_to(root)
            mask = f"{name}/Data/Masks/Anomaly/{i:03d}.png"
            write(root / mask, LEFT // 255 * (1 + 2 * i))
            rows.append([name, "test", "anomaly", path, mask])
    write_table(root, rows)
    return root


def test_visas_splits_are_those_of_its_table_and_its_masks_whatever_is_not_zero(visa):
    assert categories(visa) == ["candle", "pcb1"]
    train = load(visa, "candle", "train", (12, 10))
    assert train.names == tuple(f"Data/Images/Normal/{i:04d}.JPG" for i in range(3))
    assert (train.kinds, train.masks) == (("good",) * 3, None)
    test = load(visa, "candle", "test", (12, 10))
    assert test.kinds == ("good", "good", "anomaly", "anomaly")
    assert test.names[1:3] == ("Data/Images/Normal/0004.JPG", "Data/Images/Anomaly/000.JPG")
    assert not test.masks[:2].any()
    assert (test.masks[2:] == torch.from_numpy(LEFT > 0)).all()


def test_visa_relabelled_or_saved_by_excel_is_read_anew(visa):
    assert load(visa, "candle", "test", 8).kinds[-1] == "anomaly"
    text = (visa / datasets.VISA).read_text().replace("anomaly", "melted")
    (visa / datasets.VISA).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load(visa, "candle", "test", 8).kinds[-1] == "melted"


def test_what_visa_lacks_is_named(visa):
    assert_error(lambda: load(visa, "wick", "train"), "'wick'; expected one of candle, pcb1")
    (visa / "candle/Data/Images/Normal/0001.JPG").unlink()
    assert_error(lambda: load(visa, "candle", "train"), "0001.JPG")
    text = (visa / datasets.VISA).read_text().replace("candle/Data/Masks/Anomaly/001.png", "")
    (visa / datasets.VISA).write_text(text)
    assert_error(lambda: load(visa, "candle", "test"), "expected the mask of", "001.JPG")
    (visa / datasets.VISA).write_text(text.replace("candle/Data/Masks/Anomaly/000.png", ""))
    assert load(visa, "candle", "test", 8).masks is None


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (["candle/../../secret.png", ""], "below 'candle'"),
        (["/secret.png", ""], "below 'candle'"),
        (["pcb1/Data/Images/Normal/0000.JPG", ""], "below 'candle'"),
        (["candle/Data/Images/Normal/0000.JPG", "../mask.png"], "../mask.png"),
        (["", ""], "''"),
        ([], "too short"),
        (["candle/a\nb.JPG", ""], "on one line"),
    ],
)
def test_a_row_that_leaves_its_object_is_refused(visa, image, named):
    write_table(visa, [["candle", "train", "normal", *image]])
    assert_error(lambda: load(visa, "candle", "train"), named, "expected")


@pytest.mark.parametrize("content", [b"object,split\n1,2\n", b"\xff\xfe\x00", bytes(99)])
def test_a_table_that_is_none_is_refused(visa, content):
    (visa / datasets.VISA).write_bytes(content)
    assert_error(lambda: categories(visa), "1cls.csv", "object,split,label,image,mask")


# BTAD: "ok" and "ko", a mask has its image's name


@pytest.fixture
def btad(tmp_path):
    make_category(tmp_path / "BTAD" / "01", ("ko",), "ok", "bmp", "{}.png")
    return tmp_path / "BTAD"


def test_btads_ok_is_normal_and_ko_anomalous(btad):
    train = load(btad, "01", "train", 8)
    assert (train.names, train.kinds) == (("train/ok/000.bmp", "train/ok/001.bmp"), ("good",) * 2)
    test = load(btad, "01", "test", (12, 10))
    assert test.kinds == ("good", "good", "ko", "ko")
    assert test.names[1:3] == ("test/ok/001.bmp", "test/ko/000.bmp")
    assert not test.masks[:2].any()
    assert (test.masks[2:] == torch.from_numpy(LEFT > 0)).all()


# Which data set a folder holds


def test_each_data_set_is_known_by_its_folder(root, visa, btad, demo_root):
    folders = {"own": root, "visa": visa, "btad": btad, "demo": demo_root}
    assert [identify(str(folder)) for folder in folders.values()] == list(folders)


def test_mvtec_ad_is_known_by_its_numbers_of_images_and_not_by_names_alone(tmp_path):
    official = dict(zip(datasets.MVTEC.categories, datasets.MVTEC.train, strict=True))
    for name in ("toothbrush", "wood"):
        (tmp_path / name / "train/good").mkdir(parents=True)
        for i in range(official[name]):
            (tmp_path / name / f"train/good/{i:03d}.png").touch()
    assert identify(tmp_path) == "mvtec"
    (tmp_path / "wood/train/good/000.png").unlink()
    assert identify(tmp_path) == "own"
    (tmp_path / "wood/train/good").rename(tmp_path / "wood/train/ok")
    assert identify(tmp_path) == "own"


# Cache


def entries(folder):
    return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_loaded_comes_from_the_cache_unchanged(root, cache, monkeypatch, split):
    first, kept = load(root, "nut", split, 8), load(root, "nut", split, 8)
    assert len(entries(cache)) == 1
    assert load(root, "nut", split, (8, 9)).pixels.shape[2:] == (8, 9)
    monkeypatch.setattr(datasets, "_read", None)  # nothing more can be decoded
    kept.pixels.zero_()
    monkeypatch.chdir(root)
    again = load(".", "nut", split, (8, 8))
    assert fingerprint(again) == fingerprint(first) != fingerprint(kept)
    assert (type(again.kinds), type(again.names)) == (tuple, tuple)


def test_the_cache_is_where_it_is_said_to_be(root, cache, tmp_path, monkeypatch):
    load(root, "nut", "train", 8)
    assert len(entries(cache)) == 1
    monkeypatch.delenv("CPLIB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(root, "nut", "train", 8)
    monkeypatch.delenv("XDG_CACHE_HOME")
    load(root, "nut", "train", 8)
    for folder in ("xdg/cplib", ".cache/cplib"):
        assert len(entries(tmp_path / folder)) == 1


def test_a_changed_mask_is_decoded_again(root):
    load(root, "nut", "test", (12, 10))
    write(root / "nut/ground_truth/bent/000_mask.png", 255 - LEFT)
    assert torch.equal(mask_of(root), torch.from_numpy(LEFT == 0))


def test_a_file_of_another_time_or_name_is_decoded_again(root):
    path = write(root / "nut/train/good/002.bmp", noise(1))
    assert load(root, "nut", "train", (12, 10)).names[-1] == "train/good/002.bmp"
    state = path.stat()
    write(path, noise(2))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1000))
    pixels = load(root, "nut", "train", (12, 10)).pixels
    assert np.array_equal(pixels[2].permute(1, 2, 0), noise(2))
    path.rename(path.with_name("003.bmp"))
    assert load(root, "nut", "train", (12, 10)).names[-1] == "train/good/003.bmp"


@pytest.mark.parametrize("damage", ["text", "cut", "flip"])
def test_a_damaged_entry_is_decoded_and_written_again(root, cache, monkeypatch, damage):
    first = fingerprint(load(root, "nut", "test", 8))
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    entry.write_bytes({"text": b"no tensors here", "cut": whole[:-7], "flip": flipped}[damage])
    assert fingerprint(load(root, "nut", "test", 8)) == first
    monkeypatch.setattr(datasets, "_read", None)
    assert fingerprint(load(root, "nut", "test", 8)) == first


def test_a_cache_that_cannot_be_written_is_done_without(root, cache, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("CPLIB_CACHE", str(write(tmp_path / "file.png") / "cache"))
        first = fingerprint(load(root, "nut", "train", 8))

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "save_file", full)
    assert fingerprint(load(root, "nut", "train", 8)) == first
    assert entries(cache) == []


def test_loads_at_the_same_time_agree(root, cache):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda size: load(root, "nut", "test", size), [32] * 8))
    assert len({fingerprint(images) for images in found}) == len(entries(cache)) == 1


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_or_folder_appears_whole_and_a_file_replaces_another(tmp_path, folder):
    path = tmp_path / "new" / "it"
    for text in ("one",) if folder else ("one", "two"):
        before = path.exists()
        with atomic(path, folder=folder) as part:
            (part / "file" if folder else part).write_text(text)
            assert path.exists() == before
        assert (path / "file" if folder else path).read_text() == text
        assert entries(path.parent) == [path]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_half_way_leaves_what_was_there(tmp_path, error, folder):
    path = write(tmp_path / "old" / "mine.png").parent if folder else write(tmp_path / "old.png")
    named = f"cannot write {path}: no space" if isinstance(error, OSError) else "stop"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(type(error), match=named), atomic(path, folder=folder) as part:
        (part / "half" if folder else part).write_text("half")
        raise error
    assert sorted(tmp_path.rglob("*")) == before


SAMPLE = Images(
    pixels=torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2),
    labels=torch.tensor([0, 1]),
    kinds=("good", "bent"),
    masks=torch.arange(8).reshape(2, 2, 2) > 5,
    names=("test/good/000.png", "test/bent/000.png"),
)


def test_a_fingerprint_is_the_same_on_every_machine_and_in_every_folder(root, tmp_path):
    strided = SAMPLE.pixels.contiguous(memory_format=torch.channels_last)
    assert fingerprint(SAMPLE) == "35a624d8cbcbac07"
    assert fingerprint(dataclasses.replace(SAMPLE, pixels=strided)) == "35a624d8cbcbac07"
    assert pixels_digest(strided) == hashlib.sha256(bytes(range(24))).hexdigest()
    shutil.copytree(root, tmp_path / "elsewhere")
    found = [fingerprint(load(at, "nut", "test", 8)) for at in (root, tmp_path / "elsewhere")]
    assert found[0] == found[1]


def test_a_fingerprint_sees_every_field():
    changes = [
        {"pixels": SAMPLE.pixels.reshape(2, 3, 1, 4)},
        {"labels": torch.tensor([1, 1])},
        {"kinds": ("good", "cut")},
        {"masks": ~SAMPLE.masks},
        {"masks": None},
        {"names": ("test/good/001.png", "test/bent/000.png")},
    ]
    for i in range(24):
        pixels = SAMPLE.pixels.clone()
        pixels.view(-1)[i] += 1
        changes.append({"pixels": pixels})
    prints = {fingerprint(dataclasses.replace(SAMPLE, **change)) for change in changes}
    assert len(prints | {fingerprint(SAMPLE)}) == len(changes) + 1


# The real images


@pytest.mark.skipif(not REAL.is_dir(), reason="no MVTec AD images in ../shared/mvtec256")
@pytest.mark.parametrize("category", COUNTS)
def test_mvtec_ad_has_its_official_numbers_of_images(category):
    train, normal, anomalous = COUNTS[category]
    assert identify(REAL) == "mvtec"
    assert len(datasets.files(REAL, category, "train")[0]) == train
    images = load(REAL, category, "test", 256)
    assert (images.labels == 0).sum() == normal == images.kinds.count("good")
    assert (images.labels == 1).sum() == anomalous
    assert images.masks.flatten(1).any(dim=1).tolist() == images.labels.bool().tolist()
