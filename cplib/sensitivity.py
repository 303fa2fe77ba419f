"""Tables 7 and 8, and what the paper does not state: one setting at a time is changed."""

from dataclasses import replace
from itertools import groupby
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
UNSTATED = "unstated_choices"  # a table of our own: fields of Run on which the paper is silent
CHOICES = {UNSTATED: ("head", "translate", "jitter")}


class Setting(NamedTuple):
    """A row of such a table: where it stands on its axis, and the fields of ``Run`` it changes."""

    axis: str
    x: float | tuple  # a multiple of the protocol's learning rate or length; else the value itself
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


def _value(base: Run, axis: str, x: float | tuple) -> float | tuple:
    if axis == "learning_rate":
        return float(f"{x * base.learning_rate:.3g}")
    return round(x * base.updates) if axis == "updates" else x


def _name(axis: str, value: float | tuple) -> str:
    if axis == "updates":
        epochs = f"{METHOD}[epochs={value / EPOCH:g}]"
        if epochs in set(published("table7_learning_rate_and_epochs")["method"]):
            return epochs
    return f"{METHOD}[{axis}={_text(value) if isinstance(value, tuple) else value}]"


def _text(values: tuple) -> str:
    """(512, 128) as "512-128", many of a kind as "8x512"; without any the head is linear."""
    parts = [(f"{value:g}", len([*same])) for value, same in groupby(values)]
    return "-".join(f"{n}x{v}" if n > 4 else "-".join([v] * n) for v, n in parts) or "linear"


def row_names(table: str) -> tuple[str, ...]:
    """Every name of a row that some profile gives to the table, on each axis the paper's first."""
    profiles = sorted(PROFILES.values(), key=lambda p: p.name != "paper")
    names = [n for axis in _axes(table) for p in profiles for n in settings(p, axis)]
    return tuple(dict.fromkeys(names))


def runs_by_row(profile: Profile, table: str, categories, seeds=None) -> dict[str, list[Run]]:
    """The runs behind each row of a table; the one that changes nothing stands on every axis.

    Of the ``categories`` those that the profile names for the study; where none of them is at
    hand, the first.
    """
    bases = _bases(profile, table, categories, seeds)
    rows = settings(profile, *_axes(table))
    return {name: [_changed(base, s.changes) for base in bases] for name, s in rows.items()}


def planned(profile: Profile, table: str, categories, seeds=None) -> list[Run]:
    """The runs of a table, each once, first those that change nothing."""
    bases = _bases(profile, table, categories, seeds)
    rows = runs_by_row(profile, table, categories, seeds).values()
    runs = dict.fromkeys(run for row in rows for run in row)
    return sorted(runs, key=lambda run: run not in bases)


def _axes(table: str) -> tuple[str, ...]:
    return (AXES_OF | CHOICES)[table]


def _bases(profile: Profile, table: str, categories, seeds: int | None) -> list[Run]:
    """The runs that change nothing."""
    study = profile.sensitivity
    wanted = study.unstated if table in CHOICES else study.categories
    few = [c for c in categories if c in wanted] or (categories[:1] if wanted else categories)
    return profile.runs((METHOD,), few, seeds or seeds_of(profile, table), **study.protocol)


def seeds_of(profile: Profile, table: str) -> int:
    """How many seeds a table takes; what is ours to choose as many as Table 1."""
    return profile.seeds if table in CHOICES else profile.sensitivity.seeds


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
    parts = []
    for axis in _axes(table):
        grid = common(cells, tuple(settings(profile, axis)))
        if grid.shape[1] > 1 and len(grid):
            name = AXES.get(axis, axis)
            over = f"{name[0].upper()}{name[1:]} (over {', '.join(grid.index)})"
            parts.append(f"{over}: {_range(grid.mean())}{_theirs(table, axis)}")
    if not parts:
        return "Too little was measured to say how far the settings lie apart."
    paper = ", the paper's over its fifteen categories" if table in AXES_OF else ""
    return f"Mean image AUROC{paper}. {'. '.join(parts)}."


def _theirs(table: str, axis: str) -> str:
    """The range of the paper's averages along an axis, where it has that table."""
    if table not in AXES_OF:
        return ""
    paper = along(published(table).query("category == 'average_all'"), PROFILES["paper"])
    return f"; the paper's {_range(paper.loc[paper['axis'] == axis, 'published_mean'])}"


def _range(values: pd.Series) -> str:
    return f"{values.min():.1f} to {values.max():.1f}, {values.max() - values.min():.1f} apart"
