"""Gaussian density estimation on features (section 2.3, eq. 2)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sklearn.covariance import ledoit_wolf
from sklearn.model_selection import KFold
from torch import Tensor

CHUNK = 16  # places whose covariances are in memory at once


def l2_normalise(z: Tensor) -> Tensor:
    """Features (..., D) scaled to length one, as the authors' earlier code does."""
    return torch.nn.functional.normalize(z, dim=-1)


def moments(chunks: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Number, sum (D,) and sum of the outer products (D, D), float64, of features (N, D) each."""
    count, total, square = 0, 0.0, 0.0
    for z in chunks:
        z = z.double()
        count, total, square = count + len(z), total + z.sum(0), square + z.mT @ z
    return count, total, square


@dataclass(frozen=True)
class Gaussian:
    """One Gaussian, or one for each leading index: ``mean`` (..., D), ``factor`` (..., D, D).

    ``factor`` is the lower Cholesky factor of the covariance, in float64.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, z: Tensor, *, reg_covar: float = 1e-6) -> "Gaussian":
        """Maximum likelihood for features z (..., N, D), ``reg_covar`` added to the diagonal.

        Raises ValueError if there are none, if one is not finite, or if the covariance is singular.
        """
        if z.shape[-2] == 0 or not torch.isfinite(z).all():
            raise ValueError("a Gaussian needs at least one feature vector, all of them finite")
        z = z.double()
        mean = z.mean(-2)
        centred = z - mean.unsqueeze(-2)
        return cls._from(mean, centred.mT @ centred / z.shape[-2], reg_covar)

    @classmethod
    def fit_shrunk(cls, z: Tensor) -> "Gaussian":
        """For features z (N, D), the covariance shrunk towards a sphere as Ledoit and Wolf do."""
        covariance, _ = ledoit_wolf(z.double().cpu().numpy())
        return cls._from(z.double().mean(0), torch.from_numpy(covariance).to(z.device), 0.0)

    @classmethod
    def from_moments(
        cls, count: int, total: Tensor, square: Tensor, *, reg_covar: float = 1e-6
    ) -> "Gaussian":
        """As ``fit`` for features of which only these sums are left: see ``moments``."""
        if count == 0 or not torch.isfinite(square).all():
            raise ValueError("a Gaussian needs at least one feature vector, all of them finite")
        mean = total / count
        return cls._from(mean, square / count - mean[:, None] * mean, reg_covar)

    @classmethod
    def _from(cls, mean: Tensor, covariance: Tensor, reg_covar: float) -> "Gaussian":
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
        """What ``score`` leaves out of the negative log density: one number a Gaussian, (...)."""
        diagonal = self.factor.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1) + self.mean.shape[-1] * math.log(2 * math.pi) / 2


def held_out(z: Tensor, fit: Callable[[Tensor], Gaussian], *, folds: int = 5) -> float:
    """Mean negative log density of features z (N, D), nats, each under a fit without its fold.

    Evidence for a choice of ``fit`` that needs no anomalous image: the lower the better. A
    network that was trained on these images has seen them all, the fit has not. Raises ValueError
    for fewer than two.
    """
    parts = KFold(min(folds, len(z)), shuffle=True, random_state=0).split(z)
    gaussians = ((fit(z[kept]), z[left]) for kept, left in parts)
    return float(torch.cat([g.score(left) + g.log_normaliser for g, left in gaussians]).mean())


@dataclass(frozen=True)
class PositionGaussians:
    """One Gaussian for each place (A.5), kept as the features z (N, P, D) that they are fitted to.

    D x D factors of every place would take more memory than the features, and no less time.
    """

    z: Tensor
    reg_covar: float = 1e-6

    def score(self, z: Tensor) -> Tensor:
        """Anomaly scores (M, P) of z (M, P, D): half the squared distance of eq. 2."""
        scores = []
        for normal, part in zip(self.z.split(CHUNK, 1), z.split(CHUNK, 1), strict=True):
            gaussians = Gaussian.fit(normal.transpose(0, 1), reg_covar=self.reg_covar)
            scores.append(gaussians.score(part.transpose(0, 1)))
        return torch.cat(scores).T
