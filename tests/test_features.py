"""Features compared and projected: the same pictures for a seed, and numbers with known answers."""

import json
import warnings
from dataclasses import replace
from math import erf

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from cplib import data, features
from cplib.config import Run
from cplib.features import GROUPS, Study, apart, describe, pictures, project, record
from cplib.figures import GROUP_MARKS, NAMES, scatter
from cplib.runs import execute, run_folder

RUN = Run(method="untrained", category="gear", dataset="demo", size=64, updates=0)
PAIRS = ("normal anomaly", "anomaly cutpaste", "anomaly cutpaste_scar")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, demo_root):
    """The places of an untrained run's results."""
    results = tmp_path_factory.mktemp("results")
    execute(RUN, data_root=demo_root, results=results)
    return {"results": results, "data_root": demo_root}


@pytest.fixture(scope="module")
def found(finished):
    """The record of that run."""
    return record(RUN, **finished)


@pytest.fixture(scope="module")
def test_set(demo_root):
    return data.load(demo_root, "gear", "test", 64)


def cloud(n, shift=0.0, dims=2, seed=0):
    """A standard normal cloud (n, dims), moved along its first axis."""
    z = np.random.default_rng(seed).normal(size=(n, dims))
    z[:, 0] += shift
    return z


# Numbers with known answers


def test_groups_far_apart_are_told_apart_and_do_not_mix():
    numbers = apart(cloud(40), cloud(30, shift=20, seed=1), Study())
    assert numbers["classifier_auroc"] == 100
    assert numbers["mixing"] == 0
    assert numbers["silhouette"] > 0.8


@pytest.mark.parametrize("sizes", [(60, 60), (80, 20)])
def test_groups_of_one_distribution_are_at_chance(sizes):
    """Whatever their sizes: the mean over many draws, with its own standard error."""
    draws = [
        apart(cloud(sizes[0], seed=2 * i), cloud(sizes[1], seed=2 * i + 1), Study(seed=i))
        for i in range(40)
    ]
    for name, expected in {"classifier_auroc": 50, "mixing": 100, "silhouette": 0}.items():
        values = np.array([d[name] for d in draws])
        assert abs(values.mean() - expected) < 3.5 * values.std() / np.sqrt(len(values)) + 0.02


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_the_classifier_reaches_the_auroc_of_two_gaussians(shift):
    best = 50 * (1 + erf(shift / 2))  # of unit normals so far apart: Phi(shift / sqrt 2)
    ours = apart(cloud(1500), cloud(1500, shift, seed=1), Study())["classifier_auroc"]
    assert ours == pytest.approx(best, abs=3)


def test_mixing_equals_a_count_by_hand():
    a, b = cloud(12), cloud(7, shift=1, seed=1)
    x, y = np.concatenate([a, b]), [0] * 12 + [1] * 7
    shares, chances = [], []
    for i in range(19):
        others = sorted((np.linalg.norm(x[i] - x[j]), j) for j in range(19) if j != i)
        shares += [y[j] != y[i] for _, j in others[:3]]
        chances += [y[j] != y[i] for _, j in others]
    expected = 100 * np.mean(shares) / np.mean(chances)
    assert apart(a, b, Study(neighbours=3))["mixing"] == pytest.approx(expected)


def test_a_group_of_one_has_no_numbers():
    assert set(apart(cloud(1), cloud(9), Study()).values()) == {None}


# The same pictures for the same seed


@pytest.fixture(scope="module")
def groups():
    return {g: cloud(9, shift=3 * i, dims=16, seed=i) for i, g in enumerate(GROUPS)}


def test_the_same_seed_gives_the_same_points(groups):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = project(groups, Study()), project(groups, Study())
    for name in ("tsne", "umap"):
        assert first[name].shape == (36, 2)
        assert first[name].tobytes() == again[name].tobytes()
        assert np.ptp(first[name], axis=0).min() > 0


def test_far_groups_are_far_in_both_projections(groups):
    far = {g: z + 50 * i for i, (g, z) in enumerate(groups.items())}
    for xy in project(far, Study()).values():
        assert apart(xy[:9], xy[9:18], Study())["mixing"] == 0


def test_too_few_pictures_are_refused(groups):
    few = {g: z[: i < 3] for i, (g, z) in enumerate(groups.items())}
    with pytest.raises(ValueError, match="3 pictures are too few"):
        project(few, Study())


