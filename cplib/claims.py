"""The paper's claims as data, each with its verdict from the measured runs."""

from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd

from cplib import features
from cplib.config import CATEGORIES, SYNTHETIC
from cplib.figures import NAMES
from cplib.intervals import LEAST_CATEGORIES, Difference, difference, smallest
from cplib.published import KEYS, markdown, published
from cplib.tables import TABLES
from cplib.workspace import Workspace

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
INCONCLUSIVE, NOT_MEASURED = "inconclusive", "not measured"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_MEASURED)
QUOTED = ("docc", "u_student", "p_svdd", "fcdd")  # never run: the paper's number is the value
LEVELS = {"chance": 50.0, "halfway": 75.0}  # AUROC, percent: no, and half of full, separation
MARGIN_ERRORS = 2  # standard errors of the paper's, beside its own range
AVERAGE = "average_all"
SHAPES = "table6_synthetic_anomalies"
FEATURES = "features"

Pairs = tuple[tuple[str, str], ...]
Cells = dict[str, dict[str, np.ndarray]]  # method, category: a value a seed


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement, its place in the paper, and the comparisons of a table's rows that test it.

    Of each of the ``pairs`` the first must lie above the second. With an ``axis`` (how the names
    of its settings begin) no two settings may lie further apart than the margin: the range of the
    paper's own averages along it and MARGIN_ERRORS of their standard errors, percentage points.
    """

    id: str
    sentence: str
    source: str
    table: str
    pairs: Pairs = ()
    axis: tuple[str, ...] = ()
    metric: str = "image_auroc"


def _order(*methods: str) -> Pairs:
    """Each method above the one before it."""
    return tuple((better, worse) for worse, better in pairwise(methods))


def _over(better: str, *worse: str) -> Pairs:
    return tuple((better, method) for method in worse)


def _above(worse: str, *better: str) -> Pairs:
    return tuple((method, worse) for method in better)


def _axis(*names: str) -> tuple[str, ...]:
    return tuple(f"cutpaste_3way[{name}=" for name in names)


TABLE1 = {"source": "Table 1, section 4.1", "table": "table1_image_level"}
TABLE2 = {
    "source": "Table 2, section 4.2",
    "table": "table2_pixel_level",
    "metric": "pixel_auroc",
}
TABLE3 = {"source": "Table 3, section 4.3", "table": "table3_pretrained_vs_finetuned"}
TABLE4 = {"source": "Table 4, section 5.1", "table": "table4_cutout_variants"}
TABLE5 = {"source": "Table 5, section 5.2", "table": "table5_binary_vs_3way"}
FIGURE3 = {"source": "Fig. 3, section 2.3", "table": FEATURES, "metric": "auroc"}
TABLE7 = {"source": "Table 7, appendix", "table": "table7_learning_rate_and_epochs"}
TABLE8 = {"source": "Table 8, appendix", "table": "table8_jitter_and_patch_size"}
SILENT = {"source": "Not in the paper", "table": "table1_image_level"}

CLAIMS = (
    Claim(
        id="rotation-cutout-scar-below",
        sentence="Rotation, Cutout and Scar prediction detect less than each CutPaste variant.",
        pairs=tuple(
            product(
                ("cutpaste", "cutpaste_scar", "cutpaste_3way"),
                ("rotation", "cutout", "scar"),
            )
        ),
        **TABLE1,
    ),
    Claim(
        id="cutpaste-scar-3way-order",
        sentence="CutPaste-scar detects more than CutPaste, and CutPaste-3way more than both.",
        pairs=_order("cutpaste", "cutpaste_scar", "cutpaste_3way"),
        **TABLE1,
    ),
    Claim(
        id="3way-over-cutpaste",
        sentence="CutPaste-3way detects more than CutPaste.",
        pairs=_over("cutpaste_3way", "cutpaste"),
        **TABLE1,
    ),
    Claim(
        id="3way-over-scar",
        sentence="CutPaste-3way detects more than CutPaste-scar.",
        pairs=_over("cutpaste_3way", "cutpaste_scar"),
        **TABLE1,
    ),
    Claim(
        id="3way-over-quoted",
        sentence="CutPaste-3way detects more than DOCC, U-Student and P-SVDD (quoted).",
        pairs=_over("cutpaste_3way", "docc", "u_student", "p_svdd"),
        **TABLE1,
    ),
    Claim(
        id="ensemble-over-3way",
        sentence="Several CutPaste-3way models together detect more than one.",
        pairs=_over("ensemble", "cutpaste_3way"),
        **TABLE1,
    ),
    Claim(
        id="patch-over-p-svdd",
        sentence="The patch model localises better than P-SVDD (quoted).",
        pairs=_over("cutpaste_3way_patch", "p_svdd"),
        **TABLE2,
    ),
    Claim(
        id="patch-over-fcdd",
        sentence="The patch model localises better than FCDD (quoted).",
        pairs=_over("cutpaste_3way_patch", "fcdd"),
        **TABLE2,
    ),
    Claim(
        id="patch-over-gradcam",
        sentence="The patch model localises better than GradCAM of the image-level model.",
        pairs=_over("cutpaste_3way_patch", "cutpaste_3way_gradcam"),
        **TABLE2,
    ),
    Claim(
        id="finetuned-over-pretrained-pooled",
        sentence="Finetuning on CutPaste improves an ImageNet network's pooled features.",
        pairs=_over("pool_finetuned", "pool_pretrained"),
        **TABLE3,
    ),
    Claim(
        id="finetuned-over-pretrained-level7",
        sentence="Finetuning on CutPaste improves an ImageNet network's level-7 features.",
        pairs=_over("level7_finetuned", "level7_pretrained"),
        **TABLE3,
    ),
    Claim(
        id="cutout-to-cutpaste-order",
        sentence="Each step helps: grey, mean, random colour, confetti, a piece of the picture.",
        pairs=_order("cutout", "cutout_mean", "cutout_color", "confetti", "cutpaste"),
        **TABLE4,
    ),
    Claim(
        id="cutpaste-over-fillings",
        sentence="A piece of the picture itself helps more than any other filling.",
        pairs=_over("cutpaste", "cutout", "cutout_mean", "cutout_color", "confetti"),
        **TABLE4,
    ),
    Claim(
        id="3way-over-union",
        sentence="Two classes of synthetic anomalies help more than their union as one.",
        pairs=_over("cutpaste_3way", "cutpaste_union"),
        **TABLE5,
    ),
    Claim(
        id="union-over-either",
        sentence="The union of CutPaste and CutPaste-scar detects more than either alone.",
        pairs=_over("cutpaste_union", "cutpaste", "cutpaste_scar"),
        **TABLE5,
    ),
    Claim(
        id="3way-over-cutout-shapes",
        sentence="CutPaste-3way detects more than Cutout on synthetic anomalies of every kind.",
        source="Table 6, section 5.3",
        table=SHAPES,
        pairs=tuple((f"cutpaste_3way@{shape}", f"cutout@{shape}") for shape in SYNTHETIC),
    ),
    Claim(
        id="rotation-over-cutpaste-cifar10",
        sentence="Where other classes are the outliers (CIFAR-10), rotation beats CutPaste.",
        source="Section 5.4",
        table="cifar10",
        pairs=_over("rotation", "cutpaste"),
    ),
    Claim(
        id="insensitive-learning-rate",
        sentence="CutPaste-3way hardly depends on the learning rate.",
        axis=_axis("learning_rate"),
        **TABLE7,
    ),
    Claim(
        id="insensitive-length",
        sentence="CutPaste-3way hardly depends on the length of training.",
        axis=_axis("epochs", "updates"),
        **TABLE7,
    ),
    Claim(
        id="insensitive-jitter",
        sentence="CutPaste-3way hardly depends on the strength of the patch's jitter.",
        axis=_axis("patch_jitter"),
        **TABLE8,
    ),
    Claim(
        id="insensitive-area",
        sentence="CutPaste-3way hardly depends on the patch's largest area.",
        axis=_axis("max_area"),
        **TABLE8,
    ),
    Claim(
        id="synthetic-unlike-real",
        sentence="To the CutPaste-3way network synthetic anomalies hardly look like real ones.",
        pairs=_above("halfway", "anomaly from cutpaste", "anomaly from cutpaste_scar"),
        **FIGURE3,
    ),
    Claim(
        id="synthetic-separates-real",
        sentence="Yet its features separate both kinds of anomalies from normal pictures.",
        pairs=_above(
            "chance", "anomaly from normal", "cutpaste from normal", "cutpaste_scar from normal"
        ),
        **FIGURE3,
    ),
    Claim(
        id="3way-over-imagenet",
        sentence="CutPaste-3way detects more than ImageNet features without any training on top.",
        pairs=_over("cutpaste_3way", "pretrained"),
        **SILENT,
    ),
    Claim(
        id="3way-over-random",
        sentence="CutPaste-3way detects more than the features of a random network.",
        pairs=_over("cutpaste_3way", "untrained"),
        **SILENT,
    ),
)


def measured(workspace: Workspace) -> dict[str, pd.DataFrame]:
    """The values of every table that a claim is about, as far as they are recorded.

    Nothing is trained or scored for it: that is the other notebooks' work.
    """
    records = replace(workspace, data=None)
    names = dict.fromkeys(c.table for c in CLAIMS if c.table in TABLES)
    frames = {name: TABLES[name].values(records) for name in names}
    return frames | {FEATURES: _features(records)}


def _features(workspace: Workspace) -> pd.DataFrame:
    """AUROC between groups of features, after training: a row for each run and two groups.

    From normal pictures by the Gaussian, between anomalies by a classifier (``cplib.features``).
    """
    rows = []
    for run in workspace.runs(("cutpaste_3way",)):
        found = features.record(run, **workspace.places) or {"gaussian_auroc": {}, "pairs": {}}
        values = {f"{group} from normal": v for group, v in found["gaussian_auroc"].items()}
        for groups, numbers in found["pairs"].items():
            if "normal" not in groups.split():
                values[" from ".join(groups.split())] = numbers["classifier_auroc"]
        rows += [(name, run.category, run.seed, value) for name, value in values.items()]
    return pd.DataFrame(rows, columns=["method", "category", "seed", "auroc"])


def verdicts(frames: dict[str, pd.DataFrame], *, seed: int = 0) -> pd.DataFrame:
    """A row a claim: verdict, effect and its 95 % interval, the paper's effect, what is behind it.

    ``frames`` holds for each table's name a row a run: method, category, seed and metrics, and for
    Table 6 the category painted on as ``source``; a table may be missing. ``effect`` is in
    percentage points: of several comparisons the smallest difference, along an axis the largest.

    Reproduced: the whole interval lies above zero (along an axis: within the margin), and every
    comparison was measured. Not reproduced: it lies wholly below (beyond the margin). Else
    inconclusive, as with fewer than LEAST_CATEGORIES categories whatever the numbers.
    ``paper_effect`` is over the same categories where the paper prints them, else its average.
    """
    rows = [_row(claim, frames.get(claim.table), seed) for claim in CLAIMS]
    numbers = dict.fromkeys(("effect", "low", "high"), float)
    return pd.DataFrame(rows).astype(numbers).replace([np.inf, -np.inf], np.nan)


def _row(claim: Claim, frame: pd.DataFrame | None, seed: int) -> dict:
    """One claim's row; what was not measured stays empty."""
    numbers = _numbers(claim)
    printed = _cells(claim, numbers, "published_mean")
    cells = {} if frame is None else _cells(claim, frame, claim.metric)
    cells |= _given(cells, printed)
    pairs = claim.pairs or _settings(claim, cells)
    shared = {pair: both for pair in pairs if (both := _shared(pair, cells))}
    gaps = {pair: _gap(pair, cells, shared[pair], seed) for pair in shared}
    complete = len(shared) >= len(claim.pairs or _settings(claim, printed))
    margin = _margin(claim, numbers)
    found = _weakest(gaps, largest=bool(claim.axis))
    return {
        "id": claim.id,
        "claim": claim.sentence,
        "source": claim.source,
        "verdict": _verdict(found["low"], found["high"], margin, complete),
        **found,
        "margin": margin,
        "paper_effect": _paper_effect(claim, printed, shared),
        "categories": min(map(len, shared.values()), default=0),
        "seeds": _fewest_seeds(cells, shared),
        "compared": len(shared),
        "comparisons": len(pairs),
    }


