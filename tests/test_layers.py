"""The tree: who may import whom, what a style checker says, one list of packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


def test_conda_takes_the_same_list_of_packages_and_a_python_that_is_tested():
    python, _, by_pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert by_pip == {"pip": ["-r requirements.txt"]}
    if os.environ.get("CI"):
        assert python == f"python={sys.version_info.major}.{sys.version_info.minor}"
