"""The tables of the study: what is planned, read from the records, and written."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from cplib.study import report
from cplib.study.paper import ROW, published
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.report import compare, protocol, result
from cplib.study.store import Places, run_folder
from cplib.study.synthetic import SIDE, SYNTHETIC
from cplib.study.tables import TABLES, curves, plan, planned, rows_of, values
from cplib.study.workspace import Workspace

from records import official, record

PAPER, QUICK = PROFILES["paper"], PROFILES["quick"]
STUDIES = [name for name in TABLES if TABLES[name].axes and name != "unstated_choices"]
AXES = (*STUDIES, "unstated_choices")
CONTRACT = ["category", "metric", "mean", "stderr", "seeds", "published_mean", "published_stderr"]


def workspace_of(name, results, *categories, seeds=None):
    profile = PROFILES[name]
    return Workspace(profile, categories or profile.categories, Places(results), seeds)


# What is planned


def changes(profile, name):
    """What each row of a table along settings changes."""
    rows = {row.cell[1:]: row.changes for row in rows_of(profile, name)}
    return {k: {n: v for n, v in fields.items() if n != "curve"} for k, fields in rows.items()}


@pytest.mark.parametrize("name", STUDIES)
def test_the_papers_profile_has_the_papers_rows_of_five_seeds_and_every_category(tmp_path, name):
    rows = published(name).query("category == 'average_all'")[ROW]
    assert {row.cell for row in rows_of(PAPER, name)} == {*map(tuple, rows.to_numpy())}
    entries = plan(workspace_of("paper", tmp_path), name)
    cells = {(row.cell, run.category, run.seed) for row, run in entries}
    assert len(cells) == len(entries) == len(rows) * 15 * 5


def test_values_are_multiples_of_the_protocols_own_where_they_are_relative():
    first, second = (changes(PAPER, name) for name in STUDIES)
    own = PAPER.run(METHOD, "screw", protocol="sensitivity")
    assert first["updates", "1.5"] == {"updates": 1.5 * own.updates}
    assert first["learning_rate", "0.333"] == {"learning_rate": pytest.approx(0.01)}
    assert first["learning_rate", "3.33"] == {"learning_rate": 0.1}
    assert changes(QUICK, STUDIES[0])["learning_rate", "0.1"] == {"learning_rate": 0.0001}
    assert second["patch_jitter", "0.3"] == {"patch_jitter": 0.3}
    assert second["max_area", "0.2"] == {"area": (0.02, 0.2)}


@pytest.mark.parametrize(("name", "fewest"), [("smoke", 5), ("demo", 5), ("quick", 22)])
def test_the_run_that_changes_nothing_stands_on_every_axis_and_is_one(tmp_path, name, fewest):
    workspace = workspace_of(name, tmp_path)
    assert len(planned(workspace, *STUDIES)) == fewest
    bases = []
    for study in STUDIES:
        entries = plan(workspace, study)
        unchanged = [run for row, run in entries if not row.changes]
        assert len(unchanged) == 2 * len({*unchanged})  # on both axes
        assert not any(run.curve for row, run in entries if row.changes)
        bases.append({*unchanged})
    assert bases[0] == bases[1]
    if not workspace.profile.sensitivity["protocol"]:  # then they are Table 1's
        assert bases[0] <= set(planned(workspace, "table1_image_level"))


def test_a_network_has_one_run_for_each_way_of_scoring_and_all_measures_of_every_table(tmp_path):
    wanted = planned(workspace_of("demo", tmp_path))
    assert len({run.id for run in wanted}) == len(wanted)
    first = PROFILES["demo"].run(METHOD, "sieve")
    assert wanted[first] == [
        *("gradcam", "synthetic-20", "density", "features", "gradcam_copies"),
    ]
    others = [PROFILES["demo"].run(METHOD, "sieve", protocol=p) for p in ("patch", "finetune")]
    assert [wanted[run] for run in others] == [["maps"], ["level7"]]
    assert wanted[replace(first, seed=1)] == ["gradcam", "synthetic-20", "density", "features"]


def test_a_study_takes_the_categories_that_the_profile_names_or_the_first_to_execute(tmp_path):
    workspace = workspace_of("quick", tmp_path, "screw", "tile", seeds=2)
    for name in AXES:
        shown = planned(workspace, name)
        assert {run.category for run in shown} == {"tile", "transistor"}
        assert {(run.category, run.seed) for run in workspace.missing(shown)} == {
            ("tile", 0),
            ("tile", 1),
        }
    other = workspace_of("demo", tmp_path, "fabric", "brick")
    for name in AXES:
        assert {run.category for run in planned(other, name)} == {"sieve", "fabric"}


def test_seeds_of_a_study_that_were_measured_before_are_shown_in_every_row(tmp_path):
    workspace = workspace_of("quick", tmp_path)
    entries = plan(workspace, STUDIES[1])
    bases = {run for row, run in entries if not row.changes}
    changed = next(run for row, run in entries if row.changes)
    for run in bases:  # as Table 1's
        record(tmp_path, replace(run, seed=1))
    assert {run.seed for run in planned(workspace, STUDIES[1])} == {0}
    record(tmp_path, replace(changed, seed=1))
    entries = plan(workspace, STUDIES[1])
    assert len(entries) == 2 * len({row.cell for row, _ in entries}) * len(bases)


def test_the_unstated_choices_hold_our_own_and_belong_to_two_categories(tmp_path):
    workspace = workspace_of("paper", tmp_path)
    entries = plan(workspace, "unstated_choices")
    own = {PAPER.run(METHOD, c, protocol="sensitivity") for c in ("screw", "transistor")}
    assert {row.cell[1:] for row, run in entries if run in own} == {
        ("head", "512-128"),
        ("translate", "0.125"),
        ("jitter", "0.1-0.1-0.1-0"),
    }
    heads = {row.value for row in rows_of(PAPER, "unstated_choices") if row.setting == "head"}
    assert heads == {"linear", "512-128", "8x512-128"}
    assert {run.category for _, run in entries} == {"screw", "transistor"}
    assert {run.seed for _, run in entries} == {*range(5)}


# What is written


@pytest.fixture
def quick(tmp_path):
    """Made-up finished runs: AUROC 80 for what changes nothing, one more for each further row."""
    workspace = workspace_of("quick", tmp_path, "tile", "transistor")
    for name in AXES:
        for i, run in enumerate(planned(workspace, name)):
            if not run_folder(run, tmp_path).exists():
                record(tmp_path, run, 80 + i // 2)
    return workspace


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STUDIES)
def test_tables_7_and_8_have_setting_and_value_and_the_papers_averages(quick, name):
    tidy = compare(quick, name, values(quick, name))
    file = quick.results / "tables" / f"{name}.csv"
    assert list(tidy) == list(pd.read_csv(file)) == [*ROW, *CONTRACT]
    rows = {row.cell for row in rows_of(QUICK, name)}
    theirs = published(name).set_index([*ROW, "category"])["published_mean"]
    assert {cell[:3] for cell in theirs.index} == {row.cell for row in rows_of(PAPER, name)}
    theirs = theirs[[cell[:3] in rows for cell in theirs.index]]
    kept = tidy.dropna(subset="published_mean").set_index([*ROW, "category"])
    assert kept["published_mean"].to_dict() == theirs.to_dict()
    assert kept["mean"].isna().all()  # two categories are no average over the paper's groups
    ours = tidy.dropna(subset="mean")
    assert {*map(tuple, ours[ROW].to_numpy())} == rows
    assert set(ours["category"]) == {"tile", "transistor", "average_measured"}
    first = set(zip(ours["setting"], ours["value"], ours["mean"], strict=True))
    unchanged = {"learning_rate": "1", "updates": "1", "patch_jitter": "0.1", "max_area": "0.15"}
    assert {(axis, unchanged[axis], 80) for axis in TABLES[name].axes} <= first  # the shared runs
    line = file.with_suffix(".md").read_text().splitlines()[0]
    assert "crop (64, 128); one setting is changed in each row; 1 seed. Ours, " in line


@pytest.mark.filterwarnings("error")
def test_the_unstated_choices_make_a_table_without_the_papers_numbers(quick):
    name = "unstated_choices"
    tidy = compare(quick, name, values(quick, name))
    assert list(dict.fromkeys(map(tuple, tidy[ROW].to_numpy()))) == [
        row.cell for row in rows_of(QUICK, name)
    ]
    assert tidy["published_mean"].isna().all() and tidy["mean"].notna().all()
    assert "the paper's numbers" not in (quick.results / "tables" / f"{name}.md").read_text()


@pytest.mark.filterwarnings("error")
def test_every_table_can_be_written_before_anything_is_measured(tmp_path):
    for name in TABLES:
        for profile in ("quick", "demo"):
            workspace = workspace_of(profile, tmp_path / profile)
            tidy = compare(workspace, name, values(workspace, name))
            assert tidy["mean"].isna().all()
            beside = profile == "quick" and name != "unstated_choices"
            assert tidy["published_mean"].notna().any() == beside


# From the records


def test_table_6_is_the_mean_over_sources_of_what_was_painted(tmp_path):
    workspace = workspace_of("quick", tmp_path, "tile", "pill")
    name = "table6_synthetic_anomalies"
    larger = QUICK.run("untrained", "tile"), 99, (0.1, 0.3)  # not in the table with the others
    runs = (QUICK.run(METHOD, category) for category in ("tile", "pill"))
    for run, auroc, side in (*zip(runs, (90, 70), 2 * [SIDE], strict=True), larger):
        record(tmp_path, run)
        text = json.dumps({"image_auroc": dict.fromkeys(SYNTHETIC, auroc), "side": side})
        (run_folder(run, tmp_path) / "synthetic-40.json").write_text(text)
    found = values(workspace, name)
    assert {*found["method"]} == {METHOD}
    assert found["category"].tolist() == 2 * list(SYNTHETIC)
    assert found["source"].tolist() == 7 * ["tile"] + 7 * ["pill"]
    tidy = compare(workspace, name, found).query("method == @METHOD")
    assert tidy["mean"].tolist() == 8 * [80]
    text = (tmp_path / "tables" / f"{name}.md").read_text()
    assert "shapes of 6.25 to 12.5 % of a side" in text.splitlines()[0]


def scored(results, seed, files, scores):
    """Write the folder of a made-up finished run with these scores, two of normal images first."""
    run = QUICK.run(METHOD, "screw", seed)
    record(results, run)
    rows = pd.DataFrame({"file": list(files), "kind": "x", "label": [0, 0, 1, 1], "score": scores})
    rows.iloc[:: -1 if seed else 1].to_csv(run_folder(run, results) / "scores.csv", index=False)
    return run.id


def test_an_ensemble_is_the_auroc_of_the_seeds_mean_scores(tmp_path):
    workspace = workspace_of("quick", tmp_path, "screw")
    scored(tmp_path, 0, "abcd", [0.0, 2.0, 1.0, 4.0])  # means: 1.5, 1, 1.95, 2.25
    scored(tmp_path, 1, "abcd", [3.0, 0.0, 2.9, 0.5])
    found = values(workspace, "table1_image_level").set_index("method").loc["ensemble"]
    assert (found["image_auroc"], found["members"], found["category"]) == (100, 2, "screw")


def test_seeds_that_scored_other_images_have_no_ensemble(tmp_path):
    workspace = workspace_of("quick", tmp_path, "screw")
    scored(tmp_path, 0, "abcd", [0.0, 2.0, 1.0, 4.0])
    other = scored(tmp_path, 1, "abce", [3.0, 0.0, 2.9, 0.5])
    with pytest.warns(UserWarning, match=f"runs/{other}: scores of other images"):
        found = values(workspace, "table1_image_level")
    assert found["method"].tolist() == [METHOD, METHOD]


def test_table_2_changes_one_thing_of_the_patch_model_at_a_time(tmp_path):
    workspace = workspace_of("quick", tmp_path, "grid", "bottle")
    entries = [p for p in plan(workspace, "table2_pixel_level") if p[1].seed == 0]
    name = "cutpaste_3way_patch"
    found = {(run.category, row.key.removeprefix(name)): run for row, run in entries}
    grid, bottle = found["grid", ""], found["bottle", ""]
    assert found["grid", "_wide"] == replace(grid, window=64)
    assert found["bottle", "_shared"] == replace(bottle, gaussians="shared")
    assert not {("grid", "_shared"), ("bottle", "_wide")} & set(found)
    assert {run for row, run in entries if row.measure == "gradcam"} <= {
        QUICK.run(METHOD, category) for category in workspace.shown
    }


# The schedules


def test_curves_are_those_of_the_profiles_runs_and_of_those_beside_them(tmp_path):
    workspace = workspace_of("quick", tmp_path, "screw", "tile")
    assert curves(workspace).empty
    own = QUICK.run(METHOD, "screw", 1)
    small = QUICK.run(METHOD, "screw", size=128, crop=0)
    record(tmp_path, own, curve={400: 80, 800: 82})
    record(tmp_path, small, curve={200: 70, 800: 90})
    record(tmp_path, replace(own, updates=10), curve={5: 99})
    found = curves(workspace)
    assert found.groupby("schedule")["update"].apply(list).to_dict() == {
        "AdamW 0.001, 64 and 128-px crops, 800 updates": [400, 800],
        "AdamW 0.001, whole images of 128 px, 800 updates": [200, 800],
    }
    assert found["auroc"].tolist() == [80, 82, 70, 90]
    assert found["minutes"].tolist() == found["update"].tolist()
    assert set(found["category"]) == {"screw"} and found["seed"].tolist() == [1, 1, 0, 0]


def test_a_caption_says_what_differs_from_the_papers_protocol_and_how_many_seeds_a_cell_has(
    tmp_path,
):
    workspace = workspace_of("quick", tmp_path, "screw", "transistor")

    def captioned(name):
        return report.caption(workspace, name, values(workspace, name))

    nothing = "Profile quick; nothing was measured; nothing was trained for this table."
    assert captioned("table1_image_level") == nothing
    record(tmp_path, QUICK.run("untrained", "screw", 0))
    for seed, category in ((0, "screw"), (1, "screw"), (0, "transistor")):
        record(tmp_path, QUICK.run(METHOD, category, seed))
    own = "changed from the paper: updates 800, sources 16, learning_rate 0.001, optimizer adamw, "
    own += "warmup 0.1"
    assert captioned("table1_image_level") == (
        f"Profile quick; {own}, crop (64, 128); 1 seed, but 1 to 2 for CutPaste-3way."
    )
    for seed in range(3):
        record(tmp_path, QUICK.run("cutout", "screw", seed))
    caption = captioned("table1_image_level")
    assert caption.endswith("; 1 seed, but 3 for Cutout and 1 to 2 for CutPaste-3way.")
    record(tmp_path, QUICK.run(METHOD, "screw", protocol="patch"))
    assert captioned("table2_pixel_level").startswith(f"Profile quick; {own}, stride 8; 1 seed")


def test_a_profiles_protocol_says_what_it_changes_and_which_images_were_lacking(tmp_path):
    workspace = workspace_of("quick", tmp_path, "tile", "grid")
    assert protocol(workspace) == ""
    few = official("grid") | {"normal": 5, "masks": 0, "size": [256, 256]}
    record(tmp_path, QUICK.run(METHOD, "tile"))
    weights = {"file": "some.pth"}
    record(tmp_path, QUICK.run("pretrained", "grid"), images=few, weights=weights)
    text = protocol(workspace)
    assert "| updates | 65536 | 800 |" in text and "momentum" not in text
    assert "| grid | 256x256 | 264 | 5 (of 21) | 57 | 0 (of 57) |" in text
    assert "| tile | 900x900 | 230 | 33 | 84 | 84 |" in text
    assert "in fp32 (made up)" in text and "`some.pth`" in text
    record(tmp_path, QUICK.run(METHOD, "grid", protocol="patch"), images=few)
    name = "table2_pixel_level"
    text = report.caption(workspace, name, values(workspace, name))
    assert "; normal test images: grid 5 (of 21). " in text and "ImageNet" not in text
    demo = workspace_of("demo", tmp_path)
    for method in ("pretrained", METHOD):
        record(tmp_path, demo.profile.run(method, "sieve"), images=few)
    name = "table1_image_level"
    text = report.caption(demo, name, values(demo, name))
    assert "; ImageNet features of efficientnet_lite0; " in text


def test_a_tables_result_names_the_weak_category_and_the_gaps_to_the_paper_and_to_baselines(
    quick, tmp_path
):
    assert result(compare(quick, STUDIES[0], values(quick, STUDIES[0])), STUDIES[0]) == ""
    quick = workspace_of("quick", tmp_path / "another", "tile", "pill", "transistor")
    for category, auroc in (("tile", 60.0), ("pill", 90.0), ("transistor", 84.0)):
        record(quick.results, QUICK.run(METHOD, category), auroc)
    name = "table1_image_level"
    found = compare(quick, name, values(quick, name))
    assert result(found, name) == (
        "**CutPaste-3way: 78.0 % image AUROC**, the mean of 3 categories: 15.8 points below the "
        "paper's number (7.0 below without tile). It is lowest on tile (60.0)."
    )
    for category, auroc in (("tile", 70.0), ("pill", 90.0), ("transistor", 81.0)):
        record(quick.results, QUICK.run("untrained", category), auroc)
    text = result(compare(quick, name, values(quick, name)), name)
    assert ", 2.3 points below a random network (1.5 above without tile)." in text
    assert result(found[:0], name) == "Nothing is measured yet."
