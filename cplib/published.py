"""The paper's numbers, and ours beside them: tidy tables, and as the paper prints them."""

from pathlib import Path

import pandas as pd

from cplib.config import DEMO_OBJECTS, DEMO_TEXTURES, OBJECTS, SYNTHETIC, TEXTURES

TABLES = {p.stem: p for p in sorted((Path(__file__).parent / "paper").glob("table*.csv"))}
AVERAGES = ("average_texture", "average_object", "average_all", "average_measured")
TEXT = Path(__file__).parent / "paper" / "text_numbers.csv"  # averages that the paper's text gives
KEYS = ["method", "category", "metric"]
PUBLISHED = ["published_mean", "published_stderr"]
COLUMNS = [*KEYS, "mean", "stderr", "seeds", *PUBLISHED]


def published(table: str) -> pd.DataFrame:
    """The paper's numbers, percent: method, category, metric, published_mean, published_stderr.

    ``table`` is a name such as ``table1_image_level``; KeyError for one that the paper lacks. What
    only the text says (GradCAM's average, CIFAR-10's) stands with the table that it belongs to.
    """
    text = pd.read_csv(TEXT).query("table == @table").drop(columns="table")
    if table not in TABLES and text.empty:
        raise KeyError(table)
    parts = [pd.read_csv(TABLES[table])] if table in TABLES else []
    return pd.concat([*parts, text] if len(text) else parts, ignore_index=True)


def groups(categories) -> dict[str, list[str]]:
    """The averages of the paper's tables and the categories under each.

    For the demo set these are its own textures and objects; Table 6's kinds have one average.
    ``average_measured`` is there when only some of MVTec's categories are: an average that the
    paper does not print.
    """
    if {*categories} & {*SYNTHETIC}:
        return {"average_all": list(SYNTHETIC)}
    demo = set(categories) <= set(DEMO_TEXTURES + DEMO_OBJECTS)
    textures, objects = (DEMO_TEXTURES, DEMO_OBJECTS) if demo else (TEXTURES, OBJECTS)
    found = {
        "average_texture": list(textures),
        "average_object": list(objects),
        "average_all": [*textures, *objects],
    }
    if set(categories) < set(found["average_all"]):
        found["average_measured"] = [c for c in found["average_all"] if c in set(categories)]
    return found


def summarise(runs: pd.DataFrame, metrics=("image_auroc",)) -> pd.DataFrame:
    """Mean, standard error and number of seeds for every method, category and metric.

    ``runs`` has a row a run, as ``collect`` gives them, or an ensemble of ``members`` of them. The
    standard error of one value is empty. Where a ``source`` stands beside the category, a seed's
    value is its mean over the sources.
    """
    if len(runs) and "source" in runs:
        runs = _over_sources(runs)
    runs = runs.assign(members=runs["members"].fillna(1) if "members" in runs else 1)
    tidy = runs.melt([*KEYS[:2], "members"], list(metrics), "metric", "value")
    tidy["value"] = tidy["value"].astype(float)
    cells = tidy.dropna(subset="value").groupby(KEYS)
    cells = cells.agg(mean=("value", "mean"), stderr=("value", "sem"), seeds=("members", "sum"))
    return cells.reset_index()


