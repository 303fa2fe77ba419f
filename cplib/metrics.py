"""Image-level metrics, in percent: thin wrappers over scikit-learn."""

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")


def image_metrics(labels, scores) -> dict[str, float | None]:
    """AUROC, average precision and the best F1 over all thresholds, in percent.

    ``labels`` (N,) are 0 or 1, ``scores`` (N,) higher where more anomalous. Each metric is None
    where the test set lacks good or defective pictures; ValueError if a score is not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite: the training diverged")
    if len(np.unique(labels)) < 2:
        return dict.fromkeys(IMAGE_METRICS)
    values = roc_auc_score(labels, scores), average_precision_score(labels, scores)
    best = f1_max(labels, scores)[0]
    return dict(zip(IMAGE_METRICS, (100 * float(v) for v in (*values, best)), strict=True))


def f1_max(labels, scores) -> tuple[float, float]:
    """The best F1 (0 to 1) over all thresholds, and the threshold: defective is score >= it."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(f1[best]), float(thresholds[best])
