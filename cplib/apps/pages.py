"""A profile's executed notebooks as pages, and its tables as Markdown; README's tables."""

import base64
import io
import json
import re
from pathlib import Path

import matplotlib
import nbformat
import pandas as pd
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from cplib.apps.workspace import ROOT
from cplib.datasets import write_text
from cplib.run import BASELINES
from cplib.study.claims import VERDICTS
from cplib.study.published import NAMES, markdown, wide
from cplib.study.tables import METHOD, TABLES

PLUMBING = {"hide-input", "parameters", "injected-parameters"}  # tags of cells whose code is hidden
OTHERS = {"11": ("claims",), "09": ("schedule_choice",)}  # of notebooks without a table
# Wide tables and code scroll by themselves on a phone; at night the page is dark, figures are not.
STYLE = """<style>
body { max-width: 62rem; margin: 0 auto !important; padding: 0 .6rem; }
.jp-RenderedHTMLCommon { overflow-x: auto; }
img { max-width: 100%; height: auto; }
img.math { height: 2.2em; }
@media (prefers-color-scheme: dark) {
  html { filter: invert(.92) hue-rotate(180deg); background: white; }
  img:not(.math) { filter: invert(1) hue-rotate(180deg); }
}
</style></head>"""


def write_pages(results: Path) -> Path:
    """Write ``results/README.md`` and, by nbconvert, pages that need no network; the first's path.

    ``index.html`` is that README; every notebook has a page, with its plumbing hidden.
    """
    for path in executed(results):
        page = path.with_suffix(".html")
        if not page.exists() or page.stat().st_mtime_ns < path.stat().st_mtime_ns:
            write_text(page, _page(nbformat.read(path, 4), path.stem))
    text = overview(results)
    write_text(results / "README.md", text)
    index = results / "index.html"
    cell = nbformat.v4.new_markdown_cell(text)
    write_text(index, _page(nbformat.v4.new_notebook(cells=[cell]), f"Profile {results.name}"))
    return index


def executed(results: Path) -> list[Path]:
    """The executed notebooks that ran to their ends."""
    found = sorted(results.glob("notebooks/[0-9][0-9]_*.ipynb"))
    return [path for path in found if not path.stem.endswith(".failed")]


def _page(notebook, title: str) -> str:
    """A notebook as HTML; links to notebooks lead to their pages, equations are images."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\$\$(.+?)\$\$", _equation, cell.source, flags=re.DOTALL)
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.mathjax_url = exporter.require_js_url = ""
    hide = TagRemovePreprocessor(remove_input_tags=PLUMBING)
    exporter.register_preprocessor(hide, enabled=True)
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    html = re.sub(r'(href="[^"/:]*(?:notebooks/)?[^"/:]*)\.ipynb"', r'\1.html"', html)
    return html.replace("</head>", STYLE, 1)


def _equation(match: re.Match) -> str:
    """An equation as an image; as it is where matplotlib does not know a symbol."""
    image = io.BytesIO()
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # whatever a person's own matplotlibrc says
            matplotlib.rcParams.update({"mathtext.fontset": "cm", "svg.hashsalt": "cplib"})
            math_to_image(f"${match[1].strip()}$", image, format="svg")
    except ValueError:
        return match[0]
    coded = base64.b64encode(image.getvalue()).decode()
    return f'<img class="math" alt="equation" src="data:image/svg+xml;base64,{coded}">'


def overview(results: Path) -> str:
    """Findings first, then each notebook's tables and figures in the notebooks' order."""
    parts = [f"# Profile {results.name}", "## Findings", *_findings(results)]
    for path in executed(results):
        number, title = path.stem[:2], nbformat.read(path, 4).cells[0].source.splitlines()[0]
        parts.append(f"## [{title.lstrip('# ')}](notebooks/{path.name})")
        names = [name for name, table in TABLES.items() if table.notebook == number]
        for name in (*names, *OTHERS.get(number, ())):
            file = results / "tables" / f"{name}.md"
            if file.exists() or name in TABLES:
                text = (
                    file.read_text(encoding="utf-8").strip() if file.exists() else "Not measured."
                )
                heading = re.sub(r"Table(\d)", r"Table \1:", name.capitalize()).replace("_", " ")
                parts.append(f"### {heading}\n\n{text}")
        for figure in sorted(results.glob(f"figures/{number}_*.png")):
            caption = figure.stem[3:4].upper() + figure.stem[4:].replace("_", " ")
            parts.append(f"![{caption}](figures/{figure.name})\n\n*{caption}*")
    return "\n\n".join(parts) + "\n"


def _findings(results: Path) -> list[str]:
    """Two averages beside their nulls and the paper's, and how many claims have which verdict."""
    found = readme_results(results)
    if (results / "tables" / "claims.csv").exists():
        found.append(readme_claims(results))
    return found or ["Nothing is measured yet."]


