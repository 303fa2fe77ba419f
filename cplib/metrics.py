"""Image- and pixel-level metrics, in percent: thin wrappers over libraries."""

import numpy as np
from adeval.au_pro import calculate_au_pro
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "aupro_30", "aupro_05")


def image_metrics(labels, scores) -> dict[str, float | None]:
    """AUROC, average precision and the best F1 over all thresholds, in percent.

    ``labels`` (N,) are 0 or 1, ``scores`` (N,) higher where more anomalous. Each metric is None
    where the test set lacks normal or anomalous images; ValueError if a score is not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite: the training diverged")
    if len(np.unique(labels)) < 2:
        return dict.fromkeys(IMAGE_METRICS)
    values = roc_auc_score(labels, scores), average_precision_score(labels, scores)
    best = f1_max(labels, scores)[0]
    return dict(zip(IMAGE_METRICS, (100 * float(v) for v in (*values, best)), strict=True))


def auroc_between(normal, anomalous) -> float | None:
    """AUROC, percent, of the scores (N,) of normal images against those (M,) of anomalous ones."""
    labels = np.repeat([0, 1], [len(normal), len(anomalous)])
    return image_metrics(labels, np.concatenate([normal, anomalous]))["image_auroc"]


def f1_max(labels, scores) -> tuple[float, float]:
    """The best F1 (0 to 1) over all thresholds, and the threshold: anomalous is score >= it."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(f1[best]), float(thresholds[best])


def pixel_metrics(masks, maps) -> dict[str, float | None]:
    """AUROC and average precision of all pixels, and AUPRO up to 30 % and 5 % false positives.

    ``masks`` (N, H, W) are True on anomalies, ``maps`` (N, H, W) higher where more anomalous. In
    percent; None without masks, or where no pixel is anomalous or none is normal.
    """
    if masks is None or len(np.unique(masks)) < 2:
        return dict.fromkeys(PIXEL_METRICS)
    masks, maps = np.asarray(masks), np.asarray(maps, dtype=np.float32)
    flat, values = masks.ravel(), maps.ravel()
    found = [roc_auc_score(flat, values), average_precision_score(flat, values)]
    truth = list(masks.astype(np.uint8))
    found += [calculate_au_pro(truth, list(maps), limit)[0] for limit in (0.3, 0.05)]
    return dict(zip(PIXEL_METRICS, (100 * float(v) for v in found), strict=True))


def peak_within(masks, maps, distance: float = 16) -> float | None:
    """Percent of anomalous images whose highest pixel lies on the anomaly, or so many px from it.

    ``masks`` and ``maps`` are (N, H, W); None where no image has an anomaly.
    """
    hits = []
    for mask, values in zip(np.asarray(masks), np.asarray(maps), strict=True):
        if mask.any():
            away = distance_transform_edt(~mask)
            hits.append(away[np.unravel_index(values.argmax(), values.shape)] <= distance)
    return 100 * float(np.mean(hits)) if hits else None
