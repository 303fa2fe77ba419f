"""Runs that are killed, starved, repeated, shared or spread: their scores stay the same."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import save_file

from cplib import datasets, train
from cplib.checkpoint import read_checkpoint
from cplib.metrics import image_metrics
from cplib.model import weights_file
from cplib.run import Run
from cplib.score import Scorer
from cplib.study import jobs, measures, store
from cplib.study.jobs import by_training, estimate, execute, execute_all, rerun
from cplib.study.profiles import PROFILES
from cplib.study.store import Places, checkpoint_file, frame, load_network, run_folder, stock
from cplib.study.workspace import UsageError, Workspace

SMALL = {"dataset": "demo", "size": 64, "updates": 8, "sources": 2, "precision": "fp32"}
SIEVE = Run(method="cutpaste", category="sieve", curve=2, **SMALL)
BRICK = replace(SIEVE, category="brick", updates=4, curve=0)
SECOND = replace(BRICK, seed=1)
UNTRAINED = replace(SIEVE, method="untrained", updates=0, curve=0)
RUNS = [SIEVE, BRICK, SECOND]
FILES = {"history.csv", "metrics.json", "run.json", "scores.csv"}  # of a patch model one more
# Processes of their own start from one that has imported torch already.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cplib.study.jobs"])


@pytest.fixture(scope="module")
def undisturbed(demo_root, tmp_path_factory) -> Path:
    """A results folder with the three runs, each executed in one go."""
    results = tmp_path_factory.mktemp("undisturbed")
    for run in RUNS:
        execute(run, Places(results, demo_root))
    return results


@pytest.fixture
def places(demo_root, tmp_path, monkeypatch) -> Places:
    """The demo set, and results of its own for each test; one process executes."""
    monkeypatch.setenv("CPLIB_JOBS", "1")
    return Places(tmp_path / "results", demo_root)


@pytest.fixture
def copied(undisturbed, places) -> Places:
    """As ``places``, with a copy of the three runs."""
    shutil.copytree(undisturbed, places.results)
    return places


@pytest.fixture
def half_done(places, monkeypatch) -> Places:
    """As ``places``, with the checkpoint of SIEVE after five of its eight updates."""
    updates, step = iter(range(5)), train.step
    with monkeypatch.context() as patch:
        patch.setenv("CPLIB_CHECKPOINT_SECONDS", "0")
        patch.setattr(train, "step", lambda *a: (next(updates), step(*a))[1])
        (outcome,) = execute_all([SIEVE], places)
    assert outcome.state == "failed"
    assert checkpoint_file(SIEVE, places.results).exists()
    return places


def assert_same(results: Path, expected: Path, runs=RUNS) -> None:
    """Scores and metrics to the byte, the networks, and the histories without their seconds."""
    for run in runs:
        mine, theirs = run_folder(run, results), run_folder(run, expected)
        for name in ("scores.csv", "metrics.json"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name
        tables = (pd.read_csv(f / "history.csv", dtype=str) for f in (mine, theirs))
        pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables))
        nets = (load_network(run, Places(r)).state_dict() for r in (results, expected))
        assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, nets), strict=True))


def left_behind(results: Path) -> list[str]:
    """What lies in a results folder beside whole runs and checkpoints."""
    files = [*(results / "checkpoints").glob("*"), *(results / "runs").glob(".*")]
    return [f.name for f in files if f.suffix != ".safetensors" or f.name.startswith(".")]


def states(outcomes) -> list[tuple[Run, str]]:
    """Outcomes without their messages."""
    return [(outcome.run, outcome.state) for outcome in outcomes]


def change_record(folder: Path, **changes) -> None:
    """Change entries of a stored run's record."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | changes))


# The folder of a run


def test_a_folder_holds_four_files_and_the_scores_are_those_of_the_network(undisturbed, demo_root):
    folder = run_folder(SIEVE, undisturbed)
    assert set(os.listdir(folder)) == FILES
    normal, test = (datasets.load(demo_root, "sieve", s, 64) for s in ("train", "test"))
    table = store.read_scores(folder)
    assert table["file"].tolist() == list(test.names)
    assert table["kind"].tolist() == list(test.kinds)
    assert table["label"].tolist() == test.labels.tolist()
    scorer = Scorer.fit(SIEVE, load_network(SIEVE, Places(undisturbed)), normal.pixels)
    np.testing.assert_allclose(scorer.score(test.pixels), table["score"], rtol=1e-3)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == pytest.approx(image_metrics(table["label"], table["score"]))


