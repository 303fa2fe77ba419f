"""Metrics against their definitions, computed the long way."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import label

from cplib.metrics import (
    IMAGE_METRICS,
    PIXEL_METRICS,
    auroc_between,
    f1_max,
    image_metrics,
    pixel_metrics,
)


@st.composite
def labelled_scores(draw):
    """Labels of both classes and scores of few distinct values, so that many are equal."""
    labels = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=30))]
    levels = st.integers(-4, 4).map(lambda v: v / 2)
    scores = draw(st.lists(levels, min_size=len(labels), max_size=len(labels)))
    return np.array(labels), np.array(scores)


def share_of_pairs_in_order(labels, scores):
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    return np.mean([(b > g) + 0.5 * (b == g) for b in anomalous for g in normal])


def counts(labels, scores, threshold):
    """Anomalous images found, false alarms, and anomalous images in all."""
    found = scores >= threshold
    return np.sum(found & (labels == 1)), np.sum(found & (labels == 0)), np.sum(labels == 1)


def f1(labels, scores, threshold):
    hits, alarms, anomalous = counts(labels, scores, threshold)
    return 2 * hits / (hits + alarms + anomalous)


def average_precision(labels, scores):
    area, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        hits, alarms, anomalous = counts(labels, scores, threshold)
        area += (hits / anomalous - recall) * hits / (hits + alarms)
        recall = hits / anomalous
    return area


@given(labelled_scores())
def test_auroc_and_average_precision_are_what_they_are_defined_as(test):
    labels, scores = test
    found, pairs = image_metrics(labels, scores), share_of_pairs_in_order(labels, scores)
    assert found["image_auroc"] == pytest.approx(100 * pairs)
    assert auroc_between(scores[labels == 0], scores[labels == 1]) == found["image_auroc"]
    assert found["image_ap"] == pytest.approx(100 * average_precision(labels, scores))


@given(labelled_scores())
def test_the_best_f1_is_that_of_all_thresholds_and_reached_at_the_one_returned(test):
    labels, scores = test
    best, threshold = f1_max(labels, scores)
    assert best == pytest.approx(max(f1(labels, scores, value) for value in scores))
    assert best == pytest.approx(f1(labels, scores, threshold))
    assert image_metrics(labels, scores)["image_f1max"] == pytest.approx(100 * best)


@given(labelled_scores(), st.floats(0.5, 3), st.floats(-5, 5))
def test_no_metric_depends_on_the_scale_of_the_scores(test, scale, shift):
    labels, scores = test
    moved = image_metrics(labels, scale * scores + shift)
    assert moved == pytest.approx(image_metrics(labels, scores))


@pytest.mark.parametrize("label", [0, 1])
def test_metrics_of_one_class_are_none(label):
    assert image_metrics([label] * 3, [0.1, 0.2, 0.3]) == dict.fromkeys(IMAGE_METRICS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        image_metrics([0, 1], [0.1, value])


# Of pixels


@pytest.fixture
def masks():
    """Four regions: two of one image, one held by a corner, one where the image before has one."""
    masks = np.zeros((4, 24, 20), bool)
    masks[0, 3:7, 4:9] = masks[0, 15:18, 10:19] = True
    masks[1, 10:20, 2:4] = masks[1, 20:22, 4:9] = masks[2, 12:16, 2:12] = True
    return masks


def aupro(masks, maps, limit):
    """Percent of the area under the per-region overlap, up to the limit, threshold by threshold."""
    parts = [(n, label(mask, np.ones((3, 3)))) for n, mask in enumerate(masks)]
    regions = [(n, part == i) for n, (part, count) in parts for i in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        overlap = np.mean([found[n][region].mean() for n, region in regions])
        points.append((found[~masks].mean(), overlap))
    area = 0.0
    for (x, y), (next_x, next_y) in pairwise(points):
        if x < limit and next_x > x:
            width = min(next_x, limit) - x
            area += width * (y + (next_y - y) * width / (next_x - x) / 2)
    return 100 * area / limit


@pytest.mark.parametrize("kind", ["noisy", "peaked", "tied", "constant"])
def test_pixel_metrics_are_what_they_are_defined_as(masks, kind):
    rng = np.random.default_rng(0)
    maps = rng.random(masks.shape) ** (5 if kind == "peaked" else 1) + masks / 2
    maps = {"tied": maps.round(1), "constant": np.ones(masks.shape)}.get(kind, maps)
    maps = maps.astype(np.float32)
    found = pixel_metrics(masks, maps)
    assert tuple(found) == PIXEL_METRICS
    flat, scores = masks.ravel(), maps.ravel()
    assert found["pixel_auroc"] == pytest.approx(100 * share_of_pairs_in_order(flat, scores))
    assert found["pixel_ap"] == pytest.approx(100 * average_precision(flat, scores))
    assert found["aupro_30"] == pytest.approx(aupro(masks, maps, 0.3))
    assert found["aupro_05"] == pytest.approx(aupro(masks, maps, 0.05))
    if kind == "constant":
        assert [found[name] for name in PIXEL_METRICS[2:]] == pytest.approx([15, 2.5])


def test_aupro_is_right_where_the_overlap_climbs_steeply():
    """Overlap is the false positive rate to the power 0.2: the mean up to t is t**0.2 / 1.2."""
    masks = np.arange(400)[:, None].repeat(200, 1)[None] < 200
    rank = (np.arange(40_000) + 0.5) / 40_000
    maps = -np.concatenate([rank**5, rank]).reshape(masks.shape)
    found = pixel_metrics(masks, maps)
    for name, limit in (("aupro_30", 0.3), ("aupro_05", 0.05)):
        assert found[name] == pytest.approx(100 * limit**0.2 / 1.2, abs=0.05)


def test_pixel_metrics_are_empty_without_masks_or_anomalies():
    empty = dict.fromkeys(PIXEL_METRICS)
    assert pixel_metrics(None, torch.rand(2, 8, 8)) == empty
    assert pixel_metrics(np.zeros((2, 8, 8), bool), np.random.rand(2, 8, 8)) == empty
