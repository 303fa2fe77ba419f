"""The detector of notebook 12 on each category as if it were a person's own images.

    python benchmarks/own_images.py --data DIR --out results/quick/tables/own_images.csv

The detector sees only ``train/good``. The candidates are compared on anomalies that are made on
held-out normal images. The test images then show how good the recommended candidate is: ``found``
and ``alarms`` are the percentages of anomalous and of normal ones that reach its threshold.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from cplib import datasets
from cplib.apps.detector import PAINTED, candidates, compare, fit_detector
from cplib.metrics import auroc_between
from cplib.study.profiles import PROFILES, Profile
from cplib.study.store import Places
from cplib.train import device_name

CATEGORIES = "tile,bottle,capsule,pill,screw,transistor"


def measure(root: str, category: str, places: Places, profile: Profile | None) -> list[dict]:
    """A row for each candidate: AUROC on made anomalies and on the test images, and its times."""
    normal, test = (datasets.load(root, category, split) for split in ("train", "test"))
    runs = candidates(category, profile)
    table = compare(runs, normal.pixels, places=places)
    painted = table[[" ".join(kind) for kind in PAINTED]].mean(axis=1)
    print(table.round(1).to_string(), flush=True)
    rows = []
    for name, run in runs.items():
        began = time.time()
        detector = fit_detector(run, normal.pixels, places=places)
        fitted = time.time()
        scores = detector.score(test.pixels)
        reached = 100 * (scores >= detector.threshold).double()
        rows.append(
            {
                "category": category,
                "candidate": name,
                "made": table.loc[name, "mean"],
                "painted": painted[name],
                "recommended": int(name == table.index[0]),
                "image_auroc": auroc_between(scores[test.labels == 0], scores[test.labels == 1]),
                "found": reached[test.labels == 1].mean().item(),
                "alarms": reached[test.labels == 0].mean().item(),
                "minutes": (fitted - began) / 60,
                "ms_an_image": 1000 * (time.time() - fitted) / len(test.pixels),
            }
        )
    return rows


def main() -> None:
    """Measure every category and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--categories", default=CATEGORIES)
    parser.add_argument(
        "--profile",
        choices=("quick", "paper"),
        help="compare what CutPaste trains by this profile's schedules, too",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(device_name(torch.device("cpu")))
    rows = []
    with TemporaryDirectory() as scratch:
        for category in args.categories.split(","):
            rows += measure(args.data, category, Places(Path(scratch)), PROFILES.get(args.profile))
            pd.DataFrame(rows).round(2).to_csv(args.out, index=False)
            print(pd.DataFrame(rows).round(1).to_string(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
