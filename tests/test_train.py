"""A run's fields and ids, and its training: the loop, its precision, and exact resumption."""

import json
import math
import os
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cplib import augment, datasets, train
from cplib.checkpoint import read_checkpoint
from cplib.datasets import MVTEC
from cplib.model import build
from cplib.run import Run

SMALL = {"dataset": "demo", "size": 32, "updates": 4, "sources": 2, "precision": "fp32"}
TINY = Run(method="cutpaste_3way", category="sieve", **SMALL)
ADAMW = replace(TINY, optimizer="adamw", warmup=0.5, crop=16)
HEAD_FIRST = replace(TINY, head_updates=2, head_learning_rate=0.5, updates=2)
AUTO = replace(TINY, precision="auto")
UNCHANGED = {"translate": 0.0, "jitter": (0.0,) * 4}


@pytest.fixture(scope="module")
def pixels(demo_root):
    return datasets.load(demo_root, "sieve", "train", 32).pixels


@pytest.fixture
def path(tmp_path):
    """Where a checkpoint goes."""
    return tmp_path / "c.safetensors"


def stop(run, pixels, path):
    """Do one more update, write a checkpoint and stop."""
    with pytest.raises(train.OutOfTime) as late:
        train.fit(run, pixels, checkpoint=path, deadline=0)
    return str(late.value)


def same(net, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())


# What a run is


def test_the_ids_that_committed_results_go_by():
    run = Run(method="cutpaste_3way", category="bottle")
    assert run.id == "cutpaste_3way-bottle-seed0-0e8fa9db"
    fields = {"optimizer": "adamw", "learning_rate": 0.0005, "warmup": 0.1, "crop": 64}
    fields |= {"head_batchnorm": False, "sources": 16, "updates": 640, "curve": 4}
    assert replace(run, **fields).id == "cutpaste_3way-bottle-seed0-19c5b3e5"


def test_the_defaults_are_the_papers_protocol():
    run = Run(method="cutpaste_3way", category="bottle")
    assert (run.size, run.updates, run.sources) == (256, 256 * 256, 32)
    assert (run.learning_rate, run.momentum, run.weight_decay) == (0.03, 0.9, 3e-5)
    assert (run.area, run.aspect, run.patch_jitter) == ((0.02, 0.15), (0.3, 3.3), 0.1)
    assert (run.scar_width, run.scar_length, run.scar_angle) == ((2, 16), (10, 25), 45)
    assert (run.backbone, run.init, run.crop, run.l2_normalise) == ("resnet18", "random", 0, False)


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 5),
        "size": st.sampled_from([64, 128, 256]),
        "learning_rate": st.sampled_from([0, 0.0, 0.01, 0.03, 1, 1.0]),
        "head": st.sampled_from([(), (512,), (512, 128), [512, 128]]),
        "area": st.sampled_from([(0.02, 0.15), [0.02, 0.15], (0, 0.5), (0.0, 0.5)]),
        "l2_normalise": st.booleans(),
    },
)


@given(CHANGES, CHANGES)
@example({"learning_rate": 0}, {"learning_rate": 0.0})
@example({"area": (0, 1)}, {"area": (0.0, 1.0)})
@example({"head": [512]}, {"head": (512,)})
@example({"momentum": 0.9}, {})
def test_runs_have_the_same_id_exactly_if_they_are_equal(one, other):
    a, b = (Run(method="cutpaste", category="tile", **changes) for changes in (one, other))
    assert (a.id == b.id) == (a == b)


@given(CHANGES)
def test_a_run_survives_json_and_a_field_of_another_version_is_named(changes):
    run = Run(method="cutpaste", category="tile", **changes)
    fields = json.loads(json.dumps(asdict(run)))
    read = Run.from_dict(fields)
    assert (read, read.id, hash(read)) == (run, run.id, hash(run))
    with pytest.raises(ValueError, match="colour: Unexpected"):
        Run.from_dict(fields | {"colour": 1})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "nonsense"}, "method"),
        ({"size": 64.5}, "size"),
        ({"updates": -1}, "updates"),
        ({"freeze_batchnorm": True}, "freeze_batchnorm"),
        ({"head": 512}, "head"),
        ({"area": (0.1, 0.2, 0.3)}, "area"),
        ({"levels": (4, 5)}, "levels need an EfficientNet"),
    ],
)
def test_a_run_that_cannot_be_is_refused_by_name_from_a_file_in_one_line(changes, named):
    fields = {"method": "cutpaste", "category": "tile"} | changes
    with pytest.raises(ValueError, match=named):
        Run(**fields)
    with pytest.raises(ValueError, match=rf"^{named}[^\n]*\Z"):
        Run.from_dict(fields)


