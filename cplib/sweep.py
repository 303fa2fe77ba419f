"""Many independent runs: resumable, within a budget, here or on a cluster."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from cplib.config import Run
from cplib.runs import collect, execute, run_folder, tidy
from cplib.train import OutOfTime, images

ENGINES = ("local", "ray")
GPU_BYTES = 10 * 2**30  # a run's at most: 96 images of 256 px in fp32
RETRIES = 20  # of a run whose node was lost; a run that kills its process must end, too


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
    *,
    data_root: str | Path,
    results: str | Path,
    engine: str = "local",
    device: str = "cpu",
    weights: str | Path | None = None,
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
    todo = missing(runs, results)
    for run in set(runs) - set(todo):
        tidy(run, results)
    folders = {"data_root": data_root, "results": results, "weights": weights}
    options = {k: v and Path(v).resolve() for k, v in folders.items()} | {"device": device}
    options |= {"threads": threads, "deadline": None if budget is None else time.time() + budget}
    if engine == "ray":
        work = _on_ray(todo, options)
    else:
        work = _on_joblib(todo, options, min(jobs or _jobs(device, threads), len(todo)))
    bar = tqdm(work, total=len(todo), desc="runs", disable=not todo, file=sys.stdout)
    with warnings.catch_warnings():  # joblib renews a worker whose memory has grown, and warns
        warnings.filterwarnings("ignore", "A worker stopped")
        outcomes = {outcome.run: outcome for outcome in bar}
    return [outcomes[run] for run in todo]


def _jobs(device: str, threads: int) -> int:
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
    if torch.device(options["device"]).type == "cuda":
        needs["num_gpus"] = 1 / _jobs(options["device"], options["threads"])
    remote = ray.remote(**needs)(attempt)
    waiting = {remote.remote(run, **options): run for run in todo}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        run = waiting.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayError as error:
            outcome = Outcome(run, "failed", _line(error))
        if outcome.state == "done" and not run_folder(run, options["results"]).exists():
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
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def estimate(runs: list[Run], results: str | Path, device_name: str) -> pd.DataFrame:
    """What the missing runs cost: a row a method with runs, images and hours of one device.

    The rate is the median of the finished runs of this backbone, size of image and crop on that
    device; runs without one count no hours.
    """
    done = collect(results)
    done = done[done["images_per_second"].notna() & (done["device"] == device_name)]
    kind = ["backbone", "size", "crop"]
    rates = done.groupby(kind)["images_per_second"].median()
    rows = [
        {
            "method": run.method,
            "runs": 1,
            "images": images(run),
            "hours": images(run) / rates.get(attrgetter(*kind)(run), float("nan")) / 3600,
        }
        for run in missing(runs, results)
    ]
    table = pd.DataFrame(rows, columns=["method", "runs", "images", "hours"])
    return table.groupby("method", sort=False).sum(min_count=1)
