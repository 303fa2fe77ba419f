"""README.md from its template: every measured number in it is looked up in the records."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd

from cplib.apps.workspace import ROOT
from cplib.study.claims import OURS, against_paper
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.report import markdown, number, read_table
from cplib.study.store import read, read_record, run_folder

TEMPLATE = ROOT / "docs" / "README.template.md"
PORTS = Path(__file__).parents[1] / "study" / "paper" / "other_implementations.csv"
TABLES = {  # a table's metric that README shows
    "1": ("table1_image_level", "image_auroc"),
    "2": ("table2_pixel_level", "pixel_auroc"),
    "2ap": ("table2_pixel_level", "pixel_ap"),
    "2pro": ("table2_pixel_level", "aupro_30"),
    "6": ("table6_synthetic_anomalies", "image_auroc"),
}
PARTS = {"Understand": "00 01 02 03 04", "Check": "05 06 07 08 09 10 11 13", "Use": "12"}


def filled(template: str) -> str:
    """The template with a value in place of each ``{{name words}}``: a function of ``FILLS``."""

    def value(match: re.Match) -> str:
        name, *words = match[1].split()
        return FILLS[name](*words)

    return re.sub(r"\{\{(.+?)\}\}", value, template)


def table(profile: str, number: str) -> pd.DataFrame:
    """One metric of a table, tidy, indexed by method and category."""
    name, metric = TABLES[number]
    rows = read_table(ROOT / "results" / profile, name)
    return rows[rows["metric"] == metric].set_index(["method", "category"])


def cell(profile: str, number: str, method: str, category: str, column: str = "mean") -> str:
    """A number of a table; ``column`` "short": how many points ours is lower than the paper's."""
    row = table(profile, number).loc[method, category]
    value = row["published_mean"] - row["mean"] if column == "short" else row[column]
    if pd.isna(value):
        raise ValueError(f"nothing is measured: {profile} {number} {method} {category}")
    return f"{value:.1f}"


def above(first: str, second: str, left_out: str = "") -> str:
    """How many points one method is above another in Table 1, over all or all but one category."""
    places = [category for category in measured() if category != left_out]
    first, second = (table("quick", "1")["mean"].loc[m].loc[places].mean() for m in (first, second))
    return f"{first - second:.1f}"


def without(category: str, column: str) -> str:
    """Table 1's mean of our CutPaste-3way, or of the paper's, over the others of ``measured``."""
    rows = table("quick", "1").loc[METHOD].reindex(measured())
    return f"{rows[column].drop(category).mean():.1f}"


def brightness(category: str) -> str:
    """The image AUROC of the images' mean brightness alone."""
    folder = run_folder(PROFILES["quick"].run("untrained", category), ROOT / "results" / "quick")
    return f"{read_record(folder / 'brightness.json')['image_auroc']:.1f}"


def changed(what: str) -> str:
    """Image AUROC of runs that are "long" or see "whole" images, beside Table 1: means."""
    profile, results = PROFILES["quick"], ROOT / "results" / "quick"
    (extra,) = [row for row in profile.extra if row["key"] == f"{METHOD}_{what}"]
    runs = [profile.run(METHOD, c, **extra["changes"]) for c in extra["categories"]]
    found = [read(run_folder(run, results))[-1]["image_auroc"] for run in runs]
    before = table("quick", "1")["mean"].loc[METHOD][[*extra["categories"]]].mean()
    return f"{before:.1f} to {sum(found) / len(found):.1f}"


