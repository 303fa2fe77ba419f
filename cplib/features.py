"""What features look like (Fig. 3): projections to the plane, and numbers for what the eye sees."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cplib import augment, data
from cplib.config import BASELINES, Run, named
from cplib.density import Gaussian, l2_normalise
from cplib.metrics import auroc_between
from cplib.model import PretextNet, embed
from cplib.records import beside
from cplib.train import options

STAGES = (*BASELINES, "cutpaste_3way")  # methods: before training, and after
GROUPS = ("normal", "anomaly", "cutpaste", "cutpaste_scar")
PAIRS = (("normal", "anomaly"), ("anomaly", "cutpaste"), ("anomaly", "cutpaste_scar"))
NUMBERS = ("classifier_auroc", "mixing", "silhouette")


@dataclass(frozen=True, kw_only=True)
class Study:
    """How features are compared and projected; the paper says none of it, the choices are ours."""

    limit: int = 120  # pictures of a group at most, evenly spread over the test set
    seed: int = 0  # of what is pasted, the folds and the projections
    folds: int = 5  # of the classifier's cross-validation
    neighbours: int = 5  # looked at for the mixing
    perplexity: float = 30.0  # t-SNE's; less where there are fewer than 91 pictures
    umap_neighbours: int = 15

    @property
    def id(self) -> str:
        """Name of the record: "features", and a hash where not the default."""
        return named("features", self)


def record(run: Run, study: Study | None = None, **places) -> dict | None:
    """The features of an image-level run, compared and projected, kept beside it; else None.

    Holds the study's fields, ``gaussian_auroc`` of each group against the normal pictures (eq. 2),
    the ``pairs`` with what ``apart`` says of them, and for each projection the groups' points,
    [[x, ...], [y, ...]]. A number is None where a group is too small for it.
    """
    study = study or Study()

    def compute(run: Run, net: PretextNet, data_root: Path) -> dict:
        train, test = (data.load(data_root, run.category, s, run.size) for s in ("train", "test"))
        with _one_thread():
            normal, *groups = _features(run, net, train.pixels, *pictures(run, test, study))
            scores = Gaussian.fit(normal, reg_covar=run.reg_covar).score(torch.cat(groups))
            return {"study": asdict(study)} | describe(groups, scores.numpy(), study)

    return beside(run, study.id, compute, **places)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The features' last bits depend on the number of threads, and the projections on those bits.

    Also, for so few points the threads of t-SNE cost more than they bring.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def pictures(run: Run, test: data.Images, study: Study) -> list[torch.Tensor]:
    """The four GROUPS, uint8 (N, 3, H, W) each: good and defective test pictures, pasted copies.

    Every good one has one copy of either kind, made as the run's training makes them, without the
    shift and the colour jitter that training gives to every picture.
    """
    normal, anomaly = (_spread(test.pixels[test.labels == k], study.limit) for k in (0, 1))
    generator = torch.Generator().manual_seed(study.seed)
    images, _ = augment.pretext_batch(
        normal.float() / 255, "cutpaste_3way", generator, options(run)
    )
    copies = (255 * images).round().to(torch.uint8).unflatten(0, (3, len(normal)))
    return [normal, anomaly, *copies[1:]]


def _spread(pixels: torch.Tensor, limit: int) -> torch.Tensor:
    """At most ``limit`` of the pictures, evenly spread, so that each kind keeps its share."""
    n = min(limit, len(pixels))
    return pixels[torch.arange(n) * len(pixels) // max(n, 1)]


def _features(run: Run, net: PretextNet, *groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pooled features (N, D) of each group, as the run scores them."""
    z = embed(net, torch.cat(groups))
    return (l2_normalise(z) if run.l2_normalise else z).split([len(g) for g in groups])


def describe(groups: list, scores: np.ndarray, study: Study) -> dict:
    """The numbers and the points of a record: features (N, D) of the GROUPS, and all their scores.

    ``scores`` are the Gaussian's, in the order of the groups.
    """
    groups = dict(zip(GROUPS, map(np.asarray, groups), strict=True))
    cuts = np.cumsum([len(z) for z in groups.values()])[:-1]
    parts = dict(zip(GROUPS, np.split(np.asarray(scores), cuts), strict=True))
    points = {name: np.split(xy.T, cuts, 1) for name, xy in project(groups, study).items()}
    return {
        "gaussian_auroc": {
            g: auroc_between(parts["normal"], parts[g]) for g in GROUPS if g != "normal"
        },
        "pairs": {f"{a} {b}": apart(groups[a], groups[b], study) for a, b in PAIRS},
        **{k: {g: p.tolist() for g, p in zip(GROUPS, v, strict=True)} for k, v in points.items()},
    }


