"""A profile's executed notebooks as pages, and its tables as Markdown; README's tables."""

import json
import re
from pathlib import Path

import pandas as pd
from nbconvert import HTMLExporter

from cplib.apps.workspace import ROOT
from cplib.study.claims import VERDICTS
from cplib.study.figures import NAMES
from cplib.study.published import markdown, wide
from cplib.study.tables import TABLES, shown


def write_pages(results: Path) -> Path:
    """Write ``results/README.md`` and, by nbconvert, a page a notebook; returns the former's path.

    The pages need no network and open from disk. What was not measured is named.
    """
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.mathjax_url = exporter.require_js_url = ""
    notebooks = sorted(results.glob("notebooks/[0-9][0-9]_*.ipynb"))
    notebooks = [path for path in notebooks if not path.stem.endswith(".failed")]
    for path in notebooks:
        page = path.with_suffix(".html")
        if not page.exists() or page.stat().st_mtime_ns < path.stat().st_mtime_ns:
            page.write_text(exporter.from_filename(str(path))[0])
    parts = [f"# Profile {results.name}", "## Notebooks"]
    parts += [
        f"- [{p.stem}](notebooks/{p.name}) ([page](notebooks/{p.stem}.html))" for p in notebooks
    ]
    for name in ("claims", *TABLES):
        file = results / "tables" / f"{name}.md"
        text = file.read_text() if file.exists() else "Not measured.\n"
        parts += [f"\n## {name.replace('_', ' ').capitalize()}\n", text]
    parts += ["## Figures\n"]
    parts += [f"![{p.stem}](figures/{p.name})\n" for p in sorted(results.glob("figures/*.png"))]
    index = results / "README.md"
    index.write_text("\n".join(parts))
    return index


def readme_table(results: Path, name: str, metric: str) -> str:
    """One metric of a table, methods down, with the caption that it was measured under."""
    table = shown(pd.read_csv(results / "tables" / f"{name}.csv"), "average_all")
    grid = wide(table, metric).rename(columns=NAMES, index=lambda n: n.replace("_", " ")).T
    grid = grid[(grid != "").any(axis=1)]
    grid.index.name = f"{metric.replace('_auroc', '')} AUROC, %"
    note = (results / "tables" / f"{name}.md").read_text().splitlines()[0]
    return f"{note}\n\n{markdown(grid)}"


def readme_claims(results: Path) -> str:
    """How many claims of a profile have which verdict."""
    counts = pd.read_csv(results / "tables" / "claims.csv")["verdict"].value_counts()
    counts = counts.reindex(VERDICTS, fill_value=0).astype(str)
    return markdown(pd.DataFrame([counts], index=[results.name]).rename_axis("profile"))


def readme_minutes(results: Path) -> str:
    """Each notebook's title, and the longest that it took: with everything to train."""
    rows = {}
    for name, taken in json.loads((results / "minutes.json").read_text()).items():
        path = ROOT / "notebooks" / f"{name}.ipynb"
        title = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()[0]
        link = f"[{name}](results/{results.name}/notebooks/{path.name})"
        rows[link] = {"what": title.lstrip("# ").split(" ", 1)[1], "minutes": taken}
    return markdown(pd.DataFrame(rows).T.rename_axis("notebook"))


def fill_readme() -> None:
    """Write the README's tables, between their markers, from the committed results."""
    results, file = ROOT / "results", ROOT / "README.md"
    parts = {
        "table1": readme_table(results / "quick", "table1_image_level", "image_auroc"),
        "table2": readme_table(results / "quick", "table2_pixel_level", "pixel_auroc"),
        "claims": readme_claims(results / "quick"),
        "minutes": readme_minutes(results / "demo"),
    }
    text = file.read_text()
    for name, part in parts.items():
        pattern = rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)"
        text = re.sub(pattern, lambda m, p=part: m[1] + p + m[2], text, flags=re.DOTALL)
    file.write_text(text)
