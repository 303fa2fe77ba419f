"""What features look like (Fig. 3): projections to two dimensions, and how far groups are apart."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cplib.augment import DRAWS_VERSION, pasted_copies
from cplib.datasets import Images
from cplib.metrics import auroc_between
from cplib.model import PretextNet
from cplib.run import Run
from cplib.score import Scorer, score_features
from cplib.train import augmentation_kwargs

GROUPS = ("normal", "anomaly", "cutpaste", "cutpaste_scar")
PAIRS = (("normal", "anomaly"), ("anomaly", "cutpaste"), ("anomaly", "cutpaste_scar"))
LIGHT = 10.0  # AUROC of brightness, percent: below it, or above the rest to 100, it is enough alone
HALFWAY = 75.0  # AUROC, percent: the claims' limit of two groups that hardly overlap
RATIO = "distance ratio"  # a column of ``table``
MORE = 5  # points of AUROC: what differs by no more counts as about the same


def features(
    run: Run,
    net: PretextNet,
    train: Images,
    test: Images,
    *,
    limit: int = 120,  # images of a group at most, evenly spread over the test set
    folds: int = 5,  # of the classifier's cross-validation
    perplexity: float = 30.0,  # t-SNE's; less where there are fewer than 91 images
    umap_neighbours: int = 15,
    draws: int = DRAWS_VERSION,  # of the pasted copies; a record of other draws is made anew
) -> dict:
    """The features of an image-level run, compared and projected. The paper names no constant.

    Holds ``gaussian_auroc`` of each group against the normal images (eq. 2), the ``pairs`` with
    their ``classifier_auroc`` (``separability``), the ``distance_ratio`` of normal and anomalous
    images, and for each projection the groups' points, [[x, ...], [y, ...]]. Empty with fewer than
    two normal or two anomalous test images.
    """
    if min(int((test.labels == k).sum()) for k in (0, 1)) < 2:
        return {}
    with _one_thread():
        scorer = Scorer.fit(run, net, train.pixels)
        groups = image_groups(run, test, limit)
        z = scorer.features(torch.cat(groups))
        scores = score_features(scorer.density, z)[:, 0].numpy()
        parts = dict(zip(GROUPS, z[:, 0].split([len(g) for g in groups]), strict=True))
        ratio = distance_ratio(parts["normal"], parts["anomaly"])
        parts = {name: np.asarray(part) for name, part in parts.items()}
        cuts = np.cumsum([len(z) for z in parts.values()])[:-1]
        points = project(parts, perplexity, umap_neighbours)
        points = {name: np.split(xy.T, cuts, 1) for name, xy in points.items()}
        good, *others = np.split(scores, cuts)
        aurocs = [auroc_between(good, other) for other in others]
        apart = {f"{a} {b}": separability(parts[a], parts[b], folds) for a, b in PAIRS}
    apart = {pair: {"classifier_auroc": auroc} for pair, auroc in apart.items()}
    record = {"gaussian_auroc": dict(zip(GROUPS[1:], aurocs, strict=True)), "pairs": apart}
    record["distance_ratio"] = ratio
    for name, groups in points.items():
        record[name] = {g: xy.tolist() for g, xy in zip(GROUPS, groups, strict=True)}
    return record


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


def image_groups(run: Run, test: Images, limit: int) -> list[torch.Tensor]:
    """The four GROUPS, uint8 (N, 3, H, W) each: normal and anomalous test images, pasted copies.

    Every normal one has one copy of either kind, made as the run's training makes them, without the
    shift and the colour jitter that training gives to every image.
    """
    normal, anomaly = (_spread(test.pixels[test.labels == k], limit) for k in (0, 1))
    return [normal, anomaly, *pasted_copies(normal, augmentation_kwargs(run))]


def _spread(pixels: torch.Tensor, limit: int) -> torch.Tensor:
    """At most ``limit`` of the images, evenly spread, so that each kind keeps its share."""
    n = min(limit, len(pixels))
    return pixels[torch.arange(n) * len(pixels) // max(n, 1)]


def project(
    groups: dict[str, np.ndarray], perplexity: float, umap_neighbours: int
) -> dict[str, np.ndarray]:
    """All groups' features in two dimensions, (N, 2), by t-SNE and UMAP; both start from PCA.

    The same features and seed give the same points. ValueError for fewer than four images.
    """
    from umap import UMAP  # here: it takes seconds, which reading a record saves

    z = np.concatenate(list(groups.values()))
    n = len(z)
    if n < 4:
        raise ValueError(f"{n} images are too few to be projected")
    how = {"init": "pca", "random_state": 0, "n_jobs": 1}
    tsne = TSNE(perplexity=min(perplexity, (n - 1) / 3), **how)
    umap = UMAP(n_neighbors=min(umap_neighbours, n - 1), **how)
    made = {"tsne": tsne.fit_transform(z), "umap": umap.fit_transform(z)}
    return {name: xy.astype(float).round(2) for name, xy in made.items()}


def separability(a: np.ndarray, b: np.ndarray, folds: int) -> float:
    """How well a plane separates two groups of features (N, D): AUROC, percent.

    That of a cross-validated logistic regression, mean over the folds: 50 where the groups overlap.
    """
    x, y = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
    parts = StratifiedKFold(min(folds, len(a), len(b)), shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(100 * cross_val_score(model, x, y, cv=parts, scoring="roc_auc").mean())


def distance_ratio(normal: torch.Tensor, real: torch.Tensor) -> float:
    """How far real anomalies are, in units of the normal spread, by features (N, D) and (M, D).

    The median distance from a real anomaly to a normal image over that between two normal ones.
    """
    return float(torch.cdist(real, normal).median() / torch.pdist(normal).median())


def table(records: dict[tuple[str, str, int], dict]) -> pd.DataFrame:
    """Numbers of groups of features: a row for each (category, method), the mean over the seeds.

    ``records`` are by category, method and seed. AUROC in percent: the Gaussian's, of real
    anomalies and of pasted copies against normal images; then a plane's, of real anomalies against
    normal images and against pasted copies (``separability``). RATIO is ``distance_ratio``, NaN
    where no record has it.
    """
    rows = {}
    for key, found in records.items():
        gaussian, pairs = found["gaussian_auroc"], found["pairs"]
        plane = {pair: numbers["classifier_auroc"] for pair, numbers in pairs.items()}
        rows[key] = {
            "Gaussian: real": gaussian["anomaly"],
            "Gaussian: patch": gaussian["cutpaste"],
            "Gaussian: scar": gaussian["cutpaste_scar"],
            "plane: real against normal": plane["normal anomaly"],
            "plane: real against patch": plane["anomaly cutpaste"],
            "plane: real against scar": plane["anomaly cutpaste_scar"],
            RATIO: found.get("distance_ratio", float("nan")),
        }
    index = pd.MultiIndex.from_tuples(rows, names=["category", "method", "seed"])
    numbers = pd.DataFrame(rows.values(), index).astype(float)
    return numbers.groupby(["category", "method"], sort=False).mean()


def told_by_light(brightness: dict[str, float | None]) -> list[str]:
    """The categories in which brightness alone separates normal from anomalous test images.

    ``brightness`` has the AUROC, percent, of the record of that name by category; LIGHT is the
    limit on either side.
    """
    aurocs = pd.Series(brightness, dtype=float)
    return [*aurocs.index[(aurocs - 50).abs() > 50 - LIGHT]]


def findings(numbers: pd.DataFrame, before: str, after: str, light: list[str]):
    """What training changed, from a ``table``: sentences in Markdown, and means by method.

    The means leave out the categories in ``light`` (``told_by_light``), if there are others.
    """
    light = [category for category in numbers.index.unique("category") if category in light]
    light = light if len(light) < len(numbers.index.unique("category")) else []
    means = numbers.drop(light, level="category").groupby("method", sort=False).mean()
    planes = ["plane: real against patch", "plane: real against scar"]
    every = numbers.xs(before, level="method").mean()
    text = "- **Real anomalies from normal images**: the Gaussian's AUROC is "
    text += _beside(means[["Gaussian: real"]], before, after)
    text += (
        "\n- **Real anomalies from pasted ones**: AUROC of a plane between them and patches, and "
    )
    text += f"of one between them and scars: {_beside(means[planes], before, after)}"
    fall = (numbers.xs(after, level="method") - numbers.xs(before, level="method"))[planes].stack()
    if fall.min() < -MORE:
        where, plane = fall.idxmin()
        was, now = (numbers.loc[(where, method), plane] for method in (before, after))
        text += f" Not everywhere: on {where}, *{plane}* falls from {was:.0f} to {now:.0f}."
    text += " To compare, AUROC of a plane between them and normal images: "
    text += _beside(means[["plane: real against normal"]], before, after)
    if "about as high" in text:
        text += f" (*About as high*: the mean difference is at most {MORE} points; it is no test.)"
    rise = (means.loc[after] - means.loc[before]).drop([RATIO, "plane: real against normal"])
    most = rise.idxmax()
    if rise[most] > 0:
        levels = f"from {means.loc[before, most]:.0f} to {means.loc[after, most]:.0f}"
        text += f"\n- *Training* raises *{most}* most, {levels}."
        text += " (Patches and scars were in its training.)" * most.endswith(("patch", "scar"))
    if (every[planes] > HALFWAY).all() and (every.filter(like="Gaussian") > 50).all():
        text += "\n- **The claims do not show what training adds**: their limits are passed on "
        text += "average before training, too."
    text += _pasted(numbers.xs(after, level="method").drop(light))
    return text + _ratios(numbers[RATIO].unstack().dropna(), before, after, light), means


def _pasted(after: pd.DataFrame) -> str:
    """Where pasted patches are found better than real anomalies (a category a row), in words."""
    columns = ["Gaussian: patch", "Gaussian: real"]
    where = (after[columns[0]] - after[columns[1]]).idxmax()
    patch, real = after.loc[where, columns]
    text = f"\n- **Finding pasted patches is not finding defects**: on {where} the Gaussian's "
    text += f"AUROC is {patch:.0f} for patches, and {real:.0f} for real anomalies. So test a "
    text += "detector on real defects, not on what was pasted."
    return text * bool(patch - real > MORE)


def _ratios(ratio: pd.DataFrame, before: str, after: str, light: list[str]) -> str:
    """The distance ratios (a category a row, a method a column) in words; "" without any."""
    left = ratio.loc[ratio.index.intersection(light)]
    if not len(ratio := ratio.drop(left.index)):
        return ""
    mean, most = ratio.mean(), ratio[after].idxmax()
    text = "\n- **Real anomalies in units of the normal spread**: the distance ratio is higher in "
    text += f"{(ratio[after] > ratio[before]).sum()} of {len(ratio)} categories: {mean[after]:.1f} "
    text += f"on average, {mean[before]:.1f} before training"
    if before != "pretrained" and "pretrained" in ratio:
        text += f", {mean['pretrained']:.1f} with ImageNet features"
    rest = f" (after training {ratio[after].drop(most).mean():.1f} without {most})"
    text += rest * (len(ratio) > 1) + "."
    for category, row in left.iterrows():
        text += f" Left out is {category}, from {row[before]:.1f} to {row[after]:.1f}."
    return text


def _beside(means: pd.DataFrame, before: str, after: str) -> str:
    """The means after training, and whether they are higher than before it and than ImageNet's."""
    words, said = {"pretrained": "with ImageNet features"} | {before: "before training"}, []
    level = {method: " and ".join(f"{v:.0f}" for v in row) for method, row in means.T.items()}
    for method in [name for name in words if name in level]:
        gap = (means.loc[after] - means.loc[method]).mean()
        than = "higher than" if gap > MORE else "lower than" if gap < -MORE else "about as high as"
        said.append(f"{than} {words[method]} ({level[method]})")
    return f"{level[after]}, {', '.join(said)}."
