"""Runs that are killed, starved, repeated, shared or spread: their scores stay the same."""

import builtins
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from cplib import runs as runs_module
from cplib import sweep, train
from cplib.__main__ import main
from cplib.config import Run
from cplib.metrics import image_metrics
from cplib.runs import collect, ensemble, execute, run_folder
from cplib.sweep import estimate, execute_all, missing

GEAR = Run(method="cutpaste", category="gear", dataset="demo", size=64, updates=8, sources=4)
BRICK = replace(GEAR, category="brick", updates=4)
SECOND = replace(BRICK, seed=1)
RUNS = [GEAR, BRICK, SECOND]

# A process of its own: `python -c CHILD DATA RESULTS MOMENT`, killed from outside, or by itself
# at a moment that a clock would hardly ever hit.
CHILD = """
import os, signal, sys, time
from pathlib import Path
import torch
from cplib import runs, train
from cplib.config import Run
from cplib.runs import execute

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def tardy(*args, **options):
    print("update", flush=True)
    time.sleep(0.1)  # so that a fast machine does not finish first
    return step(*args, **options)

torch.set_num_threads(1)
data, results, moment = sys.argv[1:]
os.environ["CPLIB_CHECKPOINT_SECONDS"] = "0"
step, train.step = train.step, tardy
if moment == "half a checkpoint":
    Path.replace = die
if moment == "half a folder":
    os.rename = die
if moment == "whole folder":
    runs.tidy = die
print("ready", flush=True)
run = Run(method="cutpaste", category="gear", dataset="demo", size=64, updates=8, sources=4)
execute(run, data_root=data, results=results)
"""


def child(code: str, *arguments, **options) -> subprocess.Popen:
    """A Python process with one thread that runs ``code``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def scores(results: Path, run: Run) -> bytes:
    """A run's scores, as they are on disk."""
    return (run_folder(run, results) / "scores.csv").read_bytes()


def left_behind(results: Path) -> list[str]:
    """What lies in a results folder beside whole runs and checkpoints."""
    files = [*(results / "checkpoints").glob("*"), *(results / "runs").glob(".*")]
    return sorted(file.name for file in files if file.suffix != ".safetensors")


def state(outcome) -> tuple[Run, str]:
    """An outcome without its message."""
    return outcome.run, outcome.state


@pytest.fixture(scope="module")
def undisturbed(demo_root, tmp_path_factory) -> Path:
    """A results folder with the three runs, each executed in one go."""
    results = tmp_path_factory.mktemp("undisturbed")
    for run in RUNS:
        execute(run, data_root=demo_root, results=results)
    return results


@pytest.fixture
def often(monkeypatch):
    """Write a checkpoint after every update."""
    monkeypatch.setenv("CPLIB_CHECKPOINT_SECONDS", "0")


@pytest.fixture
def half_done(demo_root, tmp_path, often, monkeypatch) -> Path:
    """A results folder with the checkpoint of GEAR after five of its eight updates."""
    updates = iter(range(5))
    step = train.step
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda *a, **k: next(updates) + step(*a, **k))
        (outcome,) = execute_all([GEAR], data_root=demo_root, results=tmp_path, jobs=1)
    assert outcome.state == "failed"
    return tmp_path


def checkpoint(results: Path) -> Path:
    """The one checkpoint in a results folder."""
    (file,) = (results / "checkpoints").glob("*.safetensors")
    return file


# Killed


def test_killed_at_random_moments_a_run_ends_with_the_same_scores(demo_root, undisturbed, tmp_path):
    moments = random.Random(20210610)
    kills = resumed = 0
    for _ in range(5):
        resumed += any((tmp_path / "checkpoints").glob("*.safetensors"))
        with child(CHILD, demo_root, tmp_path, "") as process:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            for _ in range(moments.randrange(5)):  # counted in updates: machines differ in speed
                process.stdout.readline()
            time.sleep(moments.uniform(0, 0.5))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
    with child(CHILD, demo_root, tmp_path, "") as process:
        assert process.wait(60) == 0, process.stderr.read()
    assert kills
    assert resumed
    assert scores(tmp_path, GEAR) == scores(undisturbed, GEAR)
    assert list(collect(tmp_path)["id"]) == [GEAR.id]
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("moment", ["half a checkpoint", "half a folder", "whole folder"])
def test_killed_at_the_worst_moment_nothing_is_lost_or_left(
    demo_root, undisturbed, tmp_path, moment
):
    with child(CHILD, demo_root, tmp_path, moment) as process:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert bool(left_behind(tmp_path)) == (moment != "whole folder")
    assert len(collect(tmp_path)) == (moment == "whole folder")
    execute_all([GEAR], data_root=demo_root, results=tmp_path, jobs=1)
    assert scores(tmp_path, GEAR) == scores(undisturbed, GEAR)
    assert left_behind(tmp_path) == []


