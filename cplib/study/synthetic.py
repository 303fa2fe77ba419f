"""Synthetic anomalies on normal images (section 5.3, Fig. 6): digits, squares, ellipses, hearts.

Filled with one random colour, or with a piece of a natural image: `skimage.data.astronaut`
(NASA, public domain), `chelsea` and `coffee` (CC0) and `rocket` (SpaceX, public domain), which
scikit-image ships. Its brick wall is left out: the demo set is made of it.
Nothing here is shared with the augmentations that are put to the test on these anomalies.
How large they are, and where, the paper does not say: one in an image, anywhere, turned at random.
"""

import functools

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, zeros

from cplib.settings import setting

Array = np.ndarray
Rng = np.random.Generator

SHAPES = ("digit", "square", "ellipse", "heart")
FILLS = {"color": "one colour", "natural": "natural image"}  # with words for people
# Table 6's columns: a shape and its filling.
SYNTHETIC = (
    *(f"{shape}_color" for shape in SHAPES),
    *(f"{shape}_natural" for shape in SHAPES[1:]),
)
SIDE = (1 / 16, 1 / 8)  # of a shape's box, a share of the image's shorter side
SMALLEST = 4  # pixels: below, the shapes are all alike


def paint(
    pixels: Tensor, shape: str, fill: str, *, least: int = 40, side: tuple[float, float] = SIDE
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), uint8, with anomalies painted in (M, 3, H, W); masks (M, H, W), bool.

    M is the smallest multiple of N that is at least ``least``: image i is normal image i modulo N.
    Place, size and turn depend on i alone, so that they are the same for every shape and fill.
    Digits stand upright. Raises ValueError for what cannot be painted.
    """
    if shape not in SHAPES or fill not in FILLS:
        raise ValueError(f"no {shape!r} {fill!r}: {', '.join(SHAPES)}; {', '.join(FILLS)}")
    height, width = pixels.shape[2:]
    if not len(pixels) or side[0] * min(height, width) < SMALLEST:
        raise ValueError(
            f"{len(pixels)} images of {height}x{width} pixels: too few, or too small for shapes "
            f"of {side[0]:.0%} of a side"
        )
    painted = pixels.repeat(-(-least // len(pixels)), 1, 1, 1)
    masks = zeros(len(painted), height, width, dtype=bool)
    for i, (image, mask) in enumerate(zip(painted.numpy(), masks.numpy(), strict=True)):
        _add(image, mask, shape, fill, side, np.random.default_rng([0, i, 0]))
    return painted, masks


def _add(image: Array, mask: Array, shape: str, fill: str, side, rng: Rng) -> None:
    """Paint one shape into an image (3, H, W) and its mask (H, W), in place."""
    short = min(mask.shape)
    side = round(rng.uniform(*side) * short)
    y, x = (rng.integers(0, length - side + 1) for length in mask.shape)
    turn = rng.uniform(-np.pi, np.pi)
    inside = _digit(side, rng) if shape == "digit" else outline(shape, side, turn)
    filling = rng.integers(256, size=(3, 1, 1)) if fill == "color" else _piece(side, short, rng)
    window = image[:, y : y + side, x : x + side]
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


def _digit(side: int, rng: Rng) -> Array:
    """A random handwritten digit, (side, side) bool: ink at half strength or more."""
    digits = digit_images()
    ink = Image.fromarray(digits[rng.integers(len(digits))])
    ink = np.asarray(ink.resize((side, side), Image.Resampling.BICUBIC))
    return ink >= ink.max() / 2


@functools.cache
def digit_images() -> Array:
    """Handwritten digits, (N, H, W) uint8: scikit-learn's of 8x8 pixels, or MNIST's test digits.

    MNIST is taken where $CPLIB_MNIST names torchvision's folder of it, and never downloaded;
    ValueError where it is not there.
    """
    folder = setting("CPLIB_MNIST")
    if not folder:
        return (load_digits().images * 255 / 16).astype(np.uint8)
    import torchvision

    try:
        return torchvision.datasets.MNIST(folder, train=False).data.numpy()
    except RuntimeError:
        raise ValueError(
            f"no MNIST, as torchvision unpacks it, in CPLIB_MNIST={folder!r}"
        ) from None


def _piece(side: int, short: int, rng: Rng) -> Array:
    """A random piece of a random natural image, (3, side, side)."""
    photos = natural_images(short)
    photo = photos[rng.integers(len(photos))]
    y, x = (rng.integers(length - side + 1) for length in photo.shape[1:])
    return photo[:, y : y + side, x : x + side]


@functools.cache
def natural_images(short: int) -> tuple[Array, ...]:
    """The natural images, each (3, H, W) uint8 with ``short`` pixels on its shorter side."""
    found = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = Image.fromarray(getattr(skimage.data, name)())
        size = [round(length * short / min(photo.size)) for length in photo.size]
        photo = photo.resize(size, Image.Resampling.LANCZOS)
        found.append(np.ascontiguousarray(np.asarray(photo).transpose(2, 0, 1)))
    return tuple(found)
