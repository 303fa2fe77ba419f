"""One page to start from: a profile's tables, claims and figures, and its notebooks as pages."""

import base64
import io
import json
import re
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from PIL import Image

from cplib.claims import readable, summary
from cplib.config import PROFILES
from cplib.figures import NAMES
from cplib.published import COLUMNS, wide
from cplib.tables import TABLES, shown
from cplib.workspace import ROOT, UsageError

TEMPLATES = Path(__file__).parent / "templates"
WIDEST = 1100  # pixels of an embedded picture; the page links to the whole one
REMOTE = re.compile(r"\[!\[.*?\]\(https?:.*?\)\]\(.*?\)|!\[.*?\]\(https?:.*?\)")
SETTING = re.compile(r"cutpaste_3way\[(.*)=(.*)\]")
METRICS = {
    "image_auroc": "Image AUROC, %",
    "image_ap": "Image average precision, %",
    "image_f1max": "Best image F1, %",
    "pixel_auroc": "Pixel AUROC, %",
    "pixel_ap": "Pixel average precision, %",
    "aupro_30": "AUPRO up to 30 % false positives, %",
    "aupro_05": "AUPRO up to 5 % false positives, %",
}


def report(profile: str = "demo", results: str = "") -> Path:
    """Write the report of a profile's results; UsageError where there are none."""
    if profile not in PROFILES:
        raise UsageError(f"unknown profile {profile!r}: one of {', '.join(PROFILES)}")
    folder = Path(results).expanduser() if results else ROOT / "results" / profile
    if not folder.is_dir():
        raise UsageError(f"no such folder of results: {folder}")
    return write_report(folder, profile)


def write_report(results: Path, profile: str) -> Path:
    """Write ``results/report/index.html`` from what the results hold; returns its path.

    The executed notebooks become pages beside their ``.ipynb`` where they are not yet. What is
    missing is named in a line. The page fetches nothing and runs no script.
    """
    notebooks = [read_notebook(path) for path in sorted(results.glob("notebooks/[0-9]*.ipynb"))]
    for notebook in notebooks:
        write_page(results / "notebooks" / f"{notebook['name']}.ipynb")
    files = [results / "tables" / f"{name}.csv" for name in TABLES]
    there = [file for file in files if file.exists()]
    tables = [read_table(path) for path in there]
    loader = jinja2.FileSystemLoader(TEMPLATES)
    page = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    out = results / "report" / "index.html"
    out.parent.mkdir(exist_ok=True)
    text = page.render(
        title=f"CutPaste companion: profile {profile}",
        style=Markup((TEMPLATES / "style.css").read_text()),
        demo=PROFILES[profile].dataset == "demo",
        protocol=next((table["protocol"] for table in tables), ""),
        tables=tables,
        missing=[table_title(file.stem) for file in files if file not in there],
        claims=read_claims(results / "tables" / "claims.csv"),
        figures=read_figures(results, notebooks),
        notebooks=notebooks,
    )
    out.write_text(text)
    return out


def write_page(notebook: Path) -> Path:
    """An executed notebook as an HTML file beside it, unless that is there and not stale."""
    page = notebook.with_suffix(".html")
    newest = max(path.stat().st_mtime_ns for path in (notebook, *TEMPLATES.iterdir()))
    if not page.exists() or page.stat().st_mtime_ns < newest:
        exporter = HTMLExporter(
            template_file=str(TEMPLATES / "notebook.html.j2"),
            exclude_input_prompt=True,
            exclude_output_prompt=True,
        )
        resources = {"metadata": {"name": notebook.stem}}
        page.write_text(exporter.from_notebook_node(load(notebook), resources)[0])
    return page


def load(path: Path) -> nbformat.NotebookNode:
    """An executed notebook, without the pictures from elsewhere (badges) in its texts."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = REMOTE.sub("", cell.source)
    return notebook


def read_notebook(path: Path) -> dict:
    """What the report says of an executed notebook, and its cells."""
    notebook = load(path)
    noted = path.parents[1] / "minutes.json"
    minutes = json.loads(noted.read_text()) if noted.exists() else {}
    first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    title, below = heading(first)
    return {
        "name": path.stem,
        "title": title or path.stem,
        "lead": Markup(markdown2html(below.split("\n\n")[0])),
        "minutes": minutes.get(path.stem),
        "failed": bool(notebook.metadata.get("papermill", {}).get("exception")),
        "cells": notebook.cells,
    }


def heading(source: str) -> tuple[str, str]:
    """A Markdown cell's heading, empty where it has none, and what stands below it."""
    found = re.match(r"(?:#+ (.*)\n*)?", source)
    return found[1] or "", source[found.end() :]


