"""The tables of the study: what is planned, measured after training, and written."""

from dataclasses import replace

import pandas as pd
import pytest

from cplib import datasets
from cplib.metrics import auroc_between
from cplib.run import Run
from cplib.score import Scorer
from cplib.study import tables
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.published import ROW, published
from cplib.study.store import Places, load_network, run_folder
from cplib.study.sweep import Workspace, execute
from cplib.study.synthetic import SYNTHETIC, paint
from cplib.study.tables import AXES, TABLES, all_runs, compare, curves, planned, settings, values_of

from records import official, record

PAPER, QUICK = PROFILES["paper"], PROFILES["quick"]
STUDIES = list(AXES)[:2]  # Tables 7 and 8
CONTRACT = ["category", "metric", "mean", "stderr", "seeds", "published_mean", "published_stderr"]


def workspace_of(name, results, *categories, seeds=None):
    profile = PROFILES[name]
    return Workspace(profile, categories or profile.categories, Places(results), seeds)


# What is planned


@pytest.mark.parametrize("name", STUDIES)
def test_the_papers_profile_has_the_papers_rows_of_five_seeds_and_every_category(tmp_path, name):
    rows = published(name).query("category == 'average_all'")[ROW]
    assert {tuple(row) for row in settings(PAPER, name)} == {*map(tuple, rows.to_numpy())}
    plan = TABLES[name].plan(workspace_of("paper", tmp_path))
    cells = {(tuple(row), run.category, run.seed) for row, run in plan}
    assert len(cells) == len(plan) == len(rows) * 15 * 5


def test_values_are_multiples_of_the_protocols_own_where_they_are_relative():
    first, second = (settings(QUICK, name) for name in STUDIES)
    own = QUICK.run(METHOD, "screw")
    assert first[METHOD, "updates", "1.5"] == {"updates": 1.5 * own.updates}
    assert first[METHOD, "learning_rate", "0.333"] == {"learning_rate": pytest.approx(0.000167)}
    assert settings(PAPER, STUDIES[0])[METHOD, "learning_rate", "3.33"] == {"learning_rate": 0.1}
    assert second[METHOD, "patch_jitter", "0.3"] == {"patch_jitter": 0.3}
    assert second[METHOD, "max_area", "0.2"] == {"area": (0.02, 0.2)}


@pytest.mark.parametrize(("name", "fewest"), [("smoke", 5), ("demo", 5), ("quick", 28)])
def test_the_run_that_changes_nothing_is_shared_and_comes_first(tmp_path, name, fewest):
    workspace = workspace_of(name, tmp_path)
    study = workspace.profile.sensitivity
    bases = workspace.profile.runs((METHOD,), study.categories, study.seeds, **study.protocol)
    runs = [planned(workspace, table) for table in STUDIES]
    assert len({run.id for each in runs for run in each}) == fewest
    for table, each in zip(STUDIES, runs, strict=True):
        assert each[: len(bases)] == bases
        plan = TABLES[table].plan(workspace)
        assert len([run for _, run in plan if run in bases]) == 2 * len(bases)  # on both axes
        assert not any(run.curve for run in each[len(bases) :])
    if not study.protocol:  # then they are Table 1's
        assert set(bases) <= set(planned(workspace, "table1_image_level"))
    everything = all_runs(workspace)
    assert len({run.id for run in everything}) == len(everything)
    assert {run for table in TABLES for run in planned(workspace, table)} <= set(everything)


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
    for name in (*AXES, "table3_pretrained_vs_finetuned", "table4_cutout_variants"):
        assert {run.category for run in planned(other, name)} == {"sieve", "fabric"}


def test_seeds_of_a_study_that_were_measured_before_are_shown_in_every_row(tmp_path):
    workspace = workspace_of("quick", tmp_path)
    bases, changed = planned(workspace, STUDIES[1])[:2], planned(workspace, STUDIES[1])[2]
    for run in bases:  # as Table 1's
        record(tmp_path, replace(run, seed=1))
    assert {run.seed for run in planned(workspace, STUDIES[1])} == {0}
    record(tmp_path, replace(changed, seed=1))
    plan = TABLES[STUDIES[1]].plan(workspace)
    assert len(plan) == 2 * len({row for row, _ in plan}) * len(bases)


