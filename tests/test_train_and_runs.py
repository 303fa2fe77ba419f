"""Training and runs: the same bytes alone, among others, in another process, and after a stop."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cplib import augment, data, records, runs, sweep, train
from cplib.config import BASELINES, CATEGORIES, PROFILES, TRAINED, Run, grid
from cplib.metrics import image_metrics
from cplib.runs import collect, execute, run_folder
from cplib.sweep import Outcome, execute_all, missing

TINY = Run(
    method="cutpaste_3way",
    category="gear",
    dataset="demo",
    size=64,
    updates=4,
    sources=4,
    curve=2,
    precision="fp32",
)
SCAR = replace(TINY, method="cutpaste_scar", category="brick", updates=3, curve=0)
PRECISE = ("fp32", "bf16", "fp16")
UNTRAINED = Run(method="untrained", category="gear", dataset="demo", size=64, updates=0)
FILES = {"history.csv", "metrics.json", "run.json", "scores.csv"}
EXACT = ("scores.csv", "metrics.json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, demo_root):
    """The folder of results of TINY, executed once in peace."""
    results = tmp_path_factory.mktemp("undisturbed")
    execute(TINY, data_root=demo_root, results=results)
    return results


@pytest.fixture
def pixels(demo_root):
    return data.load(demo_root, "gear", "train", 64).pixels


def history(folder):
    """The history without its seconds."""
    return pd.read_csv(folder / "history.csv", dtype=str).drop(columns="seconds")


def assert_same(folder, expected):
    for name in EXACT:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    run = runs.read(folder)[0]
    mine, theirs = (runs.load_model(run, f.parents[1]).state_dict() for f in (folder, expected))
    assert all(torch.equal(v, mine[k]) for k, v in theirs.items())
    pd.testing.assert_frame_equal(history(folder), history(expected))


def start_another(run, root, results):
    """Another process that executes the run."""
    code = (
        "import json, sys; from cplib.config import Run; from cplib.runs import execute;"
        "run, root, results = sys.argv[1:];"
        "execute(Run.from_dict(json.loads(run)), data_root=root, results=results)"
    )
    command = [sys.executable, "-c", code, json.dumps(asdict(run)), str(root), str(results)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


# The same run, the same bytes


def test_a_run_gives_the_same_bytes_among_others(undisturbed, demo_root, tmp_path):
    outcomes = execute_all([SCAR, TINY, UNTRAINED], data_root=demo_root, results=tmp_path, jobs=2)
    assert [(o.run, o.state) for o in outcomes] == [(r, "done") for r in (SCAR, TINY, UNTRAINED)]
    assert_same(run_folder(TINY, tmp_path), run_folder(TINY, undisturbed))


def test_a_run_gives_the_same_bytes_after_another_in_the_same_process(
    undisturbed, demo_root, tmp_path
):
    torch.manual_seed(5)
    execute(SCAR, data_root=demo_root, results=tmp_path)
    assert_same(execute(TINY, data_root=demo_root, results=tmp_path), run_folder(TINY, undisturbed))


def test_two_processes_at_once_leave_one_whole_folder_with_the_same_bytes(
    undisturbed, demo_root, tmp_path
):
    both = [start_another(TINY, demo_root, tmp_path) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=300)[1] == ""
        assert process.returncode == 0
    assert os.listdir(tmp_path / "runs") == [TINY.id]
    assert_same(run_folder(TINY, tmp_path), run_folder(TINY, undisturbed))


def test_another_seed_gives_other_scores(undisturbed, demo_root, tmp_path):
    other = execute(replace(TINY, seed=1, curve=0), data_root=demo_root, results=tmp_path)
    mine = run_folder(TINY, undisturbed)
    assert (other / "scores.csv").read_bytes() != (mine / "scores.csv").read_bytes()


def test_noting_the_auroc_on_the_way_changes_nothing(undisturbed, demo_root, tmp_path):
    """The features are embedded in evaluation mode and draw nothing from the generator."""
    plain = execute(replace(TINY, curve=0), data_root=demo_root, results=tmp_path)
    for name in EXACT:
        assert (plain / name).read_bytes() == (run_folder(TINY, undisturbed) / name).read_bytes()


def test_a_run_leaves_the_number_of_threads_as_it_was(demo_root, tmp_path):
    torch.set_num_threads(1)  # other tests' libraries may have reset it
    execute(UNTRAINED, data_root=demo_root, results=tmp_path, threads=2)
    assert torch.get_num_threads() == 1


# Stopped and gone on with


def test_a_run_stopped_after_every_update_ends_with_the_same_bytes(
    undisturbed, demo_root, tmp_path
):
    past = time.time() - 1
    for done in range(1, TINY.updates):
        with pytest.raises(train.OutOfTime, match=f"{TINY.id}: {done} of 4 updates done"):
            execute(TINY, data_root=demo_root, results=tmp_path, deadline=past)
        assert not run_folder(TINY, tmp_path).exists()
    folder = execute(TINY, data_root=demo_root, results=tmp_path, deadline=past)
    assert_same(folder, run_folder(TINY, undisturbed))
    assert os.listdir(tmp_path / "checkpoints") == [f"{TINY.training_id}.safetensors"]


def test_a_run_killed_between_updates_goes_on_from_its_checkpoint(
    undisturbed, demo_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("CPLIB_CHECKPOINT_SECONDS", "0")
    real, calls = train.step, []

    def killed_in_the_third(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(train, "step", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        execute(TINY, data_root=demo_root, results=tmp_path)
    folder = execute(TINY, data_root=demo_root, results=tmp_path)
    assert len(calls) == 3 + 2
    assert_same(folder, run_folder(TINY, undisturbed))


@pytest.mark.parametrize(("seconds", "writes"), [("1000", 1), ("0", 2)])
def test_a_checkpoint_is_written_as_often_as_asked_and_at_the_end(
    pixels, tmp_path, monkeypatch, seconds, writes
):
    monkeypatch.setenv("CPLIB_CHECKPOINT_SECONDS", seconds)
    written = []
    monkeypatch.setattr(train, "save", lambda *args: written.append(args))
    train.fit(replace(TINY, updates=2), pixels, checkpoint=tmp_path / "c.safetensors")
    assert len(written) == writes


def stopped(pixels, path, run=TINY):
    with pytest.raises(train.OutOfTime):
        train.fit(run, pixels, checkpoint=path, deadline=0)
    return path


def test_a_broken_checkpoint_is_set_aside_with_a_line_and_training_starts_afresh(
    pixels, tmp_path, capsys
):
    path = stopped(pixels, tmp_path / "c.safetensors")
    cut = path.read_bytes()[:-1000]
    path.write_bytes(cut)
    net, _ = train.fit(TINY, pixels, checkpoint=path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert f"{path}: not a checkpoint" in lines[0]
    assert path.with_suffix(".broken").read_bytes() == cut
    expected, _ = train.fit(TINY, pixels)
    for name, value in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_tensors_that_are_no_checkpoint_are_refused_and_kept(pixels, tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"another program, not of {TINY.training_id}"):
        train.fit(TINY, pixels, checkpoint=path)
    assert path.exists()


def test_a_checkpoint_of_another_run_is_refused(pixels, tmp_path):
    path = stopped(pixels, tmp_path / "c.safetensors")
    other = replace(TINY, learning_rate=0.5)
    with pytest.raises(ValueError, match=f"of {TINY.training_id}, not of {other.training_id}"):
        train.fit(other, pixels, checkpoint=path)


@pytest.mark.parametrize("name", ["data", "precision"])
def test_a_checkpoint_of_other_images_or_precision_is_left_with_a_line(
    pixels, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setenv("CPLIB_PRECISION", "fp32")
    run = replace(TINY, precision="auto", curve=0)
    path = stopped(pixels, tmp_path / "c.safetensors", run)
    if name == "data":
        pixels = pixels.flip(3)
    else:
        monkeypatch.setenv("CPLIB_PRECISION", "bf16")
    net, table = train.fit(run, pixels, checkpoint=path)
    assert f"{path}: of another {name}" in capsys.readouterr().out
    assert table["update"].tolist() == [1, 2, 3, 4]
    expected, _ = train.fit(run, pixels)
    assert torch.equal(net.head[-1].weight, expected.head[-1].weight)


def test_a_checkpoint_is_whole_or_not_there(pixels, tmp_path, monkeypatch):
    path = stopped(pixels, tmp_path / "c.safetensors")
    before = path.read_bytes()

    def full(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        train.fit(TINY, pixels, checkpoint=path, deadline=0)
    assert os.listdir(tmp_path) == ["c.safetensors"]
    assert path.read_bytes() == before


# The loop


def test_the_learning_rate_is_one_cosine_cycle():
    run = replace(TINY, updates=1000, learning_rate=0.03)
    rates = [train.learning_rate(run, update) for update in range(1001)]
    assert rates[0] == 0.03
    assert rates[500] == pytest.approx(0.015)
    assert rates[250] == pytest.approx(0.03 * (2 + math.sqrt(2)) / 4)
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


def test_the_learning_rate_is_that_of_torch():
    run = replace(TINY, updates=50)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=run.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for update in range(50):
        assert train.learning_rate(run, update) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_the_history_has_a_row_an_update_and_the_rates_that_were_used(undisturbed):
    table = pd.read_csv(run_folder(TINY, undisturbed) / "history.csv")
    assert table["update"].tolist() == [1, 2, 3, 4]
    expected = [train.learning_rate(TINY, update) for update in range(4)]
    np.testing.assert_allclose(table["learning_rate"], expected, rtol=1e-5)
    assert table["accuracy"].between(0, 1).all()
    assert (table["loss"] > 0).all()
    assert table["seconds"].is_monotonic_increasing


def test_the_auroc_is_noted_at_the_points_asked_for_and_last_at_the_end(undisturbed):
    folder = run_folder(TINY, undisturbed)
    noted = pd.read_csv(folder / "history.csv").set_index("update")["image_auroc"]
    assert noted.dropna().index.tolist() == [2, 4]
    final = json.loads((folder / "metrics.json").read_text())["image_auroc"]
    assert noted[4] == pytest.approx(final, rel=1e-5)


def test_a_long_history_is_averaged_over_the_updates_between_its_rows(pixels, monkeypatch):
    run = replace(TINY, updates=6, curve=0)
    _, each = train.fit(run, pixels)
    monkeypatch.setattr(train, "HISTORY_ROWS", 2)
    _, two = train.fit(run, pixels)
    assert two["update"].tolist() == [3, 6]
    expected = [each["loss"][:3].mean(), each["loss"][3:].mean()]
    np.testing.assert_allclose(two["loss"], expected, rtol=1e-5)


def test_a_trained_network_is_returned_in_evaluation_mode(pixels):
    net, _ = train.fit(replace(TINY, updates=1, curve=0), pixels)
    assert not any(module.training for module in net.modules())


def written_out(run, pixels):
    """Training as the paper has it, without an optimizer: momentum and weight decay by hand."""
    net, generator = train.build(run), torch.Generator().manual_seed(run.stream)
    momentum = [torch.zeros_like(p) for p in net.parameters()]
    for update in range(run.updates):
        images, labels = train.draw(run, pixels, generator)
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        rate = 0.5 * run.learning_rate * (1 + math.cos(math.pi * update / run.updates))
        for p, g, m in zip(net.parameters(), gradients, momentum, strict=True):
            m.mul_(run.momentum).add_(g + run.weight_decay * p.detach())
            p.data.sub_(rate * m)
    return net


def test_training_is_gradient_descent_with_momentum_and_weight_decay(pixels):
    # Steps so small that rounding, which BatchNorm enlarges from update to update, stays small too.
    run = replace(TINY, updates=2, curve=0, learning_rate=1e-4, weight_decay=1.0)
    mine, theirs, start = (
        torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        for net in (train.fit(run, pixels)[0], written_out(run, pixels), train.build(run))
    )
    assert (mine - theirs).norm() < 0.02 * (theirs - start).norm()


def test_the_learning_rate_climbs_first_where_there_is_a_warmup():
    run = replace(TINY, updates=100, learning_rate=0.01, warmup=0.1)
    rates = [train.learning_rate(run, update) for update in range(101)]
    plain = [train.learning_rate(replace(run, warmup=0.0), update) for update in range(101)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 * rate for k, rate in enumerate(plain[:10])])
    assert rates[10:] == plain[10:]


ADAMW = replace(TINY, optimizer="adamw", warmup=0.5, crop=32, whole=0.5, curve=0)


def test_adamw_is_torchs_with_the_runs_rates(pixels):
    optimizer = train.optimiser(replace(ADAMW, weight_decay=0.1), train.build(ADAMW))
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0.1


def test_a_run_of_adamw_stopped_after_every_update_ends_with_the_same_network(pixels, tmp_path):
    whole, _ = train.fit(ADAMW, pixels)
    for _ in range(3):
        path = stopped(pixels, tmp_path / "c.safetensors", ADAMW)
    again, _ = train.fit(ADAMW, pixels, checkpoint=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_training_looks_at_crops_and_at_the_end_at_whole_images(pixels, monkeypatch):
    sides, draw = [], train.draw
    monkeypatch.setattr(
        train, "draw", lambda *args: (batch := draw(*args), sides.append(batch[0].shape[-1]))[0]
    )
    train.fit(ADAMW, pixels)
    assert sides == [32, 32, 64, 64]


def test_training_learns_an_easy_task(pixels):
    changes = {"method": "cutout_color", "updates": 30, "sources": 8, "learning_rate": 0.01}
    _, table = train.fit(replace(TINY, curve=0, area=(0.3, 0.5), **changes), pixels)
    assert table["loss"][25:].mean() < 0.5 * table["loss"][:3].mean()


def test_training_leaves_the_global_random_state_as_it_was(pixels):
    state = torch.get_rng_state()
    train.fit(replace(TINY, updates=1, curve=0), pixels)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_has_its_sources_without_repetition_where_there_are_enough(pixels):
    run = replace(TINY, translate=0.0, jitter=(0.0,) * 4, sources=8)
    images, labels = train.draw(run, pixels, torch.Generator().manual_seed(0))
    normal = (images[labels == 0] * 255).round().byte()
    assert {p.numpy().tobytes() for p in normal} == {p.numpy().tobytes() for p in pixels}


def test_a_batch_repeats_sources_where_there_are_too_few(pixels):
    run = replace(TINY, sources=8)
    images, labels = train.draw(run, pixels[:3], torch.Generator().manual_seed(0))
    assert images.shape == (24, 3, 64, 64)
    assert labels.bincount().tolist() == [8, 8, 8]


def test_options_reach_the_pictures_of_a_batch(pixels):
    run = replace(TINY, translate=0.0, jitter=(0.0,) * 4, area=(0.4, 0.41), patch_jitter=0.0)
    images, _ = train.draw(run, pixels, torch.Generator().manual_seed(0))
    normal, pasted, _ = images.chunk(3)
    assert (normal != pasted).any(1).float().mean((1, 2)).max() > 0.3


def test_every_option_is_one_that_its_augmentation_takes():
    x = torch.rand(2, 3, 64, 64)
    for method in TRAINED:
        chosen = train.options(replace(TINY, method=method))
        images, _ = augment.pretext_batch(x, method, torch.Generator(), chosen)
        assert torch.isfinite(images).all()


AUTO = replace(TINY, precision="auto")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_precision_is_what_the_run_says_and_auto_what_the_environment_says(monkeypatch, name):
    assert train.precision(replace(TINY, precision=name), "cpu") == name
    monkeypatch.setenv("CPLIB_PRECISION", name)
    assert train.precision(AUTO, "cpu") == name
    assert train.precision(TINY, "cpu") == "fp32"


def test_an_unknown_precision_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("CPLIB_PRECISION", "int8")
    with pytest.raises(ValueError, match="unknown CPLIB_PRECISION 'int8'"):
        train.precision(AUTO, "cpu")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),  # AMD Zen 4
        ({"amx_bf16": True}, "bf16"),  # Intel Xeon
        ({"neon": True, "bf16": True}, "bf16"),  # ARM
        ({}, "fp32"),  # a torch too old to say
    ],
)
def test_auto_is_bf16_on_a_processor_that_multiplies_in_it(monkeypatch, found, expected):
    monkeypatch.delenv("CPLIB_PRECISION", raising=False)
    monkeypatch.setattr(train, "cpu_capabilities", lambda: found)
    assert train.precision(AUTO, "cpu") == expected


@pytest.mark.parametrize(
    ("bf16", "capability", "expected"),
    [(True, (8, 0), "bf16"), (False, (7, 5), "fp16"), (False, (6, 1), "fp32")],
)
def test_auto_on_a_gpu_follows_its_tensor_cores(monkeypatch, bf16, capability, expected):
    """An A100, a T4 and a P100."""
    monkeypatch.delenv("CPLIB_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.precision(AUTO, "cuda") == expected


def test_training_in_fp16_scales_the_loss_and_resumes_exactly(pixels, tmp_path, monkeypatch):
    run, path = replace(TINY, precision="fp16", curve=0), tmp_path / "c.safetensors"
    scales, update = [], torch.amp.GradScaler.update
    monkeypatch.setattr(
        train.torch.amp.GradScaler,
        "update",
        lambda self: (update(self), scales.append(self.get_scale())),
    )
    whole, _ = train.fit(run, pixels)
    assert scales[0] > 1
    for _ in range(3):
        stopped(pixels, path, run)
    again, _ = train.fit(run, pixels, checkpoint=path)
    assert scales[4:] == scales[:4]
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_training_in_lower_precision_ends_near_fp32(pixels):
    run = replace(TINY, updates=1, curve=0)
    losses = [train.fit(replace(run, precision=p), pixels)[1]["loss"][0] for p in PRECISE]
    assert len(set(losses)) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=0.1)


# The phase of the head alone

HEAD_FIRST = replace(TINY, head_updates=2, head_learning_rate=0.5, updates=2)


def test_the_learning_rate_is_constant_for_the_head_and_then_one_cosine_cycle():
    run = replace(HEAD_FIRST, head_updates=3, updates=10, learning_rate=0.1)
    rates = [train.learning_rate(run, update) for update in range(14)]
    assert rates[:4] == [0.5, 0.5, 0.5, 0.1]
    assert rates[8] == pytest.approx(0.05)
    assert rates[13] == pytest.approx(0, abs=1e-12)


def test_the_encoder_stays_as_it_is_while_the_head_is_trained_alone(pixels):
    net, _ = train.fit(replace(HEAD_FIRST, updates=0, curve=0), pixels)
    start = train.build(HEAD_FIRST)
    for name, value in start.encoder.state_dict().items():
        assert torch.equal(net.encoder.state_dict()[name], value), name
    assert not torch.equal(net.head[0].weight, start.head[0].weight)
    assert not torch.equal(net.head[1].running_mean, start.head[1].running_mean)


def test_the_encoder_moves_after_the_head(pixels):
    net, table = train.fit(replace(HEAD_FIRST, curve=0), pixels)
    assert table["update"].tolist() == [1, 2, 3, 4]
    start = train.build(HEAD_FIRST)
    assert not torch.equal(net.encoder.conv1.weight, start.encoder.conv1.weight)
    assert not torch.equal(net.encoder.bn1.running_mean, start.encoder.bn1.running_mean)


def test_a_run_with_both_phases_stopped_after_every_update_ends_with_the_same_bytes(
    demo_root, tmp_path
):
    whole = execute(HEAD_FIRST, data_root=demo_root, results=tmp_path / "whole")
    for _ in range(3):
        with pytest.raises(train.OutOfTime):
            execute(HEAD_FIRST, data_root=demo_root, results=tmp_path, deadline=0)
    folder = execute(HEAD_FIRST, data_root=demo_root, results=tmp_path, deadline=0)
    assert_same(folder, whole)


@pytest.mark.parametrize(
    ("run", "expected"),
    [(TINY, 4 * 4 * 3), (HEAD_FIRST, 4 * 4 * 3), (SCAR, 3 * 4 * 2), (UNTRAINED, 0)],
)
def test_the_images_of_a_run_are_updates_times_sources_times_classes(run, expected):
    assert train.images(run) == expected


# The folder of a run


def test_a_folder_holds_the_contracts_files_and_nothing_is_left_beside_it(undisturbed):
    assert set(os.listdir(run_folder(TINY, undisturbed))) == FILES
    assert os.listdir(undisturbed / "runs") == [TINY.id]
    assert list(undisturbed.rglob("*.tmp")) == []


def test_an_untrained_run_has_no_model_and_an_empty_history(demo_root, tmp_path):
    folder = execute(UNTRAINED, data_root=demo_root, results=tmp_path)
    assert set(os.listdir(folder)) == FILES
    assert (folder / "history.csv").read_text().strip() == ""


def test_scores_name_every_test_picture(undisturbed, demo_root):
    table = pd.read_csv(run_folder(TINY, undisturbed) / "scores.csv")
    test = data.load(demo_root, "gear", "test", 64)
    assert list(table) == ["file", "kind", "label", "score"]
    assert table["file"].tolist() == list(test.names)
    assert table["kind"].tolist() == list(test.kinds)
    assert table["label"].tolist() == test.labels.tolist()
    assert np.isfinite(table["score"]).all()


def test_metrics_are_those_of_the_scores(undisturbed):
    folder = run_folder(TINY, undisturbed)
    table = pd.read_csv(folder / "scores.csv")
    expected = image_metrics(table["label"], table["score"])
    assert json.loads((folder / "metrics.json").read_text()) == pytest.approx(expected)


def test_other_covariances_are_measured_on_the_same_network(undisturbed, demo_root, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    places = {"results": results, "data_root": demo_root}
    fits = pd.DataFrame(records.density_metrics(TINY, **places)["fits"])
    assert len(fits) == 2 * len(records.Covariances().fits)
    own = fits[(fits["covariance"] == "1e-06") & ~fits["l2_normalise"]]
    metrics = json.loads((run_folder(TINY, undisturbed) / "metrics.json").read_text())
    assert own["image_auroc"].item() == pytest.approx(metrics["image_auroc"])
    other = replace(TINY, reg_covar=1e-3, l2_normalise=True)
    net = runs.load_model(TINY, results)
    train, test = (data.load(demo_root, "gear", split, 64) for split in ("train", "test"))
    expected = image_metrics(test.labels, runs.score(other, net, train.pixels, test.pixels))
    row = fits[(fits["covariance"] == "0.001") & fits["l2_normalise"]]
    assert row["image_auroc"].item() == pytest.approx(expected["image_auroc"])
    assert np.isfinite(fits["held_out"]).all()
    kept = {"results": results, "data_root": None}
    assert records.density_metrics(TINY, **kept)["fits"] == fits.to_dict("records")
    few = records.Covariances(reg_covar=(1e-2,))
    assert records.density_metrics(TINY, few, **kept) is None
    assert len(records.density_metrics(TINY, few, **places)["fits"]) == 4


def test_scores_are_those_of_the_model_beside_them(undisturbed, demo_root):
    folder = run_folder(TINY, undisturbed)
    net = runs.load_model(TINY, undisturbed)
    normal, test = (data.load(demo_root, "gear", s, 64).pixels for s in ("train", "test"))
    expected = pd.read_csv(folder / "scores.csv")["score"]
    np.testing.assert_allclose(runs.score(TINY, net, normal, test), expected, rtol=1e-5)


def test_scores_depend_on_the_density_a_run_asks_for(demo_root):
    net = train.build(TINY)
    normal, test = (data.load(demo_root, "gear", s, 64).pixels for s in ("train", "test"))
    plain, longer, stiff = (
        runs.score(replace(TINY, **changes), net, normal, test)
        for changes in ({}, {"l2_normalise": True}, {"reg_covar": 1e-3})
    )
    assert not torch.allclose(plain, longer)
    assert (stiff < plain).all()


def test_the_record_holds_the_run_and_what_is_behind_its_numbers(undisturbed, demo_root):
    record = json.loads((run_folder(TINY, undisturbed) / "run.json").read_text())
    assert Run.from_dict(record["run"]) == TINY
    assert record["version"] == runs.RECORD_VERSION
    assert (record["precision"], record["threads"]) == ("fp32", 1)
    assert record["device"].startswith("CPU")
    for split, digest in record["data"].items():
        assert digest == data.fingerprint(data.load(demo_root, "gear", split, 64))
    assert {"python", "platform", "torch", "torchvision", "sklearn"} <= set(record["environment"])
    assert record["environment"]["torch"] == torch.__version__
    assert record["weights"] is None
    assert "git_commit" in record


def test_the_record_holds_seconds_and_pictures_a_second(undisturbed):
    record = json.loads((run_folder(TINY, undisturbed) / "run.json").read_text())
    assert record["train_seconds"] > 0
    made = record["images_per_second"] * record["train_seconds"]
    assert made == pytest.approx(4 * 4 * 3, rel=0.05)


def test_the_record_of_a_pretrained_run_names_its_weights(demo_root, tmp_path):
    run = PROFILES["smoke"].run("pretrained", "gear")
    folder = execute(run, data_root=demo_root, results=tmp_path)
    record = json.loads((folder / "run.json").read_text())
    assert record["weights"]["file"].endswith(".pth")
    assert len(record["weights"]["sha256"]) == 64
    assert (record["train_seconds"], record["images_per_second"]) == (0, None)


def test_a_run_that_is_there_is_kept(undisturbed, demo_root, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    folder = run_folder(TINY, tmp_path)
    (folder / "scores.csv").write_text("kept")
    assert execute(TINY, data_root=demo_root, results=tmp_path) == folder
    assert (folder / "scores.csv").read_text() == "kept"


def test_a_run_without_data_is_refused_and_leaves_no_folder(demo_root, tmp_path):
    with pytest.raises(data.DataError, match="nothing"):
        execute(replace(TINY, category="nothing"), data_root=demo_root, results=tmp_path)
    assert os.listdir(tmp_path / "runs") == []


def test_a_run_whose_record_cannot_be_written_leaves_no_folder(demo_root, tmp_path, monkeypatch):
    def full(path, value):
        raise OSError("no space left")

    monkeypatch.setattr(runs, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        execute(UNTRAINED, data_root=demo_root, results=tmp_path)
    assert os.listdir(tmp_path / "runs") == []


def test_results_below_a_file_are_refused(demo_root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        execute(UNTRAINED, data_root=demo_root, results=tmp_path / "file" / "results")


def test_training_that_diverges_is_refused_and_leaves_no_folder(demo_root, tmp_path):
    wild = replace(TINY, learning_rate=1e30, curve=0)
    with pytest.raises(ValueError, match="finite"):
        execute(wild, data_root=demo_root, results=tmp_path)
    assert os.listdir(tmp_path / "runs") == []


# Many runs


def test_a_run_that_fails_does_not_stop_the_others(demo_root, tmp_path):
    broken = replace(UNTRAINED, category="nothing")
    todo = [UNTRAINED, broken, replace(UNTRAINED, seed=1)]
    outcomes = execute_all(todo, data_root=demo_root, results=tmp_path, jobs=1)
    assert [o.state for o in outcomes] == ["done", "failed", "done"]
    assert "DataError" in outcomes[1].message
    assert "nothing" in outcomes[1].message
    assert set(os.listdir(tmp_path / "runs")) == {todo[0].id, todo[2].id}


def test_only_missing_runs_are_executed_and_each_once(undisturbed, demo_root, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    assert missing([TINY, UNTRAINED, UNTRAINED], tmp_path) == [UNTRAINED]
    todo = [UNTRAINED, TINY, UNTRAINED]
    outcomes = execute_all(todo, data_root=demo_root, results=tmp_path, jobs=1)
    assert outcomes == [Outcome(UNTRAINED, "done")]
    assert execute_all(todo, data_root=demo_root, results=tmp_path, jobs=1) == []


def test_a_budget_that_is_over_leaves_the_rest_for_another_call(demo_root, tmp_path):
    todo = [TINY, UNTRAINED]
    late = execute_all(todo, data_root=demo_root, results=tmp_path, jobs=1, budget=0)
    assert {o.state for o in late} == {"out of time"}
    done = execute_all(todo, data_root=demo_root, results=tmp_path, jobs=1)
    assert [o.state for o in done] == ["done", "done"]


def test_a_run_out_of_time_says_how_far_it_came(demo_root, tmp_path, monkeypatch):
    now = time.time()
    clock = iter([now])
    monkeypatch.setattr(sweep.time, "time", lambda: next(clock, now + 1000))
    options = {"data_root": demo_root, "results": tmp_path}
    outcome = sweep.attempt(TINY, deadline=now + 500, **options)
    assert (outcome.state, outcome.message) == ("out of time", f"{TINY.id}: 1 of 4 updates done")


def test_an_unknown_engine_is_refused(demo_root, tmp_path):
    with pytest.raises(ValueError, match="engine 'steam'"):
        execute_all([UNTRAINED], data_root=demo_root, results=tmp_path, engine="steam")


def test_an_estimate_counts_what_is_missing_at_the_rate_of_what_is_done(undisturbed):
    _, record, _ = runs.read(run_folder(TINY, undisturbed))
    todo = [replace(TINY, seed=s) for s in range(3)] + [UNTRAINED]
    table = sweep.estimate(todo, undisturbed, record["device"])
    assert table["runs"].to_dict() == {"cutpaste_3way": 2, "untrained": 1}
    assert table["images"].to_dict() == {"cutpaste_3way": 96, "untrained": 0}
    hours = 96 / record["images_per_second"] / 3600
    assert table["hours"]["cutpaste_3way"] == pytest.approx(hours)


@pytest.mark.parametrize("changes", [{"size": 128}, {}])
def test_an_estimate_without_a_like_run_has_no_hours(undisturbed, changes):
    table = sweep.estimate([replace(TINY, seed=1, **changes)], undisturbed, "an abacus")
    assert table["images"].tolist() == [48]
    assert table["hours"].isna().all()


# Again


def test_a_stored_run_repeated_gives_the_same_bytes(undisturbed, demo_root):
    folder = run_folder(TINY, undisturbed)
    assert runs.rerun(folder, data_root=demo_root) == (True, "the same scores, byte for byte")


@pytest.fixture
def stored(demo_root, tmp_path):
    """An untrained run's folder, free to be spoilt."""
    return execute(UNTRAINED, data_root=demo_root, results=tmp_path)


