"""Tables 7 and 8, and the schedules' curves: what is planned, named, measured and said."""

import json
from dataclasses import asdict, replace

import hypothesis
import nbformat
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cplib import schedule, sensitivity
from cplib.__main__ import main
from cplib.config import CATEGORIES, PROFILES, Profile, Run, Sensitivity
from cplib.published import COLUMNS, published
from cplib.runs import RECORD_VERSION, run_folder
from cplib.sensitivity import (
    AXES,
    AXES_OF,
    CHOICES,
    EPOCH,
    UNSTATED,
    planned,
    row_names,
    runs_by_row,
    settings,
)
from cplib.tables import TABLES, all_runs, compare
from cplib.workspace import open_workspace

PAPER, QUICK = PROFILES["paper"], PROFILES["quick"]


def record(results, run, auroc=90.0, curve=None):
    """Write the folder of a finished run; ``curve`` is {update: AUROC noted}."""
    folder = run_folder(run, results)
    folder.mkdir(parents=True)
    timing = {"device": "made up", "precision": "fp32", "train_seconds": 1.0}
    head = {
        "version": RECORD_VERSION,
        "run": asdict(run),
        "threads": 1,
        "data": {"train": "", "test": ""},
        "weights": None,
    }
    (folder / "run.json").write_text(json.dumps(head | timing | {"images_per_second": 1.0}))
    (folder / "metrics.json").write_text(json.dumps({"image_auroc": auroc}))
    history = pd.DataFrame({"update": sorted({1, *(curve or {})})})
    history["seconds"] = 60.0 * history["update"]
    for metric in ("image_auroc", *(["pixel_auroc"] if run.window else [])):
        history[metric] = history["update"].map(curve or {}).astype(float)
    history.to_csv(folder / "history.csv", index=False)


# What is planned


@pytest.mark.parametrize("table", AXES_OF)
def test_the_papers_profile_has_the_papers_rows_and_no_other(table):
    assert set(settings(PAPER, *AXES_OF[table])) == set(published(table)["method"])


def test_the_papers_profile_has_the_papers_values():
    for name, setting in settings(PAPER).items():
        field, value = name.removesuffix("]").split("[")[1].split("=")
        expected = {
            "learning_rate": {"learning_rate": float(value)},
            "epochs": {"updates": EPOCH * float(value)},
            "patch_jitter": {"patch_jitter": float(value)},
            "max_area": {"area": (0.02, float(value))},
        }
        assert setting.changes == expected[field]


def test_the_papers_runs_are_five_seeds_of_every_category_in_every_row():
    for table in AXES_OF:
        for runs in runs_by_row(PAPER, table, CATEGORIES).values():
            assert {(r.category, r.seed) for r in runs} == {
                (c, seed) for c in CATEGORIES for seed in range(5)
            }


def test_the_run_that_changes_nothing_is_that_of_table_1():
    table1 = set(PAPER.runs(("cutpaste_3way",)))
    for axis in AXES:
        name = next(n for n, s in settings(PAPER, axis).items() if _changes_nothing(s, PAPER))
        table = next(t for t, axes in AXES_OF.items() if axis in axes)
        assert set(runs_by_row(PAPER, table, CATEGORIES)[name]) == table1


def _changes_nothing(setting, profile):
    run = profile.run("cutpaste_3way", "screw", **profile.sensitivity.protocol)
    return replace(run, **setting.changes) == run


@pytest.mark.parametrize(("name", "fewest"), [("smoke", 5), ("demo", 14), ("quick", 28)])
def test_the_axes_share_one_run_a_category_and_every_run_is_planned_once(name, fewest):
    profile = PROFILES[name]
    both = [planned(profile, table, profile.categories) for table in AXES_OF]
    assert all(len(set(runs)) == len(runs) for runs in both)
    assert len({r.id for runs in both for r in runs}) == len(set(sum(both, []))) == fewest
    shared = set(both[0]) & set(both[1])
    assert len(shared) == len(profile.sensitivity.categories)
    assert set(both[0][: len(shared)]) == shared  # first, so that the table's line is theirs