def _numbers(claim: Claim) -> pd.DataFrame:
    """The paper's numbers for the claim's table and metric, those of its text among them."""
    if claim.table == FEATURES:  # Figure 3 prints no number
        return pd.DataFrame(columns=[*KEYS, "published_mean"])
    numbers = published(claim.table)
    return numbers[numbers["metric"] == claim.metric]


def _cells(claim: Claim, frame: pd.DataFrame, column: str) -> Cells:
    """The values of a column; in Table 6 the shape belongs to the row's name."""
    if frame.empty or column not in frame:
        return {}
    if claim.table == SHAPES:
        names = frame["method"] + "@" + frame["category"]
        frame = frame.assign(method=names, category=frame.get("source", AVERAGE))
    cells = {}
    groups = frame.dropna(subset=column).groupby(["method", "category"], sort=False)[column]
    for (method, category), values in groups:
        cells.setdefault(method, {})[category] = values.to_numpy(float)
    return cells


def _given(cells: Cells, printed: Cells) -> Cells:
    """What no run measures: the quoted methods' numbers, and the levels in every category."""
    categories = dict.fromkeys(category for values in cells.values() for category in values)
    quoted = {method: printed[method] for method in QUOTED if method in printed}
    levels = {name: {c: np.array([level]) for c in categories} for name, level in LEVELS.items()}
    return quoted | levels