def rescored(folder, device, change):
    """The stored run as another device's, its scores changed by a share of their spread."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"device": device or record["device"]}))
    table = pd.read_csv(folder / "scores.csv")
    table.loc[0, "score"] += change * table["score"].std()
    table.to_csv(folder / "scores.csv", index=False)


@pytest.mark.parametrize(
    ("device", "change", "same"),
    [(None, 0.01, False), ("a GPU", 0.01, True), ("a GPU", 0.5, False)],
)
def test_scores_may_differ_a_little_between_devices_only(stored, demo_root, device, change, same):
    rescored(stored, device, change)
    found, line = runs.rerun(stored, data_root=demo_root)
    assert found is same
    assert "of their standard deviation" in line


def test_a_run_cannot_be_repeated_on_other_pictures(stored, demo_root, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(demo_root, other)
    shutil.copy(other / "gear/test/good/000.png", other / "gear/test/good/001.png")
    with pytest.raises(ValueError, match="pictures"):
        runs.rerun(stored, data_root=other)


# Collecting


@pytest.fixture
def collected(undisturbed, demo_root, tmp_path):
    """Results with a trained and an untrained run."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    execute(UNTRAINED, data_root=demo_root, results=tmp_path)
    return tmp_path


def test_collect_gives_a_row_a_run_with_fields_metrics_and_seconds(collected):
    table = collect(collected)
    assert set(table["id"]) == {TINY.id, UNTRAINED.id}
    row = table[table["id"] == TINY.id].iloc[0]
    for name, value in asdict(TINY).items():
        assert row[name] == value
    metrics = json.loads((run_folder(TINY, collected) / "metrics.json").read_text())
    assert {name: row[name] for name in metrics} == metrics
    assert row["train_seconds"] > 0


