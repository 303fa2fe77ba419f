"""Execute the notebooks headless, one line each with the minutes, and make pages of them."""

import asyncio
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from cplib.apps.pages import write_pages
from cplib.apps.workspace import ROOT
from cplib.datasets import write_text
from cplib.study.jobs import estimate, jobs_here
from cplib.study.store import frame, read_record, stock, write_json
from cplib.study.tables import planned
from cplib.study.workspace import UsageError, Workspace

NOTEBOOKS = ROOT / "notebooks"
TRAINING = "02"  # trains what the others read
STAGES = (TRAINING, "03", "11")  # each starts a group: 11 reads what those before it measured
MOST = 4  # notebooks at a time: each takes about a gigabyte
NO_IMAGES = (
    "*Nothing is shown: this copy was made without images. "
    "[That of the demo set](../../demo/notebooks/{}) has them.*"
)
LONG = 1_000_000  # images to train on, from which the cost is shown first


def run_notebooks(workspace: Workspace, chosen: list[Path]) -> int:
    """Execute notebooks; 0 if all ran, 1 if one failed.

    Notebook 02 runs alone. Raises DataError before anything starts if the training would meet an
    image that cannot be read.
    """
    root = workspace.places.data
    parameters = {
        "profile": workspace.profile.name,
        # As the notebooks see it: no record depends on where the repository lies.
        "data": os.path.relpath(root, NOTEBOOKS) if root else "",
        "categories": ",".join(workspace.categories),
        "device": workspace.device,
    }
    environment = {
        "CPLIB_RESULTS": f"{workspace.results.parent}",
        "CPLIB_WEIGHTS": f"{workspace.places.weights or ''}",
    }
    deadline = time.time() + workspace.budget if workspace.budget else None
    print(f"profile {workspace.profile.name}: {', '.join(workspace.categories)};", end=" ")
    print(f"device {workspace.device}\nresults in {workspace.results}", flush=True)
    runs = planned(workspace)
    for line in workspace.remarks(runs):
        print(line, flush=True)
    todo = workspace.missing(runs)
    trains = any(path.name.startswith(TRAINING) for path in chosen)
    places = workspace.places
    cost = estimate(stock(todo, places).todo, frame(runs, places), places)
    if trains and cost["images"].sum() > LONG:
        print(f"training at full length:\n{cost.round(1).to_string()}\n", flush=True)
    if root and trains:
        for category, size in dict.fromkeys((run.category, run.size) for run in todo):
            for split in ("train", "test"):
                workspace.load(category, split, size)
    failed = []
    for group in _groups(chosen):
        if deadline:
            environment["CPLIB_BUDGET"] = f"{max(1, deadline - time.time()):.0f}s"
        trains = workspace.profile.small and group[0].name > TRAINING and workspace.missing(runs)
        most = 1 if trains else MOST  # side by side they would train the same networks
        errors = execute(group, workspace.results, parameters, environment, most)
        for path, error in errors.items():
            print(f"  {error}", file=sys.stderr)
            failed.append(path.name)
    print(f"pages: {write_pages(workspace.results)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _groups(chosen: list[Path]) -> list[list[Path]]:
    """The notebooks in groups: a group starts when the one before it has ended."""
    number = lambda path: sum(path.name[:2] >= first for first in STAGES)  # noqa: E731
    return [list(group) for _, group in groupby(chosen, number)]


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


def execute(
    paths: list[Path],
    results: Path,
    parameters: dict,
    environment: dict | None = None,
    most: int = MOST,
) -> dict[Path, str]:
    """Execute notebooks into ``results/notebooks``, at ``most`` so many at a time; their errors.

    The kernels get the environment of this process and ``environment``. Ctrl-C ends them and their
    workers within seconds, and raises KeyboardInterrupt. UsageError if one lacks a parameter.
    """
    prepared = {path: with_parameters(path, parameters) for path in paths}
    jobs = min(most, len(paths), jobs_here())
    # One notebook has as many threads as one of all: a short training's numbers depend on them.
    threads = {"OMP_NUM_THREADS": f"{max(1, jobs_here() // MOST)}"}
    own = threads | os.environ | (environment or {})
    # The kernels import the code of this command, whose environment may be of another clone.
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
    log = results / "notebooks" / "kernel.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    async def work() -> list:
        slots = asyncio.Semaphore(jobs)
        with log.open("a", encoding="utf-8") as file:
            begun = [
                _execute(*one, results, slots, env=own, stderr=file) for one in prepared.items()
            ]
            return await asyncio.gather(*begun, return_exceptions=True)  # waits for all

    # The notebooks are tasks in a thread of their own. This thread only waits for Ctrl-C.
    with asyncio.Runner() as runner, ThreadPoolExecutor(1) as thread:
        loop = runner.get_loop()
        task = loop.create_task(work())
        try:
            outcomes = thread.submit(loop.run_until_complete, task).result()
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM):  # the command ends now
                signal.signal(number, signal.SIG_IGN)  # a second one changes nothing
            loop.call_soon_threadsafe(task.cancel)
            raise
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return {path: error for path, error in zip(paths, outcomes, strict=True) if error}


