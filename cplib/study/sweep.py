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
from cplib.checkpoint import read_checkpoint
from cplib.metrics import image_metrics, peak_within, pixel_metrics
from cplib.model import PretextNet, build
from cplib.run import Run
from cplib.score import Scorer, upsample_scores
from cplib.study import store
from cplib.study.profiles import Profile
from cplib.study.published import in_order
from cplib.study.store import PEAK, Places, checkpoint_file, collect, run_folder, stock
from cplib.train import OutOfTime, device_name, training

ENGINES = ("local", "ray")
GPU_BYTES = 10 * 2**30  # a job's at most: 96 images of 256 px in fp32
HOST_BYTES = 6 * 2**30  # of the machine's memory, where a job works on a GPU
RETRIES = 20  # of a run whose node was lost; a run that kills its process must end, too
BAR = "{desc}: {n} of {total} done, {remaining} left"
TOLERANCE = 0.1  # of the scores' standard deviation, between devices


class UsageError(ValueError):
    """Something asked for that is not there; the message is one line that names it."""


@dataclass(frozen=True)
class Workspace:
    """A profile with its data, results and device: what every notebook starts from.

    ``categories`` and ``seeds`` limit what is executed; tables show all that was measured.
    """

    profile: Profile
    categories: tuple[str, ...]
    places: Places
    seeds: int | None = None  # None: the profile's
    budget: float | None = None  # seconds
    engine: str = "local"
    device: str = "cpu"  # of training: on a Ray cluster not always that of ``places``

    @property
    def results(self) -> Path:
        """The folder of results."""
        return self.places.results

    @property
    def shown(self) -> tuple[str, ...]:
        """The categories of the tables: the profile's, and those chosen."""
        return tuple(dict.fromkeys(self.profile.categories + self.categories))

    def load(self, category: str, split: str, size: int = 256) -> datasets.Images:
        """One category's images."""
        if self.places.data is None:
            raise UsageError("no data set at hand: set MVTEC_ROOT or pass --data DIR")
        return datasets.load(self.places.data, category, split, size)

    def runs(self, methods: Iterable[str], categories: Iterable[str] = ()) -> list[Run]:
        """Image-level runs of the methods, of these categories or all that are shown."""
        planned = self.profile.runs(methods, categories or self.shown, least=self.seeds or 0)
        there = store.stored(self.results)
        return list(dict.fromkeys(more for run in planned for more in stored_seeds(run, there)))

    def missing(self, planned: list[Run]) -> list[Run]:
        """Those of the planned runs that are to be executed: of these categories and seeds."""
        return [
            run
            for run in stock(planned, self.places).todo
            if run.category in self.categories and (not self.seeds or run.seed < self.seeds)
        ]

    def finished(self, planned: list[Run]) -> list[Run]:
        """Those of the planned runs whose results count (``store.stock``)."""
        return list(stock(planned, self.places).finished)

    def outdated(self, planned: list[Run]) -> str:
        """A line on the stored runs that do not count, with the hours of their training, or ""."""
        records = stock(planned, self.places).outdated
        if not records:
            return ""
        categories = ", ".join(in_order({run.category for run in records}))
        trained = {run.training_id: record for run, record in records.items()}.values()
        hours = sum(record["train_seconds"] for record in trained) / 3600
        devices = " and ".join(sorted({record["device"] for record in trained}))
        return (
            f"{len(records)} stored runs of {categories} were measured on other images and do not "
            f"count. Measuring them anew takes about {hours:.1f} hours of one device (as on "
            f"{devices}) and replaces them. To keep both, set CPLIB_RESULTS to another folder."
        )

    def execute(self, todo: list[Run]) -> list["Outcome"]:
        """Execute runs with this workspace's data, device and budget."""
        if todo and self.places.data is None:
            raise UsageError(f"{len(todo)} runs need data: set MVTEC_ROOT or pass --data DIR")
        places = self.places._replace(device=self.device)
        return execute_all(todo, places, budget=self.budget, engine=self.engine)

    def collect(self, planned: list[Run]) -> pd.DataFrame:
        """The finished ones of the planned runs, a row each."""
        return collect(planned, self.places)


