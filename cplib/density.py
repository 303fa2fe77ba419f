"""Gaussian density estimation on features (section 2.3, eq. 2)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sklearn.covariance import ledoit_wolf
from sklearn.model_selection import KFold
from torch import Tensor

from cplib.model import in_batches

PLACE_BATCH = 16  # places whose covariances are in memory together, on a CPU
GPU_BYTES = 2 * 2**30  # of features and covariances of places that are on a GPU together
FOLDS = 5  # of ``held_out``


def l2_normalise(z: Tensor) -> Tensor:
    """Scale features (..., D) to length one, as the authors' earlier code does."""
    return torch.nn.functional.normalize(z, dim=-1)


def moments(chunks: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """The number of all features, their sum (D,), and the sum of their outer products (D, D).

    Each chunk is (N, D). Sums are in float64.
    """
    count, total, square = 0, 0.0, 0.0
    for z in chunks:
        z = z.double()
        count, total, square = count + len(z), total + z.sum(0), square + z.mT @ z
    return count, total, square


@dataclass(frozen=True)
class Gaussian:
    """One Gaussian, or one for each leading index.

    ``mean`` is (..., D). ``factor`` (..., D, D) is the lower Cholesky factor of the covariance.
    Both are float64.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, z: Tensor, *, reg_covar: float = 1e-6) -> "Gaussian":
        """Fit to features z (..., N, D) by maximum likelihood.

        ``reg_covar`` is added to the covariance's diagonal. Raises ValueError if there is no
        feature, if one is not finite, or if the covariance is singular.
        """
        if z.shape[-2] == 0 or not torch.isfinite(z).all():
            raise ValueError("a Gaussian needs at least one feature vector, all of them finite")
        z = z.double()
        mean = z.mean(-2)
        centred = z - mean.unsqueeze(-2)
        return cls._from(mean, centred.mT @ centred / z.shape[-2], reg_covar)

    @classmethod
    def fit_shrunk(cls, z: Tensor) -> "Gaussian":
        """Fit to features z (N, D), with the covariance shrunk by Ledoit and Wolf's method."""
        covariance, _ = ledoit_wolf(z.double().cpu().numpy())
        return cls._from(z.double().mean(0), torch.from_numpy(covariance).to(z.device), 0.0)

    @classmethod
    def from_moments(
        cls, count: int, total: Tensor, square: Tensor, *, reg_covar: float = 1e-6
    ) -> "Gaussian":
        """As ``fit``, from the sums that ``moments`` returns instead of the features."""
        if count == 0 or not torch.isfinite(square).all():
            raise ValueError("a Gaussian needs at least one feature vector, all of them finite")
        mean = total / count
        return cls._from(mean, square / count - mean[:, None] * mean, reg_covar)

    @classmethod
    def _from(cls, mean: Tensor, covariance: Tensor, reg_covar: float) -> "Gaussian":
        """Add ``reg_covar`` to the diagonal, in place, and factorise."""
        covariance.diagonal(dim1=-2, dim2=-1).add_(reg_covar)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed.any():
            raise ValueError(f"the covariance is singular: raise reg_covar (now {reg_covar:g})")
        return cls(mean, factor)

    def score(self, z: Tensor) -> Tensor:
        """Anomaly scores (..., N) of z (..., N, D): half the squared distance of eq. 2."""
        centred = (z.double() - self.mean.unsqueeze(-2)).mT
        whitened = torch.linalg.solve_triangular(self.factor, centred, upper=False)
        return whitened.square().sum(-2) / 2

    @property
    def log_normaliser(self) -> Tensor:
        """The part of the negative log density that ``score`` leaves out: (...) of them."""
        diagonal = self.factor.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1) + self.mean.shape[-1] * math.log(2 * math.pi) / 2


def held_out(z: Tensor, fit: Callable[[Tensor], Gaussian]) -> float:
    """Mean negative log density, in nats, of features z (N, D): the lower, the better the fit.

    Each feature is scored by a Gaussian that was fitted to the other folds. This compares ways to
    ``fit`` without an anomalous image. Raises ValueError for fewer than two features.
    """
    parts = KFold(min(FOLDS, len(z)), shuffle=True, random_state=0).split(z)
    gaussians = ((fit(z[kept]), z[left]) for kept, left in parts)
    return float(torch.cat([g.score(left) + g.log_normaliser for g, left in gaussians]).mean())


@dataclass(frozen=True)
class PositionGaussians:
    """One Gaussian for each place (A.5). It keeps the features z (N, P, D) and fits when it scores.

    The factors of all places, (P, D, D), would need more memory and save no time.
    """

    z: Tensor
    reg_covar: float = 1e-6
    device: torch.device | str = "cpu"  # where it computes; features stay where they are

    def score(self, z: Tensor) -> Tensor:
        """Anomaly scores (M, P) of z (M, P, D): half the squared distance of eq. 2."""

        def work(places: Tensor) -> Tensor:
            normal, part = (v[:, places].to(self.device).transpose(0, 1) for v in (self.z, z))
            return Gaussian.fit(normal, reg_covar=self.reg_covar).score(part).to(z.device)

        width, size = z.shape[2], PLACE_BATCH
        if torch.device(self.device).type == "cuda":  # float64, three times over
            size = max(1, GPU_BYTES // (24 * width * (len(self.z) + len(z) + width)))
        return in_batches(work, torch.arange(z.shape[1]), size).T
