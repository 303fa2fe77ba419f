"""The paper's idea: an image with an anomaly, made from a normal image and a patch of itself.

Each augmentation is a pure function of a batch (B, 3, H, W) of floats in [0, 1] and of a
``torch.Generator``. It works on the whole batch, on the batch's device, and draws anew for every
image. It does not modify the batch. Numbers of sections and appendices are the paper's.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey
# Chances of the two blobs that confetti adds and of the two that it subtracts. FCDD draws their
# numbers from Poisson distributions of means 0.9 and 0.6, but at least one: so often it draws two.
BLOB_CHANCE = (1.0, 0.23, 1.0, 0.12)


def _uniform(low, high, n: int, generator: torch.Generator) -> Tensor:
    """(n, 1) floats, uniform in [low, high)."""
    draw = torch.rand(n, 1, generator=generator, device=generator.device)
    return low + draw * (high - low)


def _corner(space: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 1) integers, uniform in 0 .. space."""
    return (_uniform(0, 1, len(space), generator) * (space + 1)).floor().clamp(max=space).long()


def cutpaste(
    x: Tensor,
    generator: torch.Generator,
    *,
    area: tuple[float, float] = (0.02, 0.15),
    aspect: tuple[float, float] = (0.3, 3.3),
    jitter: float = 0.1,
) -> Tensor:
    """Cut a rectangle, jitter its colours, paste it elsewhere in the same image (2.1, A.2).

    ``area`` is a share of the image. The aspect ratio (height / width) is drawn from
    (aspect[0], 1) or (1, aspect[1]), with equal chance. Raises ValueError if no patch fits.
    """
    height, width = _patch_sizes(x, area, aspect, generator)
    source, inside = _placed(x, height, width, area[1], generator)
    target, _ = _placed(x, height, width, area[1], generator)
    return _write(x, target, inside, _jittered(_read(x, source), inside, jitter, generator))


def _placed(x, height, width, largest, generator) -> tuple[Tensor, Tensor]:
    """Put rectangles at random places inside the image, and return the positions of their pixels.

    Positions (B, K) count the image's pixels row by row. K is the number of pixels of the
    ``largest`` rectangle, a share of the image. The mask (B, K) says which are the rectangle's.
    """
    h, w = x.shape[2:]
    y, left = _corner(h - height, generator), _corner(w - width, generator)
    k = torch.arange(int(largest * h * w + 1e-6), device=x.device)  # 0.15 * 180 is 26.999...
    row, column = k // width, k % width
    inside = row < height
    return torch.where(inside, (y + row) * w + left + column, 0), inside


def _patch_sizes(x, area, aspect, generator) -> tuple[Tensor, Tensor]:
    """Heights and widths (B, 1) in pixels. Areas are in their range; aspect ratios are rounded."""
    n, _, h, w = x.shape
    low, high = area[0] * h * w, area[1] * h * w
    if high < 1:
        raise ValueError(f"an image of {h}x{w} pixels is too small for a patch of {area[1]:.0%}")
    size = _uniform(low, high, n, generator)
    wide = _uniform(0, 1, n, generator) < 0.5
    below, above = _uniform(aspect[0], 1, n, generator), _uniform(1, aspect[1], n, generator)
    ratio = torch.where(wide, below, above)  # height / width
    width = (size / ratio).sqrt().round().clamp(1, w)
    height = (size / width).round().clamp(min=torch.ceil(low / width), max=(high / width).floor())
    return height.clamp(1, h).long(), width.long()