def test_the_same_seed_gives_the_same_record_and_another_seed_another(finished, found):
    file = run_folder(RUN, finished["results"]) / "features.json"
    first = file.read_bytes()
    file.unlink()
    torch.manual_seed(7)
    np.random.seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert record(RUN, **finished) == found
    assert file.read_bytes() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    other = record(RUN, Study(seed=1), **finished)
    assert file.read_bytes() == first
    for name in ("tsne", "umap"):
        assert other[name] != found[name]


# The record


def test_a_record_is_reread_without_data(finished, found):
    assert record(RUN, results=finished["results"], data_root=None) == found
    assert record(RUN, Study(folds=2), results=finished["results"], data_root=None) is None


def test_a_record_holds_every_number_and_every_point(finished, found):
    assert tuple(found["pairs"]) == PAIRS
    for numbers in found["pairs"].values():
        assert set(numbers) == {"classifier_auroc", "mixing", "silhouette"}
        assert np.isfinite(list(numbers.values())).all()
    for name in ("tsne", "umap"):
        shapes = {group: np.shape(xy) for group, xy in found[name].items()}
        assert shapes == dict(zip(GROUPS, [(2, 4), (2, 6), (2, 4), (2, 4)], strict=True))
    folder = run_folder(RUN, finished["results"])
    assert (folder / "features.json").stat().st_size < 100_000
    metrics = json.loads((folder / "metrics.json").read_text())
    assert found["gaussian_auroc"]["anomaly"] == pytest.approx(metrics["image_auroc"])


def test_the_largest_groups_make_a_small_file(tmp_path):
    groups = [cloud(Study().limit, shift=i, dims=8, seed=i) for i in range(4)]
    file = tmp_path / "record.json"
    file.write_text(json.dumps(describe(groups, np.concatenate(groups)[:, 0], Study()), indent=1))
    assert file.stat().st_size < 100_000


@pytest.mark.parametrize("label", [0, 1])
def test_a_test_set_without_one_kind_of_pictures_has_empty_numbers(test_set, label):
    chosen = test_set.labels == label
    only = replace(test_set, pixels=test_set.pixels[chosen], labels=test_set.labels[chosen])
    groups = [x.flatten(1)[:, ::500].float() for x in pictures(RUN, only, Study())]
    made = describe(groups, np.arange(sum(map(len, groups))), Study())
    assert made["gaussian_auroc"]["anomaly"] is None
    assert set(made["pairs"]["normal anomaly"].values()) == {None}


# The groups


def test_copies_differ_from_their_source_in_a_patch(test_set):
    normal, anomaly, patch, scar = pictures(RUN, test_set, Study())
    assert torch.equal(normal, test_set.pixels[test_set.labels == 0])
    assert torch.equal(anomaly, test_set.pixels[test_set.labels == 1])
    for copies in (patch, scar):
        changed = (copies != normal).any(1).flatten(1).float().mean(1)
        assert (changed > 0).all()
        assert (changed <= RUN.area[1]).all()
    assert not torch.equal(patch, scar)


def test_a_limit_keeps_every_kind(test_set):
    anomaly = pictures(RUN, test_set, Study(limit=3))[1]
    defects = test_set.pixels[test_set.labels == 1]
    kinds = np.array(test_set.kinds)[test_set.labels.numpy() == 1]
    kept = {kinds[(defects == x).flatten(1).all(1).nonzero()[0, 0]] for x in anomaly}
    assert len(anomaly) == 3
    assert kept == set(kinds)


# What is shown


def test_the_figure_has_a_marker_and_a_name_for_each_group(found):
    fig, ax = plt.subplots()
    scatter(ax, found["tsne"])
    shapes = {c.get_paths()[0].vertices.tobytes() for c in ax.collections}
    assert len(shapes) == len(GROUP_MARKS) == 4
    assert len({c.get_label() for c in ax.collections}) == 4
    assert [len(c.get_offsets()) for c in ax.collections] == [4, 6, 4, 4]
    plt.close(fig)


def test_the_sentences_say_the_means_of_the_table(found):
    twice = json.loads(json.dumps(found))
    twice["gaussian_auroc"]["anomaly"] = 12.5
    records = {("gear", "untrained"): twice, ("gear", "cutpaste_3way"): found}
    numbers = features.table(records)
    assert len(numbers) == 2 * (3 + 3 * 3)
    text = features.summary(numbers, "untrained", NAMES)
    assert f"12.5 before and {found['gaussian_auroc']['anomaly']:.1f} after" in text
    assert text.count(". ") + text.endswith(".") == 2


def test_nothing_measured_is_said_so():
    assert "Too little" in features.summary(features.table({}), "untrained", NAMES)
