"""What is committed in ``results``: tables and README are those of the stored runs."""

import re

import pytest
from PIL import Image

from cplib.apps import pages
from cplib.apps.workspace import ROOT
from cplib.study.claims import measured, save_claims, verdicts
from cplib.study.profiles import PROFILES
from cplib.study.store import Places
from cplib.study.sweep import Workspace
from cplib.study.tables import TABLES, compare, planned, values_of

STORED = sorted({path.parents[1] for path in ROOT.glob("results/*/runs/*") if path.is_dir()})


@pytest.mark.parametrize("results", STORED, ids=lambda path: path.name)
def test_committed_tables_are_made_of_the_committed_runs(results, tmp_path):
    if results.name not in PROFILES:
        pytest.skip("results of another data set")
    (tmp_path / "runs").symlink_to(results / "runs")
    profile = PROFILES[results.name]
    workspace = Workspace(profile, profile.categories, Places(tmp_path, read_only=True))
    for name in TABLES:
        compare(workspace, name, values_of(workspace, name))
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
    places = Places(tmp_path, tmp_path / "data", read_only=True)
    workspace = Workspace(PROFILES["quick"], ("bottle",), places)
    for name in ("table1_image_level", "table2_pixel_level"):
        measured = compare(workspace, name, values_of(workspace, name)).dropna(subset="mean")
        assert {"pill", "screw", "transistor"} <= {*measured["category"]}
        assert "bottle" not in {*measured["category"]}
    runs = planned(workspace, "table1_image_level")
    assert " stored runs of bottle were measured on other images" in workspace.outdated(runs)
    assert {run.category for run in workspace.missing(runs)} == {"bottle"}


@pytest.mark.parametrize("name", ["quick", "long", "demo"])
def test_a_profiles_page_is_made_of_its_tables_and_figures(name):
    results = ROOT / "results" / name
    text = (results / "README.md").read_text(encoding="utf-8")
    assert pages.overview(results) == text
    for link in re.findall(r"\]\(((?:notebooks|figures)/[^)]+)\)", text):
        assert (results / link).exists(), link


def test_the_readmes_tables_are_those_of_the_results():
    assert pages.filled_readme() == (ROOT / "README.md").read_text(encoding="utf-8")


REAL = ROOT.parent / "shared" / "mvtec256"


@pytest.mark.skipif(not REAL.is_dir(), reason="no MVTec AD images in ../shared/mvtec256")
def test_stored_runs_count_for_the_images_that_they_were_measured_on():
    quick = PROFILES["quick"]
    workspace = Workspace(quick, ("bottle",), Places(ROOT / "results" / "quick", REAL))
    runs = workspace.runs(("cutpaste_3way",), ("bottle",))
    assert workspace.finished(runs) == runs