def cutpaste_scar(
    x: Tensor,
    generator: torch.Generator,
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
    scar_w, scar_l, turn = _scar_sizes(x, width, length, angle, generator)
    target, inside, u, v = _scar_target(x, scar_w, scar_l, turn, (width[1], length[1]), generator)
    y, left = _corner(h - scar_l, generator), _corner(w - scar_w, generator)
    column = (u + scar_w / 2).floor().clamp(min=0).minimum(scar_w - 1).long()
    row = (v + scar_l / 2).floor().clamp(min=0).minimum(scar_l - 1).long()
    patch = _read(x, (y + row) * w + left + column)
    return _write(x, target, inside, _jittered(patch, inside, jitter, generator))


def _scar_sizes(x, width, length, angle, generator) -> tuple[Tensor, Tensor, Tensor]:
    """Widths and lengths (B, 1) in whole pixels, and rotations (B, 1) in radians."""
    n, _, h, w = x.shape
    if math.hypot(width[1], length[1]) > min(h, w):
        raise ValueError(
            f"an image of {h}x{w} pixels is too small for a scar of {width[1]:g}x{length[1]:g}"
        )
    scar_w, scar_l = (
        _uniform(max(1, round(low)), round(high) + 1, n, generator).floor()
        for low, high in (width, length)
    )
    return scar_w, scar_l, torch.deg2rad(_uniform(-angle, angle, n, generator))


def _scar_target(x, scar_w, scar_l, turn, largest, generator) -> tuple[Tensor, ...]:
    """Put rotated scars at random places inside the image; look at a square of K pixels round each.

    Returns the positions (B, K) of these pixels in the image, row by row; which of them the scar
    covers; and their coordinates in the scar's own frame: ``u`` across and ``v`` along it, in
    pixels from its centre.
    """
    n, _, h, w = x.shape
    cos, sin = turn.cos(), turn.sin()
    half_y = (scar_l * cos.abs() + scar_w * sin.abs()) / 2
    half_x = (scar_l * sin.abs() + scar_w * cos.abs()) / 2
    centre_y = _uniform(half_y, h - half_y, n, generator)
    centre_x = _uniform(half_x, w - half_x, n, generator)
    side = math.ceil(math.hypot(*(max(1, round(v)) for v in largest))) + 1
    k = torch.arange(side * side, device=x.device)
    y = (centre_y - side / 2).floor() + k // side
    column = (centre_x - side / 2).floor() + k % side
    dy, dx = y + 0.5 - centre_y, column + 0.5 - centre_x
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    flat = y.clamp(0, h - 1).long() * w + column.clamp(0, w - 1).long()
    return flat, (u.abs() < scar_w / 2) & (v.abs() < scar_l / 2), u, v


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


def _jittered(patch: Tensor, inside: Tensor, strength: float, generator) -> Tensor:
    """``jitter`` of a patch, all four changes of one strength."""
    return jitter(patch, generator, strength=(strength,) * 4, weight=inside)


def cutpaste_union(
    x: Tensor, generator: torch.Generator, *, patch: dict | None = None, thin: dict | None = None
) -> Tensor:
    """CutPaste or CutPaste-scar, with equal chance for each image (5.2).

    ``patch`` holds options of CutPaste, ``thin`` those of CutPaste-scar.
    """
    pasted = cutpaste(x, generator, **(patch or {}))
    scarred = cutpaste_scar(x, generator, **(thin or {}))
    return torch.where((_uniform(0, 1, len(x), generator) < 0.5).view(-1, 1, 1, 1), pasted, scarred)


def cutout(
    x: Tensor,
    generator: torch.Generator,
    *,
    fill: str = "grey",
    area: tuple[float, float] = (0.02, 0.15),
    aspect: tuple[float, float] = (0.3, 3.3),
) -> Tensor:
    """Fill a rectangle of CutPaste's sizes with one colour (4.1, 5.1).

    ``fill`` is "grey", "mean" (the image's mean colour) or "color" (a random one).
    """
    height, width = _patch_sizes(x, area, aspect, generator)
    target, inside = _placed(x, height, width, area[1], generator)
    colours = {
        "grey": lambda: x.new_full((1, 1, 1), 0.5),
        "mean": lambda: x.mean((2, 3))[..., None],
        "color": lambda: _colour(x, generator),
    }
    return _write(x, target, inside, colours[fill]())


def _colour(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random colour for each image, (B, C, 1)."""
    return torch.rand(*x.shape[:2], 1, generator=generator, device=x.device).to(x.dtype)


def confetti(
    x: Tensor,
    generator: torch.Generator,
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

    (n, _, h, w), blobs = x.shape, len(BLOB_CHANCE)

    def draw(low: float, high: float) -> Tensor:
        return _uniform(low, high, n * blobs, generator).view(n, blobs, 1, 1)

    turn = torch.deg2rad(draw(-angle, angle))
    dy = torch.arange(h, device=x.device).view(-1, 1) + 0.5 - draw(0, h)
    dx = torch.arange(w, device=x.device) + 0.5 - draw(0, w)
    across = (turn.cos() * dx + turn.sin() * dy).abs() < draw(*side) / 2
    along = (turn.cos() * dy - turn.sin() * dx).abs() < draw(*side) / 2
    there = draw(0, 1) < torch.tensor(BLOB_CHANCE, device=x.device).view(-1, 1, 1)
    shift = torch.rand(n, blobs, 3, generator=generator, device=x.device)
    shift[:, blobs // 2 :] = -1
    noise = torch.einsum("nkhw,nkc->nchw", (across & along & there).to(x.dtype), shift.to(x.dtype))
    kernel = 2 * round(2.5 * blur) + 1  # FCDD's 25 pixels for 5
    return (x + gaussian_blur(noise, kernel, blur)).clamp(0, 1)


def scar(
    x: Tensor,
    generator: torch.Generator,
    *,
    width: tuple[float, float] = (2, 16),
    length: tuple[float, float] = (10, 25),
    angle: float = 45.0,
) -> Tensor:
    """Draw a long, thin, rotated rectangle of one random colour (2.2, 4.1)."""
    sizes = _scar_sizes(x, width, length, angle, generator)
    target, inside, _, _ = _scar_target(x, *sizes, (width[1], length[1]), generator)
    return _write(x, target, inside, _colour(x, generator))


def rotate(quarters: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    """The augmentation that rotates square images by so many quarters of a turn (4.1)."""
    return lambda x, generator: x.rot90(quarters, (2, 3))


def jitter(
    x: Tensor,
    generator: torch.Generator,
    *,
    strength: tuple[float, float, float, float],
    weight: Tensor | None = None,
) -> Tensor:
    """Change brightness, contrast, saturation and hue at random, in random order (A.1, A.2).

    ``x`` is (B, 3, ...) in [0, 1]. ``strength`` holds the largest change of each, as in
    torchvision's ColorJitter. ``weight`` (B, ...) says which pixels count in the mean that contrast
    needs.
    """
    if not any(strength):
        return x
    n, shape = len(x), (-1, *[1] * (x.dim() - 1))
    order = torch.rand(n, 4, generator=generator, device=x.device).argsort(1)
    draw = [_uniform(1 - s, 1 + s, n, generator) for s in strength[:3]]
    hue = _uniform(-strength[3], strength[3], n, generator).view(shape)
    factors = torch.cat([*draw, torch.ones_like(draw[0])], 1).clamp(min=0)
    for slot in range(4):
        operation = order[:, slot].view(shape)
        factor = factors.gather(1, order[:, slot : slot + 1]).view(shape).to(x.dtype)
        blended = torch.lerp(_base(x, operation, weight), x, factor).clamp(0, 1)
        x = torch.where(operation == 3, shift_hue(x, hue), blended) if strength[3] else blended
    return x


def _base(x: Tensor, operation: Tensor, weight: Tensor | None) -> Tensor:
    """What an image is blended with: black, its mean (contrast), or itself in grey (saturation).

    ``operation`` (B, ...) is 0 for brightness, 1 for contrast, 2 for saturation.
    """
    grey = sum(c * x[:, i : i + 1] for i, c in enumerate(LUMA))
    weight = torch.ones_like(grey) if weight is None else weight.unsqueeze(1).to(x.dtype)
    dims = tuple(range(1, x.dim()))
    mean = (grey * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True).clamp(min=1)
    return grey * (operation == 2) + mean * (operation == 1)


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


def translate(x: Tensor, generator: torch.Generator, *, share: float = 0.125) -> Tensor:
    """Shift every image by up to ``share`` of its sides. The border is reflected (A.1)."""
    n, _, h, w = x.shape
    rows, columns = (
        _shifted(side, _uniform(-reach, reach + 1, n, generator).floor().long())
        for side, reach in ((h, round(share * h)), (w, round(share * w)))
    )
    return _rows_and_columns(x, rows, columns)


def crop(x: Tensor, generator: torch.Generator, *, side: int) -> Tensor:
    """A square of ``side`` pixels of every image, at a random place (eq. 3).

    Raises ValueError if an image is smaller.
    """
    n, _, h, w = x.shape
    if side > min(h, w):
        raise ValueError(f"an image of {h}x{w} pixels is smaller than a {side}-px patch")
    rows, columns = (
        _corner(torch.full((n, 1), space, device=x.device), generator)
        + torch.arange(side, device=x.device)
        for space in (h - side, w - side)
    )
    return _rows_and_columns(x, rows, columns)


def _rows_and_columns(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels (B, C, R, S) where ``rows`` (B, R) and ``columns`` (B, S) of an image meet."""
    flat = (rows.unsqueeze(2) * x.shape[3] + columns.unsqueeze(1)).flatten(1)
    return _read(x, flat).unflatten(2, (rows.shape[1], columns.shape[1]))


def _shifted(n: int, shift: Tensor) -> Tensor:
    """The positions 0 .. n-1 moved by ``shift`` (B, 1) and reflected at both ends, (B, n)."""
    position = (torch.arange(n, device=shift.device) + shift).abs()
    return (n - 1) - ((n - 1) - position).abs()


def normal(x: Tensor, generator: torch.Generator) -> Tensor:
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
    x: Tensor, method: str, generator: torch.Generator, options: dict[str, dict] | None = None
) -> tuple[Tensor, Tensor]:
    """The batch of the pretext task (eq. 1): every image once in each of the K classes.

    Returns images (K * B, 3, H, W) and labels (K * B,). ``options`` holds options of augmentations
    by their names: ``{"cutpaste": {"area": (0.02, 0.3)}}``.
    """
    options = options or {}
    classes = METHODS[method]
    images = [make(x, generator, **options.get(name, {})) for name, make in classes.items()]
    labels = torch.arange(len(classes), device=x.device).repeat_interleave(len(x))
    return torch.cat(images), labels


def pasted_copies(normal: Tensor, options: dict[str, dict], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A CutPaste and a CutPaste-scar copy of each normal image, uint8 (N, 3, H, W) each.

    The images themselves are not shifted and not jittered. ``options`` are those of
    ``pretext_batch``.
    """
    generator = torch.Generator().manual_seed(seed)
    images, _ = pretext_batch(normal.float() / 255, "cutpaste_3way", generator, options)
    _, patch, scar = (255 * images).round().to(torch.uint8).chunk(3)
    return patch, scar
