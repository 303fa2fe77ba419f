"""The report: what it says, and how it looks in a real browser, on the committed results."""

import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from cplib.__main__ import main
from cplib.figures import NAMES
from cplib.published import COLUMNS
from cplib.report import caption, embedded, narrow, read_table, write_page, write_report
from cplib.tables import TABLES
from cplib.workspace import ROOT

from browser import browser, needs_chromium

OPEN_ALL = "document.querySelectorAll('details').forEach(part => part.open = true)"
BOXES = """[...document.querySelectorAll('.scroll')].map(box => {
    box.scrollLeft = 1000;
    const [left, right] = (b => [b.left, b.right])(box.getBoundingClientRect());
    const sizes = [...box.querySelectorAll('th, td')].map(
        cell => parseFloat(getComputedStyle(cell).fontSize));
    const first = box.querySelector('tbody tr > :first-child').getBoundingClientRect().left;
    return {left, right, first, size: Math.min(...sizes), turns: getComputedStyle(box).overflowX};
})"""
REMOTE = "![badge](https://example.org/badge.svg)"
LARGEST = 6_000_000  # bytes of the start page
CLAIMS = (
    "id,claim,source,verdict,effect,low,high,margin,paper_effect,categories,seeds,"
    "compared,comparisons,weakest\n"
)


