"""The notebooks on Colab, as far as that can be tested without it: badge, first cell, packages.

``./run_all.sh test --colab`` runs every notebook with Colab's versions.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import nbformat
import pytest
from packaging.requirements import Requirement

from cplib.apps import colab
from cplib.apps.workspace import ROOT, open_workspace

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAND_IN = ROOT / "tests" / "colab"
ADDRESS = "https://github.com/someone/something"


def first(path, kind):
    """The source of a notebook's first cell of a kind."""
    return next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == kind)


def cell_of(address):
    return colab.CELL.read_text().strip().replace("REPOSITORY", address)


def test_the_repositorys_address_marks_every_notebook_and_what_cannot_be_marked_is_refused(
    tmp_path,
):
    settings = tmp_path / "pyproject.toml"
    copies = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    badge = "https://colab.research.google.com/github/someone/something/blob/main/notebooks/"
    settings.write_text(f'[tool.cplib]\nrepository = "{ADDRESS}"\n')
    for _ in range(2):
        colab.write_badges(tmp_path)
        for path in NOTEBOOKS:
            assert first(copies / path.name, "markdown").count(f"({badge}{path.name})") == 1
            assert f'repository = "{ADDRESS}"' in first(copies / path.name, "code")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    colab.write_badges(tmp_path)
    assert len(NOTEBOOKS) == 14
    for path in NOTEBOOKS:  # as they are committed
        assert (copies / path.name).read_text() == path.read_text()
    path = copies / NOTEBOOKS[0].name
    path.write_text(path.read_text().replace("On Colab only", "import this"))
    with pytest.raises(ValueError, match=path.name):
        colab.write_badges(tmp_path)
    settings.write_text('[tool.cplib]\nrepository = "git@example.org:a/b"\n')
    with pytest.raises(ValueError, match="git@example.org:a/b"):
        colab.write_badges(tmp_path)


