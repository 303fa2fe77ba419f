"""One run, from its fields to its folder, and folders back into a table."""

import contextlib
import glob
import json
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import save_file

from cplib import data
from cplib.config import Run
from cplib.density import Gaussian, l2_normalise
from cplib.localize import upsample, window_scores
from cplib.metrics import IMAGE_METRICS, PIXEL_METRICS, image_metrics, peak_within, pixel_metrics
from cplib.model import PretextNet, embed, weights_digest, weights_file
from cplib.train import (
    build,
    device_name,
    fit,
    images,
    network_state,
    read_checkpoint,
    total_updates,
)

RECORD_VERSION = 1
TOLERANCE = 0.1  # of the scores' standard deviation, between devices
PEAK = "peak_within_16px"
RECORD = {
    "threads": int,
    "data": dict,
    "weights": dict | None,
    "device": str,
    "precision": str,
    "train_seconds": int | float,
    "images_per_second": int | float | None,
}
# What JSON of any other kind raises on its way to a run.
BROKEN = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
)
SCORES = ["file", "kind", "label", "score"]
TIMING = ("device", "precision", "train_seconds", "images_per_second")


def run_folder(run: Run, results: str | Path) -> Path:
    """Where the run's record lies: ``results/runs/<run id>``."""
    return Path(results) / "runs" / run.id


def execute(
    run: Run,
    *,
    data_root: str | Path,
    results: str | Path,
    device: str = "cpu",
    weights: str | Path | None = None,
    threads: int = 1,
    deadline: float | None = None,
) -> Path:
    """Train, score and record one run; returns its folder. One that is there already is kept.

    On a CPU the scores depend on nothing but the run, the data and the number of ``threads``.
    The folder appears whole or not at all. Raises what ``load`` and ``fit`` raise.
    """
    folder = run_folder(run, results)
    if folder.exists():
        tidy(run, results)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _execute(run, results, data_root, torch.device(device), weights, deadline)
    except OSError:
        if not folder.exists():  # else another process finished the same run, and tidied up
            raise
    finally:
        torch.set_num_threads(before)
    tidy(run, results)
    return folder


def checkpoint_file(run: Run, results: str | Path) -> Path:
    """Where the run's training is kept: runs that differ only in how they score share it."""
    return Path(results) / "checkpoints" / f"{run.training_id}.safetensors"


