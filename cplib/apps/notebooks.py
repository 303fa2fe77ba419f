"""Execute the notebooks headless, one line each with the minutes, and make pages of them."""

import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

import nbformat
import papermill
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from traitlets import default

from cplib.apps.pages import write_pages
from cplib.apps.workspace import ROOT
from cplib.datasets import write_text
from cplib.study.jobs import estimate, jobs_here
from cplib.study.store import frame, read_record, write_json
from cplib.study.tables import planned
from cplib.study.workspace import UsageError, Workspace

NOTEBOOKS = ROOT / "notebooks"
TRAINING = "02"  # trains what the others read
STAGES = (TRAINING, "03", "11")  # where to wait for all before: 11 reads what they measured
MOST = 4  # notebooks at a time: each takes about a gigabyte
NOTING = threading.Lock()  # two notebooks may end at once
STOPPED: list[threading.Thread] = []  # ends the kernels: what they execute has not failed
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
    runs = planned(workspace)
    for line in workspace.remarks(runs):
        print(line, flush=True)
    todo = workspace.missing(runs)
    trains = any(path.name.startswith(TRAINING) for path in chosen)
    cost = estimate(todo, frame(runs, workspace.places), workspace.places)
    if trains and cost["images"].sum() > LONG:
        print(f"training at full length:\n{cost.round(1).to_string()}\n", flush=True)
    if workspace.places.data and trains:
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
    # The kernels import the code of this command, whose environment may be of another clone.
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
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
        stoppable_pool(jobs) as pool,
    ):
        errors = dict(zip(group, pool.map(one, group), strict=True))
    for error in filter(None, errors.values()):
        print(f"  {error}", file=sys.stderr)
    return [path.name for path, error in errors.items() if error]


@contextmanager
def stoppable_pool(jobs: int):
    """Threads for notebooks; Ctrl-C or SIGTERM ends the kernels, then raises KeyboardInterrupt."""
    STOPPED.clear()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="notebook")

    def stop(*_):
        if not STOPPED:
            thread = threading.Thread(target=_end_kernels, args=[pool])
            STOPPED.append(thread)
            thread.start()

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        with pool:
            yield pool
    finally:
        for thread in STOPPED:
            thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        if STOPPED:
            raise KeyboardInterrupt


def _end_kernels(pool: ThreadPoolExecutor) -> None:
    """Interrupt this process's kernels and their workers, kill those that go on, and wait."""
    pool.shutdown(wait=False, cancel_futures=True)
    threads = [t for t in threading.enumerate() if t.name.startswith("notebook")]
    kernels = set()  # process groups: workers, too, belong to their kernel's
    # To kill more than once ends a kernel that was only about to start.
    for number, seconds in ((signal.SIGINT, 3), (signal.SIGTERM, 1), *[(signal.SIGKILL, 1)] * 4):
        kernels |= {child.pid for child in psutil.Process().children()}
        for kernel in kernels:
            with suppress(OSError):  # it has ended
                os.killpg(kernel, number)
        until = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0, until - time.monotonic()))


class OwnKernel(AsyncKernelManager):
    """A kernel in the Python of this command, though a person's own kernel has the same name."""

    @default("kernel_spec_manager")
    def _only_the_native_kernel(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


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
    options = {"progress_bar": False, "kernel_name": "python3", "kernel_manager_class": OwnKernel}
    if progress:
        print(f"{path.stem} ...", end="", flush=True)
        options["stdout_file"] = Progress(path.stem)
    try:
        papermill.execute_notebook(path, failed, parameters, coalesce_streams=True, **options)
    except Exception as error:
        if STOPPED:  # it has not failed
            failed.unlink(missing_ok=True)
            raise
        if not isinstance(error, (papermill.PapermillExecutionError, RuntimeError)):
            raise  # neither has a cell failed nor the kernel died
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
    write_text(out, nbformat.writes(notebook) + "\n")


def note_minutes(file: Path, notebook: str, minutes: float) -> None:
    """Keep the longest that a notebook took: with everything still to train."""
    with NOTING:
        noted = read_record(file) or {}
        noted[notebook] = max(minutes, noted.get(notebook, 0))
        write_json(file, dict(sorted(noted.items())))


def relative(folder: Path | None) -> str:
    """A folder as the notebooks see it: no record depends on where the repository lies."""
    return os.path.relpath(folder, NOTEBOOKS) if folder else ""


@contextmanager
def quiet(log: Path):
    """Send what this process and its kernels write to standard error to a file instead."""
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
