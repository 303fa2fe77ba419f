"""Which short schedule learns most from scratch: candidates are compared without test images.

    python benchmarks/schedule.py --data DIR --out results/quick/tables/schedule_choice.csv

Every fifth training image is held out, and a network is trained on the others. Two things are
measured on the held-out images. The first is how often the pretext task is right, on crops as in
training, and on whole images. The second is the AUROC between the held-out images and copies with
an anomaly: the two kinds of CutPaste, and two painted shapes that training has not seen (section
5.3). Rows are appended to ``--out``, and rows that are there are not measured again.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from cplib import datasets, train
from cplib.apps.detector import made_anomalies
from cplib.density import Gaussian, l2_normalise
from cplib.metrics import auroc_between
from cplib.model import PretextNet, embed
from cplib.run import Run

CATEGORIES = "tile,screw,pill"
SIDE = (0.06, 0.2)  # of the painted shapes, a share of the image's side
ADAMW = {"optimizer": "adamw", "learning_rate": 0.001, "warmup": 0.1, "updates": 120}
PLAIN = ADAMW | {"head_batchnorm": False, "crop": 128}
LONG = PLAIN | {"learning_rate": 0.0005, "crop": 0, "updates": 256}
CANDIDATES = {
    "untrained": {"updates": 0},
    "AdamW 0.001, 128-px crops, head without BatchNorm": PLAIN,
    "... learning rate 0.0005": PLAIN | {"learning_rate": 0.0005},
    "... the last tenth on whole images": PLAIN | {"whole": 0.1, "updates": 90},
    "... 64-px crops": PLAIN | {"crop": 64, "updates": 300},
    "... 64-px crops, learning rate 0.0005": PLAIN
    | {"crop": 64, "updates": 300, "learning_rate": 0.0005},
    "... images resized to 128 px": PLAIN | {"crop": 0, "size": 128},
    "... head with BatchNorm": PLAIN | {"head_batchnorm": True},
    "... SGD 0.1": PLAIN | {"optimizer": "sgd", "learning_rate": 0.1},
    # These take minutes longer: candidates for a long schedule.
    "long: whole images": LONG,
    "long: 128-px crops, then whole images": LONG | {"crop": 128, "whole": 3 / 7, "updates": 448},
}


@torch.inference_mode()
def pretext_accuracy(run: Run, net: PretextNet, held: Tensor, crop: int) -> float:
    """Percent of right answers to the pretext task, on one batch of all images."""
    every = replace(run, sources=len(held))
    images, labels = train.batch(every, held, torch.Generator().manual_seed(0), crop)
    answers = torch.cat([net(x).argmax(1) for x in images.split(32)])
    return 100 * (answers == labels).float().mean().item()


def measure(run: Run, pixels: Tensor) -> list[dict]:
    """A row for each kind of anomaly and of features: scaled to length one, and as they are."""
    held = torch.arange(len(pixels)) % 5 == 0
    net, history = train.fit(run, pixels[~held])
    made = made_anomalies(run, pixels[held], side=SIDE, opacity=1.0)
    z, z_held = (embed(net, part) for part in (pixels[~held], made.pop("normal")))
    seconds = history["seconds"].iloc[-1] if len(history) else 0.0
    row = {"category": run.category, "seed": run.seed, "precision": train.precision(run, "cpu")}
    row["minutes"] = seconds / 60
    for name, crop in (("pretext_accuracy", run.crop), ("whole_accuracy", 0)):
        row[name] = pretext_accuracy(run, net, pixels[held], crop)
    rows = []
    for kind, images in made.items():
        features = embed(net, images)
        for name, scale in (("length one", l2_normalise), ("as they are", Tensor.float)):
            gaussian = Gaussian.fit(scale(z), reg_covar=run.reg_covar)
            scores = (gaussian.score(scale(part)) for part in (z_held, features))
            rows.append(row | {"features": name, "anomaly": kind, "auroc": auroc_between(*scores)})
    return rows


def main() -> None:
    """Measure what the file lacks, category by category of each candidate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--categories", default=CATEGORIES)
    parser.add_argument("--only", help="candidates whose names contain this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, fields in CANDIDATES.items():
        for category in args.categories.split(",") if (args.only or "") in name else ():
            there = pd.read_csv(args.out) if args.out.exists() else pd.DataFrame()
            if len(there) and ((there.schedule == name) & (there.category == category)).any():
                continue
            run = Run(method="cutpaste_3way", category=category, sources=16, **fields)
            pixels = datasets.load(args.data, category, "train", run.size).pixels
            rows = pd.DataFrame(measure(run, pixels))
            rows.insert(0, "schedule", name)
            rows.round(3).to_csv(args.out, mode="a", index=False, header=not args.out.exists())
            print(f"{name}, {category}: {rows['auroc'].mean():.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
