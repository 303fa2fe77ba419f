"""Which files make up a data set: the folders of MVTec AD, MPDD, BTAD and VisA, as unpacked."""

import contextlib
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

LAYOUT = "<root>/<category>/{train/good, test/good, test/<defect>, ground_truth/<defect>}/*.png"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
NORMAL = ("good", "ok")  # the folder of normal pictures: MVTec AD and MPDD; BTAD
VISA = "split_csv/1cls.csv"  # VisA's one-class protocol: only there are its splits
COLUMNS = ("object", "split", "label", "image", "mask")


class DataError(ValueError):
    """A data set that cannot be used; the message is one line that names the file or folder."""


class Item(NamedTuple):
    """A picture of a data set."""

    picture: Path
    kind: str  # "good" or the kind of defect
    mask: Path | None
    least: int = 128  # values of the mask from here on are the defect


def categories(root: str | Path) -> list[str]:
    """Return the sorted names of the categories in `root`; DataError if there are none."""
    root = Path(root)
    if (root / VISA).is_file():
        found = sorted({row["object"] for row in _visa(root)})
    else:
        found = [path.name for path in _folders(root) if _normal(path)]
    if not found:
        raise DataError(f"{root}: no category in this folder; expected {LAYOUT}")
    return found


def files(root: Path, category: str, split: str) -> tuple[list[Item], bool]:
    """Return the pictures of a split, normal ones first, and whether masks belong to them."""
    if split not in ("train", "test"):
        raise DataError(f"{root}: no split {split!r}; expected 'train' or 'test'")
    visa = (root / VISA).is_file()
    if category not in (categories(root) if visa else [path.name for path in _folders(root)]):
        known = ", ".join(categories(root))
        raise DataError(f"{root}: no category {category!r}; expected one of {known}")
    return (_visa_files if visa else _folder_files)(root, category, split)


@contextlib.contextmanager
def naming(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever is raised into a DataError of one line that names `path`."""
    try:
        yield
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {' '.join(reason.split())}; expected {expected}") from None


def check_names(paths: Iterable[Path]) -> None:
    """DataError for a name that cannot stand in a CSV file and in a message of one line."""
    for path in paths:
        if "\n" in path.name or path.name.encode(errors="ignore").decode() != path.name:
            raise DataError(f"{str(path)!r}: expected a name in UTF-8, on one line")


def _entries(folder: Path) -> list[Path]:
    with naming(folder, f"a folder of {LAYOUT}"):
        found = sorted(folder.iterdir(), key=lambda path: path.name)
    check_names(found)
    return [path for path in found if not path.name.startswith(".")]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _pictures(folder: Path) -> list[Path]:
    # not is_file(): a link that leads nowhere has to be an error, not one picture fewer
    found = [path for path in _entries(folder) if not path.is_dir()]
    return [path for path in found if path.suffix.lower() in SUFFIXES]


def _normal(folder: Path) -> str | None:
    return next((name for name in NORMAL if (folder / "train" / name).is_dir()), None)


def _folder_files(root: Path, category: str, split: str) -> tuple[list[Item], bool]:
    folder = root / category
    normal = _normal(folder) or NORMAL[0]
    masked = split == "test" and (folder / "ground_truth").is_dir()
    top = folder / split
    kinds = [top / normal] if split == "train" else _folders(top)
    kinds.sort(key=lambda path: (path.name != normal, path.name))
    items = [
        item
        for kind in kinds
        for item in (_good(kind) if kind.name == normal else _defective(folder, kind, masked))
    ]
    if not items:
        empty = kinds[0] if split == "train" else top
        raise DataError(f"{empty}: no pictures in this folder; expected {LAYOUT}")
    return items, masked


def _good(kind: Path) -> list[Item]:
    return [Item(picture, "good", None) for picture in _pictures(kind)]


def _defective(folder: Path, kind: Path, masked: bool) -> Iterator[Item]:
    truth = folder / "ground_truth" / kind.name
    masks = {path.stem: path for path in _pictures(truth)} if masked and truth.is_dir() else {}
    for picture in _pictures(kind):
        name = f"{picture.stem}_mask"
        mask = masks.get(name) or masks.get(picture.stem)
        if masked and mask is None:
            raise DataError(f"{truth / name}.png: missing; expected the mask of {picture}")
        yield Item(picture, kind.name, mask)


def _visa(root: Path) -> list[dict[str, str]]:
    with (
        naming(root / VISA, f"the columns {','.join(COLUMNS)}"),
        (root / VISA).open(newline="", encoding="utf-8-sig") as file,
    ):
        rows = [{name: row[name] for name in COLUMNS} for row in csv.DictReader(file)]
        if not rows or any(None in row.values() for row in rows):
            raise ValueError("a row is missing or too short")
    return rows


def _visa_files(root: Path, category: str, split: str) -> tuple[list[Item], bool]:
    rows = [row for row in _visa(root) if (row["object"], row["split"]) == (category, split)]
    items = [_visa_item(root, row) for row in rows]
    items = [item for item in items if split == "test" or item.kind == "good"]
    if not items:
        raise DataError(f"{root / VISA}: no pictures of {split}; expected some of {category!r}")
    check_names(item.picture for item in items)
    masked = any(item.mask for item in items)
    for item in items:
        if masked and item.kind != "good" and item.mask is None:
            raise DataError(f"{root / VISA}: expected the mask of {item.picture}")
    return sorted(items, key=lambda item: (item.kind != "good", item.kind, item.picture)), masked


def _visa_item(root: Path, row: dict[str, str]) -> Item:
    """VisA's masks hold the number of the kind of defect, from 1."""
    for name in (row["image"], row["mask"] or row["image"]):
        parts = PurePosixPath(name).parts
        if parts[:1] != (row["object"],) or ".." in parts:
            raise DataError(f"{root / VISA}: {name!r}; expected a file below {row['object']!r}")
    kind = "good" if row["label"] == "normal" else row["label"]
    mask = root / row["mask"] if row["mask"] and kind != "good" else None
    return Item(root / row["image"], kind, mask, least=1)
