"""The README's tables, written between markers from the committed results."""

import json
import re
from pathlib import Path

import pandas as pd

from cplib.figures import NAMES
from cplib.published import markdown, wide


def table1(results: Path) -> str:
    """The image-level table of a profile, the protocol above it; categories measured only."""
    path = results / "tables" / "table1_image_level.csv"
    table = pd.read_csv(path)
    measured = table.dropna(subset="mean")
    table = table[
        table["category"].isin(measured["category"]) & table["method"].isin(measured["method"])
    ]
    grid = wide(table).rename(columns=NAMES, index=lambda name: name.replace("_", " "))
    protocol = path.with_suffix(".md").read_text().splitlines()[0]
    grid = grid.T
    grid.index.name = "image AUROC, %"
    return f"{protocol} Ours, in brackets the paper's; mean±standard error.\n\n{markdown(grid)}"


def minutes(results: Path) -> str:
    """Each executed notebook's title and the minutes that papermill took for it."""
    rows = {}
    for path in sorted((results / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        title = "".join(notebook["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        seconds = notebook["metadata"]["papermill"]["duration"]
        link = f"[{path.stem}](notebooks/{path.name})"
        rows[link] = {"what": title.split(" ", 1)[1], "minutes": f"{seconds / 60:.1f}"}
    grid = pd.DataFrame(rows).T
    grid.index.name = "notebook"
    return markdown(grid)


def filled(text: str, results: Path) -> str:
    """The README's text with what stands between its markers made anew from ``results``."""
    parts = {"table1": table1(results / "quick"), "minutes": minutes(results / "demo")}
    for name, part in parts.items():
        pattern = rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)"
        text = re.sub(pattern, lambda m, p=part: m[1] + p + m[2], text, flags=re.DOTALL)
    return text
