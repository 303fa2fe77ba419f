"""Pretext training (section 2.1, A.1): one flat loop, visible and resumable."""

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from cplib import augment
from cplib.config import BASELINES, Run
from cplib.model import PretextNet

CHECKPOINT_SECONDS = 30
HISTORY_ROWS = 100


class OutOfTime(Exception):
    """The deadline passed: the checkpoint holds all that was done."""


def build(run: Run, weights: str | Path | None = None) -> PretextNet:
    """The run's network as it starts, the same for the same seed, global random state untouched."""
    classes = 2 if run.method in BASELINES else len(augment.METHODS[run.method])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return PretextNet(
            classes,
            backbone=run.backbone,
            init=run.init,
            head=run.head,
            freeze_batchnorm=run.freeze_batchnorm,
            weights=weights,
        )


def uses_bf16(run: Run, device: str | torch.device) -> bool:
    """Whether to train in bf16: as the run says, or where the hardware multiplies in it."""
    if run.precision != "auto":
        return run.precision == "bf16"
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_capabilities().get("amx_bf16", False))


def cpu_capabilities() -> dict:
    """What torch says of the processor; nothing from a torch too old to say (2.11)."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def options(run: Run) -> dict[str, dict]:
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
        "confetti": plain | {"strength": run.confetti_strength},
        "scar": line,
    }


def learning_rate(run: Run, update: int) -> float:
    """One cosine cycle from ``run.learning_rate`` to nothing (A.1), after the head alone (A.4)."""
    if update < run.head_updates:
        return run.head_learning_rate
    share = (update - run.head_updates) / run.updates
    return run.learning_rate * (1 + math.cos(math.pi * share)) / 2


def sgd(run: Run, net: PretextNet) -> torch.optim.SGD:
    """The run's optimiser over what is not frozen (A.1)."""
    return torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad],
        lr=run.learning_rate,
        momentum=run.momentum,
        weight_decay=run.weight_decay,
    )


def fit(
    run: Run,
    pixels: torch.Tensor,
    device: str | torch.device = "cpu",
    *,
    checkpoint: str | Path | None = None,
    deadline: float | None = None,
    weights: str | Path | None = None,
    watch: Callable[[PretextNet], dict] | None = None,
) -> tuple[PretextNet, pd.DataFrame]:
    """Train the run's network on normal pictures, uint8 (N, 3, H, W).

    Returns the network after the last update and its history: update, loss, accuracy, learning
    rate and seconds, with what ``watch`` returns at the ``run.curve`` points. With ``checkpoint``,
    a file, training goes on from it and writes it every half minute; past ``deadline`` (seconds
    since the epoch) it is written and OutOfTime raised.
    """
    net = build(run, weights).to(device, memory_format=torch.channels_last)
    optimizer = sgd(run, net)
    generator = torch.Generator(device).manual_seed(run.seed)
    update, history, sums = resume(checkpoint, run, net, optimizer, generator)
    pixels, points = pixels.to(device), _marks(run, run.curve)
    rows = _marks(run, HISTORY_ROWS) | points
    started = saved = time.time() - (history[-1]["seconds"] if history else 0)
    total = run.head_updates + run.updates
    while update < total:
        optimizer.param_groups[0]["lr"] = learning_rate(run, update)
        head_only = update < run.head_updates
        with _seeded(run, update, pixels.device):
            sums += step(run, net, optimizer, pixels, generator, head_only=head_only)
        update += 1
        if update in rows:
            row = _row(update, history, sums, optimizer, time.time() - started)
            noted = time.time()
            history.append(row | (watch(net) if watch and update in points else {}))
            started += time.time() - noted  # what is noted on the way is not training time
        late = deadline is not None and time.time() > deadline
        if checkpoint and (late or time.time() - saved > CHECKPOINT_SECONDS):
            save(checkpoint, run, net, optimizer, generator, update, history, sums)
            saved = time.time()
        if late and update < total:
            raise OutOfTime(f"{run.id}: {update} of {total} updates done")
    return net.eval(), pd.DataFrame(history)


