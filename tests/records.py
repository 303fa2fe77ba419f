"""Made-up records of runs, as ``store.write`` writes them."""

import json
from dataclasses import asdict

import pandas as pd

from cplib.augment import DRAWS_VERSION
from cplib.datasets import MVTEC
from cplib.study.store import RECORD_VERSION, run_folder


def official(category):
    """Counts of a category's images as MVTec AD has them."""
    i = MVTEC.categories.index(category)
    normal, anomalous = MVTEC.normal[i], MVTEC.anomalous[i]
    here = {"train": MVTEC.train[i], "normal": normal, "anomalous": anomalous}
    return here | {"masks": anomalous, "size": [900, 900]}


def record(results, run, auroc=90.0, curve=None, images=None, weights=None, draws=DRAWS_VERSION):
    """Write the folder of a made-up finished run; ``curve`` is {update: AUROC noted}."""
    folder = run_folder(run, results)
    folder.mkdir(parents=True)
    head = {"version": RECORD_VERSION, "run": asdict(run), "threads": 1, "weights": weights}
    head |= {"draws": draws}
    head |= {"images": images or official(run.category)}
    head |= {"data": {"train": "", "test": ""}, "device": "made up", "precision": "fp32"}
    head |= {"train_seconds": 1.0, "images_per_second": 1.0}
    (folder / "run.json").write_text(json.dumps(head))
    (folder / "metrics.json").write_text(json.dumps({"image_auroc": auroc}))
    (folder / "scores.csv").write_text("file,kind,label,score\na.png,good,0,1\nb.png,cut,1,2\n")
    history = pd.DataFrame({"update": sorted({1, *(curve or {})})})
    history["seconds"] = 60.0 * history["update"]
    history["image_auroc"] = history["update"].map(curve or {}).astype(float)
    history.to_csv(folder / "history.csv", index=False)