def test_the_unstated_choices_hold_our_own_and_belong_to_two_categories(tmp_path):
    workspace = workspace_of("quick", tmp_path)
    plan = TABLES["unstated_choices"].plan(workspace)
    table1 = set(planned(workspace, "table1_image_level"))
    assert {tuple(row)[1:] for row, run in plan if run in table1} == {
        ("head", "512-128"),
        ("translate", "0.125"),
        ("jitter", "0.1-0.1-0.1-0"),
    }
    assert {row.value for row, _ in plan if row.setting == "head"} >= {"linear", "8x512-128"}
    assert {run.category for _, run in plan} == {"tile", "transistor"}
    assert {run.seed for _, run in plan} == {0}


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
    tidy = compare(quick, name, values_of(quick, name))
    file = quick.results / "tables" / f"{name}.csv"
    assert list(tidy) == list(pd.read_csv(file)) == [*ROW, *CONTRACT]
    theirs = published(name).set_index([*ROW, "category"])["published_mean"]
    kept = tidy.dropna(subset="published_mean").set_index([*ROW, "category"])
    assert kept["published_mean"].to_dict() == theirs.to_dict()
    assert kept["mean"].isna().all()  # two categories are no average over the paper's groups
    ours = tidy.dropna(subset="mean")
    assert {*map(tuple, ours[ROW].to_numpy())} == {tuple(row) for row in settings(QUICK, name)}
    assert set(ours["category"]) == {"tile", "transistor", "average_measured"}
    first = set(zip(ours["setting"], ours["value"], ours["mean"], strict=True))
    unchanged = {"learning_rate": "1", "updates": "1", "patch_jitter": "0.1", "max_area": "0.15"}
    assert {(axis, unchanged[axis], 80) for axis in AXES[name]} <= first  # the shared runs
    line = file.with_suffix(".md").read_text().splitlines()[0]
    assert "Profile quick: resnet18, 256 px, training on 64-px crops" in line
    assert "640 updates of 16 normal images and their copies" in line


@pytest.mark.filterwarnings("error")
def test_the_unstated_choices_make_a_table_without_the_papers_numbers(quick):
    name = "unstated_choices"
    tidy = compare(quick, name, values_of(quick, name))
    assert list(dict.fromkeys(map(tuple, tidy[ROW].to_numpy()))) == list(settings(QUICK, name))
    assert tidy["published_mean"].isna().all() and tidy["mean"].notna().all()
    assert "paper" not in (quick.results / "tables" / f"{name}.md").read_text()


@pytest.mark.filterwarnings("error")
def test_every_table_can_be_written_before_anything_is_measured(tmp_path):
    for name in TABLES:
        for profile in ("quick", "demo"):
            workspace = workspace_of(profile, tmp_path / profile)
            tidy = compare(workspace, name, values_of(workspace, name))
            assert tidy["mean"].isna().all()
            beside = profile == "quick" and name != "unstated_choices"
            assert tidy["published_mean"].notna().any() == beside


# After training


@pytest.fixture(scope="module")
def done(demo_root, tmp_path_factory):
    """A finished run on the demo set, and its places."""
    run = PROFILES["smoke"].run("untrained", "sieve")
    places = Places(tmp_path_factory.mktemp("results"), demo_root)
    execute(run, places)
    return run, places


def test_table_6_records_the_auroc_of_normal_images_against_painted_ones(done):
    run, places = done
    found = tables.synthetic_metrics(run, 5, places)
    assert list(found["image_auroc"]) == list(SYNTHETIC)
    assert (found["normal"], found["painted"]) == (4, 8)
    train, test = (datasets.load(places.data, "sieve", split, 64) for split in ("train", "test"))
    normal = test.pixels[test.labels == 0]
    scorer = Scorer.fit(run, load_network(run, places), train.pixels)
    for kind in ("digit_color", "ellipse_natural"):
        painted = scorer.score(paint(normal, *kind.split("_"), least=5)[0])
        expected = auroc_between(scorer.score(normal), painted)
        assert found["image_auroc"][kind] == pytest.approx(expected, abs=0.01)
    assert tables.synthetic_metrics(run, 5, places._replace(data=None)) == found  # read again
    assert tables.synthetic_metrics(run, 6, places._replace(data=None)) is None


def test_table_6_is_made_of_the_finished_runs_and_says_how_it_was_painted(done):
    run, places = done
    workspace = Workspace(replace(PROFILES["smoke"], anomalies=9), ("sieve",), places)
    values = values_of(workspace, "table6_synthetic_anomalies")
    assert values["category"].tolist() == list(SYNTHETIC)
    tidy = compare(workspace, "table6_synthetic_anomalies", values)
    assert list(tidy["category"]) == [*SYNTHETIC, "average_all"]
    assert tidy["published_mean"].isna().all()
    assert tidy["mean"].iloc[-1] == pytest.approx(values["image_auroc"].mean())
    text = (places.results / "tables" / "table6_synthetic_anomalies.md").read_text()
    assert "10% to 30% of a side" in text.splitlines()[0]


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
    found = values_of(workspace, "table1_image_level").set_index("method").loc["ensemble"]
    assert (found["image_auroc"], found["members"], found["category"]) == (100, 2, "screw")


