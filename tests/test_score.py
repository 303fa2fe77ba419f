"""Scores and anomaly maps against scikit-learn's Gaussians, one place at a time."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from cplib.density import l2_normalise
from cplib.localize import window_features
from cplib.model import build, embed
from cplib.run import Run
from cplib.score import Scorer

IMAGE = Run(method="cutpaste", category="parts", dataset="own", size=64, reg_covar=1e-4)


def noise(n, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(90, 160, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def windows(gaussians="shared", **fields):
    return Run(
        method="cutpaste",
        category="parts",
        dataset="own",
        window=32,
        stride=8,
        gaussians=gaussians,
        reg_covar=1e-4,
        **fields,
    )


@pytest.fixture(scope="module")
def net():
    return build(IMAGE).eval()


def half_distances(z, z_test, reg_covar=1e-4):
    """scikit-learn's negative log density, less its value at the mean."""
    mixture = GaussianMixture(1, reg_covar=reg_covar).fit(z)
    return mixture.score_samples(mixture.means_) - mixture.score_samples(z_test)


@pytest.mark.parametrize("l2", [False, True])
def test_image_level_scores_are_scikit_learns(net, l2):
    normal, images = noise(9, 64, 64), noise(4, 64, 64, seed=1)
    run = Run(**(vars(IMAGE) | {"l2_normalise": l2}))
    z, z_test = (l2_normalise(z) if l2 else z for z in (embed(net, normal), embed(net, images)))
    expected = half_distances(z.double().numpy(), z_test.double().numpy())
    np.testing.assert_allclose(Scorer.fit(run, net, normal).score(images), expected, rtol=1e-3)


@pytest.mark.parametrize("gaussians", ["shared", "position"])
def test_window_scores_are_scikit_learns_at_every_place(net, gaussians):
    normal, images = noise(5, 48, 56), noise(2, 48, 56, seed=1)
    scores = Scorer.fit(windows(gaussians), net, normal).position_scores(images)
    z, z_test = (
        window_features(net, x, window=32, stride=8).flatten(1, 2).double().numpy()
        for x in (normal, images)
    )
    assert scores.shape == (2, 3 * 4)
    for place in range(scores.shape[1]):
        data = z[:, place] if gaussians == "position" else z.reshape(-1, 512)
        expected = half_distances(data, z_test[:, place])
        np.testing.assert_allclose(scores[:, place], expected, rtol=1e-3)


@pytest.mark.parametrize("gaussians", ["shared", "position"])
@pytest.mark.parametrize("corner", list(itertools.product((12, 60), (20, 76))))
def test_an_anomaly_planted_in_a_quadrant_is_where_the_map_peaks(net, corner, gaussians):
    normal, test = noise(12, 96, 112), noise(1, 96, 112, seed=1)
    y, x = corner
    test[0, :, y : y + 16, x : x + 16] = torch.tensor([250, 20, 20]).view(3, 1, 1)
    anomaly_map = Scorer.fit(windows(gaussians), net, normal).maps(test)[0]
    assert anomaly_map.shape == (96, 112)
    peak = divmod(int(anomaly_map.argmax()), 112)
    assert y - 8 <= peak[0] < y + 24
    assert x - 8 <= peak[1] < x + 24


def test_scores_do_not_depend_on_how_many_images_are_scored_together(net):
    normal, images = noise(40, 64, 64), noise(40, 64, 64, seed=1)
    for run in (IMAGE, windows(), windows("position")):
        scorer = Scorer.fit(run, net, normal)
        apart = torch.cat([scorer.score(images[:1]), scorer.score(images[1:])])
        torch.testing.assert_close(scorer.score(images), apart, rtol=1e-4, atol=0)
        assert len(scorer.score(images[:0])) == 0


def test_an_image_level_map_is_gradcams_and_needs_training(net):
    normal, images = noise(4, 64, 64), noise(2, 64, 64, seed=1)
    assert Scorer.fit(IMAGE, net, normal).maps(images).shape == (2, 64, 64)
    bare = Run(**(vars(IMAGE) | {"method": "untrained", "updates": 0}))
    with pytest.raises(ValueError, match="needs a trained ResNet"):
        Scorer.fit(bare, net, normal).maps(images)
