"""The command line and the workspace: what is refused, in one line, and what options mean."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cplib.apps.cli import main
from cplib.apps.notebooks import NOTEBOOKS, choose
from cplib.apps.workspace import ROOT, open_workspace, parse_budget
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.store import frame
from cplib.study.tables import planned
from cplib.study.workspace import UsageError

NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
UNKNOWN = f"error: unknown profile 'nonsense': one of {', '.join(PROFILES)}\n"


@pytest.fixture
def smoke_of(demo_root, tmp_path, monkeypatch):
    """The arguments of a command that would run the first notebook, on the tests' demo set."""
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path / "results"))
    return ["notebooks", "--profile", "smoke", "--only", "00", "--data", str(demo_root)]


def status(arguments):
    """A command's exit status."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--profile", "nonsense"),
        ("--data", "nowhere/at/all"),
        ("--categories", "brick,unicorn"),
        ("--weights", "no/such/weights"),
        ("--only", "77"),
        ("--from", "88"),
        ("--budget", "soon"),
        ("--device", "abacus"),
        ("--seeds", "-1"),
        ("--engine", "steam"),
        ("--nonsense", "1"),
    ],
)
def test_what_is_not_there_is_one_line_and_leaves_no_notebook(
    smoke_of, tmp_path, capsys, option, value, monkeypatch
):
    for name in ("WEIGHTS", "BUDGET", "SEEDS", "ENGINE"):
        monkeypatch.setenv(f"CPLIB_{name}", "")  # put back what the command sets
    assert status([*smoke_of, option, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert (option if option == "--nonsense" else value.split(",")[-1]) in line
    assert list(tmp_path.rglob("*.ipynb")) == []


def test_results_below_a_file_and_data_without_categories_are_refused(
    smoke_of, tmp_path, capsys, monkeypatch
):
    (tmp_path / "empty").mkdir()
    assert status([*smoke_of, "--data", str(tmp_path / "empty")]) == 2
    assert "no category" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path / "file" / "below"))
    assert status(smoke_of) == 2
    assert str(tmp_path / "file" / "below") in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named_before_any_notebook_starts(
    smoke_of, demo_root, tmp_path, capsys
):
    data = shutil.copytree(demo_root, tmp_path / "data")
    broken = next((data / "sieve" / "test" / "good").iterdir())
    broken.write_bytes(b"no image")
    assert status([*smoke_of, "--data", str(data), "--only", "00,02"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(broken) in line
    assert list(tmp_path.rglob("*.ipynb")) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none(smoke_of, capsys):
    assert status([*smoke_of, "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_the_head_of_a_ray_cluster_needs_no_gpu(demo_root, tmp_path, monkeypatch):
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path))
    monkeypatch.setenv("CPLIB_ENGINE", "ray")
    workspace = open_workspace("smoke", str(demo_root), device="cuda")
    assert (workspace.device, workspace.places.device) == ("cuda", "cpu")


def test_the_script_exits_with_2_and_one_line(tmp_path):
    """As in an environment that is set up: the script's own setting up is not under test."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CONDA_PREFIX": sys.prefix,
        "CONDA_DEFAULT_ENV": "cutpaste",
        "PYTHONPATH": str(ROOT),
    }
    command = ["bash", str(ROOT / "run_all.sh"), "--profile", "nonsense"]
    options = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    done = subprocess.run(command, check=False, **options)
    assert (done.returncode, done.stderr) == (2, UNKNOWN)


FAKE_PYTHON = """#!/bin/bash
if [[ "$1 $2" == "-m venv" ]]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    [[ -e lacks-venv ]] && exit 1
    touch "$3/has-pip"
elif [[ "$1 $2" == "-m pip" ]]; then
    [[ "$3" == install ]] && echo "pip ${@: -1}" >>installed
    [[ -e .venv/has-pip ]]
elif [[ "$1 $2" == "-m uv" ]]; then
    echo "uv ${@: -1}" >>installed
    [[ ! -e uv-fails ]]
elif [[ "$1 $2" == "-m cplib" ]]; then
    echo "ran $3"
fi
"""


