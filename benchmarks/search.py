"""Candidates for the short schedule, compared by real defects of objects that stand in no table.

    python benchmarks/search.py --data DIR --out results/quick/tables/schedule_choice.csv

Every candidate is trained with seed 0 on every object in DIR, then the best five with two more
seeds, ``--jobs`` at a time. ImageNet features are the same with every seed. Each training appends a
row to ``--out``: image AUROC at its end, in percent, with features as they are and of length one.
What the file has is not measured again.
"""

import argparse
import functools
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from cplib import datasets, train  # noqa: E402
from cplib.density import Gaussian, l2_normalise  # noqa: E402
from cplib.metrics import auroc_between  # noqa: E402
from cplib.model import embed  # noqa: E402
from cplib.run import Run  # noqa: E402

BASE = {"method": "cutpaste_3way", "optimizer": "adamw", "learning_rate": 0.001, "warmup": 0.1}
BASE |= {"sources": 16, "updates": 800, "dataset": "own"}
# What each changes of BASE.
CANDIDATES = {
    "random network": {"method": "untrained", "updates": 0},
    "ImageNet features": {"method": "pretrained", "init": "imagenet", "updates": 0},
    "random network (128 px)": {"method": "untrained", "updates": 0, "size": 128},
    "ImageNet features (128 px)": {"method": "pretrained", "init": "imagenet"}
    | {"updates": 0, "size": 128},
    "64-px crops": {"crop": 64},
    "64-px crops (as before)": {"crop": 64, "learning_rate": 0.0005, "head_batchnorm": False}
    | {"updates": 640},
    "64 and 128-px crops": {"crop": (64, 128)},
    "images of 128 px": {"size": 128},
    "images of 128 px (rate 0.002)": {"size": 128, "learning_rate": 0.002},
    "images of 128 px (twice as long)": {"size": 128, "updates": 1600},
    "images of 160 px (512 updates)": {"size": 160, "updates": 512},
    "images of 256 px": {},
}
TOP, SEEDS = 5, 3  # so many candidates have so many seeds


@functools.cache
def images(root: str, category: str, split: str, size: int) -> datasets.Images:
    """The images of an object, once for a process."""
    return datasets.load(root, category, split, size)


def trial(name: str, category: str, seed: int, data: str, device: str) -> dict:
    """Train one candidate on one object, and score its test images."""
    torch.set_num_threads(1)
    run = Run(category=category, seed=seed, **(BASE | CANDIDATES[name]))
    normal, test = (images(data, category, split, run.size) for split in ("train", "test"))
    net, history = train.fit(run, normal.pixels, device)
    z, tested = embed(net, normal.pixels), embed(net, test.pixels)
    row = {"schedule": name, "object": category, "seed": seed, "device": device}
    row |= {"precision": train.precision(run, device), "minutes": None, "accuracy": None}
    if len(history):
        row["accuracy"] = 100 * history["accuracy"].tail(10).mean()
        row["minutes"] = history["seconds"].iloc[-1] / 60
    for kind, change in {"auroc": Tensor.double, "auroc_length_one": l2_normalise}.items():
        scores = Gaussian.fit(change(z), reg_covar=run.reg_covar).score(change(tested))
        row[kind] = auroc_between(scores[test.labels == 0], scores[test.labels == 1])
    return row


def main() -> None:
    """All candidates with one seed, then the best with three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder in the MVTec layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6, help="what has not begun then is left")
    parser.add_argument("--names", default=",".join(CANDIDATES))
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    end, names = time.time() + 60 * args.minutes, args.names.split(",")
    objects = sorted(path.name for path in Path(args.data).iterdir() if path.is_dir())

    def there() -> pd.DataFrame:
        columns = ["schedule", "object", "seed", "auroc"]
        return pd.read_csv(args.out) if args.out.exists() else pd.DataFrame(columns=columns)

    def go(names: list[str], seeds: range) -> None:
        done = {*there()[["schedule", "object", "seed"]].itertuples(index=False, name=None)}
        todo = [(n, o, seed) for seed in seeds for n in names for o in objects]
        jobs = [pool.submit(trial, *t, args.data, args.device) for t in todo if t not in done]
        for job in as_completed(jobs):
            if job.cancelled():
                continue
            try:
                row = pd.DataFrame([job.result()]).round(2)
            except Exception:  # the other candidates go on
                traceback.print_exc()
                continue
            row.to_csv(args.out, mode="a", index=False, header=not args.out.exists())
            print(row.to_string(index=False, header=False), flush=True)
            for other in jobs if time.time() > end else ():
                other.cancel()

    def ranking() -> pd.Series:
        rows = there()
        mean = rows[rows["schedule"].isin(names)].groupby("schedule")["auroc"].mean()
        return mean.sort_values(ascending=False)

    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        go(names, range(1))
        best = [name for name in ranking().index if CANDIDATES[name].get("init") != "imagenet"]
        go(best[:TOP] if time.time() < end else [], range(1, SEEDS))
    print(ranking().round(1).to_string())


if __name__ == "__main__":
    main()
