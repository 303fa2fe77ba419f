"""Many independent runs on one machine: resumable, within a budget, one failure at a time."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from cplib.config import Run
from cplib.runs import execute, run_folder
from cplib.train import OutOfTime


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
    device: str = "cpu",
    weights: str | Path | None = None,
    threads: int = 1,
    jobs: int | None = None,
    budget: float | None = None,
) -> list[Outcome]:
    """Execute the runs that are missing, ``jobs`` at a time (on a CPU one for ``threads`` cores).

    After ``budget`` seconds what runs is checkpointed and the rest left for another call. A run
    that fails does not stop the others. The outcomes come in the order of ``runs``.
    """
    todo = missing(runs, results)
    deadline = None if budget is None else time.time() + budget
    jobs = jobs or _jobs(device, threads)
    options = {"data_root": data_root, "results": results, "device": device, "weights": weights}
    options |= {"threads": threads, "deadline": deadline}
    pool = Parallel(n_jobs=max(1, min(jobs, len(todo))), return_as="generator_unordered")
    work = pool(delayed(attempt)(run, **options) for run in todo)
    outcomes = {o.run: o for o in tqdm(work, total=len(todo), desc="runs", disable=not todo)}
    return [outcomes[run] for run in todo]


def _jobs(device: str, threads: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if torch.device(device).type == "cuda" else max(1, cores // threads)


def attempt(run: Run, *, deadline: float | None = None, **options) -> Outcome:
    """Execute one run and say what became of it instead of raising."""
    if deadline is not None and time.time() > deadline:
        return Outcome(run, "out of time", "not started")
    try:
        execute(run, deadline=deadline, **options)
    except OutOfTime as late:
        return Outcome(run, "out of time", str(late))
    except Exception as error:
        return Outcome(run, "failed", f"{type(error).__name__}: {error}")
    return Outcome(run, "done")