def test_collect_keeps_the_runs_whose_fields_are_asked_for(collected):
    assert collect(collected, method="untrained")["id"].tolist() == [UNTRAINED.id]
    assert collect(collected, method="cutpaste_3way", seed=0)["id"].tolist() == [TINY.id]
    assert len(collect(collected, method="cutpaste_3way", seed=1)) == 0


def test_collect_takes_values_that_are_tuples(collected):
    assert collect(collected, method="untrained", area=(0.02, 0.15))["id"].tolist() == [
        UNTRAINED.id
    ]
    assert len(collect(collected, area=(0.02, 0.3))) == 0


def test_collect_from_nothing_has_the_columns_of_runs(collected, tmp_path_factory):
    empty = collect(tmp_path_factory.mktemp("empty"))
    assert len(empty) == 0
    assert set(collect(collected)) <= set(empty)


def test_collect_does_not_see_runs_that_are_being_written(collected):
    shutil.copytree(run_folder(TINY, collected), collected / "runs" / ".part-abc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(collect(collected)) == 2


def spoil(results, change):
    path = run_folder(TINY, results) / "run.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: record | {"version": 99}, "record version 99"),
        (lambda record: record | {"run": record["run"] | {"colour": 1}}, "'colour'"),
        (lambda record: record | {"run": record["run"] | {"seed": 7}}, "seed7"),
        (lambda record: {}, "version"),
    ],
)
def test_collect_warns_of_a_folder_of_another_version_and_leaves_it_alone(
    collected, change, reason
):
    spoil(collected, change)
    with pytest.warns(UserWarning, match=reason):
        assert collect(collected)["id"].tolist() == [UNTRAINED.id]
    assert run_folder(TINY, collected).exists()


