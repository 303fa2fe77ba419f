"""A model as a tool: fitted to a person's own good pictures, saved, loaded, scoring new ones."""

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from cplib import data, train
from cplib.config import Run
from cplib.density import FewGaussians, Gaussian, l2_normalise, moments
from cplib.localize import gradcam, positions, window_features
from cplib.metrics import f1_max
from cplib.model import PretextNet, embed
from cplib.runs import BROKEN, heat_maps, trained

VERSION = 3  # of what is saved
TENSORS, RECORD = "detector.safetensors", "detector.json"
GENERAL = ("good", "ok", "normal", "train", "test", "images")  # no names of what is pictured
LARGEST = 4096  # pixels a side: a record cannot ask for all the memory
CHUNK = 32  # pictures whose pixels and features are in memory at once while scoring
Pictures = Tensor | Iterable[str | Path]  # uint8 (N, 3, size, size), or files of any size


@dataclass(frozen=True)
class Detector:
    """Network, Gaussian and threshold: a picture is called defective from the threshold on.

    A patch model has one Gaussian for all places, or one for each (``Run.per_position``); a
    picture's score is that of its worst patch.
    ``good`` (N,) are the cross-validated scores of the good pictures it was fitted to, ``bad``
    (M,) those of the defective ones that helped to choose the threshold, ``chosen`` says how.
    ``pictures`` is a SHA-256 of the good ones' pixels.
    """

    run: Run
    net: PretextNet
    gaussian: Gaussian | FewGaussians
    threshold: float
    chosen: str
    good: Tensor
    bad: Tensor
    pictures: str = ""

    def __post_init__(self):
        """One memory layout and mode, so that scores are the same before saving and after."""
        self.net.to(memory_format=torch.channels_last).eval()

    @classmethod
    def fit(
        cls,
        run: Run,
        good: Pictures,
        bad: Pictures = (),
        *,
        net: PretextNet | None = None,
        quantile: float = 0.95,
        folds: int | None = None,
        device: str | torch.device = "cpu",
        weights: str | Path | None = None,
    ) -> "Detector":
        """Fit to good pictures, two at least; without ``net`` the run's network is trained first.

        The threshold comes from the good pictures' scores under a Gaussian of the others, in
        ``folds`` (see ``cross_validated``). The network has seen them all: only the Gaussian is
        cross-validated. Their features are all in memory: N x patches x D x 4 bytes. Raises
        ValueError for pictures that cannot be read (DataError, a line each) or too few of them.
        """
        run = _fixed(run, device)
        good, bad = _checked_pictures(run, good, bad, quantile)
        if net is None and trained(run):
            net, _ = train.fit(run, good, device, weights=weights)
        net = (net or train.build(run, weights)).to(device, memory_format=torch.channels_last)
        z = torch.cat([features(run, net, part) for part in good.split(CHUNK)])
        normal = cross_validated(run, z, folds=folds)
        gaussian = fit_gaussian(run, z)
        defective = place_scores(run, net, gaussian, bad).amax(1)
        threshold, chosen = choose_threshold(normal, defective, quantile)
        return cls(run, net, gaussian, threshold, chosen, normal, defective, _digest(good))

    @classmethod
    def fit_in(
        cls,
        folder: str | Path,
        run: Run,
        good: Pictures,
        bad: Pictures = (),
        *,
        net: PretextNet | None = None,
        quantile: float = 0.95,
        deadline: float | None = None,
        device: str | torch.device = "cpu",
        weights: str | Path | None = None,
    ) -> "Detector":
        """As ``fit``, then saved in ``folder``, where training that was cut off is gone on with.

        Past ``deadline`` (seconds since the epoch) that is OutOfTime. The network of a detector
        that lies there is taken, not trained again, if it was trained so on the same good pictures.
        """
        run, folder = _fixed(run, device), Path(folder)
        good, bad = _checked_pictures(run, good, bad, quantile)
        options = {"device": device, "weights": weights}
        if net is None and trained(run):
            digest = _digest(good)
            part = folder / f".{run.training_id}-{digest[:8]}.safetensors"
            limits = {"checkpoint": part, "deadline": deadline}
            net = _network(folder, run, digest) or train.fit(run, good, **limits, **options)[0]
        detector = cls.fit(run, good, bad, net=net, quantile=quantile, **options)
        detector.save(folder)
        for part in folder.glob(".*-????????.safetensors"):
            part.unlink(missing_ok=True)
        return detector

    def score(self, pictures: Pictures) -> Tensor:
        """Anomaly scores (N,) in float64; DataError has a line for each file that is no picture."""
        return self._places(as_pixels(self.run, pictures)).amax(1)

    def heat(self, pictures: Pictures) -> Tensor:
        """Heat maps (N, size, size): of the patch model's scores, else GradCAM.

        ValueError for a whole-picture model that GradCAM has no answer for: one without training.
        """
        pixels = as_pixels(self.run, pictures)
        if self.run.window:
            rows, columns = positions(*pixels.shape[2:], self.run.window, self.run.stride)
            return heat_maps(self.run, self._places(pixels).view(-1, rows, columns).float())
        if not trained(self.run) or not hasattr(self.net.encoder, "layer4"):
            raise ValueError("no heat maps without patches: GradCAM needs a trained ResNet")
        return gradcam(self.net, pixels)

    def _places(self, pixels: Tensor) -> Tensor:
        return place_scores(self.run, self.net, self.gaussian, pixels)

    def save(self, folder: str | Path) -> None:
        """Write ``detector.safetensors`` and ``detector.json``, each under another name first.

        The second holds the first one's hash: a mixture of two detectors is refused by ``load``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
                tensors, record = Path(part) / TENSORS, Path(part) / RECORD
                save_file(self._tensors(), tensors)
                record.write_text(json.dumps(self._record(tensors.read_bytes()), indent=1) + "\n")
                with contextlib.suppress(OSError):  # some shared drives know no modes
                    tensors.chmod(record.stat().st_mode)  # safetensors' own: nobody else reads it
                tensors.replace(folder / TENSORS)
                record.replace(folder / RECORD)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write the detector {folder}: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {k: v for k, v in vars(self.gaussian).items() if isinstance(v, Tensor)}
        tensors |= {"good": self.good, "bad": self.bad}
        return {k: v.cpu().contiguous() for k, v in tensors.items()}

    def _record(self, tensors: bytes) -> dict:
        return {
            "version": VERSION,
            "run": asdict(self.run),
            "threshold": self.threshold,
            "chosen": self.chosen,
            "data": {"good": len(self.good), "bad": len(self.bad), "sha256": self.pictures},
            "sha256": hashlib.sha256(tensors).hexdigest(),
        }

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Detector":
        """Read what ``save`` wrote; ValueError, one line, for anything else. Runs no code of it."""
        folder = Path(folder)
        try:
            record = json.loads((folder / RECORD).read_text())
            run, tensors = _checked(record, (folder / TENSORS).read_bytes())
        except (*BROKEN, RuntimeError, SafetensorError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{folder}: not a detector of this version ({reason})") from error
        net = _empty_net(run).to_empty(device="cpu")
        net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        # Copies: the last digits of matrix products depend on where in memory a matrix begins.
        parts = {k: v.clone().to(device) for k, v in tensors.items() if not k.startswith("net.")}
        scores = parts.pop("good").cpu(), parts.pop("bad").cpu()
        few = {"reg_covar": run.reg_covar} if "centred" in parts else {}
        gaussian = (FewGaussians if few else Gaussian)(**parts, **few)
        chosen = record["threshold"], record["chosen"]
        return cls(run, net.to(device), gaussian, *chosen, *scores, record["data"]["sha256"])


def name_of(folder: str | Path) -> str:
    """What a folder of good pictures is of: ``gear`` for ``.../gear/train/good``."""
    parts = Path(folder).expanduser().resolve().parts[1:]
    return next((part for part in reversed(parts) if part.lower() not in GENERAL), "own")


def _fixed(run: Run, device: str | torch.device) -> Run:
    """With the precision of its training named: machines choose differently."""
    return replace(run, precision=train.precision(run, device))


def _checked_pictures(run: Run, good: Pictures, bad: Pictures, quantile: float) -> tuple:
    """The pictures as pixels; raises what is wrong with them before anything is trained."""
    _check_quantile(quantile)
    good, bad = as_pixels(run, good), as_pixels(run, bad)
    if len(good) < 2:
        raise ValueError(f"a detector needs two good pictures at least, not {len(good)}")
    return good, bad


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest()


def _network(folder: Path, run: Run, digest: str) -> PretextNet | None:
    """The network of the detector in a folder, if the same training on these pictures made it."""
    try:
        record = json.loads((folder / RECORD).read_text())
        there = Run.from_dict(record["run"])
        same = replace(there, precision=run.precision).training_id == run.training_id
        if same and record["data"]["sha256"] == digest:
            return Detector.load(folder).net
    except BROKEN:
        pass  # another version's, or none: trained anew and replaced
    return None


def by_place(run: Run) -> bool:
    """Whether each place of a picture has its own Gaussian (A.5)."""
    return bool(run.window) and run.per_position


def as_pixels(run: Run, pictures: Pictures) -> Tensor:
    """Pictures as uint8 (N, 3, size, size); DataError has a line for each that cannot be read."""
    if not isinstance(pictures, Tensor):
        pixels, _, problems = data.read(pictures, run.size)
        if problems:
            raise data.DataError("\n".join(problems))
        return pixels
    if pictures.dtype != torch.uint8 or pictures.shape[1:] != (3, run.size, run.size):
        found = f"{str(pictures.dtype).removeprefix('torch.')} {tuple(pictures.shape)}"
        raise ValueError(f"pictures must be uint8 (N, 3, {run.size}, {run.size}), not {found}")
    return pictures


def features(run: Run, net: PretextNet, pixels: Tensor) -> Tensor:
    """Features (N, P, D) on the net's device: one a picture, or one a place of the patch model."""
    if run.window:
        z = window_features(net, pixels, window=run.window, stride=run.stride)
    else:
        z = embed(net, pixels).to(net.pixel_mean.device)[:, None]
    z = z.flatten(1, -2)
    return l2_normalise(z) if run.l2_normalise else z


