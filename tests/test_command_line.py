"""The command line and the notebooks: refusals in one line, and the smoke profile end to end."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cplib.__main__ import main
from cplib.config import PROFILES
from cplib.notebooks import NOTEBOOKS, check_parameters, choose
from cplib.tables import FINETUNED, all_runs
from cplib.workspace import ROOT, UsageError, open_workspace, parse_budget

PARAMETERS = {"profile", "data", "categories", "seeds", "results", "device", "weights", "budget"}
SOURCES = sorted(NOTEBOOKS.glob("*.ipynb"))
NAMES = [path.stem for path in SOURCES]
CONTRACT = "method,category,metric,mean,stderr,seeds,published_mean,published_stderr"
SMOKE = PROFILES["smoke"]
UNKNOWN = f"error: unknown profile 'nonsense': one of {', '.join(PROFILES)}\n"


@pytest.fixture
def smoke_of(demo_root, tmp_path):
    """The arguments of a command that would run the first notebook, on the tests' demo set."""
    places = ["--data", str(demo_root), "--results", str(tmp_path / "results")]
    return ["notebooks", "--profile", "smoke", "--only", "00", *places]


# What is refused


REFUSED = [
    ("--profile", "nonsense", "nonsense"),
    ("--data", "nowhere/at/all", "nowhere/at/all"),
    ("--categories", "brick,unicorn", "unicorn"),
    ("--weights", "no/such/weights", "no/such/weights"),
    ("--only", "77", "77"),
    ("--from", "88", "88"),
    ("--budget", "soon", "soon"),
    ("--device", "abacus", "abacus"),
]


@pytest.mark.parametrize(("option", "value", "named"), REFUSED)
def test_what_is_not_there_is_one_line_that_names_it(smoke_of, capsys, option, value, named):
    assert main([*smoke_of, option, value]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert named in lines[0]


@pytest.mark.parametrize(("option", "value", "named"), REFUSED)
def test_what_is_refused_leaves_no_notebook_behind(smoke_of, tmp_path, option, value, named):
    assert main([*smoke_of, option, value]) == 2
    assert list(tmp_path.rglob("*.ipynb")) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--nonsense", "1"), ("--prof", "smoke"), ("--engine", "steam")]
)
def test_an_unknown_option_is_named_in_the_last_line(capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        main(["notebooks", option, value])
    assert stop.value.code == 2
    assert option in capsys.readouterr().err.splitlines()[-1]


def test_a_number_of_seeds_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["notebooks", "--seeds", "many"])
    assert stop.value.code == 2
    assert "--seeds" in capsys.readouterr().err.splitlines()[-1]


def test_a_negative_number_of_seeds_is_refused(smoke_of, capsys):
    assert main([*smoke_of, "--seeds", "-1"]) == 2
    assert "seeds" in capsys.readouterr().err


