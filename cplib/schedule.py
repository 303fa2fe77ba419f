"""What each schedule had reached after how many minutes: AUROC on the way, never used to choose."""

from pathlib import Path

import pandas as pd

from cplib.config import Profile, Run
from cplib.runs import collect

METHOD = "cutpaste_3way"
COLUMNS = ["schedule", "category", "seed", "update", "minutes", "auroc"]


def cut_short(profile: Profile, categories) -> list[Run]:
    """The paper's schedule, cut to the profile's ``cut_short`` updates, a run a category."""
    fields = {"dataset": profile.dataset, "updates": profile.cut_short, "curve": 4}
    runs = [Run(method=METHOD, category=category, **fields) for category in categories]
    return runs if profile.cut_short else []


def curves(results: str | Path, own: Run, categories) -> pd.DataFrame:
    """The test AUROC that finished runs noted on the way, a row a point: the columns ``COLUMNS``.

    Runs of the method of ``own`` with ``curve`` > 0, of windows (pixel AUROC) if ``own`` is, else
    of whole images (image AUROC). ``minutes`` are of training, on the device that the run had.
    """
    table = collect(results, method=own.method)
    alike = (table["curve"] > 0) & (table["window"].gt(0) == bool(own.window))
    metric = "pixel_auroc" if own.window else "image_auroc"
    parts = [pd.DataFrame(columns=COLUMNS)]
    for row in table[alike & table["category"].isin(categories)].to_dict("records"):
        history = pd.read_csv(Path(results) / "runs" / row["id"] / "history.csv")
        if metric not in history:  # trained before, by a run that is scored otherwise
            continue
        noted = history.dropna(subset=metric).rename(columns={metric: "auroc"})
        noted = noted.assign(minutes=noted["seconds"] / 60, schedule=label(row))
        parts.append(noted.assign(category=row["category"], seed=row["seed"]))
    found = pd.concat([p for p in parts if len(p)] or parts)[COLUMNS]
    return found.sort_values(COLUMNS[:4]).reset_index(drop=True)


def label(row: dict) -> str:
    """A schedule in words, from a run's fields."""
    rate = f"{row['optimizer'].replace('sgd', 'SGD').replace('adamw', 'AdamW')} "
    rate += f"{row['learning_rate']:g}"
    images = f"{row['crop']}-px crops" if row["crop"] else f"{row['size']} px"
    start = "" if row["init"] == "random" else ", ImageNet weights"
    return f"{rate}, {images}{start}, {row['updates']} updates"
