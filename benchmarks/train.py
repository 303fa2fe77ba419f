"""How fast the training step is, against a loop that augments one image after the other.

    python benchmarks/train.py --data DIR --category bottle [--size 256] [--seconds 60]

Prints one Markdown table.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
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
from cplib.model import build
from cplib.run import Run

from timing import Row, launches, options, peak_memory, ratios, report, seconds

PREPARED = 1_000_000  # batches of a loader: more than a turn takes


class PerImage(Dataset):
    """One source image at a time, with PIL and torchvision, like existing ports of the paper.

    The images are decoded and resized in memory. A port that reads files is slower.
    """

    def __init__(self, run: Run, pixels: Tensor):
        self.run = run
        self.images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
        reach = round(run.translate * run.size)
        self.shift = transforms.RandomCrop(run.size, padding=reach, padding_mode="reflect")
        self.jitter = transforms.ColorJitter(*run.jitter)
        self.patch_jitter = transforms.ColorJitter(*[run.patch_jitter] * 4)
        self.tensor = transforms.ToTensor()

    def __len__(self) -> int:
        """The number of source images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """An image, its CutPaste and its scar, (3, 3, H, W)."""
        x = self.jitter(self.shift(self.images[index]))
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


def product(run: Run, pixels: Tensor, device: str) -> Iterator[None]:
    """The project's training step, again and again."""
    net = build(run).to(device, memory_format=torch.channels_last)
    pixels, rest = pixels.to(device), torch.Generator(device).manual_seed(run.seed)
    optimizer, scaler = train.optimiser(run, net), train.grad_scaler(run, device)
    while True:
        train.step(run, net, optimizer, pixels, rest, scaler)
        yield


def reference(run: Run, pixels: Tensor, device: str, workers: int) -> Iterator[None]:
    """The plain loop: a DataLoader over PerImage, fp32, channels first."""
    net = build(run).to(device)
    sgd = train.optimiser(run, net)
    images = PerImage(run, pixels)
    drawn = RandomSampler(images, replacement=True, num_samples=PREPARED * run.sources)
    loader = DataLoader(images, run.sources, sampler=drawn, num_workers=workers)
    for batch in loader:
        x = batch.transpose(0, 1).flatten(0, 1).to(device)
        labels = torch.arange(3, device=device).repeat_interleave(run.sources)
        loss = F.cross_entropy(net(x), labels)
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        yield


def step_seconds(loop: Iterator[None], budget: float, device: str) -> float:
    """Seconds of a step of a loop. The loop is closed afterwards, and its workers end.

    The timer may wait for a GPU after each call, and the GPU then for the first kernels of the
    next: on a GPU, a call is 20 steps.
    """
    steps = 20 if device == "cuda" else 1
    with closing(loop):
        return seconds(lambda: [next(loop) for _ in range(steps)], budget) / steps


def drawing(run: Run, pixels: Tensor, device: str) -> Callable[[], object]:
    """The function that draws and augments a batch."""
    rest = torch.Generator(device).manual_seed(0)
    return torch.no_grad()(partial(train.batch, run, pixels.to(device), rest))


def throughput(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """Images a second of both loops, the peak memory of ours, the time to draw a batch."""
    device, each = args.device, args.seconds / 2 / args.repeats
    ours, theirs, draws, draw = [], [], [], drawing(run, pixels, device)
    for turn in range(args.repeats):
        ours.append(step_seconds(product(run, pixels, device), each, device))
        if turn == 0:
            memory = peak_memory(device)
        draws.append(seconds(draw, each / 10))
        theirs.append(step_seconds(reference(run, pixels, device, args.threads), each, device))
    share = statistics.median(a / b for a, b in zip(draws, ours, strict=True))
    images = 3 * run.sources
    return [
        memory,
        ("training step", images / statistics.median(ours), "images/s"),
        ("plain way", images / statistics.median(theirs), "images/s"),
        *ratios(ours, theirs),
        ("augmentation", 1e3 * statistics.median(draws), "ms/step"),
        ("... of a step", 100 * share, "%"),
    ]


def counts(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """Kernels that a step launches, and FLOP/s of its network and of a large matrix product."""
    device, side = args.device, 8192 if args.device == "cuda" else 2048
    steps = product(run, pixels, device)
    next(steps)  # the first one makes the optimiser's state, too
    net = build(run).to(device)
    images = torch.rand(3 * run.sources, 3, run.size, run.size, device=device)
    with FlopCounterMode(display=False) as counter:
        net(images).sum().backward()
    counted = launches(partial(next, steps)), launches(drawing(run, pixels, device))
    each = args.seconds / 20
    rate = counter.get_total_flops() / step_seconds(steps, each, device)
    dtype = train.precision(run, device)
    a = torch.rand(side, side, device=device, dtype=train.DTYPES[dtype])
    peak = 2 * side**3 / seconds(lambda: a @ a, each)
    return [
        ("kernel launches of a step", counted[0], ""),
        ("... of its augmentation", counted[1], ""),
        ("network, forward and backward", rate / 1e12, "TFLOP/s"),
        (f"matrix product in {dtype}, {side}x{side}", peak / 1e12, "TFLOP/s"),
    ]


def speeds(run: Run, pixels: Tensor, args: argparse.Namespace) -> list[Row]:
    """Images a second of a step, in each precision of the device, on whole images and on crops."""
    rows, images = [], 3 * run.sources
    for dtype in filter(partial(train.computes_in, device=args.device), train.DTYPES):
        for name, crop in {"whole images": 0, "64-px crops": 64}.items():
            loop = product(replace(run, precision=dtype, crop=crop), pixels, args.device)
            rate = images / step_seconds(loop, args.seconds / 10, args.device)
            rows.append((f"{name} in {dtype}", rate, "images/s"))
    return rows


def measure(args: argparse.Namespace) -> list[Row]:
    """Every row of the table."""
    fields = {"category": args.category, "size": args.size, "sources": args.sources}
    run = Run(method="cutpaste_3way", **fields)
    pixels = datasets.load(args.data, args.category, "train", args.size).pixels
    return [row for part in (throughput, counts, speeds) for row in part(run, pixels, args)]


def parse() -> argparse.Namespace:
    """The options."""
    parser = options(__doc__)
    parser.add_argument("--sources", type=int, default=32, help="source images of a batch")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report(measure, parse()))
