"""Pretext training (section 2.1, A.1): one flat loop, visible and resumable."""

import contextlib
import hashlib
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F

from cplib import augment
from cplib.checkpoint import resume, save, usable
from cplib.model import PretextNet, build
from cplib.run import PRECISIONS, Run

HISTORY_ROWS = 100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CPUS = ("amx_bf16", "avx512_bf16", "bf16")  # the last is ARM's


class OutOfTime(Exception):
    """The deadline passed: the checkpoint holds all that was done."""


def precision(run: Run, device: str | torch.device) -> str:
    """What a new training of the run is in on this machine: "fp32", "bf16" or "fp16"."""
    return precisions(run, device)[0]


def precisions(run: Run, device: str | torch.device) -> list[str]:
    """What the run may be trained in on this machine, the best first.

    What the run says; for "auto" what $CPLIB_PRECISION says, else all that the hardware multiplies
    in. A training that resumes stays in its own if that is among them.
    """
    asked = run.precision
    if asked == "auto":
        asked = os.environ.get("CPLIB_PRECISION") or "auto"
    if asked not in PRECISIONS:
        raise ValueError(f"unknown CPLIB_PRECISION {asked!r}: one of {', '.join(PRECISIONS)}")
    if asked != "auto":
        return [asked]
    return [name for name in ("bf16", "fp16", "fp32") if computes_in(name, device)]


def computes_in(name: str, device: str | torch.device) -> bool:
    """Whether the hardware multiplies in a precision: every device does in fp32.

    In fp16 a GPU with tensor cores does, even one without bf16 (T4, V100).
    """
    if name == "fp32":
        return True
    if torch.device(device).type != "cuda":
        found = cpu_capabilities()
        return name == "bf16" and any(found.get(unit) for unit in BF16_CPUS)
    if name == "bf16":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cuda.get_device_capability(device) >= (7, 0)


def device_name(device: torch.device) -> str:
    """The device in words: a GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {cpu_capabilities().get('cpu_name') or platform.machine()}"


def cpu_capabilities() -> dict:
    """What torch says of the processor; nothing from a torch too old to say (2.11)."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def augmentation_kwargs(run: Run) -> dict[str, dict]:
    """The run's fields as the options of each augmentation; lengths scaled to its size."""
    scale = run.size / 256
    patch = {"area": run.area, "aspect": run.aspect, "jitter": run.patch_jitter}
    scar = {
        "width": tuple(scale * v for v in run.scar_width),
        "length": tuple(scale * v for v in run.scar_length),
        "angle": run.scar_angle,
        "jitter": run.patch_jitter,
    }
    plain = {k: v for k, v in patch.items() if k != "jitter"}
    line = {k: v for k, v in scar.items() if k != "jitter"}
    return {
        "cutpaste": patch,
        "cutpaste_scar": scar,
        "cutpaste_union": {"patch": patch, "thin": scar},
        "cutout": plain,
        "confetti": {
            "side": tuple(scale * v for v in run.confetti_side),
            "blur": scale * run.confetti_blur,
        },
        "scar": line,
    }


def learning_rate(run: Run, update: int) -> float:
    """One cosine cycle from ``run.learning_rate`` to nothing (A.1), after the head alone (A.4).

    Where the run has a warm-up, the rate first climbs in proportion to the updates done.
    """
    if update < run.head_updates:
        return run.head_learning_rate
    done = update - run.head_updates
    climb = min(1.0, (done + 1) / max(1.0, run.warmup * run.updates))
    return climb * run.learning_rate * (1 + math.cos(math.pi * done / run.updates)) / 2


