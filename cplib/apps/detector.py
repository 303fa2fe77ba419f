"""A detector for a person's own images: compare candidates, fit one, save it, score new images."""

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

import pandas as pd
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from cplib import datasets
from cplib.augment import pasted_copies
from cplib.datasets import atomic
from cplib.density import Gaussian, PositionGaussians, moments
from cplib.localize import level_features, positions
from cplib.metrics import auroc_between, f1_max
from cplib.model import PretextNet, build
from cplib.run import Run
from cplib.score import IMAGE_BATCH, Scorer, by_position, fit_density, score_features
from cplib.study.figures import overlay
from cplib.study.jobs import BAR
from cplib.study.profiles import METHOD, Profile
from cplib.study.store import BROKEN, Places, one_line, write_json
from cplib.study.synthetic import FILLS, paint
from cplib.train import augmentation_kwargs, fit, precision

VERSION = 5  # of the saved files
TENSORS, RECORD = "detector.safetensors", "detector.json"
GENERAL = ("good", "ok", "normal", "train", "test", "images")  # folders that do not name a product
LARGEST, DEEPEST = 4096, 16  # pixels a side, hidden layers: a record cannot ask for more memory
# ImageNet features of EfficientNet-Lite0: a package brings its weights. Two levels hold detail and
# context. A place is 16 pixels.
LEVELS = Run(
    method="pretrained",
    category="own",
    dataset="own",
    backbone="efficientnet_lite0",
    init="imagenet",
    updates=0,
    levels=(4, 6),
    reg_covar=0.01,
)
PAINTED = (("square", "color"), ("heart", "natural"))  # shapes and fillings of made anomalies
SIDE = (0.07, 0.15)  # of a painted shape, a share of the image's side
OPACITY = 0.5  # of a painted shape
STRIDE = 16  # pixels between the windows of the patch model, as between the places of LEVELS
# The scores of new images cast doubt on the threshold if there are FEWEST of them or more, and:
FEWEST = 20
LOW = 0.08  # at most this share of those below the threshold is as low as a quarter of the normal
ALL_ABOVE = 0.95  # or at least this share lies above the threshold
FEW = 100  # of fewer normal images, ``compare`` holds out every second one, else every fifth
HELD = 200  # ``compare`` holds out about this many at most
FOLDS = 10  # of the cross-validation where each place has its own Gaussian
Images = Tensor | Sequence[str | Path]  # uint8 (N, 3, size, size), or files of any size


