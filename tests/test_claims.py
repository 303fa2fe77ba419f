"""The paper's claims: answers follow from made-up runs, intervals cover what they promise."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cplib.apps.workspace import ROOT
from cplib.datasets import DEMO, MVTEC
from cplib.study import claims
from cplib.study.claims import CLAIMS, LEAST_CATEGORIES, Estimate, contrast, measured, verdicts
from cplib.study.features import GROUPS, PAIRS
from cplib.study.figures import ANSWER_MARKS, forest
from cplib.study.measures import constants
from cplib.study.paper import PRINTED, published
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.store import Places, run_folder
from cplib.study.synthetic import SYNTHETIC
from cplib.study.tables import TABLES, rows_of
from cplib.study.workspace import Workspace

from records import record

T1, T2, T4 = "table1_image_level", "table2_pixel_level", "table4_cutout_variants"
T6, T7 = "table6_synthetic_anomalies", "table7_learning_rate_and_epochs"
RATES = ("3.33", "1", "0.333", "0.1")
FIVE = MVTEC.categories[:5]
ORDER = {"cutpaste": 80, "cutpaste_scar": 85, METHOD: 90}


def made_up(levels, categories=FIVE, seeds=3, between=0.0, noise=0.3, row="method"):
    """Runs of each method around its level, on categories that differ by tens of points.

    ``between``: how much a method's own level differs from category to category.
    """
    rng = np.random.default_rng(0)
    cells = list(product(levels, categories, range(seeds)))
    hard = dict(zip(categories, rng.uniform(-30, 0, len(categories)), strict=True))
    own = {(m, c): rng.normal(0, between) for m in levels for c in categories}
    values = [levels[m] + hard[c] + own[m, c] + rng.normal(0, noise) for m, c, _ in cells]
    frame = pd.DataFrame(cells, columns=[row, "category", "seed"]).assign(image_auroc=values)
    return frame.assign(id=[f"{m}-{c}-seed{seed}" for m, c, seed in cells])


def beside(table, paper, gaps, metric, seeds=3):
    """Runs of methods whose means lie by ``gaps`` above a method of the paper, in FIVE."""
    numbers = published(table).query("method == @paper and metric == @metric")
    numbers = numbers.set_index("category")["published_mean"][list(FIVE)]
    frame = made_up(dict.fromkeys(gaps, 0), seeds=seeds, noise=0)
    noise = (frame["seed"] - (seeds - 1) / 2) / 10
    values = frame["category"].map(numbers) + frame["method"].map(gaps) + noise
    return frame.assign(**{metric: values})


def along_rates(levels, rates=RATES, **options):
    levels = dict(zip(rates, levels, strict=True))
    return made_up(levels, row="value", **options).assign(method=METHOD, setting="learning_rate")


def verdict(frames, claim):
    return verdicts(frames, CLAIMS[CLAIMS["id"] == claim]).set_index("id").loc[claim]


# The claims as data


def test_every_claim_has_an_id_a_sentence_and_a_place():
    assert len(CLAIMS) == CLAIMS["id"].nunique() == CLAIMS["claim"].nunique()
    assert CLAIMS["claim"].str.endswith(".").all()
    assert CLAIMS["source"].str.startswith(("Table ", "Section ", "Fig. ", "Not in")).all()
    assert ((CLAIMS["order"] != "") | (CLAIMS["setting"] != "")).all()
    assert set(CLAIMS["group"]) == {"", "textures", "aligned"}
    assert set(PRINTED) <= set(CLAIMS["table"])


@pytest.mark.parametrize("claim", list(CLAIMS.itertuples()), ids=CLAIMS["id"])
def test_a_claim_names_only_rows_of_its_table(claim):
    if claim.table == "features":
        pairs = {f"normal/{g}" for g in GROUPS[1:]} | {"/".join(p) for p in PAIRS}
        rows = pairs | {f"untrained/{pair}" for pair in pairs} | set(claims.SEPARATION)
    elif claim.table == "density":
        rows = {"one", "mixture"}
    elif claim.setting:
        along = published(claim.table).query("setting == @claim.setting")
        rows = set(along["value"])
        assert rows and claim.setting in TABLES[claim.table].axes
    else:
        printed = published(claim.table)
        assert claim.metric in set(printed["metric"])
        profile = PROFILES["paper"]
        rows = {row.key for row in rows_of(profile, claim.table)} | set(printed["method"])
        rows |= {"untrained_ensemble", "untrained_shared"}  # judged beside, in no table
    assert set(f"{claim.order} {claim.null}".replace(">", "").split()) <= rows


def test_the_papers_own_averages_bear_every_claim_out():
    for claim in CLAIMS.itertuples():
        printed = claims._printed(claim)
        places = MVTEC.textures if claim.group == "textures" else MVTEC.categories
        found = [claims._papers(pair, printed, places) for pair in claims._pairs(claim.order)]
        assert all(estimate.mean > 0 for estimate in found if estimate), claim.id


def test_the_papers_difference_is_of_the_same_pair_and_categories():
    two = verdict({T1: made_up(ORDER, ("bottle", "pill"))}, "3way-over-cutpaste")
    assert two.paper_effect == pytest.approx((98.3 - 99.2 + 92.4 - 93.4) / 2)
    assert two.paper_error == pytest.approx(np.linalg.norm([0.5, 0.2, 1.3, 0.9]) / 2)
    levels = {"cutpaste": 90, "confetti": 89, "cutout": 80, "cutout_mean": 80, "cutout_color": 80}
    averages = verdict({T4: made_up(levels)}, "cutpaste-over-fillings")  # on all textures
    assert averages.paper_effect == pytest.approx(91.7 - 80.1)
    assert averages.paper_error == pytest.approx(np.hypot(0.7, 2.3))
    for categories in (FIVE[:4], DEMO.categories):
        row = verdict({T4: made_up(levels, categories)}, "cutpaste-over-fillings")
        assert (row.here, row.paper, np.isnan(row.paper_effect)) == ("yes", "", True)


# Here and elsewhere


def test_nothing_measured_is_not_measured():
    empty = pd.DataFrame(columns=["method", "category", "seed", "image_auroc", "pixel_auroc"])
    for frames in ({}, dict.fromkeys(CLAIMS["table"], empty), {T1: pd.DataFrame()}):
        table = verdicts(frames)
        assert list(table["id"]) == list(CLAIMS["id"])
        assert (table[["here", "paper", "elsewhere"]] == "not measured").all(axis=None)
        assert table[["weakest", "effect", "error", "low", "high"]].isna().all(axis=None)
        assert (table[["categories", "compared"]] == 0).all(axis=None)


@pytest.mark.parametrize(("better", "expected"), [(84, "yes"), (76, "no"), (80, "open")])
def test_the_answers_follow_the_difference(better, expected):
    frame = made_up({"cutpaste": 80, METHOD: better})
    table = verdicts({T1: frame}).set_index("id")
    row = table.loc["3way-over-cutpaste"]
    assert (row.here, row.elsewhere) == (expected, expected)
    assert row.effect == pytest.approx(better - 80, abs=0.5)
    assert row.here_low < row.effect < row.here_high and row.low < row.effect < row.high
    assert (row.categories, row.compared) == (5, 1)
    assert table.loc["3way-over-scar", "here"] == "not measured"
    assert verdict({T1: frame.drop(columns="id")}, row.name).error == row.error


def test_here_needs_two_seeds_of_each_value_and_elsewhere_categories_that_agree():
    row = verdict({T1: made_up({"cutpaste": 80, METHOD: 90}, between=8)}, "3way-over-cutpaste")
    assert (row.here, row.elsewhere) == ("yes", "open")
    for few in range(1, LEAST_CATEGORIES):
        row = verdict({T1: made_up({"cutpaste": 80, METHOD: 99}, FIVE[:few])}, row.name)
        assert (row.here, row.elsewhere, row.categories) == ("yes", "open", few)
        assert np.isnan([row.low, row.high]).all()
    frame = made_up(ORDER)
    for method, claim in ((METHOD, row.name), ("cutpaste", "cutpaste-scar-3way-order")):
        part = frame[(frame["method"] != method) | (frame["seed"] == 0)]
        row = verdict({T1: part}, claim)
        assert (row.here, row.elsewhere, row.paper) == ("one seed", "yes", "one seed")
        assert np.isnan([row.here_low, row.here_high]).all() and row.low > 0


def test_only_categories_that_both_methods_have_are_compared():
    frame = made_up({"cutpaste": 80, METHOD: 84})
    first = frame["category"] == FIVE[0]
    frame.loc[first, "image_auroc"] = np.where(frame[first]["method"] == METHOD, np.nan, 0)
    row = verdict({T1: frame}, "3way-over-cutpaste")
    assert (row.here, row.categories) == ("yes", 4)


@pytest.mark.parametrize(
    ("scar", "noise", "here", "weakest"),
    [
        (84, 0.3, "yes", "cutpaste_scar over cutpaste"),
        (88, 8, "open", "cutpaste_3way over cutpaste_scar"),
        (95, 0.3, "no", "cutpaste_3way over cutpaste_scar"),
    ],
)
def test_an_order_stands_or_falls_with_its_weakest_comparison(scar, noise, here, weakest):
    frame = made_up(ORDER | {"cutpaste_scar": scar}, noise=noise)
    row = verdict({T1: frame}, "cutpaste-scar-3way-order")
    assert (row.here, row.weakest, row.compared) == (here, weakest, 2)


def test_the_comparison_that_leaves_an_order_open_is_named():
    frame = made_up(ORDER | {"cutpaste_scar": 82, METHOD: 86}, noise=0.1)
    wide = (frame["method"] == METHOD) & (frame["seed"] == 0)
    frame.loc[wide, "image_auroc"] += np.resize([20, -20], wide.sum())
    table = verdicts({T1: frame}, CLAIMS[CLAIMS["id"] == "cutpaste-scar-3way-order"])
    (row,) = table.itertuples()
    means = frame.groupby("method")["image_auroc"].mean()
    certain = means["cutpaste_scar"] - means["cutpaste"]  # smaller, but its error is, too
    assert (row.here, row.weakest) == ("open", "cutpaste_3way over cutpaste_scar")
    assert row.here_low < 0 < certain < row.effect


def test_the_comparison_that_refutes_an_order_is_named():
    frame = made_up(ORDER | {"cutpaste": 84, "cutpaste_scar": 82, METHOD: 78}, noise=0.1)
    wide = (frame["method"] == METHOD) & (frame["seed"] == 0)
    frame.loc[wide, "image_auroc"] += np.resize([20, -20], wide.sum())
    row = verdict({T1: frame}, "cutpaste-scar-3way-order")
    assert (row.here, row.weakest) == ("no", "cutpaste_scar over cutpaste")
    means = frame.groupby("method")["image_auroc"].mean()
    assert means[METHOD] - means["cutpaste_scar"] < row.effect < 0  # smaller, but uncertain
    single = frame[(frame["method"] != METHOD) | (frame["seed"] == 0)]  # that has no interval
    row = verdict({T1: single}, "cutpaste-scar-3way-order")
    assert (row.here, row.weakest) == ("no", "cutpaste_scar over cutpaste")


def test_a_headline_is_the_sentence_for_the_answer(monkeypatch):
    words = {"yes": "more", "still_open": "not shown", "no": "less", "alike": "alike"}
    for ours, seeds, start in (
        (85, 3, "**more**: +"),
        (70, 3, "**less**: -"),
        (85, 1, "more? **One seed is no answer**: +"),
        (ORDER["cutpaste"], 3, "**alike**: "),
    ):
        frame = made_up(ORDER | {METHOD: ours}, noise=0.1)
        frame = frame[frame["seed"] < seeds]
        monkeypatch.setattr(claims, "measured", lambda *_, frame=frame: {T1: frame})
        text = claims.headline(None, "3way-over-cutpaste", **words)
        assert text.startswith(start)
        assert "(the paper on these categories: +" in text
    monkeypatch.setattr(claims, "measured", lambda *_: {})
    assert claims.headline(None, "3way-over-cutpaste", **words) == ""


def test_a_category_without_which_the_answer_is_another_is_named():
    frame = made_up(ORDER | {METHOD: 85}, noise=0.1)
    some = CLAIMS[CLAIMS["id"] == "3way-over-cutpaste"]
    (row,) = verdicts({T1: frame}, some).itertuples()
    assert (row.here, row.rests_on) == ("yes", "")
    ours, places = frame["method"] == METHOD, list(frame["category"].unique())
    frame.loc[ours, "image_auroc"] -= row.effect + 1  # below in every category, by a point
    frame.loc[ours & (frame["category"] == places[1]), "image_auroc"] += 10
    table = verdicts({T1: frame}, some)
    (row,) = table.itertuples()
    assert (row.here, row.rests_on) == ("yes", places[1])
    text = claims.readable(table)[0]["ours"].item()
    assert text.endswith(f"; another answer if one is left out: {places[1]}")
    frame.loc[ours & (frame["category"] == places[1]) & (frame["seed"] == 0), "image_auroc"] -= 30
    (row,) = verdicts({T1: frame}, some).itertuples()
    assert (row.here, row.rests_on) == ("open", places[1])


def test_an_order_measured_in_part_cannot_hold_but_can_fail():
    for scar, expected in ((85, "open"), (60, "no")):
        part = made_up({"cutpaste": 80, "cutpaste_scar": scar})
        row = verdict({T1: part}, "cutpaste-scar-3way-order")
        assert (row.here, row.elsewhere) == (expected, expected)
        assert (row.compared, row.comparisons) == (1, 2)


def test_a_quoted_method_has_the_papers_number_and_no_other_method_has():
    for above, expected in ((1, "yes"), (-1, "no")):
        frame = beside(T2, "p_svdd", {"cutpaste_3way_patch": above}, "pixel_auroc")
        row = verdict({T2: frame}, "patch-over-p-svdd")
        assert (row.here, row.categories) == (expected, 5)
        assert row.effect == pytest.approx(above)
        assert verdict({T2: frame}, "patch-over-gradcam").here == "not measured"
    frame["category"] = "brick"  # for which the paper prints nothing
    assert verdict({T2: frame}, "patch-over-p-svdd").here == "not measured"


def test_table_6_is_compared_over_the_categories_that_were_painted_on():
    parts = [made_up({"cutout": 80 + i, METHOD: 90}) for i in range(len(SYNTHETIC))]
    frame = pd.concat(parts, keys=SYNTHETIC, names=["kind"]).reset_index(level=0)
    frame = frame.rename(columns={"category": "source", "kind": "category"})
    row = verdict({T6: frame}, "3way-over-cutout-shapes")
    assert (row.here, row.categories) == ("yes", 5)
    assert row.effect == pytest.approx(10 - 3, abs=0.3)


@pytest.mark.parametrize(
    ("pretrained", "seeds", "expected"),
    [
        (-1, 3, "yes"),
        (0.5, 3, "yes"),  # and training adds something
        (0.97, 3, "yes, but a baseline, too"),
        (0.97, 1, "one seed"),
    ],
)
def test_what_an_untrained_network_does_as_well_holds_untrained_too(pretrained, seeds, expected):
    gaps = {"cutpaste_3way_patch": 1, "untrained": -2, "pretrained": pretrained}
    row = verdict({T2: beside(T2, "p_svdd", gaps, "pixel_auroc", seeds)}, "patch-over-p-svdd")
    assert (row.here, row.null) == (expected, "pretrained over p_svdd")
    assert (row.effect, row.null_effect) == pytest.approx((1, pretrained))


def test_a_group_of_categories_is_judged_alone_and_beside_the_papers_average_of_it():
    categories = MVTEC.textures + MVTEC.objects
    levels = {"0": 80, "0.1": 82, "0.2": 83, "0.3": 83}
    frame = made_up(levels, categories, row="value").assign(method=METHOD, setting="patch_jitter")
    objects = frame["category"].isin(MVTEC.objects)
    frame.loc[objects & (frame["value"] == "0"), "image_auroc"] += 50
    row = verdict({"table8_jitter_and_patch_size": frame}, "jitter-helps-textures")
    assert (row.here, row.weakest, row.categories) == ("yes", "0.1 over 0", 5)
    assert row.paper_effect == pytest.approx(97.0 - 96.2)


def test_a_mixture_may_gain_less_than_its_tolerance_run_by_run():
    one = made_up({"one": 80}, noise=10)
    for gain, expected in ((0.5, "yes"), (2, "no")):
        other = one.assign(method="mixture", image_auroc=one["image_auroc"] + gain)
        row = verdict({"density": pd.concat([one, other])}, "mixture-no-better")
        assert (row.here, row.margin) == (expected, -1)
        assert row.error == pytest.approx(0, abs=1e-9)  # of the same runs


# Insensitivity: a test of equivalence


@pytest.mark.parametrize(
    ("levels", "noise", "expected"),
    [
        ((90, 90, 90.2, 90.1), 0.3, "yes"),
        ((90, 90, 90, 80), 0.3, "no"),
        ((90, 90, 90, 88.2), 0.3, "open"),  # about the margin
        ((90, 90, 90, 90), 8, "open"),  # noise is no insensitivity
        ((90, 90, 90), 0.3, "open"),  # not all that the paper tried
    ],
)
def test_insensitivity_follows_the_largest_difference_and_the_margin(levels, noise, expected):
    frame = along_rates(levels, RATES[: len(levels)], noise=noise)
    row = verdict({T7: frame}, "insensitive-learning-rate")
    assert row.here == expected
    assert row.here_low <= row.effect <= min(0, row.here_high)
    assert row.margin == pytest.approx(-0.7 - 2 * 0.6)  # the paper's range and standard error
    assert (row.compared, row.comparisons) == (6 if len(levels) == 4 else 3, 6)
    if noise < 1:
        assert row.effect == pytest.approx(min(levels) - max(levels), abs=0.5)


# Like the paper


@pytest.mark.parametrize(
    ("more", "seeds", "expected"),
    [
        *((0, 3, "agrees"), (1.5, 3, "open"), (4, 3, "larger"), (-4, 3, "smaller")),
        *((-8, 3, "opposite"), (0, 1, "one seed")),
    ],
)
def test_our_difference_is_set_against_the_papers_on_the_same_categories(more, seeds, expected):
    gap = 97.0 - 91.7  # on textures
    frame = beside(T1, "cutpaste", {"cutpaste": 0, METHOD: gap + more}, "image_auroc", seeds)
    row = verdict({T1: frame}, "3way-over-cutpaste")
    assert row.paper == expected
    assert (row.effect, row.paper_effect) == pytest.approx((gap + more, gap), abs=0.1)


def test_all_comparisons_agree_with_the_paper_or_one_speaks_against_it_for_sure():
    def pair(ours, theirs=5.0):
        return [Estimate(pd.Series([gap, gap]), error) for gap, error in ((ours, 1.1), (theirs, 0))]

    same = [Estimate(pd.Series([5.0, 5.0]))] * 2
    assert claims._agreement([same, same]) == "agrees"
    assert claims._agreement([same, pair(6)]) == "open"
    assert claims._agreement([pair(0.5)]) == claims._agreement([pair(-0.5, -5)]) == "smaller"
    assert claims._agreement([pair(0.5)] + 9 * [same]) == "open"  # corrected for ten
    assert claims._agreement([pair(12), pair(-6), pair(0.5)]) == "opposite"


# What was recorded


def test_the_claims_about_features_read_the_records_beside_the_runs(tmp_path):
    profile = replace(PROFILES["quick"], categories=("bottle", "screw", "grid"))
    workspace = Workspace(profile, profile.categories, Places(tmp_path))
    assert measured(workspace)["features"].empty
    for method, auroc in ((METHOD, 99), ("untrained", 60)):
        pairs = {f"{a} {b}": {"classifier_auroc": auroc} for a, b in PAIRS}
        found = {"gaussian_auroc": dict.fromkeys(GROUPS[1:], 40), "pairs": pairs}
        found["constants"] = constants("features")
        for run in profile.runs((method,), profile.categories):
            if run.seed:
                continue
            record(tmp_path, run)
            (run_folder(run, tmp_path) / "features.json").write_text(json.dumps(found))
    table = verdicts(measured(workspace)).set_index("id")
    found = table.loc[["synthetic-unlike-real", "synthetic-separates-real"]]
    assert list(found["here"]) == ["one seed", "one seed"]
    assert list(found["elsewhere"]) == ["yes", "no"]
    assert list(found["effect"]) == [99 - 75, 40 - 50]
    assert list(found["categories"]) == [3, 3]
    assert list(found["null_effect"]) == [60 - 75, 40 - 50]


def test_every_committed_claim_whose_values_have_two_seeds_is_answered_here():
    quick = PROFILES["quick"]
    frames = measured(Workspace(quick, quick.categories, Places(ROOT / "results" / "quick")))
    for row, claim in zip(verdicts(frames).itertuples(), CLAIMS.itertuples(), strict=True):
        found = claims._rows(frames[claim.table], claim)
        named = {*claim.order.replace(">", "").split()} or {*found}
        named -= {"pretrained", "pool_pretrained", "level7_pretrained"}  # without seeds
        if row.here == claims.NOT_MEASURED:
            assert not named <= {*found}
            continue
        least = min(found[name].groupby("category").size().min() for name in named & {*found})
        assert row.here in {claims.YES, claims.UNTRAINED, claims.NO, claims.OPEN} or least == 1


# Intervals


def rows_of_runs(frame):
    frame = frame.set_index(["category", "seed", "id"])
    return {name: part["image_auroc"] for name, part in frame.groupby("method")}


def test_the_error_in_one_category_is_welchs():
    rows = rows_of_runs(made_up({"a": 80, "b": 84}, ("grid",), seeds=5, noise=2))
    ours = contrast(rows, ["b"], ["a"])
    known = stats.ttest_ind(rows["b"], rows["a"], equal_var=False)
    assert (ours.mean / ours.error, ours.freedom) == pytest.approx((known.statistic, known.df))
    assert ours.here() == pytest.approx(tuple(known.confidence_interval()))


def test_along_a_setting_the_error_is_students_and_every_row_tells_how_seeds_vary():
    frame = along_rates((80, 84, 84), RATES[:3], categories=("grid",), seeds=4, noise=2)
    rows = {v: part.set_index(["category", "seed", "id"]) for v, part in frame.groupby("value")}
    rows = {value: part["image_auroc"] for value, part in rows.items()}
    two = frame[frame["value"].isin([*rows][:2])]
    a, b, c = rows
    ours = contrast(rows, [b], [a], claims.spread(two, "image_auroc"))
    known = stats.ttest_ind(rows[b], rows[a])
    assert (ours.mean / ours.error, ours.freedom) == pytest.approx((known.statistic, known.df))
    again = pd.concat([frame, frame[frame["value"] == c].assign(setting="updates")])
    pooled = claims.spread(again, "image_auroc").loc["grid"]  # a run in two rows counts once
    assert pooled["freedom"] == 9
    assert pooled["variance"] == pytest.approx(np.mean([row.var() for row in rows.values()]))


def test_intervals_here_hold_the_difference_on_these_categories_as_often_as_they_promise():
    """Seeds differ little in some categories and much in others, as ours do."""
    rng, held, errors = np.random.default_rng(0), [], []
    for categories, seeds in product((3, 5, 6, 15), (2, 3, 5)):
        rows = rows_of_runs(made_up({"a": 80, "b": 84}, MVTEC.categories[:categories], seeds))
        scale = np.repeat(np.geomspace(0.2, 5, categories), seeds)
        for _ in range(60):
            drawn = {k: pd.Series(rng.normal(0, scale), row.index) for k, row in rows.items()}
            found = contrast(drawn, ["b"], ["a"])
            held.append(np.multiply(*found.here()) < 0)
            errors.append(found.error**2 / (2 * (scale**2).sum() / seeds**2 / categories**2))
    assert 0.925 <= np.mean(held) <= 0.99  # 0.95 or a little more, give or take 720 draws' error
    assert np.mean(errors) == pytest.approx(1, abs=0.1)


def test_an_interval_elsewhere_is_scipys_and_wider_for_several_comparisons():
    gaps = pd.Series([1.0, 2, 4, 3.5])
    for n in (1, 6):
        expected = stats.t.interval(1 - 0.05 / n, 3, gaps.mean(), stats.sem(gaps))
        assert Estimate(gaps).elsewhere(n) == pytest.approx(expected)
    assert Estimate(gaps[: LEAST_CATEGORIES - 1]).elsewhere() == (-np.inf, np.inf)


# What a person reads


@pytest.fixture(scope="module")
def some():
    """Claims of every answer."""
    levels = ORDER | {"pretrained": 95, "scar": 84.8, "ensemble": 92}
    levels |= {"untrained": 60, "untrained_ensemble": 65}
    frames = {T1: made_up(levels), "density": made_up({"one": 80, "mixture": 80}, seeds=1)}
    return verdicts(frames | {T7: along_rates((90, 90, 90, 90), noise=8)})


def test_the_readable_tables_have_a_row_a_claim_by_answer_and_say_the_effect(some):
    grid, more = claims.readable(some)
    shown = some.loc[some["here"] != claims.NOT_MEASURED, "claim"]
    assert sorted(grid.index) == sorted(shown) and {*more.index} < {*grid.index}
    answers = [f"**{word.capitalize()}**" for word in claims.ANSWERS[:-1]]
    assert list(grid["here"].str.partition(" (")[0].unique()) == answers
    assert [*ANSWER_MARKS] == [*claims.ANSWERS]  # of the figure
    assert "nan" not in " ".join([*grid.to_numpy().ravel(), *more.to_numpy().ravel()])
    rows = some.set_index("id")
    row = rows.loc["3way-over-cutpaste"]
    interval = f"[{row.here_low:+.1f}, {row.here_high:+.1f}]"
    assert grid.loc[row.claim, "ours"] == f"{row.effect:+.1f} {interval}"
    paper = f"{row.paper_effect:+.1f}±{row.paper_error:.1f}; Table 1, section 4.1"
    assert grid.loc[row.claim, "the paper"] == paper
    assert grid.loc[rows.loc["mixture-no-better"].claim, "the paper"] == "Section 2.3, footnote 1"
    assert grid.loc[rows.loc["3way-over-imagenet"].claim, "the paper"] == "not in the paper"
    assert grid.loc[row.claim, "elsewhere"] == "yes, 5 categories"


@pytest.mark.parametrize(
    ("effect", "words"),
    [(1.5, "speaks for it"), (-1.5, "speaks against it"), (0.5, "is within 1 point of the limit")],
)
def test_the_value_of_a_single_seed_speaks_for_a_side_unless_it_is_near_the_limit(
    some, effect, words
):
    row = some[some["here"] == claims.ONE_SEED].head(1)
    for margin in (0.0, -2.0):
        grid, _ = claims.readable(row.assign(effect=effect + margin, margin=margin))
        assert grid["here"].tolist() == [f"**One seed** (our value {words})"]
        grid, _ = claims.readable(row.assign(effect=effect + margin, margin=margin, comparisons=2))
        missing = words if words == "speaks against it" else ""  # one comparison is enough for a no
        assert missing in grid["here"].item() and bool(missing) == ("(" in grid["here"].item())


def test_what_separates_groups_of_images_is_said_in_words():
    said = claims._points(17, of="anomaly/cutpaste_scar over halfway")
    words = "a plane separates real anomalies from pasted scars with AUROC 92.0"
    assert said == f"{words} (limit: 75)"
    said = claims._points(-8, of="untrained/normal/anomaly over chance")
    words = "the Gaussian separates real anomalies from normal images with AUROC 42.0"
    assert said == f"random network: {words} (limit: 50)"


def test_the_figure_counts_what_is_not_in_the_paper_apart(some):
    axes = {ax.get_title(loc="left").split(":")[0].lower(): ax for ax in forest(some).axes}
    assert [*axes] == list(claims.ANSWERS[:-1])  # what is not measured is left out
    for answer, part in some[some["here"] != claims.NOT_MEASURED].groupby("here"):
        own = (part["source"] == claims.OURS).sum()
        head = f"{answer.capitalize()}: {len(part) - own}"
        head += f", and {own} not in the paper" if own else ""
        assert axes[answer].get_title(loc="left") == head
        names = [label.get_text().replace("\n", " ") for label in axes[answer].get_yticklabels()]
        assert sum(name.endswith(" (not in the paper)") for name in names) == own


def test_the_summary_counts_the_answers_to_the_papers_claims_alone(some):
    ours = some[some["source"] != claims.OURS]
    text = claims.summary(some)
    here, elsewhere = (ours[question].value_counts() for question in ("here", "elsewhere"))
    decided = 25 - here["one seed"] - here["not measured"] - here["open"]
    assert text.startswith(f"The paper's 25 claims here: {decided} decided, ")
    assert "\n| claims of the paper | here | elsewhere |\n" in text
    for answer in claims.ANSWERS:
        counts = [str(found.get(answer, "")) for found in (here, elsewhere)]
        assert f"\n| {answer.capitalize()} | {' | '.join(counts)} |\n" in text
    assert f"\n0 of the {decided} decided would have another" in text
    fragile = some.assign(rests_on=np.where(some["id"] == "3way-over-cutpaste", "tile", ""))
    for table in (fragile, fragile.replace("", None)):  # as it is in a file
        assert f"\n1 of the {decided} decided would have another" in claims.summary(table)
    left = ours.loc[ours["here"] == claims.NOT_MEASURED, "claim"]
    assert len(left) and all(claim.rstrip(".") in text.split("Not measured: ")[1] for claim in left)


def test_claims_are_saved_from_a_folder_without_runs_or_data(tmp_path):
    workspace = Workspace(PROFILES["quick"], FIVE, Places(tmp_path))
    path = claims.save_claims(verdicts(measured(workspace)), workspace)
    assert set(pd.read_csv(path)["here"]) == {"not measured"}
    text = path.with_suffix(".md").read_text()
    assert text.startswith("Profile quick. ")
    assert text.count("\n| ") == 3  # the counts alone: head, rule, one answer
    text = claims.seen(workspace, T1)
    assert text.endswith("\n- **Not measured**: 8 claims about this table.\n\n</details>\n")
