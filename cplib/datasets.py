"""A data set's folder as tensors: MVTec AD, BTAD, VisA, or any folder in MVTec AD's layout."""

import contextlib
import csv
import functools
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cplib.settings import setting

LAYOUT = "<root>/<category>/{train/good, test/good, test/<defect>, ground_truth/<defect>}/*.png"
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # of a data set's images, and their names' ends:
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# A folder of own images may hold all formats of PIL but these. EPS is a program, which Ghostscript
# would run. PIL knows only the names of the others.
NOT_IMAGES = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
NORMAL = ("good", "ok")  # the folder of normal images: MVTec AD's name, and BTAD's
VISA = "split_csv/1cls.csv"  # the table of VisA's one-class protocol: no other file has its splits
VISA_COLUMNS = ("object", "split", "label", "image", "mask")
MOST_CLASSES = 40  # a mask with more values than this has shades, not classes
MOST_MARKED = 0.9  # share of an image; a mask that marks more may be black on white
CACHE_VERSION = 2  # part of every entry's name: raise it when decoding changes


@contextlib.contextmanager
def atomic(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Give a temporary file or folder to write to, and rename it to ``path`` at the end.

    If anything fails, nothing appears at ``path``. Raises OSError, one line, if writing fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        if folder:
            part.mkdir()
        yield part
        part.rename(path) if folder else part.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True) if folder else part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is known about a data set."""

    textures: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()  # objects that always lie the same way: see A.5
    train: tuple[int, ...] = ()  # official numbers of training images, in the categories' order
    normal: tuple[int, ...] = ()  # of normal test images
    anomalous: tuple[int, ...] = ()  # of anomalous test images
    published: bool = False  # whether the paper has results on it

    @property
    def categories(self) -> tuple[str, ...]:
        """Textures, then objects, in the paper's order."""
        return self.textures + self.objects


ALIGNED = ("bottle", "cable", "capsule", "metal_nut", "pill", "toothbrush", "transistor", "zipper")
MVTEC = DataSet(
    textures=("carpet", "grid", "leather", "tile", "wood"),
    objects=tuple(sorted((*ALIGNED, "hazelnut", "screw"))),
    aligned=ALIGNED,
    train=(280, 264, 245, 230, 247, 209, 224, 219, 391, 220, 267, 320, 60, 213, 240),
    normal=(28, 21, 32, 33, 19, 20, 58, 23, 40, 22, 26, 41, 12, 60, 32),
    anomalous=(89, 57, 92, 84, 60, 63, 92, 109, 70, 93, 141, 119, 30, 40, 119),
    published=True,
)
DEMO = DataSet(textures=("brick", "fabric"), objects=("sieve",), aligned=("sieve",))
# "own" is any other folder in MVTec AD's layout.
DATASETS = {"mvtec": MVTEC, "demo": DEMO} | dict.fromkeys(("visa", "btad", "own"), DataSet())


class DataError(ValueError):
    """A data set that cannot be used; the message is one line that names the file or folder."""


class Item(NamedTuple):
    """The files of one image."""

    image: Path
    kind: str  # "good" or the kind of anomaly
    mask: Path | None


def categories(root: str | Path) -> list[str]:
    """The sorted names of the categories in ``root``. Raises DataError if there are none."""
    root = Path(root)
    if (root / VISA).is_file():
        found = sorted({row["object"] for row in _visa(root)})
    else:
        found = [path.name for path in _folders(root) if _normal(path)]
    if not found:
        raise DataError(f"{root}: no category in this folder; expected {LAYOUT}")
    return found


def identify(root: str | Path) -> str:
    """Which data set a folder holds: a name of ``DATASETS``.

    MVTec AD is recognised by the names of its categories and their numbers of training images.
    A folder of own images that is called "bottle" is "own": the paper's numbers are not about it.
    """
    root = Path(root)
    if (root / VISA).is_file():
        return "visa"
    if (root / "demo.json").is_file():
        return "demo"
    found = {name: root / name / "train" for name in categories(root)}
    official = dict(zip(MVTEC.categories, MVTEC.train, strict=True))
    if set(found) <= set(official):
        numbers = {k: len(_images_in(v / _normal(v.parent))) for k, v in found.items()}
        return "mvtec" if numbers.items() <= official.items() else "own"
    return "btad" if all((folder / "ok").is_dir() for folder in found.values()) else "own"