@contextlib.contextmanager
def _seeded(run: Run, update: int, device: torch.device):
    """EfficientNet-B4 drops layers at random, by torch's global state: set here, and put back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((run.seed << 32) + update)
        yield


def _marks(run: Run, n: int) -> set[int]:
    """At most n updates, evenly spaced, the last among them."""
    return {math.ceil((run.head_updates + run.updates) * i / n) for i in range(1, n + 1)}


def _row(update, history, sums, optimizer, seconds) -> dict:
    """The history's next row: means since the last one; ``sums`` starts again."""
    loss, accuracy = (sums / (update - (history[-1]["update"] if history else 0))).tolist()
    sums.zero_()
    rate = optimizer.param_groups[0]["lr"]
    row = {"update": update, "loss": loss, "accuracy": accuracy, "learning_rate": rate}
    return row | {"seconds": seconds}


def step(run, net, optimizer, pixels, generator, *, head_only: bool = False) -> torch.Tensor:
    """One update; returns the loss and the accuracy on its batch, (2,).

    With ``head_only`` the encoder stays as it is, its BatchNorm too (the first phase of A.4).
    """
    device = pixels.device
    net.train()
    if head_only:
        net.encoder.eval()
    with torch.no_grad():
        images, labels = draw(run, pixels, generator)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(run, device)):
        with torch.set_grad_enabled(not head_only):
            features = net.features(images)
        logits = net.head(features)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])


def images(run: Run) -> int:
    """Images that the run's training looks at: updates x sources x classes."""
    updates = run.head_updates + run.updates
    return updates * run.sources * len(augment.METHODS.get(run.method, ()))


def draw(run: Run, pixels: torch.Tensor, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the pretext task: pictures drawn, shifted, jittered, then cut and pasted.

    Sources are drawn without replacement, or with it where the category has too few.
    """
    n, device = len(pixels), pixels.device
    if n >= run.sources:
        index = torch.randperm(n, generator=generator, device=device)[: run.sources]
    else:
        index = torch.randint(n, (run.sources,), generator=generator, device=device)
    x = augment.translate(pixels[index], generator, share=run.translate)
    if run.patch:  # cropped before anything is pasted: the defect lies in the crop (eq. 3)
        x = augment.crop(x, generator, side=run.patch)
    x = x.float() / 255
    x = augment.jitter(x, generator, strength=run.jitter)
    return augment.pretext_batch(x, run.method, generator, options(run))


def save(path, run, net, optimizer, generator, update, history, sums) -> None:
    """Write all that training needs to go on as if nothing had happened; whole or not at all."""
    tensors = {f"net.{k}": v.contiguous() for k, v in net.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors[f"momentum.{i}"] = state["momentum_buffer"].contiguous()
    tensors |= {"generator": generator.get_state(), "sums": sums}
    meta = {"run": run.id, "update": str(update), "history": json.dumps(history)}
    meta["device"] = generator.device.type
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{path.stem}.", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            save_file(tensors, partial, metadata=meta)
            partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error


def resume(path, run, net, optimizer, generator) -> tuple[int, list, torch.Tensor]:
    """Go on from a checkpoint: updates done, history and running sums; a fresh start without one.

    A checkpoint that cannot be read is set aside with a warning line, and training starts afresh.
    """
    device = next(net.parameters()).device
    fresh = 0, [], torch.zeros(2, device=device)
    if path is None or not Path(path).exists():
        return fresh
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {"run": "another program"}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(FileNotFoundError):  # another process finished the run
            Path(path).replace(Path(path).with_suffix(".broken"))
        print(f"{path}: not a checkpoint ({error}); training starts afresh")
        return fresh
    if meta["run"] != run.id:
        raise ValueError(f"{path}: is a checkpoint of {meta['run']}, not of {run.id}")
    if (
        meta.get("device", device.type) != device.type
    ):  # its random numbers cannot be continued here
        print(f"{path}: begun on {meta['device']}; training starts afresh on {device.type}")
        return fresh
    net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    momentum = {int(k[9:]): v for k, v in tensors.items() if k.startswith("momentum.")}
    state = optimizer.state_dict()
    state["state"] = {i: {"momentum_buffer": v} for i, v in momentum.items()}
    optimizer.load_state_dict(state)
    generator.set_state(tensors["generator"].cpu())
    return int(meta["update"]), json.loads(meta["history"]), tensors["sums"].to(device)