def test_seeds_that_scored_other_images_have_no_ensemble(tmp_path):
    workspace = workspace_of("quick", tmp_path, "screw")
    scored(tmp_path, 0, "abcd", [0.0, 2.0, 1.0, 4.0])
    other = scored(tmp_path, 1, "abce", [3.0, 0.0, 2.9, 0.5])
    with pytest.warns(UserWarning, match=f"runs/{other}: scores of other images"):
        found = values_of(workspace, "table1_image_level")
    assert found["method"].tolist() == [METHOD, METHOD]


def test_table_2_changes_one_thing_of_the_patch_model_at_a_time(tmp_path):
    workspace = workspace_of("quick", tmp_path, "grid", "bottle")
    plan = [p for p in TABLES["table2_pixel_level"].plan(workspace) if p[1].seed == 0]
    found = {(run.category, row.method.removeprefix(tables.PATCH)): run for row, run in plan}
    grid, bottle = found["grid", ""], found["bottle", ""]
    assert found["grid", "_wide"] == replace(grid, window=64)
    assert found["grid", "_longer"] == replace(grid, updates=2560)
    assert found["bottle", "_shared"] == replace(bottle, gaussians="shared")
    assert not {("grid", "_shared"), ("bottle", "_wide"), ("bottle", "_longer")} & set(found)


# The schedules


def test_curves_are_those_of_the_profiles_runs_and_of_those_beside_them(tmp_path):
    workspace = workspace_of("quick", tmp_path, "screw", "tile")
    assert curves(workspace).empty
    own = QUICK.run(METHOD, "screw", 1)
    cut, _, longer = QUICK.other_schedules(("screw", "tile"))
    assert replace(cut, updates=65_536, curve=0) == Run(method=METHOD, category="screw")
    record(tmp_path, own, curve={320: 80, 640: 82})
    record(tmp_path, cut, curve={25: 55, 100: 60})
    record(tmp_path, longer, curve={640: 70, 2560: 90})
    record(tmp_path, replace(own, updates=10), curve={5: 99})
    found = curves(workspace)
    assert found.groupby("schedule")["update"].apply(list).to_dict() == {
        "AdamW 0.0005, 64-px crops, 640 updates": [320, 640],
        "SGD 0.03, 256 px, 100 updates": [25, 100],
        "AdamW 0.0005, 64-px crops, 2560 updates": [640, 2560],
    }
    assert found["auroc"].tolist() == [80, 82, 55, 60, 70, 90]
    assert found["minutes"].tolist() == found["update"].tolist()
    assert set(found["category"]) == {"screw"} and found["seed"].tolist() == [1, 1, 0, 0, 0, 0]


def captioned(workspace, name) -> str:
    return tables.caption(workspace, name, workspace.collect(planned(workspace, name)))


def test_a_caption_says_how_many_seeds_a_cell_has_not_how_many_are_planned(tmp_path):
    workspace = workspace_of("quick", tmp_path, "screw", "transistor")
    caption = captioned(workspace, "table1_image_level")
    assert caption == "Profile quick: nothing was trained for this table."
    record(tmp_path, QUICK.run("untrained", "screw", 0))
    for seed, category in ((0, "screw"), (1, "screw"), (0, "transistor")):
        record(tmp_path, QUICK.run(METHOD, category, seed))
    caption = captioned(workspace, "table1_image_level")
    assert caption.endswith("scored in fp32, seeds: 1 (random network), 1 to 2 (CutPaste-3way).")
    values = workspace.collect(planned(workspace, "table1_image_level"))
    untrained = values[values["method"] == "untrained"]
    assert "nothing was trained" in tables.caption(workspace, "table1_image_level", untrained)
    for run in planned(workspace, STUDIES[0]):
        if not run_folder(run, tmp_path).exists():
            record(tmp_path, run)
    assert "seeds: 1 (CutPaste-3way)" in captioned(workspace, STUDIES[0])


def test_what_is_missing_or_substituted_is_said_beside_the_numbers(tmp_path):
    workspace = workspace_of("quick", tmp_path, "tile", "grid")
    runs = workspace.runs(("pretrained",))
    assert tables.shortfalls(workspace, runs) == ""
    record(tmp_path, runs[0], weights={"file": "resnet18-f37072fd.pth"})
    assert tables.shortfalls(workspace, runs) == "ImageNet weights: resnet18-f37072fd.pth."
    few = official("grid") | {"normal": 5, "masks": 0, "size": [256, 256]}
    record(tmp_path, runs[1], images=few, weights={"file": "resnet18_imagenet_pqf.pth"})
    said = tables.shortfalls(workspace, runs)
    assert "resnet18_imagenet_pqf.pth (a substitute for torchvision's" in said
    assert "Of grid only 5 of the 21 normal test images were at hand. For grid no masks" in said
    assert said.endswith("The images came resized, at 256x256 px.") and "tile" not in said
