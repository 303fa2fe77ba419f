"""The README's tables, written between markers from the committed results."""

import json
import re
from pathlib import Path

import pandas as pd

from cplib.claims import VERDICTS
from cplib.figures import NAMES
from cplib.published import markdown, wide
from cplib.tables import shown


def table1(results: Path) -> str:
    """The image-level table of a profile; categories and methods measured only."""
    table = pd.read_csv(results / "tables" / "table1_image_level.csv")
    table = table[table["method"].isin(table.dropna(subset="mean")["method"])]
    return paragraph(results, "table1_image_level", shown(table), "image_auroc")


def table2(results: Path) -> str:
    """The pixel-level table of a profile, quoted methods with it; categories measured only."""
    table = pd.read_csv(results / "tables" / "table2_pixel_level.csv")
    few = "Of grid and toothbrush only 5 of 21 and 1 of 12 normal test images were at hand."
    table = shown(table, "average_all")
    return paragraph(results, "table2_pixel_level", table, "pixel_auroc", few)


def paragraph(results: Path, name: str, table: pd.DataFrame, metric: str, remark: str = "") -> str:
    """One metric of a table, methods down, the protocol that it was measured under above it."""
    grid = (
        wide(shown(table, "average_all"), metric)
        .rename(columns=NAMES, index=lambda n: n.replace("_", " "))
        .T
    )
    grid.index.name = f"{metric.replace('_auroc', '')} AUROC, %"
    protocol = (results / "tables" / f"{name}.md").read_text().splitlines()[0]
    how = "Ours, in brackets the paper's; mean±standard error."
    return f"{' '.join(filter(None, [protocol, remark, how]))}\n\n{markdown(grid)}"


def claims(results: Path) -> str:
    """How many claims of a profile have which verdict."""
    table = pd.read_csv(results / "tables" / "claims.csv")
    counts = table["verdict"].value_counts().reindex(VERDICTS, fill_value=0)
    grid = pd.DataFrame([counts.astype(str)], index=["quick"])
    grid.index.name = "profile"
    return markdown(grid)


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
        "table2": table2(results / "quick"),
        "claims": claims(results / "quick"),
        "minutes": minutes(results / "demo", root / "notebooks"),
    }
    for name, part in parts.items():
        pattern = rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)"
        text = re.sub(pattern, lambda m, p=part: m[1] + p + m[2], text, flags=re.DOTALL)
    return text
