"""The Gaussian against scikit-learn's and against the formula written out."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture

from cplib import datasets, density
from cplib.density import Gaussian, PositionGaussians, held_out, l2_normalise, moments
from cplib.model import PretextNet, embed

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "mvtec256"


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _assert_agrees_with_sklearn(z, test, reg_covar):
    ours = Gaussian.fit(z, reg_covar=reg_covar)
    theirs = GaussianMixture(1, reg_covar=reg_covar).fit(z.double().numpy())
    expected = torch.from_numpy(-theirs.score_samples(test.double().numpy()))
    torch.testing.assert_close(ours.score(test) + ours.log_normaliser, expected, rtol=1e-4, atol=0)


@given(st.integers(1, 12), st.integers(2, 40), st.integers(0, 99), st.sampled_from([1e-6, 1e-2]))
@settings(deadline=None, max_examples=40)
def test_the_density_is_that_of_scikit_learn(d, n, seed, reg_covar):
    z = _random(n, d, seed=seed) * torch.linspace(0.5, 3, d) + torch.arange(d)
    _assert_agrees_with_sklearn(z, _random(20, d, seed=seed + 1), reg_covar)


def test_the_density_is_that_of_scikit_learn_with_fewer_images_than_dimensions():
    z = l2_normalise(_random(30, 200))
    _assert_agrees_with_sklearn(z, l2_normalise(_random(10, 200, seed=1)), 1e-6)


def test_the_density_is_that_of_scikit_learn_on_features_of_a_network(demo_root):
    torch.manual_seed(0)
    net = PretextNet(2)
    train, test = (
        datasets.load(demo_root, "sieve", split, 64).pixels for split in ("train", "test")
    )
    z, z_test = l2_normalise(embed(net, train)), l2_normalise(embed(net, test))
    _assert_agrees_with_sklearn(z, z_test, 1e-6)


@pytest.mark.skipif(not REAL.is_dir(), reason="no images of MVTec AD at hand")
def test_the_density_is_that_of_scikit_learn_on_imagenet_features_of_mvtec():
    net = PretextNet(2, backbone="efficientnet_lite0", init="imagenet")
    train, test = (
        datasets.load(REAL, "toothbrush", split, 128).pixels for split in ("train", "test")
    )
    z, z_test = l2_normalise(embed(net, train)), l2_normalise(embed(net, test))
    _assert_agrees_with_sklearn(z, z_test, 1e-6)


def test_the_shrunk_covariance_is_scikit_learns():
    z, test = _random(20, 30), _random(9, 30, seed=1)
    theirs = LedoitWolf().fit(z.double().numpy())
    ours = Gaussian.fit_shrunk(z)
    torch.testing.assert_close(
        ours.score(test), torch.from_numpy(theirs.mahalanobis(test.double().numpy()) / 2)
    )


@given(st.integers(1, 4), st.integers(6, 23), st.integers(2, 5))
@settings(deadline=None, max_examples=20)
def test_what_is_held_out_is_scored_by_a_fit_without_it(d, n, folds):
    z, seen = _random(n, d), []

    def fit(part):
        seen.append(part)
        return Gaussian.fit(part, reg_covar=0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(density, "FOLDS", folds)
        found = held_out(z, fit)
    left = [z[[not (row == part).all(1).any() for row in z]] for part in seen]
    assert torch.equal(torch.cat(left).sort(0).values, z.sort(0).values)  # each once
    expected = [
        -multivariate_normal.logpdf(row, part.mean(0), np.cov(part.T, bias=True) + 0.1 * np.eye(d))
        for part, rows in zip((p.double().numpy() for p in seen), left, strict=True)
        for row in rows.double().numpy()
    ]
    assert found == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_density_is_held_out_of_few_features_and_refused_for_one():
    assert held_out(_random(2, 3), lambda z: Gaussian.fit(z, reg_covar=1)) > 0
    with pytest.raises(ValueError):
        held_out(_random(1, 3), Gaussian.fit)


def test_held_out_features_favour_the_regulariser_they_were_drawn_with():
    spread = torch.tensor([1.0] * 10 + [0.1] * 190)
    z = spread * _random(60, 200)
    found = {r: held_out(z, lambda z, r=r: Gaussian.fit(z, reg_covar=r)) for r in (1e-6, 1e-2, 1)}
    assert min(found, key=found.get) == 1e-2


@given(st.integers(1, 5), st.integers(3, 20), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_score_is_half_the_mahalanobis_distance(d, n, seed):
    z, test = _random(n, d, seed=seed).double().numpy(), _random(7, d, seed=seed + 1).double()
    inverse = np.linalg.inv(np.cov(z.T, bias=True).reshape(d, d) + 0.01 * np.eye(d))
    apart = test.numpy() - z.mean(0)
    expected = [v @ inverse @ v / 2 for v in apart]
    scores = Gaussian.fit(torch.from_numpy(z), reg_covar=0.01).score(test)
    np.testing.assert_allclose(scores, expected, rtol=1e-9)


def test_the_covariance_is_full_and_not_diagonal():
    across = torch.tensor([[1.0, -1.0]])
    z = _random(500, 1) @ torch.ones(1, 2) + 0.05 * _random(500, 2, seed=1)
    gaussian = Gaussian.fit(z)
    assert gaussian.score(across) > 50 * gaussian.score(-across.abs())


def test_the_log_normaliser_is_that_of_a_standard_normal():
    gaussian = Gaussian(torch.zeros(3), torch.eye(3, dtype=torch.float64))
    assert gaussian.log_normaliser.item() == pytest.approx(1.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("leading", [(3,), (2, 3)])
def test_leading_dimensions_give_the_same_as_a_loop(leading):
    z, test = _random(*leading, 15, 4), _random(*leading, 6, 4, seed=1)
    batched = Gaussian.fit(z, reg_covar=1e-3)
    scores, offsets = batched.score(test), batched.log_normaliser
    assert (scores.shape, offsets.shape) == ((*leading, 6), leading)
    for index in np.ndindex(*leading):
        single = Gaussian.fit(z[index], reg_covar=1e-3)
        torch.testing.assert_close(scores[index], single.score(test[index]))
        torch.testing.assert_close(offsets[index], single.log_normaliser)


def test_sums_of_chunks_give_the_gaussian_of_the_whole():
    z = _random(200, 12) + 3
    whole, sums = Gaussian.fit(z), Gaussian.from_moments(*moments(z.split(33)))
    torch.testing.assert_close(sums.mean, whole.mean)
    torch.testing.assert_close(sums.factor, whole.factor, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="at least one"):
        Gaussian.from_moments(*moments([]))


def test_every_place_has_the_gaussian_of_its_own_features():
    z, test = _random(9, 40, 5), _random(3, 40, 5, seed=1)
    scores = PositionGaussians(z, 1e-3).score(test)
    assert scores.shape == (3, 40)
    for place in (0, 17, 39):
        alone = Gaussian.fit(z[:, place], reg_covar=1e-3).score(test[:, place])
        torch.testing.assert_close(scores[:, place], alone)


def test_the_mean_of_the_training_features_scores_nothing():
    z = _random(20, 4).double()
    assert Gaussian.fit(z).score(z.mean(0, keepdim=True)).item() == pytest.approx(0, abs=1e-12)


def test_a_single_image_makes_a_round_gaussian_of_the_regulariser():
    gaussian = Gaussian.fit(torch.ones(1, 3), reg_covar=0.5)
    torch.testing.assert_close(gaussian.score(torch.zeros(1, 3)).item(), 3 / 0.5 / 2)


def test_fitting_leaves_the_features_as_they_are():
    z = _random(10, 3).double()
    before = z.clone()
    Gaussian.fit(z).score(z)
    assert torch.equal(z, before)


def test_l2_normalised_features_have_length_one_and_the_same_direction():
    z = _random(2, 7, 5)
    unit = l2_normalise(z)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, 7))
    torch.testing.assert_close(unit * z.norm(dim=-1, keepdim=True), z)


def test_no_features_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Gaussian.fit(torch.empty(0, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    z = _random(5, 3)
    z[2, 1] = value
    with pytest.raises(ValueError, match="finite"):
        Gaussian.fit(z)


def test_a_singular_covariance_is_refused_by_name():
    with pytest.raises(ValueError, match="singular: raise reg_covar"):
        Gaussian.fit(torch.ones(4, 3), reg_covar=0.0)
