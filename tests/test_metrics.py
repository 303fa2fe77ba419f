"""Metrics against their definitions, computed the long way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cplib.metrics import IMAGE_METRICS, f1_max, image_metrics


@st.composite
def labelled_scores(draw):
    """Labels of both classes and scores of few distinct values, so that many are equal."""
    labels = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=30))]
    levels = st.integers(-4, 4).map(lambda v: v / 2)
    scores = draw(st.lists(levels, min_size=len(labels), max_size=len(labels)))
    return np.array(labels), np.array(scores)


def _share_of_pairs_in_order(labels, scores):
    good, bad = scores[labels == 0], scores[labels == 1]
    return np.mean([(b > g) + 0.5 * (b == g) for b in bad for g in good])


def _confusion(labels, scores, threshold):
    found = scores >= threshold
    return np.sum(found & (labels == 1)), np.sum(found & (labels == 0)), np.sum(labels == 1)


def _f1(labels, scores, threshold):
    hits, alarms, defects = _confusion(labels, scores, threshold)
    return 2 * hits / (hits + alarms + defects)


def _average_precision(labels, scores):
    area, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        hits, alarms, defects = _confusion(labels, scores, threshold)
        area += (hits / defects - recall) * hits / (hits + alarms)
        recall = hits / defects
    return area


@given(labelled_scores())
def test_auroc_is_the_share_of_pairs_in_order_ties_counted_half(test):
    expected = 100 * _share_of_pairs_in_order(*test)
    assert image_metrics(*test)["image_auroc"] == pytest.approx(expected)


@given(labelled_scores())
def test_average_precision_is_the_sum_over_thresholds(test):
    assert image_metrics(*test)["image_ap"] == pytest.approx(100 * _average_precision(*test))


@given(labelled_scores())
def test_f1_max_is_the_best_over_all_thresholds(test):
    labels, scores = test
    best = max(_f1(labels, scores, threshold) for threshold in scores)
    assert f1_max(labels, scores)[0] == pytest.approx(best)
    assert image_metrics(labels, scores)["image_f1max"] == pytest.approx(100 * best)


@given(labelled_scores())
def test_f1_max_is_reached_at_the_threshold_returned(test):
    best, threshold = f1_max(*test)
    assert _f1(*test, threshold) == pytest.approx(best)


def test_scores_in_perfect_order_give_one_hundred():
    values = image_metrics([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4])
    assert values == dict.fromkeys(IMAGE_METRICS, 100.0)


def test_scores_in_reverse_order_give_zero_auroc():
    assert image_metrics([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4])["image_auroc"] == 0


@given(labelled_scores(), st.floats(0.5, 3), st.floats(-5, 5))
def test_no_metric_depends_on_the_scale_of_the_scores(test, scale, shift):
    labels, scores = test
    moved = image_metrics(labels, scale * scores + shift)
    assert moved == pytest.approx(image_metrics(labels, scores))


def test_large_raw_scores_are_not_squashed():
    assert image_metrics([0, 1, 0, 1], [500.0, 600.0, 700.0, 800.0])["image_auroc"] == 75


@pytest.mark.parametrize("label", [0, 1])
def test_metrics_of_one_class_are_none(label):
    assert image_metrics([label] * 3, [0.1, 0.2, 0.3]) == dict.fromkeys(IMAGE_METRICS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        image_metrics([0, 1], [0.1, value])
