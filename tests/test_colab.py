"""The notebooks on Colab, as far as that can be tested without it: badge, first cell, packages.

``./run_all.sh test --colab`` runs every notebook with Colab's versions.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from cplib import badges, colab
from cplib.__main__ import main
from cplib.workspace import ROOT, open_workspace

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAND_IN = ROOT / "tests" / "colab"
ADDRESS = "https://github.com/someone/something"


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def one_line_of_cell(address):
    return badges.CELL.read_text().strip().replace("REPOSITORY", address)


# Badges


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_the_badge_and_the_cell_of_the_repositorys_address(path):
    notebook, address = nbformat.read(path, 4), badges.repository(ROOT)
    assert badges.badge(address, path.name) in sources(notebook, "markdown")[0].splitlines()
    assert sources(notebook, "code")[0] == one_line_of_cell(address)


def test_a_badge_opens_its_notebook_or_colabs_github_browser():
    start = "(https://colab.research.google.com/github"
    link = f"{start}/someone/something/blob/main/notebooks/00_a.ipynb)"
    assert badges.badge(ADDRESS, "00_a.ipynb").endswith(link)
    assert badges.badge("", "00_a.ipynb").endswith(f"{start})")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of two notebooks and of pyproject.toml, with an address."""
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS[:2]:
        (tmp_path / "notebooks" / path.name).write_text(path.read_text())
    text = (ROOT / "pyproject.toml").read_text()
    assert f'repository = "{badges.repository(ROOT)}"' in text
    text = text.replace(f'"{badges.repository(ROOT)}"', f'"{ADDRESS}"')
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr("cplib.__main__.ROOT", tmp_path)
    return tmp_path


def test_one_address_marks_every_notebook_and_a_second_time_nothing_changes(repository):
    assert main(["badges"]) == 0
    written = {path: path.read_text() for path in (repository / "notebooks").iterdir()}
    for path, text in written.items():
        assert text.count("colab-badge.svg") == 1
        assert f"github/someone/something/blob/main/notebooks/{path.name}" in text
        assert f'repository = \\"{ADDRESS}\\"' in text
        title = sources(nbformat.read(path, 4), "markdown")[0]
        assert (
            title.splitlines()[0]
            == sources(nbformat.read(NOTEBOOKS[0].with_name(path.name), 4), "markdown")[
                0
            ].splitlines()[0]
        )
    assert main(["badges"]) == 0
    assert {path: path.read_text() for path in written} == written


