"""A small stand-in data set in the MVTec AD layout, painted on the spot without any download.

Two textures (`brick`, `fabric`) and two objects (`coin`, `gear`), each with three kinds of defect.
Nothing here copies a rectangle of an image to another place, so the defects owe nothing to the
augmentations that are put to the test on them.
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

VERSION = 1  # raise it whenever an image changes
DEFECTS = {
    "brick": ("buckled", "crack", "missing_mortar"),
    "fabric": ("broken_thread", "hole", "shifted_row"),
    "coin": ("dent", "scratch", "worn"),
    "gear": ("missing_tooth", "rust", "scratch"),
}
# Changes that cover an area; the others are lines and outlines.
AREAS = ("buckled", "dent", "hole", "shifted_row", "worn")
LICENCE = """\
Where the images of this folder come from
===========================================

brick   Crops of `skimage.data.brick()`, which scikit-image ships. Its documentation says that the
        photograph was downloaded from CC0Textures
        (https://cc0textures.com/view.php?tex=Bricks25) under the Creative Commons CC0 licence, and
        then put into perspective, turned, cropped and scaled. Here the perspective is taken out
        again, and colour, lighting, noise and defects are added.
coin    One coin of `skimage.data.coins()`, "Greek coins from Pompeii", which scikit-image ships.
        Its documentation says that the photograph was downloaded from the Brooklyn Museum
        Collection (https://www.brooklynmuseum.org/opencollection/archives/image/51611) with no
        known copyright restrictions. Here the coin is cut out, enlarged and put on a drawn
        background; colour, lighting, noise and defects are added.
fabric  Drawn by the program; no photograph.
gear    Drawn by the program; no photograph.

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
    painter = {"brick": _brick, "fabric": _fabric, "coin": _coin, "gear": _gear}[category]
    image = painter(scene, flaw, kind, size) * _light(scene, size)[..., None]
    grain = noise.normal(0, 2.4, (size, size, 1)) + noise.normal(0, 0.7, (size, size, 3))
    return np.clip(np.rint(image + grain), 0, 255).astype(np.uint8)


def _light(rng: Rng, size: int) -> Array:
    y, x = _grid(size) / 256 - 0.5
    turn, slope, level = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.18), rng.uniform(0.91, 1.07)
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


def _scratch(face: Array, rng: Rng, middle: Array, bright: float) -> Array:
    width = rng.uniform(3.4, 4.8)
    line = _walk(rng, middle, rng.uniform(85, 125), 0.05)
    face = face * (1 - 0.5 * _stroke(len(face), line + 0.7 * width, width))
    return face + (bright - face) * 0.85 * _stroke(len(face), line, width)


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
    where = _buckle(_grid(size), flaw) if kind == "buckled" else _grid(size)
    spots = where * scale + origin[:, None, None]
    wall, shade = (ndi.map_coordinates(a, spots, order=1) for a in _wall())
    mortar = _step(wall, 112, 165)
    image = (wall / 100 * shade)[..., None] * tint
    image = _mix(image, wall[..., None] * (1.08, 1.04, 0.97), mortar)
    if kind == "crack":
        line = _walk(flaw, flaw.uniform(90, 166, 2), flaw.uniform(170, 230), 0.4)
        image = _mix(image, (26, 20, 18), 0.92 * _stroke(size, line, flaw.uniform(4.6, 6.2)))
    if kind == "missing_mortar":
        image = _mix(image, (30, 24, 22), 0.93 * mortar * _joint(flaw, origin, scale, size))
    return image


def _buckle(where: Array, rng: Rng) -> Array:
    middle, radius = rng.uniform(75, 181, (2, 1, 1)), rng.uniform(54, 76)
    push = rng.choice([-1, 1]) * rng.uniform(15, 21)
    bump = (1 - ((where - middle) ** 2).sum(axis=0) / radius**2).clip(0) ** 2
    return where + push * bump * np.array([1, 0.3])[:, None, None]


def _joint(rng: Rng, origin: Array, scale: float, size: int) -> Array:
    """A soft band over part of one bed joint and the head joints that meet it."""
    joints = np.array([55, 106, 156, 208, 259, 315, 366, 419, 473, 526, 580])
    joints = (joints - origin[0]) / scale
    y = rng.choice(joints[(joints > 45) & (joints < 211)])
    middle, half = rng.uniform(80, 176), rng.uniform(38, 62)
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
    middle, radius = rng.uniform(60, 196, (2, 1, 1)), rng.uniform(12, 18)
    away, squash = where - middle, rng.uniform(0.75, 1.3)
    r = np.hypot(away[0] * squash, away[1] / squash)
    pull = radius * np.exp(-np.maximum(r - radius, 0) / (0.55 * radius))
    kept = 1 - np.minimum(pull / np.maximum(r, 1e-9), 0.96)
    return middle + away * kept, 1 - _step(r, radius - 2, radius + 1)


def _slip(v: Array, rng: Rng) -> tuple[Array, Array]:
    """Weave one pick out of step, and crowd its neighbours."""
    middle = int(v.min()) + rng.integers(5, 15) + 0.5
    bow = rng.uniform(0.3, 0.42) * np.exp(-(((v - middle) / 1.4) ** 2))
    v = v + bow * np.sin((v - middle) * 1.6)
    return v, np.floor(v) == middle - 0.5


def _lost(i: Array, j: Array, rng: Rng) -> Array:
    row = (j.min() + j.max()) // 2 + rng.integers(-6, 7)
    first, length = i.min() + rng.integers(2, 8), rng.integers(8, 13)
    return (j == row) & (i >= first) & (i < first + length)


@functools.cache
def _relief() -> tuple[Array, Array]:
    """One coin of the museum's photograph, as spline weights, and its cover; both (76, 76)."""
    photo = data.coins()[222:298, 8:84].astype(float)
    labels, _ = ndi.label(ndi.binary_opening(photo > 92, iterations=2))
    coin = ndi.binary_fill_holes(labels == labels[38, 38])
    coin = ndi.binary_opening(ndi.binary_closing(coin, iterations=3), iterations=6)
    return ndi.spline_filter(photo), ndi.gaussian_filter(coin.astype(float), 1.0)


def _coin(rng: Rng, flaw: Rng, kind: str, size: int) -> Array:
    turn, zoom, middle = rng.normal(0, 0.12), rng.uniform(3.1, 3.3), 128 + rng.uniform(-8, 8, 2)
    tint, felt = _tint(rng, (275, 255, 219), 0.04) / 255, _tint(rng, (62, 68, 76), 0.05)
    relief, tarnish = rng.uniform(0.9, 1.1), rng.normal(0, 8, (3, 3))
    where, shade = _dent(_grid(size), middle, flaw) if kind == "dent" else (_grid(size), 1.0)
    y, x = (where - middle[:, None, None]) / zoom
    spots = (
        38 + y * np.cos(turn) + x * np.sin(turn),
        38 + x * np.cos(turn) - y * np.sin(turn),
    )
    photo, cover = _relief()
    face = ndi.map_coordinates(photo, spots, order=3, prefilter=False, mode="nearest")
    face = 140 + relief * (face - 140)
    cover = _step(ndi.map_coordinates(cover, spots, order=1), 0.35, 0.65)
    if kind == "worn":
        face = _wear(face, flaw, middle)
    if kind == "scratch":
        face = _scratch(face, flaw, _around(flaw, middle, 5, 30), 235)
    face = face + ndi.zoom(tarnish, size / 3, order=1)
    return _mix(_cast(cover, felt, 0.6), (face * shade)[..., None] * tint, cover)


def _dent(where: Array, middle: Array, rng: Rng) -> tuple[Array, Array]:
    away = where - _around(rng, middle, 20, 50)[:, None, None]
    width = rng.uniform(15, 20)
    bump = np.exp(-(away**2).sum(axis=0) / (2 * width**2))
    slope = (away[0] + 0.7 * away[1]) / width * bump
    return where + 0.5 * away * bump, 1 + 0.5 * slope - 0.14 * bump


def _wear(face: Array, rng: Rng, middle: Array) -> Array:
    y, x = _grid(len(face)) - _around(rng, middle, 10, 42)[:, None, None]
    radius = rng.uniform(36, 50)
    soft = 1 - _step(np.hypot(y, x * rng.uniform(0.8, 1.2)), 0.6 * radius, 1.25 * radius)
    return face + (ndi.gaussian_filter(face, 11 * len(face) / 256) + 14 - face) * soft


def _gear(rng: Rng, flaw: Rng, kind: str, size: int) -> Array:
    turn, glint, middle = rng.normal(0, 0.05), rng.normal(0.8, 0.12), 128 + rng.uniform(-6, 6, 2)
    steel, bench = _tint(rng, (150, 156, 166), 0.02), _tint(rng, (206, 200, 188), 0.02)
    y, x = _grid(size) - middle[:, None, None]
    r, angle = np.hypot(y, x), np.arctan2(y, x) - turn
    cover = _plate(r, angle, flaw, kind)
    brush = np.sin(r * 1.9 + 2 * np.sin(r * 0.37)) / 45
    face = 1 + 0.2 * np.cos(2 * (angle + turn - glint)) + brush
    face = face * (1 - 0.22 * _step(r, 34, 37) * (1 - _step(r, 76, 79)))
    if kind == "scratch":
        face = _scratch(face, flaw, _around(flaw, middle, 30, 60), 1.6)
    soft = ndi.gaussian_filter(cover * (1 + 0.6 * (1 - _step(r, 35, 37))), 1.6 * size / 256)
    slopes = np.gradient(soft, 256 / size)
    face = (face + 1.6 * slopes[0] + 1.1 * slopes[1]).clip(0.15)
    metal = face[..., None] * steel
    if kind == "rust":
        metal = _mix(metal, (104, 58, 34), 0.9 * _blotch(flaw, middle, size))
    return _mix(_cast(cover, bench, 0.55), metal, cover)


def _blotch(rng: Rng, middle: Array, size: int) -> Array:
    """A ragged, mottled spot in 0..1 over the ring that carries the holes."""
    y, x = _grid(size) - _around(rng, middle, 45, 80)[:, None, None]
    rough = sum(ndi.zoom(rng.normal(0, 0.2, (n, n)), size / n, order=1) for n in (8, 16))
    return _step(1 - np.hypot(y, x) / rng.uniform(24, 36) + rough, 0.05, 0.6)


def _plate(r: Array, angle: Array, rng: Rng, kind: str) -> Array:
    """Cover of the cog wheel in 0..1: twelve teeth, six holes and a bore with a keyway."""
    teeth, edge = 12, 256 / len(r)
    tooth = angle * teeth / (2 * np.pi)
    height = _step(np.cos(2 * np.pi * tooth), -0.35, 0.45)
    if kind == "missing_tooth":
        away = np.abs((tooth - rng.integers(teeth) + teeth / 2) % teeth - teeth / 2)
        height = height * np.where(away < 0.5, rng.uniform(0, 0.25), 1)
    cover = 1 - _step(r - 83 - 24 * height, -edge, edge)
    for k in range(6):
        y, x = r * np.sin(angle - k * np.pi / 3), r * np.cos(angle - k * np.pi / 3) - 57
        cover = cover * _step(np.hypot(y, x) - 14, -edge, edge)
    key = np.maximum(np.abs(r * np.sin(angle)) - 6, np.abs(r * np.cos(angle) - 14) - 7)
    return cover * _step(np.minimum(r - 16, key), -edge, edge)
