"""One Ctrl-C, or SIGTERM, ends the command that executes notebooks; the same command resumes."""

import os
import signal
import subprocess
import sys
import time
import weakref

import nbformat
import psutil
import pytest

from cplib.apps import pages
from cplib.apps.cli import main
from cplib.apps.workspace import ROOT

PARAMETERS = "\n".join(f"{name}: str = ''" for name in ("profile", "data", "categories", "device"))
KERNEL = {"name": "python3", "display_name": "", "language": "python"}
# Deaf to what can be ignored, as is its worker: only a kill ends them.
DEAF = """
import pathlib, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(90)"])
pathlib.Path("begun").touch()
time.sleep(90)
"""
# The command on the notebooks of another folder, its first argument.
OTHER_FOLDER = """
import pathlib, sys
from cplib.apps import cli, notebooks
notebooks.NOTEBOOKS = pathlib.Path(sys.argv[1])
cli.main(sys.argv[2:])
"""


def command(*arguments, results, jobs=2):
    """How to start the command: in a process group of its own, as in a terminal."""
    environment = os.environ | {"CPLIB_RESULTS": str(results), "CPLIB_JOBS": str(jobs)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {
        "args": [sys.executable, *map(str, arguments)],
        "env": environment,
        "start_new_session": True,
        # Also where the tests run in the background, and Ctrl-C is ignored.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }


def runs(process):
    """Whether a process is there and runs; a zombie waits only for its parent to take notice."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop(options, number, ready, log):
    """Start a command, signal its group once when it is ``ready``; check how it ends."""
    with log.open("w") as out:
        process = subprocess.Popen(**options, stdout=out, stderr=subprocess.PIPE, text=True)
    until, started = time.monotonic() + 600, []
    whole = psutil.Process(process.pid)
    try:
        while not ready():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        started = whole.children(recursive=True)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=20)
        left = list(filter(runs, started))
    finally:
        for one in filter(runs, [whole, *started]):
            one.kill()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped: the same command resumes"
    assert len(started) >= 2  # a kernel and a worker
    assert left == []


def test_ctrl_c_ends_the_training_and_keeps_the_finished_runs(demo_root, tmp_path):
    arguments = ("-m", "cplib", "notebooks", "--profile", "smoke", "--data", demo_root)
    options = command(*arguments, "--only", "02", "--budget", "1h", results=tmp_path)
    finished = lambda: list(tmp_path.glob("smoke/runs/[!.]*"))  # noqa: E731
    stop(options, signal.SIGINT, lambda: len(finished()) >= 2, tmp_path / "log")
    notebooks = tmp_path / "smoke" / "notebooks"
    assert list(notebooks.glob("*.ipynb")) == []
    before = {path / "run.json": (path / "run.json").stat().st_mtime_ns for path in finished()}
    again = command(*arguments, "--only", "02", "--budget", "1s", results=tmp_path, jobs=1)
    assert subprocess.run(**again, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(notebooks.glob("*.ipynb"))) == 1


def test_sigterm_kills_a_deaf_kernel_and_keeps_what_ran_beside_it(demo_root, tmp_path):
    for name, source in {"00_ends": "", "01_deaf": DEAF}.items():
        parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        cells = [nbformat.v4.new_markdown_cell(f"# {name}"), parameters]
        cells.append(nbformat.v4.new_code_cell(source))
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    arguments = ("-c", OTHER_FOLDER, tmp_path, "notebooks", "--profile", "smoke")
    options = command(*arguments, "--data", demo_root, results=tmp_path)
    executed = tmp_path / "smoke" / "notebooks"
    files = (tmp_path / "begun", tmp_path / "smoke" / "minutes.json")  # the latter: after 00
    ready = lambda: all(file.exists() for file in files)  # noqa: E731
    stop(options, signal.SIGTERM, ready, tmp_path / "log")
    assert [path.name for path in executed.glob("*.ipynb")] == ["00_ends.ipynb"]


def test_an_interrupt_that_python_ignores_in_a_callback_comes_again(monkeypatch, capsys):
    def interrupted(results):
        thing = type("Thing", (), {})()
        watched = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        assert watched() is None
        time.sleep(10)

    monkeypatch.setattr(pages, "write_pages", interrupted)
    # In the background a shell lets its commands ignore SIGINT: this suite, too.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            main(["pages", "--profile", "demo"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith("\nstopped: the same command resumes\n")
