"""Execute runs: one, or many, resumable, within a budget, here or on a Ray cluster."""

import contextlib
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
from cplib.augment import DRAWS_VERSION
from cplib.checkpoint import read_checkpoint
from cplib.model import build
from cplib.run import Run
from cplib.settings import setting
from cplib.study import store
from cplib.study.measures import keep, scores
from cplib.study.store import Places, checkpoint_file, run_folder, stock
from cplib.train import OutOfTime, device_name, training

ENGINES = ("local", "ray")
GPU_BYTES = 10 * 2**30  # a job's at most: 96 images of 256 px in fp32
HOST_BYTES = 6 * 2**30  # of the machine's memory, where a job works on a GPU
RETRIES = 20  # of a run whose node was lost; a run that kills its process must end, too
BAR = "{desc}: {n} of {total} done, {remaining} left"
Planned = dict[Run, list[str]]  # runs, each with the names of the measures wanted of it
FULL = "the GPU's memory is full: set CPLIB_JOBS to fewer; fewer sources take less in training"
TOLERANCE = 0.1  # of the scores' standard deviation, between devices


class Job:
    """The runs of one training: images and network stay in memory between them."""

    def __init__(self, places: Places, deadline: float | None = None):
        self.places, self.deadline = places, deadline
        self.net, self.images, self.history, self.about = None, {}, [], {}

    def execute(self, run: Run, measures: Iterable[str] = ()) -> None:
        """Score the run if it is to do, and make these records beside it (``measures.py``).

        Its folder appears whole or not at all. Raises what ``load`` and ``training`` raise.
        """
        try:
            if stock([run], self.places).todo:
                self._score(run)
        except OSError:
            if stock([run], self.places).todo:  # else another process finished the same run
                raise
        if measures and self.net is None:
            self.net = store.load_network(run, self.places)
        if measures and self.net is None:
            file = checkpoint_file(run, self.places.results)
            raise ValueError(f"{file} is not there, or of another training than the stored run")
        errors = []
        for name in measures:
            if self.deadline is not None and time.time() > self.deadline:
                raise OutOfTime(f"{run.id}: {name} is not measured yet")
            try:
                keep(name, run, self.net, self._load(run), self.places)
            except Exception as error:  # the others are measured all the same
                errors.append(error.with_traceback(None))  # which holds tensors
        if errors:
            raise errors[0]

    def _load(self, run: Run) -> dict[str, datasets.Images]:
        if not self.images:
            for split in ("train", "test"):
                images = datasets.load(self.places.data, run.category, split, run.size)
                self.images[split] = images
        return self.images

    def _score(self, run: Run) -> None:
        """Write the run's folder; first train the network, load its checkpoint or build it."""
        train, test = self._load(run).values()
        found = None
        if not self.about and run.needs_training:
            checkpoint = checkpoint_file(run, self.places.results)
            options = {"checkpoint": checkpoint, "deadline": self.deadline}
            options["weights"] = self.places.weights
            for net, history in training(run, train.pixels, self.places.device, **options):
                if run.curve:
                    found = scores(run, net, train, test)
                    history[-1] |= {k: v for k, v in found[1].items() if k.endswith("auroc")}
            self.net, self.history, self.about = net, history, read_checkpoint(checkpoint)[0]
        elif not self.about:
            device = torch.device(self.places.device)
            self.net = build(run, self.places.weights).to(device).eval()
            self.about = {"device_name": device_name(device), "precision": "fp32"}
        values, metrics = found or scores(run, self.net, train, test)
        record = store.describe(run, self.images, self.history, self.about, self.places)
        store.write(run, self.places.results, record, self.history, test, values, metrics)