def tidy(run: Run, results: str | Path) -> None:
    """Remove what killed processes left of a finished run; its checkpoint stays, to be scored."""
    results, file = Path(results), checkpoint_file(run, results)
    parts = [*results.glob(f"runs/.part-{glob.escape(run.id)}-*")]
    for left in [*parts, *file.parent.glob(f"{glob.escape(file.stem)}.*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left != file:
            with contextlib.suppress(OSError):  # a folder that is read-only keeps it
                left.unlink()


def _execute(run, results, data_root, device, weights, deadline) -> None:
    train = data.load(data_root, run.category, "train", run.size)
    test = data.load(data_root, run.category, "test", run.size)

    def watch(net: PretextNet) -> dict:
        return {k: v for k, v in assess(run, net, train, test)[1].items() if k.endswith("auroc")}

    checkpoint = checkpoint_file(run, results)
    if trained(run):
        net, history = fit(
            run,
            train.pixels,
            device,
            checkpoint=checkpoint,
            deadline=deadline,
            weights=weights,
            watch=watch,
        )
    else:
        net, history = build(run, weights).to(device).eval(), pd.DataFrame()
    scores, metrics, maps = assess(run, net, train, test)
    about = read_checkpoint(checkpoint)[0] if trained(run) else {}
    record = describe(run, train, test, history, about, device, weights)
    _write(run_folder(run, results), record, history, test, scores, metrics, maps)


def assess(run: Run, net: PretextNet, train: data.Images, test: data.Images) -> tuple:
    """Scores (N,) of the test pictures, the run's metrics, and a patch model's maps, else None."""
    if not run.window:
        scores = score(run, net, train.pixels, test.pixels)
        return scores, image_metrics(test.labels, scores), None
    maps = window_scores(
        net,
        train.pixels,
        test.pixels,
        window=run.window,
        stride=run.stride,
        per_position=run.per_position,
        reg_covar=run.reg_covar,
        l2=run.l2_normalise,
    )
    scores = maps.amax((1, 2))
    heat = heat_maps(run, maps)
    return scores, image_metrics(test.labels, scores) | located(run, test, heat), maps


def located(run: Run, test: data.Images, heat: torch.Tensor) -> dict:
    """Pixel-level metrics of heat maps; the peak's distance is 16 px of a 256-px picture."""
    peak = None if test.masks is None else peak_within(test.masks, heat, 16 * run.size / 256)
    return pixel_metrics(test.masks, heat) | {PEAK: peak}


def trained(run: Run) -> bool:
    """Whether anything is trained in the run."""
    return total_updates(run) > 0


def load_model(run: Run, results: str | Path, weights: str | Path | None = None) -> PretextNet:
    """The network of a finished run: from its checkpoint, or built where nothing is trained."""
    if not trained(run):
        return build(run, weights).eval()
    net = build(replace(run, init="random", freeze_batchnorm=False))
    file = checkpoint_file(run, results)
    try:
        net.load_state_dict(network_state(read_checkpoint(file)[1]))
    except (SafetensorError, RuntimeError) as error:
        reason = f"expected the run's tensors ({type(error).__name__})"
        raise ValueError(f"{file}: {reason}") from None
    return net.eval()


def heat_maps(run: Run, maps: torch.Tensor) -> torch.Tensor:
    """A patch model's scores (N, rows, columns) as heat maps (N, size, size)."""
    size = (run.size, run.size)
    return upsample(maps, size, window=run.window, stride=run.stride, std=run.heat_std)


def score(
    run: Run, net: PretextNet, normal: torch.Tensor, pixels: torch.Tensor, *, level: int = 0
) -> torch.Tensor:
    """Anomaly scores (N,) of uint8 ``pixels`` under a Gaussian of the ``normal`` ones (eq. 2)."""
    z, z_test = (embed(net, x, level=level) for x in (normal, pixels))
    if run.l2_normalise:
        z, z_test = l2_normalise(z), l2_normalise(z_test)
    return Gaussian.fit(z, reg_covar=run.reg_covar).score(z_test)


def describe(run, train, test, history, about, device, weights) -> dict:
    """The record of a run: its fields, and the machine, code, data and weights behind it.

    Device and precision are the training's (``about``: see ``provenance``); scores are fp32.
    """
    seconds = round(float(history["seconds"].iloc[-1]), 2) if len(history) else 0.0
    file = weights_file(run.backbone, weights) if run.init == "imagenet" else None
    return {
        "version": RECORD_VERSION,
        "run": asdict(run),
        "environment": environment(),
        "device": about.get("device_name") or device_name(device),
        "threads": torch.get_num_threads(),
        "precision": about.get("precision", "fp32"),
        "git_commit": git_commit(),
        "data": {"train": data.fingerprint(train), "test": data.fingerprint(test)},
        "weights": {"file": file.name, "sha256": weights_digest(file)} if file else None,
        "train_seconds": seconds,
        "images_per_second": round(images(run) / seconds, 2) if seconds else None,
    }


def environment() -> dict:
    """Versions of what the numbers depend on."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    return versions | {m.__name__: m.__version__ for m in (torch, torchvision, sklearn)}


def git_commit() -> str | None:
    """The commit of the code that runs, marked "-dirty" where edited; None outside git."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _write(folder, record, history, test, scores, metrics, maps) -> None:
    """Write a run's folder under a temporary name, then rename it: complete or not there."""
    part = Path(tempfile.mkdtemp(prefix=f".part-{folder.name}-", dir=folder.parent))
    try:
        columns = (test.names, test.kinds, test.labels, scores)
        pd.DataFrame(dict(zip(SCORES, columns, strict=True))).to_csv(
            part / "scores.csv", index=False, float_format="%.9g"
        )
        history.to_csv(part / "history.csv", index=False, float_format="%.6g")
        write_json(part / "metrics.json", metrics)
        write_json(part / "run.json", record)
        if maps is not None:
            save_file({"maps": maps.contiguous()}, part / "maps.safetensors")
        with contextlib.suppress(OSError):  # some shared drives know no modes
            part.chmod(0o755)
        os.rename(part, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, value: dict) -> None:
    """Write a record, for people as for programs."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def read(folder: str | Path) -> tuple[Run, dict, dict]:
    """A run, its whole record and its metrics; ValueError names a folder that is not a run."""
    try:
        record = json.loads((Path(folder) / "run.json").read_text())
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
        if record["version"] != RECORD_VERSION:
            raise ValueError(f"record version {record['version']}, not {RECORD_VERSION}")
        run = Run.from_dict(record["run"])
        _check(record, metrics)
        if run.id != Path(folder).name:
            raise ValueError(f"the record inside is of {run.id}")
    except BROKEN as error:
        reason = " ".join(f"{folder}: not a run of this version ({error})".split())
        raise ValueError(reason) from error
    return run, record, metrics


def _check(record: dict, metrics: dict) -> None:
    """ValueError names an entry that is missing or of another kind than ``describe`` writes."""
    for name, kind in RECORD.items():
        if name not in record or not isinstance(record[name], kind):
            raise ValueError(f"no {name!r} in the record, or of another kind")
    if not all(isinstance(record["data"].get(split), str) for split in ("train", "test")):
        raise ValueError("no fingerprints of the data in the record")
    columns = {"id", *Run.__annotations__, *TIMING}  # others than the metrics'
    for name, value in metrics.items():
        if name in columns or not isinstance(value, int | float | None):
            raise ValueError(f"{name!r} is no metric, or its value no number")


def read_scores(folder: str | Path) -> pd.DataFrame:
    """A run's test pictures: file, kind, label (1: defective) and score.

    Raises ValueError for a ``scores.csv`` that is not as ``execute`` writes it.
    """
    path = Path(folder) / "scores.csv"
    try:
        table = pd.read_csv(path, dtype={"file": str, "kind": str}, keep_default_na=False)
        numbers = table[["label", "score"]].astype(float)
        if list(table) != SCORES or not (np.isfinite(numbers).all(axis=None) and len(table)):
            raise ValueError(f"not {', '.join(SCORES)} in every row")
        if not set(numbers["label"]) <= {0, 1} or table["file"].duplicated().any():
            raise ValueError("a label that is not 0 or 1, or a file twice")
    except BROKEN as error:
        reason = " ".join(f"{path}: not a run's scores ({error})".split())
        raise ValueError(reason) from error
    return table.astype({"label": int, "score": float})


def collect(results: str | Path, **where) -> pd.DataFrame:
    """The finished runs in a results folder, a row each: id, fields, metrics, seconds.

    ``where`` keeps the runs whose fields have these values. A folder that is not a run of this
    version is named in a warning and left alone.
    """
    rows = []
    for folder in sorted(Path(results).glob("runs/[!.]*")):
        try:
            run, record, metrics = read(folder)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        rows.append({"id": run.id, **asdict(run), **metrics, **{k: record[k] for k in TIMING}})
    columns = ["id", *Run.__annotations__, *IMAGE_METRICS, *PIXEL_METRICS, PEAK, *TIMING]
    table = pd.DataFrame(rows, columns=list(dict.fromkeys(columns)))  # precision: as recorded
    keep = pd.Series(True, index=table.index)
    for name, value in where.items():
        keep &= table[name] == value
    return table[keep].reset_index(drop=True)


def ensemble(results: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """Rows "ensemble": the mean of the scores of each category's cutpaste_3way seeds (4.1).

    ``table`` is what ``collect`` gave; a category needs two seeds. How the paper combines scores
    is not said; a mean keeps their scale, which the Gaussian's distance makes comparable.
    """
    rows = []
    for category, part in table[table["method"] == "cutpaste_3way"].groupby("category"):
        if len(part) < 2:
            continue
        files = [read_scores(Path(results) / "runs" / id) for id in part["id"]]
        mean = sum(f.set_index("file")["score"] for f in files) / len(files)
        labels = files[0].set_index("file")["label"].reindex(mean.index)
        row = {"method": "ensemble", "category": category, "seed": 0, "members": len(part)}
        rows.append(row | image_metrics(labels, mean))
    return pd.DataFrame(rows)


def rerun(
    folder: str | Path,
    *,
    data_root: str | Path,
    device: str = "cpu",
    weights: str | Path | None = None,
) -> tuple[bool, str]:
    """Repeat a stored run from its ``run.json``: whether its scores came out the same, and a line.

    On a CPU with the stored number of threads they must agree to the byte; across devices to
    TOLERANCE of their spread. Raises ValueError where the data are not the stored run's.
    """
    run, record, _ = read(folder)
    run = replace(run, precision=record["precision"])
    options = {"data_root": data_root, "device": device, "weights": weights}
    for split, stored in record["data"].items():
        if data.fingerprint(data.load(data_root, run.category, split, run.size)) != stored:
            raise ValueError(f"{folder}: its {split} pictures are not those in {data_root}")
    with tempfile.TemporaryDirectory() as scratch:
        again = execute(run, results=scratch, threads=record["threads"], **options)
        new = json.loads((again / "run.json").read_text())
        if new["weights"] != record["weights"]:
            raise ValueError(f"{folder}: other ImageNet weights than the stored run's")
        files = [Path(folder) / "scores.csv", again / "scores.csv"]
        if files[0].read_bytes() == files[1].read_bytes():
            return True, "the same scores, byte for byte"
        stored, ours = (pd.read_csv(file) for file in files)
    named = ["file", "kind", "label"]
    if list(stored) != list(ours) or not stored[named].equals(ours[named]):
        return False, "its scores.csv has other columns, pictures, kinds or labels"
    gap = (ours["score"] - pd.to_numeric(stored["score"], errors="coerce")).abs()
    gap = float(gap.max(skipna=False) / ours["score"].std())
    same = gap <= TOLERANCE and not (
        record["device"] == new["device"] and new["device"].startswith("CPU")
    )
    return same, f"scores differ by up to {gap:.2g} of their standard deviation"