def files(root: Path, category: str, split: str) -> tuple[list[Item], bool]:
    """The images of a split, "train" or "test", and whether they have masks.

    Normal images come first. Raises DataError for a category that is not there.
    """
    visa = (root / VISA).is_file()
    if category not in (categories(root) if visa else [path.name for path in _folders(root)]):
        known = ", ".join(categories(root))
        raise DataError(f"{root}: no category {category!r}; expected one of {known}")
    return (_visa_files if visa else _folder_files)(root, category, split)


@contextlib.contextmanager
def as_data_error(path: Path, expected: str) -> Iterator[None]:
    """Turn every exception into a DataError of one line that names ``path``."""
    try:
        yield
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {' '.join(reason.split())}; expected {expected}") from None


def check_names(paths: Iterable[Path]) -> None:
    """Raise DataError for a name that cannot stand in a CSV file or in a message of one line."""
    for path in paths:
        if "\n" in path.name or path.name.encode(errors="ignore").decode() != path.name:
            raise DataError(f"{str(path)!r}: expected a name in UTF-8, on one line")


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without hidden files."""
    with as_data_error(folder, f"a folder of {LAYOUT}"):
        found = sorted(folder.iterdir(), key=lambda path: path.name)
    check_names(found)
    return [path for path in found if not path.name.startswith(".")]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _images_in(folder: Path) -> list[Path]:
    """The images in a folder, by their names. A link that leads nowhere is one, to be an error."""
    found = [path for path in _entries(folder) if not path.is_dir()]
    return [path for path in found if path.suffix.lower() in SUFFIXES]


def _normal(folder: Path) -> str | None:
    """How a category calls its folder of normal images; None if the folder is no category."""
    return next((name for name in NORMAL if (folder / "train" / name).is_dir()), None)


def _folder_files(root: Path, category: str, split: str) -> tuple[list[Item], bool]:
    """``files`` of a data set in MVTec AD's layout."""
    folder = root / category
    normal = _normal(folder) or NORMAL[0]
    masked = split == "test" and (folder / "ground_truth").is_dir()
    top = folder / split
    kinds = [top / normal] if split == "train" else _folders(top)
    kinds.sort(key=lambda path: (path.name != normal, path.name))
    items = []
    for kind in kinds:
        if kind.name == normal:
            items += [Item(image, "good", None) for image in _images_in(kind)]
        else:
            items += _anomalous_items(folder, kind, masked)
    if not items:
        empty = kinds[0] if split == "train" else top
        raise DataError(f"{empty}: no images in this folder; expected {LAYOUT}")
    return items, masked


def _anomalous_items(folder: Path, kind: Path, masked: bool) -> Iterator[Item]:
    """The images of one kind of anomaly, each with its mask: 000_mask.png or 000.png."""
    truth = folder / "ground_truth" / kind.name
    masks = {path.stem: path for path in _images_in(truth)} if masked and truth.is_dir() else {}
    for image in _images_in(kind):
        name = f"{image.stem}_mask"
        mask = masks.get(name) or masks.get(image.stem)
        if masked and mask is None:
            raise DataError(f"{truth / name}.png: missing; expected the mask of {image}")
        yield Item(image, kind.name, mask)


def _visa(root: Path) -> list[dict[str, str]]:
    """The rows of VisA's table."""
    with (
        as_data_error(root / VISA, f"the columns {','.join(VISA_COLUMNS)}"),
        (root / VISA).open(newline="", encoding="utf-8-sig") as file,
    ):
        rows = [{name: row[name] for name in VISA_COLUMNS} for row in csv.DictReader(file)]
        if not rows or any(None in row.values() for row in rows):
            raise ValueError("a row is missing or too short")
    return rows


def _visa_files(root: Path, category: str, split: str) -> tuple[list[Item], bool]:
    """``files`` of VisA."""
    rows = [row for row in _visa(root) if (row["object"], row["split"]) == (category, split)]
    items = [_visa_item(root, row) for row in rows]
    items = [item for item in items if split == "test" or item.kind == "good"]
    if not items:
        raise DataError(f"{root / VISA}: no images of {split}; expected some of {category!r}")
    check_names(item.image for item in items)
    masked = any(item.mask for item in items)
    for item in items:
        if masked and item.kind != "good" and item.mask is None:
            raise DataError(f"{root / VISA}: expected the mask of {item.image}")
    return sorted(items, key=lambda item: (item.kind != "good", item.kind, item.image)), masked