@contextlib.contextmanager
def using_threads(threads: int):
    """Compute with so many threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def execute(run: Run, places: Places, *, threads: int = 1) -> Path:
    """Train, score and record one run; returns its folder. One that is there already is kept.

    On a CPU the scores depend on nothing but the run, the data and the number of ``threads``.
    Raises what ``Job.execute`` raises.
    """
    with using_threads(threads):
        Job(places).execute(run)
    return run_folder(run, places.results)


@dataclass(frozen=True)
class Outcome:
    """What became of a run: ``state`` is done, out of time or failed; ``message`` says why."""

    run: Run
    state: str
    message: str = ""


def execute_all(
    planned: Planned | Iterable[Run],
    places: Places,
    *,
    engine: str = "local",
    budget: float | None = None,
) -> list[Outcome]:
    """Execute runs and the measures wanted of them; the outcomes come in their order.

    A job is a training with all runs that score its network. ``engine`` "local" works on
    ``jobs_here`` at a time on this machine; "ray" sends them to the cluster at $RAY_ADDRESS, or one
    started here; data and results must lie where every node finds them. After ``budget`` seconds
    what runs is checkpointed and the rest left for another call. A run that fails does not stop the
    others. Runs that are finished and of which nothing is to be measured are left out.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: one of {', '.join(ENGINES)}")
    planned = planned if isinstance(planned, dict) else dict.fromkeys(planned, ())
    undone = {*stock(planned, places).todo}
    todo = {run: names for run, names in planned.items() if run in undone or names}
    store.remove_leftovers(places.results)
    folders = (path and Path(path).resolve() for path in places[:3])
    options = {"places": Places(*folders, places.device)}
    options["deadline"] = None if budget is None else time.time() + budget
    jobs = by_training(todo)
    work = _on_ray(jobs, options) if engine == "ray" else _on_joblib(jobs, options)
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


def by_training(planned: Planned) -> list[Planned]:
    """The runs grouped by training; one that notes AUROC on the way comes first in its group."""
    groups = {run.training_id: {} for run in planned}
    for run in sorted(planned, key=lambda run: not run.curve):  # stable: else in their order
        groups[run.training_id][run] = planned[run]
    return list(groups.values())