def test_results_below_a_file_are_refused(smoke_of, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*smoke_of, "--results", str(tmp_path / "file" / "below")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(tmp_path / "file" / "below") in lines[0]


def test_a_data_folder_without_categories_is_refused(smoke_of, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main([*smoke_of, "--data", str(tmp_path / "empty")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "no category" in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none(smoke_of, capsys):
    assert main([*smoke_of, "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_options_that_choose_no_notebook_are_refused(smoke_of, capsys):
    assert main([*smoke_of, "--only", "00", "--from", "02"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_module_exits_with_2_and_one_line():
    command = [sys.executable, "-m", "cplib", "notebooks", "--profile", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == UNKNOWN


def test_the_script_exits_with_2_and_one_line(tmp_path):
    """As in an environment that is set up: the script's own setting up is not under test."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CONDA_PREFIX": sys.prefix,
        "CONDA_DEFAULT_ENV": "cutpaste",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), "--profile", "nonsense"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == UNKNOWN


FAKE_PYTHON = """#!/bin/bash
if [[ "$1 $2" == "-m venv" ]]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    [[ -e lacks-venv ]] && exit 1
    touch "$3/has-pip"
elif [[ "$1 $2" == "-m pip" ]]; then
    [[ -e .venv/has-pip ]]
elif [[ "$1 $2" == "-m cplib" ]]; then
    echo "ran $3"
fi
"""


def test_an_environment_that_was_left_half_made_is_made_the_next_time(tmp_path):
    """As where Debian's python3-venv is missing at first."""
    for name in ("run_all.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    (tmp_path / "lacks-venv").touch()
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin"}
    options = {"capture_output": True, "text": True, "env": environment, "check": False}
    done = subprocess.run(["bash", str(tmp_path / "run_all.sh")], **options)
    assert done.returncode == 2
    assert "install python3-venv" in done.stderr
    (tmp_path / "lacks-venv").unlink()
    for _ in range(2):
        done = subprocess.run(["bash", str(tmp_path / "run_all.sh")], **options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "ran notebooks"
    assert len(done.stdout.splitlines()) == 1  # nothing is set up again


# What options mean


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", None), ("90s", 90), ("45m", 2700), ("1.5h", 5400), ("2h", 7200), ("0.5s", 0.5)],
)
def test_a_budget_is_a_number_with_its_unit(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["45", "m", "-5m", "0s", "infh", "nanm", "5 minutes", "1d", "s5"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match=re.escape(repr(text))):
        parse_budget(text)


@pytest.mark.parametrize(
    ("only", "start", "chosen"),
    [
        ("", "", NAMES),
        ("02", "", [n for n in NAMES if n[:2] == "02"]),
        ("03, 00", "", [n for n in NAMES if n[:2] in ("00", "03")]),
        ("", "02", [n for n in NAMES if n[:2] >= "02"]),
    ],
)
def test_notebooks_are_chosen_by_number_and_come_in_order(only, start, chosen):
    assert [path.stem for path in choose(only, start)] == chosen


def test_a_workspace_takes_the_profiles_own_where_nothing_is_asked(demo_root, tmp_path):
    workspace = open_workspace("smoke", data_root=str(demo_root), results=str(tmp_path))
    assert workspace.categories == SMOKE.categories
    assert workspace.results == tmp_path
    assert workspace.budget is None
    assert workspace.runs() == SMOKE.runs()
    assert workspace.missing(workspace.runs()) == workspace.runs()


def test_a_workspace_takes_what_is_asked(demo_root, tmp_path):
    options = {"categories": "coin, gear", "seeds": 3, "budget": "1m", "weights": str(tmp_path)}
    options |= {"data_root": str(demo_root), "results": str(tmp_path / "new")}
    workspace = open_workspace("smoke", **options)
    planned = workspace.runs(("cutpaste",))
    assert [(r.category, r.seed) for r in planned] == [
        (category, seed) for category in ("coin", "gear") for seed in range(3)
    ]
    assert (workspace.budget, workspace.weights) == (60, tmp_path)
    assert (tmp_path / "new").is_dir()


def test_the_data_may_be_named_by_the_environment(demo_root, tmp_path, monkeypatch):
    monkeypatch.setenv("MVTEC_ROOT", str(demo_root))
    workspace = open_workspace("quick", results=str(tmp_path))
    assert workspace.data == demo_root
    assert set(workspace.categories) == {"brick", "coin", "fabric", "gear"}


def test_without_mvtec_a_workspace_opens_and_says_what_it_lacks(tmp_path):
    workspace = open_workspace("quick", results=str(tmp_path))
    assert workspace.data is None
    assert len(workspace.collect(workspace.runs())) == 0
    with pytest.raises(UsageError, match="MVTEC_ROOT"):
        workspace.load("bottle", "train")
    with pytest.raises(UsageError, match="MVTEC_ROOT"):
        workspace.execute(workspace.missing(workspace.runs()))


def test_the_protocol_says_what_the_numbers_were_measured_with(demo_root, tmp_path):
    line = open_workspace("smoke", data_root=str(demo_root), results=str(tmp_path)).protocol()
    for part in ("smoke", "64 px", "2 updates", "learning rate 0.03", "random weights"):
        assert part in line


# The notebooks as they are committed


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_notebook_is_valid_and_holds_no_output(path):
    nbformat.validate(json.loads(path.read_text()))
    for cell in cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_notebook_has_one_cell_with_the_eight_parameters(path):
    tagged = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    check_parameters(path, dict.fromkeys(PARAMETERS))


def test_a_parameter_that_a_notebook_lacks_is_refused():
    with pytest.raises(UsageError, match=f"{SOURCES[0].name} has no parameter 'colour'"):
        check_parameters(SOURCES[0], {"profile": "", "colour": ""})


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_notebook_is_short(path):
    assert len(nbformat.read(path, 4).cells) <= 30
    assert max(len(cell.source.splitlines()) for cell in cells(path)) <= 15


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_notebook_begins_with_its_number_and_title(path):
    assert cells(path, "markdown")[0].source.startswith(f"# {path.stem[:2]} ")


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_notebook_holds_no_absolute_path(path):
    source = "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    assert re.findall(r"(?<![\w.*}])/(?:home|root|tmp|work|Users|mnt|content|data)\b", source) == []
    assert re.findall(r"[A-Z]:\\", source) == []


# The smoke profile, end to end


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of results after every notebook ran once."""
    results = tmp_path_factory.mktemp("smoke") / "results"
    assert main(["notebooks", "--profile", "smoke", "--results", str(results)]) == 0
    return results


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_is_executed_and_kept_as_a_page(smoke, name):
    notebook = nbformat.read(smoke / "notebooks" / f"{name}.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code if cell.source)
    assert [o for cell in code for o in cell.outputs if o.output_type == "error"] == []
    page = (smoke / "notebooks" / f"{name}.html").read_text()
    assert "</html>" in page
    assert "Traceback" not in page


@pytest.mark.parametrize("name", NAMES)
def test_no_notebook_warns(smoke, name):
    notebook = nbformat.read(smoke / "notebooks" / f"{name}.ipynb", 4)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []


def test_localisation_says_what_it_can_of_data_without_masks_or_defects(tmp_path, capsys):
    noise = np.random.default_rng(0)
    good = ("train/good", "test/good")
    places = {"plain": (*good, "test/bad"), "sound": good}
    for category, folders in places.items():
        for folder in (tmp_path / "data" / category / name for name in folders):
            folder.mkdir(parents=True)
            for i in range(4):  # neither square nor as large as a patch
                pixels = noise.integers(90, 160, (24, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    results = tmp_path / "results"
    options = ["--only", "04", "--data", str(tmp_path / "data"), "--results", str(results)]
    assert main(["notebooks", "--profile", "smoke", *options]) == 0, capsys.readouterr()
    table = pd.read_csv(results / "tables" / "table2_pixel_level.csv")
    assert table["mean"].isna().all()
    notebook = nbformat.read(results / "notebooks" / "04_pixel_level_table.ipynb", 4)
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "sound: no defective pictures to show" in said
    scores = [pd.read_csv(file) for file in results.glob("runs/cutpaste_3way-plain-*/scores.csv")]
    assert all(np.isfinite(part["score"]).all() for part in scores)
    assert scores


def test_every_run_of_the_profile_is_there_and_nothing_else(smoke):
    planned = all_runs(open_workspace("smoke", results=str(smoke)))
    assert {run.id for run in planned} > {run.id for run in SMOKE.runs()}
    assert {path.name for path in (smoke / "runs").iterdir()} == {run.id for run in planned}


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("table2_pixel_level", {"cutpaste_3way_patch", "cutpaste_3way_gradcam"}),
        ("table3_pretrained_vs_finetuned", {"untrained", *FINETUNED}),
        ("table4_cutout_variants", {"cutout", "cutout_mean", "cutout_color", "confetti"}),
        ("table5_binary_vs_3way", {"cutpaste_union", "cutpaste_3way"}),
    ],
)
def test_the_other_tables_are_measured_in_the_contracts_columns(smoke, name, methods):
    table = pd.read_csv(smoke / "tables" / f"{name}.csv")
    assert ",".join(table) == CONTRACT
    measured = table.dropna(subset="mean")
    for method in methods:
        assert set(SMOKE.categories) <= set(measured.loc[measured["method"] == method, "category"])
    assert measured["mean"].between(0, 100).all()


def test_table_1_has_the_contracts_columns_and_every_cell_measured(smoke):
    table = pd.read_csv(smoke / "tables" / "table1_image_level.csv")
    assert ",".join(table) == CONTRACT
    measured = table.dropna(subset="mean")
    assert {*zip(measured["method"], measured["category"], strict=True)} >= {
        (method, category) for method in SMOKE.methods for category in SMOKE.categories
    }
    assert measured["mean"].between(0, 100).all()
    assert table["published_mean"].isna().all()


def test_table_1_agrees_with_the_records_of_the_runs(smoke):
    table = pd.read_csv(smoke / "tables" / "table1_image_level.csv")
    table = table[table["metric"] == "image_auroc"].set_index(["method", "category"])["mean"]
    for method in SMOKE.methods:
        for category in SMOKE.categories:
            found = SMOKE.runs((method,), (category,))
            files = [smoke / "runs" / run.id / "metrics.json" for run in found]
            values = [json.loads(file.read_text())["image_auroc"] for file in files]
            assert table[method, category] == pytest.approx(np.mean(values), abs=1e-3)


@pytest.mark.parametrize("name", [n for n in NAMES if n[:2] in ("00", "01", "02", "03")])
def test_the_figures_of_a_notebook_are_there_and_not_blank(smoke, name):
    figures = sorted((smoke / "figures").glob(f"{name[:2]}_*.png"))
    assert figures
    for path in figures:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 3, path.name
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_the_report_links_to_every_notebook_and_lacks_no_table(smoke):
    page = (smoke / "report" / "index.html").read_text()
    for name in NAMES:
        assert f'href="../notebooks/{name}.html"' in page
    assert "(failed)" not in page
    assert "Not in these results" not in page


def test_a_second_time_nothing_is_trained(smoke):
    before = {path: path.stat().st_mtime_ns for path in (smoke / "runs").rglob("*")}
    options = ["--profile", "smoke", "--results", str(smoke), "--only", "02"]
    assert main(["notebooks", *options]) == 0
    assert {path: path.stat().st_mtime_ns for path in (smoke / "runs").rglob("*")} == before


def test_a_notebook_that_fails_is_named_and_the_status_is_1(smoke, demo_root, capsys, monkeypatch):
    bad = smoke / "sources"
    bad.mkdir()
    notebook = nbformat.read(SOURCES[0], 4)
    notebook.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('out of paint')"))
    nbformat.write(notebook, bad / "00_bad.ipynb")
    monkeypatch.setattr("cplib.notebooks.NOTEBOOKS", bad)
    options = ["--profile", "smoke", "--data", str(demo_root), "--results", str(smoke / "bad")]
    assert main(["notebooks", *options]) == 1
    told = capsys.readouterr().err
    assert "RuntimeError: out of paint" in told
    assert "failed: 00_bad.ipynb" in told


# Repeating a run


def test_a_run_of_the_notebooks_can_be_repeated(smoke, demo_root, capsys):
    folder = smoke / "runs" / SMOKE.run("cutpaste_scar", "gear").id
    data = str(ROOT / "data" / "demo")
    assert main(["rerun", str(folder), "--data", data]) == 0
    assert "the same scores, byte for byte" in capsys.readouterr().out
    assert main(["rerun", str(folder), "--data", str(demo_root)]) == 2
    assert "pictures" in capsys.readouterr().err


def test_what_is_no_run_cannot_be_repeated(tmp_path, capsys):
    assert main(["rerun", str(tmp_path), "--data", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(tmp_path) in lines[0]
