"""The checks of a GPU, with the CPU as the device that is checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "gpu"


def test_the_cpu_computes_what_the_cpu_computes():
    command = [sys.executable, FOLDER / "check.py", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in lines if not line.startswith("passed ")] == []
    subjects = {line.split()[1].rstrip(":") for line in lines}
    assert subjects == {"augment", "train", "resume", "features", "scores", "detector"}


@pytest.mark.parametrize("found", [2.0, float("nan"), ValueError("two"), ImportError("nothing")])
def test_a_check_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys, found):
    monkeypatch.syspath_prepend(str(FOLDER))
    import check

    def one():
        if isinstance(found, Exception):
            raise found
        return found, 1, "apart"

    monkeypatch.setattr(check, "checks", lambda device: {"one": one, "two": lambda: (1, 1, "")})
    monkeypatch.setattr(sys, "argv", ["check.py", "--device", "cpu"])
    state = "skipped" if isinstance(found, ImportError) else "FAILED"
    assert check.main() == (state == "FAILED")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{state} one: ") and second.startswith("passed two: ")
