"""The pages of a results folder: its README and its notebooks, to be read without a network."""

import os

import nbformat
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from cplib.apps.pages import write_pages
from cplib.study import figures
from cplib.study.claims import save_claims, verdicts
from cplib.study.profiles import PROFILES
from cplib.study.report import against_paper, save_table
from cplib.study.store import Places
from cplib.study.workspace import Workspace

T1, T2 = "table1_image_level", "table2_pixel_level"
NOTEBOOKS = ("03_image_level_table", "05_pretrained_vs_finetuned")


@pytest.fixture
def results(tmp_path):
    """The folder of a profile: two tables, claims, a figure, and notebooks, one of which failed."""
    folder = tmp_path / "results" / "quick"
    workspace = Workspace(PROFILES["quick"], ("bottle",), Places(folder))
    for name, method, value in ((T1, "cutpaste", 91.04), (T2, "cutpaste_3way_patch", 77.77)):
        metric = name[7:12] + "_auroc"
        row = {"method": method, "category": "bottle", "seed": 0, metric: value}
        options = {"rows": [(method, "", "")], "metrics": (metric,)}
        table = against_paper(pd.DataFrame([row]), name, **options)
        save_table(table, folder, name, "Measured once.")
    save_claims(verdicts({}), workspace)
    for name in ("figures", "notebooks"):
        (folder / name).mkdir()
    for name in ("03_curve_b", "03_curve_a", "03_before", "04_pipeline", "03_left_over"):
        (folder / "figures" / f"{name}.png").write_bytes(b"")
    output = new_output("execute_result", {"text/html": "<table><td>91</td></table>"})
    badge = "[![Badge](https://example.org/badge.svg)](https://example.org)"
    first = new_markdown_cell(
        f"# A title, $a^2$\n\n{badge}\n\n$$\\frac{{a}}{{b}}$$\n\n"
        "*Expect*: a fraction. [next](04_next.ipynb)"
    )
    hidden = new_code_cell("import plumbing", metadata={"tags": ["hide-input"]})
    cells = [first, hidden, new_code_cell("table", outputs=[output])]
    cells += [new_markdown_cell("A heading.\n\nTwo curves. And more:")]
    cells += [new_code_cell('save(fig, f"03_curve_{x}")'), new_code_cell('save(fig, "03_before")')]
    for name in (*NOTEBOOKS, "04_pixel_level_table.failed"):
        nbformat.write(new_notebook(cells=cells), folder / "notebooks" / f"{name}.ipynb")
    return folder


def test_the_overview_has_findings_first_then_each_notebooks_tables_and_figures(results):
    index = write_pages(results)
    text = (results / "README.md").read_text()
    assert text.startswith("[← README](../../README.md)\n\n# CutPaste: MVTec AD,")
    assert text.index("## Findings\n") < text.index("(../quick/figures/04_pipeline.png)")
    assert "**CutPaste-3way (patch): 77.8 % pixel AUROC**" in text
    assert "The paper's 25 claims here: 0 decided" in text
    start = "## [A title, $a^2$](notebooks/"
    image, finetuned = text.split(f"{start}03")[1].split(f"\n{start}05")
    assert "| CutPaste | 91.0 (99.2) |" in image  # bottle; errors stand in the table's own file
    order = ("### Table 1: image level", "curve_a.png", "curve_b.png", "before.png")
    assert sorted(order, key=image.index) == list(order)  # as in the notebook, after its tables
    captions = [image.count(f"*{words}Two curves.*") for words in ("a: ", "b: ", "")]
    assert captions == [1, 1, 1] and "left_over" not in text
    assert "Nothing is measured yet." in finetuned
    assert "notebooks/04" not in text  # failed
    page = BeautifulSoup(index.read_text(), "html.parser")
    links = [tag["href"] for tag in page.select("h2 a[href^=notebooks]")]
    assert links == [f"notebooks/{name}.html" for name in NOTEBOOKS]
    (results / "empty").mkdir()
    write_pages(results / "empty")
    assert "Nothing is measured yet." in (results / "empty" / "README.md").read_text()
    results.rename(results.with_name("quick-own"))  # a data set of unknown categories
    assert "Protocol" not in write_pages(results.with_name("quick-own")).read_text()


def test_every_notebook_has_a_page_that_opens_without_a_network(results):
    write_pages(results)
    assert {path.stem for path in results.glob("notebooks/*.html")} == set(NOTEBOOKS)
    for path in results.glob("notebooks/*.html"):
        page = BeautifulSoup(path.read_text(), "html.parser")
        asked = page.head.select("script[src], link[href], img[src]")
        assert not [tag for tag in asked if "//" in (tag.get("src") or tag.get("href") or "")]
        styles = " ".join(tag.get_text() for tag in page.select("style"))
        assert not [part for part in styles.split("url(")[1:] if part.lstrip("\"'")[:4] == "http"]
        assert "@import" not in styles
        assert page.select_one("h1").get_text().startswith("A title")
        assert not page.select('img[src^="http"]')
        assert page.select_one("td").get_text() == "91"
        assert page.select_one("img.math")["src"].startswith("data:image/svg+xml")
        assert page.select_one('a[href="04_next.html"]')
        assert page.select_one('a[href="../index.html"]')
        assert "plumbing" not in page.body.get_text()


def test_a_page_is_made_again_only_when_its_notebook_is_newer(results):
    write_pages(results)
    notebook = results / "notebooks" / f"{NOTEBOOKS[0]}.ipynb"
    page = notebook.with_suffix(".html")
    page.write_text("kept")
    write_pages(results)
    assert page.read_text() == "kept"
    os.utime(notebook, ns=(page.stat().st_mtime_ns + 1,) * 2)
    write_pages(results)
    assert "A title" in page.read_text()


def test_a_close_up_shows_what_was_pasted_wherever_it_lies():
    normal = torch.zeros(3, 64, 96)
    for y, x in ((0, 0), (30, 40), (62, 94)):
        image = normal.clone()
        image[:, y : y + 2, x : x + 2] = 1
        part = figures.close_up(image, normal)
        assert part.shape == (3, 16, 24) and part.sum() == image.sum()
