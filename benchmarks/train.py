"""How fast the training step is, against a loop that augments picture by picture.

    python benchmarks/train.py --data DIR --category bottle [--size 256] [--seconds 60]

Prints one Markdown table; ``--json FILE`` writes the same numbers for a program.
"""

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from cplib import datasets, train
from cplib.model import build, embed
from cplib.run import Run

from timing import Row, Seconds, cores, options, peak_memory, report, seconds_of

SIZES = (64, 128, 256)
SHARES = (0.25, 0.5, 1.0)  # of the batch and of the data set, to see how time grows
OPERATORS = {  # of the profile: the first pattern that an operator's name matches
    "convolution, backward": "convolution_backward",
    "convolution, forward": "conv",
    "batch normalisation, both ways": "batch_norm",
    "ReLU, both ways": "relu|clamp_min|threshold",
}
PREPARED = 1_000_000  # batches a loader would deliver if it were not stopped


class PerPicture(Dataset):
    """One source picture at a time, with PIL and torchvision, as existing ports do it.

    The pictures wait decoded and resized in memory, which a port that reads files does not have.
    """

    def __init__(self, run: Run, pixels: Tensor):
        self.run = run
        self.pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
        reach = round(run.translate * run.size)
        self.shift = transforms.RandomCrop(run.size, padding=reach, padding_mode="reflect")
        self.jitter = transforms.ColorJitter(*run.jitter)
        self.patch_jitter = transforms.ColorJitter(*[run.patch_jitter] * 4)
        self.tensor = transforms.ToTensor()

    def __len__(self) -> int:
        """The number of source pictures."""
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        """The picture, its CutPaste and its scar, (3, 3, H, W)."""
        x = self.jitter(self.shift(self.pictures[index]))
        return torch.stack([self.tensor(v) for v in (x, self.cutpaste(x), self.scar(x))])

    def cutpaste(self, x: Image.Image) -> Image.Image:
        """A rectangle, cut and pasted."""
        size = x.width * x.height * _between(*self.run.area)
        low, high = self.run.aspect
        ratio = _between(low, 1) if _between(0, 1) < 0.5 else _between(1, high)
        width = max(1, min(x.width, round(math.sqrt(size / ratio))))
        height = max(1, min(x.height, round(math.sqrt(size * ratio))))
        patch = self.patch_jitter(_cut(x, width, height))
        return _pasted(x, patch, None)

    def scar(self, x: Image.Image) -> Image.Image:
        """A thin rectangle, cut, turned and pasted through a mask."""
        options = train.augmentation_kwargs(self.run)["cutpaste_scar"]
        width, length = (round(_between(*options[name])) for name in ("width", "length"))
        patch = self.patch_jitter(_cut(x, max(1, width), max(1, length))).convert("RGBA")
        patch = patch.rotate(_between(-options["angle"], options["angle"]), expand=True)
        return _pasted(x, patch, patch.split()[-1])


def _between(low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high))


def _cut(x: Image.Image, width: int, height: int) -> Image.Image:
    left = round(_between(0, x.width - width))
    top = round(_between(0, x.height - height))
    return x.crop((left, top, left + width, top + height))


def _pasted(x: Image.Image, patch: Image.Image, mask: Image.Image | None) -> Image.Image:
    left = round(_between(0, max(0, x.width - patch.width)))
    top = round(_between(0, max(0, x.height - patch.height)))
    x = x.copy()
    x.paste(patch, (left, top), mask)
    return x


def product(run: Run, pixels: Tensor, device: str, compiled: bool = False) -> Iterator[None]:
    """The project's own step, again and again."""
    net = build(run).to(device, memory_format=torch.channels_last)
    if compiled:
        net.encoder.compile()
    pixels, rest = pixels.to(device), torch.Generator(device).manual_seed(run.seed)
    optimizer, scaler = train.optimiser(run, net), train.grad_scaler(run, device)
    while True:
        train.step(run, net, optimizer, pixels, rest, scaler)
        yield


def reference(run: Run, pixels: Tensor, device: str, workers: int) -> Iterator[None]:
    """The plain loop: a DataLoader over PerPicture, fp32, channels first."""
    net = build(run).to(device)
    sgd = train.optimiser(run, net)
    pictures = PerPicture(run, pixels)
    drawn = RandomSampler(pictures, replacement=True, num_samples=PREPARED * run.sources)
    loader = DataLoader(pictures, run.sources, sampler=drawn, num_workers=workers)
    for batch in loader:
        images = batch.transpose(0, 1).flatten(0, 1).to(device)
        labels = torch.arange(3, device=device).repeat_interleave(run.sources)
        loss = F.cross_entropy(net(images), labels)
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        yield


def step_seconds(loop: Iterator[None], device: str, budget: float) -> Seconds:
    """Seconds a step of a loop, which is closed, its workers with it."""
    try:
        return seconds_of(partial(next, loop), device, budget)
    finally:
        loop.close()