def uncommitted() -> str:
    """How many runs on MVTec AD were made by code that was not committed, of how many."""
    files = ROOT.glob("results/*/runs/*/run.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return f"{sum('dirty' in str(r['git_commit']) for r in records)} of {len(records)}"


def measured() -> list[str]:
    """The categories of Table 1 in which our CutPaste-3way was measured."""
    ours = table("quick", "1").loc[METHOD]["mean"].dropna()
    return [name for name in ours.index if not name.startswith("average")]


def minutes(profile: str) -> str:
    """The median minutes that one of Table 1's CutPaste-3way networks was trained, in words."""
    profile = PROFILES[profile]
    runs = profile.runs((METHOD,), measured())
    folders = [run_folder(run, ROOT / "results" / profile.name) for run in runs]
    taken = pd.Series([read(folder)[1]["train_seconds"] for folder in folders if folder.exists()])
    return f"{taken.median() / 60:.0f} minutes"


def images(profile: str) -> str:
    """How many images training shows to one CutPaste-3way network."""
    n = PROFILES[profile].run(METHOD, "").images
    return f"{n / 1e6:.1f} million" if n >= 1e6 else f"{n:,}"


def results() -> str:
    """Image AUROC of the paper, of ours, of networks without CutPaste and of own photos."""
    quick = table("quick", "1")
    seeds = int(quick.loc[(METHOD, "average_measured"), "seeds"])
    shown = {
        "CutPaste-3way, the paper (5 seeds)": (METHOD, "published_mean", "published_stderr"),
        f"CutPaste-3way, ours ({seeds} seeds)": (METHOD, "mean", "stderr"),
        "ImageNet features (ResNet-18)": ("pretrained", "mean", "stderr"),
        "random network (ResNet-18)": ("untrained", "mean", "stderr"),
    }
    columns, found = [*measured(), "average_measured"], {}
    for label, (method, mean, error) in shown.items():
        part = quick.loc[method].reindex(columns)
        found[label] = [number(m, e) for m, e in zip(part[mean], part[error], strict=True)]
    values = own()["image_auroc"]
    values = [f"{value:.1f}" for value in (*values, values.mean())]
    found["not CutPaste: the detector for own photos"] = values
    grid = pd.DataFrame.from_dict(found, orient="index", columns=[*measured(), "mean"])
    return markdown(grid.rename_axis("image AUROC, %"))


def own() -> pd.DataFrame:
    """The recommended detector of notebook 12 on ``measured``, as if they were own photos."""
    rows = pd.read_csv(ROOT / "results" / "quick" / "tables" / "own_images.csv")
    return rows[rows["recommended"] == 1].set_index("category").reindex(measured())


def interval(claim: str) -> str:
    """The 95 % interval of a claim's difference, in points."""
    rows = pd.read_csv(ROOT / "results" / "quick" / "tables" / "claims.csv").set_index("id")
    low, high = rows.loc[claim, ["here_low", "here_high"]].astype(float)
    return f"{low:+.1f} to {high:+.1f}"


def behind() -> str:
    """The 95 % interval of how many points our mean in Table 1 is lower than the paper's."""
    low, high = against_paper(table("quick", "1").loc[METHOD].loc[measured()]).here()
    return f"{-high:.1f} to {-low:.1f}"


def photos(column: str, statistic: str) -> str:
    """The "mean" or "min" over the categories of a column of ``own``, or "each" of them."""
    values = own()[column]
    if statistic == "each":
        return ", ".join(f"{category} {value:.3g}" for category, value in values.items())
    return f"{values.agg(statistic):.1f}"


def notebooks(part: str) -> str:
    """A part's notebooks: what is in each, its executed copies, its minutes with the demo set."""
    taken = json.loads((ROOT / "results" / "demo" / "minutes.json").read_text(encoding="utf-8"))
    rows = {}
    for digits in PARTS[part].split():
        (path,) = ROOT.glob(f"notebooks/{digits}_*.ipynb")
        first = nbformat.read(path, 4).cells[0].source
        title, expect = first.splitlines()[0].lstrip("# "), first.partition("*Expect*: ")[2]
        copies = {"demo set": "demo", "MVTec AD": "quick"}
        links = {name: f"results/{p}/notebooks/{path.name}" for name, p in copies.items()}
        links = {name: f"[open]({x})" if (ROOT / x).exists() else "" for name, x in links.items()}
        what = {"what": re.split(r"[.;:] ", expect)[0]}
        rows[title] = what | links | {"minutes": taken[path.stem]}
    return markdown(pd.DataFrame(rows).T.rename_axis(part))


def ports() -> str:
    """Other implementations and their means over the categories that we measured."""
    rows = pd.read_csv(PORTS, index_col="implementation")
    mean = rows[measured()].mean(axis=1, skipna=False).map("{:.1f}".format)
    names = [f"[{name}](https://github.com/{name})" for name in rows.index]
    all_of_them = rows.loc[:, "carpet":].mean(axis=1).map("{:.1f}".format)
    means = {f"mean of our {len(measured())}": mean, "of all 15": all_of_them}
    rows = rows[["method", "weights", "checkpoint"]].assign(**means)
    return markdown(rows.set_axis(names).rename_axis("implementation"))


def port(name: str, category: str) -> str:
    """An implementation's number of a category."""
    return f"{pd.read_csv(PORTS, index_col='implementation').loc[name, category]:.1f}"


def claims(question: str = "here", *answers: str) -> str:
    """How many of the paper's claims have one of these answers to a question; all without any."""
    found = pd.read_csv(ROOT / "results" / "quick" / "tables" / "claims.csv")
    found = found[found["source"] != OURS][question].str.replace(" ", "_")
    return str(int(found.isin(answers).sum() if answers else len(found)))


NUMBERS = (cell, without, above, brightness, changed, uncommitted)
NUMBERS += (minutes, images, interval, behind, photos, port, claims)
FILLS = {function.__name__: function for function in (*NUMBERS, results, notebooks, ports)}
