"""Where the defect is: dense patch scores, receptive-field upsampling, GradCAM (2.4, 4.2, A.5)."""

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from cplib.density import Gaussian, l2_normalise
from cplib.model import PretextNet

CHUNK = 8  # pictures of a GradCAM batch


def positions(height: int, width: int, patch: int, stride: int = 4) -> tuple[int, int]:
    """Rows and columns of patches: 49 x 49 for 64 px in 256 px at stride 4.

    ValueError for a picture smaller than a patch.
    """
    if min(height, width) < patch:
        raise ValueError(f"a picture of {height}x{width} pixels is smaller than a {patch}-px patch")
    return (height - patch) // stride + 1, (width - patch) // stride + 1


def patch_features(
    net: PretextNet,
    pixels: Tensor,
    *,
    patch: int,
    stride: int = 4,
    batch: int = 512,
    bf16: bool = False,
) -> Tensor:
    """Features (N, rows, columns, D) of every patch of uint8 pictures (N, 3, H, W), float32."""
    positions(*pixels.shape[2:], patch, stride)
    encode = _encode(net, bf16)
    lines = _lines(encode, pixels, patch=patch, stride=stride, batch=batch)
    return torch.stack(list(lines), 1)


@torch.inference_mode()
def _lines(
    encode: Callable, pixels: Tensor, *, patch: int, stride: int, batch: int = 512
) -> Iterator[Tensor]:
    """Features (N, columns, D) of one row of patches after the other.

    Patches are windows onto the pictures; only ``batch`` of them are copied at a time, and only
    one row's features are in memory.
    """
    rows, columns = positions(*pixels.shape[2:], patch, stride)
    for top in range(0, rows * stride, stride):
        windows = pixels[:, :, top : top + patch].unfold(3, patch, stride).movedim(3, 1)
        parts = windows.split(max(1, batch // columns))
        yield torch.cat([encode(part.flatten(0, 1)) for part in parts]).unflatten(0, (-1, columns))


def _encode(net: PretextNet, bf16: bool) -> Callable[[Tensor], Tensor]:
    """The network's features of uint8 patches, with BatchNorm folded into the convolutions.

    With ``bf16`` the weights are rounded once and not at every call, as autocast would.
    """
    net.eval()
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        encoder = fuse(net.encoder)
    except TraceError:  # timm's networks look at the size of their input
        encoder = copy.deepcopy(net.encoder)
    encoder = encoder.to(dtype, memory_format=torch.channels_last)

    def encode(patches: Tensor) -> Tensor:
        x = patches.to(net.pixel_mean.device).float().div(255)
        x = ((x - net.pixel_mean) / net.pixel_std).to(dtype)
        return encoder(x.contiguous(memory_format=torch.channels_last)).float()

    return encode


@torch.inference_mode()
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
    encode = _encode(net, bf16)
    scale = l2_normalise if l2 else torch.Tensor.float

    def lines(pictures: Tensor) -> Iterator[Tensor]:
        return map(scale, _lines(encode, pictures, patch=patch, stride=stride))

    if per_position:
        pairs = zip(lines(normal), lines(pixels), strict=True)
        return torch.stack([_by_position(*pair, reg_covar) for pair in pairs], 1).cpu()
    vectors = (z.flatten(0, 1) for z in lines(normal))
    gaussian = Gaussian.fit_stream(vectors, reg_covar=reg_covar)
    scores = [gaussian.score(z.flatten(0, 1)).view(z.shape[:2]) for z in lines(pixels)]
    return torch.stack(scores, 1).float().cpu()


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
