"""Features compared and projected: the same points for a seed, numbers with known answers."""

import json
from dataclasses import replace
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
from cplib.study.features import (
    GROUPS,
    distance_ratio,
    features,
    findings,
    image_groups,
    project,
    separability,
    table,
    told_by_light,
)
from cplib.study.profiles import METHOD

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


@pytest.mark.parametrize("sizes", [(40, 40), (60, 15)])
def test_groups_of_one_distribution_are_at_chance_whatever_their_sizes(sizes):
    clouds = [[cloud(n, seed=2 * i + k) for k, n in enumerate(sizes)] for i in range(30)]
    values = np.array([separability(a, b, folds=5) for a, b in clouds])
    assert abs(values.mean() - 50) < 3.5 * values.std() / np.sqrt(len(values)) + 0.02


def test_the_classifier_reaches_the_auroc_of_two_gaussians():
    best = 50 * (1 + erf(1 / 2))  # of unit normals one apart: Phi(1 / sqrt 2)
    ours = separability(cloud(1000), cloud(1000, 1, seed=1), folds=5)
    assert ours == pytest.approx(best, abs=3)


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
        assert 0 <= numbers["classifier_auroc"] <= 100
    for name in ("tsne", "umap"):
        shapes = [np.shape(found[name][group]) for group in GROUPS]
        assert shapes == [(2, 4), (2, 6), (2, 4), (2, 4)]
    train, test = images
    scores = Scorer.fit(RUN, build(RUN), train.pixels).score(test.pixels)
    auroc = auroc_between(scores[test.labels == 0], scores[test.labels == 1])
    assert found["gaussian_auroc"]["anomaly"] == pytest.approx(auroc)


def test_what_training_changed_is_said_in_whole_percent():
    def record(real, scar, plane):
        gaussian = {"anomaly": real, "cutpaste": 99.6, "cutpaste_scar": scar}
        pairs = ("normal anomaly", "anomaly cutpaste", "anomaly cutpaste_scar")
        return {
            "gaussian_auroc": gaussian,
            "pairs": {pair: {"classifier_auroc": plane} for pair in pairs},
        }

    found = {("tile", "untrained", 0): record(77, 50.4, 79)}
    found |= {("tile", "untrained", 1): record(79, 50.4, 79)}  # the mean of both is shown
    found |= {("tile", METHOD, 0): record(99, 98.6, 98)}
    found |= {("screw", "untrained", 0): record(61, 59, 100)}
    found |= {("screw", METHOD, 0): record(60, 90, 100)}
    numbers = table(found)
    assert numbers.loc["tile", "untrained"].tolist()[:-1] == [78, 99.6, 50.4, 79, 79, 79]
    text, means = findings(numbers, "untrained", METHOD, told_by_light({"tile": None, "grid": 0}))
    assert text == (
        "- **Real anomalies from normal images**: the Gaussian's AUROC is 80, higher "
        "than before training (70).\n- **Real anomalies from pasted ones**: AUROC of a plane "
        "between them and patches, and of one between them and scars: 99 and 99, higher than "
        "before training (90 and 90). To compare, AUROC of a plane between them and normal images: "
        "99, higher than before training (90).\n"
        "- *Training* raises *Gaussian: scar* most, from 55 to 94. (Patches and scars were in its "
        "training.)\n- **The claims do not show what training adds**: their limits are passed "
        "on average before training, too.\n- **Finding pasted patches is not finding defects**: on "
        "screw the Gaussian's AUROC is 100 for patches, and 60 for real anomalies. So test a "
        "detector on real defects, not on what was pasted."
    )
    assert (
        means.loc["untrained"].tolist()[:-1] == pytest.approx([69.5, 99.6, 54.7, 89.5, 89.5, 89.5])
        and "without" not in text
    )
    for auroc in (0.0, 99):  # the light of screw tells, and of tile a point is too little to tell
        text, means = findings(
            numbers, "untrained", METHOD, told_by_light({"tile": 60, "screw": auroc})
        )
        assert means.loc[METHOD].tolist()[:-1] == [99, 99.6, 98.6, 98, 98, 98]
    found["tile", "pretrained", 0] = record(96, 92.6, 98)  # as the trained one, but on scars
    found["tile", METHOD, 0] = record(70, 98.6, 98)
    text, _ = findings(table(found), "untrained", METHOD, ["screw"])
    assert "is 70, lower than with ImageNet features (96), lower than before training (78)." in text
    assert "98 and 98, about as high as with ImageNet features (98 and 98), higher than" in text
    assert "(*About as high*: the mean difference is at most 5 points; it is no test.)" in text
    assert "distance ratio" not in text
    for (_, method, _), numbers in found.items():
        numbers["distance_ratio"] = 1.5 if method == METHOD else 1.2
    text, _ = findings(table(found), "untrained", METHOD, [])
    words = "the distance ratio is higher in 1 of 1 categories: 1.5 on average, 1.2 before "
    assert f"{words}training, 1.2 with ImageNet features." in text


@pytest.mark.parametrize("label", [0, 1])
def test_a_test_set_without_one_kind_of_images_has_no_numbers(images, label):
    train, test = images
    chosen = test.labels == label
    only = replace(test, pixels=test.pixels[chosen], labels=test.labels[chosen])
    assert features(RUN, build(RUN), train, only) == {}
    with pytest.raises(ValueError, match="3 images are too few"):
        project({g: cloud(int(i < 3)) for i, g in enumerate(GROUPS)}, 30.0, 15)


def test_the_distance_ratio_grows_with_the_distance_of_the_anomalies_and_keeps_under_scale():
    normal, real = (torch.tensor(cloud(50, shift, seed=i)) for i, shift in enumerate((0, 5)))
    near = torch.tensor(cloud(50, seed=1))
    assert distance_ratio(normal, near) == pytest.approx(1, abs=0.2)
    assert distance_ratio(normal, real) > 2
    assert distance_ratio(3 * normal, 3 * real) == pytest.approx(distance_ratio(normal, real))


# The groups


def test_copies_belong_to_the_normal_images_and_a_limit_keeps_the_kinds(images):
    test = images[1]
    normal, anomaly, patch, scar = image_groups(RUN, test, 120)
    assert torch.equal(normal, test.pixels[test.labels == 0])
    assert torch.equal(anomaly, test.pixels[test.labels == 1])
    assert len(patch) == len(scar) == len(normal)
    few = image_groups(RUN, test, 3)
    assert torch.equal(few[1], anomaly[::2])
