"""The paper's numbers, and ours beside them: tidy tables, and as the paper prints them."""

from pathlib import Path

import pandas as pd

from cplib.datasets import DEMO, MVTEC, atomic, write_text
from cplib.study.synthetic import SYNTHETIC

TABLES = {p.stem: p for p in sorted((Path(__file__).parent / "paper").glob("table*.csv"))}
AVERAGES = ("average_texture", "average_object", "average_all", "average_measured")
TEXT = Path(__file__).parent / "paper" / "text_numbers.csv"  # averages that the paper's text gives
ROW = ["method", "setting", "value"]  # what a row of a table is; the last two of Tables 7 and 8
KEYS = [*ROW, "category", "metric"]
PUBLISHED = ["published_mean", "published_stderr"]


class Names(dict):
    """Words for methods and the like; a name without words of its own is read as it is."""

    def __missing__(self, name: str) -> str:
        return name.replace("_", " ")


NAMES = Names(
    {
        "anomaly": "real anomaly",
        "untrained": "random network",
        "pretrained": "ImageNet features",
        "rotation": "Rotation",
        "cutout": "Cutout",
        "cutout_mean": "Cutout (mean)",
        "cutout_color": "Cutout (random colour)",
        "scar": "Scar",
        "confetti": "Confetti",
        "cutpaste": "CutPaste",
        "cutpaste_scar": "CutPaste-scar",
        "cutpaste_union": "Binary (union)",
        "cutpaste_3way": "CutPaste-3way",
        "pool_pretrained": "ImageNet, pooled",
        "pool_finetuned": "finetuned, pooled",
        "level7_pretrained": "ImageNet, level 7",
        "level7_finetuned": "finetuned, level 7",
        "cutpaste_3way_patch": "CutPaste-3way (patch)",
        "cutpaste_3way_patch_shared": "CutPaste-3way (patch, one Gaussian)",
        "cutpaste_3way_patch_wide": "CutPaste-3way (patch, windows of crop size)",
        "cutpaste_3way_patch_longer": "CutPaste-3way (patch, four times as long)",
        "untrained_shared": "random network (one Gaussian)",
        "untrained_ensemble": "random networks, ensemble",
        "one": "one Gaussian",
        "mixture": "mixture",
        "cutpaste_3way_gradcam": "CutPaste-3way (GradCAM)",
        "ensemble": "Ensemble",
        "docc": "DOCC (quoted)",
        "u_student": "U-Student (quoted)",
        "p_svdd": "P-SVDD (quoted)",
        "fcdd": "FCDD (quoted)",
    }
)
METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image average precision",
    "image_f1max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel average precision",
    "aupro_30": "AUPRO up to 30 % of false positives",
    "aupro_05": "AUPRO up to 5 % of false positives",
}
COLUMNS = [*KEYS, "mean", "stderr", "seeds", *PUBLISHED]


def published(table: str) -> pd.DataFrame:
    """The paper's numbers, percent: KEYS, published_mean, published_stderr.

    ``table`` is a name such as ``table1_image_level``; KeyError for one that the paper lacks. What
    only the text says (GradCAM's average, CIFAR-10's) stands with the table that it belongs to. In
    Table 7 a ``value`` is a multiple of the protocol's own learning rate or length.
    """
    text = pd.read_csv(TEXT).query("table == @table").drop(columns="table")
    if table not in TABLES and text.empty:
        raise KeyError(table)
    parts = [pd.read_csv(TABLES[table], dtype={"value": str})] if table in TABLES else []
    found = pd.concat([*parts, text] if len(text) else parts, ignore_index=True)
    return with_settings(found)[[*KEYS, *PUBLISHED]]


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


def summarise(runs: pd.DataFrame, metrics=("image_auroc",)) -> pd.DataFrame:
    """Mean, standard error and number of seeds for every row, category and metric.

    ``runs`` has a row a run, as ``collect`` gives them (and ``setting``, ``value``), or an
    ensemble of ``members`` of them. The standard error of one value is empty. Where a ``source``
    stands beside the category, a seed's value is its mean over the sources.
    """
    runs = with_settings(runs)
    if len(runs) and "source" in runs:
        runs = _over_sources(runs)
    runs = runs.assign(members=runs["members"].fillna(1) if "members" in runs else 1)
    tidy = runs.melt([*KEYS[:4], "members"], list(metrics), "metric", "percent")
    tidy["percent"] = tidy["percent"].astype(float)
    cells = tidy.dropna(subset="percent").groupby(KEYS)
    cells = cells.agg(mean=("percent", "mean"), stderr=("percent", "sem"), seeds=("members", "sum"))
    return cells.reset_index()


