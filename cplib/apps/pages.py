"""A profile's executed notebooks as pages, and its tables and figures as Markdown."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from cplib.datasets import DATASETS, write_text
from cplib.run import BASELINES
from cplib.study.claims import COLUMNS, summary
from cplib.study.profiles import PROFILES
from cplib.study.report import by_metric, protocol, read_table, result
from cplib.study.store import Places
from cplib.study.tables import METHOD, NAMES, TABLES
from cplib.study.workspace import Workspace

SUMMARY = "03_every_category.png"
PLUMBING = {"hide-input", "parameters", "injected-parameters"}  # tags of cells whose code is hidden
WHAT = """[CutPaste](https://arxiv.org/abs/2104.04015) finds defects in images without having seen a
defect. A network learns to tell normal images from images into which a patch of themselves was
pasted. A Gaussian of its features of normal images then scores a new image: the farther it lies
from them, the more anomalous it is. AUROC is how often an anomalous image (or pixel) has a higher
score than a normal one; 50 % is chance."""
OTHERS = {  # further tables of a notebook
    "11": {"claims": "All claims and their answers"},
    "09": {"schedule_choice": "How the short schedule was chosen"},
}
# Wide tables and code scroll by themselves on a phone; at night the page is dark, figures are not.
STYLE = """<style>
body { max-width: 62rem; margin: 0 auto !important; padding: 0 .6rem; }
.jp-RenderedHTMLCommon { overflow-x: auto; }
.jp-RenderedHTMLCommon :is(pre, details) { margin: .6em 0 1em; overflow-x: auto; }
.jp-RenderedMarkdown pre { white-space: pre !important; }
.jp-mod-noOutputs:is(.celltag_hide-input, .celltag_parameters, .celltag_injected-parameters) {
  display: none;
}
.jp-OutputArea-output pre { word-break: normal; overflow-wrap: anywhere; }
tr > :first-child { position: sticky; left: 0; background: white; }
img { max-width: 100%; height: auto; }
@media (max-width: 40rem) {
  .jp-OutputArea-output { overflow-x: auto; }
  img:not(.math) { max-width: 44rem; }
}
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
            write_text(page, _page(_with_link_back(nbformat.read(path, 4)), path.stem))
    text = overview(results)
    write_text(results / "README.md", f"[\u2190 README](../../README.md)\n\n{text}")
    index = results / "index.html"
    cell = nbformat.v4.new_markdown_cell(text)
    write_text(index, _page(nbformat.v4.new_notebook(cells=[cell]), f"Profile {results.name}"))
    return index


def executed(results: Path) -> list[Path]:
    """The executed notebooks that ran to their ends."""
    found = sorted(results.glob("notebooks/[0-9][0-9]_*.ipynb"))
    return [path for path in found if not path.stem.endswith(".failed")]


def _with_link_back(notebook):
    """The notebook with a link to the first page, and without Colab's badge: an image elsewhere."""
    first = notebook.cells[0]
    lines = [line for line in first.source.splitlines() if not line.startswith("[![")]
    first.source = "\n".join(["[\u2190 all results](../index.html)\n", *lines])
    return notebook


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
    """What CutPaste is, the findings and the protocol, then each notebook's tables and figures."""
    workspace, profile = workspace_of(results), PROFILES.get(results.name.partition("-")[0])
    about = f"{profile.about} (`{results.name}`)" if profile else results.name
    parts = [f"# CutPaste: {about}", WHAT]
    if (results / "figures" / SUMMARY).exists():
        parts.append(f"![Image AUROC in each category and on average](figures/{SUMMARY})")
    parts += ["## Findings", *_findings(results)]
    drawn = (results, results.parent / "demo")
    pipeline = [f"../{x.name}" for x in drawn if (x / "figures/04_pipeline.png").exists()]
    parts += [f"![Training and scoring]({x}/figures/04_pipeline.png)" for x in pipeline[:1]]
    if workspace and (text := protocol(workspace)):
        parts += ["## Protocol of Table 1, and the images", text]
    for path in executed(results):
        notebook = nbformat.read(path, 4)
        number, title = path.stem[:2], notebook.cells[0].source.splitlines()[0]
        parts.append(f"## [{title.lstrip('# ')}](notebooks/{path.name})")
        names = [name for name, table in TABLES.items() if table.notebook == number]
        own = profile.sensitivity["protocol"] if profile else {}
        if own and any(TABLES[name].axes for name in names):
            changed = ", ".join(f"{field} {value}" for field, value in own.items())
            parts.append(f"The networks had another schedule than those of Table 1: {changed}.")
        parts += [_table(results, name) for name in names]
        parts += [
            f"[{words}](tables/{name}.md)"
            for name, words in OTHERS.get(number, {}).items()
            if (results / "tables" / f"{name}.md").exists()
        ]
        for figure, caption in _figures(results, notebook, number).items():
            parts.append(f"![{caption}](figures/{figure})\n\n*{caption}*")
    return "\n\n".join(parts) + "\n"


def workspace_of(results: Path) -> Workspace | None:
    """The profile of a folder of results such as "quick" or "quick-demo", to be read alone.

    None for a data set whose categories are not known without its images.
    """
    name, _, dataset = results.name.partition("-")
    if name not in PROFILES or (dataset and not DATASETS[dataset].categories):
        return None
    profile = PROFILES[name]
    if dataset:
        profile = replace(profile, dataset=dataset, categories=DATASETS[dataset].categories)
    return Workspace(profile, profile.categories, Places(results))


def _table(results: Path, name: str) -> str:
    """A table's heading, its result in a sentence, the first metric; the others are folded."""
    heading = re.sub(r"Table(\d)", r"Table \1:", name.capitalize()).replace("_", " ")
    table = read_table(results, name)
    parts = [f"### {heading}", result(table, name)]
    ours = table[table.groupby("category")["mean"].transform("count") > 0]
    ours = ours.assign(stderr=np.nan, published_stderr=np.nan)  # no wider than a page
    if len(ours):
        beside = ", in brackets the paper's" if ours["published_mean"].notna().any() else ""
        more = f"Ours{beside}. [With standard errors and how it was measured](tables/{name}.md)"
        parts += [by_metric(ours), f"{more}."]
    return "\n\n".join(part.strip() for part in parts)


def _figures(results: Path, notebook, number: str) -> dict[str, str]:
    """The figures of a notebook in its order, each with the first sentence above it."""
    found, caption = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            caption = re.split(r"(?<=\.)\s", cell.source.split("\n\n")[-1])[0].rstrip(":")
        for name, more in re.findall(rf'"({number}_[^"{{]*)({{?)', cell.source):
            for path in sorted(results.glob(f"figures/{name}{'*' if more else ''}.png")):
                own = path.stem.removeprefix(name) if more else ""
                found.setdefault(path.name, f"{own}: {caption}" if own else caption)
    found.pop(SUMMARY, None)  # stands above
    return found


def _findings(results: Path) -> list[str]:
    """Two averages beside their nulls and the paper's, and how many claims have which answers."""
    found, file = averages(results), results / "tables" / "claims.csv"
    if file.exists() and {*COLUMNS} <= {*(claims := pd.read_csv(file))}:
        found.append(summary(claims))  # an older version's file lacks columns
    return found or ["Nothing is measured yet."]


def averages(results: Path) -> list[str]:
    """A sentence on Table 1's average and one on Table 2's, where they are measured."""
    found = []
    for name, method in (("table1_image_level", METHOD), ("table2_pixel_level", f"{METHOD}_patch")):
        table = read_table(results, name)
        table = table[table["metric"] == TABLES[name].metrics[0]]
        for average in ("average_all", "average_measured"):
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
    kind, n, seeds = table["metric"].iloc[0][:5], len(cells), int(part["seeds"][method])
    text = f"**{NAMES[method]}: {ours:.1f} % {kind} AUROC**, the mean of {n} categories"
    text += f" ({seeds} seed{'s' * (seeds > 1)})."
    text += "" if pd.isna(theirs) else f" The paper reports {theirs:.1f} % for the same categories."
    beside = []
    for name in BASELINES:
        both = cells[[method, name]].dropna()
        few = f" (on {len(both)} of them, where it has {both[method].mean():.1f} %)"
        if len(both):
            beside.append(f"{NAMES[name]} {both[name].mean():.1f} %{few if len(both) < n else ''}")
    return f"{text} Without CutPaste's training: {', '.join(beside) or 'not measured'}."
