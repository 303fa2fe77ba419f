"""Image- and pixel-level metrics, in percent: thin wrappers over scikit-learn, and AUPRO."""

import numpy as np
from scipy.ndimage import distance_transform_edt, label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "aupro_30", "aupro_05")
# Pixels of one image that touch, even at a corner only, are one region, as in MVTec's own code.
TOUCHING = np.pad(np.ones((1, 3, 3), int), ((1, 1), (0, 0), (0, 0)))


def image_metrics(labels, scores) -> dict[str, float | None]:
    """AUROC, average precision and the best F1 over all thresholds, in percent.

    ``labels`` (N,) are 0 or 1. ``scores`` (N,) are higher for more anomalous images. All metrics
    are None if all images are of one class. Raises ValueError if a score is not finite.
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
    """AUROC, in percent, of scores (N,) of normal images and (M,) of anomalous ones."""
    labels = np.repeat([0, 1], [len(normal), len(anomalous)])
    return image_metrics(labels, np.concatenate([normal, anomalous]))["image_auroc"]


def f1_max(labels, scores) -> tuple[float, float]:
    """The best F1 (0 to 1) over all thresholds, and the lowest score that counts as anomalous."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(f1[best]), float(thresholds[best])


def pixel_metrics(masks, maps) -> dict[str, float | None]:
    """AUROC and average precision of all pixels, and AUPRO up to 30 % and 5 % false positives.

    All are in percent. ``masks`` (N, H, W) are True on anomalies. ``maps`` (N, H, W) are higher for
    more anomalous pixels. All metrics are None without masks, or if all pixels are of one kind.
    """
    if masks is None or len(np.unique(masks)) < 2:
        return dict.fromkeys(PIXEL_METRICS)
    maps = np.asarray(maps, dtype=np.float32).ravel()
    order = maps.argsort()[::-1]  # once for all: scikit-learn is twice as fast on sorted scores
    values, regions = maps[order], label(np.asarray(masks), TOUCHING)[0].ravel()[order]
    del order  # 8 bytes a pixel
    found = [metric(regions > 0, values) for metric in (roc_auc_score, average_precision_score)]
    curve = pro_curve(regions, values)
    found += [mean_height(*curve, limit) for limit in (0.3, 0.05)]
    return dict(zip(PIXEL_METRICS, (100 * float(v) for v in found), strict=True))


def pro_curve(regions, values) -> tuple[np.ndarray, np.ndarray]:
    """False positive rate and per-region overlap (0 to 1) at all thresholds, both rising from 0.

    ``values`` (P,) are the scores of all pixels, from the highest to the lowest. ``regions`` (P,)
    says to which anomalous region each pixel belongs; 0 is normal. The overlap is the share of a
    region that is found, averaged over all regions. Pixels of equal score are one step.
    """
    sizes = np.bincount(regions)
    share = 1 / (sizes * (len(sizes) - 1.0))
    share[0] = 0
    last = np.append(values[1:] != values[:-1], True)
    fpr = np.cumsum(regions == 0)[last] / sizes[0]
    return np.append(0, fpr), np.append(0, np.cumsum(share[regions])[last])


def mean_height(x, y, limit: float) -> float:
    """Mean height of the polyline through the points (x, y) for x from 0 to ``limit``."""
    inside = np.searchsorted(x, limit, side="right")
    height = np.interp(limit, x, y)
    return np.trapezoid(np.append(y[:inside], height), np.append(x[:inside], limit)) / limit


def peak_within(masks, maps, distance: float = 16) -> float | None:
    """Percent of anomalous images whose highest pixel is at most ``distance`` px from the anomaly.

    ``masks`` and ``maps`` are (N, H, W). None if no image has an anomaly.
    """
    hits = []
    for mask, values in zip(np.asarray(masks), np.asarray(maps), strict=True):
        if mask.any():
            away = distance_transform_edt(~mask)
            hits.append(away[np.unravel_index(values.argmax(), values.shape)] <= distance)
    return 100 * float(np.mean(hits)) if hits else None