def place_scores(run: Run, net: PretextNet, gaussian: Gaussian, pixels: Tensor) -> Tensor:
    """Scores (N, P), float64 on the CPU, of every place of uint8 pictures (N, 3, H, W)."""
    parts = [
        _scores(gaussian, features(run, net, part)) for part in pixels.split(CHUNK) if len(part)
    ]
    return torch.cat(parts) if parts else torch.empty(0, 1, dtype=torch.float64)


def _scores(gaussian: Gaussian | FewGaussians, z: Tensor) -> Tensor:
    """Scores (N, P), on the CPU, of features z (N, P, D)."""
    if gaussian.mean.ndim > 1:  # one for each place
        return gaussian.score(z.transpose(0, 1)).T.cpu()
    return torch.stack([gaussian.score(places) for places in z]).cpu()  # one at a time: memory


def fit_gaussian(run: Run, z: Tensor) -> Gaussian | FewGaussians:
    """What the run's scores come from, fitted to features z (N, P, D)."""
    if by_place(run) and _few(len(z), z.shape[-1]):
        return FewGaussians.fit(z.transpose(0, 1), reg_covar=run.reg_covar)
    if by_place(run):
        gaussian = Gaussian.fit(z.transpose(0, 1), reg_covar=run.reg_covar)
    else:
        gaussian = Gaussian.fit_stream(z, reg_covar=run.reg_covar)
    return Gaussian(gaussian.mean, gaussian.factor.contiguous())  # as it is when loaded


