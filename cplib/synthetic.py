"""Synthetic anomalies on normal pictures (section 5.3, Fig. 6): digits, squares, ellipses, hearts.

Filled with one random colour, or with a piece of a natural picture: `skimage.data.astronaut`
(NASA, public domain), `chelsea` and `coffee` (CC0) and `rocket` (SpaceX, public domain), which
scikit-image ships. Its brick wall is left out: the demo set is made of it.
Nothing here is shared with the augmentations that are put to the test on these anomalies.
"""

import functools
import os
from dataclasses import dataclass

import numpy as np
import skimage.data
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, zeros

from cplib.config import named

Array = np.ndarray
Rng = np.random.Generator

SHAPES = ("digit", "square", "ellipse", "heart")
FILLS = ("color", "natural")
SMALLEST = 4  # pixels: below, the shapes are all alike


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """How many anomalies, how large and where: the paper says none of it, the choices are ours."""

    side: tuple[float, float] = (0.1, 0.3)  # of a shape's box, a share of the shorter side
    margin: float = 0.0  # kept free along the edges, a share of the shorter side
    count: int = 1  # shapes in a picture
    turn: float = 180.0  # degrees either way; digits stand upright, as in MNIST
    digits: str = "sklearn"  # or "mnist", from the folder that $CPLIB_MNIST names
    least: int = 40  # pictures to paint: each normal one as often as that takes
    seed: int = 0

    def __post_init__(self):
        """Refuse what cannot be painted, in one line."""
        low, high = self.side
        if not 0 < low <= high or self.margin < 0 or high + 2 * self.margin > 1:
            raise ValueError(
                f"side {self.side} and margin {self.margin}: shares of a picture, "
                "0 < low <= high, with room for high + 2 margin"
            )
        if self.count < 1 or self.least < 1:
            raise ValueError(f"count and least must be at least 1: {self.count}, {self.least}")
        if self.digits not in ("sklearn", "mnist"):
            raise ValueError(f"unknown digits {self.digits!r}: one of sklearn, mnist")

    @property
    def id(self) -> str:
        """Name of the record of these anomalies: "synthetic", and a hash where not the default."""
        return named("synthetic", self)


def paint(pixels: Tensor, shape: str, fill: str, anomaly: Anomaly) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, H, W), uint8, with anomalies painted in (M, 3, H, W); masks (M, H, W), bool.

    M is the least multiple of N that ``anomaly.least`` asks for: picture i is normal picture i
    modulo N. Place, size and turn depend on the seed and i alone, so that they are the same for
    every shape and fill. Raises ValueError for what cannot be painted.
    """
    if shape not in SHAPES or fill not in FILLS:
        raise ValueError(f"no {shape!r} {fill!r}: {', '.join(SHAPES)}; {', '.join(FILLS)}")
    height, width = pixels.shape[2:]
    if not len(pixels) or anomaly.side[0] * min(height, width) < SMALLEST:
        raise ValueError(
            f"{len(pixels)} pictures of {height}x{width} pixels: too few, or too small for shapes "
            f"of {anomaly.side[0]:.0%} of a side"
        )
    painted = pixels.repeat(-(-anomaly.least // len(pixels)), 1, 1, 1)
    masks = zeros(len(painted), height, width, dtype=bool)
    for i, (picture, mask) in enumerate(zip(painted.numpy(), masks.numpy(), strict=True)):
        for k in range(anomaly.count):
            _add(picture, mask, shape, fill, anomaly, np.random.default_rng([anomaly.seed, i, k]))
    return painted, masks


def _add(picture: Array, mask: Array, shape: str, fill: str, anomaly: Anomaly, rng: Rng) -> None:
    """Paint one shape into a picture (3, H, W) and its mask (H, W), in place."""
    short = min(mask.shape)
    side = round(rng.uniform(*anomaly.side) * short)
    free = int(anomaly.margin * short)
    y, x = (rng.integers(free, length - free - side + 1) for length in mask.shape)
    turn = np.deg2rad(rng.uniform(-anomaly.turn, anomaly.turn))
    inside = _digit(side, anomaly.digits, rng) if shape == "digit" else outline(shape, side, turn)
    filling = rng.integers(256, size=(3, 1, 1)) if fill == "color" else _piece(side, short, rng)
    window = picture[:, y : y + side, x : x + side]
    np.copyto(window, filling.astype(np.uint8), where=inside)
    mask[y : y + side, x : x + side] |= inside


def outline(shape: str, side: int, turn: float = 0.0) -> Array:
    """A square, 2:1 ellipse or heart, turned by ``turn`` radians: (side, side) bool.

    It just fits the circle in the box, so that no turn cuts it off.
    """
    v, u = (2 * np.indices((side, side)) + 1) / side - 1
    x = u * np.cos(turn) + v * np.sin(turn)
    y = u * np.sin(turn) - v * np.cos(turn)  # up
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= np.sqrt(0.5)
    if shape == "ellipse":
        return x**2 + 4 * y**2 <= 1
    x, y = 1.25 * x, 1.25 * y + 0.25  # the circle around the curve below
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


def _digit(side: int, source: str, rng: Rng) -> Array:
    """A random handwritten digit, (side, side) bool: ink at half strength or more."""
    digits = digit_pictures(source)
    ink = Image.fromarray(digits[rng.integers(len(digits))])
    ink = np.asarray(ink.resize((side, side), Image.Resampling.BICUBIC))
    return ink >= ink.max() / 2


@functools.cache
def digit_pictures(source: str) -> Array:
    """Handwritten digits, (N, H, W) uint8: scikit-learn's of 8x8 pixels, or MNIST's test digits.

    MNIST is read where torchvision left it under $CPLIB_MNIST and never downloaded; ValueError
    where it is not.
    """
    if source == "sklearn":
        return (load_digits().images * 255 / 16).astype(np.uint8)
    folder = os.environ.get("CPLIB_MNIST", "")
    try:
        return torchvision.datasets.MNIST(folder, train=False).data.numpy()
    except RuntimeError:
        raise ValueError(
            f"no MNIST, as torchvision unpacks it, in CPLIB_MNIST={folder!r}"
        ) from None


def _piece(side: int, short: int, rng: Rng) -> Array:
    """A random piece of a random natural picture, (3, side, side)."""
    photos = natural_pictures(short)
    photo = photos[rng.integers(len(photos))]
    y, x = (rng.integers(length - side + 1) for length in photo.shape[1:])
    return photo[:, y : y + side, x : x + side]


@functools.cache
def natural_pictures(short: int) -> tuple[Array, ...]:
    """The natural pictures, each (3, H, W) uint8 with ``short`` pixels on its shorter side."""
    found = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = Image.fromarray(getattr(skimage.data, name)())
        size = [round(length * short / min(photo.size)) for length in photo.size]
        photo = photo.resize(size, Image.Resampling.LANCZOS)
        found.append(np.ascontiguousarray(np.asarray(photo).transpose(2, 0, 1)))
    return tuple(found)