def throughput(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """Images a second of both loops, A B A B ...: medians, and the median of the pairs' ratios."""
    budget = args.seconds / 2 / args.repeats
    ours, theirs = [], []
    for _ in range(args.repeats):
        loop = product(run, pixels, args.device)
        ours.append(step_seconds(loop, args.device, budget))
        loop = reference(run, pixels, args.device, args.workers)
        theirs.append(step_seconds(loop, args.device, budget))
    images = 3 * run.sources
    ratios = [b.clock / a.clock for a, b in zip(ours, theirs, strict=True)]
    busy = [b.cores / a.cores for a, b in zip(ours, theirs, strict=True)]
    return [
        ("training step", images / statistics.median(s.clock for s in ours), "images/s"),
        ("reference loop", images / statistics.median(s.clock for s in theirs), "images/s"),
        ("training step against reference loop", statistics.median(ratios), "times"),
        ("... smallest of the pairs", min(ratios), "times"),
        ("... largest of the pairs", max(ratios), "times"),
        ("... in core time, workers not counted", statistics.median(busy), "times"),
    ]


def augmentation(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """The share of a step that drawing its batch takes; on a CPU of its core time."""
    pixels, rest = pixels.to(args.device), torch.Generator(args.device).manual_seed(0)
    draw, budget = partial(train.draw, run, pixels, rest), args.seconds / 20
    pairs = []
    for _ in range(args.repeats):
        step = step_seconds(product(run, pixels, args.device), args.device, budget)
        pairs.append((seconds_of(torch.no_grad()(draw), args.device, budget), step))
    share = statistics.median(d.spent(args.device) / s.spent(args.device) for d, s in pairs)
    seconds = statistics.median(d.clock for d, _ in pairs)
    return [("augmentation", 1e3 * seconds, "ms/step"), ("... of a step", 100 * share, "%")]


def arithmetic(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """FLOP/s of the network, forward and backward, against a large bf16 matrix product."""
    device, side = args.device, 8192 if args.device == "cuda" else 2048
    net = build(run).to(device)
    images = torch.rand(3 * run.sources, 3, run.size, run.size, device=device)
    with FlopCounterMode(display=False) as counter:
        net(images).sum().backward()
    seconds = step_seconds(product(run, pixels, device), device, args.seconds / 20).clock
    a = torch.rand(side, side, device=device, dtype=torch.bfloat16)
    peak = 2 * side**3 / seconds_of(lambda: a @ a, device, args.seconds / 60).clock
    rate = counter.get_total_flops() / seconds
    return [
        ("network, forward and backward", rate / 1e12, "TFLOP/s"),
        (f"bf16 matrix product, {side}x{side}", peak / 1e12, "TFLOP/s"),
        ("network against matrix product", 100 * rate / peak, "%"),
    ]


def profile(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """What a step spends its time on: shares of the operators' own time."""
    loop = product(run, pixels, args.device)
    next(loop)
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            next(loop)
    own = f"self_{'device' if args.device == 'cuda' else 'cpu'}_time_total"
    spent = dict.fromkeys([*OPERATORS, "all else"], 0.0)
    for event in profiler.key_averages():
        names = (what for what, part in OPERATORS.items() if re.search(part, event.key))
        spent[next(names, "all else")] += getattr(event, own)
    total = sum(spent.values())
    return [(f"of a step: {what}", 100 * time / total, "%") for what, time in spent.items()]


def growth(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """How time grows with the resolution, the batch, and the number of pictures."""
    rows, budget = [], args.seconds / 40
    time_of = partial(step_seconds, device=args.device, budget=budget)
    for size in SIZES:
        if size <= max(run.size, SIZES[0]):
            resized = F.interpolate(pixels.float(), (size, size), mode="area").to(torch.uint8)
            loop = product(replace(run, size=size), resized, args.device)
            rows.append((f"step at {size} px", time_of(loop).clock, "s"))
    for sources in sorted({max(2, round(share * run.sources)) for share in SHARES}):
        loop = product(replace(run, sources=sources), pixels, args.device)
        rows.append((f"step of {3 * sources} images", time_of(loop).clock, "s"))
    net = build(run).to(args.device)
    for n in sorted({max(2, round(share * len(pixels))) for share in SHARES}):
        loop = product(run, pixels[:n], args.device)
        rows.append((f"step with {n} pictures to draw from", time_of(loop).clock, "s"))
        spent = seconds_of(partial(embed, net, pixels[:n]), args.device, 0)
        rows.append((f"features of {n} pictures", spent.clock, "s"))
    return rows


def compilation(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """What torch.compile of the encoder gains a step, and the time it takes first."""
    device, began = args.device, time.perf_counter()
    loop = product(run, pixels, device, compiled=True)
    next(loop)
    first = time.perf_counter() - began
    compiled = step_seconds(loop, device, args.seconds / 10).spent(device)
    plain = step_seconds(product(run, pixels, device), device, args.seconds / 10).spent(device)
    return [
        ("step with torch.compile against without", plain / compiled, "times"),
        ("torch.compile's first step", first, "s"),
    ]


def memory(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """The most memory that the training step takes."""
    step_seconds(product(run, pixels, args.device), args.device, 0)
    return [peak_memory(args.device)]


def measure(args: argparse.Namespace) -> list[Row]:
    """Every row of the table; memory first, before the reference loop has taken any."""
    run = Run(
        method="cutpaste_3way",
        category=args.category,
        size=args.size,
        sources=args.sources,
        precision=args.precision,
    )
    pixels = datasets.load(args.data, args.category, "train", args.size).pixels
    parts = [memory, throughput, augmentation, profile, arithmetic, growth]
    parts += [compilation] if args.compile else []
    return [row for part in parts for row in part(run, pixels, args)]


def parse() -> argparse.Namespace:
    """The options."""
    parser = options(__doc__)
    parser.add_argument("--sources", type=int, default=32, help="source pictures a batch")
    parser.add_argument("--workers", type=int, default=cores(), help="of the reference loop")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report(measure, parse()))
