"""The paper's claims (``claims.csv``), each with its verdict from the measured runs.

A claim's ``order`` lists methods, or values of its ``setting``, the better first: "a b > c"
compares a and b with c, "a > b > c" each with the next; the better may fall short by ``tolerance``
points. ``group`` names the categories that it is about, "textures" or "aligned". A claim with a
setting and no order says that no two of the paper's values differ by more than a margin: the range
of the paper's own averages and two of its standard errors. ``null`` is the same order with an
untrained network in the trained one's place: where it holds, training is not what makes the claim
hold.
"""

from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t, ttest_1samp

from cplib.datasets import DATASETS
from cplib.run import BASELINES
from cplib.study.paper import published
from cplib.study.report import save_markdown, write_csv
from cplib.study.tables import ALL, NAMES, TABLES, values
from cplib.study.workspace import Workspace

CLAIMS = pd.read_csv(Path(__file__).with_suffix(".csv"), keep_default_na=False)
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
WITHOUT_TRAINING = "holds without training"
INCONCLUSIVE, NOT_MEASURED = "inconclusive", "not measured"
VERDICTS = (REPRODUCED, WITHOUT_TRAINING, NOT_REPRODUCED, INCONCLUSIVE, NOT_MEASURED)
QUOTED = ("docc", "u_student", "p_svdd", "fcdd")  # never run: the paper's number is the value
SEPARATION = {"chance": 50.0, "halfway": 75.0}  # AUROC, percent: no, and half of full, separation
LEAST_CATEGORIES = 3  # fewer say nothing about how categories differ: no interval
COLUMNS = ["id", "claim", "source", "verdict", "weakest", "effect", "low", "high", "margin"]
COLUMNS += ["paper_effect", "null", "null_effect", "null_low", "null_high", "null_categories"]
COLUMNS += ["categories", "needed", "compared", "comparisons"]
MOST_CATEGORIES = 1000  # of those that would decide a claim

_NOTHING, _EMPTY = pd.DataFrame(), pd.Series(dtype=float)

Cells = dict[str, pd.Series]  # a row's mean over the seeds, by category
Pair = tuple[str, str]


def measured(workspace: Workspace, names=tuple(ALL)) -> dict[str, pd.DataFrame]:
    """The recorded values of the tables that claims are about."""
    return {name: values(workspace, name) for name in {*CLAIMS["table"]} & {*names}}


def verdicts(frames: dict[str, pd.DataFrame], claims: pd.DataFrame = CLAIMS) -> pd.DataFrame:
    """A row a claim: verdict, effect and its 95 % interval, the paper's effect, what is behind it.

    ``effect`` (points) is the smallest difference of all comparisons; along a setting it is the
    largest. ``margin`` is the difference that is still accepted. ``paper_effect`` is the paper's of
    the same pair. Reproduced: every interval lies above zero (along a setting: within the margin),
    and every comparison was measured. Holds without training: the same is true of the null. Not
    reproduced: one interval lies wholly below zero (beyond the margin). All else is inconclusive,
    as with fewer than LEAST_CATEGORIES categories; ``needed`` is how many categories like those
    measured would decide it.
    """
    rows = [_row(claim, frames) for claim in claims.itertuples()]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(claim, frames: dict[str, pd.DataFrame]) -> dict:
    row = {"id": claim.id, "claim": claim.claim, "source": claim.source}
    numbers = published(claim.table) if claim.table in TABLES else _NOTHING
    printed = _cells(numbers, claim, "published_mean")
    cells = _cells(frames.get(claim.table, _NOTHING), claim, claim.metric)
    categories = sorted({c for found in cells.values() for c in found.index})
    given = {name: pd.Series(level, categories) for name, level in SEPARATION.items()}
    cells |= given | {name: printed[name] for name in QUOTED if name in printed}
    both_ways = not claim.order
    pairs = list(combinations(printed, 2)) if both_ways else _pairs(claim.order)
    margin = _margin(numbers, claim.setting) if both_ways else _tolerance(claim)
    row |= {"margin": margin if both_ways else -margin, "comparisons": len(pairs)}
    judged = _judge(pairs, _gaps(pairs, cells, claim.group), margin, both_ways)
    average = "average_texture" if claim.group == "textures" else "average_all"
    weakest = judged.get("weakest")
    row |= judged | {"paper_effect": _printed(pairs, weakest, printed, average, both_ways)}
    nulls = [_null(claim, baseline, cells) for baseline in BASELINES if claim.null]
    best = max(nulls, key=lambda null: null.get("effect", -np.inf), default={})
    if best.get("weakest"):
        row |= {"null": best["weakest"]}
        row |= {f"null_{k}": best.get(k) for k in ("effect", "low", "high", "categories")}
    if row["verdict"] == REPRODUCED and any(n["verdict"] == REPRODUCED for n in nulls):
        row["verdict"] = WITHOUT_TRAINING
    return row


def _null(claim, baseline: str, cells: Cells) -> dict:
    """What becomes of a claim with a baseline in place of the trained network."""
    pairs = _pairs(claim.null.replace(BASELINES[0], baseline))
    return _judge(pairs, _gaps(pairs, cells, claim.group), _tolerance(claim))