def test_collect_warns_of_a_foreign_folder_and_names_it(collected):
    (collected / "runs" / "holiday").mkdir()
    with pytest.warns(UserWarning, match="holiday: not a run"):
        assert len(collect(collected)) == 2


def test_read_gives_the_run_its_record_and_its_metrics(undisturbed):
    run, record, metrics = runs.read(run_folder(TINY, undisturbed))
    assert run == TINY
    assert record["run"]["method"] == "cutpaste_3way"
    assert set(metrics) == {"image_auroc", "image_ap", "image_f1max"}


def test_read_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(ValueError, match="not a run of this version"):
        runs.read(tmp_path)


# The ensemble


def with_scores(results, run, files, labels, scores):
    """A run's folder with nothing but these scores."""
    folder = run_folder(run, results)
    folder.mkdir(parents=True)
    table = pd.DataFrame({"file": files, "kind": "k", "label": labels, "score": scores})
    table.to_csv(folder / "scores.csv", index=False)
    return {"id": run.id, "method": run.method, "category": run.category, "seed": run.seed}


def test_the_ensemble_is_the_mean_of_the_scores_of_the_seeds(tmp_path):
    files, labels = list("abcdef"), [0, 0, 0, 1, 1, 1]
    scores = np.random.default_rng(0).uniform(size=(3, 6))
    rows = [
        with_scores(tmp_path, replace(TINY, seed=s), files, labels, scores[s]) for s in range(3)
    ]
    rows.append({**rows[0], "method": "cutpaste", "id": "another"})
    found = runs.ensemble(tmp_path, pd.DataFrame(rows))
    assert len(found) == 1
    row = found.iloc[0]
    assert (row["method"], row["category"], row["members"]) == ("ensemble", "gear", 3)
    for name, value in image_metrics(labels, scores.mean(0)).items():
        assert row[name] == pytest.approx(value)


