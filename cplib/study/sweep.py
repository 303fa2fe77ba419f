"""Execute runs: one, or many, resumable, within a budget, here or on a Ray cluster."""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from cplib import datasets
from cplib.metrics import image_metrics, peak_within, pixel_metrics
from cplib.model import PretextNet, build
from cplib.run import Run
from cplib.score import Scorer, upsample_scores
from cplib.study import store
from cplib.study.profiles import Profile
from cplib.study.store import PEAK, Places, checkpoint_file, collect, run_folder
from cplib.train import OutOfTime, device_name, read_checkpoint, training

ENGINES = ("local", "ray")
GPU_BYTES = 10 * 2**30  # a run's at most: 96 images of 256 px in fp32
RETRIES = 20  # of a run whose node was lost; a run that kills its process must end, too
BAR = "{desc}: {n} of {total} done, {remaining} left"
TOLERANCE = 0.1  # of the scores' standard deviation, between devices


class UsageError(ValueError):
    """Something asked for that is not there; the message is one line that names it."""


@dataclass(frozen=True)
class Workspace:
    """A profile with its data, results and device: what every notebook starts from."""

    profile: Profile
    categories: tuple[str, ...]
    places: Places
    seeds: int | None = None  # as asked for; None: the profile's
    budget: float | None = None  # seconds
    engine: str = "local"

    @property
    def results(self) -> Path:
        """The folder of results."""
        return self.places.results

    def load(self, category: str, split: str, size: int = 256) -> datasets.Images:
        """One category's images."""
        if self.places.data is None:
            raise UsageError("no data set at hand: set MVTEC_ROOT or pass --data DIR")
        return datasets.load(self.places.data, category, split, size)

    def runs(self, methods: Iterable[str], categories: Iterable[str] = ()) -> list[Run]:
        """Image-level runs of the methods, of these categories or all."""
        return self.profile.runs(methods, categories or self.categories, self.seeds)

    def missing(self, planned: list[Run]) -> list[Run]:
        """Those of the planned runs that are not in the results yet.

        UsageError where those that are there were measured on other images than these.
        """
        absent = missing(planned, self.results)
        there = {(r.category, r.size): r for r in planned if r not in set(absent)}
        for run in there.values() if self.places.data else ():
            stored = store.read(run_folder(run, self.results))[1]["data"]["test"]
            if stored != datasets.fingerprint(self.load(run.category, "test", run.size)):
                raise UsageError(
                    f"{self.results} holds runs on other images of {run.category!r}: "
                    "set CPLIB_RESULTS to another folder"
                )
        return absent

    def execute(self, todo: list[Run]) -> list["Outcome"]:
        """Execute runs with this workspace's data, device and budget."""
        if todo and self.places.data is None:
            raise UsageError(f"{len(todo)} runs need data: set MVTEC_ROOT or pass --data DIR")
        return execute_all(todo, self.places, budget=self.budget, engine=self.engine)

    def collect(self, planned: list[Run]) -> pd.DataFrame:
        """The finished ones of the planned runs, a row each."""
        return collect(planned, self.results)


def execute(run: Run, places: Places, *, threads: int = 1, deadline: float | None = None) -> Path:
    """Train, score and record one run; returns its folder. One that is there already is kept.

    On a CPU the scores depend on nothing but the run, the data and the number of ``threads``.
    The folder appears whole or not at all. Raises what ``load`` and ``training`` raise.
    """
    folder = run_folder(run, places.results)
    if not folder.exists():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            _execute(run, places, deadline)
        except OSError:
            if not folder.exists():  # else another process finished the same run
                raise
        finally:
            torch.set_num_threads(before)
    store.remove_leftovers(run, places.results)
    return folder


def _execute(run: Run, places: Places, deadline: float | None) -> None:
    device = torch.device(places.device)
    images = {
        split: datasets.load(places.data, run.category, split, run.size)
        for split in ("train", "test")
    }
    train, test = images.values()
    scored, history = None, []
    if run.needs_training:
        checkpoint = checkpoint_file(run, places.results)
        options = {"checkpoint": checkpoint, "deadline": deadline, "weights": places.weights}
        for net, history in training(run, train.pixels, device, **options):
            if run.curve:
                scored = assess(run, net, train, test)
                history[-1] |= {k: v for k, v in scored[1].items() if k.endswith("auroc")}
        about = read_checkpoint(checkpoint)[0]
    else:
        net = build(run, places.weights).to(device).eval()
        about = {"device_name": device_name(device), "precision": "fp32"}
    scores, metrics = scored or assess(run, net, train, test)
    record = store.describe(run, images, history, about, places)
    store.write(run, places.results, record, history, test, scores, metrics)