def test_the_record_holds_the_run_and_what_is_behind_its_numbers(undisturbed, demo_root):
    run, record, metrics = store.read(run_folder(SIEVE, undisturbed))
    assert run == SIEVE
    assert set(metrics) == {"image_auroc", "image_ap", "image_f1max"}
    assert (record["precision"], record["threads"], record["weights"]) == ("fp32", 1, None)
    assert record["device"].startswith("CPU")
    for split, digest in record["data"].items():
        assert digest == datasets.fingerprint(datasets.load(demo_root, "sieve", split, 64))
    assert record["environment"]["torch"] == torch.__version__
    made = record["images_per_second"] * record["train_seconds"]
    assert made == pytest.approx(8 * 2 * 2, rel=0.1)


def test_the_auroc_is_noted_at_the_points_asked_for_and_changes_nothing(undisturbed, places):
    folder = run_folder(SIEVE, undisturbed)
    noted = pd.read_csv(folder / "history.csv").set_index("update")["image_auroc"]
    assert noted.dropna().index.tolist() == [4, 8]
    final = json.loads((folder / "metrics.json").read_text())["image_auroc"]
    assert noted[8] == pytest.approx(final, rel=1e-5)
    plain = execute(replace(SIEVE, curve=0), places)
    assert (plain / "scores.csv").read_bytes() == (folder / "scores.csv").read_bytes()


def test_a_baseline_trains_nothing_and_its_record_names_its_weights(places):
    run = PROFILES["smoke"].run("pretrained", "sieve")
    torch.set_num_threads(1)
    folder = execute(run, places, threads=2)
    assert torch.get_num_threads() == 1  # as it was
    assert set(os.listdir(folder)) == FILES
    assert (folder / "history.csv").read_text().strip() == ""
    record, file = store.read(folder)[1], weights_file(run.backbone)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["weights"] == {"file": file.name, "sha256": digest}
    assert (record["threads"], record["train_seconds"], record["images_per_second"]) == (2, 0, None)
    assert not checkpoint_file(run, places.results).exists()
    assert load_network(run, places).pixel_mean.flatten().tolist() == pytest.approx([0.498] * 3)


def test_a_run_without_data_or_that_diverges_leaves_no_folder(places):
    with pytest.raises(datasets.DataError, match="nothing"):
        execute(replace(BRICK, category="nothing"), places)
    with pytest.raises(ValueError, match="finite"):
        execute(replace(BRICK, learning_rate=1e30), places)
    assert list(places.results.glob("runs/*")) == left_behind(places.results) == []


def test_scoring_otherwise_trains_nothing(copied, monkeypatch):
    monkeypatch.setattr(train, "step", lambda *args: pytest.fail("trained again"))
    run = replace(SIEVE, l2_normalise=True, reg_covar=1e-3, window=32, stride=16)
    read, record, metrics = store.read(execute(run, copied))
    _, earlier, own = store.read(run_folder(SIEVE, copied.results))
    assert (read, record["train_seconds"]) == (run, earlier["train_seconds"])
    assert metrics["image_ap"] != own["image_ap"] or metrics["image_auroc"] != own["image_auroc"]
    assert 0 <= metrics["pixel_auroc"] <= 100


def test_a_network_comes_from_a_whole_checkpoint_or_not_at_all(copied):
    assert not load_network(SIEVE, copied).training
    file = checkpoint_file(SIEVE, copied.results)
    history = run_folder(SIEVE, copied.results) / "history.csv"
    kept = history.read_text()
    pd.read_csv(history).assign(loss=9.0).to_csv(history, index=False)  # of another training
    assert load_network(SIEVE, copied) is None
    history.write_text(kept)
    whole = file.read_bytes()
    save_file({"weight": torch.zeros(1)}, file)  # of another program
    with pytest.raises(ValueError, match=f"{file}: expected the run's tensors"):
        load_network(SIEVE, copied)
    file.write_bytes(whole)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{file}: expected the run's tensors"):
        load_network(SIEVE, copied)
    file.unlink()
    assert load_network(SIEVE, copied) is None


