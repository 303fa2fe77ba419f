"""A folder in the MVTec layout as tensors."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

LAYOUT = "<root>/<category>/{train/good, test/good, test/<defect>, ground_truth/<defect>}/*.png"
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
CACHE_VERSION = 1  # part of every entry's name: raise it when decoding changes
CACHE_PREFIX = "cplib-images-"
CACHE_BYTES = 4 * 2**30


class DataError(ValueError):
    """A data set that cannot be used; the message is one line that names the file or folder."""


@dataclass(frozen=True)
class Images:
    """The pictures of one split, and what is known about each."""

    pixels: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,): 0 normal, 1 defective
    kinds: tuple[str, ...]  # "good" or the defect folder's name
    masks: torch.Tensor | None  # bool (N, H, W), True on the defect; None without ground truth
    names: tuple[str, ...]  # path below the category folder: "test/good/000.png"

    def __len__(self) -> int:
        """Return the number of pictures, N."""
        return len(self.names)


class _Item(NamedTuple):
    picture: Path
    kind: str
    mask: Path | None


def categories(root: str | Path) -> list[str]:
    """Return the sorted names of folders in `root` that hold train/good; DataError if none do."""
    found = [path.name for path in _folders(Path(root)) if (path / "train" / "good").is_dir()]
    if not found:
        raise DataError(f"{root}: no category in this folder; expected {LAYOUT}")
    return found


def load(
    root: str | Path,
    category: str,
    split: str,
    size: int | tuple[int, int] = 256,
    *,
    cache: str | Path | None = None,
) -> Images:
    """Load split "train" or "test" at `size` pixels, square or (height, width), or DataError.

    What was decoded is kept in the folder `cache` (default: $CPLIB_CACHE or the user's cache).
    """
    shape = _shape(size)
    if split not in ("train", "test"):
        raise DataError(f"{root}: no split {split!r}; expected 'train' or 'test'")
    if category not in [path.name for path in _folders(Path(root))]:
        known = ", ".join(categories(root))
        raise DataError(f"{root}: no category {category!r}; expected one of {known}")
    folder = Path(root, category)
    masked = split == "test" and (folder / "ground_truth").is_dir()
    items = _items(folder, split, masked)
    entry = _cache_entry(cache, items, [split, shape, masked])
    images = _restore(entry)
    if images is None:
        images = _decode(folder, items, shape, masked)
        _keep(images, entry)
    return images


def fingerprint(images: Images) -> str:
    """Return 16 hex digits of a SHA-256 over pixels, labels, kinds, names and masks."""
    tensors = [images.pixels, images.labels, images.masks]
    shapes = [None if tensor is None else list(tensor.shape) for tensor in tensors]
    digest = hashlib.sha256(json.dumps([shapes, images.kinds, images.names]).encode())
    for tensor in tensors:
        if tensor is not None:
            array = tensor.cpu().numpy().reshape(-1)
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(little.view(np.uint8))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _naming(path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - damaged files make decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {' '.join(reason.split())}; expected {expected}") from None


def _shape(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, Integral) and side > 0 for side in pair):
        raise DataError(f"size {size!r}: expected a whole number above 0, or (height, width)")
    return int(pair[0]), int(pair[1])


def _entries(folder: Path) -> list[Path]:
    with _naming(folder, f"a folder of {LAYOUT}"):
        found = sorted(folder.iterdir(), key=lambda path: path.name)
    _check_names(found)
    return [path for path in found if not path.name.startswith(".")]


def _check_names(paths: Iterable[Path]) -> None:
    """Names stand in CSV files and in messages of one line."""
    for path in paths:
        if "\n" in path.name or path.name.encode(errors="ignore").decode() != path.name:
            raise DataError(f"{str(path)!r}: expected a name in UTF-8, on one line")


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _pictures(folder: Path) -> list[Path]:
    # not is_file(): a link that leads nowhere has to be an error, not one picture fewer
    files = [path for path in _entries(folder) if not path.is_dir()]
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def _items(folder: Path, split: str, masked: bool) -> list[_Item]:
    top = folder / split
    kinds = [top / "good"] if split == "train" else _folders(top)
    kinds.sort(key=lambda path: (path.name != "good", path.name))
    items = [item for kind in kinds for item in _items_of_kind(folder, kind, masked)]
    if not items:
        empty = kinds[0] if split == "train" else top
        raise DataError(f"{empty}: no pictures in this folder; expected {LAYOUT}")
    return items


def _items_of_kind(folder: Path, kind: Path, masked: bool) -> Iterator[_Item]:
    masked = masked and kind.name != "good"
    truth = folder / "ground_truth" / kind.name
    masks = {path.stem: path for path in _pictures(truth)} if masked and truth.is_dir() else {}
    for picture in _pictures(kind):
        name = f"{picture.stem}_mask"
        mask = masks.get(name) or masks.get(picture.stem)
        if masked and mask is None:
            raise DataError(f"{truth / name}.png: missing; expected the mask of {picture}")
        yield _Item(picture, kind.name, mask)


def _decode(folder: Path, items: list[_Item], shape: tuple[int, int], masked: bool) -> Images:
    pixels = np.empty((len(items), 3, *shape), np.uint8)
    masks = np.zeros((len(items), *shape), bool) if masked else None

    def decode_one(index: int) -> None:
        picture = _read(items[index].picture, "RGB")
        resized = picture.resize(shape[::-1], Image.Resampling.BILINEAR)
        pixels[index] = np.asarray(resized).transpose(2, 0, 1)
        if items[index].mask is not None:
            masks[index] = _read_mask(items[index].mask, picture.size, shape)

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode_one, range(len(items))))
    kinds = tuple(item.kind for item in items)
    return Images(
        pixels=torch.from_numpy(pixels),
        labels=torch.tensor([int(kind != "good") for kind in kinds]),
        kinds=kinds,
        masks=None if masks is None else torch.from_numpy(masks),
        names=tuple(item.picture.relative_to(folder).as_posix() for item in items),
    )


def _read(path: Path, mode: str) -> Image.Image:
    expected = "a whole picture of 8 or 16 bits a channel"
    with _naming(path, expected), _open(path, FORMATS) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        picture.load()
        picture.info.pop("transparency", None)  # dropped, as alpha channels are
        return _eight_bit(picture).convert(mode)


def _open(path: Path, formats: tuple[str, ...]) -> Image.Image:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError("no such file")
    return Image.open(path, formats=formats)


def _eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F"):
        raise ValueError(f"32 bits a pixel (mode {picture.mode})")
    if not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255


def _read_mask(path: Path, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    mask = _read(path, "L")
    if mask.size != size:
        width, height = mask.size
        raise DataError(f"{path}: mask of {width}x{height} pixels; expected {size[0]}x{size[1]}")
    return np.asarray(mask.resize(shape[::-1], Image.Resampling.NEAREST)) > 127


def _cache_entry(cache: str | Path | None, items: list[_Item], options: list) -> Path:
    states = []
    for path in (path for item in items for path in (item.picture, item.mask) if path):
        with _naming(path, "a picture"):
            state = path.stat()
        states.append([os.path.abspath(path), state.st_size, state.st_mtime_ns])
    key = json.dumps([CACHE_VERSION, PIL.__version__, options, states])
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = cache or os.environ.get("CPLIB_CACHE") or os.path.join(home, "cplib")
    name = f"{CACHE_PREFIX}{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    return Path(folder, name)


def _restore(entry: Path) -> Images | None:
    with contextlib.suppress(Exception):  # whatever is wrong with an entry: decode again
        with safe_open(entry, framework="pt") as file:
            note = json.loads(file.metadata()["images"])
            fields = {"masks": None} | {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        images = Images(kinds=tuple(note["kinds"]), names=tuple(note["names"]), **fields)
        if fingerprint(images) == note["fingerprint"]:
            with contextlib.suppress(OSError):
                os.utime(entry)  # the entry used last is dropped last
            return images
    return None


def _keep(images: Images, entry: Path) -> None:
    fields = {"pixels": images.pixels, "labels": images.labels, "masks": images.masks}
    tensors = {key: tensor for key, tensor in fields.items() if tensor is not None}
    note = {"kinds": images.kinds, "names": images.names, "fingerprint": fingerprint(images)}
    part = entry.with_suffix(f".{uuid.uuid4().hex}")
    with contextlib.suppress(OSError, SafetensorError):  # read-only or full: it only saves time
        entry.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"images": json.dumps(note)})
        os.replace(part, entry)
        _trim(entry.parent)
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)


def _trim(folder: Path) -> None:
    states = [(path.stat(), path) for path in folder.glob(f"{CACHE_PREFIX}*")]
    states.sort(key=lambda pair: pair[0].st_mtime_ns, reverse=True)
    total = 0
    for state, path in states:
        total += state.st_size
        if total > CACHE_BYTES and path != states[0][1]:
            path.unlink(missing_ok=True)
