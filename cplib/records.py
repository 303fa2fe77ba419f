"""What is worked out of a finished run and its pictures later, kept as small files beside it."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from cplib import data
from cplib.config import SYNTHETIC, Run, named
from cplib.density import Gaussian, held_out, l2_normalise
from cplib.localize import gradcam
from cplib.metrics import auroc_between, image_metrics
from cplib.model import PretextNet, embed
from cplib.runs import (
    BROKEN,
    checkpoint_file,
    load_model,
    located,
    run_folder,
    score,
    trained,
    write_json,
)
from cplib.synthetic import Anomaly, paint


@dataclass(frozen=True, kw_only=True)
class Covariances:
    """What is tried in place of a run's covariance, beside Ledoit and Wolf's."""

    reg_covar: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # on the diagonal
    folds: int = 5  # of the held-out density

    @property
    def fits(self) -> dict[str, Callable[[torch.Tensor], Gaussian]]:
        """Each under its name."""
        fits = {f"{r:g}": partial(Gaussian.fit, reg_covar=r) for r in self.reg_covar}
        return fits | {"Ledoit-Wolf": Gaussian.fit_shrunk}

    @property
    def id(self) -> str:
        """Name of the record: "density", and a hash where not the default."""
        return named("density", self)


def beside(
    run: Run,
    name: str,
    compute: Callable[[Run, PretextNet, Path], dict],
    *,
    results: str | Path,
    data_root: str | Path | None,
    weights: str | Path | None = None,
    device: str = "cpu",
) -> dict | None:
    """What ``compute(run, net, data_root)`` says of a finished run, kept beside it as a record.

    It stands in ``<name>.json`` in the run's folder; ValueError where that is no record. None where
    neither it nor the model with the pictures is there.
    """
    folder = run_folder(run, results)
    record = folder / f"{name}.json"
    if not record.exists():
        there = folder.exists() and (not trained(run) or checkpoint_file(run, results).exists())
        if data_root is None or not there:
            return None
        net = load_model(run, results, weights).to(device)
        part = record.with_suffix(f".{os.getpid()}.tmp")
        write_json(part, compute(run, net, Path(data_root)))
        part.replace(record)
    try:
        found = json.loads(record.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object of JSON")
        return found
    except BROKEN as error:
        reason = " ".join(f"{record}: no record ({error}); remove it to make it again".split())
        raise ValueError(reason) from error


def gradcam_metrics(run: Run, **places) -> dict | None:
    """Pixel-level metrics of GradCAM on an image-level run, kept beside it; else None."""

    def compute(run: Run, net: PretextNet, data_root: Path) -> dict:
        test = data.load(data_root, run.category, "test", run.size)
        return located(run, test, gradcam(net, test.pixels))

    return beside(run, "gradcam", compute, **places)


def level_metrics(run: Run, level: int, **places) -> dict | None:
    """Image-level metrics of a run by the features of one level (4.3), kept beside it; else None.

    The same Gaussian as for the run's own features.
    """

    def compute(run: Run, net: PretextNet, data_root: Path) -> dict:
        train, test = (data.load(data_root, run.category, s, run.size) for s in ("train", "test"))
        scores = score(run, net, train.pixels, test.pixels, level=level)
        return image_metrics(test.labels, scores)

    return beside(run, f"level{level}", compute, **places)


def synthetic_metrics(run: Run, anomaly: Anomaly, **places) -> dict | None:
    """AUROC of Table 6's anomalies painted on the good test pictures, kept beside; else None (5.3).

    The record holds the anomaly's fields, the numbers of clean pictures and of painted ones of a
    kind, and ``image_auroc``, percent, clean against painted ones of each kind; it has no kinds
    where no picture is good.
    """

    def compute(run: Run, net: PretextNet, data_root: Path) -> dict:
        train, test = (data.load(data_root, run.category, s, run.size) for s in ("train", "test"))
        clean = test.pixels[test.labels == 0]
        painted = [paint(clean, *kind.split("_"), anomaly)[0] for kind in SYNTHETIC if len(clean)]
        scores = score(run, net, train.pixels, torch.cat([clean, *painted]))
        good, *others = scores.split([len(clean), *map(len, painted)])
        aurocs = [auroc_between(good, part) for part in others]
        return {
            "anomaly": asdict(anomaly),
            "clean": len(good),
            "painted": len(others[0]) if others else 0,
            "image_auroc": dict(zip(SYNTHETIC, aurocs, strict=False)),
        }

    return beside(run, anomaly.id, compute, **places)


def density_metrics(run: Run, covariances: Covariances | None = None, **places) -> dict | None:
    """What other covariances would do to an image-level run, kept beside it; else None.

    The record holds the study's fields and ``fits``: an entry for each, of features scaled to
    length one and not, with its ``image_auroc``, percent, and ``held_out`` (see ``density``), None
    where it cannot be fitted.
    """
    study = covariances or Covariances()

    def compute(run: Run, net: PretextNet, data_root: Path) -> dict:
        train, test = (data.load(data_root, run.category, s, run.size) for s in ("train", "test"))
        raw = [embed(net, images.pixels) for images in (train, test)]
        rows = []
        for l2 in (True, False):
            z, z_test = map(l2_normalise, raw) if l2 else raw
            for name, fit in study.fits.items():
                row = {"covariance": name, "l2_normalise": l2}
                rows.append(row | _fitted(fit, study.folds, z, z_test, test.labels))
        return {"study": asdict(study), "fits": rows}

    return beside(run, study.id, compute, **places)


def _fitted(fit, folds: int, z: torch.Tensor, z_test: torch.Tensor, labels: torch.Tensor) -> dict:
    try:
        auroc = image_metrics(labels, fit(z).score(z_test))["image_auroc"]
        return {"image_auroc": auroc, "held_out": held_out(z, fit, folds=folds)}
    except ValueError:  # too few pictures, or all alike
        return {"image_auroc": None, "held_out": None}
