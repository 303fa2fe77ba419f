"""Candidates for the short schedule, compared by real defects of objects that stand in no table.

    python benchmarks/search.py --data DIR --minutes 6 --out FOLDER [--names by_turns,turned]

Every candidate is trained with seed 0 on every object in DIR, then the best five with two more
seeds, several at a time. Each finished training appends a line to FOLDER/search.jsonl: image AUROC,
percent, at the end of the schedule, with features as they are and of length one, and with the
density fitted to the normal images alone or to two shifted, jittered copies of each as well. A line
of that device and length is not measured again. ``--device cpu --updates 2 --jobs 1`` tries it
without a GPU.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("CPLIB_CACHE", "/tmp/cplib-search")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from cplib import augment, datasets, train  # noqa: E402
from cplib.density import Gaussian, l2_normalise  # noqa: E402
from cplib.metrics import auroc_between  # noqa: E402
from cplib.model import embed  # noqa: E402
from cplib.run import Run  # noqa: E402

BASE = {"optimizer": "adamw", "learning_rate": 0.001, "warmup": 0.1, "sources": 16, "updates": 800}
SGD = {"optimizer": "sgd", "learning_rate": 0.03, "warmup": 0.0, "sources": 32}
BOTH = 64, 128
# Sides of the crops by turns (0: whole images), what differs from BASE, and whether training images
# are turned by quarters and mirrored, too.
CANDIDATES = {
    "landed": ((64,), {"learning_rate": 0.0005, "head_batchnorm": False, "updates": 640}, False),
    "untrained": (BOTH, {"updates": 0}, False),
    "by_turns": (BOTH, {}, False),
    "turned": (BOTH, {}, True),
    "turned_small": ((32, 64), {}, True),
    "turned_three": ((32, 64, 128), {"updates": 1200}, True),
    "turned_64": ((64,), {"updates": 1600}, True),
    "turned_96": ((96,), {"updates": 1000}, True),
    "turned_whole": ((64, 128, 0), {}, True),
    "turned_twice": (BOTH, {"updates": 1600}, True),
    "turned_four_times": (BOTH, {"updates": 3200}, True),
    "turned_half_rate": (BOTH, {"learning_rate": 0.0005}, True),
    "turned_double_rate": (BOTH, {"learning_rate": 0.002}, True),
    "turned_decay": (BOTH, {"weight_decay": 0.05}, True),
    "turned_batch": (BOTH, {"sources": 32}, True),
    "turned_no_batchnorm": (BOTH, {"head_batchnorm": False}, True),
    "turned_linear": (BOTH, {"head": ()}, True),
    "turned_still": (BOTH, {"translate": 0.0}, True),
    "turned_no_jitter": (BOTH, {"jitter": (0.0, 0.0, 0.0, 0.0)}, True),
    "turned_strong_jitter": (BOTH, {"jitter": (0.3, 0.3, 0.3, 0.05)}, True),
    "turned_thin": (BOTH, {"scar_width": (1.0, 8.0), "scar_length": (10.0, 40.0)}, True),
    "turned_sgd": (BOTH, SGD | {"updates": 3200}, True),
    "paper_crops": ((64,), SGD | {"updates": 8192}, False),
    "paper_cut_short": ((0,), SGD | {"updates": 2048}, False),
}


@functools.cache
def images(root: str, category: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normal images, two moved copies of each, test images and their labels; once for a process."""
    torch.set_num_threads(1)
    normal, test = (datasets.load(root, category, split, 256) for split in ("train", "test"))
    twice, draw = normal.pixels.repeat(2, 1, 1, 1), torch.Generator().manual_seed(1)
    place, colours = torch.rand(len(twice), 8, generator=draw).split(4, 1)
    moved = augment.shift_and_crop(twice, place, share=0.04).float() / 255
    moved = augment.jitter(moved, colours, strength=(0.1, 0.1, 0.1, 0.0))
    return normal.pixels, (255 * moved).round().to(torch.uint8), test.pixels, test.labels