@pytest.fixture
def results(tmp_path) -> Path:
    """Results of our own making: a table, figures, a notebook that ran and one that failed."""
    folder = tmp_path / "results"
    for name in ("tables", "figures", "notebooks"):
        (folder / name).mkdir(parents=True)
    rows = [
        ("p_svdd", "bottle", "image_auroc", None, None, None, 98.6, None),
        ("cutpaste", "bottle", "image_auroc", 91.04, 0.5, 2, 99.2, 0.2),
        ("cutpaste", "bottle", "image_ap", 77.7, None, 1, None, None),
        ("cutpaste", "zipper", "image_auroc", None, None, None, 99.4, None),
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(folder / "tables" / "table1_image_level.csv", index=False)
    (folder / "tables" / "table1_image_level.md").write_text("Measured <quickly> & once.\n\nmore\n")
    for name in ("03_curve", "03_maps_bottle", "03_maps_zipper"):
        Image.linear_gradient("L").resize((1500, 300)).save(folder / "figures" / f"{name}.png")
    cells = [
        new_markdown_cell("# 03 Images <b> & more\n\nWhat is asked.\n\nMore."),
        new_markdown_cell("## A curve\n\nHow it *rises*."),
        new_code_cell(
            'save_figure(fig, workspace.results, "03_curve");',
            outputs=[new_output("execute_result", {"text/html": "<table><td>1</td></table>"})],
        ),
        new_markdown_cell(f"Where {REMOTE} it is, [{REMOTE}](https://example.org)or not:"),
        new_code_cell('save_figure(\n    fig, results, f"03_maps_{category}"\n)'),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "notebooks" / "03_images.ipynb")
    failed = new_notebook(metadata={"papermill": {"exception": True}})
    nbformat.write(failed, folder / "notebooks" / "04_pixels.ipynb")
    return folder


def soup_of(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def cells_of(table) -> list[list[str]]:
    return [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in table("tr")]


# What it says


def test_a_table_stands_with_ours_before_the_papers(results):
    tables = soup_of(write_report(results, "quick")).select("#tables table")
    assert cells_of(tables[0]) == [
        ["", "bottle"],
        [NAMES["p_svdd"], "(98.6)"],
        [NAMES["cutpaste"], "91.0±0.5 (99.2±0.2)"],
    ]
    assert cells_of(tables[1])[1:] == [[NAMES["cutpaste"], "77.7"]]


def test_only_what_was_measured_and_the_papers_average_are_shown(results):
    grid = read_table(results / "tables" / "table1_image_level.csv")["grids"]["Image AUROC, %"]
    assert "zipper" not in {*grid.index, *grid.columns}


def test_the_settings_of_tables_7_and_8_are_named_in_words():
    names = ["cutpaste_3way[learning_rate=0.1]", "cutpaste_3way[max_area=0.3]", "cutpaste_3way"]
    grid = narrow(pd.DataFrame([["1"] * 3], columns=names, index=["average_all"]))
    assert [*grid.index] == ["learning rate 0.1", "max area 0.3", NAMES["cutpaste_3way"]]
    assert [*grid.columns] == ["average all"]


def test_what_is_missing_is_left_out_and_named_once(results):
    page = soup_of(write_report(results, "quick"))
    assert [h.get_text() for h in page.select("#tables h3")] == ["Table 1: image level"]
    line = next(p.get_text() for p in page.select("#tables p") if "Not in these" in p.get_text())
    for number in range(2, 9):
        assert f"Table {number}: " in line
    assert "Table 1" not in line
    assert "no claim" in page.select_one("#claims").get_text()


def test_results_that_hold_nothing_make_a_page_that_says_so(tmp_path):
    page = soup_of(write_report(tmp_path, "demo"))
    assert page.select("table, img") == []
    for section in ("tables", "claims", "figures", "notebooks"):
        assert "Not in these results" in page.select_one(f"#{section}").get_text()
    assert "no numbers for it" in page.header.get_text()


def test_a_table_without_one_measured_cell_says_so(results):
    path = results / "tables" / "table1_image_level.csv"
    pd.read_csv(path).assign(mean=None).to_csv(path, index=False)
    assert "Nothing of it is measured" in soup_of(write_report(results, "quick")).get_text()


def test_text_is_escaped(results):
    text = write_report(results, "quick").read_text()
    assert "Measured &lt;quickly&gt; &amp; once." in text
    assert "03 Images &lt;b&gt; &amp; more" in text
    line = "x,<script>alert(1)</script>,<i>T,reproduced,1,0,2,,3,4,1,1,1,\n"
    (results / "tables" / "claims.csv").write_text(CLAIMS + line)
    page = soup_of(write_report(results, "quick"))
    assert page.select("script, i") == []
    assert page.select_one(".claims tbody th").get_text() == "<script>alert(1)</script>"


def test_the_claims_stand_with_their_verdicts_and_are_counted(results):
    lines = [
        "a,A is best.,Table 1,reproduced,2.345,1,4,,2,3,1,1,1,\n",
        "b,B is best.,Table 2,not reproduced,-3,-4.5,-1,,,3,2,1,1,\n",
        "c,C is best.,Table 3,not measured,,,,,,0,0,0,1,\n",
    ]
    (results / "tables" / "claims.csv").write_text(CLAIMS + "".join(lines))
    section = soup_of(write_report(results, "quick")).select_one("#claims")
    assert "1 reproduced, 1 not reproduced, 0 inconclusive, 1 not measured" in section.p.get_text()
    rows = cells_of(section.table)[1:]
    assert [row[:3] for row in rows] == [
        ["A is best.", "Table 1", "reproduced"],
        ["B is best.", "Table 2", "not reproduced"],
        ["C is best.", "Table 3", "not measured"],
    ]
    assert [row[3] for row in rows] == ["+2.3 [+1.0, +4.0]", "-3.0 [-4.5, -1.0]", ""]
    marks = [cell["class"] for cell in section.select("td.verdict")]
    assert marks == [["verdict", mark] for mark in ("reproduced", "not-reproduced", "not-measured")]


def test_figures_stand_under_their_notebook_with_the_text_above_the_cell(results):
    section = soup_of(write_report(results, "quick")).select_one("#figures")
    assert section.h3.get_text() == "03 Images <b> & more"
    first, second = section.select("figure")
    assert first.figcaption.get_text().split() == ["A", "curve", "How", "it", "rises."]
    assert len(second.select("img")) == 2  # of one loop: one caption
    alts = [image["alt"] for image in section.select("img")]
    assert alts == [
        f"A curve ({name})" for name in ("03_curve", "03_maps_bottle", "03_maps_zipper")
    ]


def test_the_longest_name_that_fits_gives_the_caption():
    cells = [
        new_markdown_cell("## Few"),
        new_code_cell('save_figure(fig, r, "00_data")'),
        new_markdown_cell("## Small"),
        new_code_cell('save_figure(fig, r, "00_data_small")'),
    ]
    assert [caption(n, cells)[0] for n in ("00_data", "00_data_small")] == ["Few", "Small"]
    assert caption("01_other", cells)[0] == ""


def test_pictures_are_scaled_down_and_keep_their_shape(results):
    source, size = embedded(results / "figures" / "03_curve.png")
    assert size == (1100, 220)
    assert source.startswith("data:image/webp;base64,")


def test_a_notebook_is_listed_with_its_page_and_a_failed_one_marked(results):
    items = soup_of(write_report(results, "quick")).select("#notebooks li")
    assert [item.a["href"] for item in items] == [
        "../notebooks/03_images.html",
        "../notebooks/04_pixels.html",
    ]
    assert ["failed" in item.get_text() for item in items] == [False, True]
    assert "What is asked." in items[0].get_text()


def test_a_page_is_made_where_it_is_missing_or_older_than_its_notebook(results):
    source = results / "notebooks" / "03_images.ipynb"
    page = write_page(source)
    page.write_text("kept")
    assert write_page(source).read_text() == "kept"
    source.write_text(source.read_text())
    assert "A curve" in write_page(source).read_text()


def test_a_page_leaves_out_pictures_from_elsewhere(results):
    page = soup_of(write_page(results / "notebooks" / "03_images.ipynb"))
    assert page.select("img, script, link") == []
    assert "Where  it is, or not:" in page.get_text()


def test_the_command_prints_the_path(results, capsys):
    assert main(["report", "--profile", "quick", "--results", str(results)]) == 0
    out = capsys.readouterr().out.strip()
    assert Path(out) == results / "report" / "index.html"


@pytest.mark.parametrize("options", [["--profile", "nonsense"], ["--results", "no/such/place"]])
def test_the_command_refuses_what_is_not_there_in_one_line(capsys, options):
    assert main(["report", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert options[1] in lines[0]


def test_a_file_that_is_no_table_is_named(results, capsys):
    (results / "tables" / "table2_pixel_level.csv").write_text("a,b\n1,2\n")
    assert main(["report", "--profile", "quick", "--results", str(results)]) == 2
    assert "table2_pixel_level.csv" in capsys.readouterr().err


# The committed results, in a browser


@pytest.fixture(scope="module", params=["demo", "quick"])
def committed(request, tmp_path_factory) -> Path:
    """A copy of a profile's committed results, with its report."""
    source, folder = ROOT / "results" / request.param, tmp_path_factory.mktemp(request.param)
    skip = shutil.ignore_patterns("runs", "checkpoints", "report", "*.html", "*.pdf")
    shutil.copytree(source, folder, ignore=skip, dirs_exist_ok=True)
    write_report(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def pages(results: Path) -> list[Path]:
    return [results / "report" / "index.html", *sorted(results.glob("notebooks/*.html"))]


def test_every_table_and_figure_of_the_results_appears(committed):
    page = soup_of(pages(committed)[0])
    for path in (committed / "tables" / f"{name}.csv" for name in TABLES):
        assert page.select_one(f"#{path.stem}")
        measured = pd.read_csv(path).dropna(subset="mean")
        shown = page.select_one("#tables").get_text()
        assert all(f"{value:.1f}" in shown for value in measured["mean"])
    shown = {Path(link["href"]).stem for link in page.select("#figures a")}
    assert shown == {path.stem for path in committed.glob("figures/*.png")}
    assert pages(committed)[0].stat().st_size < LARGEST
    assert len(pages(committed)) == 1 + len(list(committed.glob("notebooks/*.ipynb")))


def test_every_link_leads_somewhere(committed):
    targets = {path: soup_of(path) for path in pages(committed)}
    for path, page in targets.items():
        for link in page.select("a[href]"):
            file, _, anchor = link["href"].partition("#")
            if file.startswith("https://"):
                continue
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), f"{path.name}: {link['href']}"
            assert not anchor or targets[target].find(id=anchor), link["href"]


@needs_chromium
def test_every_page_opens_without_a_network_or_an_error_and_fits_a_phone(page, committed):
    for path in pages(committed):
        page.resize(1200)
        page.open(path.as_uri())
        widths = page.js("[...document.images].map(image => image.naturalWidth)")
        assert all(width > 0 for width in widths), path.name
        assert page.errors == [], path.name
        assert {url.split(":")[0] for url in page.requests} <= {"file", "data"}, path.name
        page.resize(400)
        page.js(OPEN_ALL)
        assert page.js("document.documentElement.scrollWidth") <= 400, path.name


@needs_chromium
def test_the_tables_can_be_read_on_a_phone(page, committed):
    page.resize(400)
    page.open(pages(committed)[0].as_uri())
    page.js(OPEN_ALL)
    boxes = page.js(BOXES)
    assert len(boxes) == len(soup_of(pages(committed)[0]).select("table"))
    for box in boxes:
        assert box["turns"] == "auto"
        assert box["left"] >= 0
        assert box["right"] <= 400
        assert box["size"] >= 12
        assert box["first"] == pytest.approx(box["left"], abs=1)  # a row's name stays in sight


@needs_chromium
def test_light_and_dark_follow_the_reader(page, committed):
    colours = {}
    for dark in (False, True):
        page.resize(1200, dark=dark)
        page.open(pages(committed)[0].as_uri())
        style = page.js("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        colours[dark] = [np.mean([int(n) for n in re.findall(r"\d+", c)[:3]]) for c in style]
    assert colours[False][0] + 100 < colours[False][1]
    assert colours[True][1] + 100 < colours[True][0]