def test_elsewhere_the_cell_does_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (list(sys.path), dict(os.environ))
    exec(cell_of(ADDRESS), {})
    assert (sys.path, dict(os.environ)) == before
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The address of a repository whose cplib.apps.colab only says that it was called."""
    root = tmp_path_factory.mktemp("origin")
    says = "def start(keep): print('start', keep, __file__.split('/')[-4])\n"
    for name in ("notebooks/00_a.ipynb", "cplib/__init__.py", "cplib/apps/__init__.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / "cplib" / "apps" / "colab.py").write_text(says)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root.as_uri()


def on_colab(cell, folder, answer=""):
    """What the cell prints in a process that has google.colab, begun in a folder."""
    options = {"capture_output": True, "text": True, "check": True, "input": answer}
    options |= {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(STAND_IN)}}
    done = subprocess.run([sys.executable, "-c", cell], **options)
    assert done.stderr == ""
    return done.stdout


def test_on_colab_a_notebook_opened_alone_brings_its_repository_once(origin, tmp_path):
    cell = cell_of(origin).replace("keep_on_drive = True", "keep_on_drive = False")
    assert on_colab(f"{cell}\n{cell}", tmp_path) == 2 * "start False cutpaste\n"
    inside = tmp_path / "cutpaste" / "notebooks"
    for folder in (tmp_path, inside):  # another notebook, and one in its repository
        assert on_colab(cell_of("file:///nowhere"), folder) == "start True cutpaste\n"
    assert [path.name for path in inside.iterdir()] == ["00_a.ipynb"]
    assert not (tmp_path / "drive").exists()  # with an address it is not needed


@pytest.mark.parametrize("top", ["cutpaste", "name-main"])
def test_without_an_address_an_archive_on_drive_will_do(origin, tmp_path, top):
    archive = tmp_path / "drive" / "MyDrive" / "cutpaste.zip"
    archive.parent.mkdir(parents=True)
    command = ["git", "archive", "--format=zip", f"--prefix={top}/", "-o", str(archive), "HEAD"]
    subprocess.run(command, cwd=origin.removeprefix("file://"), check=True)
    cell = cell_of("")
    assert on_colab(f"{cell}\n{cell}", tmp_path) == 2 * f"start True {top}\n"
    archive.unlink()  # once is enough
    for folder in (tmp_path, tmp_path / top / "notebooks"):
        assert on_colab(cell, folder) == f"start True {top}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"drive", top}


@pytest.mark.parametrize("mounts", [True, False])
def test_without_an_address_and_an_archive_the_address_is_asked_for(origin, tmp_path, mounts):
    if not mounts:
        (tmp_path / "drive").touch()  # in the place of the stand-in's folder
    printed = on_colab(cell_of(""), tmp_path, answer=f"{origin}\n")
    assert printed == "Repository's address: start True cutpaste\n"


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """Stand-ins for Drive and pip, and a bare environment; says how the two were called."""
    for name in ("CPLIB_RESULTS", "CPLIB_MAX_CATEGORIES", "CPLIB_CHECKPOINT_SECONDS"):
        monkeypatch.setenv(name, "")  # so that what the cell sets is undone
        monkeypatch.delenv(name)
    mounted, pip = [], []
    module = SimpleNamespace(drive=SimpleNamespace(mount=mounted.append))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: pip.append(command[1:]))
    return SimpleNamespace(mounted=mounted, pip=pip)


def test_on_drive_a_workspace_has_one_category_and_resumes_in_another_session(
    drive, tmp_path, capsys, demo_root
):
    colab.start(True)
    kept = tmp_path / "drive" / "MyDrive" / "cutpaste"
    assert drive.mounted == [str(tmp_path / "drive")]
    torch = [f"{name}=={version(name)}" for name in ("torch", "torchvision")]  # stays as it is
    assert drive.pip == [["-m", "pip", "install", "-qq", *torch, "-e", str(ROOT)]]
    assert str(kept) in capsys.readouterr().out
    workspace = open_workspace("smoke", str(demo_root))
    assert workspace.results == kept / "smoke"
    assert workspace.categories == ("brick",)
    assert Path.cwd() == ROOT / "notebooks"
    assert open_workspace("smoke", str(demo_root), "brick,sieve").categories == ("brick", "sieve")


def test_without_drive_results_stay_it_is_said_and_what_was_set_is_left(drive, capsys, monkeypatch):
    monkeypatch.setenv("CPLIB_MAX_CATEGORIES", "3")
    colab.start(False)
    assert drive.mounted == []
    assert "CPLIB_RESULTS" not in os.environ
    assert "lost when the session ends" in capsys.readouterr().out
    assert os.environ["CPLIB_MAX_CATEGORIES"] == "3"


def test_who_refuses_drive_or_cloned_there_can_work_all_the_same(drive, monkeypatch):
    mount = Mock(side_effect=ValueError("mount failed"))
    monkeypatch.setattr(sys.modules["google.colab"].drive, "mount", mount)
    assert "no Drive (mount failed)" in colab.keep_on_drive()
    monkeypatch.setattr(colab, "ROOT", Path("/content/drive/MyDrive/cutpaste"))
    assert "MyDrive/cutpaste/results" in colab.keep_on_drive()
    assert mount.call_count == 1
    assert "CPLIB_RESULTS" not in os.environ


def test_what_colab_has_suffices_and_tools_of_the_command_line_are_not_wanted_there():
    """So that pip leaves Colab's packages, torch among them, and installs no JupyterLab."""
    lines = (ROOT / "requirements-colab.txt").read_text().splitlines()
    there = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    assert {"torch", "torchvision", "numpy", "pandas"} <= set(wanted) & set(there)
    assert [name for name in set(wanted) & set(there) if there[name] not in wanted[name]] == []
    assert not {"jupyterlab", "papermill", "nbclient", "nbconvert"} & set(wanted)