def test_every_run_changes_one_field_at_most_and_only_the_default_notes_its_curve():
    base = QUICK.run("cutpaste_3way", "screw")
    assert base.curve
    for table in AXES_OF:
        for run in planned(QUICK, table, ("screw",)):
            own, theirs = asdict(base), asdict(replace(run, curve=base.curve))
            changed = [k for k in own if own[k] != theirs[k]]
            assert len(changed) == (run != base)
            assert bool(run.curve) == (run == base)


def test_the_runs_are_trained_with_the_others(tmp_path):
    workspace = open_workspace("smoke", results=str(tmp_path))
    runs = all_runs(workspace)
    assert {run for t in AXES_OF for run in planned(PROFILES["smoke"], t, ("gear",))} <= set(runs)
    assert len(set(runs)) == len(runs)


def test_categories_and_seeds_that_are_asked_for_are_taken():
    of = {table: planned(QUICK, table, ("tile", "screw"), 2) for table in AXES_OF}
    assert {(r.category, r.seed) for r in sum(of.values(), [])} == {("screw", 0), ("screw", 1)}
    assert {r.category for r in planned(QUICK, next(iter(AXES_OF)), ("tile", "wood"))} == {"tile"}
    everywhere = {r.category for r in planned(PAPER, next(iter(AXES_OF)), ("tile", "wood"))}
    assert everywhere == {"tile", "wood"}


@hypothesis.settings(deadline=None, max_examples=50)
@given(st.floats(1e-5, 1), st.integers(20, 70_000))
@example(0.03, 65_536)
def test_factors_are_of_the_profiles_own_and_names_state_what_is_trained(rate, updates):
    protocol = {"learning_rate": rate, "updates": updates}
    study = Sensitivity(learning_rate=(10 / 3, 0.1), updates=(0.5, 1.5))
    profile = replace(QUICK, protocol=protocol, sensitivity=study)
    for name, setting in settings(profile, "learning_rate", "updates").items():
        (field, value), own = *setting.changes.items(), protocol[setting.axis]
        assert value == pytest.approx(setting.x * own, rel=0.05)
        theirs = field == "updates" and value in (EPOCH * e for e in (128, 192, 256, 320, 384))
        given = f"epochs={value // EPOCH}" if theirs else f"{field}={value}"
        assert name == f"cutpaste_3way[{given}]"


def test_a_short_schedule_is_never_called_by_the_papers_epochs():
    for profile in (p for p in PROFILES.values() if p is not PAPER):
        assert not any("epochs" in name for name in settings(profile))
    assert "cutpaste_3way[updates=480]" in settings(QUICK)


@pytest.mark.parametrize("table", AXES_OF)
def test_rows_of_every_profile_have_their_place_in_the_table(table):
    names = row_names(table)
    assert len(set(names)) == len(names)
    for profile in PROFILES.values():
        assert set(settings(profile, *AXES_OF[table])) <= set(names)
    theirs = list(dict.fromkeys(published(table)["method"]))
    assert [n for n in names if n in theirs] == theirs  # in the paper's order


# What the paper does not state


def test_ours_is_among_the_choices_and_the_runs_are_those_of_table_1():
    rows = runs_by_row(QUICK, UNSTATED, QUICK.categories)
    table1 = QUICK.runs(("cutpaste_3way",), ("screw", "transistor"))
    assert [n for n, runs in rows.items() if runs == table1] == [
        "cutpaste_3way[head=512-128]",
        "cutpaste_3way[translate=0.125]",
        "cutpaste_3way[jitter=0.1-0.1-0.1-0]",
    ]
    assert {r.seed for runs in rows.values() for r in runs} == {0, 1, 2}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: p.name)
def test_every_choice_changes_one_field_and_has_a_name_of_its_own(profile):
    rows = settings(profile, *CHOICES[UNSTATED])
    base = profile.run("cutpaste_3way", "screw", **profile.sensitivity.protocol)
    assert len(rows) == sum(len(getattr(profile.sensitivity, a)) for a in CHOICES[UNSTATED])
    for setting in rows.values():
        changed = replace(base, **setting.changes)
        assert {k for k in asdict(base) if getattr(base, k) != getattr(changed, k)} <= {
            setting.axis
        }


