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
    chosen = "The schedule was chosen on these categories' curves, which flatters it a little. "
    how = "Ours, in brackets the paper's; mean±standard error."
    return f"{protocol} {chosen}{how}\n\n{markdown(grid)}"


def minutes(results: Path, notebooks: Path) -> str:
    """Each notebook's title, and the longest that it took: with everything to train."""
    rows = {}
    for name, taken in json.loads((results / "minutes.json").read_text()).items():
        path = notebooks / f"{name}.ipynb"
        title = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()[0]
        rows[f"[{name}](notebooks/{path.name})"] = {
            "what": title.lstrip("# ").split(" ", 1)[1],
            "minutes": taken,
        }
    grid = pd.DataFrame(rows).T
    grid.index.name = "notebook"
    return markdown(grid)


def filled(root: Path) -> str:
    """The README's text with what stands between its markers made anew from the results."""
    text, results = (root / "README.md").read_text(), root / "results"
    parts = {
        "table1": table1(results / "quick"),
        "minutes": minutes(results / "demo", root / "notebooks"),
    }
    for name, part in parts.items():
        pattern = rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)"
        text = re.sub(pattern, lambda m, p=part: m[1] + p + m[2], text, flags=re.DOTALL)
    return text
