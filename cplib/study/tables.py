"""The paper's tables, and two of our own, as measured here: the runs behind each, the values."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import pandas as pd
import torch
from sklearn.mixture import GaussianMixture

from cplib import datasets
from cplib.density import Gaussian, held_out, l2_normalise
from cplib.localize import gradcam
from cplib.metrics import IMAGE_METRICS, PIXEL_METRICS, auroc_between, image_metrics
from cplib.model import PretextNet, embed
from cplib.run import BASELINES, Run
from cplib.score import Scorer
from cplib.study import store
from cplib.study.profiles import METHOD, TABLE1, Profile
from cplib.study.published import NAMES, ROW, against_paper, save_table
from cplib.study.published import TABLES as PAPER
from cplib.study.sweep import Workspace, pixel_level_metrics, stored_seeds
from cplib.study.synthetic import SIDE, SYNTHETIC, paint

CUTOUTS = ("cutout", "cutout_mean", "cutout_color", "confetti", "cutpaste")
BINARY = ("cutpaste", "cutpaste_scar", "cutpaste_union", METHOD)
PASTED = ("cutout", METHOD)  # Table 6
PATCH = f"{METHOD}_patch"
PIXEL_LEVEL = (*BASELINES, "untrained_shared", f"{METHOD}_gradcam", PATCH)
PIXEL_LEVEL += (f"{PATCH}_shared", f"{PATCH}_wide", f"{PATCH}_longer")
LEVEL = 7  # of Table 3, the stem being 1: the sixth of EfficientNet's stages
FINETUNED = ("pool_pretrained", "pool_finetuned", "level7_pretrained", "level7_finetuned")
AXES = {
    "table7_learning_rate_and_epochs": ("learning_rate", "updates"),
    "table8_jitter_and_patch_size": ("patch_jitter", "max_area"),
    "unstated_choices": ("head", "translate", "jitter"),  # ours: the paper is silent on them
}
RELATIVE = ("learning_rate", "updates")  # values are multiples of the protocol's own
MIXTURE = "2 Gaussians"  # a row of density.json, by scikit-learn (footnote 1)
SORTS = {"train": "training", "normal": "normal test", "anomalous": "anomalous test"}
MVTEC_LEAST_SIDE = 700  # pixels of the smallest official images
# Files that stand in for the weights that the paper names.
SUBSTITUTES = {
    "resnet18_imagenet_pqf.pth": "a substitute for torchvision's: quantised, fine-tuned and "
    "decoded, 66.7 % top-1"
}
REGULARISERS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # tried in place of a run's


class Row(NamedTuple):
    """A row of a table: a method, and the setting that is changed in Tables 7 and 8."""

    method: str
    setting: str = ""
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table. ``plan`` gives its runs, each with the row that it stands in.

    ``values`` gives a row a measured run, with ROW, ``category``, ``seed`` and the metrics.
    """

    notebook: str  # its two digits
    rows: Callable[[Profile], list[Row]]
    plan: Callable[[Workspace], list[tuple[Row, Run]]]
    values: Callable[[Workspace], pd.DataFrame] | None = None  # None: of the plan's runs
    metrics: tuple[str, ...] = ("image_auroc",)
    note: str = ""


def planned(workspace: Workspace, name: str) -> list[Run]:
    """The runs of a table, each once."""
    return list(dict.fromkeys(run for _, run in plan_of(workspace, name)))


def plan_of(workspace: Workspace, name: str) -> list[tuple[Row, Run]]:
    """The runs of a table with their rows, those of further seeds that are stored among them."""
    plan, there = TABLES[name].plan(workspace), store.stored(workspace.results)
    if name not in AXES:  # where a changed setting has fewer seeds than the unchanged run
        plan = [(row, more) for row, run in plan for more in stored_seeds(run, there)]
    return list(dict.fromkeys(plan))


def all_runs(workspace: Workspace) -> list[Run]:
    """Every run of every table, each once, in the order in which they are wanted."""
    runs = [run for name in TABLES for run in planned(workspace, name)]
    return list(dict.fromkeys(runs + workspace.profile.other_schedules(workspace.shown)))