def table_title(name: str) -> str:
    """``table4_cutout_variants`` as "Table 4: cutout variants"."""
    found = re.match(r"table(\d+)_", name)
    above = f"Table {found[1]}" if found else "Not in the paper"
    return f"{above}: {words(name[found.end() if found else 0 :]).replace('3way', '3-way')}"


def read_table(path: Path) -> dict:
    """A table of the results: its protocol, and by metric a grid of what was measured."""
    table = pd.read_csv(path)
    if absent := {*COLUMNS} - {*table}:
        raise ValueError(f"{path}: no column {min(absent)!r}")
    table = shown(table, "average_all")
    return {
        "name": path.stem,
        "title": table_title(path.stem),
        "protocol": note(path),
        "grids": {METRICS.get(m, m): narrow(wide(table, m)) for m in table["metric"].unique()},
    }


def note(table: Path) -> str:
    """The line above a table's Markdown: how it was measured."""
    beside = table.with_suffix(".md")
    return beside.read_text().partition("\n")[0] if beside.exists() else ""


def words(name: str) -> str:
    """An identifier as it is read."""
    return name.replace("_", " ")


def narrow(grid: pd.DataFrame) -> pd.DataFrame:
    """A grid with its names in words, the longer of its sides down the page.

    A row of Tables 7 and 8, ``cutpaste_3way[learning_rate=0.1]``, becomes "learning rate 0.1".
    """
    grid = grid.rename(columns=lambda name: NAMES.get(name) or SETTING.sub(r"\1 \2", name))
    grid = grid.rename(columns=words, index=words)
    return grid if len(grid) > len(grid.columns) else grid.T


def read_claims(path: Path) -> dict | None:
    """The claims with their verdicts, None where they are not there."""
    if not path.exists():
        return None
    claims = pd.read_csv(path)
    return {"grid": readable(claims), "summary": summary(claims), "note": note(path)}


def read_figures(results: Path, notebooks: list[dict]) -> dict[str, list[dict]]:
    """The saved pictures, under the title of their notebook, those of one caption together."""
    by_number = {notebook["name"][:2]: notebook for notebook in notebooks}
    figures = {}
    for path in sorted(results.glob("figures/*.png")):
        notebook = by_number.get(path.stem[:2], {"title": path.stem[:2], "cells": []})
        title, text = caption(path.stem, notebook["cells"])
        title = title or path.stem
        source, size = embedded(path)
        alt = f"{title} ({path.stem})"
        picture = {"name": path.stem, "source": source, "size": size, "alt": alt}
        groups = figures.setdefault(notebook["title"], [])
        if not groups or groups[-1]["of"] != (title, text):
            below = Markup(markdown2html(f"**{title}**\n\n{text}"))
            groups.append({"of": (title, text), "caption": below, "pictures": []})
        groups[-1]["pictures"].append(picture)
        groups[-1]["wide"] = len(groups[-1]["pictures"]) > 1 or size[0] > 2 * size[1]
    return figures


def caption(name: str, cells: list) -> tuple[str, str]:
    """The heading and the text above the cell that saves a figure, empty where none does.

    A name made in a loop, ``f"04_heat_maps_{category}"``, is known by how it begins.
    """
    found, title, text = {"": ("", "")}, "", ""
    for cell in cells:
        if cell.cell_type == "markdown":
            above, text = heading(cell.source)
            title = above or title
        saved = re.findall(r'save_figure\([^"]*"([^"{]+)', cell.source)
        found |= dict.fromkeys(saved, (title, text))
    return found[max((n for n in found if name.startswith(n)), key=len)]


def embedded(path: Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data URI, at most WIDEST pixels wide, and its size."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((WIDEST, 3 * WIDEST))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/webp;base64,{data}", picture.size
