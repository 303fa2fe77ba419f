"""Features compared and projected: the same points for a seed, numbers with known answers."""

import json
from dataclasses import replace
from functools import partial
from math import erf

import numba
import numpy as np
import pytest
import torch

from cplib import datasets
from cplib.metrics import auroc_between
from cplib.model import build
from cplib.run import Run
from cplib.score import Scorer
from cplib.study.features import GROUPS, features, image_groups, project, separability, table

apart = partial(separability, folds=5, neighbours=5)
RUN = Run(method="untrained", category="sieve", dataset="demo", size=64, updates=0)


@pytest.fixture(scope="module")
def images(demo_root):
    """Training and test images of the run."""
    return [datasets.load(demo_root, "sieve", split, 64) for split in ("train", "test")]


@pytest.fixture(scope="module")
def found(images):
    """What is measured of an untrained network."""
    with pytest.MonkeyPatch.context() as patch:  # to compile UMAP takes 10 s
        patch.setattr(numba.config, "DISABLE_JIT", True)
        yield features(RUN, build(RUN), *images)


def cloud(n, shift=0.0, dims=2, seed=0):
    """A standard normal cloud (n, dims), moved along its first axis."""
    z = np.random.default_rng(seed).normal(size=(n, dims))
    z[:, 0] += shift
    return z


# Numbers with known answers


def test_groups_far_apart_are_told_apart_and_do_not_mix():
    numbers = apart(cloud(40), cloud(30, shift=20, seed=1))
    assert (numbers["classifier_auroc"], numbers["mixing"]) == (100, 0)
    assert numbers["silhouette"] > 0.8
    assert set(apart(cloud(1), cloud(9)).values()) == {None}


@pytest.mark.parametrize("sizes", [(40, 40), (60, 15)])
def test_groups_of_one_distribution_are_at_chance_whatever_their_sizes(sizes):
    draws = [apart(cloud(sizes[0], seed=2 * i), cloud(sizes[1], seed=2 * i + 1)) for i in range(30)]
    for name, expected in {"classifier_auroc": 50, "mixing": 100, "silhouette": 0}.items():
        values = np.array([d[name] for d in draws])
        assert abs(values.mean() - expected) < 3.5 * values.std() / np.sqrt(len(values)) + 0.02


def test_the_classifier_reaches_the_auroc_of_two_gaussians():
    best = 50 * (1 + erf(1 / 2))  # of unit normals one apart: Phi(1 / sqrt 2)
    ours = apart(cloud(1000), cloud(1000, 1, seed=1))["classifier_auroc"]
    assert ours == pytest.approx(best, abs=3)


def test_mixing_equals_a_count_by_hand():
    a, b = cloud(12), cloud(7, shift=1, seed=1)
    x, y = np.concatenate([a, b]), [0] * 12 + [1] * 7
    shares, chances = [], []
    for i in range(19):
        others = sorted((np.linalg.norm(x[i] - x[j]), j) for j in range(19) if j != i)
        shares += [y[j] != y[i] for _, j in others[:5]]
        chances += [y[j] != y[i] for _, j in others]
    expected = 100 * np.mean(shares) / np.mean(chances)
    assert apart(a, b)["mixing"] == pytest.approx(expected)


# The record


def test_it_is_made_again_to_the_byte_and_leaves_random_state_alone(images, found):
    torch.manual_seed(7)
    np.random.seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert json.dumps(features(RUN, build(RUN), *images)) == json.dumps(found)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_it_holds_every_number_and_every_point(images, found):
    assert list(found["pairs"]) == ["normal anomaly", "anomaly cutpaste", "anomaly cutpaste_scar"]
    for numbers in found["pairs"].values():
        assert list(numbers) == ["classifier_auroc", "mixing", "silhouette"]
        assert np.isfinite(list(numbers.values())).all()
    for name in ("tsne", "umap"):
        shapes = [np.shape(found[name][group]) for group in GROUPS]
        assert shapes == [(2, 4), (2, 6), (2, 4), (2, 4)]
    train, test = images
    scores = Scorer.fit(RUN, build(RUN), train.pixels).score(test.pixels)
    auroc = auroc_between(scores[test.labels == 0], scores[test.labels == 1])
    assert found["gaussian_auroc"]["anomaly"] == pytest.approx(auroc)
    numbers = table({("sieve", "untrained"): found, ("sieve", "cutpaste_3way"): found})
    assert len(numbers) == 2 * (3 + 3 * 3)


@pytest.mark.parametrize("label", [0, 1])
def test_a_test_set_without_one_kind_of_images_has_no_numbers(images, label):
    train, test = images
    chosen = test.labels == label
    only = replace(test, pixels=test.pixels[chosen], labels=test.labels[chosen])
    assert features(RUN, build(RUN), train, only) == {}
    with pytest.raises(ValueError, match="3 images are too few"):
        project({g: cloud(int(i < 3)) for i, g in enumerate(GROUPS)}, 30.0, 15)


# The groups


def test_copies_belong_to_the_normal_images_and_a_limit_keeps_the_kinds(images):
    test = images[1]
    normal, anomaly, patch, scar = image_groups(RUN, test, 120)
    assert torch.equal(normal, test.pixels[test.labels == 0])
    assert torch.equal(anomaly, test.pixels[test.labels == 1])
    assert len(patch) == len(scar) == len(normal)
    few = image_groups(RUN, test, 3)
    assert torch.equal(few[1], anomaly[::2])
