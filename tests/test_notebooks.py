"""The notebooks as committed, all of them executed on the smoke profile, and their exercises."""

import json
import os
import re
import shutil
from textwrap import dedent
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from cplib.apps.cli import main
from cplib.apps.notebooks import NOTEBOOKS, execute, run_notebooks, say_what_is_missing
from cplib.apps.workspace import ROOT, open_workspace
from cplib.run import BASELINES
from cplib.study.claims import measured, verdicts
from cplib.study.profiles import PROFILES, TABLE1
from cplib.study.tables import FINETUNED, planned
from cplib.study.workspace import UsageError

PARAMETERS = {"profile", "data", "categories", "device"}
SOURCES = sorted(NOTEBOOKS.glob("*.ipynb"))
NAMES = [path.stem for path in SOURCES]
CONTRACT = "method,category,metric,mean,stderr,seeds,published_mean,published_stderr"
SMOKE = PROFILES["smoke"]


# As they are committed


def tagged(cell, tag):
    return tag in cell.metadata.get("tags", [])


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_notebook_is_short_valid_without_output_and_has_the_parameters(path):
    nbformat.validate(json.loads(path.read_text()))
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells(path))
    assert len(nbformat.read(path, 4).cells) <= 30
    assert max(len(cell.source.splitlines()) for cell in cells(path)) <= 15
    assert cells(path, "markdown")[0].source.startswith(f"# {path.stem[:2]} ")
    (parameters,) = [c for c in cells(path) if tagged(c, "parameters")]
    named = set(re.findall(r"^(\w+):", parameters.source, re.MULTILINE))
    assert named == PARAMETERS or (path.stem[:2] == "12" and named > PARAMETERS)


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_notebook_holds_no_absolute_path(path):
    source = "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    assert re.findall(r"(?<![\w.*}])/(?:home|root|tmp|work|Users|mnt|content|data)\b", source) == []
    assert re.findall(r"[A-Z]:\\", source) == []


def test_a_parameter_that_a_notebook_lacks_is_refused(tmp_path):
    with pytest.raises(UsageError, match=f"{SOURCES[0].name} has no parameter 'colour'"):
        execute(SOURCES[:1], tmp_path, {"profile": "", "colour": ""})


# The smoke profile, end to end


@pytest.fixture(scope="module")
def home(tmp_path_factory, demo_root):
    """The folder of results after every notebook ran."""
    home = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPLIB_RESULTS", os.path.relpath(home))  # the notebooks lie elsewhere
        patch.setenv("MVTEC_ROOT", "")
        workspace = open_workspace("smoke", str(demo_root))
        assert run_notebooks(workspace, SOURCES) == 0
    return home


@pytest.fixture(scope="module")
def smoke(home):
    return home / "smoke"


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_is_executed_without_a_warning(smoke, name):
    notebook = nbformat.read(smoke / "notebooks" / f"{name}.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [o for cell in code for o in cell.outputs]
    assert all(cell.execution_count for cell in code if cell.source)
    assert [o for o in outputs if o.output_type == "error"] == []
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []
    source = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    assert [c.source for c in notebook.cells if not tagged(c, "injected-parameters")] == [
        c.source for c in source.cells
    ]


def test_every_run_of_the_profile_is_there_and_nothing_else(smoke, home, demo_root, monkeypatch):
    monkeypatch.setenv("CPLIB_RESULTS", str(home))
    workspace = open_workspace("smoke", str(demo_root))
    runs = planned(workspace)
    own = SMOKE.runs(BASELINES + TABLE1, SMOKE.categories)
    assert {run.id for run in runs} > {run.id for run in own}
    assert {path.name for path in (smoke / "runs").iterdir()} == {run.id for run in runs}
    assert workspace.missing(runs) == {}  # neither a run nor a measure


def test_claims_are_judged_when_everything_is_measured(smoke, home, demo_root, monkeypatch):
    monkeypatch.setenv("CPLIB_RESULTS", str(home))
    expected = verdicts(measured(open_workspace("smoke", str(demo_root))))["here"]
    assert pd.read_csv(smoke / "tables" / "claims.csv")["here"].tolist() == expected.tolist()
    assert expected.iloc[-6:-4].ne("not measured").all()  # Figure 3: the slowest notebook's


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("table1_image_level", {*BASELINES, *TABLE1, "ensemble"}),
        ("table2_pixel_level", {"cutpaste_3way_patch", "cutpaste_3way_gradcam"}),
        ("table3_pretrained_vs_finetuned", {"untrained", *FINETUNED}),
        ("table4_cutout_variants", {"cutout", "cutout_mean", "cutout_color", "confetti"}),
        ("table5_binary_vs_3way", {"cutpaste_union", "cutpaste_3way"}),
    ],
)
def test_the_tables_are_measured_in_the_contracts_columns(smoke, name, methods):
    table = pd.read_csv(smoke / "tables" / f"{name}.csv")
    assert ",".join(table) == CONTRACT
    measured = table.dropna(subset="mean")
    for method in methods:
        assert set(SMOKE.categories) <= set(measured.loc[measured["method"] == method, "category"])
    assert measured["mean"].between(0, 100).all()
    assert table["published_mean"].isna().all()  # the demo set is not the paper's


