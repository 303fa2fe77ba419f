"""The notebooks' Colab badge and first cell, from the repository's address in pyproject.toml."""

import re
import tomllib
from pathlib import Path

import nbformat

CELL = Path(__file__).with_name("templates") / "colab_cell.txt"
COLAB = "https://colab.research.google.com"
IMAGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]"


def repository(root: Path) -> str:
    """The address, "https://github.com/OWNER/NAME"; ValueError for another, empty where unset."""
    address = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["cplib"]["repository"]
    if address and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"repository {address!r}: Colab opens https://github.com/OWNER/NAME")
    return address


def badge(address: str, name: str) -> str:
    """Markdown that opens a notebook on Colab; without an address Colab's GitHub browser opens."""
    path = address.removeprefix("https://github.com")
    return f"{IMAGE}({COLAB}/github{f'{path}/blob/main/notebooks/{name}' if path else ''})"


def mark(notebook: nbformat.NotebookNode, address: str, name: str) -> None:
    """Put the badge below the title and the Colab cell in its place, instead of older ones."""
    title = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    lines = [line for line in title.source.splitlines() if not line.startswith(IMAGE)]
    first, rest = lines[0], "\n".join(lines[1:]).strip()
    title.source = f"{first}\n\n{badge(address, name)}\n\n{rest}".strip()
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code = CELL.read_text().strip()
    if not cell.source.startswith(code.split(":")[0]):
        raise ValueError(f"{name}: its first cell is not the one for Colab")
    cell.source = code.replace("REPOSITORY", address)


def write(root: Path) -> None:
    """Mark every notebook of the repository."""
    address = repository(root)
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        mark(notebook, address, path.name)
        path.write_text(nbformat.writes(notebook, indent=1) + "\n")
