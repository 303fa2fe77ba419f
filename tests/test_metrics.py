"""Metrics against their definitions, computed the long way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cplib.metrics import IMAGE_METRICS, auroc_between, f1_max, image_metrics


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