def stored_seeds(run: Run, there: set[str]) -> list[Run]:
    """The run, and those of the ids ``there`` that differ from it in a higher seed alone."""
    found = [run]
    while (after := replace(found[-1], seed=found[-1].seed + 1)).id in there:
        found.append(after)
    return found


def execute(run: Run, places: Places, *, threads: int = 1, deadline: float | None = None) -> Path:
    """Train, score and record one run; returns its folder. One that is there already is kept.

    On a CPU the scores depend on nothing but the run, the data and the number of ``threads``.
    The folder appears whole or not at all. Raises what ``load`` and ``training`` raise.
    """
    if stock([run], places).todo:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            _execute(run, places, deadline)
        except OSError:
            if stock([run], places).todo:  # else another process finished the same run
                raise
        finally:
            torch.set_num_threads(before)
    return run_folder(run, places.results)


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
    """Pixel-level metrics of anomaly maps; the peak's distance is 16 px of a 256-px image.

    Without the anomalous images whose mask marks nothing.
    """
    if test.masks is None:
        return pixel_metrics(None, maps) | {PEAK: None}
    told = (test.labels == 0) | test.masks.flatten(1).any(1)
    masks, maps = test.masks[told], maps[told]
    return pixel_metrics(masks, maps) | {PEAK: peak_within(masks, maps, 16 * run.size / 256)}


@dataclass(frozen=True)
class Outcome:
    """What became of a run: ``state`` is done, out of time or failed; ``message`` says why."""

    run: Run
    state: str
    message: str = ""