def _over_sources(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a method, category and seed: the mean over sources, where it has all that any has."""
    cells = runs.groupby([*KEYS[:2], "seed"])
    whole = cells["source"].transform("nunique") == runs["source"].nunique()
    return runs[whole].groupby([*KEYS[:2], "seed"], as_index=False).mean(numeric_only=True)


def with_averages(cells: pd.DataFrame, columns=("mean", "stderr")) -> pd.DataFrame:
    """The cells and the paper's averages of them: of means, and of standard errors (Table 1).

    An average stands only where every category under it does.
    """
    rows = [cells]
    for name, members in groups(cells["category"].unique()).items():
        part = cells[cells["category"].isin(members)]
        whole = part.groupby(["method", "metric"]).filter(lambda g, m=members: len(g) == len(m))
        if len(whole):
            spec = dict.fromkeys(columns, lambda v: v.mean(skipna=False)) | {"seeds": "min"}
            spec = {k: v for k, v in spec.items() if k in whole}
            rows.append(whole.groupby(["method", "metric"]).agg(spec).reset_index())
            rows[-1]["category"] = name
    return pd.concat(rows, ignore_index=True)


def against_paper(
    runs: pd.DataFrame,
    table: str,
    *,
    methods: tuple[str, ...],
    metrics: tuple[str, ...] = ("image_auroc",),
    paper: bool = True,
) -> pd.DataFrame:
    """Our runs beside the paper's table: the contract's tidy columns, in percent.

    Every method stands in every category that was measured or published; what was not is empty.
    Without ``paper`` it is a table of our own, which has our numbers alone.
    """
    ours = with_averages(summarise(runs[runs["method"].isin(methods)], metrics))
    theirs = published(table) if paper else pd.DataFrame(columns=[*KEYS, *PUBLISHED])
    theirs = theirs[theirs["metric"].isin(metrics)].astype(dict.fromkeys(PUBLISHED, float))
    measured = list(runs["source" if "source" in runs else "category"].unique())
    if not set(measured) & {*TEXTURES, *OBJECTS}:  # the demo set has no published numbers
        theirs = theirs.iloc[:0]
    elif "average_measured" in groups(measured):
        theirs = pd.concat([theirs, _average_measured(theirs, measured)])
    both = ours.merge(theirs, on=KEYS, how="outer")
    both = both[both["method"].isin(methods)][COLUMNS]
    both["seeds"] = both["seeds"].astype("Int64")
    return _sorted(both, method=methods, category=in_order(both["category"]), metric=metrics)


def in_order(categories) -> list[str]:
    """Categories as the paper lists them, each group's average behind it, unknown ones last."""
    known = [*TEXTURES, *DEMO_TEXTURES, AVERAGES[0], *OBJECTS, *DEMO_OBJECTS, *SYNTHETIC]
    own = sorted({*categories} - {*known, *AVERAGES})
    return [c for c in (*known, *own, *AVERAGES[1:]) if c in {*categories}]


def _average_measured(paper: pd.DataFrame, measured: list[str]) -> pd.DataFrame:
    """The paper's own numbers averaged over the categories that we measured."""
    part = paper[paper["category"].isin(measured)]
    mean = part.groupby(["method", "metric"]).mean(numeric_only=True).reset_index()
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
    return grid.dropna(axis=1, how="all").dropna()


def orders(table: pd.DataFrame, name: str, methods: tuple[str, ...], names: dict) -> str:
    """A sentence: the order of the methods as we measured it, and as the paper's table has it."""
    grid = common(table, methods)
    if grid.empty or grid.shape[1] < 2:
        return "Too little was measured to order the methods."
    paper = published(name).query("category == 'average_all'").set_index("method")
    ours = grid.mean().sort_values(ascending=False)
    theirs = paper["published_mean"].reindex(ours.index).dropna().sort_values(ascending=False)
    first = " > ".join(f"{names[m]} {v:.1f}" for m, v in ours.items())
    second = " > ".join(f"{names[m]} {v:.1f}" for m, v in theirs.items())
    return f"Mean over {', '.join(grid.index)}: {first}. The paper's, over its fifteen: {second}."


def wide(table: pd.DataFrame, metric: str = "image_auroc") -> pd.DataFrame:
    """One metric as the paper prints it: categories down, methods across, "ours (paper's)"."""
    part = table[table["metric"] == metric]
    cells = part.assign(cell=[_cell(row) for row in part.itertuples()])
    grid = cells.pivot(index="category", columns="method", values="cell")
    rows, columns = in_order(part["category"]), part["method"].unique()
    return grid.reindex(index=rows, columns=columns).fillna("")


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
    head = [grid.index.name or "", *map(str, grid.columns)]
    lines = [
        head,
        ["---"] * len(head),
        *([i, *row] for i, row in zip(grid.index, grid.values, strict=True)),
    ]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def save_table(
    table: pd.DataFrame, results: str | Path, name: str, note: str, *, down: bool = False
) -> Path:
    """Write ``results/tables/<name>.csv``, tidy, and ``.md``, as the paper prints it.

    ``note`` says under which protocol the numbers were measured and stands above the Markdown, in
    which the methods go across, or ``down``. Returns the path of the CSV.
    """
    folder = Path(results) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    theirs = ", then the paper's in brackets" if table["published_mean"].notna().any() else ""
    parts = [f"{note}\n", f"Ours{theirs}; percent, mean±standard error.\n"]
    for metric in table["metric"].unique():
        grid = wide(table, metric)
        parts += [f"**{metric}**\n", markdown(grid.T if down else grid)]
    (folder / f"{name}.md").write_text("\n".join(parts))
    path = folder / f"{name}.csv"
    table.to_csv(path, index=False, float_format="%.4f")
    return path
