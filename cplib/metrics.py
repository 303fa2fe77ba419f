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
    where the test set lacks good or defective images; ValueError if a score is not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite: the training diverged")
    if len(np.unique(labels)) < 2:
        return dict.fromkeys(IMAGE_METRICS)
    values = roc_auc_score(labels, scores), average_precision_score(labels, scores)
    best = f1_max(labels, scores)[0]
    return dict(zip(IMAGE_METRICS, (100 * float(v) for v in (*values, best)), strict=True))


def auroc_between(good, bad) -> float | None:
    """AUROC, percent, of the scores (N,) of good images against those (M,) of bad ones."""
    labels = np.repeat([0, 1], [len(good), len(bad)])
    return image_metrics(labels, np.concatenate([good, bad]))["image_auroc"]


def f1_max(labels, scores) -> tuple[float, float]:
    """The best F1 (0 to 1) over all thresholds, and the threshold: defective is score >= it."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(f1[best]), float(thresholds[best])


def pixel_metrics(masks, heat) -> dict[str, float | None]:
    """AUROC and average precision of all pixels, and AUPRO up to 30 % and 5 % false positives.

    ``masks`` (N, H, W) are True on defects, ``heat`` (N, H, W) is higher where more anomalous; all
    in percent. Each is None without masks, or where no pixel is defective or none is good.
    """
    if masks is None or len(np.unique(masks)) < 2:
        return dict.fromkeys(PIXEL_METRICS)
    masks, heat = np.asarray(masks), np.asarray(heat, dtype=np.float32)
    flat, values = masks.ravel(), heat.ravel()
    found = [roc_auc_score(flat, values), average_precision_score(flat, values)]
    truth = list(masks.astype(np.uint8))
    found += [calculate_au_pro(truth, list(heat), limit)[0] for limit in (0.3, 0.05)]
    return dict(zip(PIXEL_METRICS, (100 * float(v) for v in found), strict=True))


def peak_within(masks, heat, distance: float = 16) -> float | None:
    """Percent of defective images whose hottest pixel lies on the defect, or so many px from it.

    ``masks`` and ``heat`` are (N, H, W); None where no image has a defect.
    """
    hits = []
    for mask, values in zip(np.asarray(masks), np.asarray(heat), strict=True):
        if mask.any():
            away = distance_transform_edt(~mask)
            hits.append(away[np.unravel_index(values.argmax(), values.shape)] <= distance)
    return 100 * float(np.mean(hits)) if hits else None