def measure(workspace: Workspace, name: str) -> pd.DataFrame:
    """The values of a table's runs; missing ones are executed first where the profile is small.

    Elsewhere a line says how many are missing and which command trains them.
    """
    table, runs = TABLES[name], planned(workspace, name)
    complete(workspace, runs, table.notebook)
    return values_of(workspace, name)


def values_of(workspace: Workspace, name: str) -> pd.DataFrame:
    """The values of a table's finished runs."""
    table = TABLES[name]
    return table.values(workspace) if table.values else _of_plan(workspace, name)


def _of_plan(workspace: Workspace, name: str) -> pd.DataFrame:
    """The finished ones of a table's runs, under their rows."""
    plan = plan_of(workspace, name)
    found = workspace.collect([run for _, run in plan]).drop(columns="method")
    rows = pd.DataFrame([(*row, run.id) for row, run in plan], columns=[*ROW, "id"])
    return rows.merge(found, on="id")


def complete(workspace: Workspace, runs: list[Run], notebook: str) -> None:
    """Execute what is missing of a notebook's runs where the profile is small, else say how to."""
    todo = workspace.missing(runs)
    if line := workspace.outdated(runs):
        print(line)
    if todo and workspace.profile.small:
        for outcome in workspace.execute(todo):
            if outcome.state != "done":
                print(f"{outcome.run.id}: {outcome.state}, {outcome.message}")
    elif todo:
        print(f"{len(todo)} runs are missing. To train them:")
        print(f"./run_all.sh --profile {workspace.profile.name} --data DIR --only 02,{notebook}")


def compare(workspace: Workspace, name: str, values: pd.DataFrame) -> pd.DataFrame:
    """The tidy table (``published.COLUMNS``), ours beside the paper's; saved, too."""
    table = TABLES[name]
    paper = datasets.DATASETS[workspace.profile.dataset].published and name in PAPER
    rows = [tuple(row) for row in table.rows(workspace.profile)]
    tidy = against_paper(values, name, rows=rows, metrics=table.metrics, paper=paper)
    parts = (
        caption(workspace, name, values),
        table.note,
        shortfalls(workspace, planned(workspace, name)),
    )
    note = " ".join(filter(None, parts))
    save_table(tidy, workspace.results, name, note)
    return tidy


def caption(workspace: Workspace, name: str, values: pd.DataFrame) -> str:
    """How the networks of a table with these values were trained and scored, in a line above it."""
    head = f"Profile {workspace.profile.name}: "
    used = set(values["id"])
    runs = planned(workspace, name) + workspace.runs((METHOD,))  # the latter are GradCAM's
    done = [run for run in runs if run.needs_training and run.id in used]
    if not done:
        return head + f"nothing was trained for this table{_seeds(values)}."
    run = next((r for r in done if r.method == METHOD), done[0])
    records = [store.read(store.run_folder(r, workspace.results))[1] for r in done]
    start = "random weights" if run.init == "random" else "ImageNet weights"
    precision, devices = (
        " and ".join(sorted({r[key] for r in records})) for key in ("precision", "device")
    )
    half = any(r.method == "rotation" for r in done)
    parts = [
        f"{run.backbone}, {run.size} px",
        f"training on {run.crop}-px crops" if run.crop else "",
        f"the last {run.whole:.0%} of updates on whole images" if run.whole else "",
        f"scores of {run.window}-px windows every {run.stride} px" if run.window else "",
        f"from {start}",
        f"{run.head_updates} updates of the head alone" if run.head_updates else "",
        f"{run.updates} updates of {run.sources} normal images and their copies",
        "rotation: half of them" if half else "",
        f"{run.optimizer.replace('sgd', 'SGD').replace('adamw', 'AdamW')} {run.learning_rate:g}",
        f"trained in {precision} ({devices}), scored in fp32",
    ]
    return head + ", ".join(filter(None, parts)) + f"{_seeds(values)}."