def _settings(claim: Claim, cells: Cells) -> Pairs:
    """Every two settings of the claim's axis that are there."""
    return tuple(combinations([name for name in cells if name.startswith(claim.axis)], 2))


def _shared(pair: tuple[str, str], cells: Cells) -> list[str]:
    """The categories that both have."""
    first, second = (cells.get(method, {}) for method in pair)
    return [category for category in first if category in second]


def _gap(pair: tuple[str, str], cells: Cells, shared: list[str], seed: int) -> Difference:
    first, second = ([cells[method][category] for category in shared] for method in pair)
    return difference(first, second, seed=seed)


def _weakest(gaps: dict[tuple[str, str], Difference], *, largest: bool) -> dict:
    """The smallest difference, or the largest either way: between which two, and its interval."""
    if not gaps:
        return dict.fromkeys(("weakest", "effect", "low", "high"))
    if largest:
        gaps = gaps | {pair[::-1]: -gap for pair, gap in gaps.items()}
    i, low, high = smallest(list(gaps.values()))
    pair, effect = list(gaps)[i], list(gaps.values())[i].estimate
    if largest:
        pair, effect, low, high = pair[::-1], -effect, max(0.0, -high), -low
    return {"weakest": " over ".join(pair), "effect": effect, "low": low, "high": high}