def test_table_1_agrees_with_the_records_of_the_runs(smoke):
    table = pd.read_csv(smoke / "tables" / "table1_image_level.csv")
    table = table[table["metric"] == "image_auroc"].set_index(["method", "category"])["mean"]
    for method in (*BASELINES, *TABLE1):
        for category in SMOKE.categories:
            found = SMOKE.runs((method,), (category,))
            files = [smoke / "runs" / run.id / "metrics.json" for run in found]
            values = [json.loads(file.read_text())["image_auroc"] for file in files]
            assert table[method, category] == pytest.approx(np.mean(values), abs=1e-3)


@pytest.mark.parametrize("name", [n for n in NAMES if n[:2] in ("00", "01", "02", "03", "04")])
def test_the_figures_of_a_notebook_are_there_and_not_blank(smoke, name):
    figures = sorted((smoke / "figures").glob(f"{name[:2]}_*.png"))
    assert figures
    for path in figures:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 3, path.name
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_without_windows_notebook_04_shows_the_recorded_maps(
    home, demo_root, tmp_path, monkeypatch
):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("smoke/runs/*/windows.safetensors"):
        file.unlink()
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path))
    (tmp_path / "smoke/figures/04_maps.png").unlink()
    assert run_notebooks(open_workspace("smoke", str(demo_root)), SOURCES[4:5]) == 0
    assert (tmp_path / "smoke/figures/04_maps.png").exists()


