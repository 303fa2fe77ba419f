"""Execute the notebooks headless, one line each with the minutes, and make pages of them."""

import json
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

import nbformat
import papermill

from cplib.apps.pages import write_pages
from cplib.apps.workspace import ROOT
from cplib.study.sweep import UsageError, Workspace, estimate, jobs_here
from cplib.study.tables import all_runs

NOTEBOOKS = ROOT / "notebooks"
TRAINING = "02"  # trains what the others read
STAGES = (TRAINING, "03", "11")  # where to wait for all before: 11 reads what they measured
MOST = 4  # notebooks at a time: each takes about a gigabyte
NOTING = threading.Lock()  # two notebooks may end at once
LONG = 1_000_000  # images to train on, from which the cost is shown first


def run_notebooks(workspace: Workspace, chosen: list[Path]) -> int:
    """Execute notebooks; 0 if all ran, 1 if one failed.

    Those that train nothing run side by side. Raises DataError, before anything starts, where the
    training would meet an image that cannot be read.
    """
    parameters = {
        "profile": workspace.profile.name,
        "data": relative(workspace.places.data),
        "categories": ",".join(workspace.categories),
        "device": workspace.device,
    }
    deadline = time.time() + workspace.budget if workspace.budget else None
    print(f"profile {workspace.profile.name}: {', '.join(workspace.categories)};", end=" ")
    print(f"device {workspace.device}\nresults in {workspace.results}", flush=True)
    runs = all_runs(workspace)
    if line := workspace.outdated(runs):
        print(line, flush=True)
    todo = workspace.missing(runs)
    cost = estimate(todo, workspace.collect(runs), workspace.places)
    if cost["images"].sum() > LONG:
        print(f"training at full length:\n{cost.round(1).to_string()}\n", flush=True)
    if workspace.places.data and any(path.name.startswith(TRAINING) for path in chosen):
        for category, size in dict.fromkeys((run.category, run.size) for run in todo):
            for split in ("train", "test"):
                workspace.load(category, split, size)
    failed = []
    for group in _groups(chosen):
        if deadline:
            os.environ["CPLIB_BUDGET"] = f"{max(1, deadline - time.time()):.0f}s"
        train = workspace.profile.small and group[0].name > TRAINING and workspace.missing(runs)
        jobs = 1 if train else min(MOST, len(group), jobs_here())
        failed += _run_group(group, workspace, parameters, jobs)
    print(f"pages: {write_pages(workspace.results)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _groups(chosen: list[Path]) -> list[list[Path]]:
    """The notebooks before the one that trains, that one, those after, the claims on them all."""
    number = lambda path: sum(path.name[:2] >= first for first in STAGES)  # noqa: E731
    return [list(group) for _, group in groupby(chosen, number)]


def _run_group(group: list[Path], workspace: Workspace, parameters: dict, jobs: int) -> list[str]:
    """Execute notebooks, ``jobs`` at a time; the names of those that failed."""
    results, weights = workspace.results, workspace.places.weights
    environment = {"CPLIB_RESULTS": f"{results.parent}", "CPLIB_WEIGHTS": f"{weights or ''}"}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = f"{max(1, jobs_here() // jobs)}"
    log = results / "notebooks" / "kernel.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    one = partial(run_one, results=results, parameters=parameters, progress=jobs == 1)
    # The kernels start with the environment and the folder that this process is in.
    with (
        patch.dict(os.environ, environment),
        chdir(NOTEBOOKS),
        quiet(log),
        ThreadPoolExecutor(jobs) as pool,
    ):
        errors = dict(zip(group, pool.map(one, group), strict=True))
    for error in filter(None, errors.values()):
        print(f"  {error}", file=sys.stderr)
    return [path.name for path, error in errors.items() if error]


class Progress:
    """Where a notebook's standard output goes: shows how many of its runs are done."""

    def __init__(self, stem: str):
        self.stem = stem

    def write(self, text: str) -> None:
        """Show the last of the text's lines that counts runs."""
        if lines := [line for line in text.splitlines() if line.startswith("runs: ")]:
            print(f"\r{self.stem} ... {lines[-1]:<60}", end="")

    def flush(self) -> None:
        """Show it now."""
        sys.stdout.flush()


def choose(only: str, start: str) -> list[Path]:
    """The notebooks asked for, by their two-digit numbers."""
    there = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    wanted = [n.strip() for n in only.split(",") if n.strip()]
    for number in [*wanted, *([start] if start else [])]:
        if number not in there:
            raise UsageError(f"no notebook {number!r}: one of {', '.join(there)}")
    chosen = [p for n, p in there.items() if (not wanted or n in wanted) and n >= start]
    if not chosen:
        raise UsageError(f"no notebook is both in {only!r} and from {start!r} on")
    return chosen


def run_one(path: Path, results: Path, parameters: dict, progress: bool = False) -> str:
    """Execute one notebook into ``results/notebooks`` and print its line; the error, if it failed.

    With ``progress`` a line counts its runs while it trains. A notebook that fails is kept as
    ``<name>.failed.ipynb``: an executed one is replaced only by one that ran to its end.
    """
    known = papermill.inspect_notebook(str(path))
    if unknown := sorted(set(parameters) - set(known)):  # papermill would only warn
        raise UsageError(f"{path.name} has no parameter {unknown[0]!r}")
    out = results / "notebooks" / path.name
    failed = out.with_suffix(".failed.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    options = {"progress_bar": False, "kernel_name": "python3"}
    if progress:
        print(f"{path.stem} ...", end="", flush=True)
        options["stdout_file"] = Progress(path.stem)
    try:
        papermill.execute_notebook(path, failed, parameters, coalesce_streams=True, **options)
    except (papermill.PapermillExecutionError, RuntimeError) as error:  # or its kernel died
        what = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        print(f"\r{path.stem} ... {f'FAILED after {(time.time() - began) / 60:.1f} min':<60}")
        return f"{what}\n  see {failed}"
    failed.replace(out)
    forget_paths(out)
    minutes = round((time.time() - began) / 60, 1)
    print(f"\r{path.stem} ... {f'{minutes} min':<60}", flush=True)
    note_minutes(results / "minutes.json", path.stem, minutes)
    return ""


def forget_paths(out: Path) -> None:
    """Take the machine's folders out of an executed notebook's record."""
    notebook = nbformat.read(out, as_version=4)
    for name in ("input_path", "output_path"):
        notebook.metadata.papermill[name] = out.name
    nbformat.write(notebook, out)


def note_minutes(file: Path, notebook: str, minutes: float) -> None:
    """Keep the longest that a notebook took: with everything still to train."""
    with NOTING:
        noted = json.loads(file.read_text()) if file.exists() else {}
        noted[notebook] = max(minutes, noted.get(notebook, 0))
        file.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")


def relative(folder: Path | None) -> str:
    """A folder as the notebooks see it: no record depends on where the repository lies."""
    return os.path.relpath(folder, NOTEBOOKS) if folder else ""


@contextmanager
def quiet(log: Path):
    """Send what this process and its kernels write to standard error to a file instead."""
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