@pytest.mark.parametrize("edited", [None, "results/x", "cplib/y.py"])
def test_the_commit_is_dirty_where_the_code_was_edited_alone(tmp_path, monkeypatch, edited):
    there = tmp_path / "cplib" / "study" / "store.py"
    there.parent.mkdir(parents=True)
    there.touch()
    monkeypatch.setattr(store, "__file__", str(there))
    assert store.git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    if edited:
        (tmp_path / edited).parent.mkdir(exist_ok=True)
        (tmp_path / edited).touch()
    assert store.git_commit().endswith("-dirty") == (edited == "cplib/y.py")
    monkeypatch.setattr(store, "__file__", str(there.parent / "a" / "cplib" / "store.py"))
    assert store.git_commit() is None  # an archive unpacked in another repository
    monkeypatch.setattr(store, "__file__", str(there))
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert store.git_commit() is None


def test_an_anomalous_image_whose_mask_marks_nothing_is_in_no_pixel_metric():
    masks, maps = torch.zeros(4, 8, 8, dtype=torch.bool), torch.rand(4, 8, 8)
    masks[2, :3] = True  # and none of the fourth
    labels = torch.tensor([0, 0, 1, 1])
    pixels, kinds, names = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 4 * ("x",), tuple("abcd")
    test = datasets.Images(pixels, labels, kinds, masks, names)
    three = datasets.Images(pixels[:3], labels[:3], kinds[:3], masks[:3], names[:3])
    found = measures.pixel_level(UNTRAINED, test, maps)
    assert found == measures.pixel_level(UNTRAINED, three, maps[:3])


# Killed


def work(pipe, run, places, moment="") -> None:
    """Execute a run in a process that dies at a moment which a clock would hardly ever hit."""

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def tardy(*args):
        pipe.send("update")
        time.sleep(0.1)  # so that a fast machine does not finish first
        return step(*args)

    torch.set_num_threads(1)
    os.environ["CPLIB_CHECKPOINT_SECONDS"] = "0"
    step, train.step = train.step, tardy
    if moment == "half a checkpoint":
        Path.replace = die
    if moment == "half a folder":
        Path.rename = die
    execute(run, places)


@contextlib.contextmanager
def process(target, *arguments):
    """Another process that does ``target(pipe, *arguments)``, and this end of the pipe."""
    here, there = PROCESSES.Pipe()
    started = PROCESSES.Process(target=target, args=(there, *arguments))
    started.start()
    there.close()
    try:
        yield started, here
    finally:
        started.kill()
        started.join()


def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(undisturbed, places):
    moments, kills, resumed = random.Random(20210610), 0, 0
    for _ in range(4):
        resumed += checkpoint_file(SIEVE, places.results).exists()
        with process(work, SIEVE, places) as (worker, pipe):
            with contextlib.suppress(EOFError):  # it has finished
                for _ in range(moments.randrange(1, 5)):  # machines differ in speed
                    pipe.recv()
            time.sleep(moments.uniform(0, 0.3))
            worker.kill()
            worker.join()
            kills += worker.exitcode == -signal.SIGKILL
    execute(SIEVE, places)
    assert kills
    assert resumed
    assert_same(places.results, undisturbed, [SIEVE])
    assert os.listdir(places.results / "runs") == [SIEVE.id]
    assert left_behind(places.results) == []


@pytest.mark.parametrize("moment", ["half a checkpoint", "half a folder"])
def test_killed_at_the_worst_moment_nothing_is_lost_or_left(undisturbed, places, moment):
    with process(work, BRICK, places, moment) as (worker, _):
        worker.join(60)
        assert worker.exitcode == -signal.SIGKILL
    parts = [*places.results.glob("*/.part-*")]
    assert parts
    assert not run_folder(BRICK, places.results).exists()
    for part in parts:
        os.utime(part, (time.time() - 2 * store.STALE,) * 2)
    execute_all([BRICK], places)
    assert_same(places.results, undisturbed, [BRICK])
    assert left_behind(places.results) == []