def _visa_item(root: Path, row: dict[str, str]) -> Item:
    """The image of one row. Raises DataError if a path leads out of the row's object."""
    for name in (row["image"], row["mask"] or row["image"]):
        parts = PurePosixPath(name).parts
        if parts[:1] != (row["object"],) or ".." in parts:
            raise DataError(f"{root / VISA}: {name!r}; expected a file below {row['object']!r}")
    kind = "good" if row["label"] == "normal" else row["label"]
    mask = root / row["mask"] if row["mask"] and kind != "good" else None
    return Item(root / row["image"], kind, mask)


@dataclass(frozen=True)
class Images:
    """The images of one split: N of them."""

    pixels: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,): 0 normal, 1 anomalous
    kinds: tuple[str, ...]  # "good" or the defect folder's name
    masks: torch.Tensor | None  # bool (N, H, W), True on the anomaly; None without ground truth
    names: tuple[str, ...]  # path below the category folder: "test/good/000.png"

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.names)


def load(root: str | Path, category: str, split: str, size: int | tuple[int, int] = 256) -> Images:
    """Load the split "train" or "test" of a category, resized to ``size`` pixels.

    ``size`` is a side, or (height, width). Decoded images are kept in $CPLIB_CACHE. Warns of masks
    that mark nothing or nearly all. Raises DataError for anything that is missing or damaged.
    """
    items, masked = files(Path(root), category, split)
    entry = _cache_entry(items, split, _shape(size), masked)
    images = _restore(entry)
    if images is None:
        images = _decode(Path(root, category), items, _shape(size), masked)
        _keep(images, entry)
    for item, mask in zip(items, images.masks, strict=True) if masked else ():
        share = float(mask.float().mean())
        if item.mask and not share:
            line = "marks nothing; the image counts in no pixel metric"
        elif share > MOST_MARKED:
            line = f"marks {share:.0%} of the image; is it black on white?"
        else:
            continue
        warnings.warn(f"{item.mask}: {line}", stacklevel=2)
    return images


def fingerprints(root: str | Path, category: str, size: int = 256) -> dict[str, str]:
    """The ``fingerprint`` of each split. Images that are in the cache are not read again."""
    found = {}
    for split in ("train", "test"):
        items, masked = files(Path(root), category, split)
        noted = _noted_fingerprint(_cache_entry(items, split, _shape(size), masked))
        found[split] = noted or fingerprint(load(root, category, split, size))
    return found


def original_size(root: str | Path, category: str) -> tuple[int, int]:
    """Width and height in pixels of the category's first test image, before it is resized."""
    return size_of(files(Path(root), category, "test")[0][0].image)


def image_files(folder: str | Path) -> list[Path]:
    """The files below ``folder`` that are images by their names, sorted.

    Hidden files and folders are left out. Raises DataError if no image is left.
    """
    folder = Path(folder).expanduser()
    with as_data_error(folder, "a folder of images"):
        if not folder.is_dir():
            raise NotADirectoryError("no such folder")
        found = [path for path in _files(folder) if path.suffix.lower() in _suffixes()]
        if not found:
            raise FileNotFoundError("no images in this folder")
    check_names(found)
    return sorted(found, key=lambda path: path.as_posix())


