"""The benchmark of the training step, end to end with tiny settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "64", "--sources", "4", "--seconds", "0.5", "--repeats", "1"]
TINY += ["--threads", "1", "--workers", "1"]
ROWS = {
    "peak memory of the process": "GiB",
    "training step": "images/s",
    "reference loop": "images/s",
    "training step against reference loop": "times",
    "augmentation": "ms/step",
    "... of a step": "%",
    "network, forward and backward": "TFLOP/s",
    "bf16 matrix product, 2048x2048": "TFLOP/s",
    "network against matrix product": "%",
    "step at 64 px": "s",
    "step of 12 images": "s",
    "step with 8 pictures to draw from": "s",
    "features of 8 pictures": "s",
}


def benchmark(*options, script="train") -> subprocess.CompletedProcess:
    """Run the benchmark as anyone would."""
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, row by row."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_it_prints_one_table_and_writes_the_same_numbers(demo_root, tmp_path):
    file = tmp_path / "numbers.json"
    done = benchmark("--data", demo_root, "--category", "sieve", *TINY, "--json", file)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # the profiler has a line or two to say
    about, table = done.stdout.split("\n\n")
    head, rule, *rows = cells(table)
    assert head == ["what", "value", "unit"]
    assert rule == ["---", "---:", "---"]
    written = json.loads(file.read_text())
    assert [row[0] for row in rows] == list(written["rows"])
    for what, value, unit in rows:
        row = written["rows"][what]
        assert unit == row["unit"] == ROWS.get(what, unit)
        assert float(value) == pytest.approx(row["value"], rel=0.01)
        assert row["value"] > 0
    assert set(ROWS) <= set(written["rows"])
    assert written["rows"]["... of a step"]["value"] < 100
    assert written["machine"]["threads"] == 1
    assert about.startswith(written["machine"]["device"])
    assert written["options"]["size"] == 64


@pytest.mark.parametrize("window", ["16", "32"])
def test_dense_scoring_is_timed_against_equal_scores(demo_root, tmp_path, window):
    options = ["--size", "64", "--window", window, "--stride", "16", "--pictures", "3"]
    options += ["--seconds", "0.1", "--repeats", "1", "--threads", "1", "--precision", "fp32"]
    file = tmp_path / "numbers.json"
    options += ["--data", demo_root, "--category", "sieve", "--json", file]
    done = benchmark(*options, script="dense")
    assert done.returncode == 0, done.stderr
    rows = {what: row["value"] for what, row in json.loads(file.read_text())["rows"].items()}
    assert [cell[0] for cell in cells(done.stdout.split("\n\n")[1])[2:]] == list(rows)
    assert rows["difference of the scores"] < 1e-2
    shares = ("features of windows", "anomaly maps", "Gaussians and scores")
    assert sum(rows[f"... {share}"] for share in shares) == pytest.approx(100)
    assert rows["our way"] > 0


def test_a_missing_folder_is_one_clear_line(tmp_path):
    done = benchmark("--data", tmp_path / "nowhere", *TINY)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "nowhere" in line


@pytest.fixture
def per_picture(monkeypatch):
    """The reference loop's pictures: a flat grey one, and one with a gradient."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torch
    from train import PerPicture

    from cplib.run import Run

    torch.manual_seed(0)
    run = Run(method="cutpaste_3way", category="x", size=128)
    return PerPicture(run, torch.full((1, 3, 128, 128), 128, dtype=torch.uint8))


def test_the_reference_loop_augments_as_the_paper_says(per_picture):
    ramp = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    changed = {"cutpaste": [], "scar": []}
    for name, shares in changed.items():
        for _ in range(30):
            made = getattr(per_picture, name)(ramp)
            assert made.size == ramp.size
            shares.append((np.asarray(made) != np.asarray(ramp)).any(2).mean())
    assert 0.01 < sum(changed["cutpaste"]) / 30 < 0.15
    assert 0.0005 < sum(changed["scar"]) / 30 < 0.02
    assert max(changed["scar"]) < 0.03


def test_a_turned_scar_carries_no_black_corners(per_picture):
    grey = per_picture.pictures[0]
    for _ in range(20):
        assert np.asarray(per_picture.scar(grey)).min() > 90
    assert per_picture[0].shape == (3, 3, 128, 128)


def test_schedules_are_compared_on_held_out_images_and_measured_once(demo_root, tmp_path):
    file = tmp_path / "choice.csv"
    options = ["--data", demo_root, "--categories", "sieve", "--only", "untrained", "--out", file]
    assert "untrained, sieve" in benchmark(*options, script="schedule").stdout
    rows = pd.read_csv(file)
    assert len(rows) == 8
    assert rows["auroc"].between(0, 100).all()
    assert rows["pretext_accuracy"].between(0, 100).all()
    assert benchmark(*options, script="schedule").stdout == ""
    assert len(pd.read_csv(file)) == 8