def project(groups: dict[str, np.ndarray], study: Study) -> dict[str, np.ndarray]:
    """All groups' features on the plane, (N, 2), by t-SNE and by UMAP; both start from PCA.

    The same features and seed give the same points. ValueError for fewer than four pictures.
    """
    with warnings.catch_warnings():  # umap asks for notebook widgets that it does not need here
        warnings.simplefilter("ignore")
        from umap import UMAP  # here: it takes seconds, which a record saves

    z = np.concatenate(list(groups.values()))
    n = len(z)
    if n < 4:
        raise ValueError(f"{n} pictures are too few to be projected")
    how = {"init": "pca", "random_state": study.seed, "n_jobs": 1}
    tsne = TSNE(perplexity=min(study.perplexity, (n - 1) / 3), **how)
    umap = UMAP(n_neighbors=min(study.umap_neighbours, n - 1), **how)
    made = {"tsne": tsne.fit_transform(z), "umap": umap.fit_transform(z)}
    return {name: xy.astype(float).round(2) for name, xy in made.items()}


def apart(a: np.ndarray, b: np.ndarray, study: Study) -> dict[str, float | None]:
    """How far two groups of features (N, D) lie apart; None where one has fewer than two.

    ``classifier_auroc``, percent, of a cross-validated logistic regression that tells them apart,
    mean over the folds: 50 where they overlap, 100 where a plane parts them.
    ``mixing``: the share of nearest neighbours that are of the other group, in percent of what
    chance gives, 0 to about 100. ``silhouette``: 0 where they overlap, 1 for two tight clusters.
    """
    if min(len(a), len(b)) < 2:
        return dict.fromkeys(NUMBERS)
    x, y = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
    folds = StratifiedKFold(min(study.folds, len(a), len(b)), shuffle=True, random_state=study.seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    auroc = cross_val_score(model, x, y, cv=folds, scoring="roc_auc").mean()
    values = 100 * auroc, 100 * _mixing(x, y, study.neighbours), silhouette_score(x, y)
    return dict(zip(NUMBERS, map(float, values), strict=True))


def _mixing(x: np.ndarray, y: np.ndarray, neighbours: int) -> float:
    """The share of other labels among nearest neighbours, over its mean under random labels."""
    nearest = NearestNeighbors(n_neighbors=min(neighbours, len(x) - 1)).fit(x)
    others = y[nearest.kneighbors(return_distance=False)] != y[:, None]
    n, ones = len(y), int(y.sum())
    return others.mean() / (2 * ones * (n - ones) / (n * (n - 1)))


def table(records: dict[tuple[str, str], dict]) -> pd.DataFrame:
    """Tidy: a row for each number of a pair of groups, under each (category, method)."""
    rows = []
    for key, found in records.items():
        for group, value in found["gaussian_auroc"].items():
            rows.append((*key, f"normal vs {group}", "gaussian_auroc", value))
        for pair, numbers in found["pairs"].items():
            rows += [(*key, pair.replace(" ", " vs "), *number) for number in numbers.items()]
    columns = ["category", "method", "pair", "number", "value"]
    return pd.DataFrame(rows, columns=columns).astype({"value": float})


def summary(numbers: pd.DataFrame, start: str, names: dict[str, str]) -> str:
    """Two sentences on a ``table``: real anomalies against normal pictures, and against pasted.

    Means over the categories; ``start`` is the method that the training started from.
    """
    if not {start, "cutpaste_3way"} <= set(numbers["method"]):
        return "Too little was measured to compare features before and after training."
    means = numbers.groupby(["method", "pair", "number"])["value"].mean()

    def both(pair: str, number: str) -> str:
        before, after = (means[method, pair, number] for method in (start, "cutpaste_3way"))
        return f"{before:.1f} before and {after:.1f} after"

    patch, scar = (f"anomaly vs {group}" for group in ("cutpaste", "cutpaste_scar"))
    mixed = [means["cutpaste_3way", pair, "mixing"] for pair in (patch, scar)]
    return (
        f"Mean over {', '.join(numbers['category'].unique())}, before training ({names[start]}) "
        "and after: real anomalies lie outside the Gaussian of normal pictures with AUROC "
        f"{both('normal vs anomaly', 'gaussian_auroc')}. A classifier tells them from CutPaste "
        f"copies with AUROC {both(patch, 'classifier_auroc')}, from scars with "
        f"{both(scar, 'classifier_auroc')} (50: they overlap), and after training their nearest "
        f"neighbours mix at {mixed[0]:.0f} and {mixed[1]:.0f} % of chance (100: they overlap)."
    )
