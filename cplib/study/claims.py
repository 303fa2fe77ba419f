"""The paper's claims (``claims.csv``), each with its verdict from the measured runs.

A claim's ``order`` lists methods, the better first: "a b > c" compares a with c and b with c, and
"a > b > c" each with the next. A claim with a ``setting`` says instead that no two of its values
differ by more than a margin: the range of the paper's own averages and two of its standard errors.
"""

from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from cplib.study import features
from cplib.study.figures import NAMES
from cplib.study.published import published, save_markdown
from cplib.study.sweep import Workspace
from cplib.study.tables import METHOD, TABLES, values_of

CLAIMS = pd.read_csv(Path(__file__).with_suffix(".csv"), keep_default_na=False)
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
INCONCLUSIVE, NOT_MEASURED = "inconclusive", "not measured"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_MEASURED)
QUOTED = ("docc", "u_student", "p_svdd", "fcdd")  # never run: the paper's number is the value
LEVELS = {"chance": 50.0, "halfway": 75.0}  # AUROC, percent: no, and half of full, separation
LEAST_CATEGORIES = 3  # fewer say nothing about how categories differ: no interval
COLUMNS = ["id", "claim", "source", "verdict", "weakest", "effect", "low", "high", "margin"]
COLUMNS += ["paper_effect", "categories", "compared", "comparisons"]

Cells = dict[str, pd.Series]  # a row's mean over the seeds, by category


def measured(workspace: Workspace) -> dict[str, pd.DataFrame]:
    """The recorded values of every table that a claim is about. Nothing is trained or scored."""
    places = workspace.places._replace(data=None)
    records = Workspace(workspace.profile, workspace.categories, places, workspace.seeds)
    frames = {name: values_of(records, name) for name in CLAIMS["table"].unique() if name in TABLES}
    return frames | {"features": _features(records)}


def _features(workspace: Workspace) -> pd.DataFrame:
    """AUROC between groups of features after training (Fig. 3): a row a run and pair of groups.

    Against normal images by the Gaussian, between anomalies by a classifier.
    """
    rows = []
    for run in workspace.runs((METHOD,)):
        found = features.record(run, workspace.places) or {"gaussian_auroc": {}, "pairs": {}}
        values = {f"normal/{group}": value for group, value in found["gaussian_auroc"].items()}
        for pair, numbers in found["pairs"].items():
            if not pair.startswith("normal"):
                values[pair.replace(" ", "/")] = numbers["classifier_auroc"]
        rows += [(name, run.category, run.seed, value) for name, value in values.items()]
    return pd.DataFrame(rows, columns=["method", "category", "seed", "auroc"])