def share(pipe, places) -> None:
    """Execute all runs as soon as something is said, and answer with what became of them."""
    torch.set_num_threads(1)
    os.environ |= {"CPLIB_CHECKPOINT_SECONDS": "0", "CPLIB_JOBS": "1"}
    pipe.send("ready")
    pipe.recv()
    pipe.send([(o.state, o.message) for o in execute_all(RUNS, places)])


def test_two_processes_share_one_results_folder(undisturbed, places):
    with process(share, places) as (_, one), process(share, places) as (_, other):
        assert [one.recv(), other.recv()] == ["ready"] * 2
        one.send("go"), other.send("go")
        for pipe in (one, other):
            assert {state for state, _ in pipe.recv()} <= {"done"}
    assert_same(places.results, undisturbed)
    assert set(os.listdir(places.results / "runs")) == {run.id for run in RUNS}
    assert left_behind(places.results) == []


# Many runs


def test_processes_beside_each_other_give_the_same_bytes_in_the_order_asked(
    undisturbed, places, capsys, monkeypatch
):
    monkeypatch.chdir(places.results.parent)
    relative = Places(Path("results"), Path(os.path.relpath(places.data)))
    monkeypatch.setenv("CPLIB_JOBS", "2")
    outcomes = execute_all(RUNS, relative)
    assert states(outcomes) == [(run, "done") for run in RUNS]
    assert_same(places.results, undisturbed)
    assert "3 of 3 done" in capsys.readouterr().out


def test_a_gpu_that_is_full_fails_the_run_with_a_line_and_not_the_next(places, monkeypatch):
    training = jobs.training

    def full(run, *args, **options):
        if run == BRICK:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a page of text")
        return training(run, *args, **options)

    monkeypatch.setattr(jobs, "training", full)
    first, second = execute_all([BRICK, SIEVE], places)
    assert (first.state, second.state) == ("failed", "done")
    assert first.message == jobs.FULL


def test_a_process_that_the_system_ends_is_a_failed_run(places, monkeypatch):
    monkeypatch.setenv("CPLIB_JOBS", "2")
    over = threading.Event()

    def kill_workers():
        while not over.wait(1):
            children = psutil.Process().children(recursive=True)
            for child in [c for c in children if "LokyProcess" in " ".join(c.cmdline())][:1]:
                child.kill()

    threading.Thread(target=kill_workers, daemon=True).start()
    todo = [replace(SIEVE, updates=100_000, curve=0, seed=seed) for seed in range(2)]
    outcomes = execute_all(todo, places)
    over.set()
    assert states(outcomes) == [(run, "failed") for run in todo]
    assert all("its process died" in o.message for o in outcomes)


def test_a_failing_run_names_its_file_and_the_others_finish(undisturbed, places):
    root = shutil.copytree(places.data, places.results.parent / "set")
    victim = sorted((root / "sieve/train/good").glob("*.png"))[2]
    victim.write_bytes(victim.read_bytes()[:-2000])
    bad, nowhere = (replace(BRICK, category=category) for category in ("sieve", "nut"))
    order = [bad, SECOND, nowhere, BRICK, SECOND]
    outcomes = execute_all(order, places._replace(data=root))
    expected = [(bad, "failed"), (SECOND, "done"), (nowhere, "failed"), (BRICK, "done")]
    assert states(outcomes) == expected
    assert str(victim) in outcomes[0].message
    assert "'nut'" in outcomes[2].message
    assert all("\n" not in o.message for o in outcomes)
    assert_same(places.results, undisturbed, [BRICK, SECOND])


def test_a_budget_stops_cleanly_and_another_call_finishes(undisturbed, places, monkeypatch):
    step = train.step
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", lambda *a: (time.sleep(0.3), step(*a))[1])
        first = execute_all(RUNS, places, budget=1.0)
    assert states(first) == [(run, "out of time") for run in RUNS]
    assert f"{SIEVE.id}: " in first[0].message and "of 8 updates done" in first[0].message
    assert [o.message for o in first[1:]] == ["not started"] * 2
    assert not (places.results / "runs").exists()
    assert states(execute_all(RUNS, places)) == [(run, "done") for run in RUNS]
    assert_same(places.results, undisturbed)
    assert left_behind(places.results) == []


