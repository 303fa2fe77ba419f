"""What the notebooks' first cell does on Colab. Imports nothing that Colab may lack."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRIVE = ROOT.parent / "drive"  # a clone in /content has it where Colab's own examples do
TORCH = ("torch", "torchvision")  # Colab's, made for its GPUs
HEADLESS = ("jupyterlab", "papermill", "nbconvert")  # for run_all.sh, not for a notebook
# Minutes that all notebooks took with Colab's defaults, by device; only what was measured.
MINUTES: dict[str, float] = {}


def start(keep: bool) -> None:
    """Make a notebook run here: packages, one category by default, and Drive if asked to keep."""
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

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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
        constraints.write_text("\n".join(pins))
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
    """The GPU, and how many minutes the defaults take on it; where not measured, on a CPU."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    if name in MINUTES:
        return f"GPU: {name}; all notebooks took {MINUTES[name]:.0f} minutes on one."
    file = ROOT / "results" / "demo" / "minutes.json"
    noted = json.loads(file.read_text()) if file.exists() else {}
    slow = f"without one all notebooks took {sum(noted.values()):.0f} minutes on two cores, "
    slow += "with all four categories"
    if not name:
        return f"No GPU: choose one under Runtime > Change runtime type; {slow}."
    return f"GPU: {name}; not timed on one yet, {slow}."
