"""README's recipes, tried in a copy; and the command on machines as people have them."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from cplib.apps.workspace import ROOT

OWN = "own-above,Own detects better.,here,table5_binary_vs_3way,image_auroc,own > cutpaste,,,,\n"
RECIPES = [  # file, what stands there, what is written before it
    ("cplib/augment.py", '"rotation": {f"', '"own": {"normal": normal, "pasted": cutpaste},\n    '),
    ("cplib/study/tables.py", '"cutpaste", "cutpaste_scar", "cutpaste_union"', '"own", '),
    (
        "cplib/study/tables.py",
        '"table4_cutout_variants": T',
        '"mine": Table(notebook="06", rows=(Row("own"),)), ',
    ),
    ("cplib/study/profiles.toml", "[quick]", '[own]\nlike = "smoke"\nother_seeds = 2\n\n'),
    ("cplib/study/claims.csv", "rotation-cutout-scar-below,", OWN),
]
PROGRAM = """
import sys
from cplib.apps.workspace import open_workspace
from cplib.study.claims import readable, measured, verdicts
from cplib.study.report import compare, wide
from cplib.study.tables import measure
workspace = open_workspace("own", sys.argv[1], "sieve")
for name in ("table5_binary_vs_3way", "mine"):
    print(wide(compare(workspace, name, measure(workspace, name))).to_string())
print(readable(verdicts(measured(workspace)))[0].loc["Own detects better."].to_string())
"""


@pytest.fixture
def clone(tmp_path):
    """A copy of the code in another folder than the environment's own."""
    for name in ("cplib", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


def run_in(clone, *arguments, **environment):
    """What a command in the copy says; it has to exit with 0."""
    results = {"CPLIB_RESULTS": str(clone / "results"), "OMP_NUM_THREADS": "1"}
    options = {"env": os.environ | results | environment, "cwd": clone, "capture_output": True}
    done = subprocess.run([sys.executable, *arguments], **options, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_a_method_a_table_a_profile_and_a_claim_are_added_as_the_readme_says(clone, demo_root):
    for file, there, new in RECIPES:
        text = (clone / file).read_text(encoding="utf-8")
        assert text.count(there) == 1, file
        (clone / file).write_text(text.replace(there, new + there), encoding="utf-8")
    said = run_in(clone, "-c", PROGRAM, str(demo_root))
    rows = [line.split()[:2] for line in said.splitlines() if line.startswith("own ")]
    assert len(rows) == 2  # of two tables
    assert "open, 1 category" in said


def test_the_command_runs_on_a_machine_with_settings_of_its_own(clone, demo_root, tmp_path):
    """An environment of another clone, a foreign kernel, text that is not UTF-8, a LaTeX user."""
    with (clone / "cplib" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("\nprint('imported from', __file__)\n")
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["false"], "display_name": "", "language": "python"}')
    (tmp_path / "matplotlibrc").write_text("text.usetex: True")
    odd = {
        "JUPYTER_PATH": str(tmp_path / "jupyter"),
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
    }
    odd |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = ["-m", "cplib", "notebooks", "--profile", "smoke", "--only", "01"]
    said = run_in(clone, *command, "--data", str(demo_root), **odd)
    assert f"imported from {clone}" in said
    executed = clone / "results" / "smoke" / "notebooks" / "01_augmentations.ipynb"
    outputs = [o for cell in nbformat.read(executed, 4).cells for o in cell.get("outputs", [])]
    assert any(f"imported from {clone}" in o.get("text", "") for o in outputs)
