"""Gaussian density estimation on features (section 2.3, eq. 2)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sklearn.covariance import ledoit_wolf
from sklearn.model_selection import KFold
from torch import Tensor


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
    def fit_stream(cls, chunks: Iterable[Tensor], *, reg_covar: float = 1e-6) -> "Gaussian":
        """As ``fit`` for features that come in chunks (N, D), never all in memory."""
        return cls.from_moments(*moments(chunks), reg_covar=reg_covar)

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

    Evidence for a choice of ``fit`` that needs no defective picture: the lower the better. A
    network that was trained on these pictures has seen them all, the fit has not. Raises ValueError
    for fewer than two.
    """
    parts = KFold(min(folds, len(z)), shuffle=True, random_state=0).split(z)
    gaussians = ((fit(z[kept]), z[left]) for kept, left in parts)
    return float(torch.cat([g.score(left) + g.log_normaliser for g, left in gaussians]).mean())


@dataclass(frozen=True)
class FewGaussians:
    """Scores as ``Gaussian`` does for each leading index, kept as samples and not as D x D factors.

    Exact, by the matrix inversion lemma: ``centred`` (..., N, D), float32, are the samples less
    their ``mean`` (..., D), and ``factor`` (..., N, N) is the lower Cholesky factor of their inner
    products, ``N * reg_covar`` added to the diagonal. Smaller than a Gaussian where N < 0.78 D.
    """

    mean: Tensor
    centred: Tensor
    factor: Tensor
    reg_covar: float

    @classmethod
    def fit(cls, z: Tensor, *, reg_covar: float = 1e-6) -> "FewGaussians":
        """As ``Gaussian.fit``; ``reg_covar`` has to be positive."""
        if z.shape[-2] == 0 or not torch.isfinite(z).all() or reg_covar <= 0:
            raise ValueError("Gaussians need finite features, and a reg_covar above zero")
        mean = z.double().mean(-2)
        centred = (z.double() - mean.unsqueeze(-2)).float()
        inner = centred.double() @ centred.double().mT
        inner.diagonal(dim1=-2, dim2=-1).add_(z.shape[-2] * reg_covar)
        return cls(mean, centred, torch.linalg.cholesky(inner).contiguous(), reg_covar)

    def score(self, z: Tensor) -> Tensor:
        """Anomaly scores (..., M) of z (..., M, D): half the squared distance of eq. 2."""
        d = z.double() - self.mean.unsqueeze(-2)
        seen = torch.linalg.solve_triangular(self.factor, self.centred.double() @ d.mT, upper=False)
        return (d.square().sum(-1) - seen.square().sum(-2)) / (2 * self.reg_covar)
