"""Where the anomaly is: dense patch scores, receptive-field upsampling, GradCAM (2.4, 4.2, A.5)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cplib.model import PretextNet, full_precision, levels

CHUNK = 8  # images of a GradCAM batch


def positions(height: int, width: int, window: int, stride: int = 4) -> tuple[int, int]:
    """Rows and columns of windows: 57 x 57 for 32 px in 256 px at stride 4 (A.5).

    ValueError for an image smaller than a window.
    """
    if min(height, width) < window:
        raise ValueError(
            f"an image of {height}x{width} pixels is smaller than a {window}-px window"
        )
    return (height - window) // stride + 1, (width - window) // stride + 1


@torch.inference_mode()
@full_precision()
def window_features(
    net: PretextNet, pixels: Tensor, *, window: int, stride: int = 4, batch: int = 512
) -> Tensor:
    """Features (N, rows, columns, D) of every window of uint8 images (N, 3, H, W), float32 (A.5).

    Windows are copied ``batch`` at a time. ValueError for images smaller than a window.
    """
    positions(*pixels.shape[2:], window, stride)
    encode = _encode(net)
    features = []
    for image in pixels:
        windows = image.unfold(1, window, stride).unfold(2, window, stride)
        shape = windows.shape[1:3]
        windows = windows.permute(1, 2, 0, 3, 4).flatten(0, 1)
        parts = [encode(part).cpu() for part in windows.split(batch)]
        features.append(torch.cat(parts).unflatten(0, shape))
    return torch.stack(features)


@torch.inference_mode()
@full_precision()
def level_features(
    net: PretextNet, pixels: Tensor, chosen: tuple[int, ...], *, batch: int = 16
) -> Tensor:
    """Features (N, rows, columns, D) at each place of an EfficientNet's maps, float32.

    For uint8 images (N, 3, H, W). The maps of the ``chosen`` levels (``model.levels``), each
    averaged over 3x3 places, are brought to the places of the deepest one and joined.
    """
    net.eval()
    stages, features = levels(net.encoder)[: max(chosen)], []
    for part in pixels.split(batch):
        x = part.to(net.pixel_mean.device).float().div(255)
        x = ((x - net.pixel_mean) / net.pixel_std).contiguous(memory_format=torch.channels_last)
        maps = []
        for number, stage in enumerate(stages, 1):
            x = stage(x)
            if number in chosen:
                maps.append(F.avg_pool2d(x, 3, 1, 1))
        maps = [F.adaptive_avg_pool2d(m, x.shape[2:]) for m in maps]
        features.append(torch.cat(maps, 1).permute(0, 2, 3, 1).to(pixels.device))
    return torch.cat(features)


def _encode(net: PretextNet) -> Callable[[Tensor], Tensor]:
    """The network's features of uint8 windows, with BatchNorm folded into the convolutions."""
    from torch.fx.experimental.optimization import fuse  # here: they take a second
    from torch.fx.proxy import TraceError

    net.eval()
    try:
        encoder = fuse(net.encoder)
    except TraceError:  # timm's networks look at the size of their input
        encoder = copy.deepcopy(net.encoder)
    encoder = encoder.to(memory_format=torch.channels_last)

    def encode(windows: Tensor) -> Tensor:
        x = windows.to(net.pixel_mean.device).float().div(255)
        x = (x - net.pixel_mean) / net.pixel_std
        return encoder(x.contiguous(memory_format=torch.channels_last))

    return encode


def upsample(
    maps: Tensor, size: tuple[int, int], *, window: int, stride: int = 4, std: float = 10.0
) -> Tensor:
    """Window scores (N, rows, columns) as anomaly maps (N, H, W) of the image's ``size`` (A.5).

    A transposed convolution with one Gaussian kernel the size of the receptive field spreads each
    score over its window. The kernel's values at one pixel sum to one inside the image and to less
    at its border, as in the paper: divided by that sum, each border pixel would take the whole
    score of its one window, and maps would peak at the border instead of on the anomaly.
    Pixels that no window covers take the value of the nearest one that is.
    """
    axis = torch.arange(window, device=maps.device, dtype=maps.dtype) - (window - 1) / 2
    bell = torch.exp(-(axis**2) / (2 * std**2))
    bell = bell / bell.sum() * stride
    kernel = (bell[:, None] * bell)[None, None]
    maps = F.conv_transpose2d(maps[:, None], kernel, stride=stride)
    rest = size[0] - maps.shape[2], size[1] - maps.shape[3]
    return F.pad(maps, (0, rest[1], 0, rest[0]), mode="replicate")[:, 0]


@full_precision()
def gradcam(net: PretextNet, pixels: Tensor) -> Tensor:
    """GradCAM anomaly maps (N, H, W) of the image-level model, for uint8 images (N, 3, H, W).

    Of the log odds against "normal", on the encoder's last stage, upsampled bilinearly; evidence
    for "normal" is negative and kept, so that no map is flat. Layer and target are our choice, the
    paper names neither (4.2).
    """
    from captum.attr import LayerGradCam

    def against_normal(x: Tensor) -> Tensor:
        logits = net(x)
        return logits[:, 1:].logsumexp(1) - logits[:, 0]

    net.eval()
    cam = LayerGradCam(against_normal, net.encoder.layer4)
    device = net.pixel_mean.device
    maps = []
    for chunk in pixels.split(CHUNK):
        x = (chunk.to(device).float() / 255).requires_grad_()
        small = cam.attribute(x).detach()
        maps.append(F.interpolate(small, chunk.shape[2:], mode="bilinear")[:, 0].cpu())
    return torch.cat(maps)