@dataclass(frozen=True)
class Detector:
    """A scorer with a threshold. An image is anomalous if its score reaches the threshold.

    ``normal`` (N,) holds the cross-validated scores of the normal images. ``anomalous`` (M,) holds
    the scores of the anomalous images that helped to choose the threshold. ``chosen`` says how it
    was chosen. ``images`` is the SHA-256 of the normal images' pixels.
    """

    scorer: Scorer
    threshold: float
    chosen: str
    normal: Tensor
    anomalous: Tensor
    images: str = ""

    @property
    def run(self) -> Run:
        """The settings of the network and of the scores."""
        return self.scorer.run

    def score(self, images: Images) -> Tensor:
        """Anomaly scores (N,), float64. DataError names each file that is not an image."""
        return self.scorer.score(as_pixels(self.run, images))

    def doubt(self, scores: Tensor) -> str:
        """A warning if the scores (N,) of new images show that the threshold may not hold, else "".

        Take the new images below the threshold. If they are like the images of the fit, about a
        quarter of them score as low as the lowest quarter of the normal images (fewer if defects
        were missed). If light, position or camera have changed, hardly any does.
        """
        above = int((scores >= self.threshold).sum())
        own, below = (x[x < self.threshold] for x in (self.normal, scores))
        if len(scores) < FEWEST or not len(own):
            return ""
        low = int((below < own.quantile(0.25)).sum())
        few = low <= LOW * len(below) and (
            not len(below) or binomtest(low, len(below), 0.25, "less").pvalue < 0.05
        )
        if not few and above < ALL_ABOVE * len(scores):
            return ""
        return (
            f"{above} of {len(scores)} images ({above / len(scores):.0%}) lie at or above the "
            "threshold, and hardly any scores as low as the lowest quarter of the normal images "
            "did: light, position or camera may have changed, and the threshold may not hold."
        )

    def maps(self, images: Images) -> Tensor:
        """Anomaly maps (N, size, size)."""
        return self.scorer.maps(as_pixels(self.run, images))

    def save(self, folder: str | Path) -> None:
        """Write ``detector.safetensors`` and ``detector.json``.

        The second file holds the hash of the first, so ``load`` refuses files of two detectors.
        """
        folder = Path(folder)
        tensors = {f"net.{k}": v for k, v in self.scorer.net.state_dict().items()}
        density = vars(self.scorer.density)
        tensors |= {f"density.{k}": v for k, v in density.items() if isinstance(v, Tensor)}
        tensors |= {"normal": self.normal, "anomalous": self.anomalous}
        with atomic(folder / TENSORS) as part:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part)
            part.chmod(0o644)  # safetensors lets nobody else read it
            digest = hashlib.sha256(part.read_bytes()).hexdigest()
        record = {"version": VERSION, "run": asdict(self.run), "threshold": self.threshold}
        record |= {"chosen": self.chosen, "images": self.images, "sha256": digest}
        write_json(folder / RECORD, record)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Detector":
        """Read what ``save`` wrote. Anything else is a ValueError of one line, and runs no code."""
        folder = Path(folder)
        try:
            return cls._load(folder, device)
        except (*BROKEN, RuntimeError, SafetensorError) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise ValueError(f"{folder}: not a detector of this version ({reason})") from error

    @classmethod
    def _load(cls, folder: Path, device) -> "Detector":
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']!r}, not {VERSION}")
        raw = (folder / TENSORS).read_bytes()
        if hashlib.sha256(raw).hexdigest() != record["sha256"]:
            raise ValueError(f"{TENSORS} is damaged, or of another detector: its sha256 differs")
        run = Run.from_dict(record["run"])
        if run.size > LARGEST or len(run.head) > DEEPEST:
            raise ValueError(f"at most {LARGEST} pixels a side and {DEEPEST} hidden layers")
        if [type(record[k]) for k in ("threshold", "chosen", "images")] != [float, str, str]:
            raise ValueError("threshold, chosen and images must be a number and two texts")
        tensors = load(raw)
        with torch.device("meta"):  # a record cannot ask for memory
            net = build(replace(run, init="random", freeze_batchnorm=False))
            _check(tensors, _expected(run, net, tensors))
        numbers = [*tensors.values(), torch.tensor(record["threshold"])]
        if not all(v.isfinite().all() for v in numbers):
            raise ValueError("a number is not finite")
        factor = tensors.get("density.factor", torch.ones(1, 1))
        if not (factor.diagonal(dim1=-2, dim2=-1) > 0).all() or factor.triu(1).any():
            raise ValueError("density.factor is not one of a covariance")
        state = {k[4:]: tensors.pop(k) for k in [*tensors] if k.startswith("net.")}
        net.load_state_dict(state, assign=True)
        net = net.to(device, memory_format=torch.channels_last).eval()
        normal, anomalous = tensors.pop("normal"), tensors.pop("anomalous")
        # The last digits of matrix products depend on the layout in memory: restore it.
        density = {k.removeprefix("density."): v.clone() for k, v in tensors.items()}
        if factor.dim() == 2 and "mean" in density:
            density["factor"] = factor.mT.contiguous().mT  # by columns, like Cholesky's
        kind = PositionGaussians if "z" in density else Gaussian
        options = {"reg_covar": run.reg_covar} if "z" in density else {}
        scorer = Scorer(run, net, kind(**density, **options))
        return cls(
            scorer, record["threshold"], record["chosen"], normal, anomalous, record["images"]
        )


def own_images(good: str | Path, bad: str | Path = "") -> tuple[list[Path], list[Path], list[str]]:
    """The normal images below ``good``, the anomalous ones below ``bad``, and lines to print.

    ``bad`` may lie inside ``good``: its images are not taken as normal. The lines name files that
    are not images. Raises DataError if a folder has no image that can be read.
    """
    folders = [Path(folder).expanduser().resolve() for folder in (good, bad) if folder]
    found, lines = [], []
    for folder in folders:
        _, images, problems = datasets.read_images(datasets.image_files(folder), 32)
        lines += [*problems, *filter(None, [datasets.left_out(folder)])]
        found.append(images)
    normal, anomalous = found if bad else (*found, [])
    inside = set(anomalous) & set(normal)
    if inside:
        lines.append(f"{folders[1]}: its {len(inside)} images are not taken as normal")
    normal = [path for path in normal if path not in inside]
    for folder, images in zip(folders, (normal, anomalous), strict=False):
        if not images:
            raise datasets.DataError(f"{folder}: no image that can be read; expected some")
    return normal, anomalous, lines