def test_a_run_that_is_there_is_not_repeated_and_needs_no_data(copied):
    shutil.rmtree(run_folder(BRICK, copied.results))
    assert stock([*RUNS, BRICK], copied).todo == [BRICK]
    stored = run_folder(SIEVE, copied.results) / "run.json"
    before = stored.stat().st_mtime_ns
    assert states(execute_all(RUNS, copied)) == [(BRICK, "done")]
    assert stored.stat().st_mtime_ns == before
    assert execute_all(RUNS, copied._replace(data=None)) == []
    assert execute(SIEVE, copied._replace(data=None)) == stored.parent


def test_an_unknown_engine_and_a_lack_of_ray_are_one_clear_line(places, monkeypatch):
    with pytest.raises(ValueError, match=r"^unknown engine 'slurm': one of local, ray$"):
        execute_all(RUNS, places, engine="slurm")
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails
    with pytest.raises(ValueError, match=r"^engine 'ray' needs Ray: pip install .*$"):
        execute_all(RUNS, places, engine="ray")


# GPUs: none is here, so torch is asked about made-up ones.


@pytest.mark.parametrize(
    ("memories", "cores", "host", "expected"),
    [
        ([8], 16, 128, 1),
        ([24], 16, 128, 2),
        ([80], 16, 128, 8),
        ([139], 16, 128, 13),
        ([80] * 8, 32, 512, 32),  # by its cores
        ([80] * 8, 128, 256, 42),  # by its own memory
    ],
)
def test_as_many_jobs_share_gpus_as_memories_and_cores_hold(
    monkeypatch, memories, cores, host, expected
):
    size = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": host * 2**30 // 4096}
    monkeypatch.setattr(os, "sysconf", size.get)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    make_gpus(monkeypatch, memories)
    assert jobs.jobs_here("cuda") == expected


def make_gpus(monkeypatch, gigabytes):
    """As if torch saw GPUs of so much memory."""

    def properties(device):
        return SimpleNamespace(total_memory=gigabytes[torch.device(device).index or 0] * 2**30)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gigabytes))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", ["cpu"] * 4),
        ("cuda", ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]),
        ("cuda:1", ["cuda:1"] * 4),
    ],
)
def test_jobs_go_round_the_gpus_of_the_machine(monkeypatch, device, expected):
    make_gpus(monkeypatch, [24, 24, 24])
    options = {"places": Places(Path(), device=device)}
    assert [jobs.on_device(options, i)["places"].device for i in range(4)] == expected


# Runs that share a training


PATCH = replace(SIEVE, curve=0, window=32, stride=16)
TWIN = replace(PATCH, gaussians="shared")


def test_runs_of_one_training_are_one_job_and_the_noted_curve_comes_first():
    wanted = dict.fromkeys([PATCH, BRICK, TWIN, SIEVE], ())
    assert [[*job] for job in by_training(wanted)] == [[SIEVE, PATCH, TWIN], [BRICK]]


def test_two_workers_train_the_network_of_two_runs_once(undisturbed, places, monkeypatch):
    monkeypatch.setenv("CPLIB_JOBS", "2")
    outcomes = execute_all([PATCH, TWIN, SIEVE], places)
    assert states(outcomes) == [(run, "done") for run in (PATCH, TWIN, SIEVE)]
    records = [store.read(run_folder(run, places.results))[1] for run in (PATCH, TWIN, SIEVE)]
    assert len({record["train_seconds"] for record in records}) == 1  # of the one checkpoint
    assert_same(places.results, undisturbed, [SIEVE])
    assert pd.read_csv(run_folder(SIEVE, places.results) / "history.csv")["image_auroc"].any()


def test_a_part_that_another_process_writes_is_left_and_an_old_one_removed(places):
    file = checkpoint_file(BRICK, places.results)
    file.parent.mkdir(parents=True)
    young, old = (file.with_name(f".part-{file.name}-{name}") for name in ("young", "old"))
    half = places.results / "runs" / f".part-{BRICK.id}"
    half.mkdir(parents=True)
    young.touch(), old.touch()
    for path in (old, half):
        os.utime(path, (time.time() - 2 * store.STALE,) * 2)
    assert states(execute_all([BRICK], places)) == [(BRICK, "done")]
    assert left_behind(places.results) == [young.name]