def test_a_process_that_the_system_ends_is_a_failed_run(demo_root, tmp_path):
    code = """
    import sys, time
    from cplib.config import Run
    from cplib.sweep import execute_all
    if __name__ == "__main__":
        run = dict(method="cutpaste", category="gear", dataset="demo", size=64, updates=5000)
        todo = [Run(**run, seed=seed) for seed in range(2)]
        for o in execute_all(todo, data_root=sys.argv[1], results=sys.argv[2], jobs=2):
            print(o.run.seed, o.state, o.message)
    """
    with child(code, demo_root, tmp_path) as process:
        runs = tmp_path / "runs"
        while not runs.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        time.sleep(0.5)
        workers = psutil.Process(process.pid).children(recursive=True)
        next(w for w in workers if "LokyProcess" in " ".join(w.cmdline())).kill()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [line.split(maxsplit=2)[:2] for line in out.splitlines()[-2:]] == [
        ["0", "failed"],
        ["1", "failed"],
    ]
    assert "its process died" in out
    assert "Traceback" not in err


# One sweep


def test_a_failing_run_names_its_file_and_the_others_finish(demo_root, undisturbed, tmp_path):
    root = shutil.copytree(demo_root, tmp_path / "set")
    victim = sorted((root / "coin/train/good").glob("*.png"))[2]
    victim.write_bytes(victim.read_bytes()[:-2000])
    bad = replace(BRICK, category="coin")
    nowhere = replace(BRICK, category="nut")
    order = [bad, SECOND, nowhere, BRICK, SECOND]
    outcomes = execute_all(order, data_root=root, results=tmp_path / "results", jobs=1)
    expected = [(bad, "failed"), (SECOND, "done"), (nowhere, "failed"), (BRICK, "done")]
    assert [state(o) for o in outcomes] == expected
    assert str(victim) in outcomes[0].message
    assert "'nut'" in outcomes[2].message
    assert all("\n" not in o.message for o in outcomes)
    for run in (BRICK, SECOND):
        assert scores(tmp_path / "results", run) == scores(undisturbed, run)
    assert sorted(collect(tmp_path / "results")["id"]) == sorted([BRICK.id, SECOND.id])


def test_processes_beside_each_other_give_the_same_scores_in_the_order_asked(
    demo_root, undisturbed, tmp_path, capsys
):
    outcomes = execute_all(RUNS, data_root=demo_root, results=tmp_path, jobs=2)
    assert [state(o) for o in outcomes] == [(run, "done") for run in RUNS]
    assert all(scores(tmp_path, run) == scores(undisturbed, run) for run in RUNS)
    assert "3/3" in capsys.readouterr().out


