"""Ours beside the paper's: means, averages, and each table as CSV and as Markdown."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from cplib import datasets
from cplib.augment import DRAWS_VERSION
from cplib.datasets import atomic, write_text
from cplib.run import Run
from cplib.study.paper import (
    AVERAGES,
    KEYS,
    PRINTED,
    PUBLISHED,
    ROW,
    groups,
    in_order,
    published,
    with_settings,
)
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.synthetic import SIDE, SYNTHETIC
from cplib.study.tables import NAMES, RELATIVE, SCORES, TABLES, plan, planned, rows_of
from cplib.study.workspace import Workspace

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
TIE = 0.05  # points: one digit is printed, so a difference below it is none


def compare(workspace: Workspace, name: str, values: pd.DataFrame) -> pd.DataFrame:
    """The tidy table (COLUMNS) of measured values, ours beside the paper's; saved, too."""
    table = TABLES[name]
    paper = datasets.DATASETS[workspace.profile.dataset].published and name in PRINTED
    rows = [row.cell for row in rows_of(workspace.profile, name)]
    tidy = against_paper(values, name, rows=rows, metrics=table.metrics, paper=paper).round(4)
    save_table(tidy, workspace.results, name, caption(workspace, name, values))
    return tidy


def caption(workspace: Workspace, name: str, values: pd.DataFrame) -> str:
    """A line above a table: what its training changes of the paper's, its seeds, what it lacks."""
    profile, table, used = workspace.profile, TABLES[name], {*values["id"]}
    entries = [(row, run) for row, run in plan(workspace, name) if run.id in used]
    trained = [(row, run) for row, run in entries if run.needs_training]
    parts = [f"Profile {profile.name}"]
    own = [pair for pair in trained if pair[0].measure == SCORES and not pair[0].changes]
    if own := own or trained:
        row, run = own[-1]
        other = differing(run, PROFILES["paper"].run(run.method, run.category, 0, row.protocol))
        changed = ", ".join(f"{k} {v}" for k, v in other.items())
        parts += [f"changed from the paper: {changed}"] if other else []
    parts += ["one setting is changed in each row"] if table.axes else []
    features = {run.backbone for row, run in entries if row.key == "pretrained"}
    features -= {run.backbone for _, run in trained}
    parts += [f"ImageNet features of {backbone}" for backbone in features]
    parts += [_seeds(values) or "nothing was measured"]
    parts += [] if trained else ["nothing was trained for this table"]
    if {*values["category"]} & {*SYNTHETIC}:
        low, high = (100 * share for share in SIDE)
        parts += [f"shapes of {low:.3g} to {high:.3g} % of a side"]
    finished = workspace.finished(run for _, run in trained)
    records = {run: record for run, (record, _) in finished.items()}
    old = {record["draws"] for record in records.values()} - {DRAWS_VERSION}  # not mixed
    parts += [f"random draws of version {version}, not {DRAWS_VERSION}" for version in old]
    normal = dict(_images(records)["normal"]) if records else {}
    few = ", ".join(f"{name} {found}" for name, found in normal.items() if "of" in str(found))
    parts += [f"normal test images: {few}"] if few else []
    return f"{'; '.join(parts)}. {table.note}".strip()


def differing(run: Run, base: Run) -> dict[str, object]:
    """The fields of a run's protocol that have another value than another run's."""
    no_protocol = {"method", "category", "seed", "dataset", "curve"}
    fields, others = asdict(run), asdict(base)
    return {k: v for k, v in fields.items() if v != others[k] and k not in no_protocol}


def _seeds(values: pd.DataFrame) -> str:
    """How many seeds a cell has, by method if they differ: "3 seeds, but 1 for Confetti"."""
    found = values[~values["method"].str.contains("pretrained|ensemble")]
    found = found.groupby(["method", "source" if "source" in found else "category"], sort=False)
    words = {}
    for method, counts in found["seed"].nunique().groupby("method", sort=False):
        text = " to ".join(map(str, sorted({counts.min(), counts.max()})))
        words.setdefault(text, []).append(NAMES[method])
    most = max(words, key=lambda text: len(words[text]), default="")
    said = {text: f"{text} for {', '.join(names)}" for text, names in words.items()}
    if len(words) > 1 and " to " in most:
        return f"seeds: {', '.join(said.values())}"
    others = [said[text] for text in words if text != most]
    plain = most and f"{most} seed{'s' * (most != '1')}"
    return f"{plain}, but {' and '.join(others)}" if others else plain


