"""AUROC on the way: what each schedule had reached after how many updates."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cplib.config import Run
from cplib.runs import collect

POINT = ["schedule", "category", "seed", "update"]
COLUMNS = [*POINT, "head_updates", "auroc"]
NAMED = ("init", "freeze_batchnorm", "learning_rate", "head_updates", "updates")  # in a label
FREE = ("category", "seed", "curve", "precision", "dataset")  # do not make another schedule


def curves(results: str | Path, own: Run, categories) -> pd.DataFrame:
    """The test AUROC that finished runs noted on the way, a row a point: the columns ``COLUMNS``.

    Runs of the method of ``own`` with ``curve`` > 0, of patches (pixel AUROC) if ``own`` is, else
    of whole pictures (image AUROC). A schedule is named by how it starts and how long and fast it
    trains, and by what else it has that ``own``, the profile's run, has not.
    """
    table = collect(results, method=own.method)
    alike = (table["curve"] > 0) & (table["patch"].gt(0) == bool(own.patch))
    metric = "pixel_auroc" if own.patch else "image_auroc"
    parts = [pd.DataFrame(columns=COLUMNS)]
    for row in table[alike & table["category"].isin(categories)].to_dict("records"):
        history = pd.read_csv(Path(results) / "runs" / row["id"] / "history.csv")
        noted = history[["update", metric]].dropna().rename(columns={metric: "auroc"})
        fields = {k: row[k] for k in ("category", "seed", "head_updates")}
        parts.append(noted.assign(schedule=label(row, own), **fields))
    found = pd.concat([p for p in parts if len(p)] or parts)[COLUMNS]
    return found.drop_duplicates(POINT).sort_values(POINT).reset_index(drop=True)


def label(row: dict, own: Run) -> str:
    """A schedule in words, from a run's fields."""
    start = "random" if row["init"] == "random" else "ImageNet"
    start += ", BatchNorm frozen" if row["freeze_batchnorm"] else ""
    head = f"{row['head_updates']} + " if row["head_updates"] else ""
    text = f"{start}: {head}{row['updates']} updates at {row['learning_rate']:g}"
    other = [k for k, v in asdict(own).items() if k not in NAMED + FREE and row[k] != v]
    return ", ".join([text, *(f"{k} {row[k]}" for k in other)])


class Shortest(NamedTuple):
    """A point of a curve that is no worse than the longest one measured, both as averages."""

    schedule: str
    update: int
    mean: float
    spread: float
    longest: str
    longest_update: int
    longest_mean: float
    categories: tuple[str, ...]


def shortest(curves: pd.DataFrame) -> Shortest | None:
    """The fewest updates whose average lies at most its own spread below the longest's.

    Points at which only the head has been trained do not count: the encoder is still its start.
    The longest is among the schedules that were measured in the most categories (the better of two
    as long). Averages are over its categories and then over the seeds that have them all; a
    schedule without such a seed does not count. None where there is none.
    """
    curves = curves[curves["update"] > curves["head_updates"]]
    width = curves.groupby("schedule")["category"].transform("nunique")
    ends = curves[width == width.max()]
    ends = ends[ends["update"] == ends["update"].max()]
    categories = max(ends.groupby("schedule")["category"].unique().map(sorted), key=len, default=())
    part = curves[curves["category"].isin(categories)]
    cells = part.pivot(index=["schedule", "seed", "update"], columns="category", values="auroc")
    values = cells.dropna().mean(axis=1)
    if values.empty:
        return None
    means = values.groupby(["schedule", "update"]).mean().reset_index(name="mean")
    means["spread"] = [spread(values[s].unstack("seed"), u) for s, u in means.values[:, :2]]
    best = means.sort_values(["update", "mean"]).iloc[-1]
    good = means[means["mean"] >= best["mean"] - means["spread"]]
    first = good.sort_values(["update", "mean"], ascending=[True, False]).iloc[0]
    return Shortest(*first, *best[["schedule", "update", "mean"]], tuple(categories))


def spread(values: pd.DataFrame, update: int) -> float:
    """Standard deviation over seeds and neighbouring points, the line through these taken off.

    ``values`` has a row a noted update and a column a seed. Without the line a steep rise would
    pass for noise. 0 where there are too few values for one.
    """
    at = values.index.get_loc(update)
    near = values.iloc[max(at - 1, 0) : at + 2].stack().dropna()
    x = near.index.get_level_values("update").to_numpy(float)
    degree = min(1, len(set(x)) - 1)
    if len(near) <= degree + 1:
        return 0.0
    rest = near - np.polyval(np.polyfit(x, near, degree), x)
    return float(np.sqrt((rest**2).sum() / (len(near) - degree - 1)))


def sentence(found: Shortest | None) -> str:
    """What ``shortest`` found, in words."""
    if found is None:
        return "No schedule's AUROC was noted on the way in every category."
    noise = f"spread {found.spread:.1f}" if found.spread else "too few values for a spread"
    return (
        f"Average over {', '.join(found.categories)}: the longest measured ({found.longest}) "
        f"reaches {found.longest_mean:.1f} after {found.longest_update} updates. The fewest "
        f"updates that come within their own spread of this are {found.update} "
        f"({found.schedule}): {found.mean:.1f}, {noise}."
    )