def _tolerance(claim) -> float:
    return float(claim.tolerance or "nan")


def _pairs(order: str) -> list[tuple[str, str]]:
    groups = [part.split() for part in order.split(">")]
    return [pair for better, worse in pairwise(groups) for pair in product(better, worse)]


def _cells(frame: pd.DataFrame, claim, column: str) -> Cells:
    """The means over seeds (and Table 6's kinds) of a column, by row and category.

    A row is a method, or a value.
    """
    if frame.empty or column not in frame:
        return {}
    if "metric" in frame:
        frame = frame[frame["metric"] == claim.metric]
    if claim.setting:
        frame = frame[frame["setting"] == claim.setting]
    frame = frame.dropna(subset=column)
    if "source" in frame:  # of Table 6: the categories that were painted on, not the kinds
        frame = frame.assign(category=frame["source"])
    groups = frame.groupby("value" if claim.setting else "method")
    return {name: part.groupby("category")[column].mean() for name, part in groups}


def _gaps(pairs: list[Pair], cells: Cells, group: str) -> dict[Pair, pd.Series]:
    """By how much the first of a pair lies above the second, in each category that both have.

    Pairs without a category are left out.
    """
    found = {}
    for first, second in pairs:
        gaps = (cells.get(first, _EMPTY) - cells.get(second, _EMPTY)).dropna()
        wanted = (
            {c for data in DATASETS.values() for c in getattr(data, group)} if group else gaps.index
        )
        gaps = gaps[[c for c in gaps.index if c in wanted and not c.startswith("average")]]
        if len(gaps):
            found[first, second] = gaps
    return found


def interval(gaps: pd.Series, comparisons: int = 1) -> tuple[float, float]:
    """A 95 % interval (Student's) of the mean over categories, Bonferroni's over comparisons.

    Infinite below LEAST_CATEGORIES.
    """
    if len(gaps) < LEAST_CATEGORIES:
        return -np.inf, np.inf
    if gaps.nunique() == 1:  # no spread: scipy would warn
        return gaps.iloc[0], gaps.iloc[0]
    return tuple(ttest_1samp(gaps, 0).confidence_interval(1 - 0.05 / comparisons))


def _judge(
    pairs: list[Pair], found: dict[Pair, pd.Series], margin: float, both_ways: bool = False
) -> dict:
    """Verdict, effect and interval of a claim's comparisons, the weakest of them named.

    ``found`` holds the differences of those ``pairs`` that were measured. ``both_ways``: no two
    may differ by more than the margin; else the first may fall short by it.
    """
    row = {"verdict": NOT_MEASURED, "compared": len(found)}
    row["categories"] = min(map(len, found.values()), default=0)
    if not found:
        return row
    if both_ways:
        found = {
            p if g.mean() > 0 else p[::-1]: g if g.mean() > 0 else -g for p, g in found.items()
        }
    means = {pair: gaps.mean() for pair, gaps in found.items()}
    pair = max(means, key=means.get) if both_ways else min(means, key=means.get)
    limits = [interval(gaps) for gaps in found.values()]
    sure = [interval(gaps, len(found)) for gaps in found.values()]
    if both_ways:
        low, high = max(0.0, *(low for low, _ in sure)), max(high for _, high in limits)
        holds, fails, bound = high <= margin, low > margin, margin
    else:
        bound = -margin if margin == margin else 0.0
        low, high = min(low for low, _ in limits), min(high for _, high in sure)
        holds, fails = low > bound, high < bound
    complete = len(found) == len(pairs)
    row["verdict"] = REPRODUCED if holds and complete else NOT_REPRODUCED if fails else INCONCLUSIVE
    if row["verdict"] == INCONCLUSIVE and not holds:
        spare = [bound - gaps if both_ways else gaps - bound for gaps in found.values()]
        against = [categories_needed(gaps, len(found)) for gaps in spare if gaps.mean() < 0]
        if against:
            row["needed"] = pd.Series(against).min()
        elif complete:  # NaN with a comparison in one category only
            row["needed"] = np.max([categories_needed(gaps) for gaps in spare])
    finite = {"low": low, "high": high} if np.isfinite(high) else {}
    return row | {"weakest": " over ".join(pair), "effect": means[pair]} | finite


def categories_needed(gaps: pd.Series, comparisons: int = 1) -> float:
    """How many categories, these and others like them, would put zero outside ``interval``.

    Infinitely many above MOST_CATEGORIES; NaN for one category, which says nothing of the spread.
    """
    if len(gaps) < 2:
        return np.nan
    n = np.arange(max(LEAST_CATEGORIES, len(gaps) + 1), MOST_CATEGORIES + 1)
    enough = n[t.ppf(1 - 0.025 / comparisons, n - 1) * gaps.std() / np.sqrt(n) < abs(gaps.mean())]
    return float(enough[0]) if len(enough) else np.inf