def shortfalls(workspace: Workspace, runs: Iterable[Run]) -> str:
    """In what the finished runs differ from the paper's: weights of other files, images missing.

    From the runs' records, a sentence each; MVTec AD's images from the official numbers.
    """
    finished = store.stock(runs, workspace.places).finished
    records = {run: record for run, (record, _) in finished.items()}
    files = {r["weights"]["file"] for r in records.values() if r["weights"]}
    parts = [f"ImageNet weights: {', '.join(map(_weights, sorted(files)))}."] if files else []
    found = {run.category: record["images"] for run, record in records.items()}
    data = datasets.DATASETS[workspace.profile.dataset]
    for name, here in found.items() if data.train else ():
        i = data.categories.index(name)
        for sort in ("train", "normal", "anomalous"):
            if here[sort] < (official := getattr(data, sort)[i]):
                found_here = f"Of {name} only {here[sort]} of the {official}"
                parts.append(f"{found_here} {SORTS[sort]} images were at hand.")
        if not here["masks"]:
            parts.append(f"For {name} no masks were at hand.")
    resized = [name for name, here in found.items() if max(here["size"]) < MVTEC_LEAST_SIDE]
    if data.train and resized:
        w, h = found[resized[0]]["size"]
        parts.append(f"The images came resized, at {w}x{h} px.")
    return " ".join(parts)


def _weights(file: str) -> str:
    return f"{file} ({SUBSTITUTES[file]})" if file in SUBSTITUTES else file


def _seeds(values: pd.DataFrame) -> str:
    """How many seeds each method has, in words: the fewest and the most over categories."""
    found = values[~values["method"].str.contains("pretrained|ensemble")]
    found = found.groupby(["method", "source" if "source" in found else "category"], sort=False)
    words = {}
    for method, counts in found["seed"].nunique().groupby("method", sort=False):
        text = " to ".join(map(str, sorted({counts.min(), counts.max()})))
        words.setdefault(text, []).append(NAMES[method])
    texts = (f"{text} ({'; '.join(names)})" for text, names in words.items())
    return f", seeds: {', '.join(texts)}" if words else ""


# Metrics computed after training


def ensemble(workspace: Workspace, table: pd.DataFrame) -> pd.DataFrame:
    """Rows "ensemble": the mean of the scores of each category's cutpaste_3way seeds (4.1).

    And "untrained_ensemble" of random networks, beside which a claim on it is judged. ``table`` is
    what ``collect`` gave; a category needs two seeds. How the paper combines scores is not said; a
    mean keeps their scale, which the Gaussian's distance makes comparable. A category whose seeds
    scored different images has none, and a warning names the run.
    """
    rows, names = [], {METHOD: "ensemble", "untrained": "untrained_ensemble"}
    parts = table[table["method"].isin(names)].groupby(["method", "category"])
    for (method, category), part in parts:
        if len(part) < 2:
            continue
        folders = [workspace.results / "runs" / id for id in part["id"]]
        files = [store.read_scores(folder).set_index("file") for folder in folders]
        others = [f for f, s in zip(folders, files, strict=True) if {*s.index} != {*files[0].index}]
        if others:
            warnings.warn(f"{others[0]}: scores of other images than {folders[0]}'s", stacklevel=2)
            continue
        mean = sum(scores["score"] for scores in files) / len(files)
        labels = files[0]["label"].reindex(mean.index)
        row = {"method": names[method], "category": category, "seed": 0, "members": len(part)}
        rows.append(row | image_metrics(labels, mean))
    return pd.DataFrame(rows)


def gradcam_metrics(run: Run, places: store.Places) -> dict | None:
    """Pixel-level metrics of GradCAM on an image-level run; None where they cannot be computed."""

    def compute(run: Run, net: PretextNet, train, test) -> dict:
        return pixel_level_metrics(run, test, gradcam(net, test.pixels))

    return store.cached(run, "gradcam", compute, places)


def level_metrics(run: Run, places: store.Places) -> dict | None:
    """Image-level metrics of a run by the features of LEVEL (4.3), else None."""

    def compute(run: Run, net: PretextNet, train, test) -> dict:
        scorer = Scorer.fit(run, net, train.pixels, level=LEVEL)
        return image_metrics(test.labels, scorer.score(test.pixels))

    return store.cached(run, f"level{LEVEL}", compute, places)


