"""The benchmarks, end to end with tiny settings."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "64", "--seconds", "0.2", "--repeats", "1", "--threads", "1"]
TRAIN = [*TINY, "--sources", "4"]


def benchmark(script, *options) -> subprocess.CompletedProcess:
    """Run a benchmark as a user does."""
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def printed(done) -> dict[str, float]:
    """The values of the printed table, by their names."""
    assert done.returncode == 0, done.stderr
    about, table = done.stdout.split("\n\n")
    assert "; 1 threads, PyTorch " in about
    head, rule, *rows = ([c.strip() for c in x.strip("|").split("|")] for x in table.splitlines())
    assert (head, rule) == (["what", "value", "unit"], ["---", "---:", "---"])
    return {what: float(value) for what, value, unit in rows}


def test_the_training_step_is_timed_against_a_plain_loop(demo_root):
    rows = printed(benchmark("train", "--data", demo_root, "--category", "sieve", *TRAIN))
    assert min(rows.values()) > 0
    ratio = rows["training step"] / rows["plain way"]
    assert rows["plain way against ours"] == pytest.approx(ratio, rel=0.02)  # one turn
    spent = rows["augmentation"] / 1000 / (12 / rows["training step"])
    assert rows["... of a step"] == pytest.approx(100 * spent, rel=0.02)
    assert "network, forward and backward" in rows
    # Nobody notices on a CPU when operations are added, and on a GPU each is a launch.
    assert rows["... of its augmentation"] <= 360
    assert rows["kernel launches of a step"] <= 860
    assert {"whole images in fp32", "64-px crops in fp32"} <= rows.keys()


@pytest.mark.parametrize("window", ["16", "32"])
def test_dense_scoring_is_timed_against_equal_scores(demo_root, window):
    options = ["--data", demo_root, "--category", "sieve", *TINY]
    options += ["--window", window, "--stride", "16", "--images", "3"]
    rows = printed(benchmark("dense", *options))
    assert min(rows.values()) > 0
    assert rows["difference of the scores"] < 1e-2
    assert rows["plain way against ours"] == pytest.approx(
        rows["plain way"] / rows["our way"], rel=0.02
    )


def test_a_missing_folder_is_one_clear_line(tmp_path):
    done = benchmark("train", "--data", tmp_path / "nowhere", *TRAIN)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ") and "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def per_image(monkeypatch):
    """The images of the plain loop: one grey image."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torch
    from train import PerImage

    from cplib.run import Run

    torch.manual_seed(0)
    run = Run(method="cutpaste_3way", category="x", size=128)
    return PerImage(run, torch.full((1, 3, 128, 128), 128, dtype=torch.uint8))


def test_the_reference_loop_augments_as_the_paper_says(per_image):
    ramp = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    changed = {"cutpaste": [], "scar": []}
    for name, shares in changed.items():
        for _ in range(30):
            made = getattr(per_image, name)(ramp)
            assert made.size == ramp.size
            shares.append((np.asarray(made) != np.asarray(ramp)).any(2).mean())
    assert 0.01 < sum(changed["cutpaste"]) / 30 < 0.15
    assert 0.0005 < sum(changed["scar"]) / 30 < 0.02
    assert max(changed["scar"]) < 0.03


def test_a_turned_scar_carries_no_black_corners(per_image):
    grey = per_image.images[0]
    for _ in range(20):
        assert np.asarray(per_image.scar(grey)).min() > 90
    assert per_image[0].shape == (3, 3, 128, 128)


def test_candidates_are_measured_once_and_the_best_with_three_seeds(demo_root, tmp_path):
    file = tmp_path / "choice.csv"
    options = ["--data", demo_root, "--names", "random network (128 px)", "--out", file]
    options += ["--device", "cpu", "--jobs", "1"]
    done = benchmark("search", *options)
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(file)
    seeds = rows.groupby("object")["seed"].apply(sorted)
    assert seeds.to_dict() == dict.fromkeys(("brick", "fabric", "sieve"), [0, 1, 2])
    assert rows["auroc"].between(0, 100).all()
    assert len(benchmark("search", *options).stdout.splitlines()) == 2  # only the ranking
    assert len(pd.read_csv(file)) == 9