def test_an_address_that_colab_cannot_open_is_refused(repository, capsys):
    file = repository / "pyproject.toml"
    file.write_text(file.read_text().replace(ADDRESS, "git@example.org:a/b"))
    assert main(["badges"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "git@example.org:a/b" in line


def test_a_notebook_without_the_cell_is_refused(repository):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# 99 a"), nbformat.v4.new_code_cell("import this")]
    )
    with pytest.raises(ValueError, match="99_a.ipynb"):
        badges.mark(notebook, ADDRESS, "99_a.ipynb")


# The first cell


def test_elsewhere_the_cell_does_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (list(sys.path), dict(os.environ))
    space = {}
    exec(one_line_of_cell(ADDRESS), space)
    assert (sys.path, dict(os.environ)) == before
    assert set(space) <= {"__builtins__", "os", "subprocess", "sys"}
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository whose cplib.colab only says that it was called."""
    root = tmp_path_factory.mktemp("origin")
    (root / "notebooks").mkdir()
    (root / "notebooks" / "00_a.ipynb").touch()
    (root / "cplib").mkdir()
    (root / "cplib" / "__init__.py").touch()
    (root / "cplib" / "colab.py").write_text(
        "import os\ndef start(keep): print('start', keep, os.path.basename(os.getcwd()))\n"
    )
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root.as_uri()


def on_colab(cell, folder, answer=""):
    """What the cell prints in a process that has google.colab, begun in a folder."""
    environment = os.environ | {"PYTHONPATH": str(STAND_IN)}
    done = subprocess.run(
        [sys.executable, "-c", cell],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        input=answer,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_on_colab_a_notebook_opened_alone_brings_its_repository(origin, tmp_path):
    cell = one_line_of_cell(origin)
    assert on_colab(cell, tmp_path) == "start True notebooks\n"
    assert (tmp_path / "cutpaste" / "notebooks" / "00_a.ipynb").exists()
    (tmp_path / "cutpaste" / "kept").touch()
    assert on_colab(cell, tmp_path) == "start True notebooks\n"  # another notebook, same machine
    assert (tmp_path / "cutpaste" / "kept").exists()
    assert on_colab(f"{cell}\n{cell}", tmp_path) == 2 * "start True notebooks\n"


def test_on_colab_a_notebook_in_its_repository_clones_nothing(origin, tmp_path):
    on_colab(one_line_of_cell(origin), tmp_path)
    inside = tmp_path / "cutpaste" / "notebooks"
    assert on_colab(one_line_of_cell("file:///nowhere"), inside) == "start True notebooks\n"
    assert [path.name for path in inside.iterdir()] == ["00_a.ipynb"]


def test_on_colab_an_address_that_is_not_set_is_asked_for(origin, tmp_path):
    printed = on_colab(one_line_of_cell(""), tmp_path, answer=f"{origin}\n")
    assert printed == "Address of the repository: start True notebooks\n"


def test_on_colab_drive_can_be_declined(origin, tmp_path):
    cell = one_line_of_cell(origin).replace("keep_on_drive = True", "keep_on_drive = False")
    assert on_colab(cell, tmp_path) == "start False notebooks\n"


# What it calls


def test_the_module_needs_nothing_that_colab_may_lack():
    tree = ast.parse(Path(colab.__file__).read_text())
    names = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = {a.name for n in names if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in names if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} <= sys.stdlib_module_names


@pytest.fixture
def bare(monkeypatch):
    """The environment without what the cell sets, restored afterwards."""
    for name in ("CPLIB_RESULTS", "CPLIB_MAX_CATEGORIES", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def drive(tmp_path, monkeypatch, bare):
    """A stand-in for Drive beside a stand-in for the clone; says where it was mounted."""
    mounted = []
    module = SimpleNamespace(drive=SimpleNamespace(mount=mounted.append))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    return mounted


def test_on_drive_a_workspace_has_one_category_and_goes_on_in_another_session(
    drive, tmp_path, capsys, monkeypatch, demo_root
):
    monkeypatch.setattr(colab, "install", lambda missing, pins: None)
    colab.start(True)
    kept = tmp_path / "drive" / "MyDrive" / "cutpaste"
    assert drive == [str(tmp_path / "drive")]
    assert str(kept) in capsys.readouterr().out
    workspace = open_workspace("smoke", data_root=str(demo_root))
    assert workspace.results == kept / "smoke"
    assert workspace.categories == ("brick",)
    assert os.environ["PYTHONPATH"] == str(ROOT)
    everything = open_workspace("smoke", data_root=str(demo_root), categories="brick,gear")
    assert everything.categories == ("brick", "gear")
    named = open_workspace("smoke", data_root=str(demo_root), results=str(tmp_path / "mine"))
    assert named.results == tmp_path / "mine"


def test_without_drive_results_stay_and_it_is_said(drive, capsys, monkeypatch):
    monkeypatch.setattr(colab, "install", lambda missing, pins: None)
    colab.start(False)
    assert drive == []
    assert "CPLIB_RESULTS" not in os.environ
    assert "lost when the session ends" in capsys.readouterr().out


def test_a_person_who_refuses_drive_can_work_all_the_same(drive, monkeypatch):
    def refuse(_):
        raise ValueError("mount failed")

    monkeypatch.setattr(sys.modules["google.colab"].drive, "mount", refuse)
    assert "no Drive (mount failed)" in colab.keep_on_drive()
    assert "CPLIB_RESULTS" not in os.environ


def test_a_clone_on_drive_keeps_its_own_results(drive, monkeypatch):
    monkeypatch.setattr(colab, "ROOT", Path("/content/drive/MyDrive/cutpaste"))
    assert "MyDrive/cutpaste/results" in colab.keep_on_drive()
    assert drive == []


def test_what_was_set_before_is_left(bare, monkeypatch):
    monkeypatch.setattr(colab, "install", lambda missing, pins: None)
    monkeypatch.setenv("CPLIB_MAX_CATEGORIES", "3")
    monkeypatch.setenv("PYTHONPATH", "mine")
    colab.start(False)
    assert os.environ["CPLIB_MAX_CATEGORIES"] == "3"
    assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}mine"


def test_here_nothing_is_missing():
    missing, pins = colab.requirements()
    assert missing == []
    assert any(pin.startswith("torch==") for pin in pins)


def versions(**changed):
    """A stand-in for importlib.metadata.version: all new, but for these; None: not there."""

    def version(name):
        found = changed.get(name.replace("-", "_"), "99.0")
        if found is None:
            raise PackageNotFoundError(name)
        return found

    return version


def test_only_what_is_missing_or_too_old_is_installed(monkeypatch):
    monkeypatch.setattr(colab, "version", versions(captum=None, timm="0.9.2", papermill=None))
    missing, pins = colab.requirements()
    assert [line.split(">")[0] for line in missing] == ["captum", "timm"]
    assert "numpy==99.0" in pins
    assert not any(pin.startswith(("captum", "timm")) for pin in pins)


@pytest.mark.parametrize("found", [None, "1.0", "2.11.0+cu128"])
def test_torch_is_never_installed_and_pinned_where_it_is(monkeypatch, found):
    monkeypatch.setattr(colab, "version", versions(torch=found, torchvision=found))
    missing, pins = colab.requirements()
    assert missing == []
    assert (f"torch=={found}" in pins) == (found is not None)


def test_pip_is_told_to_leave_what_is_there(monkeypatch):
    calls = []

    def run(command, check):
        file = command[command.index("-c") + 1]
        calls.append((command, Path(file).read_text().split(), check))

    monkeypatch.setattr(colab.subprocess, "run", run)
    colab.install([], ["torch==2.11.0"])
    assert calls == []
    colab.install(["captum>=0.7"], ["torch==2.11.0", "numpy==2.1.3"])
    ((command, constraints, check),) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == "captum>=0.7"
    assert constraints == ["torch==2.11.0", "numpy==2.1.3"]
    assert check


def test_the_gpu_is_named_and_minutes_only_where_they_were_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(colab, "MINUTES", {})
    noted = json.loads((ROOT / "results" / "demo" / "minutes.json").read_text())
    slow = f"took {sum(noted.values()):.0f} minutes on two cores, with all four categories."
    assert colab.device().startswith("GPU: Tesla T4; not timed on one yet, without one all")
    assert colab.device().endswith(slow)
    monkeypatch.setattr(colab, "MINUTES", {"Tesla T4": 6.4})
    assert colab.device() == "GPU: Tesla T4; all notebooks took 6 minutes on one."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert colab.device().startswith("No GPU: choose one")
    assert colab.device().endswith(slow)


def test_colabs_list_holds_its_versions_and_not_what_it_lacks():
    lines = (ROOT / "requirements-colab.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    expected = {"torch": "2.11", "torchvision": "0.26", "numpy": "2.1", "pandas": "2.2"}
    for name, version in (expected | {"scikit-learn": "1.6"}).items():
        assert pins[name].startswith(f"{version}.")
    assert not {"captum", "papermill", "adeval", "cplib", "jupyterlab"} & set(pins)


def test_a_notebook_that_fails_or_warns_is_found(tmp_path):
    specification = importlib.util.spec_from_file_location("run_on_colab", STAND_IN / "run.py")
    run = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(run)
    for code, found in [
        ("1 / 0", 1),
        ("import sys; print(1, file=sys.stderr)", 1),
        ("print(1)", 0),
    ]:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        assert len(run.problems(notebook, tmp_path)) == found
