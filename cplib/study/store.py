"""Run folders: the one place that writes, reads, checks and lists them."""

import contextlib
import functools
import json
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cplib import datasets
from cplib.augment import DRAWS_VERSION
from cplib.checkpoint import network_state, read_checkpoint
from cplib.datasets import atomic, write_text
from cplib.metrics import IMAGE_METRICS, PIXEL_METRICS
from cplib.model import PretextNet, build, weights_digest, weights_file
from cplib.run import Run

RECORD_VERSION = 1
PEAK = "peak_within_16px"
STALE = 3600  # seconds
# Entries of run.json and their types.
RECORD = {
    "threads": int,
    "data": dict,
    "images": dict,
    "weights": dict | None,
    "device": str,
    "precision": str,
    "draws": int,
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


class Places(NamedTuple):
    """Where runs, images and ImageNet weights are, and on which device work is done."""

    results: Path
    data: Path | None = None
    weights: Path | None = None
    device: str = "cpu"


class Stock(NamedTuple):
    """Which of the planned runs are stored: see ``stock``."""

    finished: dict[Run, tuple[dict, dict]]  # record and metrics
    outdated: dict[Run, dict]  # record of a run that was measured on other images
    older: dict[Run, dict]  # record of one made with an older version of the random draws
    todo: list[Run]  # no folder, outdated or older


def run_folder(run: Run, results: str | Path) -> Path:
    """Where the run's record is: ``results/runs/<run id>``. A folder that exists is complete."""
    return Path(results) / "runs" / run.id


def checkpoint_file(run: Run, results: str | Path) -> Path:
    """Where the run's network is: runs that differ only in how they score share it."""
    return Path(results) / "checkpoints" / f"{run.training_id}.safetensors"


def write_json(path: Path, value: dict) -> None:
    """Write a record, for people as for programs."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write(
    run: Run,
    results: str | Path,
    record: dict,
    history: list[dict],
    test: datasets.Images,
    scores: torch.Tensor,
    metrics: dict,
) -> Path:
    """Write a run's folder: run.json, metrics.json, history.csv, scores.csv.

    ``scores`` are (N, P): an image's score is the highest of its P windows'. The windows' scores
    are kept in ``windows.safetensors``, which is not committed. The folder replaces one that was
    measured on other images, or made with other draws.
    """
    folder = run_folder(run, results)
    with atomic(folder, folder=True) as part:
        old = part.with_name(f"{part.name}-old")
        columns = (test.names, test.kinds, test.labels, scores.amax(1))
        table = pd.DataFrame(dict(zip(SCORES, columns, strict=True)))
        table.to_csv(part / "scores.csv", index=False, float_format="%.9g")
        pd.DataFrame(history).to_csv(part / "history.csv", index=False, float_format="%.6g")
        write_json(part / "metrics.json", metrics)
        write_json(part / "run.json", record)
        if run.window:
            save_file({"scores": scores.float().contiguous()}, part / "windows.safetensors")
        if folder.exists() and _origin(read(folder)[1]) != _origin(record):
            folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _origin(record: dict) -> tuple[dict, int]:
    """The images that a run was measured on, and the version of its random draws."""
    return record["data"], record["draws"]


def describe(run: Run, images: dict, history: list[dict], trained_on: dict, places: Places) -> dict:
    """The record of a run: its fields, and the machine, code, data and weights behind it.

    ``images`` are those of each split; device and precision are the training's (``trained_on``:
    see ``train.provenance``); scores are always computed in fp32.
    """
    seconds = round(float(history[-1]["seconds"]), 2) if history else 0.0
    file = weights_file(run.backbone, places.weights) if run.init == "imagenet" else None
    versions = {"torch": torch.__version__, "sklearn": version("scikit-learn")}
    versions["torchvision"] = version("torchvision")  # not imported: that takes a second
    python = {"python": platform.python_version(), "platform": platform.platform()}
    return {
        "version": RECORD_VERSION,
        "run": asdict(run),
        "environment": python | versions,
        "device": trained_on["device_name"],
        "threads": torch.get_num_threads(),
        "precision": trained_on["precision"],
        "draws": DRAWS_VERSION,
        "git_commit": git_commit(),
        "data": {split: datasets.fingerprint(part) for split, part in images.items()},
        "images": counts(images, datasets.original_size(places.data, run.category)),
        "weights": {"file": file.name, "sha256": weights_digest(file)} if file else None,
        "train_seconds": seconds,
        "images_per_second": round(run.images / seconds, 2) if seconds else None,
    }


def counts(images: dict, size: tuple[int, int]) -> dict:
    """How many images of each sort a category has at hand, and the size that they came in."""
    anomalous = int(images["test"].labels.sum())
    return {
        "train": len(images["train"]),
        "normal": len(images["test"]) - anomalous,
        "anomalous": anomalous,
        "masks": 0 if images["test"].masks is None else anomalous,
        "size": list(size),
    }


def git_commit() -> str | None:
    """The commit of the code that runs, "-dirty" if cplib was edited; None outside git."""
    git = ["git", "-C", str(Path(__file__).parents[2]), "--git-dir=.git"]  # of no folder above
    edited = [*git, "status", "--porcelain", "--", "cplib", "pyproject.toml"]
    try:
        commit, changes = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for command in ([*git, "rev-parse", "--short", "HEAD"], edited)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit


def read(folder: str | Path) -> tuple[Run, dict, dict]:
    """A run, its whole record and its metrics; ValueError names a folder that is not a run."""
    try:
        record = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        if record["version"] != RECORD_VERSION:
            raise ValueError(f"record version {record['version']}, not {RECORD_VERSION}")
        run = Run.from_dict(record["run"])
        record.setdefault("draws", 1)
        _check(record, metrics)
        if run.id != Path(folder).name:
            raise ValueError(f"the record inside is of {run.id}")
    except BROKEN as error:
        raise ValueError(one_line(f"{folder}: not a run of this version ({error})")) from error
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


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


def read_scores(folder: str | Path) -> pd.DataFrame:
    """A run's test images: file, kind, label (1: anomalous) and score.

    Raises ValueError for a ``scores.csv`` that is not as ``write`` writes it.
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
        raise ValueError(one_line(f"{path}: not a run's scores ({error})")) from error
    return table.astype({"label": int, "score": float})


