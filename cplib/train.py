"""Pretext training (section 2.1, A.1): one flat loop, visible and resumable."""

import contextlib
import math
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
from cplib.datasets import pixels_digest
from cplib.model import PretextNet, build, full_precision
from cplib.run import PRECISIONS, Run
from cplib.settings import setting

HISTORY_ROWS = 100  # at most
FUSED = ("cuda",)  # devices on which an optimiser is one launch, and never waits
STOCHASTIC = ("efficientnet_b4",)  # backbones that draw, too: they drop layers
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CPUS = ("amx_bf16", "avx512_bf16", "bf16")  # units of processors; the last is ARM's


class OutOfTime(Exception):
    """The deadline passed. The checkpoint holds all updates that were done."""


def precision(run: Run, device: str | torch.device) -> str:
    """The precision of a new training of the run on this machine: "fp32", "bf16" or "fp16"."""
    return precisions(run, device)[0]


def precisions(run: Run, device: str | torch.device) -> list[str]:
    """The precisions in which the run may be trained on this machine, the best one first.

    ``run.precision`` decides. If it is "auto", $CPLIB_PRECISION decides. If that is "auto" too, all
    precisions are allowed in which the hardware multiplies. A training that resumes keeps its
    precision if it is allowed. Raises ValueError for an unknown $CPLIB_PRECISION.
    """
    asked = setting("CPLIB_PRECISION") if run.precision == "auto" else run.precision
    if asked not in PRECISIONS:
        raise ValueError(f"unknown CPLIB_PRECISION {asked!r}: one of {', '.join(PRECISIONS)}")
    if asked != "auto":
        return [asked]
    return [name for name in ("bf16", "fp16", "fp32") if computes_in(name, device)]


def computes_in(name: str, device: str | torch.device) -> bool:
    """Whether the hardware multiplies in a precision. Every device does so in fp32.

    Every GPU with tensor cores does so in fp16, even if it has no bf16 (T4).
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
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {cpu_capabilities().get('cpu_name') or platform.machine()}"


def cpu_capabilities() -> dict:
    """What torch knows about the processor; empty for a torch that is too old (2.11)."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def augmentation_kwargs(run: Run) -> dict[str, dict]:
    """The run's fields as options of each augmentation. Lengths are scaled to the run's size."""

    def scaled(lengths: tuple[float, float]) -> tuple[float, float]:
        return tuple(run.size / 256 * length for length in lengths)

    patch = {"area": run.area, "aspect": run.aspect}
    thin = {"width": scaled(run.scar_width), "length": scaled(run.scar_length)}
    thin["angle"] = run.scar_angle
    jitter = {"jitter": run.patch_jitter}
    return {
        "cutpaste": patch | jitter,
        "cutpaste_scar": thin | jitter,
        "cutpaste_union": {"patch": patch | jitter, "thin": thin | jitter},
        "cutout": patch,
        "scar": thin,
        "confetti": {"side": scaled(run.confetti_side), "blur": run.size / 256 * run.confetti_blur},
    }


def learning_rate(run: Run, update: int) -> float:
    """The learning rate of an update: half a cosine from ``run.learning_rate`` to 0 (A.1).

    It is constant while the head is trained alone (A.4). In a warm-up it climbs linearly.
    """
    if update < run.head_updates:
        return run.head_learning_rate
    done = update - run.head_updates
    climb = min(1.0, (done + 1) / max(1.0, run.warmup * run.updates))
    return climb * run.learning_rate * (1 + math.cos(math.pi * done / run.updates)) / 2


def optimiser(run: Run, net: PretextNet) -> torch.optim.Optimizer:
    """The run's optimiser of all parameters that are not frozen: SGD (A.1) or AdamW."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    rates = {"lr": run.learning_rate, "weight_decay": run.weight_decay}
    fused = parameters[0].device.type in FUSED
    rates["fused"] = fused or None
    if run.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **rates)
    optimizer = torch.optim.SGD(parameters, momentum=run.momentum, **rates)
    for p in parameters if fused else ():  # else torch leaves it unset if fp16 overflows at once
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


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

    Yields the network and its history at ``run.curve`` points of training, the last update among
    them, or at the last update alone. Each row of the history is a dict (update, loss, accuracy,
    learning_rate, seconds); the caller may add entries to the last row.
    ``checkpoint`` is a file. Training resumes from it, in its precision, and writes it every
    $CPLIB_CHECKPOINT_SECONDS and after the last update. After ``deadline`` (seconds since the
    epoch), training writes it and raises OutOfTime. ``weights`` is a folder of ImageNet weights.
    """
    about = provenance(run, pixels, device)
    found = usable(checkpoint, about, run.total_updates, precisions(run, device))
    if found:
        about["precision"] = found[0]["precision"]
    settled = replace(run, precision=about["precision"])  # its id is not the run's
    net = build(run, weights).to(device, memory_format=torch.channels_last)
    optimizer = optimiser(run, net)
    generator = torch.Generator(device).manual_seed(run.stream)
    scaler = grad_scaler(settled, device)
    parts = net, optimizer, generator, scaler
    total = run.total_updates
    began, history, sums = resume(found, total, *parts)
    del found  # at least twice as large as the network
    update = began
    pixels, points = pixels.to(device), _marks(run, run.curve)
    rows = _marks(run, HISTORY_ROWS) | points
    interval = float(setting("CPLIB_CHECKPOINT_SECONDS"))
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
            started += time.time() - paused  # the caller's time is not training time
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
    """The network after the last update, and its history. Arguments are those of ``training``."""
    *_, (net, history) = training(run, pixels, *args, **options)
    return net, pd.DataFrame(history)