# Results of other images, and of older draws


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_counts_for_its_images_and_another_ones_folder_is_replaced_when_finished(
    copied, split, monkeypatch
):
    here = replace(PROFILES["smoke"], categories=("brick", "sieve"))
    other = shutil.copytree(copied.data, copied.results.parent / "other")
    first, second = sorted((other / "sieve" / split / "good").glob("*.png"))[:2]
    shutil.copy(first, second)
    there, before = copied._replace(data=other), run_folder(SIEVE, copied.results)
    kept = (before / "scores.csv").read_bytes()
    (before / "gradcam.json").write_text("{}")
    found = stock(RUNS, there)
    assert (list(found.finished), list(found.outdated)) == ([BRICK, SECOND], [SIEVE])
    assert load_network(SIEVE, there) is None
    planned = {run: [] for run in RUNS}
    (line,) = Workspace(here, ("sieve",), there).remarks(planned)
    assert line.startswith("1 stored runs of sieve were measured on other images")
    assert f"hours of one device (as on {store.read(before)[1]['device']})" in line
    assert "CPLIB_RESULTS" in line
    assert Workspace(here, ("sieve",), copied).remarks(planned) == []
    assert list(stock(RUNS, copied._replace(data=None)).finished) == RUNS

    with monkeypatch.context() as patch:  # what does not finish replaces nothing
        patch.setattr(store, "save_file", Mock(side_effect=OSError("no room")))
        patch.setattr(jobs, "scores", Mock(side_effect=ValueError("no scores")))
        assert states(execute_all([SIEVE], there)) == [(SIEVE, "failed")]
    assert (before / "scores.csv").read_bytes() == kept
    assert states(execute_all(RUNS, there)) == [(SIEVE, "done")]
    fresh = execute(SIEVE, there._replace(results=copied.results.parent / "fresh"))
    assert (before / "scores.csv").read_bytes() == (fresh / "scores.csv").read_bytes() != kept
    assert set(os.listdir(before)) == FILES
    assert left_behind(copied.results) == []


def test_runs_of_older_draws_count_until_one_is_newer_and_are_made_anew_with_data(copied):
    for run in RUNS:
        change_record(run_folder(run, copied.results), draws=1)
    checkpoints = copied.results / "checkpoints"
    for file in checkpoints.iterdir():
        meta, tensors = read_checkpoint(file)
        save_file(tensors, file, metadata={k: v for k, v in meta.items() if k != "draws"})
    found = stock(RUNS, copied)
    assert list(found.finished) == list(found.older) == found.todo == RUNS
    assert stock(RUNS, copied._replace(data=None)).todo == []
    here = replace(PROFILES["smoke"], categories=("brick", "sieve"))
    (line,) = Workspace(here, ("sieve",), copied).remarks({run: [] for run in RUNS})
    assert line.startswith("3 stored runs of brick, sieve were made with other random draws.")
    same, line = rerun(run_folder(SIEVE, copied.results), copied)
    assert (same, line) == (False, "not repeated: made with version 1 of the random draws, not 2")
    old = read_checkpoint(checkpoint_file(SIEVE, copied.results))[0]
    execute(SIEVE, copied)
    new = read_checkpoint(checkpoint_file(SIEVE, copied.results))[0]
    assert ("draws" in old, new["draws"]) == (False, "2")
    assert list(stock(RUNS, copied).finished) == [SIEVE]
    assert stock(RUNS, copied).todo == [BRICK, SECOND]
    baseline = execute(UNTRAINED, copied)
    change_record(baseline, draws=1)  # nothing was drawn
    assert rerun(baseline, copied) == (True, "the same scores, byte for byte")
    assert list(stock([*RUNS, UNTRAINED], copied).finished) == [SIEVE, UNTRAINED]
    assert list(stock([BRICK, UNTRAINED], copied).finished) == [BRICK, UNTRAINED]