def test_the_ensemble_goes_by_the_names_of_files_and_not_by_their_order(tmp_path):
    rows = [
        with_scores(tmp_path, TINY, list("abc"), [0, 0, 1], [1, 2, 3]),
        with_scores(tmp_path, replace(TINY, seed=1), list("cba"), [1, 0, 0], [3, 2, 1]),
    ]
    assert runs.ensemble(tmp_path, pd.DataFrame(rows)).iloc[0]["image_auroc"] == 100


def test_one_seed_makes_no_ensemble(tmp_path):
    row = with_scores(tmp_path, TINY, list("ab"), [0, 1], [1, 2])
    assert len(runs.ensemble(tmp_path, pd.DataFrame([row]))) == 0


# What a run is


def test_the_ids_that_committed_results_go_by():
    run = Run(method="cutpaste_3way", category="bottle")
    assert run.id == "cutpaste_3way-bottle-seed0-0e8fa9db"


SCORED_OTHERWISE = {"l2_normalise": True, "reg_covar": 1e-3, "window": 32, "stride": 16}


def test_runs_that_only_score_differently_have_one_training():
    run = Run(method="cutpaste", category="bottle", updates=10)
    other = replace(run, gaussians="shared", heat_std=5.0, **SCORED_OTHERWISE)
    assert run.id != other.id
    assert run.training_id == other.training_id == run.id
    assert run.training_id != replace(run, crop=32).training_id