def fit_detector(
    run: Run,
    normal: Images,
    anomalous: Images = (),
    *,
    places: Places,
    folder: str | Path | None = None,
    quantile: float = 0.95,
) -> Detector:
    """Train the run's network if it needs training, fit its density, and choose a threshold.

    With ``folder`` the detector is saved there. A line is printed if it replaces a detector of
    other images. The threshold comes from the scores of the normal images (``cross_validated``)
    and of the anomalous ones (``choose_threshold``). Raises ValueError for fewer than two normal
    images, and DataError with a line for each file that cannot be read.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"the quantile must lie between 0 and 1: {quantile}")
    normal, anomalous = as_pixels(run, normal), as_pixels(run, anomalous)
    if len(normal) < 2:
        raise ValueError(f"a detector needs two normal images at least, not {len(normal)}")
    run, net = _network(run, normal, places)
    z = torch.cat([Scorer(run, net, None).features(part) for part in normal.split(IMAGE_BATCH)])
    scorer = Scorer(run, net, fit_density(run, z))
    own, other = cross_validated(run, z), scorer.score(anomalous)
    chosen = choose_threshold(own, other, quantile)
    detector = Detector(scorer, *chosen, own, other, datasets.pixels_digest(normal))
    if folder is not None:
        with contextlib.suppress(*BROKEN):  # there is none, or it is damaged
            stored = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
            if stored["images"] != detector.images:
                print(f"{folder}: replaces a detector of other images")
        detector.save(folder)
    return detector


def candidates(
    category: str, profile: Profile | None = None, *, pad: bool = False
) -> dict[str, Run]:
    """Runs to compare, by name: two with ImageNet features, with a profile two of CutPaste's, too.

    CutPaste finetunes the same features in the two phases of section 4.3, or trains the patch model
    of section 4.2, both by the schedules of the profile. ``pad``: see ``datasets.read_images``.
    """
    own = {"category": category, "dataset": "own", "pad": pad}
    runs = {
        "ImageNet, a Gaussian per place": replace(LEVELS, **own, gaussians="position"),
        "ImageNet, one Gaussian": replace(LEVELS, **own, gaussians="shared"),
    }
    if profile:
        features = {k: getattr(LEVELS, k) for k in ("size", "backbone", "levels", "reg_covar")}
        tuned = profile.run(METHOD, category, protocol="finetune")
        runs["finetuned by CutPaste"] = replace(tuned, **own, **features, gaussians="position")
        patch = profile.run(METHOD, category, protocol="patch")
        runs["CutPaste patches"] = replace(patch, **own, gaussians="shared", stride=STRIDE)
    return runs


def differ_in_shape(files: Iterable[str | Path]) -> bool:
    """Whether the images' ratios of width to height differ by more than 5 %."""
    ratios = [w / h for w, h in map(datasets.size_of, files)]
    return max(ratios) > 1.05 * min(ratios)