def assess(
    run: Run, net: PretextNet, train: datasets.Images, test: datasets.Images
) -> tuple[torch.Tensor, dict]:
    """Scores (N, P) of the test images' windows, or (N, 1) of whole ones, and the metrics."""
    scorer = Scorer.fit(run, net, train.pixels)
    scores = scorer.position_scores(test.pixels)
    metrics = image_metrics(test.labels, scores.amax(1))
    if run.dense:
        maps = upsample_scores(run, scores, test.pixels.shape[2:])
        metrics |= pixel_level_metrics(run, test, maps)
    return scores, metrics


def pixel_level_metrics(run: Run, test: datasets.Images, maps: torch.Tensor) -> dict:
    """Pixel-level metrics of anomaly maps; the peak's distance is 16 px of a 256-px image."""
    peak = None if test.masks is None else peak_within(test.masks, maps, 16 * run.size / 256)
    return pixel_metrics(test.masks, maps) | {PEAK: peak}


@dataclass(frozen=True)
class Outcome:
    """What became of a run: ``state`` is done, out of time or failed; ``message`` says why."""

    run: Run
    state: str
    message: str = ""


def missing(runs: list[Run], results: str | Path) -> list[Run]:
    """The runs that have no folder yet, each once."""
    return [run for run in dict.fromkeys(runs) if not run_folder(run, results).exists()]