def test_scoring_otherwise_trains_nothing(undisturbed, demo_root, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    monkeypatch.setattr(train, "step", lambda *args: pytest.fail("trained again"))
    run = replace(TINY, **SCORED_OTHERWISE)
    folder = execute(run, data_root=demo_root, results=results)
    read, record, metrics = runs.read(folder)
    assert (read, record["precision"]) == (run, "fp32")
    assert record["train_seconds"] == runs.read(run_folder(TINY, results))[1]["train_seconds"]
    assert 0 <= metrics["pixel_auroc"] <= 100
    pd.testing.assert_frame_equal(history(folder), history(run_folder(TINY, results)))


def test_every_method_category_and_seed_has_its_own_random_numbers():
    some = [
        Run(method=method, category=category, seed=seed)
        for method in TRAINED
        for category in CATEGORIES
        for seed in range(5)
    ]
    assert len({run.stream for run in some}) == len(some)
    nets = [train.build(run).encoder.conv1.weight for run in (some[0], some[5], some[75], some[0])]
    assert torch.equal(nets[0], nets[3])
    assert not torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_an_id_does_not_depend_on_the_process(tmp_path):
    code = "from cplib.config import Run; print(Run(method='cutpaste', category='tile', seed=2).id)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == Run(method="cutpaste", category="tile", seed=2).id


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 5),
        "size": st.sampled_from([64, 128, 256]),
        "updates": st.integers(0, 10),
        "learning_rate": st.sampled_from([0, 0.0, 0.01, 0.03, 1, 1.0]),
        "patch_jitter": st.sampled_from([0, 0.0, 0.1]),
        "head": st.sampled_from([(), (512,), (512, 128), [512, 128]]),
        "area": st.sampled_from([(0.02, 0.15), [0.02, 0.15], (0.02, 0.3), (0, 0.5), (0.0, 0.5)]),
        "init": st.sampled_from(["random", "imagenet"]),
        "l2_normalise": st.booleans(),
        "scar_width": st.sampled_from([(2, 16), (2.0, 16.0), (4, 8), (4.0, 8.0)]),
    },
)