def test_a_failed_notebook_is_named_and_leaves_the_executed_one(
    smoke, home, demo_root, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("CPLIB_RESULTS", str(home))
    notebook = nbformat.read(SOURCES[0], 4)
    notebook.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('out of paint')"))
    nbformat.write(notebook, tmp_path / SOURCES[0].name)
    before = (smoke / "notebooks" / SOURCES[0].name).read_bytes()
    workspace = open_workspace("smoke", str(demo_root))
    assert run_notebooks(workspace, [tmp_path / SOURCES[0].name]) == 1
    told = capsys.readouterr().err
    assert "RuntimeError: out of paint" in told
    assert f"failed: {SOURCES[0].name}" in told
    assert (smoke / "notebooks" / SOURCES[0].name).read_bytes() == before
    assert f"{SOURCES[0].stem}.failed.ipynb" in told


def test_a_second_time_nothing_is_trained_and_a_run_can_be_repeated(
    smoke, home, demo_root, capsys, monkeypatch
):
    monkeypatch.setenv("CPLIB_RESULTS", str(home))
    before = {path: path.stat().st_mtime_ns for path in (smoke / "runs").rglob("*")}
    options = ["notebooks", "--profile", "smoke", "--data", str(demo_root), "--only", "02"]
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 0
    assert {path: path.stat().st_mtime_ns for path in (smoke / "runs").rglob("*")} == before
    folder = smoke / "runs" / SMOKE.run("cutpaste_scar", "sieve").id
    with pytest.raises(SystemExit) as stop:
        main(["rerun", str(folder), "--data", str(demo_root)])
    assert stop.value.code == 0
    assert "the same scores, byte for byte" in capsys.readouterr().out


def test_tables_are_made_of_data_without_masks_or_anomalies(tmp_path, monkeypatch):
    noise = np.random.default_rng(0)
    normal = ("train/good", "test/good")
    for category, folders in {"plain": (*normal, "test/bad"), "sound": normal}.items():
        for folder in (tmp_path / "data" / category / name for name in folders):
            folder.mkdir(parents=True)
            for i in range(4):  # neither square nor as large as a window
                pixels = noise.integers(90, 160, (24, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path / "results"))
    workspace = open_workspace("smoke", str(tmp_path / "data"))
    paths = [path for path in SOURCES if path.stem[:2] in ("00", "03", "04", "08", "10")]
    assert run_notebooks(workspace, paths) == 0
    results = tmp_path / "results" / "smoke-own"
    table = pd.read_csv(results / "tables" / "table2_pixel_level.csv")
    assert table["mean"].isna().all()
    scores = [pd.read_csv(file) for file in results.glob("runs/cutpaste_3way-plain-*/scores.csv")]
    assert scores
    assert all(np.isfinite(part["score"]).all() for part in scores)


# The exercises: the first step of each one that has a step in code, done as its text says


EXERCISES = {  # a part of the last cell that is run before, and what has changed afterwards
    "00.1": (
        "00_at_the_size",
        lambda old, new: (
            old.tests["sieve"].pixels.shape[-1] == 2 * new.tests["sieve"].pixels.shape[-1]
        ),
    ),
    "01.1": (
        "01_patch_sizes",
        lambda old, new: old.pairs[0][0].max() < 20 < new.pairs[0][0].max() < 31,  # percent
    ),
    "01.2": (
        "01_cutpaste_in_four_steps",
        lambda old, new: old.paste_box == new.paste_box and abs(old.piece - new.piece).max() > 0.01,
    ),
    "02.1": (
        "02_ten_lines_learn",
        lambda old, new: not old.net.head[0].weight.equal(new.net.head[0].weight),
    ),
    "02.2": (
        "02_ten_lines_learn",
        lambda old, new: (len(old.net.head[-1].bias), len(new.net.head[-1].bias)) == (3, 2),
    ),
    "03.1": (
        "AUROC by hand",
        lambda old, new: new.scores[new.i] == new.scores[new.test.labels == 0].max(),
    ),
    "03.2": ("AUROC by hand", lambda old, new: old.auroc != new.diagonal and new.diagonal <= 100),
    "04.1": (
        "04_from_windows_to_map",
        lambda old, new: new.fine.position_scores(new.image[None]).numel() > 4 * len(old.scores),
    ),
    "04.2": (
        "04_from_windows_to_map",
        lambda old, new: new.kernel(new.narrow).max() > new.kernel(new.run).max(),
    ),
    "05.1": ("finetune(normal", lambda old, new: len({*new.aurocs.values()}) > 1),
    "05.2": (
        "finetune(normal",
        lambda old, new: old.losses != new.losses and np.isfinite(new.losses).all(),
    ),
    "06.2": (
        "06_what_is_pasted",
        lambda old, new: 0 < (new.pasted != new.x).any(1).float().mean() < 0.15,
    ),
    "07.2": (
        "07_what_is_pasted",
        lambda old, new: new.larger.sources == 2 * new.union.sources and 0 <= new.auroc <= 100,
    ),
    "08.1": (
        "methods = ",
        lambda old, new: (new.aurocs["other size"] != new.aurocs["Table 6"]).any(),
    ),
    "09.1": (
        "open_workspace(",
        lambda old, new: [*new.compared["patch_jitter"]] == [0.1, 0.1, 0.5, 0.5],
    ),
    "09.2": ("import numpy", lambda old, new: 1 < new.above < 2),
    "10.1": ("perplexity = ", lambda old, new: not old.points[0].allclose(new.points[0])),
    "11.2": (
        "open_workspace(",
        lambda old, new: (
            "one seed" not in {*verdicts(measured(new.more, ["table5_binary_vs_3way"]))["here"]}
        ),
    ),
    "12.1": (
        "fit_detector(runs",
        lambda old, new: old.detector.threshold < new.detector.threshold,
    ),
    "12.2": (
        "fit_detector(runs",
        lambda old, new: (old.detector.normal >= old.detector.threshold).sum() < new.alarms,
    ),
    "13.1": (
        "13_by_hand",
        lambda old, new: new.lines[1].index[-1] == 4 * old.lines[1].index[-1],
    ),
    "13.2": ("13_by_hand", lambda old, new: not old.lines[0].equals(new.lines[0])),
}
TEXTS = {
    f"{path.stem[:2]}.{k}": text
    for path in SOURCES
    for k, text in enumerate(
        re.split(r"^(?:\d\. |\[)", cells(path, "markdown")[-1].source, flags=re.MULTILINE)
    )
}


def test_every_exercise_with_a_step_in_code_is_done_here():
    steps = ("in place of", "```python")
    assert [n for n, text in TEXTS.items() if any(s in text for s in steps)] == [*EXERCISES]


def run_cells(sources, names):
    """Execute cells; each draws into figures of its own."""
    for source in sources:
        exec(source, names)
        plt.close("all")


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_works_and_changes_something(name, home, demo_root, tmp_path, monkeypatch):
    # Files are written whole, so a link in the copy is replaced, and ``home`` stays as it is.
    shutil.copytree(home, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path))
    monkeypatch.setenv("CPLIB_JOBS", "1")
    monkeypatch.chdir(NOTEBOOKS)
    last, changed = EXERCISES[name]
    sources = [cell.source for cell in cells(*NOTEBOOKS.glob(f"{name[:2]}_*.ipynb"))]
    sources[1] += f'\nprofile, data = "smoke", {str(demo_root)!r}'
    (end,) = (i + 1 for i, source in enumerate(sources) if last in source)
    words, _, code = TEXTS[name].partition("```python\n")
    edits, new_cell = re.findall(r"`([^`]+)` in place of `([^`]+)`", words), code.split("```")[0]
    assert edits or new_cell
    names = {}
    with plt.rc_context():
        run_cells(sources[:end], names)
        old, again = SimpleNamespace(**names), end
        for after, before in edits:
            (again,) = (i for i, source in enumerate(sources) if before in source)
            sources[again] = sources[again].replace(before, after)
        run_cells([*sources[again : again + 1 if new_cell else end], dedent(new_cell)], names)
    assert changed(old, SimpleNamespace(**names))