def test_the_choices_are_measured_where_the_profile_names_categories():
    assert {r.category for r in planned(PAPER, UNSTATED, CATEGORIES)} == {"screw", "transistor"}
    assert {r.category for r in planned(PAPER, UNSTATED, ("tile",))} == {"tile"}
    assert {r.seed for r in planned(QUICK, UNSTATED, ("tile",), 1)} == {0}


def test_the_choices_make_a_table_and_a_sentence_without_the_paper(tmp_path):
    workspace = open_workspace("quick", results=str(tmp_path), categories="screw,transistor")
    for run in planned(QUICK, UNSTATED, workspace.categories):
        record(tmp_path, run, 80 + 8 * run.translate)
    tidy = compare(workspace, UNSTATED, TABLES[UNSTATED].values(workspace))
    assert list(dict.fromkeys(tidy["method"])) == list(settings(QUICK, *CHOICES[UNSTATED]))
    assert tidy["published_mean"].isna().all()
    said = sensitivity.ranges(tidy, UNSTATED, QUICK)
    assert "Translate (over screw, transistor): 80.0 to 82.0, 2.0 apart" in said
    assert "Head (over screw, transistor): 81.0 to 81.0, 0.0 apart" in said
    assert "paper" not in said + (tmp_path / "tables" / f"{UNSTATED}.md").read_text()


# What the tables say