def synthetic_metrics(run: Run, least: int, places: store.Places) -> dict | None:
    """AUROC of Table 6's anomalies painted on the normal test images (5.3), else None.

    The record has the numbers of normal images and of painted ones of a kind, and ``image_auroc``,
    percent, of each kind; it has no kinds where no image is normal.
    """

    def compute(run: Run, net: PretextNet, train, test) -> dict:
        normal = test.pixels[test.labels == 0]
        kinds = SYNTHETIC if len(normal) else ()
        painted = [paint(normal, *kind.split("_"), least=least)[0] for kind in kinds]
        scores = Scorer.fit(run, net, train.pixels).score(torch.cat([normal, *painted]))
        first, *others = scores.split([len(normal), *map(len, painted)])
        aurocs = [auroc_between(first, part) for part in others]
        return {
            "side": SIDE,
            "normal": len(first),
            "painted": len(others[0]) if others else 0,
            "image_auroc": dict(zip(kinds, aurocs, strict=True)),
        }

    return store.cached(run, f"synthetic-{least}", compute, places)


def density_metrics(run: Run, places: store.Places) -> list[dict] | None:
    """What other covariances would do to an image-level run, else None.

    A row for each, of features scaled to length one and not: its ``image_auroc``, percent, and
    ``held_out`` (see ``density``), None where it cannot be fitted. A mixture has no ``held_out``.
    """
    fits = {f"{r:g}": partial(Gaussian.fit, reg_covar=r) for r in REGULARISERS}
    fits |= {"Ledoit-Wolf": Gaussian.fit_shrunk}

    def compute(run: Run, net: PretextNet, train, test) -> dict:
        raw, rows = [embed(net, images.pixels) for images in (train, test)], []
        for l2 in (True, False):
            z, z_test = map(l2_normalise, raw) if l2 else raw
            for name, fit in fits.items():
                row = {"covariance": name, "l2_normalise": l2}
                rows.append(row | _fitted(fit, z, z_test, test.labels))
            mixture = GaussianMixture(2, reg_covar=run.reg_covar, random_state=0).fit(z.double())
            auroc = image_metrics(test.labels, -mixture.score_samples(z_test.double()))
            row = {"covariance": MIXTURE, "l2_normalise": l2, "held_out": None}
            rows.append(row | {"image_auroc": auroc["image_auroc"]})
        return {"fits": rows}

    found = store.cached(run, "density", compute, places)
    return found and found["fits"]


def _fitted(fit, z: torch.Tensor, z_test: torch.Tensor, labels: torch.Tensor) -> dict:
    try:
        auroc = image_metrics(labels, fit(z).score(z_test))["image_auroc"]
        return {"image_auroc": auroc, "held_out": held_out(z, fit)}
    except ValueError:  # too few images, or all alike
        return {"image_auroc": None, "held_out": None}


# One setting at a time: Tables 7 and 8, and what the paper does not state


def settings(profile: Profile, name: str) -> dict[Row, dict]:
    """The rows of such a table, each with the fields of ``Run`` that it changes."""
    base = profile.run(METHOD, profile.categories[0], **profile.sensitivity.protocol)
    return {
        Row(METHOD, axis, _text(x)): _change(base, axis, x)
        for axis in AXES[name]
        for x in getattr(profile.sensitivity, axis)
    }


def _change(base: Run, axis: str, x) -> dict:
    if axis == "max_area":
        return {"area": (base.area[0], x)}
    if axis == "learning_rate":
        return {axis: float(f"{x * base.learning_rate:.3g}")}
    return {axis: round(x * base.updates) if axis == "updates" else x}


def _text(value: float | tuple) -> str:
    """0.333 as it is, (512, 128) as "512-128", many of a kind as "8x512", no width as "linear"."""
    if not isinstance(value, tuple):
        return f"{value:.3g}"
    parts = [(f"{v:g}", len([*same])) for v, same in groupby(value)]
    return "-".join(f"{n}x{v}" if n > 4 else "-".join([v] * n) for v, n in parts) or "linear"


