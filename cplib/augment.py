"""The paper's idea: pictures of a defect, made from a good picture and a patch of itself.

Everything here is a pure function of a batch ``(B, 3, H, W)`` of floats in [0, 1] and one
``torch.Generator``. The work happens batched, on the device of the input, with draws of its own for
every picture; the input is never modified. Section and appendix numbers are the paper's.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

JITTER = (0.1, 0.1, 0.1, 0.1)
LUMA = (0.299, 0.587, 0.114)


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
    """Cut a rectangle, jitter its colours, paste it elsewhere in the same picture (2.1, A.2).

    ``area`` is a share of the picture; the aspect ratio is drawn from (aspect[0], 1) or
    (1, aspect[1]) with equal chance.
    """
    b, _, h, w = x.shape
    height, width = _patch_sizes(b, h, w, area, aspect, generator)
    source_y, source_x = _corner(h - height, generator), _corner(w - width, generator)
    target_y, target_x = _corner(h - height, generator), _corner(w - width, generator)
    k = torch.arange(int(area[1] * h * w), device=x.device)  # pixels of the patch, row by row
    row, column = k // width, k % width
    source = (source_y + row) * w + source_x + column
    target = (target_y + row) * w + target_x + column
    return _paste(x, source, target, row < height, jitter, generator)


def _patch_sizes(n, h, w, area, aspect, generator) -> tuple[Tensor, Tensor]:
    """Heights and widths (n, 1) in pixels: the area strictly in its range, the aspect rounded."""
    low, high = area[0] * h * w, area[1] * h * w
    if high < 1:
        raise ValueError(f"a picture of {h}x{w} pixels is too small for a patch of {area[1]:.0%}")
    size = _uniform(low, high, n, generator)
    wide = _uniform(0, 1, n, generator) < 0.5
    low_aspect, high_aspect = (
        _uniform(aspect[0], 1, n, generator),
        _uniform(1, aspect[1], n, generator),
    )
    ratio = torch.where(wide, low_aspect, high_aspect)  # height / width
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

    ``width`` and ``length`` are in pixels, ``angle`` in degrees either way.
    """
    b, _, h, w = x.shape
    scar_w, scar_l, turn = _scar_sizes(b, h, w, width, length, angle, generator)
    source_y, source_x = _corner(h - scar_l, generator), _corner(w - scar_w, generator)
    target, u, v = _scar_target(h, w, scar_w, scar_l, turn, (width[1], length[1]), generator)
    inside = (u.abs() < scar_w / 2) & (v.abs() < scar_l / 2)
    column = (u + scar_w / 2).floor().clamp(min=0).minimum(scar_w - 1)
    row = (v + scar_l / 2).floor().clamp(min=0).minimum(scar_l - 1)
    source = (source_y + row.long()) * w + source_x + column.long()
    return _paste(x, source, target, inside, jitter, generator)


def _scar_sizes(n, h, w, width, length, angle, generator) -> tuple[Tensor, Tensor, Tensor]:
    """Widths and lengths (n, 1) in whole pixels, turns (n, 1) in radians."""
    if math.hypot(width[1], length[1]) > min(h, w):
        raise ValueError(
            f"a picture of {h}x{w} pixels is too small for a scar of {width[1]:g}x{length[1]:g}"
        )
    scar_w = _uniform(round(width[0]), round(width[1]) + 1, n, generator).floor().clamp(min=1)
    scar_l = _uniform(round(length[0]), round(length[1]) + 1, n, generator).floor().clamp(min=1)
    return scar_w, scar_l, torch.deg2rad(_uniform(-angle, angle, n, generator))


def _scar_target(h, w, scar_w, scar_l, turn, largest, generator) -> tuple[Tensor, Tensor, Tensor]:
    """A square of pixels that holds the turned scar, wholly inside the picture.

    Returns the flat positions (n, K) of these pixels, and where each lies in the scar's own,
    unturned frame: ``u`` across and ``v`` along it, in pixels from its centre.
    """
    n, cos, sin = len(turn), turn.cos(), turn.sin()
    half_y = (scar_l * cos.abs() + scar_w * sin.abs()) / 2
    half_x = (scar_l * sin.abs() + scar_w * cos.abs()) / 2
    centre_y = _uniform(half_y, h - half_y, n, generator)
    centre_x = _uniform(half_x, w - half_x, n, generator)
    side = math.ceil(math.hypot(*largest)) + 1
    k = torch.arange(side * side, device=turn.device)
    y = (centre_y - side / 2).floor() + k // side
    x = (centre_x - side / 2).floor() + k % side
    dy, dx = y + 0.5 - centre_y, x + 0.5 - centre_x
    flat = y.clamp(0, h - 1).long() * w + x.clamp(0, w - 1).long()
    return flat, cos * dx + sin * dy, cos * dy - sin * dx