async def _execute(path: Path, notebook, results: Path, slots: asyncio.Semaphore, **options) -> str:
    """Wait for a slot, execute one notebook and print its line; the error, if it failed.

    A notebook that fails is kept as ``<name>.failed.ipynb``. The executed one from before stays.
    ``options`` are those of the kernel's process.
    """
    # The kernel has this command's Python, even where a person installed another "python3" kernel.
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_spec_manager=specs, shutdown_wait_time=3)
    about = {"metadata": {"path": str(NOTEBOOKS), "name": path.stem}}
    settings = {"coalesce_streams": True, "record_timing": False}
    client = Client(notebook, km=kernel, resources=about, **settings)
    out, error = results / "notebooks" / path.name, ""
    failed = out.with_suffix(".failed.ipynb")
    async with slots:
        began = time.time()
        try:
            await client.async_execute(cleanup_kc=True, **options)
        except (CellExecutionError, RuntimeError) as problem:  # a cell failed, or the kernel died
            if asyncio.current_task().cancelling():  # Ctrl-C ended the kernel
                raise
            name = getattr(problem, "ename", type(problem).__name__)
            error = f"{name}: {getattr(problem, 'evalue', problem)}\n  see {failed}"
        finally:  # whatever is left of the kernel and its workers
            with suppress(AttributeError, ProcessLookupError):
                os.killpg(kernel.provisioner.pgid, signal.SIGKILL)
    minutes = round((time.time() - began) / 60, 1)
    if not error:
        say_what_is_missing(notebook, path.name)
    write_text(failed if error else out, nbformat.writes(notebook) + "\n")
    line = f"FAILED after {minutes} min" if error else f"{minutes} min"
    print(f"\r{path.stem} ... {line:<60}", flush=True)
    if not error:
        failed.unlink(missing_ok=True)
        note_minutes(results / "minutes.json", path.stem, minutes)
    return error


def say_what_is_missing(notebook, name: str) -> None:
    """Say below cells tagged "images" that stand together and showed nothing that images lack."""
    for needs_images, cells in groupby(notebook.cells, lambda cell: "images" in _tags(cell)):
        *_, last = cells = list(cells)
        if needs_images and not any(cell.outputs for cell in cells):
            text = {"text/markdown": NO_IMAGES.format(name)}
            last.outputs = [nbformat.v4.new_output("display_data", text)]


def _tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


class Client(NotebookClient):
    """Executes a notebook, and shows on the terminal how many of its runs are done."""

    def process_message(self, msg: dict, cell, cell_index: int):
        """Show the last line of a cell's text that counts runs."""
        text = msg["content"].get("text", "")
        if lines := [line for line in text.splitlines() if line.startswith("runs: ")]:
            print(f"\r{self.resources['metadata']['name']} ... {lines[-1]:<60}", end="", flush=True)
        return super().process_message(msg, cell, cell_index)


def with_parameters(path: Path, parameters: dict):
    """Read a notebook and add a cell that sets the parameters; UsageError if it lacks one."""
    known = papermill.inspect_notebook(str(path))
    if unknown := sorted(set(parameters) - set(known)):  # papermill would only warn
        raise UsageError(f"{path.name} has no parameter {unknown[0]!r}")
    notebook = papermill.execute_notebook(path, None, parameters, prepare_only=True)
    del notebook.metadata["papermill"]  # it names folders of this machine
    return notebook


def note_minutes(file: Path, notebook: str, minutes: float) -> None:
    """Keep the longest that a notebook took: with everything still to train."""
    noted = read_record(file) or {}
    noted[notebook] = max(minutes, noted.get(notebook, 0))
    write_json(file, dict(sorted(noted.items())))
