"""The paper's tables, and one of our own, as measured here: the runs behind each, the values."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from cplib import records, runs, sensitivity, sweep
from cplib.config import BASELINES, TABLE1, Run
from cplib.metrics import IMAGE_METRICS, PIXEL_METRICS
from cplib.published import against_paper, in_order, save_table
from cplib.schedule import cut_short
from cplib.workspace import Workspace

CUTOUTS = ("cutout", "cutout_mean", "cutout_color", "confetti", "cutpaste")
BINARY = ("cutpaste", "cutpaste_scar", "cutpaste_union", "cutpaste_3way")
LEVEL = 7  # of Table 3, the stem being 1: the sixth of EfficientNet's stages
PASTED = ("cutout", "cutpaste_3way")  # Table 6
FINETUNED = ("pool_pretrained", "pool_finetuned", "level7_pretrained", "level7_finetuned")
BOTH = "./run_all.sh --profile {} --data DIR --only 02,{}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the paper, or of what it does not state.

    ``values`` gives a row a measured run, with ``method`` (named as in ``rows``), ``category``,
    ``seed`` and the metrics; ``planned`` the runs that this takes, trained by notebook 02.
    """

    name: str  # of its files and of the paper's numbers
    notebook: str  # its two digits
    rows: tuple[str, ...]
    planned: Callable[[Workspace], list[Run]]
    values: Callable[[Workspace], pd.DataFrame]
    metrics: tuple[str, ...] = ("image_auroc",)
    seeds: Callable[[Workspace], str] = lambda workspace: ""  # in words, if not as in Table 1
    note: Callable[[Workspace, pd.DataFrame], str] = lambda workspace, values: ""
    down: bool = False  # in Markdown the rows go down, not across


def all_runs(workspace: Workspace) -> list[Run]:
    """Every run behind every table, each once, in the order in which they are wanted."""
    planned = [run for table in TABLES.values() for run in table.planned(workspace)]
    return list(dict.fromkeys(planned + cut_short(workspace.profile, workspace.categories)))


def estimate(workspace: Workspace) -> pd.DataFrame:
    """What the missing runs of all tables cost on this device."""
    name = runs.device_name(torch.device(workspace.device))
    return sweep.estimate(all_runs(workspace), workspace.results, name)


def measure(workspace: Workspace, name: str) -> pd.DataFrame:
    """The values of a table's runs; missing ones are executed first where the profile is small.

    Elsewhere a line says how many are missing and which command trains them.
    """
    table = TABLES[name]
    complete(workspace, table.planned(workspace), table.notebook)
    return table.values(workspace)


def complete(workspace: Workspace, planned: list[Run], notebook: str) -> None:
    """Execute what is missing of a notebook's runs where the profile is small, else say how to."""
    todo = workspace.missing(planned)
    if todo and workspace.profile.small:
        for outcome in workspace.execute(todo):
            if outcome.state != "done":
                print(f"{outcome.run.id}: {outcome.state}, {outcome.message}")
    elif todo:
        print(f"{len(todo)} of {len(planned)} runs are not there. To train them:")
        print(BOTH.format(workspace.profile.name, notebook))


def compare(workspace: Workspace, name: str, values: pd.DataFrame) -> pd.DataFrame:
    """The table in the contract's tidy columns, the paper's numbers beside; saved, too."""
    table = TABLES[name]
    rows = {"methods": table.rows, "metrics": table.metrics}
    tidy = against_paper(values, name, **rows, paper=name not in sensitivity.CHOICES)
    planned = table.planned(workspace)
    trained = sorted(filter(runs.trained, planned), key=lambda r: r.method != "cutpaste_3way")
    done = [r for r in trained if runs.run_folder(r, workspace.results).exists()]
    run = next(iter(done + trained), None)
    note = workspace.protocol(run, table.seeds(workspace)) + table.note(workspace, values)
    used = {runs.read(runs.run_folder(r, workspace.results))[1]["precision"] for r in done}
    note += f" Trained in {' and '.join(sorted(used))}, scored in fp32." if used else ""
    save_table(tidy, workspace.results, name, note, down=table.down)
    return tidy


def shown(table: pd.DataFrame, *others: str) -> pd.DataFrame:
    """The rows of a tidy table whose category was measured, or is among the ``others``."""
    measured = table.dropna(subset="mean")["category"].unique()
    return table[table["category"].isin([*measured, *others])]


def _image_level(workspace: Workspace) -> pd.DataFrame:
    """Table 1's runs, and the ensemble of the seeds of cutpaste_3way."""
    table = workspace.collect(workspace.runs())
    return pd.concat([table, runs.ensemble(workspace.results, table)])


def _pixel_level(workspace: Workspace) -> pd.DataFrame:
    """Table 2's patch models, and GradCAM of the image-level ones."""
    patch = workspace.collect(workspace.patch_runs())
    names = {"cutpaste_3way": "cutpaste_3way_patch"}
    cams = []
    for run in workspace.runs(("cutpaste_3way",)):
        if found := records.gradcam_metrics(run, **workspace.places):
            row = {"method": "cutpaste_3way_gradcam", "category": run.category, "seed": run.seed}
            cams.append(row | found)
    return pd.concat([patch.replace({"method": names}), pd.DataFrame(cams)])