def summarise(runs: pd.DataFrame, metrics=("image_auroc",)) -> pd.DataFrame:
    """Mean, standard error and number of seeds for every row, category and metric.

    ``runs`` has a row a run, as ``tables.values`` gives them, or an
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


def with_averages(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells and the paper's averages of them: of means, and of standard errors (Table 1).

    An average stands only where every category under it does.
    """
    rows = [cells]
    for name, members in groups(cells["category"].unique()).items():
        part = cells[cells["category"].isin(members)]
        row = [*ROW, "metric"]
        whole = part.groupby(row).filter(lambda g, m=members: len(g) == len(m))
        if len(whole):
            spec = dict.fromkeys(("mean", "stderr"), lambda v: v.mean(skipna=False)) | {
                "seeds": "min"
            }
            spec = {k: v for k, v in spec.items() if k in whole}
            rows.append(whole.groupby(row).agg(spec).reset_index())
            rows[-1]["category"] = name
    return pd.concat(rows, ignore_index=True)


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
    theirs = pd.concat([theirs, *(_average_measured(theirs, runs, m) for m in metrics if paper)])
    both = ours.merge(theirs, on=KEYS, how="outer")[COLUMNS]
    both["seeds"] = both["seeds"].astype("Int64")
    both["row"] = list(both[ROW].itertuples(index=False, name=None))
    both = both[both["row"].isin(rows)]
    order = {"row": rows, "category": in_order(both["category"]), "metric": metrics}
    return _sorted(both, **order).drop(columns="row")