def _sensitivity_plan(workspace: Workspace, name: str) -> list[tuple[Row, Run]]:
    """The unchanged run stands in one row of each setting, and is trained once.

    Seeds: the study's, and those that were measured with a changed setting before.
    """
    profile, study = workspace.profile, workspace.profile.sensitivity
    wanted = study.open_categories if name == "unstated_choices" else study.categories
    categories = _categories(workspace, wanted)

    def of_seed(seed: int) -> Iterator[tuple[bool, Row, Run]]:
        for row, changes in settings(profile, name).items():
            for category in categories:
                run = profile.run(METHOD, category, seed, **study.protocol)
                changed = replace(run, **changes) != run
                yield changed, row, replace(run, curve=0, **changes) if changed else run

    seeds, there = max(study.seeds, workspace.seeds or 0), store.stored(workspace.results)
    while any(changed and run.id in there for changed, _, run in of_seed(seeds)):
        seeds += 1
    plan = [entry for seed in range(seeds) for entry in of_seed(seed)]
    return [(row, run) for _, row, run in sorted(plan, key=lambda entry: entry[0])]


# The tables


def _rows(*methods: str) -> Callable[[Profile], list[Row]]:
    return lambda profile: [Row(method) for method in methods]


def _plan(runs: Iterable[Run], names: dict[str, str] | None = None) -> list[tuple[Row, Run]]:
    return [(Row((names or {}).get(run.method, run.method)), run) for run in runs]


def _categories(workspace: Workspace, named: tuple[str, ...]) -> list[str]:
    """The categories that the profile names for a table, or all.

    Where none of them is to be executed, the first that is stands beside them.
    """
    few = [c for c in workspace.shown if c in named or not named]
    return few if {*few} & {*workspace.categories} else [*few, workspace.categories[0]]


def _ablation_runs(workspace: Workspace, methods: tuple[str, ...]) -> list[Run]:
    """The runs of Tables 4 to 6."""
    return workspace.runs(methods, _categories(workspace, workspace.profile.ablation))


def _ablation(notebook: str, methods: tuple[str, ...]) -> Table:
    rows = (*BASELINES, *methods)
    plan = lambda w: _plan(_ablation_runs(w, rows))  # noqa: E731
    return Table(notebook=notebook, rows=_rows(*rows), plan=plan)


def _image_level(workspace: Workspace) -> pd.DataFrame:
    """Table 1's runs, and the ensemble of the seeds of cutpaste_3way."""
    table = _of_plan(workspace, "table1_image_level")
    return pd.concat([table, ensemble(workspace, table)])


def _pixel_level(workspace: Workspace) -> pd.DataFrame:
    """Table 2's patch models, and GradCAM of the image-level ones."""
    cams = []
    for run in workspace.runs((METHOD,)):
        if found := gradcam_metrics(run, workspace.places):
            row = {"category": run.category, "seed": run.seed, "id": run.id}
            cams.append(row | {"method": f"{METHOD}_gradcam"} | found)
    patch = _of_plan(workspace, "table2_pixel_level")
    return pd.concat([patch, pd.DataFrame(cams)])


def _pixel_plan(workspace: Workspace) -> list[tuple[Row, Run]]:
    """The patch model, its baselines, and the same with one thing changed.

    One Gaussian where each place has its own; wider windows and a longer training for seed 0 of
    the categories that the profile names.
    """
    plan, profile = [], workspace.profile
    for run in profile.patch_runs(workspace.shown, workspace.seeds or 0):
        name = PATCH if run.method == METHOD else run.method
        plan.append((Row(name), run))
        if run.per_position and run.method != "pretrained":
            plan.append((Row(f"{name}_shared"), replace(run, gaussians="shared")))
        first = run.method == METHOD and run.seed == 0
        if first and run.category in profile.wide_windows:
            plan.append((Row(f"{PATCH}_wide"), replace(run, window=run.crop)))
        if first and run.category in profile.four_times:
            plan.append((Row(f"{PATCH}_longer"), replace(run, updates=4 * run.updates)))
    return plan


def _finetune_plan(workspace: Workspace) -> list[tuple[Row, Run]]:
    few = _categories(workspace, workspace.profile.ablation)
    runs = workspace.profile.finetune_runs(few, workspace.seeds or 0)
    return _plan(runs, {"pretrained": "pool_pretrained", METHOD: "pool_finetuned"})