def _over_sources(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a method, category and seed: the mean over sources, where it has all that any has."""
    cells = runs.groupby([*KEYS[:4], "seed"])
    whole = cells["source"].transform("nunique") == runs["source"].nunique()
    return runs[whole].groupby([*KEYS[:4], "seed"], as_index=False).mean(numeric_only=True)


def with_averages(cells: pd.DataFrame, columns=("mean", "stderr")) -> pd.DataFrame:
    """The cells and the paper's averages of them: of means, and of standard errors (Table 1).

    An average stands only where every category under it does.
    """
    rows = [cells]
    for name, members in groups(cells["category"].unique()).items():
        part = cells[cells["category"].isin(members)]
        row = [*ROW, "metric"]
        whole = part.groupby(row).filter(lambda g, m=members: len(g) == len(m))
        if len(whole):
            spec = dict.fromkeys(columns, lambda v: v.mean(skipna=False)) | {"seeds": "min"}
            spec = {k: v for k, v in spec.items() if k in whole}
            rows.append(whole.groupby(row).agg(spec).reset_index())
            rows[-1]["category"] = name
    return pd.concat(rows, ignore_index=True)


def with_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with the columns ``setting`` and ``value``, empty where they have none."""
    missing = {name: "" for name in ROW[1:] if name not in runs}
    return runs.assign(**missing).fillna(dict.fromkeys(ROW[1:], ""))


def against_paper(
    runs: pd.DataFrame,
    table: str,
    *,
    rows: list[tuple[str, str, str]],
    metrics: tuple[str, ...] = ("image_auroc",),
    paper: bool = True,
) -> pd.DataFrame:
    """Our runs beside the paper's table: tidy columns (COLUMNS), in percent.

    Every row (ROW) stands in every category that was measured or published; what was not is empty.
    Without ``paper`` there are our numbers alone: a table of our own, or another data set.
    """
    ours = with_averages(summarise(runs, metrics))
    theirs = published(table) if paper else pd.DataFrame(columns=[*KEYS, *PUBLISHED])
    theirs = theirs[theirs["metric"].isin(metrics)].astype(dict.fromkeys(PUBLISHED, float))
    measured = list(runs["source" if "source" in runs else "category"].unique())
    if paper and "average_measured" in groups(measured):
        theirs = pd.concat([theirs, _average_measured(theirs, measured)])
    both = ours.merge(theirs, on=KEYS, how="outer")[COLUMNS]
    both["seeds"] = both["seeds"].astype("Int64")
    both["row"] = list(both[ROW].itertuples(index=False, name=None))
    both = both[both["row"].isin(rows)]
    order = {"row": rows, "category": in_order(both["category"]), "metric": metrics}
    return _sorted(both, **order).drop(columns="row")


def in_order(categories) -> list[str]:
    """Categories as the paper lists them, each group's average behind it, unknown ones last."""
    textures, objects = MVTEC.textures + DEMO.textures, MVTEC.objects + DEMO.objects
    known = [*textures, AVERAGES[0], *objects, *SYNTHETIC]
    own = sorted({*categories} - {*known, *AVERAGES})
    return [c for c in (*known, *own, *AVERAGES[1:]) if c in {*categories}]


def _average_measured(paper: pd.DataFrame, measured: list[str]) -> pd.DataFrame:
    """The paper's own numbers averaged over the categories that we measured."""
    part = paper[paper["category"].isin(measured)]
    mean = part.groupby([*ROW, "metric"]).mean(numeric_only=True).reset_index()
    return mean.assign(category="average_measured")


def _sorted(table: pd.DataFrame, **orders) -> pd.DataFrame:
    """Rows in the given order of each column's values."""
    ranks = {k: {v: i for i, v in enumerate(order)} for k, order in orders.items()}
    table = table.sort_values(list(orders), key=lambda c: c.map(ranks[c.name]))
    return table.reset_index(drop=True)


def common(table: pd.DataFrame, methods: tuple[str, ...], metric="image_auroc") -> pd.DataFrame:
    """Our means, categories down and methods across: only categories that every method has."""
    cells = table[(table["metric"] == metric) & ~table["category"].str.startswith("average")]
    grid = cells.pivot(index="category", columns="method", values="mean").reindex(columns=methods)
    return grid.dropna(how="all").dropna(axis=1, how="all").dropna()


def wide(table: pd.DataFrame, metric: str = "image_auroc") -> pd.DataFrame:
    """One metric, methods down and categories across, "ours (paper's)", named as in the paper.

    Columns: the measured categories (all that the paper has if nothing was measured), their
    averages unless there is but one, and ``average_all``. Rows: methods that have a number; those
    of Tables 7 and 8 are named by setting and value.
    """
    part = with_settings(table[table["metric"] == metric])
    part = part.dropna(subset=["mean", "published_mean"], how="all")
    labels = [
        f"{r.setting.replace('_', ' ')} {r.value}" if r.setting else NAMES.get(r.method, r.method)
        for r in part.itertuples()
    ]
    cells = part.assign(cell=[_cell(row) for row in part.itertuples()], row=labels)
    grid = cells.pivot(index="row", columns="category", values="cell")
    measured = {*part.dropna(subset="mean")["category"]} or {*part["category"]}
    if len(measured - {*AVERAGES}) == 1:  # averages of one category say nothing
        measured -= {*AVERAGES}
    columns = [c for c in in_order(part["category"]) if c in measured | {"average_all"}]
    grid = grid.reindex(index=cells["row"].unique(), columns=columns).fillna("")
    grid = grid.rename(columns={"average_measured": "average of the measured"})
    grid = grid.rename(columns=lambda name: name.replace("_", " "))
    return grid.rename_axis(index=None, columns=f"{METRIC_NAMES[metric]}, %")


def _cell(row) -> str:
    ours = _number(row.mean, row.stderr)
    theirs = _number(row.published_mean, row.published_stderr)
    return f"{ours} ({theirs})" if ours and theirs else f"({theirs})" if theirs else ours


def _number(mean, stderr) -> str:
    if pd.isna(mean):
        return ""
    return f"{mean:.1f}" if pd.isna(stderr) else f"{mean:.1f}±{stderr:.1f}"


def markdown(grid: pd.DataFrame) -> str:
    """A table as GitHub's Markdown, the index first."""
    head = [grid.index.name or grid.columns.name or "", *map(str, grid.columns)]
    lines = [
        head,
        ["---"] * len(head),
        *([i, *row] for i, row in zip(grid.index, grid.values, strict=True)),
    ]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def save_table(table: pd.DataFrame, results: str | Path, name: str, note: str) -> Path:
    """Write ``results/tables/<name>.csv``, tidy, and ``.md``, as ``wide`` shows it.

    ``note`` says how the numbers were measured and stands above the Markdown; it is kept in
    ``table.attrs``, too. Returns the path of the CSV.
    """
    columns = {"mean": "ours", "published_mean": "the paper's in brackets"}
    words = ", then ".join(text for name, text in columns.items() if table[name].notna().any())
    words = (words or "nothing measured").capitalize()
    table.attrs["note"] = f"{note} {words}; percent, mean±standard error."
    grids = [wide(table, metric) for metric in table["metric"].unique()]
    path = save_markdown(results, name, table.attrs["note"], grids).with_suffix(".csv")
    bare = [column for column in ROW[1:] if not table[column].any()]
    write_csv(path, table.drop(columns=bare))
    return path


def save_markdown(results: str | Path, name: str, note: str, grids: list[pd.DataFrame]) -> Path:
    """Write ``results/tables/<name>.md``, a note and then each grid that has rows; its path."""
    path = Path(results) / "tables" / f"{name}.md"
    write_text(path, "\n".join([f"{note}\n", *(markdown(grid) for grid in grids if len(grid))]))
    return path


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table of numbers, four digits behind the point."""
    with atomic(path) as part:
        table.to_csv(part, index=False, float_format="%.4f")
