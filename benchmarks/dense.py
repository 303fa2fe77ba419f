"""How fast a category is scored window by window, against the plain way.

    python benchmarks/dense.py --data DIR --category bottle [--size 256] [--stride 4]

The plain way copies the windows of each image with ``unfold``, takes their features, and fits one
Gaussian after the other, place by place. Prints one Markdown table.
"""

import argparse
import statistics
import sys
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cplib import datasets
from cplib.model import PretextNet, build
from cplib.run import Run
from cplib.score import Scorer

from timing import Row, options, peak_memory, ratios, report, seconds


@torch.inference_mode()
def plain(run: Run, net: PretextNet, normal: Tensor, pixels: Tensor) -> Tensor:
    """Scores (N, P) like those of ``Scorer.position_scores``, place by place."""
    z, z_test = (_plain_features(run, net, part) for part in (normal, pixels))
    if not run.per_position:
        flat = z.flatten(0, 1).double()
        mean, precision = _inverse(flat, run.reg_covar)
        return _distance(z_test.flatten(0, 1).double() - mean, precision).view(len(pixels), -1)
    scores = []
    for place in range(z.shape[1]):
        mean, precision = _inverse(z[:, place].double(), run.reg_covar)
        scores.append(_distance(z_test[:, place].double() - mean, precision))
    return torch.stack(scores, 1)


def _plain_features(run: Run, net: PretextNet, pixels: Tensor) -> Tensor:
    parts = []
    for image in pixels:
        x = image[None].to(net.pixel_mean.device).float() / 255
        copies = F.unfold(x, run.window, stride=run.stride)[0].T
        copies = copies.reshape(-1, 3, run.window, run.window)
        parts.append(torch.cat([net.features(part) for part in copies.split(512)]))
    return torch.stack(parts)


def _inverse(z: Tensor, reg_covar: float) -> tuple[Tensor, Tensor]:
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return z.mean(0), torch.linalg.inv(torch.cov(z.T, correction=0) + reg_covar * eye)


def _distance(centred: Tensor, precision: Tensor) -> Tensor:
    return ((centred @ precision) * centred).sum(1) / 2


def ours(run: Run, net: PretextNet, normal: Tensor, pixels: Tensor) -> Tensor:
    """The project's own way."""
    return Scorer.fit(run, net, normal).position_scores(pixels)


def measure(args: argparse.Namespace) -> list[Row]:
    """Every row of the table."""
    run = Run(
        method="cutpaste_3way",
        category=args.category,
        size=args.size,
        window=args.window,
        stride=args.stride,
    )
    normal, pixels = (
        datasets.load(args.data, args.category, split, args.size).pixels[: args.images]
        for split in ("train", "test")
    )
    net = build(run).to(args.device, memory_format=torch.channels_last).eval()
    fast, slow = (partial(f, run, net, normal, pixels) for f in (ours, plain))
    mine, memory, theirs = fast(), peak_memory(args.device), slow().cpu()
    each, count = args.seconds / 2 / args.repeats, len(normal) + len(pixels)
    turns = [(seconds(fast, each), seconds(slow, each)) for _ in range(args.repeats)]
    quick, long = zip(*turns, strict=True)
    return [
        memory,
        ("our way", 1e3 * statistics.median(quick) / count, "ms/image"),
        ("plain way", 1e3 * statistics.median(long) / count, "ms/image"),
        *ratios(quick, long),
        ("difference of the scores", float((mine - theirs).norm() / theirs.norm()), "relative"),
    ]


def parse() -> argparse.Namespace:
    """The options."""
    parser = options(__doc__)
    parser.add_argument("--window", type=int, default=32, help="pixels, both sides")
    parser.add_argument("--stride", type=int, default=4, help="between windows")
    parser.add_argument("--images", type=int, default=16, help="of each split, at most")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report(measure, parse()))