def compare(
    runs: dict[str, Run], normal: Images, bad: Images = (), *, places: Places
) -> pd.DataFrame:
    """How well each run finds anomalies: a row for each run, ``ranked``.

    A part of the normal images is held out, and each run is fitted to the others. Columns: the
    AUROC in percent between held-out images and each kind of ``made_anomalies``, the ``mean`` of
    these, the AUROC of the ``bad`` images if there are any, and the ``seconds`` it took.

    Raises ValueError for fewer than four normal images.
    """
    rows, read = {}, cache(lambda size, pad: as_pixels(run, normal))
    for name, run in tqdm(runs.items(), desc="candidates", bar_format=BAR, file=sys.stdout):
        began, pixels = time.time(), read(run.size, run.pad)
        if len(pixels) < 4:
            raise ValueError(f"to compare takes four normal images at least, not {len(pixels)}")
        every = max(5, len(pixels) // HELD) if len(pixels) >= FEW else 2
        held = torch.arange(len(pixels)) % every == 0
        run, net = _network(run, pixels[~held], places)
        scorer = Scorer.fit(run, net, pixels[~held])
        made = made_anomalies(run, pixels[held], side=SIDE, opacity=OPACITY)
        own = scorer.score(made.pop("normal"))
        found = {kind: auroc_between(own, scorer.score(part)) for kind, part in made.items()}
        found["mean"] = fmean(found.values())
        if len(bad):
            found["bad"] = auroc_between(own, scorer.score(as_pixels(run, bad)))
        rows[name] = found | {"seconds": time.time() - began}

    return ranked(pd.DataFrame.from_dict(rows, orient="index"), runs)


def ranked(table: pd.DataFrame, runs: dict[str, Run]) -> pd.DataFrame:
    """The rows of ``compare`` in another order: the first one is recommended.

    It has the highest AUROC on the bad images. Without bad images, or if several rows share that
    AUROC, the highest mean decides. Runs that CutPaste trains then come last: they have seen pasted
    pieces, so their mean is too good.
    """

    def key(name: str) -> tuple:
        row = table.loc[name]
        return -row.get("bad", 0), runs[name].needs_training, -row["mean"]

    return table.loc[sorted(table.index, key=key)]


def made_anomalies(
    run: Run, normal: Tensor, *, side: tuple[float, float], opacity: float
) -> dict[str, Tensor]:
    """The ``normal`` images, and a copy with each kind of anomaly: pasted pieces, painted shapes.

    ``side`` and ``opacity`` are those of the painted shapes.
    """
    patch, scar = pasted_copies(normal, augmentation_kwargs(run))
    made = {"normal": normal, "pasted piece": patch, "pasted scar": scar}
    for shape, fill in PAINTED:
        painted, _ = paint(normal, shape, fill, least=1, side=side)
        mixed = normal + opacity * (painted.float() - normal)
        made[f"{shape} ({FILLS[fill]})"] = mixed.to(torch.uint8)
    return made


def _network(run: Run, normal: Tensor, places: Places) -> tuple[Run, PretextNet]:
    """The run and its network. Its training resumes from a checkpoint of the same images."""
    if not run.needs_training:
        net = build(run, places.weights)
    else:
        run = replace(run, precision=precision(run, places.device))  # differs between machines
        name = f"{run.training_id}-{datasets.pixels_digest(normal)[:8]}.safetensors"
        checkpoint = places.results / "checkpoints" / name
        net, _ = fit(run, normal, places.device, weights=places.weights, checkpoint=checkpoint)
    return run, net.to(places.device, memory_format=torch.channels_last).eval()


def _expected(run: Run, net: PretextNet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the names, shapes and types that a detector of this run has."""
    lengths = {k: len(tensors[k]) for k in ("normal", "anomalous")}
    found = {k: torch.empty(n, dtype=torch.float64) for k, n in lengths.items()}
    width, shape = net.head[0].in_features, (1, 1)
    if run.window:
        shape = positions(run.size, run.size, run.window, run.stride)
    if run.levels:
        x = torch.empty(1, 3, run.size, run.size, dtype=torch.uint8, device="meta")
        *shape, width = level_features(net.eval(), x, run.levels).shape[1:]
    if by_position(run) and run.levels:
        n = math.prod(shape)
        found["density.mean"] = torch.empty(n, width, dtype=torch.float64)
        found["density.factor"] = torch.empty(n, width, width, dtype=torch.float64)
    elif by_position(run):
        found["density.z"] = torch.empty(lengths["normal"], math.prod(shape), width)
    else:
        found["density.mean"] = torch.empty(width, dtype=torch.float64)
        found["density.factor"] = torch.empty(width, width, dtype=torch.float64)
    return found | {f"net.{k}": v for k, v in net.state_dict().items()}


def _check(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise a ValueError that names a tensor that is missing, unknown, or of another kind."""
    if odd := sorted(set(tensors) ^ set(expected)):
        raise ValueError(f"{odd[0]!r} is missing or unknown")
    for name, value in tensors.items():
        want = expected[name].shape, expected[name].dtype
        if (value.shape, value.dtype) != want:
            raise ValueError(f"{name!r} is {tuple(value.shape)} {value.dtype}, not {want}")


def name_of(folder: str | Path) -> str:
    """A name for a folder's detector, from its whole path: "sieve-1f3a" for .../sieve/good."""
    path = Path(folder).expanduser().resolve()
    named = [part for part in path.parts[1:] if part.lower() not in GENERAL]
    digest = hashlib.sha256(path.as_posix().encode()).hexdigest()
    return "-".join([*named[-1:], digest[:4]])


def as_pixels(run: Run, images: Images) -> Tensor:
    """Images as uint8 (N, 3, size, size). DataError has a line for each that cannot be read."""
    if not isinstance(images, Tensor):
        pixels, _, problems = datasets.read_images(images, run.size, pad=run.pad)
        if problems:
            raise datasets.DataError("\n".join(problems))
        return pixels
    if images.dtype != torch.uint8 or images.shape[1:] != (3, run.size, run.size):
        found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 (N, 3, {run.size}, {run.size}), not {found}")
    return images


def cross_validated(run: Run, z: Tensor) -> Tensor:
    """Scores (N,) of images by their features z (N, P, D), each by Gaussians of the other images.

    One image is left out at a time. Where each place has its own Gaussian, this would take too
    long: there are FOLDS folds. The fewer images a Gaussian has, the higher it scores new ones.
    """
    n = len(z)
    folds = min(n, FOLDS) if by_position(run) else n
    whole = None if by_position(run) else moments(z)
    scores = torch.empty(n, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(run.seed))
    for fold in order.tensor_split(folds):
        if whole:  # faster than a new fit
            others = (a - b for a, b in zip(whole, moments(z[fold]), strict=True))
            density = Gaussian.from_moments(*others, reg_covar=run.reg_covar)
        else:
            density = fit_density(run, z[order[~torch.isin(order, fold)]])
        scores[fold] = score_features(density, z[fold]).amax(1)
    return scores


def choose_threshold(normal: Tensor, anomalous: Tensor, quantile: float) -> tuple[float, str]:
    """The threshold and how it was chosen, from scores of normal (N,) and anomalous (M,) images.

    With anomalous images it has the highest F1, and lies halfway down to the next lower score.
    Without any it is the ``quantile`` of the normal scores: about 1 - quantile of the normal images
    are false alarms.
    """
    if not len(anomalous):
        how = f"{100 * quantile:g} % quantile of the cross-validated scores of {len(normal)} normal"
        threshold = torch.quantile(normal, quantile).item()
        return threshold, f"{how} images; {false_alarms(normal, threshold)}"
    scores = torch.cat([normal, anomalous])
    best, lowest = f1_max([0] * len(normal) + [1] * len(anomalous), scores)
    below = scores[scores < lowest]
    threshold = (lowest + below.max().item()) / 2 if len(below) else lowest
    how = f"F1-max ({100 * best:.1f} %) over {len(normal)} normal images, cross-validated, and"
    return threshold, f"{how} {len(anomalous)} anomalous ones"


def false_alarms(normal: Tensor, threshold: float) -> str:
    """Words for the share of normal scores at or above a threshold, with its 95 % interval."""
    found = binomtest(int((normal >= threshold).sum()), len(normal))
    low, high = found.proportion_ci(0.95)
    share = f"{100 * found.statistic:.1f} % of normal images"
    return f"expected false alarms: {share} (95 % interval {100 * low:.1f} to {100 * high:.1f})"


def score_folder(
    detector: Detector, folder: str | Path, maps: str | Path | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """A table (file, score, threshold, anomalous) of the images below a folder, and the problems.

    A file that is not an image has an empty score and a line among the problems. With ``maps``, a
    folder, a PNG of each image is written there, under its anomaly map. The map's colours go from
    half the threshold to twice the threshold.
    """
    folder, run = Path(folder).expanduser(), detector.run
    files = datasets.image_files(folder)
    scores, problems = {}, []
    for part in (files[i : i + IMAGE_BATCH] for i in range(0, len(files), IMAGE_BATCH)):
        pixels, read, wrong = datasets.read_images(part, run.size, pad=run.pad)
        scores |= dict(zip(read, detector.score(pixels).tolist(), strict=True))
        heats = detector.maps(pixels) if maps else ()
        for file, image, heat in zip(read, pixels, heats, strict=False):
            laid = overlay(image, heat, (detector.threshold / 2, 2 * detector.threshold))
            path = Path(maps, f"{file.relative_to(folder)}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * laid).astype("uint8")).save(path)
        problems += wrong
    table = pd.DataFrame({"file": [file.relative_to(folder).as_posix() for file in files]})
    table["score"] = pd.Series([scores.get(file) for file in files], dtype=float)
    table["threshold"] = detector.threshold
    flagged = (table["score"] >= detector.threshold).astype("Int64")
    table["anomalous"] = flagged.where(table["score"].notna())
    return table, problems