def execute_all(
    runs: list[Run],
    places: Places,
    *,
    engine: str = "local",
    threads: int = 1,
    jobs: int | None = None,
    budget: float | None = None,
) -> list[Outcome]:
    """Execute the runs that are to do; the outcomes come in the order of ``runs``.

    A job is a training with all runs that score its network. ``engine`` "local" works on ``jobs``
    at a time on this machine (on a CPU one for ``threads`` cores, on GPUs see ``jobs_here``); "ray"
    sends them to the cluster at $RAY_ADDRESS, or one started here; data and results must lie where
    every node finds them. After ``budget`` seconds what runs is checkpointed and the rest left for
    another call. A run that fails does not stop the others.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: one of {', '.join(ENGINES)}")
    todo = stock(runs, places).todo
    store.remove_leftovers(places.results)
    folders = (path and Path(path).resolve() for path in places[:3])
    options = {"places": Places(*folders, places.device), "threads": threads}
    options["deadline"] = None if budget is None else time.time() + budget
    trainings = by_training(todo)
    if engine == "ray":
        work = _on_ray(trainings, options)
    else:
        work = _on_joblib(trainings, options, jobs or jobs_here(places.device, threads))
    outcomes = {}
    shown = {"bar_format": BAR, "disable": not todo, "file": sys.stdout}
    with (
        tqdm(total=len(todo), desc="runs", **shown) as bar,
        warnings.catch_warnings(),  # joblib renews a worker whose memory has grown, and warns
    ):
        warnings.filterwarnings("ignore", "A worker stopped")
        for done in work:
            outcomes |= {outcome.run: outcome for outcome in done}
            bar.update(len(done))
    return [outcomes[run] for run in todo]


def by_training(runs: list[Run]) -> list[list[Run]]:
    """The runs grouped by training; one that notes AUROC on the way comes first in its group."""
    groups = {}
    for run in sorted(runs, key=lambda run: not run.curve):  # stable: else in their order
        groups.setdefault(run.training_id, []).append(run)
    return [groups[key] for key in dict.fromkeys(run.training_id for run in runs)]


def jobs_here(device: str = "cpu", threads: int = 1) -> int:
    """How many jobs this machine works on at a time; $CPLIB_JOBS overrules it.

    On a CPU one for ``threads`` cores. On GPUs as many as the memory of all, the cores and the
    machine's own memory hold.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if asked := os.environ.get("CPLIB_JOBS"):
        return max(1, int(asked))
    if torch.device(device).type != "cuda":
        return max(1, cores // threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_gpus = sum(jobs_on(gpu) for gpu in gpus(device))
    return max(1, min(on_gpus, cores // threads, memory // HOST_BYTES))


def gpus(device: str) -> list[str]:
    """The GPUs that "cuda" stands for on this machine, by their numbers."""
    if torch.device(device).index is not None:
        return [device]
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def jobs_on(gpu: str) -> int:
    """How many jobs a GPU's memory holds, at least one."""
    return max(1, torch.cuda.get_device_properties(gpu).total_memory // GPU_BYTES)


def _on_joblib(trainings: list[list[Run]], options: dict, jobs: int) -> Iterator[list[Outcome]]:
    """Outcomes as ``jobs`` processes on this machine deliver them, as they come."""
    pool = Parallel(n_jobs=max(1, min(jobs, len(trainings))), return_as="generator_unordered")
    left = {runs[0]: runs for runs in trainings}
    try:
        for outcomes in pool(
            delayed(attempt)(runs, **on_device(options, i)) for i, runs in enumerate(trainings)
        ):
            del left[outcomes[0].run]
            yield outcomes
    except TerminatedWorkerError:  # the system ended a process, and joblib then ends them all
        reason = "its process died: too little memory? Set CPLIB_JOBS to fewer"
        yield [Outcome(run, "failed", reason) for runs in left.values() for run in runs]


def on_device(options: dict, i: int) -> dict:
    """The options of the i-th job: with several GPUs each takes the next one."""
    places = options["places"]
    if torch.device(places.device).type != "cuda":
        return options
    there = gpus(places.device)
    return options | {"places": places._replace(device=there[i % len(there)])}


def _on_ray(trainings: list[list[Run]], options: dict) -> Iterator[list[Outcome]]:
    """Outcomes as a Ray cluster delivers them; Ray itself sends a lost node's jobs elsewhere."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine 'ray' needs Ray: pip install '.[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
    needs = {"num_cpus": options["threads"], "max_retries": RETRIES}
    if torch.device(options["places"].device).type == "cuda":  # the head may have no GPU itself
        needs["num_gpus"] = 1 / (jobs_on("cuda") if torch.cuda.is_available() else 1)
    remote = ray.remote(**needs)(attempt)
    waiting = {remote.remote(runs, **options): runs for runs in trainings}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        runs = waiting.pop(ready)
        try:
            outcomes = ray.get(ready)
        except ray.exceptions.RayError as error:
            outcomes = [Outcome(run, "failed", _line(error)) for run in runs]
        elsewhere = "its node wrote to a folder that is not this one"
        yield [
            Outcome(done.run, "failed", elsewhere)
            if done.state == "done" and not run_folder(done.run, options["places"].results).exists()
            else done
            for done in outcomes
        ]


def attempt(runs: list[Run], *, deadline: float | None = None, **options) -> list[Outcome]:
    """Execute the runs of one training and say what became of each instead of raising."""
    return [_attempt(run, deadline, options) for run in runs]


def _attempt(run: Run, deadline: float | None, options: dict) -> Outcome:
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


def estimate(todo: list[Run], done: pd.DataFrame, places: Places) -> pd.DataFrame:
    """What runs cost: a row a method with runs, images and hours of one device.

    The rate is the median of the ``done`` runs (see ``collect``) of this backbone, size of image
    and crop on that device; runs without one count no hours.
    """
    here = device_name(torch.device(places.device))
    done = done[done["images_per_second"].notna() & (done["device"] == here)]
    kind = ["backbone", "size", "crop"]
    rates = done.groupby(kind)["images_per_second"].median()
    rows = [
        {
            "method": run.method,
            "runs": 1,
            "images": run.images,
            "hours": run.images / rates.get(attrgetter(*kind)(run), float("nan")) / 3600,
        }
        for run in todo
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