def test_folders_are_listed_once_however_many_runs_are_planned(copied, monkeypatch):
    listed, iterdir = [], Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: (listed.append(path), iterdir(path))[1])
    monkeypatch.setattr(Path, "glob", lambda path, pattern: listed.append(path) or iter(()))
    places, counts = copied._replace(data=None), []
    for planned in (RUNS[:1], RUNS):
        listed.clear()
        assert execute_all(planned, places) == []
        counts.append(len(listed))
    assert counts[0] == counts[1] < 5


def test_runs_of_categories_that_the_data_lack_count(copied):
    other = shutil.copytree(copied.data, copied.results.parent / "other")
    shutil.rmtree(other / "sieve")
    assert list(stock(RUNS, copied._replace(data=other)).finished) == RUNS


def test_a_run_without_a_readable_record_is_named_and_left(copied):
    broken = run_folder(SIEVE, copied.results)
    (broken / "run.json").write_text("")
    with pytest.warns(UserWarning, match=str(broken)):
        found = stock(RUNS, copied)
    assert (list(found.finished), found.todo) == ([BRICK, SECOND], [])


def test_training_needs_data(copied):
    with pytest.raises(UsageError, match="1 runs need data"):
        Workspace(PROFILES["smoke"], ("sieve",), copied._replace(data=None)).execute(
            {UNTRAINED: []}
        )


