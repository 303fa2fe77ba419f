"""What is measured on a network: scores, and records beside them, ``<name>.json``.

Each measure is a function ``(run, net, train, test) -> dict``. The job that trains the network, or
loads its checkpoint, executes it. Its keyword arguments are the constants that it is made with. The
record carries them, so that a changed constant is measured anew.
"""

import json
import warnings
from functools import partial
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture
from torch.nn import functional as F

from cplib.augment import pasted_copies
from cplib.datasets import Images
from cplib.density import Gaussian, held_out, l2_normalise
from cplib.localize import gradcam as gradcam_maps
from cplib.localize import positions
from cplib.metrics import auroc_between, image_metrics, peak_within, pixel_metrics
from cplib.model import PretextNet, embed
from cplib.run import Run
from cplib.score import Scorer, upsample_scores
from cplib.study import store
from cplib.study.features import features
from cplib.study.store import PEAK, Places
from cplib.study.synthetic import SIDE, SYNTHETIC, paint
from cplib.train import augmentation_kwargs

MIXTURE = "2 Gaussians"  # a row of density's record (footnote 1)
MASK_SIDE = 64  # cells of a recorded mask's side


def scores(run: Run, net: PretextNet, train: Images, test: Images) -> tuple[torch.Tensor, dict]:
    """Scores (N, P) of the test images' windows, or (N, 1) of whole ones, and the metrics."""
    scorer = Scorer.fit(run, net, train.pixels)
    found = scorer.position_scores(test.pixels)
    metrics = image_metrics(test.labels, found.amax(1))
    if run.dense:
        maps = upsample_scores(run, found, test.pixels.shape[2:])
        metrics |= pixel_level(run, test, maps)
    return found, metrics


def pixel_level(run: Run, test: Images, maps: torch.Tensor) -> dict:
    """Pixel-level metrics of anomaly maps (N, H, W); the peak may lie 16 px (of 256) beside.

    Anomalous images whose mask marks nothing are left out.
    """
    if test.masks is None:
        return pixel_metrics(None, maps) | {PEAK: None}
    told = (test.labels == 0) | test.masks.flatten(1).any(1)
    masks, maps = test.masks[told], maps[told]
    return pixel_metrics(masks, maps) | {PEAK: peak_within(masks, maps, 16 * run.size / 256)}


def gradcam(run: Run, net: PretextNet, train: Images, test: Images) -> dict:
    """Pixel-level metrics of GradCAM on an image-level network (4.2)."""
    return pixel_level(run, test, gradcam_maps(net, test.pixels))


def gradcam_copies(
    run: Run, net: PretextNet, train: Images, test: Images, *, most: int = 20
) -> dict:
    """Pixel-level AUROC of GradCAM on pasted copies of normal test images, and on anomalies.

    Of ``most`` images each; the anomalous ones are spread over the kinds. Empty without masks, or
    without one kind of images.
    """
    if test.masks is None or not 0 < test.labels.sum() < len(test):
        return {}

    def auroc(images: torch.Tensor, masks: torch.Tensor) -> float | None:
        heat = gradcam_maps(net, images)
        return auroc_between(heat[~masks], heat[masks])

    k = int(test.labels.sum())
    spread = torch.linspace(0, k - 1, min(most, k)).long()
    bad, masks = (x[test.labels == 1][spread] for x in (test.pixels, test.masks))
    normal = test.pixels[test.labels == 0][:most]
    patch, scar = pasted_copies(normal, augmentation_kwargs(run))
    copies = {"CutPaste copies": patch, "CutPaste-scar copies": scar}
    found = {name: auroc(images, (images != normal).any(1)) for name, images in copies.items()}
    return found | {"real anomalies": auroc(bad, masks)}


def maps(
    run: Run,
    net: PretextNet,
    train: Images,
    test: Images,
    scores: torch.Tensor | None = None,
    *,
    most: int = 7,
) -> dict:
    """What a patch run's anomaly maps are drawn from: scores of windows, without a pixel.

    ``scores`` are the windows' (N, P) where they are known; else the test images are scored. Of
    ``most`` test images: the first normal one by name, then the first one of each kind of anomaly.
    Scores have three digits. A cell of a mask is marked where any of its pixels is; a row of cells
    is a number of 16 hex digits. ``drawn`` reads an image.
    """
    by_name = sorted(range(len(test)), key=test.names.__getitem__, reverse=True)
    first = {test.kinds[i]: i for i in by_name}
    chosen = sorted(first.values(), key=lambda i: (test.labels[i], test.kinds[i]))[:most]
    if scores is None:
        scores = Scorer.fit(run, net, train.pixels).position_scores(test.pixels)
    scores = scores[chosen].unflatten(1, positions(*test.pixels.shape[2:], run.window, run.stride))
    images = []
    for i, rows in zip(chosen, scores.tolist(), strict=True):
        rows = [" ".join(f"{score:.3g}" for score in row) for row in rows]
        images.append({"file": test.names[i], "kind": test.kinds[i], "scores": rows})
        if test.masks is not None and test.masks[i].any():
            cells = F.adaptive_max_pool2d(test.masks[i][None].float(), MASK_SIDE)[0].int()
            rows = ["".join(map(str, row)) for row in cells.tolist()]
            images[-1]["mask"] = [f"{int(row, 2):0{MASK_SIDE // 4}x}" for row in rows]
    return {"images": images}