def test_runs_that_only_score_differently_have_one_training():
    run = Run(method="cutpaste", category="bottle", updates=10)
    other = replace(run, l2_normalise=True, reg_covar=1e-3, window=32, stride=16, curve=3)
    other = replace(other, gaussians="shared", heat_std=5.0)
    assert run.id != other.id
    assert run.training_id == other.training_id == run.id
    assert run.training_id != replace(run, crop=32).training_id


def test_every_method_category_and_seed_has_its_own_random_numbers():
    some = [
        Run(method=method, category=category, seed=seed)
        for method in augment.METHODS
        for category in MVTEC.categories
        for seed in range(5)
    ]
    assert len({run.stream for run in some}) == len(some)


def test_only_aligned_objects_have_a_gaussian_for_each_place():
    found = [Run(method="cutpaste", category=c).per_position for c in ("bottle", "screw", "tile")]
    assert found == [True, False, False]
    assert Run(method="cutpaste", category="tile", gaussians="position").per_position


def test_the_images_of_a_run_are_updates_times_sources_times_classes():
    assert TINY.images == 4 * 2 * 3
    assert HEAD_FIRST.images == (2 + 2) * 2 * 3
    assert replace(TINY, method="rotation").images == 4 * 2 * 4
    baseline = replace(TINY, method="untrained", updates=0)
    assert (baseline.images, baseline.needs_training, TINY.needs_training) == (0, False, True)


# The schedule and the optimiser


def test_the_learning_rate_climbs_first_where_there_is_a_warmup():
    run = replace(TINY, updates=100, learning_rate=0.01, warmup=0.1)
    rates = [train.learning_rate(run, update) for update in range(101)]
    plain = [train.learning_rate(replace(run, warmup=0.0), update) for update in range(101)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 * rate for k, rate in enumerate(plain[:10])])
    assert rates[10:] == plain[10:]


def test_the_learning_rate_is_constant_for_the_head_and_then_one_cosine_cycle():
    run = replace(HEAD_FIRST, head_updates=3, updates=1000, learning_rate=0.1)
    rates = [train.learning_rate(run, update) for update in range(1004)]
    assert rates[:4] == [0.5, 0.5, 0.5, 0.1]
    assert rates[253] == pytest.approx(0.1 * (2 + math.sqrt(2)) / 4)
    assert rates[503] == pytest.approx(0.05)
    assert rates[1003] == pytest.approx(0, abs=1e-12)


def written_out(run, pixels):
    """Training as the paper has it, without an optimizer: momentum and weight decay by hand."""
    net, generator = build(run), torch.Generator().manual_seed(run.stream)
    momentum = [torch.zeros_like(p) for p in net.parameters()]
    for update in range(run.updates):
        images, labels = train.batch(run, pixels, generator)
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        rate = 0.5 * run.learning_rate * (1 + math.cos(math.pi * update / run.updates))
        for p, g, m in zip(net.parameters(), gradients, momentum, strict=True):
            m.mul_(run.momentum).add_(g + run.weight_decay * p.detach())
            p.data.sub_(rate * m)
    return net