def test_after_a_full_disk_and_a_damaged_checkpoint_nothing_is_left_or_wrong(
    undisturbed, half_done, monkeypatch
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # does not know the file's name
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", Mock(side_effect=full))
        (outcome,) = execute_all([SIEVE], half_done)
    assert outcome.state == "failed"
    assert f"cannot write {run_folder(SIEVE, half_done.results)}" in outcome.message
    assert "No space left on device" in outcome.message
    assert os.listdir(half_done.results / "runs") == []
    checkpoint_file(SIEVE, half_done.results).write_bytes(b"\xff" * 999)
    assert states(execute_all([SIEVE], half_done)) == [(SIEVE, "done")]
    assert_same(half_done.results, undisturbed, [SIEVE])
    assert [Path(name).suffix for name in left_behind(half_done.results)] == [".broken"]


# Collected


def test_a_frame_has_a_row_a_finished_run_with_fields_metrics_and_seconds(copied):
    table = frame([*RUNS, UNTRAINED, SIEVE], copied)
    assert table["id"].tolist() == [run.id for run in RUNS]
    row = table.iloc[0]
    assert all(row[name] == value for name, value in asdict(SIEVE).items())
    metrics = store.read(run_folder(SIEVE, copied.results))[2]
    assert {name: row[name] for name in metrics} == metrics
    assert row["train_seconds"] > 0
    empty = frame([UNTRAINED], copied)
    assert len(empty) == 0
    assert set(table) <= set(empty)
    change_record(run_folder(BRICK, copied.results), run=asdict(SECOND))
    with pytest.warns(UserWarning, match=f"{BRICK.id}: .*the record inside is of {SECOND.id}"):
        assert frame(RUNS, copied)["id"].tolist() == [SIEVE.id, SECOND.id]


def test_an_estimate_counts_what_is_missing_at_the_rate_of_like_runs(copied, monkeypatch):
    for run, rate in ((SIEVE, 10.0), (BRICK, 20.0), (SECOND, 90.0)):
        folder = run_folder(run, copied.results)
        change_record(folder, device="abacus", images_per_second=rate)
    todo = [replace(SIEVE, method="cutpaste_3way", updates=100, seed=seed) for seed in (0, 1)]
    todo += [replace(SIEVE, method="rotation", updates=50), UNTRAINED]
    other = [replace(UNTRAINED, updates=1, crop=32), replace(SIEVE, size=128)]
    other += [replace(SIEVE, method="scar", backbone="efficientnet_b4")]
    monkeypatch.setattr(jobs, "device_name", lambda device: "abacus")
    table = estimate(todo, frame(RUNS, copied), copied)
    assert table["runs"].to_dict() == {"cutpaste_3way": 2, "rotation": 1, "untrained": 1}
    assert table["images"].tolist() == [2 * 100 * 2 * 3, 50 * 2 * 4, 0]
    assert table["hours"].tolist() == pytest.approx([1200 / 20 / 3600, 400 / 20 / 3600, 0])
    assert estimate(other, frame(RUNS, copied), copied)["hours"].isna().all()
    assert estimate([], frame(RUNS, copied), copied).empty
    mixed, turns = frame(RUNS, copied), replace(SIEVE, crop=(8, 16))
    mixed["crop"] = [(8, 16) if name == SIEVE.id else 0 for name in mixed["id"]]
    hours = estimate([turns], mixed, copied)["hours"]
    assert hours.tolist() == pytest.approx([turns.images / 10 / 3600])
    monkeypatch.setattr(jobs, "device_name", lambda device: "another")
    assert estimate(todo, frame(RUNS, copied), copied)["hours"].isna().all()


# Repeated


def test_rerun_of_a_stored_run_is_the_same_byte_for_byte(copied):
    folder = run_folder(BRICK, copied.results)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert rerun(folder, copied) == (True, "the same scores, byte for byte")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.fixture
def repeated(undisturbed, monkeypatch):
    """Repeating a run is quick: what it gives is there already."""

    def copy(run, places, **options):
        return shutil.copytree(run_folder(run, undisturbed), run_folder(run, places.results))

    monkeypatch.setattr(jobs, "execute", copy)


@pytest.mark.parametrize(
    ("device", "shift", "same"),
    [({}, 0.001, False), ({"device": "a GPU"}, 0.05, True), ({"device": "a GPU"}, 0.2, False)],
)
def test_scores_may_differ_a_little_between_devices_only(copied, repeated, device, shift, same):
    folder = run_folder(BRICK, copied.results)
    change_record(folder, **device)
    table = pd.read_csv(folder / "scores.csv")
    table.loc[0, "score"] += shift * table["score"].std()
    table.to_csv(folder / "scores.csv", index=False)
    found, line = rerun(folder, copied)
    assert found is same
    assert "of their standard deviation" in line
    for other in (table.assign(score="high"), table[:-1], table.drop(columns="kind")):
        other.to_csv(folder / "scores.csv", index=False)
        assert rerun(folder, copied)[0] is False


def test_a_run_cannot_be_repeated_on_other_images(copied, repeated):
    root = shutil.copytree(copied.data, copied.results.parent / "other")
    first, second = sorted((root / "brick/train/good").glob("*.png"))[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="its train images are not those"):
        rerun(run_folder(BRICK, copied.results), copied._replace(data=root))


# Ray


def on_ray(pipe, places, folder) -> None:
    """Execute runs on a cluster of two nodes, one of which is lost once it works."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray stays on the loopback address
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    lost = cluster.add_node(**small)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)

    def kill_when_it_works():
        raylet = psutil.Process(lost.all_processes["raylet"][0].process.pid)
        while not any("ray::attempt" in " ".join(child.cmdline()) for child in raylet.children()):
            time.sleep(0.05)
        time.sleep(1)
        cluster.remove_node(lost, allow_graceful=False)
        pipe.send("killed")

    killer = threading.Thread(target=kill_when_it_works, daemon=True)
    killer.start()
    outcomes = execute_all([*RUNS, replace(BRICK, category="nut")], places, engine="ray")
    killer.join()
    pipe.send([(outcome.run.id, outcome.state) for outcome in outcomes])
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def ray_folder():
    """Where a cluster keeps its sockets (their paths have to be short); nothing outlives it."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield folder
        for running in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if folder in " ".join(running.cmdline()):
                    running.kill()


def test_a_ray_cluster_that_loses_a_node_gives_the_same_scores(undisturbed, places, ray_folder):
    pytest.importorskip("ray")
    with process(on_ray, places, ray_folder) as (worker, pipe):
        assert pipe.poll(200)
        assert pipe.recv() == "killed"
        assert pipe.poll(200)
        nut = replace(BRICK, category="nut")
        assert pipe.recv() == [(run.id, "done") for run in RUNS] + [(nut.id, "failed")]
        worker.join(60)
        assert worker.exitcode == 0
    assert_same(places.results, undisturbed)
    assert left_behind(places.results) == []
