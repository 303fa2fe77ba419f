"""A small stand-in data set in the MVTec AD layout, painted on the spot without any download.

Two textures (`brick`, `fabric`) and an object (`sieve`), each with three kinds of defect. Light and
colour change from image to image by more than a defect changes them, so that a defect shows in the
structure alone. Nothing here copies a rectangle of an image to another place, so the defects owe
nothing to the augmentations that are put to the test on them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import uuid
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage as ndi
from skimage import data
from skimage.morphology import convex_hull_image

Array = np.ndarray
Rng = np.random.Generator

VERSION = 2  # raise it whenever an image changes
DEFECTS = {
    "brick": ("buckled", "crack", "missing_mortar"),
    "fabric": ("broken_thread", "hole", "shifted_row"),
    "sieve": ("clogged", "dent", "fibre"),
}
# Changes that cover an area; the others are lines and outlines.
AREAS = ("buckled", "dent", "hole", "shifted_row")
LICENCE = """\
Where the images of this folder come from
===========================================

brick   Crops of `skimage.data.brick()`, which scikit-image ships. Its documentation says that the
        photograph was downloaded from CC0Textures
        (https://cc0textures.com/view.php?tex=Bricks25) under the Creative Commons CC0 licence, and
        then put into perspective, turned, cropped and scaled. Here the perspective is taken out
        again, and colour, lighting, noise and defects are added.
fabric  Drawn by the program; no photograph.
sieve   Drawn by the program; no photograph.

All defects are drawn by the program.
"""


def make_demo(
    root: str | Path,
    *,
    train: int = 64,
    good: int = 20,
    defective: int = 24,
    size: int = 256,
    seed: int = 0,
) -> Path:
    """Write the demo set, RGB images of `size` pixels, below `root` and return `root`.

    Every category gets `train` + `good` normal images, and `defective` ones spread over its
    kinds; the same arguments give the same bytes. A complete folder made with the same arguments
    is left as it is. Raises FileExistsError where `root` holds anything else, ValueError for
    counts or a size that make no data set.
    """
    root = Path(root)
    wanted = {"train": train, "good": good, "defective": defective, "size": size, "seed": seed}
    if min(train, good) < 1 or defective < 3 or size < 32 or seed < 0:
        raise ValueError(f"{root}: train, good >= 1, defective >= 3, size >= 32, not {wanted}")
    wanted["version"] = VERSION
    if _is_there(root, wanted):
        return root
    part = root.absolute().with_name(f".{root.absolute().name}-{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        _write_all(part, wanted)
        part.rename(root)
    except OSError:
        # Somebody else may have made the same set meanwhile.
        if not _is_there(root, wanted):
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


def paint(
    category: str, kind: str, index: int, *, split: str = "test", size: int = 256, seed: int = 0
) -> Array:
    """One normal image, (size, size, 3) uint8; it depends on nothing but these arguments."""
    return _render(category, (seed, split, kind, index), size=size, kind="good")


def paint_defective(
    category: str, kind: str, index: int, *, size: int = 256, seed: int = 0
) -> tuple[Array, Array]:
    """An anomalous image, (size, size, 3) uint8, and its mask, (size, size) uint8 of 0 and 255.

    The mask is 255 exactly where the image differs from `paint` with the same arguments.
    """
    key = (seed, "test", kind, index)
    clean = _render(category, key, size=size, kind="good")
    raw = _render(category, key, size=size, kind=kind)
    mask = _solid(np.abs(raw.astype(int) - clean).max(axis=-1) > 3, area=kind in AREAS)
    bad = np.where(mask[..., None], raw, clean)
    # Inside the defect a pixel can fall on its old value by chance; one grey level tells it apart.
    same = mask & (bad == clean).all(axis=-1)
    bad[same, 0] ^= 1
    return bad, np.where(mask, 255, 0).astype(np.uint8)


def _solid(changed: Array, *, area: bool) -> Array:
    """A bool image without its specks and small gaps, or the hull of what is left of it."""
    labels, count = ndi.label(changed, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    kept = areas[labels] >= min(areas.max(), 40 * (len(changed) / 256) ** 2)
    return convex_hull_image(kept) if area else kept | ndi.binary_closing(kept)


def _is_there(root: Path, wanted: dict[str, int]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    with contextlib.suppress(OSError, ValueError):
        held = json.loads((root / "demo.json").read_text(encoding="utf-8"))
        images = wanted["train"] + wanted["good"] + 2 * wanted["defective"]
        if held == wanted and len(list(root.rglob("*.png"))) == len(DEFECTS) * images:
            return True
    raise FileExistsError(f"{root} exists and is not the demo set asked for; name another folder")


def _write_all(root: Path, wanted: dict[str, int]) -> None:
    options = {"size": wanted["size"], "seed": wanted["seed"]}
    for category, kinds in DEFECTS.items():
        for split in ("train", "test"):
            for i in range(wanted["train" if split == "train" else "good"]):
                image = paint(category, "good", i, split=split, **options)
                _save(root / category / split / "good" / f"{i:03d}.png", image)
        for k, kind in enumerate(kinds):
            for i in range(len(range(k, wanted["defective"], len(kinds)))):
                image, mask = paint_defective(category, kind, i, **options)
                _save(root / category / "test" / kind / f"{i:03d}.png", image)
                _save(root / category / "ground_truth" / kind / f"{i:03d}_mask.png", mask)
    (root / "LICENSE.txt").write_text(LICENCE, encoding="utf-8")
    (root / "demo.json").write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _save(path: Path, pixels: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=6)


def _render(category: str, key: tuple[int, str, str, int], *, size: int, kind: str) -> Array:
    # Three streams, so that a defect never moves the draws behind the scene or its noise.
    seed, split, shown, index = key
    words = [seed, zlib.crc32(f"{category}/{split}/{shown}".encode()), index]
    scene, flaw, noise = (np.random.default_rng([*words, part]) for part in range(3))
    painter = {"brick": _brick, "fabric": _fabric, "sieve": _sieve}[category]
    image = painter(scene, flaw, kind, size) * _light(scene, size)[..., None]
    grain = noise.normal(0, 2.4, (size, size, 1)) + noise.normal(0, 0.7, (size, size, 3))
    return np.clip(np.rint(image + grain), 0, 255).astype(np.uint8)


def _light(rng: Rng, size: int) -> Array:
    y, x = _grid(size) / 256 - 0.5
    turn, slope, level = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4), rng.uniform(0.8, 1.1)
    return level * (1 + slope * (x * np.cos(turn) + y * np.sin(turn)))


def _tint(rng: Rng, colour: tuple[int, int, int], spread: float) -> Array:
    """`colour` a little warmer or cooler, lighter or darker."""
    warmer, lighter = rng.normal(0, spread, 2)
    return np.array(colour) * (1 + warmer * np.array([1, 0, -1])) * (1 + lighter)


def _grid(size: int) -> Array:
    """Row and column of every pixel centre in the units of a 256-pixel image, (2, size, size)."""
    return (np.indices((size, size), dtype=float) + 0.5) * 256 / size


def _around(rng: Rng, middle: Array, near: float, far: float) -> Array:
    turn = rng.uniform(0, 2 * np.pi)
    return middle + rng.uniform(near, far) * np.array([np.sin(turn), np.cos(turn)])


def _step(x: Array, low: float, high: float) -> Array:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _mix(image: Array, colour: Array | tuple[int, int, int], weight: Array) -> Array:
    return image + (np.asarray(colour) - image) * weight[..., None]


def _cast(cover: Array, back: Array, depth: float) -> Array:
    """The plain colour `back` with the soft shadow of an object that lies on it."""
    size = len(cover)
    shadow = ndi.gaussian_filter(np.roll(cover, (size // 34, size // 45), (0, 1)), size / 45)
    return back * (1 - depth * shadow[..., None])


def _push(where: Array, middle: Array, radius: float, move: Array) -> Array:
    """Shift the points within ``radius`` of the middle, the middle itself by all of ``move``."""
    away = where - middle[:, None, None]
    bump = (1 - (away**2).sum(axis=0) / radius**2).clip(0) ** 2
    return where + bump * move[:, None, None]


def _stroke(size: int, points: Array, width: float) -> Array:
    """Cover, (size, size) in 0..1, of a line through `points`, (n, 2) rows and columns of 256."""
    big = 4 * size
    sheet = Image.new("L", (big, big))
    corners = [(float(x) * big / 256, float(y) * big / 256) for y, x in points]
    ImageDraw.Draw(sheet).line(corners, 255, round(width * big / 256), "curve")
    return np.asarray(sheet.resize((size, size), Image.Resampling.BOX)) / 255


def _walk(rng: Rng, middle: Array, length: float, wander: float) -> Array:
    steps = 24
    turn = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, wander, steps))
    moves = np.stack([np.sin(turn), np.cos(turn)], axis=1) * length / steps
    return middle + np.cumsum(moves, axis=0) - moves.sum(axis=0) / 2


@functools.cache
def _wall() -> tuple[Array, Array]:
    """The brick photograph seen head-on, and a shade for each brick, both (640, 640)."""
    # The homography by which scikit-image says it made its image, undone.
    y, x = np.indices((640, 640)) * 1318 / 640 + np.array([312, 2])[:, None, None]
    depth = 2 * (1 - 0.00022 * x)
    rows, columns = (0.54688 * y - 0.12822 * x) / depth, (0.54764 * x - 0.00219 * y) / depth
    photo = np.rot90(data.brick()).astype(float)
    wall = ndi.map_coordinates(photo, [rows, columns], order=3, mode="nearest")
    labels, count = ndi.label(wall < 128)
    shade = np.random.default_rng(25).normal(1, 0.07, count + 1)
    return wall, ndi.gaussian_filter(shade[labels], 1)


def _brick(rng: Rng, flaw: Rng, kind: str, size: int) -> Array:
    scale, tint = rng.uniform(1.28, 1.38), _tint(rng, (158, 84, 64), 0.03)
    origin = rng.uniform(3, 637 - 256 * scale, 2)
    where = _grid(size)
    if kind == "buckled":
        move = flaw.choice([-1, 1]) * flaw.uniform(9, 13) * np.array([1, 0.3])
        where = _push(where, flaw.uniform(65, 191, 2), flaw.uniform(34, 46), move)
    spots = where * scale + origin[:, None, None]
    wall, shade = (ndi.map_coordinates(a, spots, order=1) for a in _wall())
    mortar = _step(wall, 112, 165)
    image = (wall / 100 * shade)[..., None] * tint
    image = _mix(image, wall[..., None] * (1.08, 1.04, 0.97), mortar)
    if kind == "crack":
        line = _walk(flaw, flaw.uniform(65, 191, 2), flaw.uniform(60, 110), 0.4)
        image = _mix(image, (46, 34, 30), 0.8 * _stroke(size, line, flaw.uniform(2.2, 3.2)))
    if kind == "missing_mortar":
        image = _mix(image, (60, 48, 44), 0.9 * mortar * _joint(flaw, origin, scale, size))
    return image


def _joint(rng: Rng, origin: Array, scale: float, size: int) -> Array:
    """A soft band over part of one bed joint and the head joints that meet it."""
    joints = np.array([55, 106, 156, 208, 259, 315, 366, 419, 473, 526, 580])
    joints = (joints - origin[0]) / scale
    y = rng.choice(joints[(joints > 45) & (joints < 211)])
    middle, half = rng.uniform(80, 176), rng.uniform(14, 24)
    rows, columns = _grid(size)
    along = 1 - _step(np.abs(columns - middle), half - 5, half + 5)
    return along * (1 - _step(np.abs(rows - y), 14, 20))


def _fabric(rng: Rng, flaw: Rng, kind: str, size: int) -> Array:
    """Plain weave: at every crossing of row j and column i one of the two threads lies over."""
    shades, gap = rng.normal(1, 0.045, (2, 64)), np.zeros((size, size))
    weft, warp = _tint(rng, (196, 184, 160), 0.025), _tint(rng, (72, 100, 128), 0.03)
    where, slip = _grid(size), 0
    if kind == "hole":
        where, gap = _part_threads(where, flaw)
    v, u = _threads(where, rng)
    if kind == "shifted_row":
        v, slip = _slip(v, flaw)
    j, i = np.floor(v).astype(int), np.floor(u).astype(int)
    lost = _lost(i, j, flaw) if kind == "broken_thread" else np.zeros((size, size), bool)
    over = ((i + j + slip) % 2 == 0) & ~lost
    across, along = np.where(over, (v - j, u - i), (u - i, v - j)) * 2 - 1
    arch = np.sqrt(np.clip(1 - across**2, 0, 1)) * (1 - 0.35 * along**2)
    twist = 1 + 0.07 * np.sin(2 * np.pi * (along * 1.5 + across))
    shade = np.where(over, shades[0][j % 64], shades[1][i % 64]) * twist * (0.3 + 0.75 * arch)
    colour = np.where(over[..., None], weft, warp) * np.where(lost, 0.62, 1)[..., None]
    return _mix(colour * shade[..., None], (22, 20, 20), gap)


def _threads(where: Array, rng: Rng) -> tuple[Array, Array]:
    """Thread coordinates of every point: whole numbers lie between two weft or warp threads."""
    pitch, turn, phase = rng.uniform(12.4, 13.2), rng.normal(0, 0.02), rng.uniform(8, 12, 2)
    v = (where[0] * np.cos(turn) + where[1] * np.sin(turn)) / pitch + phase[0]
    u = (where[1] * np.cos(turn) - where[0] * np.sin(turn)) / pitch + phase[1]
    return v + 0.06 * np.sin(u / 3 + phase[0]), u + 0.06 * np.sin(v / 3 + phase[1])


def _part_threads(where: Array, rng: Rng) -> tuple[Array, Array]:
    """Push the threads away from a point; the second result is the opening they leave."""
    middle, radius = rng.uniform(60, 196, (2, 1, 1)), rng.uniform(7, 10)
    away, squash = where - middle, rng.uniform(0.75, 1.3)
    r = np.hypot(away[0] * squash, away[1] / squash)
    pull = radius * np.exp(-np.maximum(r - radius, 0) / (0.55 * radius))
    kept = 1 - np.minimum(pull / np.maximum(r, 1e-9), 0.96)
    return middle + away * kept, 1 - _step(r, radius - 2, radius + 1)


def _slip(v: Array, rng: Rng) -> tuple[Array, Array]:
    """Weave one pick out of step, and crowd its neighbours."""
    middle = int(v.min()) + rng.integers(5, 15) + 0.5
    bow = rng.uniform(0.2, 0.3) * np.exp(-(((v - middle) / 1.4) ** 2))
    v = v + bow * np.sin((v - middle) * 1.6)
    return v, np.floor(v) == middle - 0.5


def _lost(i: Array, j: Array, rng: Rng) -> Array:
    row = (j.min() + j.max()) // 2 + rng.integers(-6, 7)
    first, length = i.min() + rng.integers(2, 8), rng.integers(5, 9)
    return (j == row) & (i >= first) & (i < first + length)


def _sieve(rng: Rng, flaw: Rng, kind: str, size: int) -> Array:
    """A round steel plate with rows of holes, each row half a hole further than the one above."""
    turn, glint, middle = rng.normal(0, 0.03), rng.uniform(0, np.pi), 128 + rng.uniform(-5, 5, 2)
    steel, bench = _tint(rng, (168, 172, 180), 0.03), _tint(rng, (84, 80, 76), 0.05)
    where = _grid(size)
    if kind == "dent":
        move = _around(flaw, np.zeros(2), 9, 13)
        where = _push(where, _around(flaw, middle, 20, 70), flaw.uniform(24, 32), move)
    y, x = where - middle[:, None, None]
    v, u = y * np.cos(turn) - x * np.sin(turn), x * np.cos(turn) + y * np.sin(turn)
    row = np.round(v / 13)
    column = np.round(u / 15 - row % 2 / 2) + row % 2 / 2
    holes = np.stack([13 * row, 15 * column])  # the middle of the nearest hole
    open_ = (1 - _step(np.hypot(v - holes[0], u - holes[1]), 4.6, 5.8)) * (np.hypot(*holes) < 88)
    if kind == "clogged":
        spot = _around(flaw, np.zeros(2), 15, 60)[:, None, None]
        open_ = open_ * (np.hypot(*(holes - spot)) > flaw.uniform(15, 21))
    cover = (1 - _step(np.hypot(y, x), 103, 105)) * (1 - open_)
    face = 1 + 0.12 * np.cos(2 * (np.arctan2(y, x) - glint)) + np.sin(v * 2.1) / 45
    slopes = np.gradient(ndi.gaussian_filter(cover, 1.2 * size / 256), 256 / size)
    face = (face + 0.9 * slopes[0] + 0.6 * slopes[1]).clip(0.15)
    image = _mix(_cast(cover, bench, 0.5), face[..., None] * steel, cover)
    if kind == "fibre":
        line = _walk(flaw, _around(flaw, middle, 0, 50), flaw.uniform(60, 100), 0.15)
        image = _mix(image, (112, 96, 80), 0.9 * _stroke(size, line, flaw.uniform(3, 4)))
    return image
