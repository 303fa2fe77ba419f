"""The tables as data: a row is a method, the fields of ``Run`` that it changes, and a measure."""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import numpy as np
import pandas as pd

from cplib.datasets import DATASETS
from cplib.metrics import IMAGE_METRICS, PIXEL_METRICS
from cplib.run import BASELINES, Run
from cplib.study import store
from cplib.study.measures import ensemble, measured, table_rows
from cplib.study.paper import ROW
from cplib.study.profiles import METHOD, PROFILES, TABLE1, Profile
from cplib.study.store import PEAK
from cplib.study.synthetic import FILLS, SHAPES
from cplib.study.workspace import Planned, Workspace

TABLE4 = ("cutout", "cutout_mean", "cutout_color", "confetti", "cutpaste")
TABLE5 = ("cutpaste", "cutpaste_scar", "cutpaste_union", METHOD)
TABLE6 = ("cutout", METHOD)
FINETUNED = ("pool_pretrained", "pool_finetuned", "level7_pretrained", "level7_finetuned")
RELATIVE = ("learning_rate", "updates")  # values are multiples of the protocol's own
SCORES = "scores"  # the measure that every run has
ALIGNED = "aligned"  # categories that always lie the same way (A.5)


@dataclass(frozen=True)
class Row:
    """A row of a table: which runs stand in it, and what is measured on them."""

    key: str  # its name in the CSV
    label: str = ""  # its name for people; empty: the method's
    method: str = ""  # of Run; empty: the key
    quoted: bool = False  # the paper quotes its numbers; nothing is run
    protocol: str = "image"  # see ``Profile.fields``
    changes: dict = field(default_factory=dict)  # fields of Run beside the protocol's
    measure: str = SCORES  # or "ensemble", or a record of ``measures.MEASURES``
    categories: tuple[str, ...] | str = ()  # only these; ALIGNED; empty: the table's
    seeds: int = 0  # exactly so many; 0: the profile's, and further ones that are stored
    setting: str = ""  # of Tables 7 and 8: what is changed, and its value
    value: str = ""

    @property
    def cell(self) -> tuple[str, str, str]:
        """What names the row in a CSV (``paper.ROW``)."""
        return self.key, self.setting, self.value


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, or what a figure is drawn from."""

    notebook: str  # its two digits
    rows: tuple[Row, ...] = ()
    axes: tuple[str, ...] = ()  # settings, each with a row for every value (see ``along``)
    categories: str = ""  # "categories" or "open_categories" of the study; empty: all
    metrics: tuple[str, ...] = ("image_auroc",)
    compared: tuple[tuple[str, str], ...] = ()  # rows whose difference its sentences give
    note: str = ""


quoted = partial(Row, quoted=True)
patch = partial(Row, protocol="patch")
tuned = partial(Row, protocol="finetune")


def image_rows(*methods: str, **fields) -> tuple[Row, ...]:
    """A row for each method, of image-level runs."""
    return tuple(Row(method, **fields) for method in methods)


ONE = {"changes": {"gaussians": "shared"}, "categories": ALIGNED}  # one Gaussian for all places
TABLES = {
    "table1_image_level": Table(
        notebook="03",
        rows=(
            quoted("docc", "DOCC (quoted)"),
            quoted("u_student", "U-Student (quoted)"),
            quoted("p_svdd", "P-SVDD (quoted)"),
            *image_rows(*BASELINES, *TABLE1),
            Row("ensemble", "Ensemble", method=METHOD, measure="ensemble"),
        ),
        metrics=IMAGE_METRICS,
        compared=tuple((METHOD, other) for other in BASELINES),
    ),
    "table2_pixel_level": Table(
        notebook="04",
        rows=(
            quoted("fcdd", "FCDD (quoted)"),
            quoted("p_svdd", "P-SVDD (quoted)"),
            patch("untrained"),
            patch("pretrained"),
            patch("untrained_shared", "random network (one Gaussian)", "untrained", **ONE),
            Row("cutpaste_3way_gradcam", "CutPaste-3way (GradCAM)", METHOD, measure="gradcam"),
            patch("cutpaste_3way_patch", "CutPaste-3way (patch)", METHOD),
            patch(
                "cutpaste_3way_patch_shared", "CutPaste-3way (patch, one Gaussian)", METHOD, **ONE
            ),
        ),
        metrics=PIXEL_METRICS,
        compared=tuple(("cutpaste_3way_patch", other) for other in BASELINES),
        note="GradCAM: the CutPaste-3way networks of Table 1.",
    ),
    "table3_pretrained_vs_finetuned": Table(
        notebook="05",
        rows=(
            tuned("untrained"),
            tuned("pool_pretrained", "ImageNet, pooled", "pretrained"),
            tuned("pool_finetuned", "finetuned, pooled", METHOD),
            tuned("level7_pretrained", "ImageNet, level 7", "pretrained", measure="level7"),
            tuned("level7_finetuned", "finetuned, level 7", METHOD, measure="level7"),
        ),
        compared=(
            ("pool_finetuned", "pool_pretrained"),
            ("level7_finetuned", "level7_pretrained"),
        ),
    ),
    "table4_cutout_variants": Table(
        notebook="06",
        rows=image_rows(*BASELINES, *TABLE4),
        compared=tuple(("cutpaste", other) for other in ("cutout", *BASELINES)),
    ),
    "table5_binary_vs_3way": Table(
        notebook="07",
        rows=image_rows(*BASELINES, *TABLE5),
        compared=tuple((METHOD, other) for other in ("cutpaste_union", *BASELINES)),
    ),
    "table6_synthetic_anomalies": Table(
        notebook="08",
        rows=image_rows(*BASELINES, *TABLE6, measure="synthetic-{anomalies}"),
        compared=tuple((METHOD, other) for other in ("cutout", *BASELINES)),
    ),
    "table7_learning_rate_and_epochs": Table(
        notebook="09", axes=("learning_rate", "updates"), categories="categories"
    ),
    "table8_jitter_and_patch_size": Table(
        notebook="09", axes=("patch_jitter", "max_area"), categories="categories"
    ),
    "unstated_choices": Table(  # ours: the paper is silent on them
        notebook="09", axes=("head", "translate", "jitter"), categories="open_categories"
    ),
}
# Measured for notebooks, without a table: ``records``, ``curves`` and ``values`` read it.
FIGURES = {
    "brightness": Table(notebook="03", rows=image_rows("untrained", measure="brightness", seeds=1)),
    "curves": Table(notebook="13", rows=image_rows(METHOD)),
    "density": Table(notebook="09", rows=image_rows(METHOD, measure="density")),
    "features": Table(notebook="10", rows=image_rows(*BASELINES, METHOD, measure="features")),
    "gradcam_copies": Table(
        notebook="04", rows=image_rows(METHOD, measure="gradcam_copies", seeds=1)
    ),
    "maps": Table(notebook="04", rows=(patch(METHOD, measure="maps", seeds=1),)),
}
ALL = TABLES | FIGURES


# Which runs a table takes


def rows_of(profile: Profile, name: str) -> list[Row]:
    """The rows of a table in a profile, those that it has in this profile alone last."""
    rows = list(ALL[name].rows)
    rows += [row for axis in ALL[name].axes for row in along(profile, axis)]
    for entry in profile.extra:
        fields = {k: v for k, v in entry.items() if k != "table"}
        rows += [Row(**fields)] if entry["table"] == name else []
    names = {"anomalies": profile.anomalies}
    return [replace(row, measure=row.measure.format(**names)) for row in rows]


def along(profile: Profile, axis: str) -> list[Row]:
    """The rows of Tables 7 and 8 along one setting; one of them changes nothing."""
    base = profile.run(METHOD, profile.categories[0], protocol="sensitivity")
    rows = []
    for x in profile.sensitivity[axis]:
        changes = {axis: x}
        if axis == "max_area":
            changes = {"area": (base.area[0], x)}
        elif axis == "learning_rate":
            changes = {axis: float(f"{x * base.learning_rate:.3g}")}
        elif axis == "updates":
            changes = {axis: round(x * base.updates)}
        changes = {} if replace(base, **changes) == base else changes | {"curve": 0}
        options = {"protocol": "sensitivity", "setting": axis, "value": _text(x)}
        rows.append(Row(METHOD, changes=changes, **options))
    return rows


def _text(value: float | tuple) -> str:
    """0.333 as it is, (512, 128) as "512-128", many of a kind as "8x512", no width as "linear"."""
    if not isinstance(value, tuple):
        return f"{value:.3g}"
    parts = [(f"{v:g}", len([*same])) for v, same in groupby(value)]
    return "-".join(f"{n}x{v}" if n > 4 else "-".join([v] * n) for v, n in parts) or "linear"


def plan(workspace: Workspace, name: str) -> list[tuple[Row, Run]]:
    """A table's runs, each with its row: where profile, row, category and seed come together.

    Runs of further seeds stand in it, too, where they are stored. In Tables 7 and 8 every row has
    as many seeds as the changed rows; of the unchanged one, Table 1's run, more may be stored.
    """
    profile, table = workspace.profile, ALL[name]
    there, wanted = store.stored(workspace.results), categories(workspace, table.categories)
    rows, aligned = rows_of(profile, name), DATASETS[profile.dataset].aligned
    least = workspace.seeds or 0

    def run_of(row: Row, category: str, seed: int) -> Run:
        method, changes = row.method or row.key, row.changes
        return profile.run(method, category, seed, row.protocol, **changes)

    def seeds(fewest: int, cells: list[tuple[Row, str]]) -> int:
        while any(run_of(*cell, fewest).id in there for cell in cells):
            fewest += 1
        return fewest

    every = [(row, category) for row in rows if row.changes for category in wanted]
    study = seeds(profile.seeds_of(METHOD, "sensitivity", least), every) if table.axes else 0
    found = []
    for category in wanted:
        for row in rows:
            only = aligned if row.categories == ALIGNED else row.categories or (category,)
            if category in only and not row.quoted:
                own = profile.seeds_of(row.method or row.key, row.protocol, least)
                n = study or row.seeds or seeds(own, [(row, category)])
                found += [(row, run_of(row, category, seed)) for seed in range(n)]
    return found


def categories(workspace: Workspace, named: str) -> list[str]:
    """The categories of a table: those that the profile names for it, or all.

    If none of these is to be executed, the first one that is stands beside them.
    """
    profile = workspace.profile
    chosen = profile.sensitivity[named] if named else ()
    few = [c for c in workspace.shown if c in chosen or not chosen]
    return few if {*few} & {*workspace.categories} else [*few, workspace.categories[0]]


def planned(workspace: Workspace, *names: str) -> Planned:
    """The runs of these tables (of all without a name), each with the measures wanted of it."""
    found = {}
    for name in names or ALL:
        for row, run in plan(workspace, name):
            measures = found.setdefault(run, [])
            if row.measure not in (SCORES, "ensemble", *measures):
                measures.append(row.measure)
    return found


# What was measured


def measure(workspace: Workspace, name: str) -> pd.DataFrame:
    """Execute what is missing of a table (small profiles alone), then return its ``values``.

    In other profiles, with data, a line says how many are missing and which command trains them.
    """
    workspace.complete(planned(workspace, name), ALL[name].notebook)
    return values(workspace, name)


def values(workspace: Workspace, name: str) -> pd.DataFrame:
    """What was measured, from the records: a row a measured run with ROW, ``category``, ``seed``.

    ``id`` is the run's; the other columns are the table's metrics. Table 6 has a row for each kind
    of anomaly, as ``category``, and the run's category as ``source``. Image-level metrics are empty
    where less than half of the data set's normal test images were available.
    """
    entries = plan(workspace, name)
    finished = workspace.finished([run for _, run in entries])
    data, found, ensembles = DATASETS[workspace.profile.dataset], [], []
    official = dict(zip(data.categories, data.normal, strict=bool(data.normal)))
    for row, run in entries:
        if run not in finished:
            continue
        head = dict(zip(ROW, row.cell, strict=True))
        head |= {"category": run.category, "seed": run.seed, "id": run.id}
        if row.measure == "ensemble":
            ensembles.append(run)
        elif row.measure == SCORES:
            record, metrics = finished[run]
            found.append(head | metrics)
            if 2 * record["images"]["normal"] < official.get(run.category, 0):
                found[-1] |= dict.fromkeys(IMAGE_METRICS, np.nan)
        elif record := measured(run, row.measure, workspace.results):
            found += [head | part for part in table_rows(row.measure, run, record)]
    if ensembles:
        random = [run for row, run in entries if row.key == "untrained" and run in finished]
        found += ensemble("ensemble", ensembles, workspace.results)
        found += ensemble("untrained_ensemble", random, workspace.results)
    words = [*ROW, "category", "seed", "id"]
    frame = pd.DataFrame(found, columns=words if not found else None)
    numbers = [c for c in frame if c not in (*words, "source")]
    frame[numbers] = frame[numbers].astype(float)  # None where nothing could be computed
    others = [c for c in (*IMAGE_METRICS, *PIXEL_METRICS, PEAK) if c not in frame]
    return frame.assign(**dict.fromkeys(others, np.nan))


def records(workspace: Workspace, name: str) -> dict[Run, dict]:
    """What a figure's measure found, by run; in a small profile what is missing is executed first.

    Runs without a record, or with an empty one, are left out.
    """
    workspace.complete(planned(workspace, name), ALL[name].notebook)
    entries = plan(workspace, name)
    finished = workspace.finished([run for _, run in entries])
    rows = [(run, row.measure) for row, run in entries if run in finished]
    found = {run: measured(run, measure, workspace.results) for run, measure in rows}
    return {run: record for run, record in found.items() if record}


def curves(workspace: Workspace) -> pd.DataFrame:
    """The test AUROC that finished runs noted on the way (never used to choose), a row a point.

    Columns: ``schedule``, ``category``, ``seed``, ``device``, ``update``, ``minutes`` of training
    on that device, ``auroc``.
    """
    columns = ["schedule", "category", "seed", "device", "update", "minutes", "auroc"]
    rows = rows_of(workspace.profile, "curves")
    entries = sorted(plan(workspace, "curves"), key=lambda entry: rows.index(entry[0]))
    parts = [pd.DataFrame(columns=columns)]
    for run, (record, _) in workspace.finished([run for _, run in entries]).items():
        if run.curve:
            noted = pd.read_csv(store.run_folder(run, workspace.results) / "history.csv")
            noted = noted.dropna(subset="image_auroc").rename(columns={"image_auroc": "auroc"})
            noted = noted.assign(schedule=schedule(run), minutes=noted["seconds"] / 60)
            parts.append(
                noted.assign(category=run.category, seed=run.seed, device=record["device"])
            )
    return pd.concat([p for p in parts if len(p)] or parts)[columns].reset_index(drop=True)


def schedule(run: Run) -> str:
    """How a run was trained, in words: "AdamW 0.001, 64-px crops, 640 updates"."""
    optimiser = {"sgd": "SGD", "adamw": "AdamW"}[run.optimizer]
    crops = f"{' and '.join(map(str, run.sides))}-px crops"
    images = crops if run.crop else f"whole images of {run.size} px"
    return f"{optimiser} {run.learning_rate:g}, {images}, {run.updates} updates"


# Names for people


class Names(dict):
    """Words for methods and the like; a name without words of its own is read as it is."""

    def __missing__(self, name: str) -> str:
        return name.replace("_", " ")


NAMES = Names(
    {
        "untrained": "random network",
        "untrained_ensemble": "random networks, ensemble",
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
        "one": "one Gaussian",  # of footnote 1
        "average_texture": "mean of textures",
        "average_object": "mean of objects",
        "average_all": "mean of all",
        "average_measured": "mean of the measured",
    }
)
NAMES |= {f"{s}_{fill}": f"{s} ({words})" for s in SHAPES for fill, words in FILLS.items()}
NAMES |= {row.key: row.label for table in ALL.values() for row in table.rows if row.label}
NAMES |= {e["key"]: e["label"] for p in PROFILES.values() for e in p.extra if "label" in e}