def test_training_is_gradient_descent_with_momentum_and_weight_decay(pixels):
    # Steps so small that rounding, which BatchNorm enlarges from update to update, stays small too.
    run = replace(TINY, updates=2, learning_rate=1e-4, weight_decay=1.0)
    mine, theirs, start = (
        torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        for net in (train.fit(run, pixels)[0], written_out(run, pixels), build(run))
    )
    assert (mine - theirs).norm() < 0.02 * (theirs - start).norm()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_optimiser_survives_gradients_that_overflow_at_once(monkeypatch, name):
    found = []
    for fused in ((), ("cpu",)):
        monkeypatch.setattr(train, "FUSED", fused)
        torch.manual_seed(0)
        net = torch.nn.Linear(64, 4)
        optimizer = train.optimiser(replace(TINY, optimizer=name), net)
        scaler = torch.amp.GradScaler("cpu")
        for factor in (math.inf, 1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale((net(torch.ones(2, 64)) * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(net.weight.detach())
    torch.testing.assert_close(*found)


def test_adamw_is_torchs_with_the_runs_rates():
    optimizer = train.optimiser(replace(ADAMW, weight_decay=0.1), build(ADAMW))
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0.1
    assert optimizer.defaults["lr"] == ADAMW.learning_rate


def test_a_batch_has_its_sources_without_repetition_where_there_are_enough(pixels):
    run = replace(TINY, sources=8, **UNCHANGED)
    images, labels = train.batch(run, pixels, torch.Generator().manual_seed(0))
    normal = (images[labels == 0] * 255).round().byte()
    assert {p.numpy().tobytes() for p in normal} == {p.numpy().tobytes() for p in pixels}
    _, labels = train.batch(run, pixels[:3], torch.Generator().manual_seed(0))
    assert labels.bincount().tolist() == [8, 8, 8]


def test_the_runs_fields_reach_the_images_of_a_batch(pixels):
    run = replace(TINY, area=(0.4, 0.41), patch_jitter=0.0, **UNCHANGED)
    images, _ = train.batch(run, pixels, torch.Generator().manual_seed(0))
    normal, pasted, _ = images.chunk(3)
    assert (normal != pasted).any(1).float().mean((1, 2)).max() > 0.3


@pytest.mark.parametrize("method", augment.METHODS)
def test_every_option_is_one_that_its_augmentation_takes(method):
    x, options = torch.rand(2, 3, 32, 32), train.augmentation_kwargs(replace(TINY, method=method))
    images, _ = augment.example_batch(x, method, options)
    assert torch.isfinite(images).all()


def test_lengths_in_pixels_scale_with_the_image():
    small = train.augmentation_kwargs(TINY)
    assert small["cutpaste_scar"]["width"] == (2 / 8, 16 / 8)
    assert small["confetti"]["blur"] == pytest.approx(5.7 / 8)
    assert train.augmentation_kwargs(replace(TINY, size=256))["scar"]["length"] == (10, 25)


def test_training_takes_the_sides_of_crops_by_turns(pixels, monkeypatch):
    sides, batch = [], train.batch
    monkeypatch.setattr(
        train, "batch", lambda *args: (made := batch(*args), sides.append(made[0].shape[-1]))[0]
    )
    train.fit(replace(ADAMW, crop=(16, 24, 0)), pixels)
    assert sides == [16, 24, 32, 16]


def test_training_reseeds_no_gpu_and_leaves_the_global_random_state_as_it_was(pixels, monkeypatch):
    reseeded, before = [], torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    for work in (lambda: build(TINY), lambda: train.fit(TINY, pixels)):
        work()
        assert reseeded == []
        assert torch.equal(torch.get_rng_state(), before)


# The history


def test_the_history_has_a_row_an_update_or_if_it_is_long_their_averages(pixels, monkeypatch):
    run = replace(TINY, updates=6)
    net, each = train.fit(run, pixels)
    assert not any(module.training for module in net.modules())
    assert each["update"].tolist() == [1, 2, 3, 4, 5, 6]
    assert each["learning_rate"].tolist() == [train.learning_rate(run, i) for i in range(6)]
    assert each["accuracy"].between(0, 1).all()
    monkeypatch.setattr(train, "HISTORY_ROWS", 2)
    _, two = train.fit(run, pixels)
    assert two["update"].tolist() == [3, 6]
    expected = [each["loss"][:3].mean(), each["loss"][3:].mean()]
    assert two["loss"].tolist() == pytest.approx(expected, rel=1e-5)


def test_what_is_noted_on_the_way_changes_nothing_and_survives_a_stop(pixels, path):
    """Training stands still at the run's points; the network may be put in evaluation mode."""
    run, plain = replace(TINY, curve=2), train.fit(TINY, pixels)[0]
    for deadline in (0, 0, None):
        try:
            for net, history in train.training(run, pixels, checkpoint=path, deadline=deadline):
                net.eval()
                history[-1]["noted"] = history[-1]["update"]
        except train.OutOfTime:
            continue
    assert [row.get("noted") for row in history] == [None, 2, None, 4]
    assert same(net, plain)


# Stopped and resumed


@pytest.mark.parametrize("run", [TINY, ADAMW, HEAD_FIRST])
def test_a_run_stopped_after_every_update_ends_with_the_same_network(pixels, path, run):
    whole, table = train.fit(run, pixels)
    for done in (1, 2, 3):
        assert stop(run, pixels, path) == f"{run.id}: {done} of 4 updates done"
    again, resumed = train.fit(run, pixels, checkpoint=path, deadline=0)
    assert same(again, whole)
    assert resumed.drop(columns="seconds").equals(table.drop(columns="seconds"))
    tensors = read_checkpoint(path)[1]  # small, now that it is only scored
    assert not [name for name in tensors if name.startswith("optimizer.")]


@pytest.mark.parametrize("run", [TINY, ADAMW])
def test_the_optimisers_state_is_read_in_the_memory_format_of_its_parameters(
    pixels, path, monkeypatch, run
):
    stop(run, pixels, path)
    saved, used = read_checkpoint(path)[1], []

    def halt(run, net, optimizer, *rest):
        used.append(optimizer)
        raise train.OutOfTime

    monkeypatch.setattr(train, "step", halt)
    with pytest.raises(train.OutOfTime):
        train.fit(run, pixels, checkpoint=path)
    for i, parameter in enumerate(used[0].param_groups[0]["params"]):
        for name, value in used[0].state[parameter].items():
            assert torch.equal(value, saved.pop(f"optimizer.{i}.{name}"))
            assert value.dim() != 4 or value.stride() == parameter.stride()
    assert not [name for name in saved if name.startswith("optimizer.")]


def test_a_checkpoint_is_written_as_often_as_asked_and_at_the_end(pixels, path, monkeypatch):
    written = []
    monkeypatch.setattr(train, "save", lambda *args: written.append(args[3]))
    for seconds in ("1000", "0"):
        monkeypatch.setenv("CPLIB_CHECKPOINT_SECONDS", seconds)
        train.fit(replace(TINY, updates=2), pixels, checkpoint=path)
    assert written == [2, 1, 2]


@pytest.mark.parametrize("kept", [0, 5000])
def test_a_broken_checkpoint_is_set_aside_with_a_line_and_training_starts_afresh(
    pixels, path, capsys, kept
):
    stop(TINY, pixels, path)
    cut = path.read_bytes()[:kept]
    path.write_bytes(cut)
    net, _ = train.fit(TINY, pixels, checkpoint=path)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{path}: not a checkpoint" in line
    assert path.with_suffix(".broken").read_bytes() == cut
    assert same(net, train.fit(TINY, pixels)[0])


def test_a_checkpoint_of_another_run_or_program_is_refused_and_kept(pixels, path):
    stop(TINY, pixels, path)
    other = replace(TINY, learning_rate=0.5)
    with pytest.raises(ValueError, match=f"of {TINY.training_id}, not of {other.training_id}"):
        train.fit(other, pixels, checkpoint=path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"another program, not of {TINY.training_id}"):
        train.fit(TINY, pixels, checkpoint=path)
    assert path.exists()


def relabelled(path, **changes):
    """Change what a checkpoint says of itself."""
    meta, tensors = read_checkpoint(path)
    save_file(tensors, path, metadata=meta | changes)


@pytest.mark.parametrize("name", ["data", "device", "precision", "version of random draws"])
def test_a_checkpoint_of_other_images_device_precision_or_draws_is_left_with_a_line(
    pixels, path, monkeypatch, capsys, name
):
    stop(AUTO, pixels, path)
    if name == "data":
        pixels = pixels.flip(3)
    elif name == "precision":
        now = train.precision(AUTO, "cpu")
        monkeypatch.setenv("CPLIB_PRECISION", "bf16" if now == "fp32" else "fp32")
    elif name == "device":
        relabelled(path, device="abacus")
    else:
        relabelled(path, draws="1")
    net, table = train.fit(AUTO, pixels, checkpoint=path)
    assert f"{path}: of another {name}" in capsys.readouterr().out
    assert table["update"].tolist() == [1, 2, 3, 4]
    assert same(net, train.fit(AUTO, pixels)[0])


def processor(monkeypatch, bf16):
    """Replace this machine's processor by one that multiplies in bf16, or by one that does not."""
    monkeypatch.setattr(train, "cpu_capabilities", lambda: {"amx_bf16": bf16})


def test_a_resumed_training_keeps_the_precision_that_it_began_in(pixels, path, monkeypatch):
    processor(monkeypatch, bf16=False)
    whole, _ = train.fit(AUTO, pixels)
    stop(AUTO, pixels, path)
    processor(monkeypatch, bf16=True)
    assert stop(AUTO, pixels, path) == f"{AUTO.id}: 2 of 4 updates done"
    assert same(train.fit(AUTO, pixels, checkpoint=path)[0], whole)
    about = read_checkpoint(path)[0]
    assert (about["run"], about["precision"]) == (AUTO.training_id, "fp32")


def test_a_training_in_bf16_goes_on_where_it_is_emulated_only_if_asked(
    pixels, path, monkeypatch, capsys
):
    processor(monkeypatch, bf16=True)
    whole, _ = train.fit(AUTO, pixels)
    stop(AUTO, pixels, path)
    begun = path.read_bytes()
    processor(monkeypatch, bf16=False)
    with monkeypatch.context() as patch:
        patch.setenv("CPLIB_PRECISION", "bf16")
        assert same(train.fit(AUTO, pixels, checkpoint=path)[0], whole)
    assert capsys.readouterr().out == ""
    path.write_bytes(begun)
    assert stop(AUTO, pixels, path) == f"{AUTO.id}: 1 of 4 updates done"
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{path}: of another precision (bf16); training starts afresh" in line
    assert "CPLIB_PRECISION=bf16" in line


def test_a_finished_checkpoint_of_another_device_is_taken(pixels, path, monkeypatch):
    whole, _ = train.fit(TINY, pixels, checkpoint=path)
    relabelled(path, device="abacus", precision="fp16")
    monkeypatch.setattr(train, "step", lambda *args: pytest.fail("trained again"))
    assert same(train.fit(TINY, pixels, checkpoint=path)[0], whole)


def test_a_checkpoint_is_whole_or_not_there(pixels, path, monkeypatch):
    stop(TINY, pixels, path)
    before = path.read_bytes()

    def full(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("cplib.checkpoint.save_file", full)
    with pytest.raises(OSError, match=f"cannot write {path}: no space left"):
        train.fit(TINY, pixels, checkpoint=path, deadline=0)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before


# Precision


def test_precision_is_what_the_run_says_and_auto_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("CPLIB_PRECISION", "fp16")
    assert train.precision(replace(TINY, precision="bf16"), "cpu") == "bf16"
    assert train.precision(AUTO, "cpu") == "fp16"
    monkeypatch.setenv("CPLIB_PRECISION", "int8")
    with pytest.raises(ValueError, match="unknown CPLIB_PRECISION 'int8'"):
        train.precision(AUTO, "cpu")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx512_bf16": False}, ["fp32"]),
        ({"amx_bf16": True}, ["bf16", "fp32"]),
        ({}, ["fp32"]),
    ],
)
def test_auto_is_bf16_on_a_processor_that_multiplies_in_it(monkeypatch, found, expected):
    monkeypatch.setattr(train, "cpu_capabilities", lambda: found)
    assert train.precisions(AUTO, "cpu") == expected


@pytest.mark.parametrize(
    ("bf16", "capability", "expected"),
    [
        (True, (8, 0), ["bf16", "fp16", "fp32"]),
        (False, (7, 5), ["fp16", "fp32"]),
        (False, (6, 1), ["fp32"]),
    ],
)
def test_auto_on_a_gpu_follows_its_tensor_cores(monkeypatch, bf16, capability, expected):
    """An A100, a T4 and a P100."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.precisions(AUTO, "cuda") == expected
    assert train.precision(AUTO, "cuda") == expected[0]


def test_training_in_fp16_scales_the_loss_and_resumes_exactly(pixels, path, monkeypatch):
    """On a T4, and after a stop on an L4, whose choice would be bf16."""
    run, pixels = replace(AUTO, updates=2, sources=1), pixels[..., :16, :16]
    states, update = [], torch.amp.GradScaler.update

    def noted(self):
        update(self)
        states.append(self.state_dict())  # its scale, and how long that has held

    monkeypatch.setattr(torch.amp.GradScaler, "update", noted)
    with monkeypatch.context() as patch:
        patch.setenv("CPLIB_PRECISION", "fp16")
        whole, _ = train.fit(run, pixels)
        assert states[0]["scale"] > 1
        stop(run, pixels, path)
    monkeypatch.setattr(train, "computes_in", lambda name, device: True)
    again, _ = train.fit(run, pixels, checkpoint=path)
    assert states[2:] == states[:2]
    assert states[1] != states[0]
    assert same(again, whole)


def test_training_in_lower_precision_ends_near_fp32(pixels):
    run, losses = replace(TINY, updates=1, head_batchnorm=False), []
    for precision in ("fp32", "bf16", "fp16"):
        _, table = train.fit(replace(run, precision=precision), pixels[..., :16, :16])
        losses.append(table["loss"][0])
    assert len(set(losses)) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=0.1)