def drawn(run: Run, image: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The anomaly map (H, W) of an image of ``maps``; its mask (H, W), from 0 to 1, or None."""
    scores = torch.tensor([[float(score) for score in row.split()] for row in image["scores"]])
    (heat,) = upsample_scores(run, scores.flatten()[None], (run.size, run.size))
    if "mask" not in image:
        return heat, None
    rows = [f"{int(row, 16):0{MASK_SIDE}b}" for row in image["mask"]]
    cells = torch.tensor([[float(cell) for cell in row] for row in rows])
    return heat, F.interpolate(cells[None, None], heat.shape, mode="bilinear")[0, 0]


def brightness(run: Run, net: PretextNet, train: Images, test: Images) -> dict:
    """How bright the images are: the mean of all values of an image, from 0 to 255.

    Its mean and standard deviation over the training, the normal and the anomalous test images, and
    ``image_auroc``, percent, of eq. 2 with this number in place of a network's features.
    """
    seen, asked = (
        torch.stack([image.double().mean() for image in images.pixels]) for images in (train, test)
    )
    labels = test.labels
    groups = {"training": seen, "normal": asked[labels == 0], "anomalous": asked[labels == 1]}
    found = {k: [v.mean().item(), v.std().item()] for k, v in groups.items() if len(v) > 1}
    fit = Gaussian.fit(seen[:, None], reg_covar=run.reg_covar)
    return found | {"image_auroc": image_metrics(labels, fit.score(asked[:, None]))["image_auroc"]}


def level7(run: Run, net: PretextNet, train: Images, test: Images, *, level: int = 7) -> dict:
    """Image-level metrics by the features of an EfficientNet's level, the stem being 1 (4.3)."""
    scorer = Scorer.fit(run, net, train.pixels, level=level)
    return image_metrics(test.labels, scorer.score(test.pixels))


def synthetic(
    run: Run,
    net: PretextNet,
    train: Images,
    test: Images,
    *,
    least: int = 40,
    side: tuple[float, float] = SIDE,
) -> dict:
    """AUROC of Table 6's anomalies painted on the normal test images (5.3).

    Holds the numbers of normal images and of painted ones of a kind, and ``image_auroc``, percent,
    of each kind; it has no kinds if no image is normal.
    """
    normal = test.pixels[test.labels == 0]
    kinds = SYNTHETIC if len(normal) else ()
    painted = [paint(normal, *kind.split("_"), least=least, side=side)[0] for kind in kinds]
    found = Scorer.fit(run, net, train.pixels).score(torch.cat([normal, *painted]))
    first, *others = found.split([len(normal), *map(len, painted)])
    aurocs = [auroc_between(first, part) for part in others]
    return {
        "normal": len(first),
        "painted": len(others[0]) if others else 0,
        "image_auroc": dict(zip(kinds, aurocs, strict=True)),
    }


def density(
    run: Run,
    net: PretextNet,
    train: Images,
    test: Images,
    *,
    regularisers: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
) -> dict:
    """What other covariances would do to an image-level run: ``fits``, a row for each.

    Each for features scaled to length one and not: its ``image_auroc``, percent, and ``held_out``
    (see ``density``), None where it cannot be fitted. A mixture of two has no ``held_out``.
    """
    fits = {f"{r:g}": partial(Gaussian.fit, reg_covar=r) for r in regularisers}
    fits |= {"Ledoit-Wolf": Gaussian.fit_shrunk}
    raw, rows = [embed(net, images.pixels) for images in (train, test)], []
    for l2 in (True, False):
        z, z_test = map(l2_normalise, raw) if l2 else raw
        for name, fit in fits.items():
            row = {"covariance": name, "l2_normalise": l2}
            rows.append(row | _fitted(fit, z, z_test, test.labels))
        mixture = GaussianMixture(2, reg_covar=run.reg_covar, random_state=0).fit(z.double())
        auroc = image_metrics(test.labels, -mixture.score_samples(z_test.double()))["image_auroc"]
        row = {"covariance": MIXTURE, "l2_normalise": l2, "held_out": None}
        rows.append(row | {"image_auroc": auroc})
    return {"fits": rows}


def _fitted(fit, z: torch.Tensor, z_test: torch.Tensor, labels: torch.Tensor) -> dict:
    try:
        auroc = image_metrics(labels, fit(z).score(z_test))["image_auroc"]
        return {"image_auroc": auroc, "held_out": held_out(z, fit)}
    except ValueError:  # too few images, or all alike
        return {"image_auroc": None, "held_out": None}


# Table 6's is named with the number of images that it paints: "synthetic-40".
MEASURES = (gradcam, gradcam_copies, maps, brightness, level7, synthetic, density, features)
MEASURES = {function.__name__: function for function in MEASURES}


def constants(name: str) -> dict:
    """The constants that a measure is made with today, as JSON has them."""
    function, _, least = name.partition("-")
    found = MEASURES[function].__kwdefaults__ or {}
    return json.loads(json.dumps(found | ({"least": int(least)} if least else {})))


def keep(name: str, run: Run, net: PretextNet, images: dict[str, Images], places: Places) -> None:
    """Measure, and write the record beside the run's scores."""
    known = constants(name)
    function, folder = MEASURES[name.partition("-")[0]], store.run_folder(run, places.results)
    if function is maps:
        function = partial(maps, scores=store.read_window_scores(folder))
    record = function(run, net, images["train"], images["test"], **known)
    store.write_json(folder / f"{name}.json", record | ({"constants": known} if known else {}))


def measured(run: Run, name: str, results: Path) -> dict | None:
    """What a measure found of a run, without its constants.

    None where it is missing, or was made with other constants than today's: numbers of both would
    stand in one table.
    """
    found = store.read_record(store.run_folder(run, results) / f"{name}.json")
    if found is None or not _todays(name, found):
        return None
    return {k: v for k, v in found.items() if k != "constants"}


def lacking(run: Run, names: list[str], places: Places) -> list[str]:
    """Those of the measures that can be made on a finished run, and are missing or out of date."""
    if not names or not _measurable(run, places):
        return []
    return [name for name in names if measured(run, name, places.results) is None]


def out_of_reach(run: Run, names: list[str], places: Places) -> list[str]:
    """Those of the measures of a finished run that are missing or old and cannot be made."""
    if not names or not places.data or _measurable(run, places):
        return []
    return [name for name in names if measured(run, name, places.results) is None]


def _measurable(run: Run, places: Places) -> bool:
    """Whether the images and the network are here."""
    if not places.data or not (Path(places.data) / run.category).is_dir():
        return False
    return not run.needs_training or store.checkpoint_file(run, places.results).exists()


def _todays(name: str, record: dict) -> bool:
    """Whether a record was made with today's constants.

    One without constants has those of its own fields, and the first version of the random draws.
    """
    known = constants(name)
    unsaid = known | {k: v for k, v in ({"draws": 1} | record).items() if k in known}
    return record.get("constants", unsaid) == known


# How a record becomes rows of a table


def table_rows(name: str, run: Run, record: dict) -> list[dict]:
    """The values of a record, a row each, with the columns in which they differ."""
    if name.startswith("synthetic"):
        aurocs = record["image_auroc"].items()
        return [{"category": k, "source": run.category, "image_auroc": v} for k, v in aurocs]
    if name == "density":
        names = {f"{run.reg_covar:g}": "one", MIXTURE: "mixture"}
        fits = [f for f in record["fits"] if f["l2_normalise"] == run.l2_normalise]
        rows = [(names.get(fit["covariance"]), fit["image_auroc"]) for fit in fits]
        return [{"method": method, "image_auroc": auroc} for method, auroc in rows if method]
    if name == "features":
        return _pairs_of_groups(run, record)
    return [record] if record else []


def _pairs_of_groups(run: Run, record: dict) -> list[dict]:
    """AUROC between groups of features (Fig. 3), a row a pair of groups.

    Against normal images by the Gaussian, between anomalies by a classifier. A baseline's pairs
    are "untrained/normal/anomaly", the trained network's "normal/anomaly".
    """
    values = {f"normal/{group}": v for group, v in record.get("gaussian_auroc", {}).items()}
    for pair, numbers in record.get("pairs", {}).items():
        if not pair.startswith("normal"):
            values[pair.replace(" ", "/")] = numbers["classifier_auroc"]
    stage = "" if run.needs_training else f"{run.method}/"
    return [{"method": stage + name, "auroc": value} for name, value in values.items()]


def ensemble(name: str, runs: list[Run], results) -> list[dict]:
    """Rows of the mean of the scores of each category's seeds (4.1), one for two seeds or more.

    How the paper combines scores is not said; a mean keeps their scale, which the Gaussian's
    distance makes comparable. A category whose seeds scored different images has no row, and a
    warning names the run.
    """
    rows = []
    for category in dict.fromkeys(run.category for run in runs):
        members = [run for run in runs if run.category == category]
        folders = [store.run_folder(run, results) for run in members]
        files = [store.read_scores(folder).set_index("file") for folder in folders]
        others = [f for f, s in zip(folders, files, strict=True) if {*s.index} != {*files[0].index}]
        if others:
            warnings.warn(f"{others[0]}: scores of other images than {folders[0]}'s", stacklevel=2)
        elif len(members) > 1:
            mean = sum(table["score"] for table in files) / len(files)
            labels = files[0]["label"].reindex(mean.index)
            row = {"method": name, "category": category, "seed": 0, "members": len(members)}
            rows.append(row | {"setting": "", "value": ""} | image_metrics(labels, mean))
    return rows
