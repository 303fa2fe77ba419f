"""What is committed in ``results``: tables and README are those of the stored runs."""

import re
import subprocess

import pandas as pd
import pytest
from PIL import Image

from cplib.apps import pages, readme
from cplib.apps.workspace import ROOT
from cplib.study import figures
from cplib.study.claims import measured, save_claims, verdicts
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.report import compare
from cplib.study.store import Places, run_folder
from cplib.study.tables import TABLES, planned, values
from cplib.study.workspace import Workspace

STORED = sorted({path.parents[1] for path in ROOT.glob("results/*/runs/*") if path.is_dir()})


@pytest.mark.parametrize("results", STORED, ids=lambda path: path.name)
def test_committed_tables_are_made_of_the_committed_runs(results, tmp_path):
    if results.name not in PROFILES:
        pytest.skip("results of another data set")
    (tmp_path / "runs").symlink_to(results / "runs")
    profile = PROFILES[results.name]
    workspace = Workspace(profile, profile.categories, Places(tmp_path))
    for name in TABLES:
        compare(workspace, name, values(workspace, name))
    save_claims(verdicts(measured(workspace)), workspace)
    made = {path.name: path for path in (tmp_path / "tables").iterdir()}
    stored = [path for path in (results / "tables").iterdir() if path.name in made]
    assert stored
    for path in stored:
        assert made[path.name].read_text() == path.read_text(), path.name


def test_categories_with_other_images_are_empty_and_all_others_are_shown(tmp_path):
    """As where a person's folder has bottle alone, with images that are not ours."""
    (tmp_path / "runs").symlink_to(ROOT / "results" / "quick" / "runs")
    for folder in ("train/good", "test/good", "test/broken"):
        (tmp_path / "data" / "bottle" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "bottle" / folder / "0.png")
    places = Places(tmp_path, tmp_path / "data")
    workspace = Workspace(PROFILES["quick"], ("bottle",), places)
    for name in ("table1_image_level", "table2_pixel_level"):
        measured = compare(workspace, name, values(workspace, name)).dropna(subset="mean")
        assert {"pill", "screw", "transistor"} <= {*measured["category"]}
        assert "bottle" not in {*measured["category"]}
    runs = planned(workspace, "table1_image_level")
    (line,) = workspace.remarks(runs)
    assert " stored runs of bottle were measured on other images" in line
    assert {run.category for run in workspace.missing(runs)} == {"bottle"}


@pytest.mark.parametrize("name", ["quick", "demo"])
def test_a_profiles_page_is_made_of_its_tables_and_figures(name):
    results = ROOT / "results" / name
    text = (results / "README.md").read_text(encoding="utf-8")
    assert text.endswith(pages.overview(results))
    broken = [x for x in re.findall(r"\]\(([^):#]+)[)#]", text) if not (results / x).exists()]
    assert not broken


NUMBERS = "3.11 7 6 5 20 50 64 256 5.3 10.6 2.0 4.0 256x256 128 2021 12 18 1 2 3 4"
NUMBERS += " 66.7 95 15 16 02 03 04 05 06 08 09 11 13"  # none of them is a result


def test_every_number_of_the_readme_is_looked_up_in_the_records():
    same = ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "results"]
    if subprocess.run(same, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("results were measured anew here: README shows the committed ones")
    template = readme.TEMPLATE.read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(template) == text
    assert len(text.splitlines()) <= 160
    by_hand = re.sub(r"\{\{.+?\}\}|```.+?```|\]\(.+?\)|`.+?`", "", template, flags=re.DOTALL)
    assert {*re.findall(r"(?<![\w])\d[\d.,x]*\d|\b\d\b", by_hand)} <= {*NUMBERS.split()}


def test_the_documentations_links_lead_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("docs/[a-z]*.md")):
        links = re.findall(r"\]\(([^):#]+)\)", page.read_text(encoding="utf-8"))
        assert not [x for x in links if not (page.parent / x).exists()], page


def test_the_results_figure_shows_the_numbers_of_table_1():
    table = pd.read_csv(ROOT / "results" / "quick" / "tables" / "table1_image_level.csv")
    axes = figures.every_category(table).axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    columns = {"paper": "published_mean", "ours": "mean", "features": "mean", "network": "mean"}
    methods = ("cutpaste_3way", "cutpaste_3way", "pretrained", "untrained")
    cells = table[table["metric"] == "image_auroc"].set_index(["method", "category"])
    marks = [line for line in axes.lines if line.get_label().split()[-1] in columns]
    assert len(marks) == 4 and names[-1] == "mean"
    for line, method in zip(marks, methods, strict=True):
        column = columns[line.get_label().split()[-1]]
        expected = cells.loc[method].loc[names[:-1], column]
        assert line.get_ydata() == pytest.approx([*expected, expected.mean()])


REAL = ROOT.parent / "shared" / "mvtec256"


@pytest.mark.skipif(not REAL.is_dir(), reason="no MVTec AD images in ../shared/mvtec256")
def test_stored_runs_count_for_the_images_that_they_were_measured_on():
    quick = PROFILES["quick"]
    workspace = Workspace(quick, ("bottle",), Places(ROOT / "results" / "quick", REAL))
    runs = quick.runs((METHOD,), ("bottle",))
    stored = [run for run in runs if run_folder(run, workspace.results).exists()]
    assert len(stored) > 1 and list(workspace.finished(runs)) == stored