@given(CHANGES, CHANGES)
@example({"patch_jitter": 0}, {"patch_jitter": 0.0})
@example({"scar_width": (4, 8)}, {"scar_width": (4.0, 8.0)})
@example({"head": [512]}, {"head": (512,)})
def test_runs_have_the_same_id_exactly_if_they_are_equal(one, other):
    a, b = (Run(method="cutpaste", category="tile", **changes) for changes in (one, other))
    assert (a.id == b.id) == (a == b)


@given(CHANGES)
def test_a_run_survives_json(changes):
    run = Run(method="cutpaste", category="tile", **changes)
    read = Run.from_dict(json.loads(json.dumps(asdict(run))))
    assert (read, read.id, hash(read)) == (run, run.id, hash(run))


def test_a_field_at_its_default_leaves_the_id_as_it_is():
    plain = Run(method="cutpaste", category="tile")
    assert Run(method="cutpaste", category="tile", momentum=0.9, head=[512, 128]).id == plain.id


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="unknown field 'colour'"):
        Run.from_dict({"method": "cutpaste", "category": "tile", "colour": 1})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "nonsense"}, "method 'nonsense'"),
        ({"backbone": "vgg"}, "backbone 'vgg'"),
        ({"init": "zeros"}, "init 'zeros'"),
        ({"precision": "int8"}, "precision 'int8'"),
        ({"size": 4}, "size"),
        ({"size": 64.5}, "size"),
        ({"updates": -1}, "updates"),
        ({"sources": 0}, "sources"),
        ({"seed": -1}, "seed"),
        ({"curve": -1}, "curve"),
        ({"freeze_batchnorm": True}, "freeze_batchnorm"),
    ],
)
def test_a_run_that_cannot_be_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        Run(**({"method": "cutpaste", "category": "tile"} | changes))