@pytest.fixture
def quick(tmp_path):
    """Made-up finished runs: AUROC 80 for the default, and one more for each further row."""
    workspace = open_workspace("quick", results=str(tmp_path), categories="screw,transistor")
    for table in AXES_OF:
        for i, run in enumerate(planned(QUICK, table, workspace.categories)):
            if not run_folder(run, tmp_path).exists():
                record(tmp_path, run, 80 + i // 2)
    return workspace


@pytest.mark.parametrize("table", AXES_OF)
def test_the_tables_have_the_contracts_columns_and_the_papers_rows(quick, table):
    tidy = compare(quick, table, TABLES[table].values(quick))
    assert list(tidy) == COLUMNS
    theirs = published(table).set_index(["method", "category"])["published_mean"]
    kept = tidy.dropna(subset="published_mean").set_index(["method", "category"])
    assert kept["published_mean"].to_dict() == theirs.to_dict()
    assert kept["mean"].isna().all()  # two categories are no average over the paper's groups
    ours = tidy.dropna(subset="mean")
    assert set(ours["method"]) == set(settings(QUICK, *AXES_OF[table]))
    assert set(ours["category"]) == {"screw", "transistor", "average_measured"}


def test_the_shared_run_has_the_same_number_on_every_axis(quick):
    for table in AXES_OF:
        tidy = compare(quick, table, TABLES[table].values(quick))
        for axis in AXES_OF[table]:
            name = next(n for n, s in settings(QUICK, axis).items() if _changes_nothing(s, QUICK))
            cell = tidy[(tidy["method"] == name) & (tidy["category"] == "screw")]
            assert cell["mean"].item() == 80


def test_the_line_beside_the_table_states_the_studys_own_protocol(tmp_path):
    workspace = open_workspace("demo", results=str(tmp_path))
    table = next(iter(AXES_OF))
    compare(workspace, table, TABLES[table].values(workspace))
    line = (tmp_path / "tables" / f"{table}.md").read_text().splitlines()[0]
    assert "20 updates at learning rate 0.03" in line
    assert "seeds: 1. Each row changes one setting." in line


def test_rows_stand_on_the_axis_where_the_paper_has_them():
    table = next(iter(AXES_OF))
    found = sensitivity.along(published(table).query("category == 'average_all'"), PAPER)
    rates = found[found["axis"] == "learning_rate"]
    assert list(rates["x"]) == pytest.approx([0.1, 1 / 3, 1, 10 / 3])
    assert list(rates["published_mean"]) == [94.6, 95.2, 95.2, 95.3]
    assert list(found.loc[found["axis"] == "updates", "x"]) == [0.5, 0.75, 1, 1.25, 1.5]


def test_the_sentence_gives_our_range_and_the_papers(quick):
    table = "table8_jitter_and_patch_size"
    tidy = compare(quick, table, TABLES[table].values(quick))
    said = sensitivity.ranges(tidy, table, QUICK)
    expected = "Jitter of the patch (over screw, transistor): 80.0 to 83.0, 3.0 apart"
    assert f"{expected}; the paper's 94.9 to 95.5, 0.6" in said
    assert "the paper's 94.8 to 95.3, 0.5 apart" in said


def test_little_measured_makes_no_range():
    said = sensitivity.ranges(pd.DataFrame(columns=COLUMNS), next(iter(AXES_OF)), QUICK)
    assert said.startswith("Too little")


# The schedules


def test_what_runs_noted_is_collected_by_schedule(tmp_path):
    own = QUICK.run("cutpaste_3way", "screw")
    paper = schedule.cut_short(QUICK, ("screw",))[0]
    record(tmp_path, own, curve={320: 80, 640: 82})
    record(tmp_path, replace(paper, seed=1), curve={25: 55, 100: 60})
    record(tmp_path, replace(own, curve=0, updates=10))
    record(tmp_path, replace(own, crop=64, window=32, stride=16), curve={80: 95})
    record(tmp_path, replace(own, category="tile"), curve={80: 99})
    found = schedule.curves(tmp_path, own, ("screw",))
    assert list(found) == schedule.COLUMNS
    assert found.groupby("schedule")["update"].apply(list).to_dict() == {
        "AdamW 0.0005, 64-px crops, 640 updates": [320, 640],
        "SGD 0.03, 256 px, 100 updates": [25, 100],
    }
    assert found["minutes"].tolist() == found["update"].tolist()
    assert set(found["category"]) == {"screw"}


def test_the_schedule_cut_short_is_the_papers_but_for_its_length():
    cut = schedule.cut_short(QUICK, ("screw", "tile"))
    assert [replace(r, updates=65_536, curve=0) for r in cut] == [
        Run(method="cutpaste_3way", category=c) for c in ("screw", "tile")
    ]
    assert schedule.cut_short(PAPER, ("screw",)) == []


def test_the_patch_models_curve_is_of_its_pixels(tmp_path):
    own = Run(method="cutpaste_3way", category="screw", crop=64, window=32, stride=8)
    record(tmp_path, replace(own, curve=2, stride=16), 50, curve={1: 90, 65_536: 96})
    found = schedule.curves(tmp_path, own, ("screw",))
    assert found["auroc"].tolist() == [90, 96]
    assert schedule.curves(tmp_path, replace(own, crop=0, window=0), ("screw",)).empty


# The notebook, where no data are at hand


def test_notebook_09_shows_finished_runs_without_data(quick, tmp_path):
    own = QUICK.run("cutpaste_3way", "screw")
    for category in quick.categories:
        for seed in range(2):
            run = replace(own, category=category, seed=seed, updates=200, curve=3)
            record(tmp_path, run, curve={80: 80 + seed, 160: 84 - seed, 200: 85})
    options = ["--categories", "screw,transistor", "--results", str(tmp_path)]
    assert main(["notebooks", "--profile", "quick", "--only", "09", *options]) == 0
    for name in ("09_sensitivity", "09_schedule"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
    notebook = nbformat.read(tmp_path / "notebooks" / "09_sensitivity.ipynb", 4)
    said = str(notebook)
    assert "Jitter of the patch (over screw, transistor): 80.0 to 83.0" in said
    assert not [
        o for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stderr"
    ]


def test_a_profile_of_ones_own_needs_no_study():
    profile = Profile(
        name="own", dataset="x", categories=("a",), methods=(), seeds=1, other_seeds=1
    )
    assert len(settings(profile)) == 17
