"""Execute the notebooks headless, one line each with the minutes, and write the report."""

import json
import logging
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill

from cplib.report import write_page, write_report
from cplib.tables import estimate
from cplib.workspace import ROOT, UsageError, Workspace, open_workspace

NOTEBOOKS = ROOT / "notebooks"
LONG = 1_000_000  # images to train on, from which the cost is shown first


def run_notebooks(*, only: str = "", start: str = "", profile: str = "demo", **options) -> int:
    """Execute the notebooks in their order; 0 if all ran, 1 if one failed.

    ``only`` ("02,03") and ``start`` ("02") choose among them; ``profile`` and the other options
    are those of ``open_workspace``. Raises UsageError before anything runs.
    """
    chosen = choose(only, start)
    if profile == "smoke" and not options.get("results"):
        options["results"] = tempfile.mkdtemp(prefix="cplib-smoke-")
    data_root = options.pop("data", "")
    workspace = open_workspace(profile, data_root=data_root, **options)
    parameters = {
        "profile": profile,
        "data": relative(workspace.data),
        "categories": ",".join(workspace.categories),
        "seeds": workspace.seeds or 0,
        "results": relative(workspace.results),
        "device": workspace.device,
        "weights": relative(workspace.weights),
        "engine": workspace.engine,
    }
    deadline = time.time() + workspace.budget if workspace.budget else None
    print(f"profile {profile}: {', '.join(workspace.categories)}; device {workspace.device}")
    print(f"results in {workspace.results}", flush=True)
    cost = estimate(workspace)
    if cost["images"].sum() > LONG:
        print(f"training at full length:\n{cost.round(1).to_string()}\n", flush=True)
    failed = []
    for path in chosen:
        left = f"{max(1, deadline - time.time()):.0f}s" if deadline else ""
        if not run_one(path, workspace, parameters | {"budget": left}):
            failed.append(path.name)
    print(f"report: {write_report(workspace.results, profile)}")
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


def run_one(path: Path, workspace: Workspace, parameters: dict) -> bool:
    """Execute one notebook into ``results/notebooks``, print its line, say whether it ran."""
    check_parameters(path, parameters)
    out = workspace.results / "notebooks" / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{path.stem} ...", end="", flush=True)
    began = time.time()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        with quiet(out.parent / "kernel.log"):
            papermill.execute_notebook(
                path,
                out,
                parameters,
                cwd=NOTEBOOKS,
                progress_bar=False,
                coalesce_streams=True,
                kernel_name="python3",
            )
    except (papermill.PapermillExecutionError, RuntimeError) as error:  # or its kernel died
        what = getattr(error, "evalue", None) or error
        print(f" FAILED after {(time.time() - began) / 60:.1f} min")
        print(
            f"  {getattr(error, 'ename', type(error).__name__)}: {what}\n  see {out}",
            file=sys.stderr,
        )
        return False
    forget_paths(out)
    write_page(out)
    minutes = round((time.time() - began) / 60, 1)
    print(f" {minutes} min", flush=True)
    note_minutes(workspace.results / "minutes.json", path.stem, minutes)
    return True


def forget_paths(out: Path) -> None:
    """Take the machine's folders out of an executed notebook's record."""
    notebook = nbformat.read(out, as_version=4)
    for name in ("input_path", "output_path"):
        notebook.metadata.papermill[name] = Path(notebook.metadata.papermill[name]).name
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


def check_parameters(path: Path, parameters: dict) -> None:
    """UsageError if the notebook lacks a parameter: papermill would only warn."""
    known = papermill.inspect_notebook(str(path))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise UsageError(f"{path.name} has no parameter {unknown[0]!r}")