def verdicts(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row a claim: verdict, effect and its 95 % interval, the paper's effect, what is behind it.

    ``effect`` is in percentage points: of several comparisons the smallest difference, along a
    setting the largest. Reproduced: every interval lies above zero (along a setting: within the
    margin), and every comparison was measured. Not reproduced: one lies wholly below (beyond the
    margin). Else inconclusive, as with fewer than LEAST_CATEGORIES categories.
    """
    rows = [_row(claim, frames) for claim in CLAIMS.itertuples()]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(claim, frames: dict[str, pd.DataFrame]) -> dict:
    numbers = pd.DataFrame() if claim.table == "features" else published(claim.table)
    printed = _cells(numbers, claim.metric, "published_mean", claim.setting)
    cells = _cells(
        frames.get(claim.table, pd.DataFrame()), claim.metric, claim.metric, claim.setting
    )
    categories = sorted({c for row in cells.values() for c in row.index})
    given = {name: pd.Series(level, categories) for name, level in LEVELS.items()}
    cells |= given | {name: printed[name] for name in QUOTED if name in printed}
    tried = dict.fromkeys([*printed, *(name for name in cells if name not in given)])
    pairs = list(combinations(tried, 2)) if claim.setting else _pairs(claim)
    found = {pair: gaps for pair in pairs if len(gaps := _gaps(pair, cells))}
    margin = _margin(numbers, claim.setting) if claim.setting else np.nan
    row = {"id": claim.id, "claim": claim.claim, "source": claim.source, "margin": margin}
    row |= {"compared": len(found), "comparisons": len(pairs)}
    row["categories"] = min(map(len, found.values()), default=0)
    row["paper_effect"] = _printed(pairs, printed, bool(claim.setting))
    if not found:
        return row | {"verdict": NOT_MEASURED}
    return row | _judge(found, margin, complete=len(found) == len(pairs))


def _pairs(claim) -> list[tuple[str, str]]:
    groups = [part.split() for part in claim.order.split(">")]
    return [pair for better, worse in pairwise(groups) for pair in product(better, worse)]


def _cells(frame: pd.DataFrame, metric: str, column: str, setting: str) -> Cells:
    """The means over seeds of a column, by row and category; a row is a method, or a value."""
    if frame.empty or column not in frame:
        return {}
    if "metric" in frame:
        frame = frame[frame["metric"] == metric]
    if setting:
        frame = frame[frame["setting"] == setting]
    frame = frame.dropna(subset=column)
    if "source" in frame:  # of Table 6: only images that every method was tried on
        methods = frame.groupby("source")["method"].transform("nunique")
        frame = frame[methods == frame["method"].nunique()]
    groups = frame.groupby("value" if setting else "method")
    return {name: part.groupby("category")[column].mean() for name, part in groups}


def _gaps(pair: tuple[str, str], cells: Cells) -> pd.Series:
    """How far the first lies above the second, in each category that both have."""
    first, second = (cells.get(name, pd.Series(dtype=float)) for name in pair)
    return (first - second).dropna().drop(["average_all"], errors="ignore")


def interval(gaps: pd.Series, comparisons: int = 1) -> tuple[float, float]:
    """A 95 % interval (Student's) of the mean over categories, Bonferroni's over comparisons.

    Infinite below LEAST_CATEGORIES.
    """
    if len(gaps) < LEAST_CATEGORIES:
        return -np.inf, np.inf
    if gaps.nunique() == 1:  # no spread: scipy would warn
        return gaps.iloc[0], gaps.iloc[0]
    return tuple(ttest_1samp(gaps, 0).confidence_interval(1 - 0.05 / comparisons))


def _judge(found: dict[tuple[str, str], pd.Series], margin: float, *, complete: bool) -> dict:
    """Verdict, effect and interval of a claim's comparisons, the weakest of them named."""
    both_ways = not np.isnan(margin)
    if both_ways:  # no two values may differ by more than the margin: either way
        found = {
            p if g.mean() > 0 else p[::-1]: g if g.mean() > 0 else -g for p, g in found.items()
        }
    means = {pair: gaps.mean() for pair, gaps in found.items()}
    pair = max(means, key=means.get) if both_ways else min(means, key=means.get)
    limits = [interval(gaps) for gaps in found.values()]
    sure = [interval(gaps, len(found)) for gaps in found.values()]
    if both_ways:
        low, high = max(0.0, *(low for low, _ in sure)), max(high for _, high in limits)
        holds, fails = high <= margin, low > margin
    else:
        low, high = min(low for low, _ in limits), min(high for _, high in sure)
        holds, fails = low > 0, high < 0
    verdict = REPRODUCED if holds and complete else NOT_REPRODUCED if fails else INCONCLUSIVE
    finite = {"low": low, "high": high} if np.isfinite(high) else {}
    return {"verdict": verdict, "weakest": " over ".join(pair), "effect": means[pair]} | finite


def _margin(numbers: pd.DataFrame, setting: str) -> float:
    along = numbers[(numbers["setting"] == setting) & (numbers["category"] == "average_all")]
    means, errors = along["published_mean"], along["published_stderr"]
    return means.max() - means.min() + 2 * errors.max()


def _printed(pairs: list, printed: Cells, both_ways: bool = False) -> float:
    """As ``effect``, from the paper's averages over its fifteen; NaN where it prints none."""
    means = {name: cells.get("average_all", np.nan) for name, cells in printed.items()}
    if both_ways:
        return max(means.values()) - min(means.values())
    gaps = [means.get(better, np.nan) - means.get(worse, np.nan) for better, worse in pairs]
    return min(gaps, default=np.nan)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts as a person reads them: a row a claim, texts only."""
    rows = {
        row.claim: {
            "where": row.source,
            "verdict": row.verdict,
            "difference [95 %]": _difference_text(row),
            "the paper's": _signed(row.paper_effect),
            "categories": str(row.categories or ""),
        }
        for row in table.itertuples()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim")


def _difference_text(row) -> str:
    """The effect and its interval, the margin that counts, and which of several comparisons."""
    if pd.isna(row.effect):
        return ""
    text = _signed(row.effect)
    text += "" if pd.isna(row.low) else f" [{_signed(row.low)}, {_signed(row.high)}]"
    text += "" if pd.isna(row.margin) else f", margin {row.margin:.1f}"
    if row.comparisons > 1:
        names = (NAMES.get(name, name) for name in row.weakest.split(" over "))
        text += f"; {' over '.join(names)}, the weakest of {row.compared}"
    return text


def _signed(value: float) -> str:
    return "" if pd.isna(value) else f"{value:+.1f}"


def save_claims(table: pd.DataFrame, workspace: Workspace) -> Path:
    """Write ``results/tables/claims.csv`` and ``.md``; returns the path of the CSV."""
    note = (
        f"Profile {workspace.profile.name}. AUROC, percentage points; 95 % intervals (Student's) "
        "over categories. Inconclusive: the interval holds both answers, a comparison is missing, "
        f"or there are fewer than {LEAST_CATEGORIES} categories."
    )
    path = save_markdown(workspace.results, "claims", note, {"": readable(table)})
    table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.4f")
    return path.with_suffix(".csv")