@contextlib.contextmanager
def _seeded(run: Run, update: int, device: torch.device):
    """Seed torch's global state for one update, and restore it, if the network draws, too."""
    if run.backbone not in STOCHASTIC:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed = (run.stream << 32) + update
        torch.default_generator.manual_seed(seed)  # torch.manual_seed: every GPU's, too
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _marks(run: Run, n: int) -> set[int]:
    """At most n updates, evenly spaced. The last update is one of them."""
    return {math.ceil(run.total_updates * i / n) for i in range(1, n + 1)}


def _row(update, history, sums, optimizer, seconds) -> dict:
    """The next row of the history: means since the row before. Sets ``sums`` (2,) to zero."""
    loss, accuracy = (sums / (update - (history[-1]["update"] if history else 0))).tolist()
    sums.zero_()
    rate = optimizer.param_groups[0]["lr"]
    row = {"update": update, "loss": loss, "accuracy": accuracy, "learning_rate": rate}
    return row | {"seconds": seconds}


def grad_scaler(run: Run, device: str | torch.device) -> torch.amp.GradScaler:
    """In fp16 it scales the loss, or small gradients would become 0. Else it does nothing."""
    fp16 = precision(run, device) == "fp16"
    return torch.amp.GradScaler(torch.device(device).type, enabled=fp16)


def step(run, net, optimizer, pixels, generator, scaler, update: int = 0) -> torch.Tensor:
    """Do one update, and return the loss and the accuracy on its batch, (2,).

    ``update`` is its number, from 0. The first ``run.head_updates`` do not change the encoder, nor
    the statistics of its BatchNorm (A.4).
    """
    device, head_only = pixels.device, update < run.head_updates
    optimizer.param_groups[0]["lr"] = learning_rate(run, update)
    net.train()
    if head_only:
        net.encoder.eval()
    with torch.no_grad():
        images, labels = batch(run, pixels, generator, run.sides[update % len(run.sides)])
    images = images.contiguous(memory_format=torch.channels_last)
    dtype = DTYPES[precision(run, device)]
    with full_precision(benchmark=True):  # fp32 is not TF32
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


def batch(
    run: Run, pixels: torch.Tensor, generator: torch.Generator, crop: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the pretext task: images (K * B, 3, H, W) in [0, 1], and their classes (K * B,).

    B normal images are drawn from ``pixels``, uint8 (N, 3, H, W); with replacement only if N is too
    small. They are shifted and jittered, then each of K augmentations is applied. A crop of each
    image is used instead of the image (eq. 3): ``crop`` is its side in pixels, 0 is the whole
    image, None the first of the run's ``sides``. The generator is called once.
    """
    n, b, device = len(pixels), run.sources, pixels.device
    parts = [augment.shift_and_crop.draws, augment.jitter.draws, augment.draws_of(run.method)]
    u = torch.rand(max(n, b) + b * sum(parts), generator=generator, device=device)
    chosen, u = u.split([max(n, b), b * sum(parts)])
    index = chosen.argsort()[:b] if n >= b else (chosen[:b] * n).long()
    place, colours, damage = u.view(b, -1).split(parts, 1)
    side = run.sides[0] if crop is None else crop
    x = augment.shift_and_crop(pixels[index], place, share=run.translate, side=side)
    x = augment.jitter(x.float() / 255, colours, strength=run.jitter)
    return augment.pretext_batch(x, damage, run.method, augmentation_kwargs(run))


def provenance(run: Run, pixels: torch.Tensor, device: str | torch.device) -> dict[str, str]:
    """What a checkpoint says of its training: run, images, device, precision, version of draws."""
    return {
        "run": run.training_id,
        "data": pixels_digest(pixels)[:16],
        "device": torch.device(device).type,
        "device_name": device_name(torch.device(device)),
        "precision": precision(run, device),
        "draws": str(augment.DRAWS_VERSION),
    }
