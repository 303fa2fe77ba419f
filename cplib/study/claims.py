"""The paper's claims (``claims.csv``), each with three answers from the measured runs.

A claim's ``order`` lists methods, or values of its ``setting``, the better first: "a b > c"
compares a and b with c, "a > b > c" each with the next; the better may fall short by ``tolerance``
points. ``group`` names the categories that it is about, "textures" or "aligned". A claim with a
setting and no order says that no two of the paper's values differ by more than a margin: the range
of the paper's own averages and two of its standard errors. ``null`` is the same order with a
baseline in the trained network's place: where it holds as well, CutPaste is not shown to be the
reason.

The three questions, each answered at 95 %:

- *Here*: does the claim hold on the categories measured? The error comes from the seeds of the
  rows compared; along a setting, from the seeds of all rows of its table (``spread``).
- *Like the paper*: is our difference the paper's on the same categories, to ``AGREE`` points?
- *Elsewhere*: does it hold for categories not tried? The error comes from the categories.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t

from cplib.datasets import DATASETS, MVTEC
from cplib.run import BASELINES
from cplib.study.features import HALFWAY
from cplib.study.paper import PRINTED, groups, published
from cplib.study.report import TIE, folded, markdown, save_markdown, signed, write_csv
from cplib.study.tables import ALL, NAMES, values
from cplib.study.workspace import Workspace

CLAIMS = pd.read_csv(Path(__file__).with_suffix(".csv"), keep_default_na=False)
OURS = "Not in the paper"  # the source of our own questions
YES, NO, OPEN, UNTRAINED = "yes", "no", "open", "yes, but a baseline, too"
ONE_SEED, NOT_MEASURED = "one seed", "not measured"
AGREES, SMALLER, LARGER, OPPOSITE, NOT_PRINTED = "agrees", "smaller", "larger", "opposite", ""
ANSWERS = (YES, UNTRAINED, NO, OPEN, ONE_SEED, NOT_MEASURED)  # in the order they are shown
QUESTIONS = ("here", "paper", "elsewhere")
MARGIN = (
    "Some claims allow a loss: with margin -1.0, a claim holds if the difference is above -1.0."
)
AGREE = 2.0  # points
NEAR = 1.0  # points: what is nearer to the limit speaks for no side, or is as good
PAPER_SEEDS = 5
CERTAIN = "|pretrained-.*"  # runs without an error of seeds: a given number, ImageNet features
QUOTED = ("docc", "u_student", "p_svdd", "fcdd")  # never run: the paper's number is the value
# AUROC, percent: no separation of two groups, and half of a full one
SEPARATION = {"chance": 50.0, "halfway": HALFWAY}
IMAGES = {  # the groups of Fig. 3
    "normal": "normal images",
    "anomaly": "real anomalies",
    "cutpaste": "pasted patches",
    "cutpaste_scar": "pasted scars",
}
LEAST_CATEGORIES = 3  # fewer say nothing about how categories differ: no interval
AVERAGED = groups(MVTEC.categories)  # the categories of each average that the paper prints
COLUMNS = ["id", "claim", "source", "here", "paper", "elsewhere", "weakest", "effect", "error"]
COLUMNS += ["here_low", "here_high", "low", "high", "margin"]
COLUMNS += ["paper_effect", "paper_error", "paper_low", "paper_high"]
COLUMNS += ["null", "null_effect", "categories", "place", "compared", "comparisons"]
COLUMNS += ["rests_on"]  # the categories without which the answer here is another
WORDS = ["here", "ours", "the paper", "baseline", "like the paper", "elsewhere", "where"]

Rows = dict[str, pd.Series]  # a table's rows: values by category, seed and id of the run
Pair = tuple[str, str]
Found = dict[Pair, "Estimate"]


class Estimate(NamedTuple):
    """A difference in each category, and the error that few seeds leave in its mean."""

    gaps: pd.Series  # by category
    error: float = 0.0  # standard error of the mean; NaN where the seeds do not tell
    freedom: float = math.inf  # degrees of freedom of the error

    @property
    def mean(self) -> float:
        """The mean over categories."""
        return self.gaps.mean()

    def here(self, comparisons: int = 1) -> tuple[float, float]:
        """A 95 % interval of the mean on these categories, Bonferroni's over comparisons."""
        half = t.ppf(1 - 0.025 / comparisons, self.freedom) * self.error
        return self.mean - half, self.mean + half

    def elsewhere(self, comparisons: int = 1) -> tuple[float, float]:
        """Student's interval of the mean over categories like these, infinite for too few."""
        if len(self.gaps) < LEAST_CATEGORIES:
            return -math.inf, math.inf
        return Estimate(self.gaps, self.gaps.sem(), len(self.gaps) - 1).here(comparisons)