@pytest.mark.parametrize("fails", [False, True])
def test_an_environment_that_was_left_half_made_is_made_the_next_time(tmp_path, fails):
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
    if fails:
        (tmp_path / "uv-fails").touch()
    for _ in range(2):
        done = subprocess.run(["bash", str(tmp_path / "run_all.sh")], **options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "ran notebooks"
    assert len(done.stdout.splitlines()) == 1  # nothing is set up again
    by_pip = ["pip requirements.txt"] * fails
    installed = ["pip uv", "uv requirements.txt", *by_pip]
    assert (tmp_path / "installed").read_text().splitlines() == installed


# What options mean


@pytest.mark.parametrize(
    ("text", "seconds"), [("", None), ("90s", 90), ("45m", 2700), ("1.5h", 5400)]
)
def test_a_budget_is_a_number_with_its_unit(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["45", "m", "-5m", "0s", "infh", "nanm", "5 minutes", "1d"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match=re.escape(repr(text))):
        parse_budget(text)


@pytest.mark.parametrize(
    ("only", "start", "chosen"),
    [
        ("", "", NAMES),
        ("03, 00", "", [n for n in NAMES if n[:2] in ("00", "03")]),
        ("", "02", [n for n in NAMES if n[:2] >= "02"]),
    ],
)
def test_notebooks_are_chosen_by_number_and_come_in_order(only, start, chosen):
    assert [path.stem for path in choose(only, start)] == chosen


def test_a_choice_of_no_notebook_is_refused():
    with pytest.raises(UsageError, match="no notebook is both"):
        choose("00", "02")


def test_a_workspace_takes_what_is_asked_and_else_the_profiles_own(
    demo_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path))
    workspace = open_workspace("smoke", str(demo_root))
    assert workspace.categories == PROFILES["smoke"].categories
    assert (workspace.results, workspace.budget) == (tmp_path / "smoke", None)
    runs = planned(workspace, "table1_image_level")
    assert workspace.missing(runs) == runs
    for name, value in {"SEEDS": "3", "BUDGET": "1m", "WEIGHTS": str(tmp_path)}.items():
        monkeypatch.setenv(f"CPLIB_{name}", value)
    workspace = open_workspace("smoke", str(demo_root), "fabric, sieve")
    assert (workspace.budget, workspace.places.weights) == (60, tmp_path)
    assert workspace.shown == ("brick", "sieve", "fabric")
    runs = planned(workspace, "table1_image_level")
    runs = {run: names for run, names in runs.items() if run.method == "cutpaste"}
    cells = [(category, seed) for category in workspace.shown for seed in range(3)]
    assert [(run.category, run.seed) for run in runs] == cells
    assert list(workspace.missing(runs)) == [run for run in runs if run.category != "brick"]
    monkeypatch.setenv("CPLIB_SEEDS", "1")
    few = open_workspace("smoke", str(demo_root), "sieve")
    runs = planned(few, "table1_image_level")
    assert {r.seed for r in runs if r.method == METHOD} == {0, 1}  # the profile's
    assert {r.seed for r in few.missing(runs)} == {0}


def test_another_data_set_is_named_in_its_runs_and_has_results_of_its_own(
    demo_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("MVTEC_ROOT", str(demo_root))
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path))
    workspace = open_workspace("quick")
    assert workspace.places.data == demo_root
    assert set(workspace.categories) == {"brick", "fabric", "sieve"}
    assert workspace.results == tmp_path / "quick-demo"
    assert {run.dataset for run in planned(workspace, "table1_image_level")} == {"demo"}


def test_without_mvtec_a_workspace_opens_and_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("CPLIB_RESULTS", str(tmp_path))
    workspace = open_workspace("quick")
    assert workspace.places.data is None
    runs = planned(workspace, "table1_image_level")
    assert len(frame(runs, workspace.places)) == 0 and len(runs)
    with pytest.raises(UsageError, match="MVTEC_ROOT"):
        workspace.load("bottle", "train")
    with pytest.raises(UsageError, match="MVTEC_ROOT"):
        workspace.execute(workspace.missing(runs))


def test_what_is_no_run_cannot_be_repeated(tmp_path, capsys):
    assert status(["rerun", str(tmp_path), "--data", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line