def _margin(numbers: pd.DataFrame, setting: str) -> float:
    along = numbers[(numbers["setting"] == setting) & (numbers["category"] == "average_all")]
    means, errors = along["published_mean"], along["published_stderr"]
    return means.max() - means.min() + 2 * errors.max()


def _printed(
    pairs: list[Pair], weakest: str | None, printed: Cells, average: str, both_ways: bool
) -> float:
    """The paper's difference of the weakest pair, by its averages; NaN where it prints none.

    If we measured nothing, it is the smallest difference in the paper itself.
    """
    means = {name: cells.get(average, np.nan) for name, cells in printed.items()}
    gaps = {
        f"{a} over {b}": means.get(a, np.nan) - means.get(b, np.nan)
        for pair in pairs
        for a, b in (pair, pair[::-1])
    }
    if weakest:
        return gaps[weakest]
    own = [gaps[f"{a} over {b}"] for a, b in pairs]
    return max(map(abs, own), default=np.nan) if both_ways else min(own, default=np.nan)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts as a person reads them: a row a claim, texts only."""
    rows = {
        row.claim: {
            "where": row.source,
            "verdict": row.verdict,
            "difference [95 %]": _phrase(row, "; "),
            "the paper's": _signed(row.paper_effect),
            "without training": _phrase_null(row),
            "categories": _needed(row),
        }
        for row in table.itertuples()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim")


def _phrase(row, link: str) -> str:
    """The effect, its interval and the margin that counts; which comparison is the weakest."""
    text = _interval_text(row.effect, row.low, row.high)
    text += "" if not text or pd.isna(row.margin) else f", margin {_signed(row.margin)}"
    few = row.comparisons == 1 or not text
    return text if few else f"{text}{link}{_pair(row.weakest)}, the weakest of {row.compared}"


def _phrase_null(row) -> str:
    if pd.isna(row.null):
        return ""
    text = _interval_text(row.null_effect, row.null_low, row.null_high)
    others = row.null_categories != row.categories
    here = f", categories: {row.null_categories:.0f}" if others else ""
    return f"{text}; {_pair(row.null)}{here}"


def _pair(text: str) -> str:
    """Two methods by their names; groups of images (Fig. 3) with "and", after their network's."""
    found = []
    for name in text.split(" over "):
        *network, a, b = ["", *(NAMES.get(part, part) for part in name.split("/"))]
        found.append(f"{network[-1]}: {a} and {b}".removeprefix(": ") if "/" in name else b)
    return " over ".join(found)


def _interval_text(effect: float, low: float, high: float) -> str:
    return _signed(effect) + ("" if pd.isna(low) else f" [{_signed(low)}, {_signed(high)}]")


def _signed(value: float) -> str:
    return "" if pd.isna(value) else f"{value:+.1f}"


def _needed(row) -> str:
    """How many categories were compared, and how many would decide what is inconclusive."""
    if pd.isna(row.needed):
        return str(row.categories or "")
    enough = f"{row.needed:.0f}" if np.isfinite(row.needed) else f"over {MOST_CATEGORIES}"
    return f"{row.categories}; {enough} would decide"


def seen(workspace: Workspace, *names: str) -> str:
    """What was seen of the claims about these tables, as Markdown: verdicts first."""
    table = verdicts(measured(workspace, names), CLAIMS[CLAIMS["table"].isin(names)])
    head = "Differences are in points of AUROC, with a 95 % interval over categories in brackets; "
    head += "notebook 11 says how verdicts are made."
    if workspace.profile.dataset == "demo":
        head += " On the demo set a verdict illustrates, and is no evidence for the method."
    return "\n".join([head, "", *(f"- {_sentence(row)}" for row in table.itertuples())])


def _sentence(row) -> str:
    parts = [f"**{row.verdict.capitalize()}**: {row.claim}"]
    if not pd.isna(row.effect):
        theirs = "" if pd.isna(row.paper_effect) else f"; the paper's {_signed(row.paper_effect)}"
        parts.append(f"{_phrase(row, ' points; ')}; categories: {row.categories}{theirs}.")
    if not pd.isna(row.null):
        parts.append(f"Without training: {_phrase_null(row)}.")
    return " ".join(parts)


def save_claims(table: pd.DataFrame, workspace: Workspace) -> Path:
    """Write ``results/tables/claims.csv`` and ``.md``; returns the path of the CSV."""
    note = (
        f"Profile {workspace.profile.name}. AUROC, percentage points; 95 % intervals (Student's) "
        "over categories. Without training: the same comparison with a random or an ImageNet "
        "network in place of the trained one, the better of the two. Of several comparisons the "
        "weakest difference, and an interval from the lowest of all lower ends to the lowest of "
        "all upper ends (Table 7: the highest). The paper's: of the same two, over all its "
        "categories. Inconclusive: the interval holds both answers, a comparison is missing, or "
        f"there are fewer than {LEAST_CATEGORIES} categories; the last column then estimates how "
        "many categories like these would decide it."
    )
    path = save_markdown(workspace.results, "claims", note, [readable(table)])
    write_csv(path.with_suffix(".csv"), table)
    return path.with_suffix(".csv")