def jobs_here(device: str = "cpu") -> int:
    """How many jobs this machine works on at a time; $CPLIB_JOBS overrules it.

    On a CPU one for a core. On GPUs as many as the memory of all, the cores and the machine's own
    memory hold.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if asked := setting("CPLIB_JOBS"):
        return max(1, int(asked))
    if torch.device(device).type != "cuda":
        return cores
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_gpus = sum(jobs_on(gpu) for gpu in gpus(device))
    return max(1, min(on_gpus, cores, memory // HOST_BYTES))


def gpus(device: str) -> list[str]:
    """The GPUs that "cuda" stands for on this machine, by their numbers."""
    if torch.device(device).index is not None:
        return [device]
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def jobs_on(gpu: str) -> int:
    """How many jobs a GPU's memory holds, at least one."""
    return max(1, torch.cuda.get_device_properties(gpu).total_memory // GPU_BYTES)


def _on_joblib(jobs: list[Planned], options: dict) -> Iterator[list[Outcome]]:
    """Outcomes as processes on this machine deliver them, as they come."""
    processes = min(jobs_here(options["places"].device), len(jobs))
    pool = Parallel(n_jobs=max(1, processes), return_as="generator_unordered")
    left = {next(iter(job)): job for job in jobs}
    try:
        for outcomes in pool(
            delayed(attempt)(job, **on_device(options, i)) for i, job in enumerate(jobs)
        ):
            del left[outcomes[0].run]
            yield outcomes
    except TerminatedWorkerError:  # the system ended a process, and joblib then ends them all
        reason = "its process died: too little memory? Set CPLIB_JOBS to fewer"
        yield [Outcome(run, "failed", reason) for job in left.values() for run in job]


def on_device(options: dict, i: int) -> dict:
    """The options of the i-th job: with several GPUs each takes the next one."""
    places = options["places"]
    if torch.device(places.device).type != "cuda":
        return options
    there = gpus(places.device)
    return options | {"places": places._replace(device=there[i % len(there)])}


def _on_ray(jobs: list[Planned], options: dict) -> Iterator[list[Outcome]]:
    """Outcomes as a Ray cluster delivers them; Ray itself sends a lost node's jobs elsewhere."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine 'ray' needs Ray: pip install '.[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    if not ray.is_initialized():
        ray.init(address=setting("RAY_ADDRESS") or None, log_to_driver=False)
    needs = {"num_cpus": 1, "max_retries": RETRIES}
    if torch.device(options["places"].device).type == "cuda":  # the head may have no GPU itself
        needs["num_gpus"] = 1 / (jobs_on("cuda") if torch.cuda.is_available() else 1)
    remote = ray.remote(**needs)(attempt)
    waiting = {remote.remote(job, **options): job for job in jobs}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(ready)
        try:
            outcomes = ray.get(ready)
        except ray.exceptions.RayError as error:
            outcomes = [Outcome(run, "failed", _line(error)) for run in job]
        elsewhere = "its node wrote to a folder that is not this one"
        yield [
            Outcome(done.run, "failed", elsewhere)
            if done.state == "done" and not written(done.run, job[done.run], options["places"])
            else done
            for done in outcomes
        ]


def written(run: Run, measures: Iterable[str], places: Places) -> bool:
    """Whether a run's folder is there, with the records of these measures."""
    folder = run_folder(run, places.results)
    return folder.exists() and all((folder / f"{name}.json").exists() for name in measures)


def attempt(job: Planned, *, places: Places, deadline: float | None = None) -> list[Outcome]:
    """Execute the runs of one training and say what became of each instead of raising."""
    with using_threads(1):
        worker = Job(places, deadline)
        found = [_attempt(worker, run, measures) for run, measures in job.items()]
    del worker
    torch.cuda.empty_cache()  # for other processes; without a GPU it does nothing
    return found


def _attempt(worker: Job, run: Run, measures: Iterable[str]) -> Outcome:
    if worker.deadline is not None and time.time() > worker.deadline:
        return Outcome(run, "out of time", "not started")
    try:
        worker.execute(run, measures)
    except OutOfTime as late:
        return Outcome(run, "out of time", str(late))
    except torch.OutOfMemoryError:
        return Outcome(run, "failed", FULL)
    except Exception as error:
        return Outcome(run, "failed", _line(error))
    return Outcome(run, "done")


def _line(error: Exception) -> str:
    return store.one_line(f"{type(error).__name__}: {error}")


def estimate(todo: Iterable[Run], done: pd.DataFrame, places: Places) -> pd.DataFrame:
    """What runs cost: a row a method with runs, images and hours of one device.

    A training that several runs share counts once. Checkpoints are not deducted.
    The rate is the median of the ``done`` runs (see ``store.frame``) of this backbone, size of
    image and crop on that device; runs without one count no hours.
    """
    here = device_name(torch.device(places.device))
    done = done[done["images_per_second"].notna() & (done["device"] == here)]
    kind = ["backbone", "size", "crop"]
    rates = done.groupby(kind, sort=False)["images_per_second"].median()  # crop: number or tuple
    rows, trainings = [], set()
    for run in todo:
        images = 0 if run.training_id in trainings else run.images
        trainings.add(run.training_id)
        hours = images / rates.get(attrgetter(*kind)(run), float("nan")) / 3600
        rows.append({"method": run.method, "runs": 1, "images": images, "hours": hours})
    table = pd.DataFrame(rows, columns=["method", "runs", "images", "hours"])
    return table.groupby("method", sort=False).sum(min_count=1)


def rerun(folder: str | Path, places: Places) -> tuple[bool, str]:
    """Repeat a stored run from its ``run.json``: whether its scores came out the same, and a line.

    On the same CPU with the stored number of threads they must agree to the byte; across devices
    to TOLERANCE of their spread, which long trainings exceed: rounding differs between devices.
    A training of another version of the random draws is not repeated.
    Raises ValueError where the data are not the stored run's.
    """
    run, record, metrics = store.read(folder)
    if run.needs_training and record["draws"] != DRAWS_VERSION:
        versions = f"version {record['draws']} of the random draws, not {DRAWS_VERSION}"
        return False, f"not repeated: made with {versions}"
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
