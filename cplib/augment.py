"""The paper's idea: an image with an anomaly, made from a normal image and a patch of itself.

Each augmentation is a pure function of a batch x (B, 3, H, W) of floats in [0, 1], and of draws
u (B, k), uniform in [0, 1). The same draws make the same images on every device, up to rounding.
The number k is noted on the function (``@draws``). Every image has draws of its own; the batch is
not modified. Numbers of sections and appendices are the paper's.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

# Raise it when the same seed makes other batches: records and checkpoints carry it. Version 1 drew
# from the generator in each augmentation, and changed colours in random order.
DRAWS_VERSION = 2
# Chances of the two blobs that confetti adds and of the two that it subtracts. FCDD draws their
# numbers from Poisson distributions of means 0.9 and 0.6, but at least one: so often it draws two.
BLOB_CHANCE = (1.0, 0.23, 1.0, 0.12)


def draws(k: int) -> Callable[[Callable], Callable]:
    """Note on an augmentation that it takes k draws for each image."""

    def note(make: Callable) -> Callable:
        make.draws = k
        return make

    return note


def count(make: Callable) -> int:
    """How many draws an augmentation takes for each image."""
    return getattr(getattr(make, "func", make), "draws", 0)


def _columns(u: Tensor) -> tuple[Tensor, ...]:
    """The draws (B, k) as k tensors (B, 1)."""
    return u.unsqueeze(2).unbind(1)


def _between(low, high, u: Tensor) -> Tensor:
    """Floats, uniform in [low, high)."""
    return low + u * (high - low)


def _whole(low, high, u: Tensor) -> Tensor:
    """Whole numbers, as floats, uniform in low .. high."""
    return low + (u * (high - low + 1)).floor()


@draws(10)
def cutpaste(
    x: Tensor,
    u: Tensor,
    *,
    area: tuple[float, float] = (0.02, 0.15),
    aspect: tuple[float, float] = (0.3, 3.3),
    jitter: float = 0.1,
) -> Tensor:
    """Cut a rectangle, jitter its colours, paste it elsewhere in the same image (2.1, A.2).

    ``area`` is a share of the image. The aspect ratio (height / width) is drawn from
    (aspect[0], 1) or (1, aspect[1]), with equal chance. Raises ValueError if no patch fits.
    """
    size, shape, from_y, from_x, to_y, to_x = _columns(u[:, :6])
    height, width = _patch_size(x, area, aspect, size, shape)
    source, inside = _rectangle(x, height, width, area[1], from_y, from_x)
    target, _ = _rectangle(x, height, width, area[1], to_y, to_x)
    patch = _recoloured(_read(x, source), u[:, 6:], jitter, inside)
    return _write(x, target, inside, patch)


def _patch_size(x, area, aspect, size, shape) -> tuple[Tensor, Tensor]:
    """Heights and widths (B, 1) in pixels. Areas are in their range; aspect ratios are rounded."""
    h, w = x.shape[2:]
    low, high = area[0] * h * w, area[1] * h * w
    if high < 1:
        raise ValueError(f"an image of {h}x{w} pixels is too small for a patch of {area[1]:.0%}")
    size = _between(low, high, size)
    below, above = _between(aspect[0], 1, 2 * shape), _between(1, aspect[1], 2 * shape - 1)
    ratio = torch.where(shape < 0.5, below, above)  # height / width
    width = (size / ratio).sqrt().round().clamp(1, w)
    height = (size / width).round().clamp(min=torch.ceil(low / width), max=(high / width).floor())
    return height.clamp(1, h), width


def _rectangle(x, height, width, largest, y, left) -> tuple[Tensor, Tensor]:
    """The positions (B, K) of the pixels of rectangles inside the image, placed by two draws.

    Positions count the image's pixels row by row. K is the number of pixels of the ``largest``
    rectangle, a share of the image. The mask (B, K) says which are the rectangle's.
    """
    h, w = x.shape[2:]
    k = torch.arange(int(largest * h * w + 1e-6), device=x.device)  # 0.15 * 180 is 26.999...
    row, column = k.div(width, rounding_mode="floor"), k.remainder(width)
    inside = row < height
    position = (_whole(0, h - height, y) + row) * w + _whole(0, w - width, left) + column
    return torch.where(inside, position, 0).long(), inside


@draws(11)
def cutpaste_scar(
    x: Tensor,
    u: Tensor,
    *,
    width: tuple[float, float] = (2, 16),
    length: tuple[float, float] = (10, 25),
    angle: float = 45.0,
    jitter: float = 0.1,
) -> Tensor:
    """Cut a long, thin rectangle, jitter its colours, rotate it, paste it elsewhere (2.2, A.2).

    ``width`` and ``length`` are in pixels. The rotation is drawn from -angle to angle, in degrees.
    Raises ValueError if a scar can be larger than the image.
    """
    h, w = x.shape[2:]
    from_y, from_x = _columns(u[:, 5:7])
    wide, long, target, inside, across, along = _scar(x, width, length, angle, u[:, :5])
    column = (across + wide / 2).floor().clamp(min=0).minimum(wide - 1)
    row = (along + long / 2).floor().clamp(min=0).minimum(long - 1)
    source = (_whole(0, h - long, from_y) + row) * w + _whole(0, w - wide, from_x) + column
    patch = _recoloured(_read(x, source.long()), u[:, 7:], jitter, inside)
    return _write(x, target, inside, patch)


def _scar(x, width, length, angle, u) -> tuple[Tensor, ...]:
    """Rotated scars at random places inside the image, by five draws.

    Returns widths and lengths (B, 1) in whole pixels. Then, of a square of K pixels round each
    scar: positions (B, K) in the image, row by row; which of them the scar covers; and their
    coordinates in the scar's own frame, across and along it, in pixels from its centre.
    """
    h, w = x.shape[2:]
    if math.hypot(width[1], length[1]) > min(h, w):
        raise ValueError(
            f"an image of {h}x{w} pixels is too small for a scar of {width[1]:g}x{length[1]:g}"
        )
    (thinnest, widest), (shortest, longest) = (
        (max(1, round(low)), max(1, round(high))) for low, high in (width, length)
    )
    wide, long, turn, y, left = _columns(u)
    wide, long = _whole(thinnest, widest, wide), _whole(shortest, longest, long)
    turn = torch.deg2rad(_between(-angle, angle, turn))
    cos, sin = turn.cos(), turn.sin()
    half_y = (long * cos.abs() + wide * sin.abs()) / 2
    half_x = (long * sin.abs() + wide * cos.abs()) / 2
    centre_y, centre_x = _between(half_y, h - half_y, y), _between(half_x, w - half_x, left)
    side = math.ceil(math.hypot(widest, longest)) + 1
    k = torch.arange(side * side, device=x.device)
    row = (centre_y - side / 2).floor() + k // side
    column = (centre_x - side / 2).floor() + k % side
    dy, dx = row + 0.5 - centre_y, column + 0.5 - centre_x
    across, along = cos * dx + sin * dy, cos * dy - sin * dx
    inside = (across.abs() < wide / 2) & (along.abs() < long / 2)
    target = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).long()
    return wide, long, target, inside, across, along


def _read(x: Tensor, source: Tensor) -> Tensor:
    """The pixels (B, C, K) at the positions ``source`` (B, K), counted row by row."""
    return x.flatten(2).gather(2, source.unsqueeze(1).expand(-1, x.shape[1], -1))


def _write(x: Tensor, target: Tensor, inside: Tensor, patch: Tensor) -> Tensor:
    """The images with ``patch`` (B, C, K or 1) written to ``target`` (B, K), where ``inside``."""
    h, w = x.shape[2:]
    # Pixels outside the patch are written to one extra pixel: no branch, no GPU sync.
    target = torch.where(inside, target, h * w).unsqueeze(1).expand(-1, x.shape[1], -1)
    padded = F.pad(x.flatten(2), (0, 1)).scatter(2, target, patch.to(x.dtype).expand(target.shape))
    return padded[..., : h * w].unflatten(2, (h, w))


def _recoloured(patch: Tensor, u: Tensor, strength: float, inside: Tensor) -> Tensor:
    """``jitter`` of a patch, all four changes of one strength."""
    return jitter(patch, u, strength=(strength,) * 4, weight=inside)


@draws(1 + cutpaste.draws + cutpaste_scar.draws)
def cutpaste_union(
    x: Tensor, u: Tensor, *, patch: dict | None = None, thin: dict | None = None
) -> Tensor:
    """CutPaste or CutPaste-scar, with equal chance for each image (5.2).

    ``patch`` holds options of CutPaste, ``thin`` those of CutPaste-scar.
    """
    choice, first, second = u.split([1, cutpaste.draws, cutpaste_scar.draws], 1)
    pasted, scarred = cutpaste(x, first, **(patch or {})), cutpaste_scar(x, second, **(thin or {}))
    return torch.where(choice.view(-1, 1, 1, 1) < 0.5, pasted, scarred)


@draws(7)
def cutout(
    x: Tensor,
    u: Tensor,
    *,
    fill: str = "grey",
    area: tuple[float, float] = (0.02, 0.15),
    aspect: tuple[float, float] = (0.3, 3.3),
) -> Tensor:
    """Fill a rectangle of CutPaste's sizes with one colour (4.1, 5.1).

    ``fill`` is "grey", "mean" (the image's mean colour) or "color" (a random one).
    """
    size, shape, y, left = _columns(u[:, :4])
    height, width = _patch_size(x, area, aspect, size, shape)
    target, inside = _rectangle(x, height, width, area[1], y, left)
    colours = {
        "grey": lambda: x.new_full((1, 1, 1), 0.5),
        "mean": lambda: x.mean((2, 3))[..., None],
        "color": lambda: u[:, 4:, None],
    }
    return _write(x, target, inside, colours[fill]())


@draws(8)
def scar(
    x: Tensor,
    u: Tensor,
    *,
    width: tuple[float, float] = (2, 16),
    length: tuple[float, float] = (10, 25),
    angle: float = 45.0,
) -> Tensor:
    """Draw a long, thin, rotated rectangle of one random colour (2.2, 4.1)."""
    _, _, target, inside, _, _ = _scar(x, width, length, angle, u[:, :5])
    return _write(x, target, inside, u[:, 5:, None])


@draws(9 * len(BLOB_CHANCE))
def confetti(
    x: Tensor,
    u: Tensor,
    *,
    side: tuple[float, float] = (9, 62),
    angle: float = 45.0,
    blur: float = 5.7,
) -> Tensor:
    """Add a few rotated, blurred rectangles of colour: the confetti noise of FCDD, cited in 5.1.

    One or two have a random colour and are added. One or two are subtracted from every channel.
    They may cross the border. ``side`` and ``blur``, a standard deviation, are in pixels: FCDD's 8
    to 54 and 5 of 224 pixels, scaled to 256. Rotations are from -angle to angle, in degrees.
    """
    from torchvision.transforms.functional import gaussian_blur  # here: it takes a second

    h, w = x.shape[2:]
    u = u.view(len(x), len(BLOB_CHANCE), 9, 1, 1)  # of each blob
    turn, y, left, width, length, there = u[:, :, :6].unbind(2)
    turn = torch.deg2rad(_between(-angle, angle, turn))
    dy = torch.arange(h, device=x.device).view(-1, 1) + 0.5 - h * y
    dx = torch.arange(w, device=x.device) + 0.5 - w * left
    across = (turn.cos() * dx + turn.sin() * dy).abs() < _between(*side, width) / 2
    along = (turn.cos() * dy - turn.sin() * dx).abs() < _between(*side, length) / 2
    noise = torch.zeros_like(x)
    for k, chance in enumerate(BLOB_CHANCE):
        blob = across[:, k] & along[:, k] & (there[:, k] < chance)
        noise += blob.unsqueeze(1) * (u[:, k, 6:] if k < len(BLOB_CHANCE) / 2 else -1)
    kernel = 2 * round(2.5 * blur) + 1  # FCDD's 25 pixels for 5
    return (x + gaussian_blur(noise, kernel, blur)).clamp(0, 1)


def rotate(quarters: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The augmentation that rotates square images by so many quarters of a turn (4.1)."""
    return lambda x, u: x.rot90(quarters, (2, 3))


@draws(4)
def jitter(
    x: Tensor,
    u: Tensor,
    *,
    strength: tuple[float, float, float, float],
    weight: Tensor | None = None,
) -> Tensor:
    """Change brightness, contrast, saturation and hue at random, in this order (A.1, A.2).

    The paper names no order: this one is our choice. ``x`` is (B, 3, ...) in [0, 1]. ``strength``
    holds the largest change of each, at most 1, as in torchvision's ColorJitter. ``weight``
    (B, ...) says which pixels count in the mean that contrast needs.
    """
    if not any(strength):
        return x
    change = (2 * u - 1).to(x.dtype).view(-1, 4, *[1] * (x.dim() - 1)).unbind(1)
    brightness, contrast, saturation, hue = (s * c for s, c in zip(strength, change, strict=True))
    x = (x * (1 + brightness)).clamp(0, 1)
    x = torch.lerp(_mean(_grey(x), weight), x, 1 + contrast).clamp(0, 1)
    x = torch.lerp(_grey(x), x, 1 + saturation).clamp(0, 1)
    return shift_hue(x, hue) if strength[3] else x


def _grey(x: Tensor) -> Tensor:
    """The luma (B, 1, ...) of images (B, 3, ...)."""
    red, green, blue = x.split(1, 1)
    return (0.299 * red).add(green, alpha=0.587).add(blue, alpha=0.114)


def _mean(grey: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of each image (B, 1, ...), in which ``weight`` (B, ...) says which pixels count."""
    dims = tuple(range(1, grey.dim()))
    if weight is None:
        return grey.mean(dims, keepdim=True)
    weight = weight.unsqueeze(1).to(grey.dtype)
    return (grey * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True).clamp(min=1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of images (B, 3, ...) by ``shift`` turns (HSV). Value and saturation stay."""
    value, lowest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - lowest
    red, green, blue = x.split(1, 1)
    scale = chroma.clamp(min=1e-8)
    hue = torch.where(
        value == red,
        (green - blue) / scale,
        torch.where(value == green, 2 + (blue - red) / scale, 4 + (red - green) / scale),
    )
    k = torch.cat([hue + n for n in (5, 3, 1)], 1) + 6 * shift
    k = k.remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


@draws(4)
def shift_and_crop(x: Tensor, u: Tensor, *, share: float = 0.125, side: int = 0) -> Tensor:
    """Shift every image by up to ``share`` of its sides. The border is reflected (A.1).

    With ``side``, keep a square of so many pixels of it, at a random place (eq. 3). Raises
    ValueError if an image is smaller.
    """
    h, w = x.shape[2:]
    if side > min(h, w):
        raise ValueError(f"an image of {h}x{w} pixels is smaller than a {side}-px patch")
    down, right, top, left = _columns(u)
    rows = _kept(h, side or h, share, down, top)
    columns = _kept(w, side or w, share, right, left)
    flat = (rows.unsqueeze(2) * w + columns.unsqueeze(1)).flatten(1)
    return _read(x, flat).unflatten(2, (rows.shape[1], columns.shape[1]))


def _kept(n: int, side: int, share: float, shift: Tensor, start: Tensor) -> Tensor:
    """Which of n rows or columns stay (B, side): shifted, cut, and reflected at both ends."""
    reach = round(share * n)
    first = _whole(-reach, reach, shift) + _whole(0, n - side, start)
    position = (first.long() + torch.arange(side, device=first.device)).abs()
    return (n - 1) - ((n - 1) - position).abs()


def normal(x: Tensor, u: Tensor) -> Tensor:
    """The image as it is: class 0 of every method."""
    return x


# A method is a list of classes: the i-th function makes the images of class i of the pretext task.
METHODS = {
    "rotation": {f"rotate_{90 * k}": rotate(k) for k in range(4)},
    "cutout": {"normal": normal, "cutout": cutout},
    "cutout_mean": {"normal": normal, "cutout": partial(cutout, fill="mean")},
    "cutout_color": {"normal": normal, "cutout": partial(cutout, fill="color")},
    "scar": {"normal": normal, "scar": scar},
    "confetti": {"normal": normal, "confetti": confetti},
    "cutpaste": {"normal": normal, "cutpaste": cutpaste},
    "cutpaste_scar": {"normal": normal, "cutpaste_scar": cutpaste_scar},
    "cutpaste_union": {"normal": normal, "cutpaste_union": cutpaste_union},
    "cutpaste_3way": {"normal": normal, "cutpaste": cutpaste, "cutpaste_scar": cutpaste_scar},
}


def pretext_batch(
    x: Tensor, u: Tensor, method: str, options: dict[str, dict] | None = None
) -> tuple[Tensor, Tensor]:
    """The batch of the pretext task (eq. 1): every image once in each of the K classes.

    Returns images (K * B, 3, H, W) and labels (K * B,). The draws u are ``draws_of(method)`` for
    each image. ``options`` holds options of augmentations by their names:
    ``{"cutpaste": {"area": (0.02, 0.3)}}``.
    """
    options, classes = options or {}, METHODS[method]
    parts = u.split([count(make) for make in classes.values()], 1)
    images = [
        make(x, part, **options.get(name, {}))
        for (name, make), part in zip(classes.items(), parts, strict=True)
    ]
    labels = torch.arange(len(classes), device=x.device).repeat_interleave(len(x))
    return torch.cat(images), labels


def draws_of(method: str) -> int:
    """How many draws a method's classes take for each image."""
    return sum(map(count, METHODS[method].values()))


def example_batch(
    x: Tensor, method: str, options: dict[str, dict] | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """``pretext_batch`` with draws of a seed, the same on every device."""
    u = torch.rand(len(x), draws_of(method), generator=torch.Generator().manual_seed(seed))
    return pretext_batch(x, u.to(x.device), method, options)


def pasted_copies(normal: Tensor, options: dict[str, dict], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A CutPaste and a CutPaste-scar copy of each normal image, uint8 (N, 3, H, W) each.

    The images themselves are not shifted and not jittered. ``options`` are those of
    ``pretext_batch``.
    """
    images, _ = example_batch(normal.float() / 255, "cutpaste_3way", options, seed)
    _, patch, scar = (255 * images).round().to(torch.uint8).chunk(3)
    return patch, scar