def _finetuned(workspace: Workspace) -> pd.DataFrame:
    """Table 3's runs by their pooled features, and by those of a level of the same networks."""
    names = {"pretrained": "pool_pretrained", "cutpaste_3way": "pool_finetuned"}
    planned = workspace.finetune_runs()
    levels = []
    for run in (r for r in planned if r.method in names):
        if found := records.level_metrics(run, LEVEL, **workspace.places):
            method = names[run.method].replace("pool", f"level{LEVEL}")
            levels.append({"method": method, "category": run.category, "seed": run.seed} | found)
    pooled = workspace.collect(planned).replace({"method": names})
    return pd.concat([pooled, pd.DataFrame(levels)])


def _synthetic(workspace: Workspace) -> pd.DataFrame:
    """Table 6's runs: AUROC on each kind of anomaly, painted on each ``source`` category."""
    rows = []
    for run in workspace.ablation_runs((*BASELINES, *PASTED)):
        record = records.synthetic_metrics(run, workspace.anomaly, **workspace.places) or {}
        row = {"method": run.method, "source": run.category, "seed": run.seed}
        for kind, auroc in record.get("image_auroc", {}).items():
            rows.append(row | {"category": kind, "image_auroc": auroc})
    return pd.DataFrame(rows, columns=["method", "category", "source", "seed", "image_auroc"])


def _painted(workspace: Workspace, values: pd.DataFrame) -> str:
    """How Table 6's anomalies were painted, and on which pictures: the paper does not say."""
    anomaly, sources = workspace.anomaly, in_order(values["source"])
    low, high = (f"{100 * share:g}" for share in anomaly.side)
    digits = {"sklearn": "scikit-learn", "mnist": "MNIST"}[anomaly.digits]
    return (
        f" On the good test pictures of {', '.join(sources) or 'no category'}, at least "
        f"{anomaly.least} painted of each: {anomaly.count} in a picture, {low} to {high} % of its "
        f"side, digits of {digits}. A cell is the mean over these categories."
    )


def _others(workspace: Workspace) -> str:
    return str(workspace.seeds or workspace.profile.other_seeds)


def _ablation(name: str, notebook: str, methods: tuple[str, ...], **fields) -> Table:
    rows = (*BASELINES, *methods)
    return Table(
        name=name,
        notebook=notebook,
        rows=rows,
        planned=lambda w: w.ablation_runs(rows),
        values=lambda w: w.collect(w.ablation_runs(rows)),
        **fields,
    )


def _sensitivity(name: str) -> Table:
    def values(workspace: Workspace) -> pd.DataFrame:
        rows = sensitivity.runs_by_row(workspace.profile, name, *_asked(workspace))
        names = [(row, run.id) for row, of_row in rows.items() for run in of_row]
        found = workspace.collect([run for of_row in rows.values() for run in of_row])
        return pd.DataFrame(names, columns=["method", "id"]).merge(
            found.drop(columns="method"), on="id"
        )

    return Table(
        name=name,
        notebook="09",
        rows=sensitivity.row_names(name),
        planned=lambda w: sensitivity.planned(w.profile, name, *_asked(w)),
        values=values,
        seeds=lambda w: (
            f"{w.seeds or sensitivity.seeds_of(w.profile, name)}. Each row changes one setting"
        ),
        down=True,
    )


def _asked(workspace: Workspace) -> tuple:
    return workspace.categories, workspace.seeds


TABLES = {
    table.name: table
    for table in (
        Table(
            name="table1_image_level",
            notebook="03",
            rows=("docc", "u_student", "p_svdd", *BASELINES, *TABLE1, "ensemble"),
            metrics=IMAGE_METRICS,
            planned=Workspace.runs,
            values=_image_level,
            note=lambda workspace, values: " Rotation: half the source pictures.",
        ),
        Table(
            name="table2_pixel_level",
            notebook="04",
            rows=("fcdd", "p_svdd", *BASELINES, "cutpaste_3way_gradcam", "cutpaste_3way_patch"),
            metrics=PIXEL_METRICS,
            planned=Workspace.patch_runs,
            values=_pixel_level,
            seeds=_others,
            note=lambda w, values: f" GradCAM: of the image-level models. {w.protocol()}",
        ),
        Table(
            name="table3_pretrained_vs_finetuned",
            notebook="05",
            rows=("untrained", *FINETUNED),
            planned=Workspace.finetune_runs,
            values=_finetuned,
            seeds=lambda w: f"{w.seeds or w.profile.other_seeds}",
        ),
        _ablation("table4_cutout_variants", "06", CUTOUTS, seeds=_others),
        _ablation("table5_binary_vs_3way", "07", BINARY),
        Table(
            name="table6_synthetic_anomalies",
            notebook="08",
            rows=(*BASELINES, *PASTED),
            planned=lambda w: w.ablation_runs((*BASELINES, *PASTED)),
            values=_synthetic,
            note=_painted,
        ),
        *map(_sensitivity, (*sensitivity.AXES_OF, *sensitivity.CHOICES)),
    )
}