def _paste(x, source, target, inside, strength, generator) -> Tensor:
    """Copy pixels ``source`` (B, K), jittered, to ``target`` (B, K) where ``inside``."""
    b, c, h, w = x.shape
    flat = x.flatten(2)
    k = source.shape[1]
    patch = flat.gather(2, source.clamp(max=h * w - 1).unsqueeze(1).expand(b, c, k))
    patch = jitter(patch, generator, strength=(strength,) * 4, weight=inside)
    # One pixel more than the picture has takes what lies outside the patch: no branches, no sync.
    target = torch.where(inside, target, h * w).unsqueeze(1).expand(b, c, k)
    return F.pad(flat, (0, 1)).scatter(2, target, patch)[..., : h * w].unflatten(2, (h, w))


def jitter(
    x: Tensor,
    generator: torch.Generator,
    *,
    strength: tuple[float, float, float, float] = JITTER,
    weight: Tensor | None = None,
) -> Tensor:
    """Brightness, contrast, saturation and hue changed at random, in random order (A.1, A.2).

    ``x`` is (B, 3, ...) in [0, 1]; ``strength`` is the largest change of each, as in torchvision's
    ColorJitter; ``weight`` (B, ...) says which pixels count for the mean that contrast needs.
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
    """What a picture is blended with: black (brightness), its mean (contrast), itself in grey."""
    grey = sum(c * x[:, i : i + 1] for i, c in enumerate(LUMA))
    weight = torch.ones_like(grey) if weight is None else weight.unsqueeze(1).to(x.dtype)
    dims = tuple(range(1, x.dim()))
    mean = (grey * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True).clamp(min=1)
    return grey * (operation == 2) + mean * (operation == 1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (B, 3, ...) pictures by ``shift`` turns (HSV), value and saturation kept."""
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
    """Shift every picture by up to ``share`` of its sides, the border reflected (A.1)."""
    b, c, h, w = x.shape
    reach_y, reach_x = round(share * h), round(share * w)
    y = _shifted(h, _uniform(-reach_y, reach_y + 1, b, generator).floor().long())
    x_ = _shifted(w, _uniform(-reach_x, reach_x + 1, b, generator).floor().long())
    index = (y.unsqueeze(2) * w + x_.unsqueeze(1)).flatten(1)
    return x.flatten(2).gather(2, index.unsqueeze(1).expand(b, c, -1)).view_as(x)


def _shifted(n: int, shift: Tensor) -> Tensor:
    """(B, n) positions 0 .. n-1 moved by ``shift`` (B, 1), reflected at both ends."""
    position = (torch.arange(n, device=shift.device) + shift).abs()
    return (n - 1) - ((n - 1) - position).abs()


def normal(x: Tensor, generator: torch.Generator) -> Tensor:
    """The picture as it is: class 0 of every method."""
    return x


# A method is its classes: class i of the pretext task is what the i-th function makes of a picture.
METHODS = {
    "cutpaste": (normal, cutpaste),
    "cutpaste_scar": (normal, cutpaste_scar),
    "cutpaste_3way": (normal, cutpaste, cutpaste_scar),
}


def pretext_batch(
    x: Tensor, method: str, generator: torch.Generator, options: dict[str, dict] | None = None
) -> tuple[Tensor, Tensor]:
    """The pretext task's batch (eq. 1): every picture once in each class of ``method``.

    Returns images (K * B, 3, H, W) and labels (K * B,). ``options`` holds keyword options for an
    augmentation under its name: ``{"cutpaste": {"area": (0.02, 0.3)}}``.
    """
    options = options or {}
    classes = METHODS[method]
    images = [make(x, generator, **options.get(make.__name__, {})) for make in classes]
    labels = torch.arange(len(classes), device=x.device).repeat_interleave(len(x))
    return torch.cat(images), labels