def turned(pixels: Tensor) -> Tensor:
    """Images (N, 3, S, S) in all eight positions that a square has."""
    quarters = [pixels.rot90(k, (2, 3)) for k in range(4)]
    return torch.cat([*quarters, *(part.flip(3) for part in quarters)])


def updates(name: str, args: argparse.Namespace) -> int:
    """How long a candidate is trained."""
    own = (BASE | CANDIDATES[name][1])["updates"]
    return args.updates or own if own else 0


def trial(name: str, category: str, seed: int, args: argparse.Namespace) -> dict:
    """Train one candidate on one object, and score its test images."""
    normal, copies, test, labels = images(args.data, category)
    sides, changes, turns = CANDIDATES[name]
    fields = BASE | changes | {"updates": updates(name, args)}
    head = {"method": "cutpaste_3way", "category": category, "seed": seed, "dataset": "own"}
    run = Run(**head, crop=max(sides), **fields)
    train.crop_side = lambda run, update: sides[update % len(sides)]
    net, history = train.fit(run, turned(normal) if turns else normal, args.device)
    features, more, tested = (embed(net.eval(), x) for x in (normal, copies, test))
    row = {"name": name, "object": category, "seed": seed}
    row |= {"device": args.device, "updates": run.updates}
    if len(history):
        row["accuracy"] = round(history["accuracy"].tail(10).mean(), 3)
        row["seconds"] = round(history["seconds"].iloc[-1], 1)
    for kind, change in {"plain": Tensor.double, "length_one": l2_normalise}.items():
        for label, fitted in {"": features, "_copies": torch.cat([features, more])}.items():
            scores = Gaussian.fit(change(fitted), reg_covar=run.reg_covar).score(change(tested))
            row[kind + label] = round(auroc_between(scores[labels == 0], scores[labels == 1]), 1)
    return row


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder in the MVTec layout")
    parser.add_argument("--minutes", type=float, default=6, help="what has not begun then is left")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "search-out")))
    parser.add_argument("--names", default=",".join(CANDIDATES))
    parser.add_argument("--updates", type=int, default=0, help="of every candidate, to try it")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main() -> None:
    """All candidates with one seed, the best with three, and a table of what was found."""
    args, began = options(), time.time()
    file, names = args.out / "search.jsonl", args.names.split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    rows = [
        r for r in rows if (r["device"], r["updates"]) == (args.device, updates(r["name"], args))
    ]
    objects = sorted(path.name for path in Path(args.data).iterdir() if path.is_dir())

    def mean(name: str) -> float:
        mine = [row["plain"] for row in rows if row["name"] == name]
        return sum(mine) / len(mine) if len(mine) >= len(objects) else 0.0

    def go(pool: ProcessPoolExecutor, names: list[str], seeds: range) -> None:
        there = {(row["name"], row["object"], row["seed"]) for row in rows}
        todo = [(n, o, seed) for seed in seeds for n in names for o in objects]
        jobs = {pool.submit(trial, *item, args): item for item in todo if item not in there}
        for job in as_completed(jobs):
            if job.cancelled():
                continue
            try:
                rows.append(job.result())
            except Exception:  # the other candidates go on
                print(jobs[job], "failed", flush=True)
                traceback.print_exc()
                continue
            line = json.dumps(rows[-1])
            print(line, flush=True)
            with file.open("a", encoding="utf-8") as log:
                log.write(line + "\n")
            if time.time() > began + 60 * args.minutes:
                for other in jobs:
                    other.cancel()

    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        go(pool, names, range(1))
        if time.time() < began + 60 * args.minutes:
            go(pool, sorted(names, key=mean, reverse=True)[:5], range(1, 3))
    for name in sorted(names, key=mean, reverse=True):
        mine = sorted((r["object"], r["seed"], r["plain"]) for r in rows if r["name"] == name)
        print(f"{name:22s}{mean(name):6.1f} ", *(f"{o} {seed}: {auroc}" for o, seed, auroc in mine))


if __name__ == "__main__":
    main()