def _verdict(low: float | None, high: float, margin: float | None, complete: bool) -> str:
    if low is None:
        return NOT_MEASURED
    holds, fails = (low > 0, high < 0) if margin is None else (high <= margin, low > margin)
    if fails:
        return NOT_REPRODUCED
    return REPRODUCED if holds and complete else INCONCLUSIVE


def _margin(claim: Claim, numbers: pd.DataFrame) -> float | None:
    if not claim.axis:
        return None
    along = numbers["method"].str.startswith(claim.axis) & (numbers["category"] == AVERAGE)
    means, errors = (numbers.loc[along, f"published_{name}"] for name in ("mean", "stderr"))
    return means.max() - means.min() + MARGIN_ERRORS * errors.max()


def _paper_effect(claim: Claim, printed: Cells, shared: dict) -> float:
    """As ``effect``, from the paper's numbers; NaN where it does not print them."""
    if claim.axis:
        return max(abs(_printed_gap(pair, printed, ())) for pair in _settings(claim, printed))
    return min(_printed_gap(p, printed, shared.get(p, ())) for p in shared or claim.pairs)


def _printed_gap(pair: tuple[str, str], printed: Cells, categories) -> float:
    first, second = (printed.get(method, {}) for method in pair)
    same = categories and all(c in first and c in second for c in categories)
    over = categories if same else [AVERAGE]
    gaps = [first.get(c, np.nan) - second.get(c, np.nan) for c in over]
    return float(np.mean(gaps))


