"""From a run, its network and normal images to anomaly scores and maps (2.3, 2.4, 4.2, A.5)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cplib.density import PLACE_BATCH, Gaussian, PositionGaussians, l2_normalise, moments
from cplib.localize import gradcam, level_features, positions, upsample, window_features
from cplib.model import PretextNet, embed, in_batches
from cplib.run import Run

IMAGE_BATCH = 32  # images whose features are in memory together
ROWS = {"cpu": 2**40, "cuda": 2**15}  # features that a Gaussian of all places takes at once


@dataclass(frozen=True)
class Scorer:
    """A run's network and the density of the features of normal images: it scores new images.

    Scores are computed for P places of an image: the whole image (P = 1), every window, or every
    cell of a feature map. The image's score is the highest of them.
    """

    run: Run
    net: PretextNet
    density: Gaussian | PositionGaussians
    level: int = 0

    @classmethod
    def fit(cls, run: Run, net: PretextNet, normal: Tensor, *, level: int = 0) -> "Scorer":
        """Fit to ``normal`` images, uint8 (N, 3, H, W).

        With ``level``, an EfficientNet's pooled features of this level are used (4.3).
        """
        device = net.pixel_mean.device
        if by_position(run) or not run.dense:
            density = fit_density(run, features(run, net, normal, level=level), device)
        else:  # never all of them in memory
            parts = (features(run, net, part) for part in normal.split(IMAGE_BATCH))
            rows = (z for part in parts for z in part.flatten(0, 1).split(ROWS[device.type]))
            chunks = (z.to(device) for z in rows)
            density = Gaussian.from_moments(*moments(chunks), reg_covar=run.reg_covar)
        return cls(run, net, density, level)

    def position_scores(self, pixels: Tensor) -> Tensor:
        """Anomaly scores (N, P), float64, of every place of uint8 images (N, 3, H, W)."""
        if not len(pixels):
            return torch.empty(0, 1, dtype=torch.float64)
        whole = isinstance(self.density, PositionGaussians) or not self.run.dense
        parts = [pixels] if whole else pixels.split(IMAGE_BATCH)
        return torch.cat([score_features(self.density, self.features(part)) for part in parts])

    def features(self, pixels: Tensor) -> Tensor:
        """Features (N, P, D) of uint8 images (N, 3, H, W), as they are scored."""
        return features(self.run, self.net, pixels, level=self.level)

    def score(self, pixels: Tensor) -> Tensor:
        """Anomaly scores (N,) of uint8 images (N, 3, H, W): the higher, the more anomalous."""
        return self.position_scores(pixels).amax(1)

    def maps(self, pixels: Tensor) -> Tensor:
        """Anomaly maps (N, H, W), from the scores of places (A.5), or by GradCAM (4.2).

        Raises ValueError for an image-level run without training: GradCAM explains nothing there.
        """
        if self.run.dense:
            return upsample_scores(self.run, self.position_scores(pixels), pixels.shape[2:])
        if not self.run.needs_training or not hasattr(self.net.encoder, "layer4"):
            raise ValueError("no anomaly maps without windows: GradCAM needs a trained ResNet")
        return gradcam(self.net, pixels)


def by_position(run: Run) -> bool:
    """Whether each place of an image has its own Gaussian (A.5)."""
    return run.dense and run.per_position


def features(run: Run, net: PretextNet, pixels: Tensor, *, level: int = 0) -> Tensor:
    """Features (N, P, D), float32 on the CPU, of uint8 images (N, 3, H, W)."""
    if run.window:
        z = window_features(net, pixels, window=run.window, stride=run.stride).flatten(1, 2)
    elif run.levels:
        z = level_features(net, pixels, run.levels).flatten(1, 2)
    else:
        z = embed(net, pixels, level=level)[:, None]
    return l2_normalise(z) if run.l2_normalise else z


def fit_density(
    run: Run, z: Tensor, device: torch.device | str = "cpu"
) -> Gaussian | PositionGaussians:
    """The density of features z (N, P, D): one Gaussian for each place, or one for all (A.5).

    ``device`` computes those of each window's place: thousands of covariances.
    """
    if by_position(run) and run.window:
        return PositionGaussians(z, run.reg_covar, device)
    if by_position(run):  # cells of feature maps: few enough to keep all factors
        parts = [part.transpose(0, 1) for part in z.split(PLACE_BATCH, 1)]
        gaussians = [Gaussian.fit(part, reg_covar=run.reg_covar) for part in parts]
        return Gaussian(
            *(torch.cat([getattr(g, k) for g in gaussians]) for k in ("mean", "factor"))
        )
    return Gaussian.fit(z.flatten(0, 1), reg_covar=run.reg_covar)


def score_features(density: Gaussian | PositionGaussians, z: Tensor) -> Tensor:
    """Scores (N, P) of features z (N, P, D)."""
    if isinstance(density, PositionGaussians):
        return density.score(z)
    device = density.mean.device
    if density.mean.dim() == 2:
        return density.score(z.to(device).transpose(0, 1)).T.to(z.device)

    def scores(part: Tensor) -> Tensor:
        return density.score(part.to(device)).to(z.device)

    return in_batches(scores, z.flatten(0, 1), ROWS[device.type]).unflatten(0, z.shape[:2])


def upsample_scores(run: Run, scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Anomaly maps (N, H, W) of images of this ``size`` from the scores (N, P) of their places.

    Scores of windows are spread by A.5's kernel. Those of a feature map, which has to be square,
    are resized bilinearly.
    """
    if run.levels:
        maps = scores.float().unflatten(1, 2 * (math.isqrt(scores.shape[1]),))
        return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]
    maps = scores.float().unflatten(1, positions(*size, run.window, run.stride))
    return upsample(maps, size, window=run.window, stride=run.stride, std=run.heat_std)
