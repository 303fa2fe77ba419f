"""README.md from its template: every measured number in it is looked up in the records."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd

from cplib.apps.workspace import ROOT
from cplib.augment import METHODS
from cplib.run import Run
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.published import markdown
from cplib.study.store import run_folder

TEMPLATE = ROOT / "docs" / "README.template.md"
PORTS = Path(__file__).parents[1] / "study" / "paper" / "other_implementations.csv"
TABLES = {"1": "table1_image_level", "2": "table2_pixel_level"}
PARTS = {"Understand": "00 01 02 03 04", "Check": "05 06 07 08 09 10 11", "Use": "12"}


def filled(template: str) -> str:
    """The template with a value in place of each ``{{name words}}``: a function of ``FILLS``."""

    def value(match: re.Match) -> str:
        name, *words = match[1].split()
        return FILLS[name](*words)

    return re.sub(r"\{\{(.+?)\}\}", value, template)


def table(profile: str, number: str) -> pd.DataFrame:
    """Table 1's image AUROC or Table 2's pixel AUROC, tidy, indexed by method and category."""
    name = TABLES[number]
    rows = pd.read_csv(ROOT / "results" / profile / "tables" / f"{name}.csv")
    return rows[rows["metric"] == f"{name[7:12]}_auroc"].set_index(["method", "category"])


def cell(profile: str, number: str, method: str, category: str, column: str = "mean") -> str:
    """A number of a table; ``column`` "short": how many points ours is lower than the paper's."""
    row = table(profile, number).loc[method, category]
    value = row["published_mean"] - row["mean"] if column == "short" else row[column]
    if pd.isna(value):
        raise ValueError(f"nothing is measured: {profile} {number} {method} {category}")
    return f"{value:.1f}"


def gain(category: str) -> str:
    """How many points the longer training is above the shorter one."""
    long, quick = (table(p, "1").loc[(METHOD, category), "mean"] for p in ("long", "quick"))
    return f"{long - quick:.1f}"


def measured(number: str = "1") -> list[str]:
    """The categories in which our CutPaste-3way was measured."""
    method = METHOD if number == "1" else f"{METHOD}_patch"
    ours = table("quick", number).loc[method]["mean"].dropna()
    return [name for name in ours.index if not name.startswith("average")]


def minutes(profile: str) -> str:
    """The median minutes that one of Table 1's CutPaste-3way networks was trained, in words."""
    profile = PROFILES[profile]
    runs = profile.runs((METHOD,), measured())
    folders = [run_folder(run, ROOT / "results" / profile.name) for run in runs]
    records = [json.loads((f / "run.json").read_text("utf-8")) for f in folders if f.exists()]
    taken = pd.Series([record["train_seconds"] for record in records])
    return f"{taken.median() / 60:.0f} minutes"


def images(profile: str) -> str:
    """How many images training shows to one CutPaste-3way network."""
    run = (
        Run(method=METHOD, category="") if profile == "paper" else PROFILES[profile].run(METHOD, "")
    )
    n = run.updates * run.sources * len(METHODS[METHOD])
    return f"{n / 1e6:.1f} million" if n >= 1e6 else f"{n:,}"


def results() -> str:
    """Six rows of image AUROC: the paper, ours, two networks without training, own photos."""
    rows, quick = {}, table("quick", "1")
    categories = measured()
    shown = {
        "CutPaste-3way, the paper": quick.loc[METHOD]["published_mean"],
        f"CutPaste-3way, ours, {minutes('long')}": table("long", "1").loc[METHOD]["mean"],
        f"CutPaste-3way, ours, {minutes('quick')}": quick.loc[METHOD]["mean"],
        "ImageNet features (ResNet-18)": quick.loc["pretrained"]["mean"],
        "random network (ResNet-18)": quick.loc["untrained"]["mean"],
        "for own photos (notebook 12)": own()["image_auroc"],
    }
    for label, values in shown.items():
        values = values.reindex(categories)
        cells = {name: f"{value:.1f}" for name, value in values.items()}
        rows[label] = cells | {"mean": f"**{values.mean(skipna=False):.1f}**"}
    return markdown(pd.DataFrame(rows).T.rename_axis("image AUROC, %"))


def own() -> pd.DataFrame:
    """The recommended detector of notebook 12 on each category, as if it were own photos."""
    rows = pd.read_csv(ROOT / "results" / "quick" / "tables" / "own_images.csv")
    return rows[rows["recommended"] == 1].set_index("category")


def own_mean(column: str, digits: str = "1") -> str:
    """A column of ``own`` averaged over the categories."""
    return f"{own()[column].mean():.{digits}f}"


def notebooks(part: str) -> str:
    """A part's notebooks: what is in each, its executed copies, its minutes with the demo set."""
    taken = json.loads((ROOT / "results" / "demo" / "minutes.json").read_text(encoding="utf-8"))
    rows = {}
    for number in PARTS[part].split():
        (path,) = ROOT.glob(f"notebooks/{number}_*.ipynb")
        first = nbformat.read(path, 4).cells[0].source
        title, expect = first.splitlines()[0].lstrip("# "), first.partition("*Expect*: ")[2]
        copies = {"demo set": "demo", "MVTec AD": "quick"}
        links = {name: f"results/{p}/notebooks/{path.name}" for name, p in copies.items()}
        links = {name: f"[open]({x})" if (ROOT / x).exists() else "" for name, x in links.items()}
        what = {"what": re.split(r"[.;:]", expect)[0]}
        rows[title] = what | links | {"minutes": taken[path.stem]}
    return markdown(pd.DataFrame(rows).T.rename_axis(part))


def ports() -> str:
    """Other implementations and their means over the categories that we measured."""
    rows = pd.read_csv(PORTS, index_col="implementation")
    mean = rows[measured()].mean(axis=1, skipna=False).map("{:.1f}".format)
    names = [f"[{name}](https://github.com/{name})" for name in rows.index]
    rows = rows[["method", "weights", "checkpoint"]].assign(**{f"mean of {len(measured())}": mean})
    return markdown(rows.set_axis(names).rename_axis("implementation"))


def port(name: str) -> str:
    """An implementation's mean over the categories that we measured."""
    return f"{pd.read_csv(PORTS, index_col='implementation').loc[name, measured()].mean():.1f}"


def claims(*verdicts: str) -> str:
    """How many of the paper's claims have one of these verdicts; all of them without any."""
    found = pd.read_csv(ROOT / "results" / "quick" / "tables" / "claims.csv")["verdict"]
    return str(int(found.str.replace(" ", "_").isin(verdicts).sum() if verdicts else len(found)))


FILLS = {
    function.__name__: function
    for function in (
        *(
            cell,
            gain,
            minutes,
            images,
            results,
            own_mean,
            notebooks,
        ),
        *(ports, port, claims),
    )
}
