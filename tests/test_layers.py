"""The tree: who may import whom, and what a style checker says."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [["lint-imports", "--no-cache"], ["ruff", "check", "."], ["ruff", "format", "--check", "."]],
    ids=["layers", "style", "format"],
)
def test_a_checker_finds_nothing(command):
    name, *options = command
    done = subprocess.run([BIN / name, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