def execute_all(
    runs: list[Run],
    places: Places,
    *,
    engine: str = "local",
    threads: int = 1,
    jobs: int | None = None,
    budget: float | None = None,
) -> list[Outcome]:
    """Execute the runs that are missing; the outcomes come in the order of ``runs``.

    ``engine`` "local" runs ``jobs`` at a time on this machine (on a CPU one for ``threads``
    cores, on a GPU as many as its memory holds); "ray" sends them to the cluster at $RAY_ADDRESS,
    or one started here; data and results must lie where every node finds them. After ``budget``
    seconds what runs is checkpointed and the rest left for another call. A run that fails does not
    stop the others.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: one of {', '.join(ENGINES)}")
    todo = missing(runs, places.results)
    for run in set(runs) - set(todo):
        store.remove_leftovers(run, places.results)
    folders = (path and Path(path).resolve() for path in places[:3])
    options = {"places": Places(*folders, places.device), "threads": threads}
    options["deadline"] = None if budget is None else time.time() + budget
    if engine == "ray":
        work = _on_ray(todo, options)
    else:
        work = _on_joblib(todo, options, min(jobs or jobs_here(places.device, threads), len(todo)))
    shown = {"bar_format": BAR, "disable": not todo, "file": sys.stdout}
    bar = tqdm(work, total=len(todo), desc="runs", **shown)
    with warnings.catch_warnings():  # joblib renews a worker whose memory has grown, and warns
        warnings.filterwarnings("ignore", "A worker stopped")
        outcomes = {outcome.run: outcome for outcome in bar}
    return [outcomes[run] for run in todo]


def jobs_here(device: str = "cpu", threads: int = 1) -> int:
    """Runs that this machine executes at a time: by its cores, or a GPU's memory; $CPLIB_JOBS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if asked := os.environ.get("CPLIB_JOBS"):
        return max(1, int(asked))
    if torch.device(device).type != "cuda":
        return max(1, cores // threads)
    if not torch.cuda.is_available():  # the head of a Ray cluster may have none
        return 1
    return max(1, torch.cuda.get_device_properties(device).total_memory // GPU_BYTES)


def _on_joblib(todo: list[Run], options: dict, jobs: int) -> Iterator[Outcome]:
    """Outcomes as ``jobs`` processes on this machine deliver them, as they come."""
    pool = Parallel(n_jobs=max(1, jobs), return_as="generator_unordered")
    left = dict.fromkeys(todo)
    try:
        for outcome in pool(delayed(attempt)(run, **options) for run in todo):
            del left[outcome.run]
            yield outcome
    except TerminatedWorkerError:  # the system ended a process, and joblib then ends them all
        for run in left:
            yield Outcome(
                run, "failed", "its process died: too little memory? Set CPLIB_JOBS to fewer"
            )


def _on_ray(todo: list[Run], options: dict) -> Iterator[Outcome]:
    """Outcomes as a Ray cluster delivers them; Ray itself sends a lost node's runs elsewhere."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine 'ray' needs Ray: pip install '.[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
    needs = {"num_cpus": options["threads"], "max_retries": RETRIES}
    device = options["places"].device
    if torch.device(device).type == "cuda":
        needs["num_gpus"] = 1 / jobs_here(device, options["threads"])
    remote = ray.remote(**needs)(attempt)
    waiting = {remote.remote(run, **options): run for run in todo}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        run = waiting.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayError as error:
            outcome = Outcome(run, "failed", _line(error))
        if outcome.state == "done" and not run_folder(run, options["places"].results).exists():
            outcome = Outcome(run, "failed", "its node wrote to a folder that is not this one")
        yield outcome


def attempt(run: Run, *, deadline: float | None = None, **options) -> Outcome:
    """Execute one run and say what became of it instead of raising."""
    if deadline is not None and time.time() > deadline:
        return Outcome(run, "out of time", "not started")
    try:
        execute(run, deadline=deadline, **options)
    except OutOfTime as late:
        return Outcome(run, "out of time", str(late))
    except Exception as error:
        return Outcome(run, "failed", _line(error))
    return Outcome(run, "done")


def _line(error: Exception) -> str:
    return store.one_line(f"{type(error).__name__}: {error}")


def estimate(planned: list[Run], places: Places) -> pd.DataFrame:
    """What the missing runs cost: a row a method with runs, images and hours of one device.

    The rate is the median of the finished runs of this backbone, size of image and crop on that
    device; runs without one count no hours.
    """
    done = collect(planned, places.results)
    here = done["device"] == device_name(torch.device(places.device))
    done = done[done["images_per_second"].notna() & here]
    kind = ["backbone", "size", "crop"]
    rates = done.groupby(kind)["images_per_second"].median()
    rows = [
        {
            "method": run.method,
            "runs": 1,
            "images": run.images,
            "hours": run.images / rates.get(attrgetter(*kind)(run), float("nan")) / 3600,
        }
        for run in missing(planned, places.results)
    ]
    table = pd.DataFrame(rows, columns=["method", "runs", "images", "hours"])
    return table.groupby("method", sort=False).sum(min_count=1)


def rerun(folder: str | Path, places: Places) -> tuple[bool, str]:
    """Repeat a stored run from its ``run.json``: whether its scores came out the same, and a line.

    On the same CPU with the stored number of threads they must agree to the byte; across devices
    to TOLERANCE of their spread, which long trainings exceed: rounding differs between devices.
    Raises ValueError where the data are not the stored run's.
    """
    run, record, metrics = store.read(folder)
    run = replace(run, precision=record["precision"])
    for split, stored in record["data"].items():
        images = datasets.load(places.data, run.category, split, run.size)
        if datasets.fingerprint(images) != stored:
            raise ValueError(f"{folder}: its {split} images are not those in {places.data}")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = places._replace(results=Path(scratch))
        again = execute(run, scratch, threads=record["threads"])
        _, new, metrics_here = store.read(again)
        if new["weights"] != record["weights"]:
            raise ValueError(f"{folder}: other ImageNet weights than the stored run's")
        files = [Path(folder) / "scores.csv", again / "scores.csv"]
        if files[0].read_bytes() == files[1].read_bytes():
            return True, "the same scores, byte for byte"
        stored, ours = (pd.read_csv(file) for file in files)
    named = ["file", "kind", "label"]
    if list(stored) != list(ours) or not stored[named].equals(ours[named]):
        return False, "its scores.csv has other columns, images, kinds or labels"
    gap = (ours["score"] - pd.to_numeric(stored["score"], errors="coerce")).abs()
    gap = float(gap.max(skipna=False) / ours["score"].std())
    same = gap <= TOLERANCE and not (
        record["device"] == new["device"] and new["device"].startswith("CPU")
    )
    there, here = pd.Series([m["image_auroc"] for m in (metrics, metrics_here)], dtype=float)
    aurocs = f"{there:.1f} on {record['device']}, {here:.1f} on {new['device']}"
    return same, f"scores differ by up to {gap:.2g} of their standard deviation; AUROC {aurocs}"
