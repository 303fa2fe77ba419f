"""Where the anomaly is: dense patch scores, receptive-field upsampling, GradCAM (2.4, 4.2, A.5)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cplib.model import PretextNet, full_precision, in_batches, levels

WINDOW_BATCH = {"cpu": 512, "cuda": 4096}  # windows that the network sees at once
LEVEL_BATCH = 16  # images of a batch whose feature maps are computed
GRADCAM_BATCH = 8  # images of a batch whose GradCAM maps are computed


def positions(height: int, width: int, window: int, stride: int = 4) -> tuple[int, int]:
    """Rows and columns of windows: 57 x 57 of 32 px in 256 px at stride 4 (A.5).

    Raises ValueError if the image is smaller than a window.
    """
    if min(height, width) < window:
        raise ValueError(
            f"an image of {height}x{width} pixels is smaller than a {window}-px window"
        )
    return (height - window) // stride + 1, (width - window) // stride + 1


@torch.inference_mode()
@full_precision()
def window_features(net: PretextNet, pixels: Tensor, *, window: int, stride: int = 4) -> Tensor:
    """Features (N, rows, columns, D), float32, of every window of uint8 images (N, 3, H, W) (A.5).

    Raises ValueError if the images are smaller than a window.
    """
    positions(*pixels.shape[2:], window, stride)
    encode, device = _encode(net), net.pixel_mean.device
    features = []
    for image in pixels.to(device):
        windows = image.unfold(1, window, stride).unfold(2, window, stride)
        shape = windows.shape[1:3]
        windows = windows.permute(1, 2, 0, 3, 4).flatten(0, 1)
        found = in_batches(encode, windows, WINDOW_BATCH[device.type])
        features.append(found.unflatten(0, shape).cpu())
    return torch.stack(features)


@torch.inference_mode()
@full_precision()
def level_features(net: PretextNet, pixels: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """Features (N, rows, columns, D), float32, of every cell of an EfficientNet's feature maps.

    ``pixels`` are uint8 (N, 3, H, W). ``chosen`` are numbers of ``model.levels``. The map of each
    level is averaged over 3x3 cells and resized to the deepest map. Then their channels are joined.
    """
    net.eval()
    stages = levels(net.encoder)[: max(chosen)]

    def features(part: Tensor) -> Tensor:
        x, maps = _encoder_input(net, part), []
        for number, stage in enumerate(stages, 1):
            x = stage(x)
            if number in chosen:
                maps.append(F.avg_pool2d(x, 3, 1, 1))
        maps = [F.adaptive_avg_pool2d(m, x.shape[2:]) for m in maps]
        return torch.cat(maps, 1).permute(0, 2, 3, 1).to(pixels.device)

    return in_batches(features, pixels, LEVEL_BATCH)


def _encode(net: PretextNet) -> Callable[[Tensor], Tensor]:
    """The function from uint8 windows to features. BatchNorm is folded into the convolutions."""
    from torch.fx.experimental.optimization import fuse  # here: they take a second
    from torch.fx.proxy import TraceError

    net.eval()
    try:
        encoder = fuse(net.encoder)
    except TraceError:  # timm's networks look at the size of their input
        encoder = copy.deepcopy(net.encoder)
    encoder = encoder.to(memory_format=torch.channels_last)
    return lambda windows: encoder(_encoder_input(net, windows))


def _encoder_input(net: PretextNet, pixels: Tensor) -> Tensor:
    """Uint8 images on the network's device, as its encoder expects them."""
    x = pixels.to(net.pixel_mean.device).float().div(255)
    return ((x - net.pixel_mean) / net.pixel_std).contiguous(memory_format=torch.channels_last)


def upsample(
    maps: Tensor, size: tuple[int, int], *, window: int, stride: int = 4, std: float = 10.0
) -> Tensor:
    """Anomaly maps (N, H, W) of images of this ``size`` from scores of windows (A.5).

    ``maps`` are the scores (N, rows, columns). A transposed convolution with a Gaussian kernel of
    the window's size spreads each score over its window. The kernels that overlap in a pixel sum to
    one, but to less at the border, as in the paper. We do not divide by this sum: a border pixel
    would get the whole score of its only window, and maps would have their peaks at the border.
    A pixel outside all windows gets the value of the nearest pixel in one.
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

    GradCAM of the score log p(damaged) - log p(normal) at the encoder's last stage, resized
    bilinearly. Negative values (evidence for "normal") are kept. The paper names neither layer nor
    score (4.2): both are our choice.
    """
    from captum.attr import LayerGradCam

    def against_normal(x: Tensor) -> Tensor:
        logits = net(x)
        return logits[:, 1:].logsumexp(1) - logits[:, 0]

    net.eval()
    cam = LayerGradCam(against_normal, net.encoder.layer4)

    def maps(part: Tensor) -> Tensor:
        x = (part.to(net.pixel_mean.device).float() / 255).requires_grad_()
        small = cam.attribute(x).detach()
        return F.interpolate(small, part.shape[2:], mode="bilinear")[:, 0].cpu()

    return in_batches(maps, pixels, GRADCAM_BATCH)
