"""A data set's folder as tensors."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cplib.layouts import DataError, Item, check_names, files, naming
from cplib.layouts import categories as categories

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
# Not read from a folder of one's own: EPS is a program (Ghostscript would run it), of the others
# PIL knows only the name.
NO_PICTURES = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
CACHE_VERSION = 1  # part of every entry's name: raise it when decoding changes
CACHE_PREFIX = "cplib-images-"
CACHE_BYTES = 4 * 2**30


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


def load(
    root: str | Path,
    category: str,
    split: str,
    size: int | tuple[int, int] = 256,
    *,
    cache: str | Path | None = None,
) -> Images:
    """Load split "train" or "test" at `size` pixels, square or (height, width), or DataError.

    `root` holds MVTec AD, MPDD, BTAD, VisA, or pictures in the first one's layout.
    What was decoded is kept in the folder `cache` (default: $CPLIB_CACHE or the user's cache).
    """
    shape = _shape(size)
    items, masked = files(Path(root), category, split)
    entry = _cache_entry(cache, items, [split, shape, masked])
    images = _restore(entry)
    if images is None:
        images = _decode(Path(root, category), items, shape, masked)
        _keep(images, entry)
    return images


def pictures(folder: str | Path) -> list[Path]:
    """The files below `folder` named as a format that PIL reads, sorted; DataError if none is."""
    folder = Path(folder).expanduser()
    with naming(folder, "a folder of pictures"):
        if not folder.is_dir():
            raise NotADirectoryError("no such folder")
        suffixes = _suffixes()
        found = [path for path in _files(folder) if path.suffix.lower() in suffixes]
        if not found:
            raise FileNotFoundError("no pictures in this folder")
    check_names(found)
    return sorted(found, key=lambda path: path.as_posix())


def left_out(folder: str | Path) -> str:
    """A line on the files below `folder` that `pictures` leaves out by their names, or ""."""
    ours = _suffixes()
    ends = [path.suffix.lower() for path in _files(Path(folder).expanduser())]
    ends = [end for end in ends if end not in ours]
    kinds = ", ".join(sorted({end or "no ending" for end in ends}))
    return f"{folder}: left out, no pictures by their names: {len(ends)} ({kinds})" if ends else ""


def read(
    paths: Iterable[str | Path], size: int | tuple[int, int] = 256
) -> tuple[torch.Tensor, list[Path], list[str]]:
    """Pictures of any size and format of PIL's as uint8 (N, 3, H, W), resized as `load` does.

    Returns the pixels, the paths that they came from, and a line for each file that is no picture.
    Of an animation the first frame is taken.
    """
    paths, shape, formats = [Path(path) for path in paths], _shape(size), _formats()

    def read_one(path: Path) -> np.ndarray | DataError:
        try:
            return _resized(_read(path, "RGB", formats), shape)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(read_one, paths))
    problems = [str(one) for one in found if isinstance(one, DataError)]
    whole = [i for i, one in enumerate(found) if not isinstance(one, DataError)]
    pixels = np.stack([found[i] for i in whole]) if whole else np.empty((0, 3, *shape), np.uint8)
    return torch.from_numpy(pixels), [paths[i] for i in whole], problems


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


def _shape(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, Integral) and side > 0 for side in pair):
        raise DataError(f"size {size!r}: expected a whole number above 0, or (height, width)")
    return int(pair[0]), int(pair[1])


def _decode(folder: Path, items: list[Item], shape: tuple[int, int], masked: bool) -> Images:
    pixels = np.empty((len(items), 3, *shape), np.uint8)
    masks = np.zeros((len(items), *shape), bool) if masked else None

    def decode_one(index: int) -> None:
        picture = _read(items[index].picture, "RGB")
        pixels[index] = _resized(picture, shape)
        if items[index].mask is not None:
            masks[index] = _read_mask(items[index], picture.size, shape)

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


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NO_PICTURES))


def _suffixes() -> set[str]:
    formats = _formats()
    return {end for end, name in Image.registered_extensions().items() if name in formats}


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if not p.is_dir() and not _hidden(p, folder)]


def _hidden(path: Path, folder: str | Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _resized(picture: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    resized = picture.resize(shape[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1)


def _read(path: Path, mode: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    expected = "a whole picture of 8 or 16 bits a channel"
    with naming(path, expected), _open(path, formats) as picture:
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


def _read_mask(item: Item, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    mask = _read(item.mask, "L")
    if mask.size != size:
        found, expected = ("x".join(map(str, pair)) for pair in (mask.size, size))
        raise DataError(f"{item.mask}: mask of {found} pixels; expected {expected}")
    return np.asarray(mask.resize(shape[::-1], Image.Resampling.NEAREST)) >= item.least


def _cache_entry(cache: str | Path | None, items: list[Item], options: list) -> Path:
    states = []
    for path in (path for item in items for path in (item.picture, item.mask) if path):
        with naming(path, "a picture"):
            state = path.stat()
        states.append([os.path.abspath(path), state.st_size, state.st_mtime_ns])
    kinds = [item.kind for item in items]
    key = json.dumps([CACHE_VERSION, PIL.__version__, options, states, kinds])
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