def _average_measured(paper: pd.DataFrame, runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The paper's own numbers of a metric, averaged over the categories where we measured it."""
    measured = runs.dropna(subset=metric)["source" if "source" in runs else "category"].unique()
    if "average_measured" not in groups(measured):
        return paper[:0]
    part = paper[paper["category"].isin(measured) & (paper["metric"] == metric)]
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
    averages of more than one, and ``average_all``; where the paper prints averages alone, all of
    them, those without a number of ours last. Rows: methods that have a number; those of Tables 7
    and 8 are named by setting and value.
    """
    part = with_settings(table[table["metric"] == metric])
    part = part.dropna(subset=["mean", "published_mean"], how="all")
    labels = [
        f"{r.setting.replace('_', ' ')} {'× ' * (r.setting in RELATIVE)}{r.value}"
        if r.setting
        else NAMES.get(r.method, r.method)
        for r in part.itertuples()
    ]
    cells = part.assign(cell=[_cell(row) for row in part.itertuples()], row=labels)
    grid = cells.pivot(index="row", columns="category", values="cell")
    measured = {*part.dropna(subset="mean")["category"]} or {*part["category"]}
    members = groups(measured - {*AVERAGES})
    measured -= {name for name, under in members.items() if len(under) == 1}
    printed = {*part.dropna(subset="published_mean")["category"]}
    measured |= printed if printed <= {*AVERAGES} else {"average_all"}
    columns = [c for c in in_order(part["category"]) if c in measured]
    grid = grid.reindex(index=cells["row"].unique(), columns=columns).fillna("")
    names = NAMES | {"average_all": "mean of the kinds"} if measured & {*SYNTHETIC} else NAMES
    if printed <= {*AVERAGES}:
        theirs = printed - {*part.dropna(subset="mean")["category"]}
        grid = grid[sorted(columns, key=theirs.__contains__)]
        grid = grid.rename(columns={c: f"the paper's {NAMES[c]}" for c in theirs})
    grid = grid.rename(columns=lambda name: names.get(name, name))
    return grid.rename_axis(index=None, columns=f"{METRIC_NAMES[metric]}, %")


def _cell(row) -> str:
    ours = number(row.mean, row.stderr)
    theirs = number(row.published_mean, row.published_stderr)
    return f"{ours} ({theirs})" if ours and theirs else f"({theirs})" if theirs else ours


def number(mean: float, stderr: float) -> str:
    """A mean and its standard error as the paper prints them, "" for nothing."""
    if pd.isna(mean):
        return ""
    return f"{mean:.1f}" if pd.isna(stderr) else f"{mean:.1f}±{stderr:.1f}"


def signed(points: float) -> str:
    """A difference with its sign; one that rounds to zero has none."""
    points = round(points, 6)  # a half, to the last bit, is one number wherever it stands
    return "0.0" if abs(points) < TIE else f"{points:+.1f}"


def as_markdown(table: pd.DataFrame) -> str:
    """A table of ``compare``: how it was measured, then ``by_metric``."""
    return f"{table.attrs['note']}\n\n{by_metric(table)}"


def by_metric(table: pd.DataFrame) -> str:
    """Each metric of a table as ``wide`` shows it, in Markdown; all but the first are folded."""
    grids = [wide(table, metric) for metric in table["metric"].unique()]
    first, *others = [grid for grid in grids if len(grid)] or [pd.DataFrame()]
    names = ", ".join(grid.columns.name.removesuffix(", %") for grid in others)
    more = folded(names, "\n".join(map(markdown, others)))
    return markdown(first) * (len(first) > 0) + f"\n{more}" * bool(more)


def folded(title: str, text: str) -> str:
    """A text in Markdown that a click on its title shows; nothing without a text."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>\n" if text else ""


def markdown(grid: pd.DataFrame, form: str = "{}") -> str:
    """A table as GitHub's Markdown, the index first; ``form`` formats what is in a cell."""
    head = [grid.index.name or grid.columns.name or "", *map(str, grid.columns)]
    cells = grid.map(lambda cell: "" if pd.isna(cell) else form.format(cell))
    lines = [head, ["---"] * len(head), *cells.itertuples(name=None)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def save_table(table: pd.DataFrame, results: str | Path, name: str, note: str) -> Path:
    """Write ``results/tables/<name>.csv``, tidy, and ``.md``, as ``wide`` shows it.

    ``note`` says how the numbers were measured and stands above the Markdown; it is kept in
    ``table.attrs``, too. Returns the path of the CSV.
    """
    columns = {"mean": "ours", "published_mean": "in brackets the paper's numbers"}
    words = ", ".join(text for name, text in columns.items() if table[name].notna().any())
    words = (words or "nothing measured").capitalize()
    errors = table[["stderr", "published_stderr"]].notna().any(axis=None)
    table.attrs["note"] = f"{note} {words}; percent{', mean±standard error' * bool(errors)}."
    path = Path(results) / "tables" / f"{name}.csv"
    write_text(path.with_suffix(".md"), as_markdown(table))
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


def read_table(results: str | Path, name: str) -> pd.DataFrame:
    """A table as ``save_table`` wrote it; empty where there is none."""
    file = Path(results) / "tables" / f"{name}.csv"
    if not file.exists():
        return pd.DataFrame(columns=COLUMNS)
    return with_settings(pd.read_csv(file, dtype={"value": str}))


# A profile in words: its protocol, and the result of a table


def protocol(workspace: Workspace) -> str:
    """What a profile changes of the paper's protocol, and with what it was measured: Markdown."""
    finished = workspace.finished(planned(workspace))
    records = {run: record for run, (record, _) in finished.items()}
    if not records:
        return ""
    run = workspace.profile.run(METHOD, next(iter(records)).category)
    paper = Run(method=METHOD, category=run.category)
    rows = {k: [getattr(paper, k), v] for k, v in differing(run, paper).items()}
    grid = pd.DataFrame.from_dict(rows, orient="index", columns=["the paper", "here"])
    trained = [record for run, record in records.items() if run.needs_training]
    precisions, devices = (
        " and ".join(sorted({r[key] for r in trained})) for key in ("precision", "device")
    )
    files = sorted({r["weights"]["file"] for r in records.values() if r["weights"]})
    text = f"Training was in {precisions or 'no precision'} ({devices or 'nothing was trained'}); "
    text += "scores are computed in fp32."
    text += f" ImageNet weights: {', '.join(f'`{file}`' for file in files)}." if files else ""
    text += " [More on images and weights](../../docs/protocol.md#images-and-weights)."
    parts = [markdown(grid.rename_axis("field of `Run`")), text, markdown(_images(records))]
    return "\n\n".join(part.strip() for part in parts)


def _images(records: dict[Run, dict]) -> pd.DataFrame:
    """The numbers of images of each category, and of MVTec AD's where fewer were available."""
    here = {run.category: record["images"] for run, record in records.items()}
    data, rows = datasets.DATASETS[next(iter(records)).dataset], {}
    for name in in_order(here):
        rows[name] = {"size, px": "x".join(map(str, here[name]["size"]))}
        for sort in ("train", "normal", "anomalous", "masks"):
            numbers, found = getattr(data, sort.replace("masks", "anomalous")), here[name][sort]
            official = numbers[data.categories.index(name)] if numbers else found
            rows[name][sort] = found if found == official else f"{found} (of {official})"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("images")


def result(table: pd.DataFrame, name: str) -> str:
    """A table's result in Markdown, by its first metric; empty if it compares no main row.

    For each main row (``Table.compared``): its mean, how far that is from the paper's number and
    from the rows it is compared with, and where it is lowest.
    """
    metric = next(iter(table["metric"]), "")
    table = table[table["metric"] == metric].dropna(subset="mean")
    if table.empty:
        return "Nothing is measured yet."
    cells = table[~table["category"].str.startswith("average")]
    grid = cells.pivot_table("mean", "category", "method", sort=False)
    what = "kinds" if {*cells["category"]} & {*SYNTHETIC} else "categories"
    pairs = [pair for pair in TABLES[name].compared if pair[0] in grid]
    text = []
    for main in dict.fromkeys(row for row, _ in pairs):
        own = cells[cells["method"] == main].set_index("category")
        gaps = {"the paper's number": own["mean"] - own["published_mean"]}
        gaps = {} if what == "kinds" else gaps  # the paper's shapes have other sizes
        others = [other for row, other in pairs if row == main and other in grid]
        gaps |= {NAMES[o].replace("random", "a random"): grid[main] - grid[o] for o in others}
        gaps = {other: gap.dropna() for other, gap in gaps.items() if gap.notna().any()}
        text.append(_verdict(NAMES[main], METRIC_NAMES[metric], own["mean"], gaps, what))
    return "\n\n".join(text)


def _verdict(name: str, metric: str, own: pd.Series, gaps: dict, what: str) -> str:
    """A row's mean, its mean differences where they are on all its categories, and its lowest."""
    where = f"the mean of {len(own)} {what}" if len(own) > 1 else f"on {NAMES[own.index[0]]}"
    whole = {other: gap for other, gap in gaps.items() if len(gap) == len(own)}
    said = [f"{_apart(gap.mean(), ' points')} {o}{_moved(gap)}" for o, gap in whole.items()]
    text = f"**{name}: {own.mean():.1f} % {metric}**, {where}"
    text += f": {', '.join(said)}." if said else "."
    return text + f" It is lowest on {NAMES[own.idxmin()]} ({own.min():.1f})." * (len(own) > 1)


def _moved(gaps: pd.Series) -> str:
    """The mean difference without the category that moves it most, if that is a third of it."""
    if len(gaps) < 3:
        return ""
    most = (gaps - gaps.mean()).abs().idxmax()
    rest = gaps.drop(most).mean()
    third = abs(rest - gaps.mean()) >= abs(gaps.mean()) / 3
    return f" ({_apart(rest)} without {NAMES[most]})" if third else ""


def _apart(gap: float, unit: str = "") -> str:
    """A difference in words: "3.2 points above", or "equal to" where it rounds to 0."""
    words = f"{abs(gap):.1f}{unit} {'above' if gap > 0 else 'below'}"
    return words if round(gap, 1) else f"equal{' to' * bool(unit)}"
