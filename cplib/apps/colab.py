"""What the notebooks' first cell does on Colab, and their badges. Imports only what Colab has."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from cplib.settings import setting

ROOT = Path(__file__).resolve().parents[2]
CELL = Path(__file__).with_name("colab_cell.txt")
COLAB = "https://colab.research.google.com"
BADGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"
DRIVE = ROOT.parent / "drive"  # /content/drive: as in the first cell, and Colab's own examples


def start(keep: bool) -> None:
    """Make a notebook run here: install packages, take one category, use Drive if asked to."""
    # pip installs what is missing. It leaves each package that is new enough as it is, and torch.
    kept = [f"{name}=={version(name)}" for name in ("torch", "torchvision")]
    command = [sys.executable, "-m", "pip", "install", "-qq", *kept, "-e", str(ROOT)]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()
    os.chdir(ROOT / "notebooks")
    os.environ.setdefault("CPLIB_MAX_CATEGORIES", "1")  # minutes, not hours
    few = setting("CPLIB_MAX_CATEGORIES")
    print(f"Categories by default: {few}. The parameter categories names more, with commas.")
    print(keep_on_drive() if keep else "Results are lost when the session ends.")
    import torch

    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name(0)}.")
    else:
        print("No GPU: choose one under Runtime > Change runtime type.")


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
    folder = setting("CPLIB_RESULTS") or ROOT / "results"
    return f"Results and checkpoints go to {folder}; another session goes on from there."


def write_badges(root: Path = ROOT) -> None:
    """Write every notebook's first code cell, and its badge if the repository has an address."""
    import nbformat

    from cplib.datasets import write_text

    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    address = settings["tool"]["cplib"]["repository"]
    if address and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"repository {address!r}: Colab opens https://github.com/OWNER/NAME")
    code = CELL.read_text(encoding="utf-8").strip()
    opens = f"{COLAB}/github/{address.removeprefix('https://github.com/')}/blob/main/notebooks"
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title, cell = notebook.cells[:2]
        if not cell.source.startswith(code.split(":")[0]):
            raise ValueError(f"{path.name}: its first cell is not the one for Colab")
        cell.source = code.replace("REPOSITORY", address)
        heading, *text = [x for x in title.source.split("\n\n") if not x.startswith(BADGE)]
        badge = [f"{BADGE}({opens}/{path.name})"] if address else []
        title.source = "\n\n".join([heading, *badge, *text])
        write_text(path, nbformat.writes(notebook, indent=1) + "\n")
