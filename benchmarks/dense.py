"""How fast a category's images are scored window by window, against the plain way.

    python benchmarks/dense.py --data DIR --category bottle [--size 256] [--stride 4]

The plain way unfolds each image into copies of its windows, takes their features and fits one
Gaussian after the other, place by place. Prints one Markdown table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from cplib import datasets, localize
from cplib.model import PretextNet, build
from cplib.run import Run
from cplib.score import Scorer, upsample_scores

from timing import Row, Seconds, finish, options, peak_memory, report, seconds_of


@torch.inference_mode()
def plain(run: Run, net: PretextNet, normal: Tensor, pixels: Tensor) -> Tensor:
    """Scores (N, P) as ``Scorer.position_scores`` gives them, the straightforward way."""
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


def stages(run: Run, net: PretextNet, normal: Tensor, pixels: Tensor, device: str) -> list[Row]:
    """The share of each stage in a whole category's scoring, upsampling at the end."""
    spent, encoder = [], localize._encode

    def clocked(*args) -> Callable[[Tensor], Tensor]:
        encode = encoder(*args)

        def timed(patches: Tensor) -> Tensor:
            began = time.perf_counter()
            z = encode(patches)
            finish(device)
            spent.append(time.perf_counter() - began)
            return z

        return timed

    began = time.perf_counter()
    with mock.patch.object(localize, "_encode", clocked):
        scores = ours(run, net, normal, pixels)
    scored = time.perf_counter()
    upsample_scores(run, scores, pixels.shape[2:])
    whole = time.perf_counter() - began
    shares = {"features of windows": sum(spent), "anomaly maps": whole - (scored - began)}
    shares["Gaussians and scores"] = whole - sum(shares.values())
    return [(f"... {name}", 100 * seconds / whole, "%") for name, seconds in shares.items()]


def network(run: Run, net: PretextNet, device: str, budget: float) -> list[Row]:
    """Windows a second of the encoder, in core time, and what its convolutions take of it."""
    patches = torch.randint(256, (512, 3, run.window, run.window), dtype=torch.uint8)
    encode = torch.inference_mode()(localize._encode(net))
    spent = seconds_of(lambda: encode(patches), device, budget).spent(device)
    rows = [("features", len(patches) / spent, "windows/s")]
    with torch.profiler.profile() as profile:
        encode(patches)
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    own = sum(seconds for name, seconds in spent.items() if "convolution" in name)
    return [*rows, ("... convolutions", 100 * own / sum(spent.values()), "%")]


def measure(args: argparse.Namespace) -> list[Row]:
    """Every row; memory after our way and before the plain one."""
    run = Run(
        method="cutpaste_3way",
        category=args.category,
        size=args.size,
        window=args.window,
        stride=args.stride,
    )
    normal, pixels = (
        datasets.load(args.data, args.category, split, args.size).pixels[: args.pictures]
        for split in ("train", "test")
    )
    net = build(run).to(args.device, memory_format=torch.channels_last).eval()
    work = {f: partial(f, run, net, normal, pixels) for f in (ours, plain)}
    rows = stages(run, net, normal, pixels, args.device) + [peak_memory(args.device)]
    budget = args.seconds / 2 / args.repeats
    turns = [[_once(work[f], args.device, budget) for f in work] for _ in range(args.repeats)]
    mine, theirs = work[ours](), work[plain]().cpu()
    count = len(normal) + len(pixels)
    return [
        ("our way", 1e3 * statistics.median(a.clock for a, _ in turns) / count, "ms/image"),
        ("plain way", 1e3 * statistics.median(b.clock for _, b in turns) / count, "ms/image"),
        ("plain way against ours", statistics.median(b.clock / a.clock for a, b in turns), "times"),
        ("... in core time", statistics.median(b.cores / a.cores for a, b in turns), "times"),
        ("difference of the scores", float((mine - theirs).norm() / theirs.norm()), "relative"),
        *rows,
        *network(run, net, args.device, budget),
    ]


def _once(work, device: str, budget: float) -> Seconds:
    return seconds_of(work, device, budget, warm=False, least=1)


def parse() -> argparse.Namespace:
    """The options."""
    parser = options(__doc__)
    parser.add_argument("--window", type=int, default=32, help="pixels, both sides")
    parser.add_argument("--stride", type=int, default=4, help="between windows")
    parser.add_argument("--pictures", type=int, default=16, help="of each split, at most")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report(measure, parse()))