def readme_results(results: Path) -> list[str]:
    """A sentence on Table 1's average and one on Table 2's, where they are measured."""
    found = []
    for name, method in (("table1_image_level", METHOD), ("table2_pixel_level", f"{METHOD}_patch")):
        file, metric = results / "tables" / f"{name}.csv", f"{name[7:12]}_auroc"
        table = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["metric"])
        table = table[table["metric"] == metric]
        for average in ("average_all", "average_measured") if len(table) else ():
            part = table[table["category"] == average].set_index("method")
            if pd.notna(part["mean"].get(method)):
                found.append(_finding(table, part, method))
                break
    return found


def _finding(table: pd.DataFrame, part: pd.DataFrame, method: str) -> str:
    """The average of a method, what stands beside it, and of how many categories and seeds."""
    ours, theirs = part["mean"][method], part["published_mean"][method]
    cells = table[~table["category"].str.startswith("average")]
    cells = cells.pivot(index="category", columns="method", values="mean")
    cells = cells.reindex(columns=[method, *BASELINES]).dropna(subset=method)
    kind, n, seeds = table["metric"].iloc[0][:5].capitalize(), len(cells), part["seeds"][method]
    text = f"**{kind}-level AUROC of {NAMES[method]}: {ours:.1f} %** on average over {n} categories"
    text += f", seeds: {seeds:.0f}"
    text += "" if pd.isna(theirs) else f" (the paper's on the same: {theirs:.1f})"
    beside = []
    for name in BASELINES:
        both = cells[[method, name]].dropna()
        few = f" (on {len(both)} of them, where this is {both[method].mean():.1f})"
        if len(both):
            beside.append(f"{NAMES[name]} {both[name].mean():.1f}{few if len(both) < n else ''}")
    return f"{text}. Without training: {', '.join(beside) or 'not measured'}."


def readme_table(results: Path, name: str, metric: str, *, ours: bool = False) -> str:
    """One metric of a table, methods down, under its caption; ``ours``: only what is measured."""
    grid = wide(pd.read_csv(results / "tables" / f"{name}.csv"), metric)
    if ours:
        grid = grid[~grid.map(lambda cell: cell[:1] in ("", "(")).all(axis=1)]
    note = (results / "tables" / f"{name}.md").read_text(encoding="utf-8").splitlines()[0]
    return f"{note}\n\n{markdown(grid)}"


def readme_own(results: Path) -> str:
    """Notebook 12's candidates on each category as if it were a person's own images."""
    rows = pd.read_csv(results / "tables" / "own_images.csv")
    best = rows[rows["recommended"] == 1].assign(candidate="**recommended**")
    rows = pd.concat([rows, best])
    grid = rows.pivot_table("image_auroc", "candidate", "category", sort=False)
    grid["average"] = grid.mean(axis=1, skipna=False)
    grid["ms an image"] = rows.groupby("candidate")["ms_an_image"].mean()
    grid = grid.map(lambda value: "" if pd.isna(value) else f"{value:.1f}")
    return markdown(grid.rename_axis("image AUROC, %"))


def readme_claims(results: Path) -> str:
    """How many claims of a profile have which verdict."""
    counts = pd.read_csv(results / "tables" / "claims.csv")["verdict"].value_counts()
    counts = counts.reindex(VERDICTS, fill_value=0).astype(str)
    return markdown(pd.DataFrame([counts], index=[results.name]).rename_axis("profile"))


def readme_minutes(results: Path) -> str:
    """What is in each notebook, and the longest that it took: with everything to train."""
    rows = {}
    for name, taken in json.loads((results / "minutes.json").read_text(encoding="utf-8")).items():
        path = ROOT / "notebooks" / f"{name}.ipynb"
        first = nbformat.read(path, 4).cells[0].source
        title, expect = first.splitlines()[0].lstrip("# "), first.partition("*Expect*: ")[2]
        link = f"[{title}](results/{results.name}/notebooks/{path.name})"
        rows[link] = {"what": re.split(r"[.;:]", expect)[0], "minutes": taken}
    return markdown(pd.DataFrame(rows).T.rename_axis("notebook"))


def filled_readme() -> str:
    """The README with its tables, between their markers, from the committed results."""
    results = ROOT / "results"
    found = {name: readme_results(results / name) for name in ("quick", "long")}
    lines = [f"- `{name}`: {line}\n" for name, part in found.items() for line in part]
    parts = {
        "results": "".join(lines),
        "long": readme_table(results / "long", "table1_image_level", "image_auroc", ours=True),
        "table1": readme_table(results / "quick", "table1_image_level", "image_auroc"),
        "own": readme_own(results / "quick"),
        "table2": readme_table(results / "quick", "table2_pixel_level", "pixel_auroc"),
        "claims": readme_claims(results / "quick"),
        "minutes": readme_minutes(results / "demo"),
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, part in parts.items():
        pattern = rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)"
        text = re.sub(pattern, lambda m, p=part: m[1] + p + m[2], text, flags=re.DOTALL)
    return text