def welch(parts) -> tuple[float, float]:
    """The error and degrees of freedom of a sum of independent parts (Welch), from theirs."""
    error, freedom = np.array([*parts], dtype=float).reshape(-1, 2).T
    variance, slack = (error**2).sum(), (error**4 / freedom).sum()
    return math.sqrt(variance), variance**2 / slack if slack else math.inf


def spread(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """How single runs of one row vary, by category: pooled ``variance`` and ``freedom`` over rows.

    For networks that differ in one setting at a time (``setting`` and ``value``): two seeds of one
    row say too little, those of all rows say more. A run that is in several rows counts once.
    """
    once = frame.dropna(subset=metric).drop_duplicates("id")
    once = once.groupby(["category", "setting", "value"])[metric]
    freedom = (once.count() - 1).groupby("category").sum()
    squares = (once.var() * (once.count() - 1)).groupby("category").sum()
    return pd.DataFrame({"variance": squares / freedom, "freedom": freedom})


def contrast(
    rows: Rows, plus: Collection[str], minus: Collection[str], pooled: pd.DataFrame | None = None
) -> Estimate | None:
    """The sum of the rows ``plus`` less that of ``minus``, in the categories that all of them have.

    Rows of the same runs are compared run by run. Each category has a variance of its own: that of
    ``pooled`` (``spread``) if given, for one row less another, else each row its own. None if the
    rows share no category.
    """
    (factors := Counter(plus)).subtract(minus)
    used = {name: factor for name, factor in factors.items() if factor}
    if not used or not {*used} <= {*rows}:
        return None
    shared = set.intersection(*({*rows[name].index.unique("category")} for name in used))
    units = {}
    for name, factor in used.items():
        row = rows[name][rows[name].index.get_level_values("category").isin(shared)]
        units[tuple(row.index)] = units.get(tuple(row.index), 0) + factor * row
    total, parts, shares = 0, [], 0
    for row in units.values():
        cells = row.groupby("category")
        total, shares = total + cells.mean(), shares + 1 / cells.size()
        if pooled is None and not row.index.unique("id").str.fullmatch(CERTAIN).all():
            parts += zip(cells.sem() / len(shared), cells.size() - 1, strict=True)
    if pooled is not None:
        variance, freedom = pooled.loc[total.index].to_numpy().T
        parts = zip(np.sqrt(variance * shares) / len(shared), freedom, strict=True)
    return Estimate(total, *welch(parts)) if shared else None


def against_paper(rows: pd.DataFrame) -> Estimate:
    """Ours minus the paper's number on average over the rows of a tidy table (Welch)."""
    ours = zip(rows["stderr"] / len(rows), rows["seeds"].astype(float) - 1, strict=True)
    parts = [*ours, *((error, PAPER_SEEDS - 1) for error in rows["published_stderr"] / len(rows))]
    return Estimate(rows["mean"] - rows["published_mean"], *welch(parts))


def in_points(change: Estimate) -> str:
    """A mean difference with its 95 % interval, if it has one; bold where that leaves out zero."""
    low, high = change.here()
    text = f"{signed(change.mean)} [{low:+.1f}, {high:+.1f}]"
    return signed(change.mean) if math.isnan(low) else f"**{text}**" if low * high > 0 else text


def measured(workspace: Workspace, names=tuple(ALL)) -> dict[str, pd.DataFrame]:
    """The recorded values of the tables that claims are about."""
    return {name: values(workspace, name) for name in {*CLAIMS["table"]} & {*names}}


def verdicts(frames: dict[str, pd.DataFrame], claims: pd.DataFrame = CLAIMS) -> pd.DataFrame:
    """A row a claim (COLUMNS): its three answers, and what is behind them, in points.

    ``effect`` is the mean difference of the comparison with the lowest interval (with one seed, the
    smallest difference of all comparisons), and ``weakest`` names it:
    the first over the second, along a setting the smaller over the larger. ``error`` is its
    standard error, from the seeds. ``margin`` is by how much the first may fall short. The
    intervals are ``here_low`` to ``here_high``, of the weakest comparison alone, and, elsewhere,
    ``low`` to ``high``, from the lowest lower to the lowest upper end of all. ``rests_on`` names
    the categories without which a yes, no or open here would be another answer. ``paper_effect`` is
    the paper's, of the same pair and categories. ``null_effect`` is the difference of a baseline.

    Here: "yes" if every interval lies above the margin (or zero) and every comparison was measured;
    "no" if one lies below, corrected for the number of comparisons; UNTRAINED if the null holds as
    well and what training adds is not certain for each comparison; "one seed" where a value has no
    second seed (along a setting: no row has one); else "open". Elsewhere is answered in the same
    way, but one seed is enough. The paper: "agrees" if every difference less the paper's lies
    within AGREE points; "larger", "smaller" or "opposite" if one lies beyond; else "open"; empty
    where the paper prints no number.
    """
    return pd.DataFrame([_row(claim, frames) for claim in claims.itertuples()], columns=COLUMNS)


def _row(claim, frames: dict[str, pd.DataFrame]) -> dict:
    printed = _printed(claim)
    frame = frames.get(claim.table, pd.DataFrame())
    rows = _rows(frame, claim)
    pooled = spread(frame, claim.metric) if claim.setting and "setting" in frame else None
    places = sorted({c for row in rows.values() for c in row.index.unique("category")})
    given = {name: pd.Series(level, places) for name, level in SEPARATION.items()}
    given |= {k: printed[k]["published_mean"].reindex(places) for k in QUOTED if k in printed}
    rows |= {name: _given(numbers.dropna()) for name, numbers in given.items()}
    pairs = _pairs(claim.order) if claim.order else list(combinations(printed, 2))
    along = printed and not claim.order
    margin = -_range(printed) if along else -float(claim.tolerance or "nan")
    found = _differences(pairs, rows, along, pooled)
    row = {"id": claim.id, "claim": claim.claim, "source": claim.source, "margin": margin}
    row |= {"categories": 0, "compared": len(found), "comparisons": len(pairs), "rests_on": ""}
    if not found:
        return row | dict.fromkeys(QUESTIONS, NOT_MEASURED)
    bound, complete = np.nan_to_num(margin), len(found) == len(pairs)
    row["here"], *_ = _answer(found, Estimate.here, bound, complete)
    if row["here"] == OPEN and any(math.isnan(e.error) for e in found.values()):
        row["here"] = ONE_SEED
    row["elsewhere"], row["low"], row["high"] = _answer(found, Estimate.elsewhere, bound, complete)
    pair = next(iter(found))
    if row["here"] != ONE_SEED:  # what decides: a lower end, of a no an upper end
        end, corrected = (1, len(found)) if row["here"] == NO else (0, 1)
        pair = pd.Series({p: e.here(corrected)[end] for p, e in found.items()}).idxmin()
    row |= {"weakest": " over ".join(pair), "effect": found[pair].mean, "error": found[pair].error}
    if row["here"] != ONE_SEED:
        row["here_low"], row["here_high"] = found[pair].here()
    row["categories"] = min(len(e.gaps) for e in found.values())
    row["place"] = found[pair].gaps.index[0] if row["categories"] == 1 else ""
    if row["here"] in (YES, NO, OPEN) and row["categories"] > 1:
        judged = (pairs, rows, along, pooled, bound, complete)
        others = [c for c in places if _without(c, *judged) != row["here"]]
        row["rests_on"] = ", ".join(others)
    papers = {p: _papers(p, printed, e.gaps.index) for p, e in found.items()}
    row["paper"] = NOT_PRINTED
    if papers[pair]:
        row |= {"paper_effect": papers[pair].mean, "paper_error": papers[pair].error}
        row |= dict(zip(("paper_low", "paper_high"), papers[pair].here(), strict=True))
    if all(papers.values()):
        answer = _agreement([(found[p], papers[p]) for p in found])
        row["paper"] = OPEN if answer == AGREES and not complete else answer
    return _with_null(row, claim, rows, bound) if claim.null else row


def _pairs(order: str) -> list[Pair]:
    parts = [part.split() for part in order.split(">")]
    return [pair for better, worse in pairwise(parts) for pair in product(better, worse)]


def _differences(pairs: list[Pair], rows: Rows, either: bool = False, pooled=None) -> Found:
    """The first of a pair less the second, for all pairs measured, the weakest first."""
    found = [(pair, contrast(rows, pair[:1], pair[1:], pooled)) for pair in pairs]
    found = [(pair, estimate) for pair, estimate in found if estimate]
    if either:  # the smaller of a pair's two values stands first
        turn = [(-1 if e.mean > 0 else 1, pair, e) for pair, e in found]
        found = [(pair[::sign], e._replace(gaps=sign * e.gaps)) for sign, pair, e in turn]
    return dict(sorted(found, key=lambda item: item[1].mean))


def _rows(frame: pd.DataFrame, claim) -> Rows:
    """The measured values of a table in the claim's categories, by method or value of a setting."""
    if frame.empty or claim.metric not in frame:
        return {}
    name = "value" if claim.setting else "method"
    frame = frame[frame["setting"] == claim.setting] if claim.setting else frame
    if "source" in frame:  # of Table 6: the categories that were painted on, not the kinds
        frame = frame.assign(category=frame["source"])
    if claim.group:
        group = {c for data in DATASETS.values() for c in getattr(data, claim.group)}
        frame = frame[frame["category"].isin(group)]
    ids = frame["id"] if "id" in frame else pd.Series(index=frame.index, dtype=object)
    frame = frame.assign(id=ids.fillna("no run: " + frame[name])).dropna(subset=claim.metric)
    found = frame.groupby([name, "category", "seed", "id"])[claim.metric].mean()
    return {key: part.droplevel(0) for key, part in found.groupby(level=0)}


def _given(by_category: pd.Series) -> pd.Series:
    """Numbers as a row of values without runs."""
    return pd.concat({(0, ""): by_category}, names=["seed", "id", "category"]).swaplevel(0, 2)


def _printed(claim) -> dict[str, pd.DataFrame]:
    """The paper's numbers of a claim's table and metric by row, each by category."""
    if claim.table not in PRINTED:
        return {}
    numbers = published(claim.table)
    numbers = numbers[(numbers["metric"] == claim.metric) & (numbers["setting"] == claim.setting)]
    found = numbers.groupby("value" if claim.setting else "method", sort=False)
    return {key: part.set_index("category") for key, part in found}


def _range(printed: dict[str, pd.DataFrame]) -> float:
    """The range of the paper's own averages, and two of its standard errors."""
    along = pd.concat(printed).xs("average_all", level="category")
    return np.ptp(along["published_mean"]) + 2 * along["published_stderr"].max()


def _papers(pair: Pair, printed: dict[str, pd.DataFrame], categories) -> Estimate | None:
    """The paper's difference on these categories; None where it does not print it.

    If the paper prints averages alone, the average of exactly these categories counts.
    """
    same = [name for name, part in AVERAGED.items() if {*part} == {*categories}]
    for places in (list(categories), same):
        cells = [printed[name].reindex(places) for name in pair if name in printed]
        means = [part["published_mean"] for part in cells]
        if places and len(cells) == 2 and (gaps := means[0] - means[1]).notna().all():
            errors = pd.concat([part["published_stderr"].fillna(0) for part in cells]) / len(places)
            gaps = pd.Series(gaps.mean(), categories) if places is same else gaps
            return Estimate(gaps, *welch((error, PAPER_SEEDS - 1) for error in errors))
    return None


def _agreement(pairs: list[tuple[Estimate, Estimate]]) -> str:
    """Whether our differences are the paper's, by the comparison that speaks most against it.

    What speaks against is corrected for the number of comparisons.
    """
    found = []
    for ours, theirs in pairs:
        sign = math.copysign(1, theirs.mean)
        ours = ours._replace(gaps=sign * ours.gaps)
        more = Estimate(ours.gaps - sign * theirs.gaps, *welch([ours[1:], theirs[1:]]))
        (low, high), (sure_low, sure_high) = more.here(), more.here(len(pairs))
        if math.isnan(more.error):
            found.append(ONE_SEED)
        elif low >= -AGREE and high <= AGREE:
            found.append(AGREES)
        elif sure_high < -AGREE:
            turned = ours.here(len(pairs))[1] < 0 and abs(theirs.mean) > TIE
            found.append(OPPOSITE if turned else SMALLER)
        else:
            found.append(LARGER if sure_low > AGREE else OPEN)
    return min(found, key=(OPPOSITE, SMALLER, LARGER, ONE_SEED, OPEN, AGREES).index)


def _answer(found: Found, limits: Callable, bound: float, complete: bool) -> tuple:
    """Whether all differences lie above a bound (yes), or one below (no), and the interval's ends.

    What speaks against is corrected for the number of comparisons. The ends are the lowest of all
    lower and of all upper ends, NaN where there is no interval.
    """
    ends = [(limits(e)[0], limits(e, len(found))[1]) for e in found.values()]
    low, high = np.min(ends, axis=0)
    fails = any(high < bound for _, high in ends)
    answer = YES if low > bound and complete else NO if fails else OPEN
    return (answer, low, high) if np.isfinite([low, high]).all() else (answer, math.nan, math.nan)


def _without(category: str, pairs: list[Pair], rows: Rows, either: bool, pooled, *judged) -> str:
    """The answer here if one category were left out."""
    rows = {k: row.drop(category, level="category", errors="ignore") for k, row in rows.items()}
    return _answer(_differences(pairs, rows, either, pooled), Estimate.here, *judged)[0]


def _with_null(row: dict, claim, rows: Rows, bound: float) -> dict:
    """The row with the better baseline in the trained network's place, and what that changes."""
    nulls = []
    for baseline in BASELINES:
        pairs = _pairs(claim.null.replace(BASELINES[0], baseline))
        if found := _differences(pairs, rows):
            pair, estimate = next(iter(found.items()))
            nulls.append((estimate.mean, " over ".join(pair)))
            both = zip(_pairs(claim.order), pairs, strict=True)
            gains = [contrast(rows, [a, d], [b, c]) for (a, b), (c, d) in both]
            for question, limits in (("here", Estimate.here), ("elsewhere", Estimate.elsewhere)):
                alone, *_ = _answer(found, limits, bound, len(found) == len(pairs))
                adds = all(gain and limits(gain)[0] > 0 for gain in gains)
                if row[question] == alone == YES and not adds:
                    row[question] = UNTRAINED
    return row | dict(zip(("null_effect", "null"), max(nulls, default=()), strict=False))


def summary(table: pd.DataFrame) -> str:
    """How many of the paper's claims have which answers: a table in Markdown, and sentences."""
    table = table[table["source"] != OURS]
    counts = {question: table[question].value_counts() for question in ("here", "elsewhere")}
    grid = pd.DataFrame(counts).reindex(ANSWERS).dropna(how="all").convert_dtypes()
    grid = grid.rename(index=str.capitalize).rename_axis("claims of the paper")
    decided, is_open, single = (
        table["here"].isin(answers).sum() for answers in (ANSWERS[:3], [OPEN], [ONE_SEED])
    )
    text = f"The paper's {len(table)} claims here: {decided} decided, {is_open} open, {single} on "
    text += f"one seed or one ensemble.\n\n{markdown(grid)}"
    named = table["rests_on"].notna() & table["rests_on"].ne("")  # from a file, NaN
    fragile = table["here"][named].eq(OPEN)
    if decided:
        text += f"\n{(~fragile).sum()} of the {decided} decided would have another answer if one "
        text += f"category were left out, and so would {fragile.sum()} of the {is_open} open.\n"
    left = table.loc[table["here"] == NOT_MEASURED, "claim"].str.rstrip(".")
    return text + f"\n\nNot measured: {'; '.join(left)}." * (len(left) > 0)


def readable(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The measured claims as a person reads them: two tables, a row a claim, by the answer here.

    The first has the answers here and elsewhere, our difference, and the paper's with its place;
    the second has a baseline's difference and whether ours is like the paper's, where there is
    either.
    """
    grid = _words(table[table["here"] != NOT_MEASURED])
    numbers = grid["the paper"].where(grid["the paper"] == "", grid["the paper"] + "; ")
    places = grid["where"].replace(OURS, OURS.lower())
    answers = grid[["here", "elsewhere", "ours"]].assign(**{"the paper": numbers + places})
    more = grid[["baseline", "like the paper"]]
    return answers, more[(more != "").any(axis=1)]


def _words(table: pd.DataFrame) -> pd.DataFrame:
    """All texts of ``readable``."""
    rows, rank = {}, ANSWERS.index
    table = table.sort_values("here", key=lambda answers: answers.map(rank), kind="stable")
    for row in table.itertuples():
        where = f", {row.categories} categor{'y' if row.categories == 1 else 'ies'}"
        more = where * (row.categories > 0)
        among = f", on {row.place} alone" * (row.categories == 1)
        among += f", the weakest of {row.compared}" * (row.compared > 1)
        among += f" ({row.comparisons - row.compared} not measured)" * (
            0 < row.compared < row.comparisons
        )
        if row.here == NO and row.paper_effect < np.nan_to_num(row.margin) + TIE:
            among += "; the paper's own numbers on these categories do not support it either"
        if row.rests_on:
            among += f"; another answer if one is left out: {row.rests_on}"
        of = row.weakest if row.comparisons > 1 else ""
        interval = f" [{row.here_low:+.1f}, {row.here_high:+.1f}]" * pd.notna(row.here_low)
        error = f"±{row.paper_error:.1f}" * (row.paper_error > 0)
        rows[row.claim] = {
            "here": f"**{row.here.capitalize()}**{_side(row)}",
            "ours": _points(row.effect, interval, row.margin, of) + among,
            "the paper": _points(row.paper_effect, error),
            "baseline": _points(row.null_effect, of=row.null),
            "like the paper": row.paper,
            "elsewhere": row.elsewhere + more,
            "where": row.source,
        }
    grid = pd.DataFrame.from_dict(rows, orient="index")
    return grid.reindex(columns=WORDS).astype(object).rename_axis("claim")


def _alike(row) -> bool:
    """Whether the interval of an open claim of one comparison leaves less than NEAR either way."""
    single = row.here == OPEN and row.comparisons == 1
    return single and row.here_low > -NEAR and row.here_high < NEAR


def _side(row) -> str:
    """What else is known of an open claim, or of one with a single seed.

    For which side its value speaks: if comparisons are missing, not for the claim.
    """
    if _alike(row):
        return f" (on average they differ by less than {NEAR:g} point)"
    beyond = row.effect - np.nan_to_num(row.margin)
    if row.here != ONE_SEED or (row.compared < row.comparisons and beyond > -NEAR):
        return ""
    if abs(beyond) < NEAR:
        return f" (our value is within {NEAR:g} point of the limit)"
    if beyond < 0:
        return " (our value speaks against it)"
    also = ", and so does a baseline's" if row.null_effect > np.nan_to_num(row.margin) else ""
    return f" (our value speaks for it{also})"


def _points(effect: float, spread: str = "", margin=math.nan, of: str = "") -> str:
    """A difference with its interval or error, the margin, and which comparison it is."""
    if pd.isna(effect):
        return ""
    first, _, second = of.partition(" over ")
    if level := SEPARATION.get(second):
        return f"{_separates(first)} with AUROC {level + effect:.1f} (limit: {level:g})"
    text = f"{signed(effect)}{spread}" + ("" if pd.isna(margin) else f", margin {margin:+.1f}")
    return text + (f" ({NAMES[first]} minus {NAMES[second]})" if of else "")


def _separates(pair: str) -> str:
    """What tells two groups of images apart (Fig. 3): the Gaussian, or a plane in the features."""
    *network, a, b = pair.split("/")
    head = "".join(f"{NAMES[name]}: " for name in network)
    if a == "normal":
        return f"{head}the Gaussian separates {IMAGES[b]} from normal images"
    return f"{head}a plane separates {IMAGES[a]} from {IMAGES[b]}"


def seen(workspace: Workspace, *names: str) -> str:
    """What was seen of the claims about these tables, folded Markdown: the answer here first."""
    table = verdicts(measured(workspace, names), CLAIMS[CLAIMS["table"].isin(names)])
    left = int((table["here"] == NOT_MEASURED).sum())
    table = table[table["here"] != NOT_MEASURED]
    text = "Claims of the paper and comparisons of ours, judged on the categories measured here "
    text += "(notebook 11 says how). "
    text += "Differences are in points of AUROC"
    intervals = table["here_low"].notna().any()
    text += ", with a 95 % interval from the seeds in brackets." if intervals else "."
    if workspace.profile.dataset == "demo":
        text += " On the demo set an answer illustrates, and is no evidence for the method. The "
        text += "answers on MVTec AD differ: see `results/quick`."
    if (table["compared"] > 1).any():
        text += " *The weakest of n*: of n comparisons this has the lowest interval (with one "
        text += "seed, the smallest difference)."
    if table["null_effect"].notna().any():
        text += " *A baseline*: the same comparison with a random network or ImageNet features."
    if table["margin"].notna().any():
        text += f" {MARGIN}"
    lines = [text, ""]
    for claim, row in _words(table).iterrows():
        said = [f"Ours: {row['ours']}."]
        said += [f"The paper: {row['the paper']}."] * bool(row["the paper"])
        said += [f"A baseline: {row['baseline']}."] * bool(row["baseline"])
        lines.append(f"- {row['here']}: {claim} {' '.join(said)}")
    if left:
        lines.append(f"- **Not measured**: {left} claim{'s' * (left > 1)} about this table.")
    return folded("Each claim, with its answer", "\n".join(lines))


def headline(
    workspace: Workspace, claim: str, yes: str, still_open: str, no: str, alike: str = ""
) -> str:
    """The sentence for a claim's answer here, bold, with our difference and the paper's.

    ``claim`` is its id. A claim that a baseline fulfils, too, counts as *open*: CutPaste is not
    shown to be the reason. ``alike`` is for an open one whose interval lies within NEAR of zero.
    With one seed, ``yes`` is a question. Empty where nothing was measured.
    """
    chosen = CLAIMS[CLAIMS["id"] == claim]
    (row,) = verdicts(measured(workspace, chosen["table"]), chosen).itertuples()
    if row.here == NOT_MEASURED:
        return ""
    paper = f" (the paper on these categories: {signed(row.paper_effect)})"
    paper = paper if pd.notna(row.paper_effect) else ""
    if row.here == ONE_SEED:
        return f"{yes}? **One seed is no answer**: {signed(row.effect)} points{paper}."
    interval = f" [{row.here_low:+.1f}, {row.here_high:+.1f}]"
    sentence = {YES: yes, NO: no}.get(row.here, still_open)
    sentence = alike if alike and _alike(row) else sentence
    rests = f"; another answer if one is left out: {row.rests_on}" if row.rests_on else ""
    place = f", on {row.place} alone" if row.place else ""
    return f"**{sentence}**: {signed(row.effect)} points{interval}{place}{paper}{rests}."


def save_claims(table: pd.DataFrame, workspace: Workspace) -> Path:
    """Write ``results/tables/claims.csv`` and ``.md``; returns the path of the CSV."""
    note = (
        f"Profile {workspace.profile.name}. Here: on the categories measured; the error comes from "
        "the seeds. Elsewhere: for categories not tried; the error comes from how categories "
        f"differ, so one seed is enough. Each answer is at 95 %.\n\n{summary(table)}\n\n"
        "Differences are in points of AUROC: ours with a 95 % interval from the seeds, the paper's "
        "± one standard error, on the same categories. Of several comparisons the one with the "
        f"lowest interval is shown. {MARGIN} Where the paper prints no number on these categories, "
        "its place stands alone.\n\nThe second table has, for the same claims: baseline, the same "
        "difference with a random network or ImageNet features in place of the trained network, "
        "the better of the two; like the paper, whether the two differences agree within "
        f"{AGREE:g} points."
    )
    path = save_markdown(workspace.results, "claims", note, [*readable(table)])
    write_csv(path.with_suffix(".csv"), table)
    return path.with_suffix(".csv")