def read_window_scores(folder: str | Path) -> torch.Tensor | None:
    """Scores (N, P) of the test images' windows; None where they were not kept."""
    file = Path(folder) / "windows.safetensors"
    return load_file(file)["scores"] if file.exists() else None


def stored(results: str | Path) -> set[str]:
    """The ids of the stored runs."""
    runs = Path(results) / "runs"
    return {path.name for path in runs.iterdir()} if runs.exists() else set()


def stock(planned: Iterable[Run], places: Places) -> Stock:
    """Which of the planned runs are finished, are outdated or older, and are to do.

    A stored run counts for the images it was measured on: it is outdated where ``places.data``
    has other training or test images of its category. Without data, or where the data lack the
    category, every stored run counts. A training of an older version of the random draws is
    finished only while none of the planned ones is newer: versions are not mixed. It is to do where
    its images are here. A folder that is not a run is named in a warning and left: its run is
    neither finished nor to do.
    """
    found, there = Stock({}, {}, {}, []), stored(places.results)
    at_hand = datasets.categories(places.data) if places.data else ()
    here = functools.cache(functools.partial(datasets.fingerprints, places.data))
    for run in dict.fromkeys(planned):
        if run.id not in there:
            found.todo.append(run)
            continue
        try:
            _, record, metrics = read(run_folder(run, places.results))
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        if run.category in at_hand and record["data"] != here(run.category, run.size):
            found.outdated[run] = record
        else:
            found.finished[run] = record, metrics
            old = run.needs_training and record["draws"] != DRAWS_VERSION
            if old and run.category in at_hand:
                found.older[run] = record
        if run in found.outdated or run in found.older:
            found.todo.append(run)
    versions = {r: record["draws"] for r, (record, _) in found.finished.items() if r.needs_training}
    for run in versions:
        if versions[run] != max(versions.values()):
            del found.finished[run]
    return found


def frame(runs: Iterable[Run], places: Places) -> pd.DataFrame:
    """The finished ones of the runs, a row each: id, fields, metrics, seconds.

    ``precision`` is the recorded one.
    """
    rows = [
        {"id": run.id, **asdict(run), **metrics, **{k: record[k] for k in TIMING}}
        for run, (record, metrics) in stock(runs, places).finished.items()
    ]
    columns = ["id", *Run.__annotations__, *IMAGE_METRICS, *PIXEL_METRICS, PEAK, *TIMING]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(columns)))


def load_network(run: Run, places: Places) -> PretextNet | None:
    """The network of a finished run: from its checkpoint, or built where nothing is trained.

    None where the run is not finished (see ``stock``), or its checkpoint is not there (it is not
    committed) or of a training on another machine: its loss is not the run's. ValueError where it
    is damaged.
    """
    if not run.needs_training:
        return build(run, places.weights).to(places.device).eval()
    file, history = checkpoint_file(run, places.results), run_folder(run, places.results)
    if not file.exists() or run not in stock([run], places).finished:
        return None
    net = build(replace(run, init="random", freeze_batchnorm=False))
    try:
        meta, tensors = read_checkpoint(file)
        loss = json.loads(meta["history"])[-1]["loss"]
        if not np.isclose(loss, pd.read_csv(history / "history.csv")["loss"].iloc[-1], rtol=1e-4):
            return None
        net.load_state_dict(network_state(tensors))
    except (SafetensorError, RuntimeError, LookupError) as error:
        reason = f"expected the run's tensors ({type(error).__name__})"
        raise ValueError(f"{file}: {reason}") from None
    return net.to(places.device, memory_format=torch.channels_last).eval()


def read_record(file: Path) -> dict | None:
    """What ``write_json`` wrote; None where nothing is there, or no object of JSON (a warning)."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        raise ValueError("not an object of JSON")
    except BROKEN as error:
        warnings.warn(one_line(f"{file}: no record ({error})"), stacklevel=3)
        return None


def remove_leftovers(results: str | Path) -> None:
    """Remove what killed processes left half written: parts not touched for ``STALE`` seconds.

    A younger part may be another process's, here or on another machine.
    """
    parts = [*Path(results).glob("*/.part-*"), *Path(results).glob("checkpoints/*.broken")]
    for part in parts:
        with contextlib.suppress(OSError):  # another process removed it; a folder is read-only
            if part.stat().st_mtime < time.time() - STALE:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
