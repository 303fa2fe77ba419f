"""Features compared and projected: the same points for a seed, numbers with known answers."""

import json
from dataclasses import replace
from math import erf

import numba
import numpy as np
import pytest
import torch

from cplib import datasets
from cplib.run import Run
from cplib.study import features
from cplib.study.features import GROUPS, describe, image_groups, project, record, separability
from cplib.study.store import Places, run_folder
from cplib.study.sweep import execute

RUN = Run(method="untrained", category="sieve", dataset="demo", size=64, updates=0)


@pytest.fixture(scope="module")
def places(tmp_path_factory, demo_root):
    """Where an untrained run and its images are."""
    places = Places(tmp_path_factory.mktemp("results"), demo_root)
    execute(RUN, places)
    with pytest.MonkeyPatch.context() as patch:  # to compile UMAP takes 10 s
        patch.setattr(numba.config, "DISABLE_JIT", True)
        yield places


@pytest.fixture(scope="module")
def test_set(demo_root):
    return datasets.load(demo_root, "sieve", "test", 64)


def cloud(n, shift=0.0, dims=2, seed=0):
    """A standard normal cloud (n, dims), moved along its first axis."""
    z = np.random.default_rng(seed).normal(size=(n, dims))
    z[:, 0] += shift
    return z


# Numbers with known answers


def test_groups_far_apart_are_told_apart_and_do_not_mix():
    numbers = separability(cloud(40), cloud(30, shift=20, seed=1))
    assert (numbers["classifier_auroc"], numbers["mixing"]) == (100, 0)
    assert numbers["silhouette"] > 0.8
    assert set(separability(cloud(1), cloud(9)).values()) == {None}


@pytest.mark.parametrize("sizes", [(40, 40), (60, 15)])
def test_groups_of_one_distribution_are_at_chance_whatever_their_sizes(sizes):
    draws = [
        separability(cloud(sizes[0], seed=2 * i), cloud(sizes[1], seed=2 * i + 1))
        for i in range(30)
    ]
    for name, expected in {"classifier_auroc": 50, "mixing": 100, "silhouette": 0}.items():
        values = np.array([d[name] for d in draws])
        assert abs(values.mean() - expected) < 3.5 * values.std() / np.sqrt(len(values)) + 0.02


def test_the_classifier_reaches_the_auroc_of_two_gaussians():
    best = 50 * (1 + erf(1 / 2))  # of unit normals one apart: Phi(1 / sqrt 2)
    ours = separability(cloud(1000), cloud(1000, 1, seed=1))["classifier_auroc"]
    assert ours == pytest.approx(best, abs=3)


def test_mixing_equals_a_count_by_hand():
    a, b = cloud(12), cloud(7, shift=1, seed=1)
    x, y = np.concatenate([a, b]), [0] * 12 + [1] * 7
    shares, chances = [], []
    for i in range(19):
        others = sorted((np.linalg.norm(x[i] - x[j]), j) for j in range(19) if j != i)
        shares += [y[j] != y[i] for _, j in others[: features.NEIGHBOURS]]
        chances += [y[j] != y[i] for _, j in others]
    expected = 100 * np.mean(shares) / np.mean(chances)
    assert separability(a, b)["mixing"] == pytest.approx(expected)


# The record


def test_a_record_is_made_again_to_the_byte_and_reread_without_images(places):
    file, found = run_folder(RUN, places.results) / "features.json", record(RUN, places)
    first = file.read_bytes()
    assert record(RUN, places._replace(data=None)) == found
    file.unlink()
    assert record(RUN, places._replace(data=None)) is None
    torch.manual_seed(7)
    np.random.seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert record(RUN, places) == found
    assert file.read_bytes() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_record_holds_every_number_and_every_point(places):
    found = record(RUN, places)
    assert list(found["pairs"]) == ["normal anomaly", "anomaly cutpaste", "anomaly cutpaste_scar"]
    for numbers in found["pairs"].values():
        assert list(numbers) == ["classifier_auroc", "mixing", "silhouette"]
        assert np.isfinite(list(numbers.values())).all()
    for name in ("tsne", "umap"):
        shapes = [np.shape(found[name][group]) for group in GROUPS]
        assert shapes == [(2, 4), (2, 6), (2, 4), (2, 4)]
    metrics = json.loads((run_folder(RUN, places.results) / "metrics.json").read_text())
    assert found["gaussian_auroc"]["anomaly"] == pytest.approx(metrics["image_auroc"])
    numbers = features.table({("sieve", "untrained"): found, ("sieve", "cutpaste_3way"): found})
    assert len(numbers) == 2 * (3 + 3 * 3)


@pytest.mark.parametrize("label", [0, 1])
def test_a_test_set_without_one_kind_of_images_has_empty_numbers(test_set, label):
    chosen = test_set.labels == label
    only = replace(test_set, pixels=test_set.pixels[chosen], labels=test_set.labels[chosen])
    groups = [x.flatten(1)[:, ::500].float() for x in image_groups(RUN, only)]
    made = describe(groups, np.arange(sum(map(len, groups))))
    assert made["gaussian_auroc"]["anomaly"] is None
    assert set(made["pairs"]["normal anomaly"].values()) == {None}
    with pytest.raises(ValueError, match="3 images are too few"):
        project({g: cloud(int(i < 3)) for i, g in enumerate(GROUPS)})


# The groups


def test_copies_differ_from_their_normal_image_in_a_patch(test_set):
    normal, anomaly, patch, scar = image_groups(RUN, test_set)
    assert torch.equal(normal, test_set.pixels[test_set.labels == 0])
    assert torch.equal(anomaly, test_set.pixels[test_set.labels == 1])
    for copies in (patch, scar):
        changed = (copies != normal).any(1).flatten(1).float().mean(1)
        assert (changed > 0).all()
        assert (changed <= RUN.area[1]).all()
    assert not torch.equal(patch, scar)