def left_out(folder: str | Path) -> str:
    """One line that counts the files below ``folder`` that ``image_files`` leaves out, or ""."""
    ends = [path.suffix.lower() for path in _files(Path(folder).expanduser())]
    ends = [end for end in ends if end not in _suffixes()]
    kinds = ", ".join(sorted({end or "no ending" for end in ends}))
    return f"{folder}: left out, no images by their names: {len(ends)} ({kinds})" if ends else ""


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels of an image as it is shown. Raises DataError if it is none."""
    path = Path(path)
    with as_data_error(path, "an image"), _open(path, _formats()) as image:
        if image.format == "TIFF":  # its size on opening depends on PIL's version
            return _read(path, "RGB").size
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def read_images(
    paths: Iterable[str | Path], size: int | tuple[int, int] = 256, *, pad: bool = False
) -> tuple[torch.Tensor, list[Path], list[str]]:
    """Read images of any size and format as uint8 (N, 3, H, W), resized as ``load`` does.

    Returns the pixels, the paths that were read, and a line for each file that is no image.
    With ``pad``, an image keeps its shape, and its edges are repeated to fill the rest. The first
    frame of an animation is read.
    """
    paths, shape, formats = [Path(path) for path in paths], _shape(size), _formats()

    def read_one(path: Path) -> np.ndarray | DataError:
        try:
            image = _read(path, "RGB", formats)
            return _padded(image, shape) if pad else _resized(image, shape)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(read_one, paths))
    problems = [str(one) for one in found if isinstance(one, DataError)]
    whole = [i for i, one in enumerate(found) if not isinstance(one, DataError)]
    pixels = np.stack([found[i] for i in whole]) if whole else np.empty((0, 3, *shape), np.uint8)
    return torch.from_numpy(pixels), [paths[i] for i in whole], problems


def pixels_digest(pixels: torch.Tensor) -> str:
    """SHA-256 of pixels, uint8 (N, 3, H, W): 64 hex digits, whatever the memory format is."""
    return hashlib.sha256(_contiguous(pixels)).hexdigest()


def fingerprint(images: Images) -> str:
    """16 hex digits of a SHA-256 of pixels, labels, kinds, names and masks."""
    tensors = [images.pixels, images.labels, images.masks]
    shapes = [None if tensor is None else list(tensor.shape) for tensor in tensors]
    digest = hashlib.sha256(json.dumps([shapes, images.kinds, images.names]).encode())
    for tensor in tensors:
        if tensor is not None:
            digest.update(_contiguous(tensor))
    return digest.hexdigest()[:16]


def _contiguous(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values on the CPU, in the order of its indices."""
    return tensor.cpu().contiguous().numpy()