# Those that are committed


EXECUTED = sorted((ROOT / "results").glob("*/notebooks/[0-9]*.ipynb"))


@pytest.mark.parametrize("path", EXECUTED, ids=lambda p: f"{p.parts[-3]}-{p.stem[:2]}")
def test_an_executed_notebook_has_the_cells_of_its_source(path):
    executed = nbformat.read(path, 4).cells
    executed = [cell.source for cell in executed if not tagged(cell, "injected-parameters")]
    assert executed == [cell.source for cell in nbformat.read(NOTEBOOKS / path.name, 4).cells]
    assert path.stat().st_size < 2**20


def test_cells_that_showed_nothing_without_images_say_so():
    def cell(source, *tags, output=""):
        outputs = [new_output("stream", text=output)] if output else []
        return new_code_cell(source, metadata={"tags": [*tags]}, outputs=outputs)

    pair = [cell("define", "images"), cell("use", "images")]
    shown = [cell("define", "images"), cell("use", "images", output="12 windows")]
    notebook = new_notebook(cells=[cell("a"), *pair, cell("b"), *shown])
    say_what_is_missing(notebook, "04_x.ipynb")
    assert [len(cell.outputs) for cell in notebook.cells] == [0, 0, 1, 0, 0, 1]
    text = notebook.cells[2].outputs[0].data["text/markdown"]
    assert "without images" in text and "(../../demo/notebooks/04_x.ipynb)" in text
