"""The paper's claims: verdicts follow from made-up runs, intervals cover what they promise."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cplib.datasets import MVTEC
from cplib.study import claims
from cplib.study.claims import CLAIMS, LEAST_CATEGORIES, interval, measured, verdicts
from cplib.study.features import GROUPS, PAIRS
from cplib.study.paper import PRINTED, published
from cplib.study.profiles import METHOD, PROFILES
from cplib.study.store import Places, run_folder
from cplib.study.synthetic import SYNTHETIC
from cplib.study.tables import TABLES, rows_of
from cplib.study.workspace import Workspace

from records import record

T1, T2, T6 = "table1_image_level", "table2_pixel_level", "table6_synthetic_anomalies"
T7 = "table7_learning_rate_and_epochs"
RATES = ("3.33", "1", "0.333", "0.1")
FIVE = MVTEC.categories[:5]
ORDER = {"cutpaste": 80, "cutpaste_scar": 85, METHOD: 90}


def made_up(levels, categories=FIVE, seeds=3, between=0.0, row="method"):
    """Runs of each method around its level, on categories that differ by tens of points.

    ``between``: how much a method's own level differs from category to category.
    """
    rng = np.random.default_rng(0)
    cells = list(product(levels, categories, range(seeds)))
    hard = dict(zip(categories, rng.uniform(-30, 0, len(categories)), strict=True))
    own = {(m, c): rng.normal(0, between) for m in levels for c in categories}
    values = [levels[m] + hard[c] + own[m, c] + rng.normal(0, 0.3) for m, c, _ in cells]
    return pd.DataFrame(cells, columns=[row, "category", "seed"]).assign(image_auroc=values)


def along_rates(levels, rates=RATES, **options):
    levels = dict(zip(rates, levels, strict=True))
    return made_up(levels, row="value", **options).assign(method=METHOD, setting="learning_rate")


def verdict(frames, claim):
    return verdicts(frames).set_index("id").loc[claim]


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


def test_the_papers_effect_is_that_of_its_printed_averages_which_bear_every_claim_out():
    frames = {T1: made_up(ORDER | {"pretrained": 70}), T7: along_rates((90, 90, 90, 80))}
    for table in (verdicts(frames), verdicts({})):
        effects = table.set_index("id")["paper_effect"]
        assert effects["patch-over-gradcam"] == pytest.approx(96.0 - 88.3)
        assert effects["cutout-to-cutpaste-order"] == pytest.approx(77.8 - 76.1)
        assert effects["3way-over-cutout-shapes"] == pytest.approx(98.3 - 81.5)
        pair = table.set_index("id")["weakest"]["insensitive-learning-rate"]
        first = 95.2 if pair == "1 over 0.1" else 95.3  # of the pair measured, or the paper's own
        assert effects["insensitive-learning-rate"] == pytest.approx(first - 94.6)
        assert np.isnan(effects["3way-over-imagenet"])
    ordered = table["id"].isin(CLAIMS.loc[CLAIMS["order"] != "", "id"])
    assert (table[ordered]["paper_effect"].dropna() > 0).all()
    along = table[~ordered]
    assert list(along["paper_effect"] < along["margin"]) == [True] * 2


# Verdicts


def test_nothing_measured_is_not_measured():
    empty = pd.DataFrame(columns=["method", "category", "seed", "image_auroc", "pixel_auroc"])
    for frames in ({}, dict.fromkeys(CLAIMS["table"], empty), {T1: pd.DataFrame()}):
        table = verdicts(frames)
        assert list(table["id"]) == list(CLAIMS["id"])
        assert set(table["verdict"]) == {"not measured"}
        assert table[["weakest", "effect", "low", "high"]].isna().all(axis=None)
        assert (table[["categories", "compared"]] == 0).all(axis=None)


@pytest.mark.parametrize(
    ("better", "expected"),
    [(84, "reproduced"), (76, "not reproduced"), (80, "inconclusive")],
)
def test_the_verdict_follows_the_difference(better, expected):
    table = verdicts({T1: made_up({"cutpaste": 80, METHOD: better})}).set_index("id")
    row = table.loc["3way-over-cutpaste"]
    assert row.verdict == expected
    assert row.effect == pytest.approx(better - 80, abs=0.5)
    assert row.low < row.effect < row.high
    assert (row.categories, row.compared) == (5, 1)
    assert table.loc["3way-over-scar", "verdict"] == "not measured"


def test_too_few_categories_are_inconclusive_whatever_the_numbers():
    frame = made_up({"cutpaste": 80, METHOD: 99}, FIVE[: LEAST_CATEGORIES - 1])
    row = verdict({T1: frame}, "3way-over-cutpaste")
    assert row.verdict == "inconclusive"
    assert np.isnan([row.low, row.high]).all()


def test_only_categories_that_both_methods_have_are_compared():
    frame = made_up({"cutpaste": 80, METHOD: 84})
    first = frame["category"] == FIVE[0]
    frame.loc[first & (frame["method"] == "cutpaste"), "image_auroc"] = 0
    row = verdict({T1: frame[~first | (frame["method"] != METHOD)]}, "3way-over-cutpaste")
    assert (row.verdict, row.categories) == ("reproduced", 4)


@pytest.mark.parametrize(
    ("scar", "between", "expected", "weakest"),
    [
        (84, 0, "reproduced", "cutpaste_scar over cutpaste"),
        (88, 4, "inconclusive", "cutpaste_scar over cutpaste"),
        (95, 0, "not reproduced", "cutpaste_3way over cutpaste_scar"),
    ],
)
def test_an_order_stands_or_falls_with_its_weakest_comparison(scar, between, expected, weakest):
    frame = made_up(ORDER | {"cutpaste_scar": scar}, between=between)
    row = verdict({T1: frame}, "cutpaste-scar-3way-order")
    assert (row.verdict, row.weakest, row.compared) == (expected, weakest, 2)


def test_an_order_measured_in_part_cannot_be_reproduced_but_can_fail():
    part = {"cutpaste": 80, "cutpaste_scar": 85}
    row = verdict({T1: made_up(part)}, "cutpaste-scar-3way-order")
    assert (row.verdict, row.compared, row.comparisons) == ("inconclusive", 1, 2)
    row = verdict({T1: made_up(part | {"cutpaste_scar": 60})}, "cutpaste-scar-3way-order")
    assert row.verdict == "not reproduced"


def test_a_quoted_method_has_the_papers_number_and_no_other_method_has():
    paper = published(T2).query("method == 'p_svdd'").set_index("category")["published_mean"]
    for above, expected in ((1, "reproduced"), (-1, "not reproduced")):
        values = paper[list(FIVE)] + above + np.arange(5) / 10
        frame = values.rename("pixel_auroc").reset_index().assign(method="cutpaste_3way_patch")
        row = verdict({T2: frame}, "patch-over-p-svdd")
        assert (row.verdict, row.categories) == (expected, 5)
        assert row.effect == pytest.approx(above + 0.2)
        assert verdict({T2: frame}, "patch-over-gradcam").verdict == "not measured"
    frame["category"] = "brick"  # for which the paper prints nothing
    assert verdict({T2: frame}, "patch-over-p-svdd").verdict == "not measured"


def test_table_6_is_compared_over_the_categories_that_were_painted_on():
    parts = [made_up({"cutout": 80 + i, METHOD: 90}) for i in range(len(SYNTHETIC))]
    frame = pd.concat(parts, keys=SYNTHETIC, names=["kind"]).reset_index(level=0)
    frame = frame.rename(columns={"category": "source", "kind": "category"})
    row = verdict({T6: frame}, "3way-over-cutout-shapes")
    assert (row.verdict, row.categories) == ("reproduced", 5)
    assert row.effect == pytest.approx(10 - 3, abs=0.3)
    # The methods stand on other images now: what they do not share is left out.
    gone = (frame["method"] == METHOD) & (frame["source"] == FIVE[0])
    frame.loc[~gone & (frame["source"] == FIVE[0]), "image_auroc"] = 0
    row = verdict({T6: frame[~gone]}, "3way-over-cutout-shapes")
    assert row.effect == pytest.approx(10 - 3, abs=0.3)


def test_what_an_untrained_network_does_as_well_holds_without_training():
    paper = published(T2).query("method == 'p_svdd'").set_index("category")["published_mean"]
    for baseline, expected in ((-1, "reproduced"), (0.5, "holds without training")):
        values = [paper[list(FIVE)] + gap + np.arange(5) / 10 for gap in (1, baseline, -2)]
        methods = ("cutpaste_3way_patch", "pretrained", "untrained")
        frame = pd.concat(dict(zip(methods, values, strict=True)), names=["method"])
        row = verdict({T2: frame.rename("pixel_auroc").reset_index()}, "patch-over-p-svdd")
        assert (row.verdict, row.null) == (expected, "pretrained over p_svdd")
        assert (row.effect, row.null_effect) == pytest.approx((1.2, baseline + 0.2))


def test_a_group_of_categories_is_judged_alone_and_beside_the_papers_average_of_it():
    categories = MVTEC.textures + MVTEC.objects
    levels = {"0": 80, "0.1": 82, "0.2": 83, "0.3": 83}
    frame = made_up(levels, categories, row="value").assign(method=METHOD, setting="patch_jitter")
    objects = frame["category"].isin(MVTEC.objects)
    frame.loc[objects & (frame["value"] == "0"), "image_auroc"] += 50
    row = verdict({"table8_jitter_and_patch_size": frame}, "jitter-helps-textures")
    assert (row.verdict, row.weakest, row.categories) == ("reproduced", "0.1 over 0", 5)
    assert row.paper_effect == pytest.approx(97.0 - 96.2)


def test_a_mixture_may_gain_less_than_its_tolerance():
    for mixture, expected in ((80.5, "reproduced"), (82, "not reproduced")):
        frame = made_up({"one": 80, "mixture": mixture})
        assert verdict({"density": frame}, "mixture-no-better").verdict == expected


def test_what_several_comparisons_leave_open_all_of_them_decide_or_one_against():
    by_pair = [
        pd.Series([4.0, -3, 5, 2]),
        pd.Series([1.0, 1.1, 1.2, 1.3]),
        pd.Series([9.0, -9, 5, 2]),
    ]
    first, sure, last = map(claims.categories_needed, by_pair)

    def judge(gaps):
        return claims._judge([*"abc"], dict(zip("abc", gaps, strict=True)), 0.0)

    assert sure < first < last == judge(by_pair)["needed"]
    against = judge([by_pair[0], by_pair[1], -by_pair[2]])
    assert against["verdict"] == "inconclusive"
    assert against["needed"] == claims.categories_needed(by_pair[2], 3) > last
    both = judge([-by_pair[0], by_pair[1], -by_pair[2]])
    assert both["needed"] == claims.categories_needed(by_pair[0], 3) > first


def test_what_is_inconclusive_says_how_many_categories_would_decide_it():
    gaps = pd.Series([4.0, -3, 5, 2])
    n = int(claims.categories_needed(gaps))
    for categories, outside in ((n, True), (n - 1, False)):
        half = stats.t.ppf(0.975, categories - 1) * gaps.std() / np.sqrt(categories)
        assert (half < gaps.mean()) == outside
    assert np.isinf(claims.categories_needed(gaps - gaps.mean()))
    assert np.isnan(claims.categories_needed(gaps[:1]))


# Insensitivity: a test of equivalence


@pytest.mark.parametrize(
    ("levels", "between", "expected"),
    [
        ((90, 90, 90.2, 90.1), 0, "reproduced"),
        ((90, 90, 90, 80), 0, "not reproduced"),
        ((90, 90, 90, 88.2), 0, "inconclusive"),  # about the margin
        ((90, 90, 90, 90), 8, "inconclusive"),  # noise is no insensitivity
        ((90, 90, 90), 0, "inconclusive"),  # not all that the paper tried
    ],
)
def test_insensitivity_follows_the_largest_difference_and_the_margin(levels, between, expected):
    frame = along_rates(levels, RATES[: len(levels)], between=between)
    row = verdict({T7: frame}, "insensitive-learning-rate")
    assert row.verdict == expected
    assert 0 <= row.low <= row.effect <= row.high
    assert row.margin == pytest.approx(0.7 + 2 * 0.6)  # the paper's range and standard error
    assert (row.compared, row.comparisons) == (6 if len(levels) == 4 else 3, 6)
    if not between:
        assert row.effect == pytest.approx(max(levels) - min(levels), abs=0.5)


# What was recorded


def test_the_claims_about_features_read_the_records_beside_the_runs(tmp_path):
    profile = replace(PROFILES["quick"], categories=("bottle", "screw", "grid"))
    workspace = Workspace(profile, profile.categories, Places(tmp_path))
    assert measured(workspace)["features"].empty
    for method, auroc in ((METHOD, 99), ("untrained", 60)):
        pairs = {f"{a} {b}": {"classifier_auroc": auroc} for a, b in PAIRS}
        found = {"gaussian_auroc": dict.fromkeys(GROUPS[1:], 40), "pairs": pairs}
        for run in profile.runs((method,), profile.categories):
            if run.seed:
                continue
            record(tmp_path, run)
            (run_folder(run, tmp_path) / "features.json").write_text(json.dumps(found))
    table = verdicts(measured(workspace)).set_index("id")
    found = table.loc[["synthetic-unlike-real", "synthetic-separates-real"]]
    assert list(found["verdict"]) == ["reproduced", "not reproduced"]
    assert list(found["effect"]) == [99 - 75, 40 - 50]
    assert list(found["categories"]) == [3, 3]
    assert list(found["null_effect"]) == [60 - 75, 40 - 50]


# Intervals


def test_an_interval_is_scipys_and_wider_for_several_comparisons():
    gaps = pd.Series([1.0, 2, 4, 3.5])
    for n in (1, 6):
        expected = stats.t.interval(1 - 0.05 / n, 3, gaps.mean(), stats.sem(gaps))
        assert interval(gaps, n) == pytest.approx(expected)
    assert interval(gaps[: LEAST_CATEGORIES - 1]) == (-np.inf, np.inf)


def test_intervals_hold_the_true_difference_as_often_as_they_promise():
    rng = np.random.default_rng(0)
    for categories in (3, 15):
        found = [interval(pd.Series(rng.normal(2, 5, categories))) for _ in range(400)]
        held = np.mean([low <= 2 <= high for low, high in found])
        assert 0.92 <= held <= 0.98  # 0.95, give or take 400 draws' own error


# What a person reads


@pytest.fixture(scope="module")
def some():
    """Claims of every verdict."""
    levels = ORDER | {"pretrained": 95, "scar": 84.8, "ensemble": 92}
    levels |= {"untrained": 60, "untrained_ensemble": 65}
    frames = {T1: made_up(levels, between=1)}
    return verdicts(frames | {T7: along_rates((90, 90, 90, 90), between=8)})


def test_the_readable_table_has_a_row_a_claim_and_says_the_effect(some):
    grid = claims.readable(some)
    assert list(grid.index) == list(CLAIMS["claim"])
    assert set(grid["verdict"]) == set(claims.VERDICTS)
    assert "nan" not in " ".join(grid.to_numpy().ravel())
    missing = grid[grid["verdict"] == "not measured"]
    assert (missing[["difference [95 %]", "categories"]] == "").all(axis=None)
    row = some.set_index("id").loc["3way-over-cutpaste"]
    said = f"{row.effect:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"
    assert grid.loc[row.claim, "difference [95 %]"] == said


def test_claims_are_saved_from_a_folder_without_runs_or_data(tmp_path):
    workspace = Workspace(PROFILES["quick"], FIVE, Places(tmp_path))
    path = claims.save_claims(verdicts(measured(workspace)), workspace)
    assert set(pd.read_csv(path)["verdict"]) == {"not measured"}
    text = path.with_suffix(".md").read_text()
    assert text.startswith("Profile quick. ")
    assert text.count("\n| ") == len(CLAIMS) + 2  # head and rule
