"""What the notebooks' first cell does on Colab, and their badges. Imports only what Colab has."""

import importlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CELL = Path(__file__).with_name("colab_cell.txt")
COLAB = "https://colab.research.google.com"
IMAGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
DRIVE = ROOT.parent / "drive"  # /content/drive: as in the first cell, and Colab's own examples
TORCH = ("torch", "torchvision")  # Colab's, made for its GPUs
HEADLESS = ("jupyterlab", "papermill", "nbconvert")  # for run_all.sh, not for a notebook


def start(keep: bool) -> None:
    """Make a notebook run here: packages, one category by default, and Drive if asked to keep."""
    os.chdir(ROOT / "notebooks")
    install(*requirements())
    os.environ.setdefault("CPLIB_MAX_CATEGORIES", "1")  # minutes, not hours
    few = os.environ["CPLIB_MAX_CATEGORIES"]
    print(f"Categories by default: {few}. The parameter categories names more, with commas.")
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]  # for the processes that train
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    print(keep_on_drive() if keep else "Results are lost when the session ends.")
    print(device())


def requirements() -> tuple[list[str], list[str]]:
    """What pyproject.toml wants and is missing or too old here, and pins of all that is there."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing, pins = [], []
    for line in project["dependencies"] + project["optional-dependencies"]["notebooks"]:
        wanted = Requirement(line)
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = None
        if found and (wanted.name in TORCH or wanted.specifier.contains(found)):
            pins.append(f"{wanted.name}=={found}")
        elif wanted.name not in TORCH + HEADLESS:
            missing.append(line)
    return missing, pins


def install(missing: list[str], pins: list[str]) -> None:
    """Install what is missing; what is there stays as it is, or pip refuses."""
    if not missing:
        return
    print(f"installing {', '.join(missing)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(pins), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "-qq", "-c", str(constraints), *missing]
        subprocess.run(command, check=True)
    importlib.invalidate_caches()


def keep_on_drive() -> str:
    """Have runs and checkpoints kept on Google Drive, and say so, or why not."""
    if "MyDrive" not in ROOT.parts:
        from google.colab import drive

        try:
            drive.mount(str(DRIVE))
        except Exception as error:  # Colab's own kinds, among them a person's no
            return f"Results are lost when the session ends: no Drive ({error})."
        os.environ["CPLIB_RESULTS"] = str(DRIVE / "MyDrive" / "cutpaste")
        os.environ.setdefault("CPLIB_CHECKPOINT_SECONDS", "300")  # Drive is slow
    folder = os.environ.get("CPLIB_RESULTS", ROOT / "results")
    return f"Results and checkpoints go to {folder}; another session goes on from there."


def device() -> str:
    """The GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name(0)}."
    return "No GPU: choose one under Runtime > Change runtime type."


def repository(root: Path) -> str:
    """The address, "https://github.com/OWNER/NAME"; ValueError for another, empty where unset."""
    address = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cplib"][
        "repository"
    ]
    if address and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"repository {address!r}: Colab opens https://github.com/OWNER/NAME")
    return address


def badge(address: str, name: str) -> str:
    """Markdown that opens a notebook on Colab; nothing without an address."""
    path = address.removeprefix("https://github.com")
    return path and f"{IMAGE}({COLAB}/github{path}/blob/main/notebooks/{name})"


def mark(notebook, address: str, name: str) -> None:
    """Put the badge below the title and the Colab cell in its place, instead of older ones."""
    title = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    lines = [line for line in title.source.splitlines() if not line.startswith(IMAGE)]
    parts = [lines[0], badge(address, name), "\n".join(lines[1:]).strip()]
    title.source = "\n\n".join(filter(None, parts))
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code = CELL.read_text(encoding="utf-8").strip()
    if not cell.source.startswith(code.split(":")[0]):
        raise ValueError(f"{name}: its first cell is not the one for Colab")
    cell.source = code.replace("REPOSITORY", address)


def write_badges(root: Path = ROOT) -> None:
    """Mark every notebook of the repository."""
    import nbformat

    from cplib.datasets import write_text

    address = repository(root)
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        mark(notebook, address, path.name)
        write_text(path, nbformat.writes(notebook, indent=1) + "\n")
