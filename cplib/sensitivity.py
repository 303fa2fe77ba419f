"""Tables 7 and 8: one setting at a time is changed around a profile's own protocol."""

from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from cplib.config import PROFILES, Profile, Run
from cplib.published import common, published

METHOD = "cutpaste_3way"
EPOCH = 256  # updates (A.1, footnote 5)
AXES = {
    "learning_rate": "learning rate",
    "updates": "length of training",
    "patch_jitter": "jitter of the patch",
    "max_area": "largest area of the patch",
}
AXES_OF = {
    "table7_learning_rate_and_epochs": ("learning_rate", "updates"),
    "table8_jitter_and_patch_size": ("patch_jitter", "max_area"),
}


class Setting(NamedTuple):
    """A row of Table 7 or 8: where it stands on its axis, and the fields of ``Run`` it changes."""

    axis: str
    x: float  # a multiple of the protocol's own learning rate or length; else the value itself
    changes: dict


def settings(profile: Profile, *axes: str) -> dict[str, Setting]:
    """The rows that a profile measures along the axes, each under its name in the table.

    A name states the value that is trained with, not the multiple; lengths are the paper's epochs
    where they are as long as these, else updates.
    """
    study = profile.sensitivity
    base = profile.run(METHOD, profile.categories[0], **study.protocol)
    found = {}
    for axis in axes or AXES:
        for x in getattr(study, axis):
            value = _value(base, axis, x)
            changes = {"area": (base.area[0], x)} if axis == "max_area" else {axis: value}
            found[_name(axis, value)] = Setting(axis, x, changes)
    return found


def _value(base: Run, axis: str, x: float) -> float:
    if axis == "learning_rate":
        return float(f"{x * base.learning_rate:.3g}")
    return round(x * base.updates) if axis == "updates" else x


def _name(axis: str, value: float) -> str:
    epochs = f"{METHOD}[epochs={value / EPOCH:g}]"
    if axis == "updates" and epochs in set(published("table7_learning_rate_and_epochs")["method"]):
        return epochs
    return f"{METHOD}[{axis}={value}]"


def row_names(table: str) -> tuple[str, ...]:
    """Every name of a row that some profile gives to the table, on each axis the paper's first."""
    profiles = sorted(PROFILES.values(), key=lambda p: p.name != "paper")
    names = [n for axis in AXES_OF[table] for p in profiles for n in settings(p, axis)]
    return tuple(dict.fromkeys(names))


def runs_by_row(profile: Profile, table: str, categories, seeds=None) -> dict[str, list[Run]]:
    """The runs behind each row of a table; the one that changes nothing stands on every axis.

    Of the ``categories`` those that the profile names for the study, if any of them is.
    """
    bases = _bases(profile, categories, seeds)
    rows = settings(profile, *AXES_OF[table])
    return {name: [_changed(base, s.changes) for base in bases] for name, s in rows.items()}


def planned(profile: Profile, table: str, categories, seeds=None) -> list[Run]:
    """The runs of a table, each once, first those that change nothing."""
    bases = _bases(profile, categories, seeds)
    rows = runs_by_row(profile, table, categories, seeds).values()
    runs = dict.fromkeys(run for row in rows for run in row)
    return sorted(runs, key=lambda run: run not in bases)


def _bases(profile: Profile, categories, seeds: int | None) -> list[Run]:
    study = profile.sensitivity
    few = [c for c in categories if c in study.categories] or categories
    return profile.runs((METHOD,), few, seeds or study.seeds, **study.protocol)


def _changed(base: Run, changes: dict) -> Run:
    """The run with the changes; only the one without any notes its AUROC on the way."""
    run = replace(base, **changes)
    return run if run == base else replace(run, curve=0)


def along(cells: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """The rows of a tidy table that are a profile's settings, with their ``axis`` and ``x``."""
    rows = settings(profile)
    cells = cells[cells["method"].isin(rows)]
    at = [rows[name] for name in cells["method"]]
    cells = cells.assign(axis=[s.axis for s in at], x=[s.x for s in at])
    return cells.sort_values("x").reset_index(drop=True)


def ranges(cells: pd.DataFrame, table: str, profile: Profile) -> str:
    """A sentence: how far our means lie apart along each of a table's axes, and the paper's."""
    paper = along(published(table).query("category == 'average_all'"), PROFILES["paper"])
    parts, categories = [], []
    for axis in AXES_OF[table]:
        grid = common(cells, tuple(settings(profile, axis)))
        if grid.shape[1] > 1 and len(grid):
            theirs = paper.loc[paper["axis"] == axis, "published_mean"]
            categories = list(grid.index)
            parts.append(f"{AXES[axis]}: {_range(grid.mean())}; the paper's {_range(theirs)}")
    if not parts:
        return "Too little was measured to say how far the settings lie apart."
    return (
        f"Mean image AUROC over {', '.join(categories)}, the paper's over its fifteen categories. "
        f"{'. '.join(p[0].upper() + p[1:] for p in parts)}."
    )


def _range(values: pd.Series) -> str:
    return f"{values.min():.1f} to {values.max():.1f}, {values.max() - values.min():.1f} apart"