def test_the_defaults_are_the_papers_protocol():
    run = Run(method="cutpaste_3way", category="bottle")
    assert (run.size, run.updates, run.sources) == (256, 256 * 256, 32)
    assert (run.learning_rate, run.momentum, run.weight_decay) == (0.03, 0.9, 3e-5)
    assert (run.area, run.aspect, run.patch_jitter) == ((0.02, 0.15), (0.3, 3.3), 0.1)
    assert (run.scar_width, run.scar_length, run.scar_angle) == ((2, 16), (10, 25), 45)
    assert (run.backbone, run.init) == ("resnet18", "random")


def test_grid_is_every_combination():
    found = grid(method=["cutpaste", "rotation"], category="tile", seed=[0, 1, 2], head=(64,))
    assert len(set(found)) == 6
    assert {(r.method, r.seed) for r in found} == {
        (method, seed) for method in ("cutpaste", "rotation") for seed in range(3)
    }
    assert {(r.category, r.head) for r in found} == {("tile", (64,))}


@pytest.mark.parametrize("name", PROFILES)
def test_the_runs_of_a_profile_are_distinct_and_cover_it(name):
    profile = PROFILES[name]
    planned = profile.runs()
    assert len({run.id for run in planned}) == len(planned)
    assert {(r.category, r.method) for r in planned} == {
        (category, method) for category in profile.categories for method in profile.methods
    }
    assert {run.dataset for run in planned} == {profile.dataset}


def test_the_paper_profile_is_the_papers_protocol():
    profile = PROFILES["paper"]
    assert (profile.categories, profile.seeds) == (CATEGORIES, 5)
    assert profile.protocol == {"precision": "fp16"}
    run = profile.run("cutpaste_3way", "bottle", 3)
    assert run == Run(method="cutpaste_3way", category="bottle", seed=3, precision="fp16")
    patch = profile.patch_runs(("bottle",), 1)[-1]
    assert (patch.crop, patch.window, patch.stride) == (64, 32, 4)


def test_a_profile_gives_the_runs_of_the_methods_categories_and_seeds_named():
    found = PROFILES["paper"].runs(("cutpaste",), ("tile", "wood"), 2, size=128)
    assert [(r.category, r.seed) for r in found] == [
        ("tile", 0),
        ("tile", 1),
        ("wood", 0),
        ("wood", 1),
    ]
    assert {(r.method, r.size) for r in found} == {("cutpaste", 128)}


def test_pretrained_features_have_one_seed_and_random_ones_have_all():
    found = PROFILES["paper"].runs(BASELINES, ("tile",))
    counts = pd.Series([run.method for run in found]).value_counts()
    assert counts.to_dict() == {"untrained": 5, "pretrained": 1}


def test_a_baseline_keeps_only_what_it_depends_on():
    quick = PROFILES["quick"]
    one = quick.run("untrained", "tile", learning_rate=0.1, patch_jitter=0.5)
    assert one == quick.run("untrained", "tile")
    assert (one.updates, one.init) == (0, "random")
    assert quick.run("pretrained", "tile").init == "imagenet"
    assert quick.run("untrained", "tile", size=128).size == 128
