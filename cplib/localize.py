"""Where the defect is: dense patch scores, receptive-field upsampling, GradCAM (2.4, 4.2, A.5)."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cplib.density import Gaussian, l2_normalise
from cplib.model import PretextNet

CHUNK = 8  # pictures whose patches are in memory at once


def positions(height: int, width: int, patch: int, stride: int = 4) -> tuple[int, int]:
    """Rows and columns of patches: 49 x 49 for 64 px in 256 px at stride 4.

    ValueError for a picture smaller than a patch.
    """
    if min(height, width) < patch:
        raise ValueError(f"a picture of {height}x{width} pixels is smaller than a {patch}-px patch")
    return (height - patch) // stride + 1, (width - patch) // stride + 1


@torch.inference_mode()
def patch_features(
    net: PretextNet,
    pixels: Tensor,
    *,
    patch: int,
    stride: int = 4,
    batch: int = 512,
    bf16: bool = False,
) -> Tensor:
    """Features (N, rows, columns, D) of every patch of uint8 pictures (N, 3, H, W), float32.

    Patches are windows onto the picture; only ``batch`` of them are copied at a time.
    """
    net.eval()
    device = net.pixel_mean.device
    rows, columns = positions(*pixels.shape[2:], patch, stride)
    features = []
    for picture in pixels:
        x = picture.to(device).float().div(255)
        windows = x.unfold(1, patch, stride).unfold(2, patch, stride).permute(1, 2, 0, 3, 4)
        for line in windows.split(max(1, batch // columns)):
            part = line.reshape(-1, 3, patch, patch).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features.append(net.features(part).float())
    return torch.cat(features).view(len(pixels), rows, columns, -1)


def patch_maps(
    net: PretextNet,
    normal: Tensor,
    pixels: Tensor,
    *,
    patch: int,
    stride: int = 4,
    per_position: bool = False,
    reg_covar: float = 1e-6,
    l2: bool = True,
    bf16: bool = False,
) -> Tensor:
    """Anomaly scores (N, rows, columns) of every patch of ``pixels``; Gaussians from ``normal``.

    ``per_position`` fits one Gaussian to each place of an aligned category, else one to all (A.5).
    """
    options = {"patch": patch, "stride": stride, "bf16": bf16, "l2": l2}
    rows, columns = positions(*pixels.shape[2:], patch, stride)
    if per_position:
        z = torch.cat(list(_chunks(net, normal, options)))  # (M, rows, columns, D)
        z_test = torch.cat(list(_chunks(net, pixels, options)))
        lines = [_by_position(z[:, r], z_test[:, r], reg_covar) for r in range(rows)]
        return torch.stack(lines, 1).cpu()
    gaussian = Gaussian.fit_stream(
        (z.flatten(0, 2) for z in _chunks(net, normal, options)), reg_covar=reg_covar
    )
    parts = [gaussian.score(z.flatten(0, 2)) for z in _chunks(net, pixels, options)]
    return torch.cat(parts).view(-1, rows, columns).float().cpu()


def _chunks(net: PretextNet, pixels: Tensor, options: dict) -> Iterator[Tensor]:
    """Patch features, scaled to length one where asked, a few pictures at a time."""
    options = dict(options)
    scale = l2_normalise if options.pop("l2") else torch.Tensor.float
    for chunk in pixels.split(CHUNK):
        yield scale(patch_features(net, chunk, **options))


def _by_position(z: Tensor, z_test: Tensor, reg_covar: float) -> Tensor:
    """Scores (N, columns) of one row of places, each under its own Gaussian, fitted in a batch."""
    gaussians = Gaussian.fit(z.transpose(0, 1), reg_covar=reg_covar)
    return gaussians.score(z_test.transpose(0, 1)).T.float()


def upsample(
    maps: Tensor, size: tuple[int, int], *, patch: int, stride: int = 4, std: float = 10.0
) -> Tensor:
    """Patch scores (N, rows, columns) as heat maps (N, H, W) of the picture's ``size`` (A.5).

    A transposed convolution with one Gaussian kernel the size of the receptive field spreads each
    score over its patch. The kernel's values at one pixel sum to one inside the picture and to less
    at its border, as in the paper: divided by that sum, each border pixel would take the whole
    score of its one patch, and heat maps would peak at the border instead of on the defect.
    Pixels that no patch covers take the value of the nearest one that is.
    """
    axis = torch.arange(patch, device=maps.device, dtype=maps.dtype) - (patch - 1) / 2
    bell = torch.exp(-(axis**2) / (2 * std**2))
    bell = bell / bell.sum() * stride
    kernel = (bell[:, None] * bell)[None, None]
    heat = F.conv_transpose2d(maps[:, None], kernel, stride=stride)
    rest = size[0] - heat.shape[2], size[1] - heat.shape[3]
    return F.pad(heat, (0, rest[1], 0, rest[0]), mode="replicate")[:, 0]


def gradcam(net: PretextNet, pixels: Tensor) -> Tensor:
    """GradCAM heat maps (N, H, W) of the image-level model, for uint8 pictures (N, 3, H, W).

    Of the log odds against "normal", on the encoder's last stage, upsampled bilinearly. Layer and
    target are our choice, the paper names neither (4.2).
    """
    with warnings.catch_warnings():  # captum asks for notebook widgets that it does not need here
        warnings.simplefilter("ignore")
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
        small = cam.attribute(x, relu_attributions=True).detach()
        maps.append(F.interpolate(small, chunk.shape[2:], mode="bilinear")[:, 0].cpu())
    return torch.cat(maps)