def _few(n: int, width: int) -> bool:
    """Whether the samples of a place, as FewGaussians keeps them, take less than a covariance."""
    return 4 * n * width + 8 * n * n < 8 * width * width


def cross_validated(run: Run, z: Tensor, *, folds: int | None = None) -> Tensor:
    """Score (N,) of each picture's features z (N, P, D) under a Gaussian of the other folds'.

    Without ``folds``: ten where each place has its Gaussian, else one picture at a time is left
    out. The fewer pictures a Gaussian has, the higher it scores new ones: the median of the demo's
    64 gears is a fifth higher with five folds than with 64.
    """
    n = len(z)
    folds = min(n, folds or (10 if by_place(run) else n))
    if folds < 2:
        raise ValueError(f"cross-validation needs two pictures and two folds, not {n} and {folds}")
    whole = None if by_place(run) else moments(z)
    scores = torch.empty(n, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(run.seed))
    for fold in order.tensor_split(folds):
        if whole:  # less than fitting each time anew
            others = (a - b for a, b in zip(whole, moments(z[fold]), strict=True))
            gaussian = Gaussian.from_moments(*others, reg_covar=run.reg_covar)
        else:
            gaussian = fit_gaussian(run, z[order[~torch.isin(order, fold)]])
        scores[fold] = _scores(gaussian, z[fold]).amax(1)
    return scores