def test_a_budget_stops_cleanly_and_another_call_finishes(
    demo_root, undisturbed, tmp_path, monkeypatch
):
    step = train.step
    options = {"data_root": demo_root, "results": tmp_path, "jobs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda *a, **k: (time.sleep(0.3), step(*a, **k))[1])
        began = time.time()
        first = execute_all(RUNS, budget=1.0, **options)
        assert time.time() - began < 10
    assert [state(o) for o in first] == [(run, "out of time") for run in RUNS]
    assert f"{GEAR.id}: " in first[0].message and "of 8 updates done" in first[0].message
    assert [o.message for o in first[1:]] == ["not started"] * 2
    assert checkpoint(tmp_path).stem == GEAR.id
    assert len(collect(tmp_path)) == 0
    assert [state(o) for o in execute_all(RUNS, **options)] == [(run, "done") for run in RUNS]
    assert all(scores(tmp_path, run) == scores(undisturbed, run) for run in RUNS)
    assert left_behind(tmp_path) == []


def test_a_run_that_is_there_is_not_repeated(demo_root, undisturbed, tmp_path, monkeypatch):
    results = shutil.copytree(undisturbed, tmp_path / "results")
    shutil.rmtree(run_folder(BRICK, results))
    assert missing(RUNS, results) == [BRICK]
    stored = run_folder(GEAR, results) / "run.json"
    before = stored.stat().st_mtime_ns
    outcomes = execute_all(RUNS, data_root=demo_root, results=results, jobs=1)
    assert [state(o) for o in outcomes] == [(BRICK, "done")]
    assert stored.stat().st_mtime_ns == before
    monkeypatch.setattr(runs_module.data, "load", None)
    assert execute_all(RUNS, data_root="nowhere", results=results) == []
    assert execute(GEAR, data_root="nowhere", results=results) == run_folder(GEAR, results)


def test_relative_folders_are_those_of_the_caller(demo_root, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = os.path.relpath(demo_root, tmp_path)
    (outcome,) = execute_all([BRICK], data_root=root, results="out", jobs=1)
    assert outcome.state == "done", outcome.message
    assert scores(tmp_path / "out", BRICK) == scores(undisturbed, BRICK)


def test_an_unknown_engine_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"^unknown engine 'slurm': one of local, ray$"):
        execute_all(RUNS, data_root=tmp_path, results=tmp_path, engine="slurm")


def test_without_ray_its_engine_is_one_clear_line(tmp_path, monkeypatch):
    imports = builtins.__import__

    def without_ray(name, *args, **options):
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return imports(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ValueError, match=r"^engine 'ray' needs Ray: pip install .*$"):
        execute_all(RUNS, data_root=tmp_path, results=tmp_path, engine="ray")


# Several sweeps


def test_a_folder_copied_together_from_two_is_simply_read(undisturbed, tmp_path):
    for run, machine in ((GEAR, "a"), (BRICK, "b"), (SECOND, "b")):
        shutil.copytree(run_folder(run, undisturbed), run_folder(run, tmp_path / machine))
    shutil.copytree(tmp_path / "a/runs", tmp_path / "b/runs", dirs_exist_ok=True)
    pd.testing.assert_frame_equal(collect(tmp_path / "b"), collect(undisturbed))
    assert missing(RUNS, tmp_path / "b") == []


def test_two_sweeps_share_one_results_folder(demo_root, undisturbed, tmp_path):
    code = """
    import sys
    import torch
    from cplib import train
    from cplib.config import Run
    from cplib.sweep import execute_all
    torch.set_num_threads(1)
    os.environ["CPLIB_CHECKPOINT_SECONDS"] = "0"
    common = dict(method="cutpaste", dataset="demo", size=64, sources=4)
    runs = [Run(category="gear", updates=8, **common)]
    runs += [Run(category="brick", updates=4, seed=seed, **common) for seed in (0, 1)]
    print("ready", flush=True)
    sys.stdin.readline()
    outcomes = execute_all(runs, data_root=sys.argv[1], results=sys.argv[2], jobs=1)
    sys.exit(any(outcome.state != "done" for outcome in outcomes) and str(outcomes))
    """
    both = [child(code, demo_root, tmp_path, stdin=subprocess.PIPE) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:  # both at once
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        _, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(
        run.id for run in RUNS
    )
    assert len(collect(tmp_path)) == 3
    assert all(scores(tmp_path, run) == scores(undisturbed, run) for run in RUNS)
    assert left_behind(tmp_path) == []


# Disks


def full_disk(*args, **options):
    """What writing to a full disk raises: the error does not know the file's name."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_earlier_checkpoint(demo_root, undisturbed, half_done, monkeypatch):
    before = checkpoint(half_done).read_bytes()
    options = {"data_root": demo_root, "results": half_done, "jobs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_file", full_disk)
        (outcome,) = execute_all([GEAR], **options)
    assert outcome.state == "failed"
    assert "cannot write the checkpoint" in outcome.message
    assert "No space left on device" in outcome.message
    assert "\n" not in outcome.message
    assert left_behind(half_done) == []
    assert checkpoint(half_done).read_bytes() == before
    execute_all([GEAR], **options)
    assert scores(half_done, GEAR) == scores(undisturbed, GEAR)


@pytest.mark.parametrize("owner, name", [(Path, "write_text"), (pd.DataFrame, "to_csv")])
def test_a_full_disk_leaves_no_half_folder(
    demo_root, undisturbed, half_done, monkeypatch, owner, name
):
    options = {"data_root": demo_root, "results": half_done, "jobs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        (outcome,) = execute_all([GEAR], **options)
    assert outcome.state == "failed"
    assert str(run_folder(GEAR, half_done)) in outcome.message
    assert "No space left on device" in outcome.message
    assert list((half_done / "runs").iterdir()) == []
    assert checkpoint(half_done).stem == GEAR.id
    assert [state(o) for o in execute_all([GEAR], **options)] == [(GEAR, "done")]
    assert scores(half_done, GEAR) == scores(undisturbed, GEAR)


def test_results_that_cannot_be_written_fail_with_their_name(demo_root, tmp_path):
    (tmp_path / "file").write_text("")
    results = tmp_path / "file" / "results"
    (outcome,) = execute_all([BRICK], data_root=demo_root, results=results, jobs=1)
    assert outcome.state == "failed"
    assert str(tmp_path / "file") in outcome.message
    assert "\n" not in outcome.message


# Damage


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_checkpoint_is_named_and_training_starts_afresh(
    demo_root, undisturbed, half_done, capsys, damage
):
    file = checkpoint(half_done)
    whole = file.read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "garbage": b"\xff" * 999, "empty": b""}
    file.write_bytes(damaged[damage])
    (outcome,) = execute_all([GEAR], data_root=demo_root, results=half_done, jobs=1)
    assert outcome.state == "done", outcome.message
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "afresh" in line]
    assert f"{file}: not a checkpoint" in line
    assert scores(half_done, GEAR) == scores(undisturbed, GEAR)
    assert left_behind(half_done) == []


def test_a_checkpoint_from_another_kind_of_device_starts_afresh(
    demo_root, undisturbed, half_done, capsys
):
    file = checkpoint(half_done)
    assert file.read_bytes().count(b'"device":"cpu"') == 1
    file.write_bytes(file.read_bytes().replace(b'"device":"cpu"', b'"device":"gpu"', 1))
    execute_all([GEAR], data_root=demo_root, results=half_done, jobs=1)
    assert "begun on gpu; training starts afresh on cpu" in capsys.readouterr().out
    assert scores(half_done, GEAR) == scores(undisturbed, GEAR)


def test_a_checkpoint_of_another_run_is_refused(demo_root, half_done):
    other = replace(GEAR, seed=5)
    file = checkpoint(half_done)
    file.rename(file.with_name(f"{other.id}.safetensors"))
    (outcome,) = execute_all([other], data_root=demo_root, results=half_done, jobs=1)
    assert outcome.state == "failed"
    assert f"is a checkpoint of {GEAR.id}, not of {other.id}" in outcome.message


@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": 99}, "record version 99"),
        ({"run": {"method": "cutpaste", "category": "gear", "moon": 1}}, "unknown field 'moon'"),
        ({"run": {"method": "telepathy", "category": "gear"}}, "unknown method 'telepathy'"),
        ({"run": {"method": "cutpaste", "category": "gear"}}, "the record inside is of"),
        ({"device": None}, "no 'device'"),
        ("device", "no 'device'"),
        ("{", "not a run"),
    ],
)
def test_a_foreign_record_is_warned_about_and_left(undisturbed, tmp_path, change, words):
    for run in (GEAR, BRICK):
        shutil.copytree(run_folder(run, undisturbed), run_folder(run, tmp_path))
    file = run_folder(GEAR, tmp_path) / "run.json"
    record = json.loads(file.read_text())
    if isinstance(change, dict):
        text = json.dumps(record | change)
    else:
        text = (
            change
            if change == "{"
            else json.dumps({k: v for k, v in record.items() if k != change})
        )
    file.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = collect(tmp_path)
    assert list(table["id"]) == ([BRICK.id] if words else [BRICK.id, GEAR.id])
    messages = [str(w.message) for w in caught]
    assert len(messages) == bool(words)
    assert all(words in m and GEAR.id in m and "\n" not in m for m in messages)
    assert file.read_text() == text


# Again


@pytest.fixture
def stored(undisturbed, tmp_path) -> Path:
    """A copy of the folder of one stored run."""
    return shutil.copytree(run_folder(BRICK, undisturbed), tmp_path / BRICK.id)


def test_rerun_of_a_stored_run_is_the_same_byte_for_byte(demo_root, stored, capsys):
    before = {file.name: file.read_bytes() for file in stored.iterdir()}
    assert main(["rerun", str(stored), "--data", str(demo_root)]) == 0
    assert "byte for byte" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in stored.iterdir()} == before


def alter(text: str, damage: str) -> str:
    """Scores changed by a little, a lot, or beyond recognition."""
    lines = text.splitlines()
    if damage == "one score":
        value = float(lines[1].rsplit(",", 1)[1])
        lines[1] = f"{lines[1].rsplit(',', 1)[0]},{value * 1.001:.9g}"
    if damage == "a word":
        lines[2] = f"{lines[2].rsplit(',', 1)[0]},high"
    if damage == "a row less":
        lines.pop()
    if damage == "a column less":
        lines = [line.rsplit(",", 1)[0] for line in lines]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("damage", ["one score", "a word", "a row less", "a column less"])
def test_rerun_notices_altered_scores(demo_root, stored, capsys, monkeypatch, undisturbed, damage):
    def copied(run, *, results, **options):
        return shutil.copytree(run_folder(run, undisturbed), run_folder(run, results))

    if damage != "one score":  # one true repetition is enough
        monkeypatch.setattr(runs_module, "execute", copied)
    file = stored / "scores.csv"
    file.write_text(alter(file.read_text(), damage))
    assert main(["rerun", str(stored), "--data", str(demo_root)]) == 1
    out, err = capsys.readouterr()
    assert "NOT the same" in out
    assert err == ""


def test_rerun_on_another_device_allows_a_little(demo_root, stored, undisturbed, monkeypatch):
    def elsewhere(run, *, results, **options):
        folder = shutil.copytree(run_folder(run, undisturbed), run_folder(run, results))
        change_record(folder, device="another")
        return folder

    monkeypatch.setattr(runs_module, "execute", elsewhere)
    table = pd.read_csv(stored / "scores.csv")
    for shift, same in ((0.05, True), (0.2, False)):
        moved = table.assign(score=table["score"] + shift * table["score"].std())
        moved.to_csv(stored / "scores.csv", index=False)
        assert runs_module.rerun(stored, data_root=demo_root)[0] is same


def one_error(capsys) -> str:
    """The one line on standard error."""
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_rerun_on_other_pictures_is_one_clear_line(demo_root, stored, tmp_path, capsys):
    root = shutil.copytree(demo_root, tmp_path / "other")
    first, second = sorted((root / "brick/train/good").glob("*.png"))[:2]
    shutil.copy(first, second)
    assert main(["rerun", str(stored), "--data", str(root)]) == 2
    line = one_error(capsys)
    assert str(stored) in line and "train pictures are not those" in line
    assert main(["rerun", str(stored), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in one_error(capsys)


def test_rerun_of_what_is_no_run_is_one_clear_line(demo_root, stored, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (demo_root, tmp_path / "nowhere", tmp_path / "file"):
        assert main(["rerun", str(folder), "--data", str(demo_root)]) == 2
        assert f"{folder}: not a run of this version" in one_error(capsys)


# Sums


def change_record(folder: Path, **changes) -> None:
    """Change entries of a stored run's record."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | changes))


def test_estimate_counts_by_hand(undisturbed, tmp_path):
    for run, rate in ((GEAR, 10.0), (BRICK, 20.0), (SECOND, 90.0)):
        shutil.copytree(run_folder(run, undisturbed), run_folder(run, tmp_path))
        change_record(run_folder(run, tmp_path), device="abacus", images_per_second=rate)
    todo = [replace(GEAR, method="cutpaste_3way", updates=100, seed=seed) for seed in (0, 1)] + [
        replace(GEAR, method="rotation", updates=50),
        replace(GEAR, method="rotation", updates=50, size=128),
        Run(method="untrained", category="gear", dataset="demo", size=64, updates=0),
    ]
    table = estimate([*todo, todo[0], *RUNS], tmp_path, "abacus")
    assert list(table.index) == ["cutpaste_3way", "rotation", "untrained"]
    assert list(table["runs"]) == [2, 2, 1]
    assert list(table["images"]) == [2 * 100 * 4 * 3, 2 * 50 * 4 * 4, 0]
    assert table["hours"].tolist() == pytest.approx([2400 / 20 / 3600, 800 / 20 / 3600, 0])
    other = estimate(todo, tmp_path, "another device")
    assert list(other["images"]) == [2400, 1600, 0]
    assert other["hours"].isna().all()
    assert estimate(RUNS, tmp_path, "abacus").empty


def test_ensemble_is_the_mean_of_the_scores(undisturbed, tmp_path):
    seeds = [replace(BRICK, method="cutpaste_3way", seed=seed) for seed in (0, 1)]
    alone = replace(GEAR, method="cutpaste_3way")
    for run, source in zip([alone, *seeds], RUNS, strict=True):
        shutil.copytree(run_folder(source, undisturbed), run_folder(run, tmp_path))
        fields = json.loads((run_folder(run, tmp_path) / "run.json").read_text())["run"]
        fields |= {name: getattr(run, name) for name in ("method", "category", "seed", "updates")}
        change_record(run_folder(run, tmp_path), run=fields)
    draw = np.random.default_rng(0)
    files = [run_folder(run, tmp_path) / "scores.csv" for run in seeds]
    tables = [pd.read_csv(file) for file in files]
    for table in tables:
        table["score"] = draw.normal(size=len(table))
    tables[1].iloc[::-1].to_csv(files[1], index=False)  # rows belong together by their file
    tables[0].to_csv(files[0], index=False)
    by_hand = image_metrics(tables[0]["label"], (tables[0]["score"] + tables[1]["score"]) / 2)
    (row,) = ensemble(tmp_path, collect(tmp_path)).to_dict("records")
    assert (row["method"], row["category"], row["members"]) == ("ensemble", "brick", 2)
    assert {name: row[name] for name in by_hand} == pytest.approx(by_hand)
    assert ensemble(tmp_path, collect(tmp_path, seed=0)).empty


# Ray

CLUSTER = """
import os, sys, threading, time
import psutil
import torch
from cplib import sweep
from cplib.config import Run
import ray
from ray.cluster_utils import Cluster

data, results = sys.argv[1:]
torch.set_num_threads(1)
small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=small)
worker = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
common = dict(method="cutpaste", dataset="demo", size=64, sources=4)
runs = [Run(category="gear", updates=8, **common)]
runs += [Run(category="brick", updates=4, seed=seed, **common) for seed in (0, 1)]
runs += [Run(category="nut", updates=4, **common)]

def kill_when_it_works():
    raylet = worker.all_processes["raylet"][0].process.pid
    while not any("ray::attempt" in name for name in children(raylet)):
        time.sleep(0.05)
    time.sleep(1)
    cluster.remove_node(worker, allow_graceful=False)
    print("killed", flush=True)

def children(parent):
    there = [p.info for p in psutil.process_iter(["ppid", "cmdline"])]
    return [" ".join(p["cmdline"] or []) for p in there if p["ppid"] == parent]

threading.Thread(target=kill_when_it_works, daemon=True).start()
os.chdir(os.path.dirname(results))
relative = os.path.basename(results)
for o in sweep.execute_all(runs, data_root=data, results=relative, engine="ray"):
    print("outcome", o.run.id, o.state, o.message)
ray.shutdown()
cluster.shutdown()
print("shut down", ray.is_initialized())
"""


@pytest.fixture
def ray_folder():
    """Where a cluster keeps its sockets (their paths have to be short); nothing outlives it."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield folder
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if folder in " ".join(process.cmdline()):
                    process.kill()


def test_a_ray_cluster_that_loses_a_node_gives_the_same_scores(
    demo_root, undisturbed, tmp_path, ray_folder
):
    pytest.importorskip("ray")
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then stays on the loopback address
        "RAY_TMPDIR": ray_folder,
    }
    results = tmp_path / "results"
    with child(CLUSTER, demo_root, results, env=environment) as process:
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "killed" in out
    nut = replace(BRICK, category="nut")
    lines = [line.split()[1:3] for line in out.splitlines() if line.startswith("outcome")]
    assert lines == [[run.id, "done"] for run in RUNS] + [[nut.id, "failed"]]
    assert all(scores(results, run) == scores(undisturbed, run) for run in RUNS)
    assert out.splitlines()[-1] == "shut down False"
    assert len((out + err).splitlines()) < 200
    assert left_behind(results) == []


@pytest.mark.parametrize(("gigabytes", "expected"), [(15, 1), (24, 2), (80, 8), (8, 1)])
def test_as_many_runs_share_a_gpu_as_its_memory_holds(monkeypatch, gigabytes, expected):
    gpu = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.delenv("CPLIB_JOBS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert sweep._jobs("cuda", 1) == expected