def _finetuned(workspace: Workspace) -> pd.DataFrame:
    """Table 3's runs by their pooled features, and by those of a level of the same networks."""
    levels = []
    name = "table3_pretrained_vs_finetuned"
    for row, run in plan_of(workspace, name):
        if row.method in FINETUNED and (found := level_metrics(run, workspace.places)):
            method = row.method.replace("pool", f"level{LEVEL}")
            levels.append({"method": method, "category": run.category, "seed": run.seed} | found)
    return pd.concat([_of_plan(workspace, name), pd.DataFrame(levels)])


def _synthetic(workspace: Workspace) -> pd.DataFrame:
    """Table 6's runs: AUROC on each kind of anomaly, painted on each ``source`` category."""
    rows = []
    for run in _ablation_runs(workspace, (*BASELINES, *PASTED)):
        least = workspace.profile.anomalies
        record = synthetic_metrics(run, least, workspace.places) or {"image_auroc": {}}
        row = {"method": run.method, "source": run.category, "seed": run.seed, "id": run.id}
        for kind, auroc in record["image_auroc"].items():
            rows.append(row | {"category": kind, "image_auroc": auroc})
    columns = ["method", "category", "source", "seed", "id", "image_auroc"]
    return pd.DataFrame(rows, columns=columns)


def _sensitivity(name: str) -> Table:
    return Table(
        notebook="09",
        rows=lambda profile: list(settings(profile, name)),
        plan=lambda workspace: _sensitivity_plan(workspace, name),
        note="Each row changes at most one setting.",
    )


TABLES = {
    "table1_image_level": Table(
        notebook="03",
        rows=_rows("docc", "u_student", "p_svdd", *BASELINES, *TABLE1, "ensemble"),
        metrics=IMAGE_METRICS,
        plan=lambda w: _plan(w.runs(BASELINES + TABLE1)),
        values=_image_level,
    ),
    "table2_pixel_level": Table(
        notebook="04",
        rows=_rows("fcdd", "p_svdd", *PIXEL_LEVEL),
        metrics=PIXEL_METRICS,
        plan=_pixel_plan,
        values=_pixel_level,
        note="GradCAM: the CutPaste-3way networks of Table 1.",
    ),
    "table3_pretrained_vs_finetuned": Table(
        notebook="05",
        rows=_rows("untrained", *FINETUNED),
        plan=_finetune_plan,
        values=_finetuned,
    ),
    "table4_cutout_variants": _ablation("06", CUTOUTS),
    "table5_binary_vs_3way": _ablation("07", BINARY),
    "table6_synthetic_anomalies": Table(
        notebook="08",
        rows=_rows(*BASELINES, *PASTED),
        plan=lambda w: _plan(_ablation_runs(w, (*BASELINES, *PASTED))),
        values=_synthetic,
        note=f"Painted on the normal test images, {SIDE[0]:.0%} to {SIDE[1]:.0%} of a side.",
    ),
} | {name: _sensitivity(name) for name in AXES}


def curves(workspace: Workspace) -> pd.DataFrame:
    """The test AUROC that finished runs noted on the way (never used to choose), a row a point.

    Of the profile's runs and of its ``other_schedules``: ``schedule``, ``category``,
    ``seed``, ``device``, ``update``, ``minutes`` of training on that device, ``auroc``.
    """
    columns = ["schedule", "category", "seed", "device", "update", "minutes", "auroc"]
    parts = [pd.DataFrame(columns=columns)]
    others = workspace.profile.other_schedules(workspace.shown)
    finished = store.stock(workspace.runs((METHOD,)) + others, workspace.places).finished
    for run, (record, _) in finished.items():
        if run.curve:
            folder = store.run_folder(run, workspace.results)
            noted = pd.read_csv(folder / "history.csv").dropna(subset="image_auroc")
            noted["device"] = record["device"]
            optimiser = {"sgd": "SGD", "adamw": "AdamW"}[run.optimizer]
            images = f"{run.crop}-px crops" if run.crop else f"{run.size} px"
            images += f", then whole images ({run.whole:.0%})" if run.whole else ""
            label = f"{optimiser} {run.learning_rate:g}, {images}, {run.updates} updates"
            noted = noted.assign(minutes=noted["seconds"] / 60, auroc=noted["image_auroc"])
            parts.append(noted.assign(schedule=label, category=run.category, seed=run.seed))
    return pd.concat([p for p in parts if len(p)] or parts)[columns].reset_index(drop=True)
