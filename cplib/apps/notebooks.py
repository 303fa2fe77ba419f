"""Execute the notebooks headless, one line each with the minutes, and make pages of them."""

import json
import logging
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill

from cplib.apps.pages import write_pages
from cplib.apps.workspace import ROOT
from cplib.study.sweep import UsageError, Workspace, estimate
from cplib.study.tables import all_runs

NOTEBOOKS = ROOT / "notebooks"
LONG = 1_000_000  # images to train on, from which the cost is shown first


def run_notebooks(workspace: Workspace, chosen: list[Path]) -> int:
    """Execute notebooks in their order; 0 if all ran, 1 if one failed."""
    parameters = {
        "profile": workspace.profile.name,
        "data": relative(workspace.places.data),
        "categories": ",".join(workspace.categories),
        "device": workspace.places.device,
    }
    deadline = time.time() + workspace.budget if workspace.budget else None
    print(f"profile {workspace.profile.name}: {', '.join(workspace.categories)};", end=" ")
    print(f"device {workspace.places.device}\nresults in {workspace.results}", flush=True)
    cost = estimate(all_runs(workspace), workspace.places)
    if cost["images"].sum() > LONG:
        print(f"training at full length:\n{cost.round(1).to_string()}\n", flush=True)
    failed = []
    for path in chosen:
        if deadline:
            os.environ["CPLIB_BUDGET"] = f"{max(1, deadline - time.time()):.0f}s"
        if not run_one(path, workspace.results, parameters):
            failed.append(path.name)
    print(f"pages: {write_pages(workspace.results)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


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


def run_one(path: Path, results: Path, parameters: dict) -> bool:
    """Execute one notebook into ``results/notebooks``, print its line, say whether it ran.

    One that fails is kept as ``<name>.failed.ipynb``: an executed notebook is replaced only by one
    that ran to its end.
    """
    known = papermill.inspect_notebook(str(path))
    if unknown := sorted(set(parameters) - set(known)):  # papermill would only warn
        raise UsageError(f"{path.name} has no parameter {unknown[0]!r}")
    out = results / "notebooks" / path.name
    failed = out.with_suffix(".failed.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{path.stem} ...", end="", flush=True)
    began = time.time()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    options = {"cwd": NOTEBOOKS, "progress_bar": False, "kernel_name": "python3"}
    try:
        with quiet(out.parent / "kernel.log"):
            papermill.execute_notebook(path, failed, parameters, coalesce_streams=True, **options)
    except (papermill.PapermillExecutionError, RuntimeError) as error:  # or its kernel died
        what = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        print(f" FAILED after {(time.time() - began) / 60:.1f} min")
        print(f"  {what}\n  see {failed}", file=sys.stderr)
        return False
    failed.replace(out)
    forget_paths(out)
    minutes = round((time.time() - began) / 60, 1)
    print(f" {minutes} min", flush=True)
    note_minutes(results / "minutes.json", path.stem, minutes)
    return True


def forget_paths(out: Path) -> None:
    """Take the machine's folders out of an executed notebook's record."""
    notebook = nbformat.read(out, as_version=4)
    for name in ("input_path", "output_path"):
        notebook.metadata.papermill[name] = out.name
    nbformat.write(notebook, out)


def note_minutes(file: Path, notebook: str, minutes: float) -> None:
    """Keep the longest that a notebook took: with everything still to train."""
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