def optimiser(run: Run, net: PretextNet) -> torch.optim.Optimizer:
    """The run's optimiser over what is not frozen: SGD with momentum (A.1), or AdamW."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    rates = {"lr": run.learning_rate, "weight_decay": run.weight_decay}
    if run.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **rates)
    return torch.optim.SGD(parameters, momentum=run.momentum, **rates)


def training(
    run: Run,
    pixels: torch.Tensor,
    device: str | torch.device = "cpu",
    *,
    checkpoint: str | Path | None = None,
    deadline: float | None = None,
    weights: str | Path | None = None,
) -> Iterator[tuple[PretextNet, list[dict]]]:
    """Train the run's network on normal images, uint8 (N, 3, H, W).

    Yields the network and its history, a dict a row (update, loss, accuracy, learning rate,
    seconds), at the ``run.curve`` updates and after the last one; what the caller adds to the last
    row is kept. With ``checkpoint``, a file, training resumes from it, in its precision, and writes
    it every $CPLIB_CHECKPOINT_SECONDS (default 30) and after the last update; past ``deadline``
    (seconds since the epoch) it is written and OutOfTime raised.
    """
    about = provenance(run, pixels, device)
    found = usable(checkpoint, about, run.total_updates, precisions(run, device))
    if found:
        about["precision"] = found[0]["precision"]
    settled = replace(run, precision=about["precision"])  # has another id than the run
    net = build(run, weights).to(device, memory_format=torch.channels_last)
    optimizer = optimiser(run, net)
    generator = torch.Generator(device).manual_seed(run.stream)
    scaler = grad_scaler(settled, device)
    parts = net, optimizer, generator, scaler
    total = run.total_updates
    began, history, sums = resume(found, total, *parts)
    del found  # twice the network, or more
    update = began
    pixels, points = pixels.to(device), _marks(run, run.curve)
    rows = _marks(run, HISTORY_ROWS) | points
    interval = float(os.environ.get("CPLIB_CHECKPOINT_SECONDS") or 30)
    started = saved = time.time() - (history[-1]["seconds"] if history else 0)
    while update < total:
        with _seeded(run, update, pixels.device):
            sums += step(settled, net, optimizer, pixels, generator, scaler, update)
        update += 1
        if update in rows:
            history.append(_row(update, history, sums, optimizer, time.time() - started))
        if update in points - {total}:
            paused = time.time()
            yield net, history
            started += time.time() - paused  # not training time
        late = deadline is not None and time.time() > deadline
        if checkpoint and update < total and (late or time.time() - saved > interval):
            save(checkpoint, about, total, update, history, sums, *parts)
            saved = time.time()
        if late and update < total:
            raise OutOfTime(f"{run.id}: {update} of {total} updates done")
    yield net.eval(), history
    if checkpoint and update > began:
        save(checkpoint, about, total, update, history, sums, *parts)


def fit(run: Run, pixels: torch.Tensor, *args, **options) -> tuple[PretextNet, pd.DataFrame]:
    """The network after the last update, and its history; arguments as of ``training``."""
    *_, (net, history) = training(run, pixels, *args, **options)
    return net, pd.DataFrame(history)


@contextlib.contextmanager
def _seeded(run: Run, update: int, device: torch.device):
    """EfficientNet-B4 drops layers at random, by torch's global state: set here, and put back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed = (run.stream << 32) + update
        torch.default_generator.manual_seed(seed)  # torch.manual_seed: every GPU's, too
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _marks(run: Run, n: int) -> set[int]:
    """At most n updates, evenly spaced, the last among them."""
    return {math.ceil(run.total_updates * i / n) for i in range(1, n + 1)}


def _row(update, history, sums, optimizer, seconds) -> dict:
    """The history's next row: means since the last one; ``sums`` starts again."""
    loss, accuracy = (sums / (update - (history[-1]["update"] if history else 0))).tolist()
    sums.zero_()
    rate = optimizer.param_groups[0]["lr"]
    row = {"update": update, "loss": loss, "accuracy": accuracy, "learning_rate": rate}
    return row | {"seconds": seconds}


def grad_scaler(run: Run, device: str | torch.device) -> torch.amp.GradScaler:
    """Scales the loss where training is in fp16, whose small gradients would be 0; else idle."""
    fp16 = precision(run, device) == "fp16"
    return torch.amp.GradScaler(torch.device(device).type, enabled=fp16)


def step(run, net, optimizer, pixels, generator, scaler, update: int = 0) -> torch.Tensor:
    """Update number ``update``, from 0; returns the loss and the accuracy on its batch, (2,).

    In the first ``run.head_updates`` the encoder stays as it is, its BatchNorm too (A.4).
    """
    device, head_only = pixels.device, update < run.head_updates
    optimizer.param_groups[0]["lr"] = learning_rate(run, update)
    net.train()
    if head_only:
        net.encoder.eval()
    with torch.no_grad():
        images, labels = draw(run, pixels, generator, crop_side(run, update))
    images = images.contiguous(memory_format=torch.channels_last)
    dtype = DTYPES[precision(run, device)]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        with torch.set_grad_enabled(not head_only):
            features = net.features(images)
        logits = net.head(features)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])


def crop_side(run: Run, update: int) -> int:
    """Side in pixels of the crops that an update looks at; 0 for whole images."""
    return run.crop if update < run.total_updates - round(run.whole * run.updates) else 0


def draw(
    run: Run, pixels: torch.Tensor, generator, crop: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the pretext task: images drawn, shifted, jittered, then cut and pasted.

    With ``crop``, a side in pixels, a crop of each image takes its place before anything is pasted:
    the anomaly lies in the crop (eq. 3).

    Sources are drawn without replacement, or with it where the category has too few.
    """
    n, device = len(pixels), pixels.device
    if n >= run.sources:
        index = torch.randperm(n, generator=generator, device=device)[: run.sources]
    else:
        index = torch.randint(n, (run.sources,), generator=generator, device=device)
    x = augment.translate(pixels[index], generator, share=run.translate)
    if crop:
        x = augment.crop(x, generator, side=crop)
    x = x.float() / 255
    x = augment.jitter(x, generator, strength=run.jitter)
    return augment.pretext_batch(x, run.method, generator, augmentation_kwargs(run))


def provenance(run: Run, pixels: torch.Tensor, device: str | torch.device) -> dict[str, str]:
    """What a checkpoint says of itself: the training, its images, device and precision."""
    return {
        "run": run.training_id,
        "data": hashlib.sha256(pixels.cpu().contiguous().numpy()).hexdigest()[:16],
        "device": torch.device(device).type,
        "device_name": device_name(torch.device(device)),
        "precision": precision(run, device),
    }