def choose_threshold(good: Tensor, bad: Tensor, quantile: float) -> tuple[float, str]:
    """The threshold and how it was chosen, from scores of good (N,) and of bad (M,) pictures.

    With bad ones the highest F1, halfway down to the next lower score; without any the
    ``quantile`` of the good ones, so that about 1 - quantile of good pictures are false alarms.
    """
    _check_quantile(quantile)
    if not len(bad):
        how = f"{100 * quantile:g} % quantile of the cross-validated scores of {len(good)} good"
        return torch.quantile(good, quantile).item(), f"{how} pictures"
    scores = torch.cat([good, bad])
    best, lowest = f1_max([0] * len(good) + [1] * len(bad), scores)
    below = scores[scores < lowest]
    threshold = (lowest + below.max().item()) / 2 if len(below) else lowest
    how = f"F1-max ({100 * best:.1f} %) over {len(good)} good pictures, cross-validated, and"
    return threshold, f"{how} {len(bad)} defective ones"


def _check_quantile(quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"the quantile must lie between 0 and 1: {quantile}")


def score_folder(detector: Detector, folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """``file, score, threshold, defective`` of every picture below a folder, and what went wrong.

    A file that is no picture has an empty score and a line among the problems.
    """
    folder = Path(folder).expanduser()
    files = data.pictures(folder)
    scores, problems = {}, []
    for part in _parts(files):
        pixels, read, wrong = data.read(part, detector.run.size)
        scores |= dict(zip(read, detector.score(pixels).tolist(), strict=True))
        problems += wrong
    table = pd.DataFrame({"file": [file.relative_to(folder).as_posix() for file in files]})
    table["score"] = [scores.get(file) for file in files]
    table["score"] = table["score"].astype(float)
    table["threshold"] = detector.threshold
    flagged = (table["score"] >= detector.threshold).astype("Int64")
    table["defective"] = flagged.where(table["score"].notna())
    return table, problems


def _parts(files: list[Path]) -> Iterator[list[Path]]:
    return (files[i : i + CHUNK] for i in range(0, len(files), CHUNK))


def _empty_net(run: Run) -> PretextNet:
    """The run's network without memory behind it: a record cannot ask for any."""
    with torch.device("meta"):
        return train.build(replace(run, init="random", freeze_batchnorm=False))


def _checked(record: dict, raw: bytes) -> tuple[Run, dict[str, Tensor]]:
    """The run and the tensors; raises whatever is wrong with them."""
    if record["version"] != VERSION:
        raise ValueError(f"version {record['version']!r}, not {VERSION}")
    if hashlib.sha256(raw).hexdigest() != record["sha256"]:
        raise ValueError(f"{TENSORS} is damaged, or of another detector: its sha256 differs")
    run = Run.from_dict(record["run"])
    if run.size > LARGEST:
        raise ValueError(f"pictures of {run.size} pixels; at most {LARGEST}")
    if not isinstance(record["data"]["sha256"], str):
        raise ValueError("no hash of the pictures")
    threshold, chosen = record["threshold"], record["chosen"]
    if type(threshold) is not float or not isinstance(chosen, str):
        raise ValueError("the threshold must be a number, and how it was chosen a sentence")
    tensors = load(raw)
    _check_shapes(tensors, _expected(run, record["data"]))
    finite = [v.isfinite().all() for v in tensors.values()]
    if not all(finite) or not torch.tensor(threshold).isfinite():
        raise ValueError("a number is not finite")
    if not (tensors["factor"].diagonal(dim1=-2, dim2=-1) > 0).all():
        raise ValueError("the factor is not one of a covariance")
    return run, tensors


def _expected(run: Run, counts: dict) -> dict[str, Tensor]:
    """Empty tensors of the names, shapes and types that a detector of this run has."""
    net = _empty_net(run)
    width, n = net.head[0].in_features, counts["good"]
    shapes = {"mean": (width,), "factor": (width, width), "good": (n,), "bad": (counts["bad"],)}
    few = {}
    if run.window:
        places = math.prod(positions(run.size, run.size, run.window, run.stride))
    if by_place(run):
        if not run.reg_covar > 0:
            raise ValueError(f"reg_covar is {run.reg_covar}")
        side = n if _few(n, width) else width
        shapes |= {"mean": (places, width), "factor": (places, side, side)}
        if _few(n, width):
            few = {"centred": torch.empty(places, n, width, device="meta")}
    other = {k: torch.empty(s, dtype=torch.float64, device="meta") for k, s in shapes.items()}
    return {f"net.{k}": v for k, v in net.state_dict().items()} | other | few


def _check_shapes(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if odd := sorted(set(tensors) ^ set(expected)):
        raise ValueError(f"{odd[0]!r} is missing or unknown")
    for name, value in tensors.items():
        want = expected[name].shape, expected[name].dtype
        if (value.shape, value.dtype) != want:
            raise ValueError(f"{name!r} is {tuple(value.shape)} {value.dtype}, not {want}")