def _shape(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels."""
    return size if isinstance(size, tuple) else (size, size)


def _decode(folder: Path, items: list[Item], shape: tuple[int, int], masked: bool) -> Images:
    """Read the images of a split, several at a time."""
    pixels = np.empty((len(items), 3, *shape), np.uint8)
    masks = np.zeros((len(items), *shape), bool) if masked else None

    def decode_one(index: int) -> None:
        image = _read(items[index].image, "RGB")
        pixels[index] = _resized(image, shape)
        if items[index].mask is not None:
            masks[index] = _read_mask(items[index].mask, image.size, shape)

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode_one, range(len(items))))
    kinds = tuple(item.kind for item in items)
    return Images(
        pixels=torch.from_numpy(pixels),
        labels=torch.tensor([int(kind != "good") for kind in kinds]),
        kinds=kinds,
        masks=None if masks is None else torch.from_numpy(masks),
        names=tuple(item.image.relative_to(folder).as_posix() for item in items),
    )


def _formats() -> tuple[str, ...]:
    """PIL's names of the formats that own images may have."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NOT_IMAGES))


@functools.cache
def _suffixes() -> set[str]:
    """The endings of these formats' file names, in lower case."""
    formats = _formats()
    return {end for end, name in Image.registered_extensions().items() if name in formats}


def _files(folder: Path) -> list[Path]:
    """All files below a folder, without those that are hidden or in hidden folders."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    return [folder / path for path in found if not any(part[0] == "." for part in path.parts)]


def _resized(image: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """An image as (3, height, width) of this shape."""
    resized = image.resize(shape[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1)


def _padded(image: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """As ``_resized``, but the image keeps its shape: its edges fill the rest."""
    scale = min(shape[0] / image.height, shape[1] / image.width)
    small = _resized(image, tuple(max(1, round(scale * v)) for v in image.size[::-1]))
    rest = [wanted - found for wanted, found in zip(shape, small.shape[1:], strict=True)]
    return np.pad(small, [(0, 0), *((r // 2, r - r // 2) for r in rest)], mode="edge")


def _read(path: Path, mode: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image of 8 bits a channel, turned as its EXIF data says."""
    expected = "a whole image of 8 or 16 bits a channel"
    with as_data_error(path, expected), _open(path, formats) as image:
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        image.info.pop("transparency", None)  # dropped, as alpha channels are
        return _eight_bit(image).convert(mode)


def _open(path: Path, formats: tuple[str, ...]) -> Image.Image:
    """PIL's Image.open for regular files only: it would wait for a pipe."""
    if not path.is_file():
        raise FileNotFoundError("no such file")
    return Image.open(path, formats=formats)


def _eight_bit(image: Image.Image) -> Image.Image:
    """An image of 16 bits scaled to 8; PIL would clip it. Raises ValueError for 32 bits."""
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a pixel (mode {image.mode})")
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255


def _read_mask(path: Path, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """A mask as bool (height, width) of this shape. ``size`` is its image's, (width, height)."""
    with as_data_error(path, "a whole mask"), _open(path, FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        marked = _marked(image)
    if image.size != size:
        found, expected = ("x".join(map(str, pair)) for pair in (image.size, size))
        raise DataError(f"{path}: mask of {found} pixels; expected {expected}")
    marked = Image.fromarray(marked.astype(np.uint8))  # PIL turns bools into 0 and 255
    return np.asarray(marked.resize(shape[::-1], Image.Resampling.NEAREST)) > 0


def _marked(image: Image.Image) -> np.ndarray:
    """The pixels that a mask marks, bool (H, W), whatever its values are.

    A mask with few values has classes: all values but 0 (black) are marked. A mask that was
    resized or saved as JPEG has shades: values above half of the largest are marked. Shades are
    many values, or some just below the largest.
    """
    wide = image.mode[:1] in "IF"  # 16 or 32 bits a pixel
    values = np.asarray(image) if wide else np.asarray(image.convert("RGB")).max(2)
    if image.mode == "P" and values.min() > 0:  # no colour is black
        values = np.asarray(image)
    found = np.unique(values)
    top = found[-1]
    close = top >= 128 and ((found > 0.94 * top) & (found < top)).any()
    shades = close or len(found) > MOST_CLASSES or image.format == "JPEG"
    return values > (top / 2 if shades else 0)


def _cache_entry(items: list[Item], split: str, shape: tuple[int, int], masked: bool) -> Path:
    """The file that keeps a decoded split: its name changes with every file of the split."""
    states = []
    for path in (path for item in items for path in (item.image, item.mask) if path):
        with as_data_error(path, "an image"):
            state = path.stat()
        states.append([os.path.abspath(path), state.st_size, state.st_mtime_ns])
    kinds = [item.kind for item in items]
    options = [split, shape, masked]
    key = json.dumps([CACHE_VERSION, PIL.__version__, options, states, kinds])
    folder = setting("CPLIB_CACHE") or Path(setting("XDG_CACHE_HOME"), "cplib").expanduser()
    return Path(folder, f"cplib-images-{hashlib.sha256(key.encode()).hexdigest()}.safetensors")


def _noted_fingerprint(entry: Path) -> str | None:
    """The fingerprint in a cache entry, None if it cannot be read."""
    with contextlib.suppress(Exception), safe_open(entry, framework="pt") as file:
        return json.loads(file.metadata()["images"])["fingerprint"]
    return None


def _restore(entry: Path) -> Images | None:
    """The images in a cache entry, None if it is missing or damaged."""
    with contextlib.suppress(Exception):  # whatever is wrong: decode again
        with safe_open(entry, framework="pt") as file:
            note = json.loads(file.metadata()["images"])
            fields = {"masks": None} | {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        images = Images(kinds=tuple(note["kinds"]), names=tuple(note["names"]), **fields)
        if fingerprint(images) == note["fingerprint"]:
            return images
    return None


def _keep(images: Images, entry: Path) -> None:
    """Write a cache entry. A cache that cannot be written is no error: it only saves time."""
    fields = {"pixels": images.pixels, "labels": images.labels, "masks": images.masks}
    tensors = {key: tensor for key, tensor in fields.items() if tensor is not None}
    note = {"kinds": images.kinds, "names": images.names, "fingerprint": fingerprint(images)}
    with contextlib.suppress(OSError), atomic(entry) as part:
        save_file(tensors, part, metadata={"images": json.dumps(note)})