def _fewest_seeds(cells: Cells, shared: dict) -> int:
    """Of any method that was run, in any category."""
    given = {*QUOTED, *LEVELS}
    ran = ((m, c) for pair, both in shared.items() for m in pair if m not in given for c in both)
    return min((len(cells[m][c]) for m, c in ran), default=0)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts as a person reads them: a row a claim, texts only."""
    rows = {
        row.claim: {
            "where": row.source,
            "verdict": row.verdict,
            "difference [95 %]": _difference_text(row),
            "the paper's": _signed(row.paper_effect, row.margin),
            "categories × seeds": f"{row.categories} × {row.seeds}" if row.categories else "",
        }
        for row in table.itertuples()
    }
    grid = pd.DataFrame.from_dict(rows, orient="index")
    grid.index.name = "claim"
    return grid


def _difference_text(row) -> str:
    """The effect and its interval, the margin that counts, and which of several comparisons."""
    if pd.isna(row.effect):
        return ""
    low, high = (_signed(limit, row.margin) for limit in (row.low, row.high))
    text = _signed(row.effect, row.margin) + (f" [{low}, {high}]" if low and high else "")
    text += "" if pd.isna(row.margin) else f", margin {row.margin:.1f}"
    if row.comparisons > 1:
        first, second = (_named(name) for name in row.weakest.split(" over "))
        which = "smallest" if pd.isna(row.margin) else "largest"
        text += f"; {which} of {row.compared}: {first} over {second}"
    return text


def _signed(value: float, margin: float) -> str:
    """A difference with its sign; one that counts either way without."""
    if pd.isna(value):
        return ""
    return f"{value:+.1f}" if pd.isna(margin) else f"{value:.1f}"


def _named(row: str) -> str:
    name, _, shape = row.partition("@")
    return NAMES.get(name, name) + (f" on {shape}" if shape else "")


def summary(table: pd.DataFrame) -> str:
    """Sentences: how many claims have which verdict, and which are decided."""
    counts = table["verdict"].value_counts()
    text = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
    parts = [f"Of {len(table)} claims: {text}."]
    for verdict in VERDICTS[:2]:
        if len(decided := table[table["verdict"] == verdict]):
            parts.append(f"{verdict.capitalize()}: {'; '.join(decided['id'])}.")
    return " ".join(parts)


def save_claims(table: pd.DataFrame, workspace: Workspace) -> Path:
    """Write ``results/tables/claims.csv`` and ``.md``; returns the path of the CSV."""
    folder = workspace.results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"{note(workspace)}\n", f"{summary(table)}\n", markdown(readable(table))]
    (folder / "claims.md").write_text("\n".join(parts))
    path = folder / "claims.csv"
    table.to_csv(path, index=False, float_format="%.4f")
    return path


def note(workspace: Workspace) -> str:
    """What the verdicts are about and how they come about: stands above the table."""
    own = (
        ""
        if {*workspace.categories} <= {*CATEGORIES}
        else "These are not the paper's pictures: the verdicts try the pipeline, not the paper. "
    )
    return (
        f"Profile {workspace.profile.name}; each table says under which protocol. {own}"
        "AUROC, percentage points; 95 % intervals over categories and seeds. Inconclusive: "
        "the interval holds both answers, a comparison is missing, or there are fewer than "
        f"{LEAST_CATEGORIES} categories."
    )
