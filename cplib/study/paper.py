"""The paper's numbers, and the order and the averages of its tables."""

from pathlib import Path

import pandas as pd

from cplib.datasets import DEMO, MVTEC
from cplib.study.synthetic import SYNTHETIC

FOLDER = Path(__file__).parent / "paper"
PRINTED = {path.stem: path for path in sorted(FOLDER.glob("table*.csv"))}
TEXT = FOLDER / "text_numbers.csv"  # averages that stand in the paper's text alone
AVERAGES = ("average_texture", "average_object", "average_all", "average_measured")
ROW = ["method", "setting", "value"]  # what names a row; the last two are of Tables 7 and 8
KEYS = [*ROW, "category", "metric"]
PUBLISHED = ["published_mean", "published_stderr"]


def published(table: str) -> pd.DataFrame:
    """The paper's numbers, percent: KEYS, published_mean, published_stderr.

    ``table`` is a name such as ``table1_image_level``; KeyError for one that the paper lacks. What
    only the text says (GradCAM's average) stands with the table that it belongs to. In Table 7 a
    ``value`` is a multiple of the protocol's own learning rate or length.
    """
    text = pd.read_csv(TEXT).query("table == @table").drop(columns="table")
    if table not in PRINTED and text.empty:
        raise KeyError(table)
    parts = [pd.read_csv(PRINTED[table], dtype={"value": str})] if table in PRINTED else []
    found = pd.concat([*parts, text] if len(text) else parts, ignore_index=True)
    return with_settings(found)[[*KEYS, *PUBLISHED]]


def with_settings(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns ``setting`` and ``value``, empty where it has none."""
    missing = {name: "" for name in ROW[1:] if name not in table}
    return table.assign(**missing).fillna(dict.fromkeys(ROW[1:], ""))


def groups(categories) -> dict[str, list[str]]:
    """The averages of the paper's tables and the categories under each.

    For the demo set these are its own textures and objects; Table 6's kinds have one average.
    ``average_measured`` is there when only some of MVTec's categories are: an average that the
    paper does not print. Any other data set has one average of its categories.
    """
    if {*categories} & {*SYNTHETIC}:
        return {"average_all": list(SYNTHETIC)}
    data = next((d for d in (DEMO, MVTEC) if set(categories) <= set(d.categories)), None)
    if data is None:
        return {"average_all": sorted(categories)}
    found = {
        "average_texture": list(data.textures),
        "average_object": list(data.objects),
        "average_all": list(data.categories),
    }
    if set(categories) < set(found["average_all"]):
        found["average_measured"] = [c for c in found["average_all"] if c in set(categories)]
    return found


def in_order(categories) -> list[str]:
    """Categories as the paper lists them, each group's average behind it, unknown ones last."""
    textures, objects = MVTEC.textures + DEMO.textures, MVTEC.objects + DEMO.objects
    known = [*textures, AVERAGES[0], *objects, *SYNTHETIC]
    own = sorted({*categories} - {*known, *AVERAGES})
    return [c for c in (*known, *own, *AVERAGES[1:]) if c in {*categories}]
