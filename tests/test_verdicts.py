import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from scripts.chance import critical, detectable, power_of, seeds_needed, variance_parts
from scripts.verdicts import contrasts, fit, judge, judge_together, minus, slope, spread

pytestmark = pytest.mark.filterwarnings("error")
draws = pytest.mark.parametrize("draws", [300, pytest.param(2000, marks=pytest.mark.slow)])

# fine-tuned accuracy of logs/report, seeds 1 to 3
KEPT = {
    "random": (68.69, 68.81, 68.01),
    "depth 2": (68.36, 69.21, 67.71),
    "depth 8": (68.82, 67.79, 69.39),
    "block": (65.04, 64.08, 64.32),
    "grid": (68.15, 68.08, 68.13),
    "shifted_grid": (68.99, 68.29, 68.84),
    "blockwise": (66.40, 65.16, 66.00),
    "scratch": (61.27, 60.65, 61.04),
}


def table(rows):
    """values of {setting: its values of seeds 0, 1, ... or {seed: value}}."""
    rows = {setting: row if isinstance(row, dict) else dict(enumerate(row)) for setting, row in rows.items()}
    found = [(setting, seed, value) for setting, row in rows.items() for seed, value in row.items()]
    return pd.DataFrame(found, columns=["setting", "seed", "value"])


def drawn(rng, sizes, block=0.0, shared=True, noise=1.0):
    """(settings, seeds) as of read(), without any difference; noise and block: s.d. of values and of seeds."""
    grid = noise * rng.standard_normal((len(sizes), max(sizes))) + block * rng.standard_normal(max(sizes))
    grid[np.arange(max(sizes)) >= np.array(sizes)[:, None]] = np.nan
    if not shared:
        grid = np.where(np.repeat(np.eye(len(sizes)), max(sizes), axis=1) > 0, np.tile(grid, len(sizes)), np.nan)
        grid = grid[:, ~np.isnan(grid).all(0)]
    return grid


def against_the_first(grid):
    names = list(range(len(grid)))
    return contrasts(grid, names, fit(grid), [{0: -1, name: 1} for name in names[1:]])


def pairs(values, pairs, x=None):
    """One minus other for each (one, other), and the slope over x."""
    return judge_together(values, [minus(*pair) for pair in pairs] + ([slope(x)] if x else []))


def half(found, which=""):
    return (found[f"high{which}"] - found[f"low{which}"]) / 2


# --- known truth ---


@draws
@pytest.mark.parametrize(
    ("sizes", "block", "shared"),
    [
        ([2] * 4, 2, True),
        ([3] * 4, 0, True),
        ([5] * 3, 2, True),
        ([5, 3, 3, 2], 2, True),
        ([2, 3, 1, 2], 0, True),
        ([5, 2, 3], 0, False),
        *[
            pytest.param([n] * 8, block, True, marks=pytest.mark.slow, id=f"8 settings of {n} seeds, block {block}")
            for n in (2, 3, 5)
            for block in (0, 2)
        ],
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(sizes, block, shared, draws):
    rng = np.random.default_rng([1, *sizes, block])
    single, together = [], []
    for _ in range(draws):
        found = against_the_first(drawn(rng, sizes, block, shared))
        single.append(((found["low"] < 0) & (found["high"] > 0)).mean())
        together.append(((found["low_all"] < 0) & (found["high_all"] > 0)).all())
    error = 3 * math.sqrt(0.05 * 0.95 / draws)
    assert np.mean(single) == pytest.approx(0.95, abs=error)
    assert np.mean(together) == pytest.approx(0.95, abs=error)


@draws
def test_a_difference_of_three_standard_deviations_is_found_with_three_seeds(draws):
    rng, single, together = np.random.default_rng(2), 0, 0
    for _ in range(draws):
        grid = drawn(rng, [3] * 8, block=1)
        grid[1] += 3
        found = against_the_first(grid)
        single += found["low"][0] > 0
        together += found["low_all"][0] > 0
    assert single / draws >= 0.9
    assert together / draws >= 0.7
    assert together / draws == pytest.approx(power_of(1, 8, 3, 3), abs=3 * 0.45 / math.sqrt(draws))


@pytest.mark.parametrize("draws", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_setting_of_ten_times_the_noise_is_seldom_pooled_and_one_of_equal_noise_seldom_not(draws):
    rng, found = np.random.default_rng(3), {1: 0, 10: 0}
    for noise in found:
        for _ in range(draws):
            grid = drawn(rng, [3] * 8, block=1, noise=np.array([[1, 1, noise, 1, 1, 1, 1, 1]]).T)
            found[noise] += not against_the_first(grid)["pooled"].all()
    assert found[10] / draws > 0.8  # 0.9
    assert found[1] / draws < 0.01 + 3 * math.sqrt(0.01 / draws)


def test_a_setting_of_larger_noise_is_judged_by_its_own_spread_and_named():
    values = table(KEPT | {"wild": (60.0, 70.0, 90.0)})
    found = judge(values, "random")
    wild = found.table.loc["wild"]
    test = stats.ttest_rel((60.0, 70.0, 90.0), KEPT["random"])
    assert (wild["low"], wild["high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert half(wild, "_all") == pytest.approx(half(wild) * stats.t.isf(0.025 / 8, 2) / stats.t.isf(0.025, 2))
    assert found.note.count("wild") == 2
    others = found.table.drop(["random", "wild"])
    without = judge(table(KEPT), "random")
    assert others["pooled"].all()
    assert (found.sd, found.degrees) == pytest.approx((without.sd, without.degrees))
    assert list(half(others)) == pytest.approx(list(half(without.table.drop("random"))))
    assert half(others, "_all").min() > 1.01 * half(without.table, "_all").max()  # one of 8 comparisons, not of 7


def test_a_noisy_baseline_leaves_each_pair_to_its_own_spread():
    found = judge(table(KEPT | {"wild": (60.0, 70.0, 90.0)}), "wild")
    assert not found.table["pooled"].drop("wild").any()
    assert "wild is larger" in found.note


# --- the same as others where their designs are ours ---


def test_two_settings_with_common_seeds_are_the_paired_t_test():
    one, other = KEPT["block"], KEPT["blockwise"]
    found = pairs(table({"a": one, "b": other}), [("a", "b")]).iloc[0]
    test = stats.ttest_rel(one, other)
    assert (found["low"], found["high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert (found["low_all"], found["high_all"]) == pytest.approx((found["low"], found["high"]))
    assert found["p"] == pytest.approx(test.pvalue)
    each = np.subtract(one, other)
    assert (found["low"], found["high"]) == pytest.approx(stats.t.interval(0.95, 2, each.mean(), stats.sem(each)))


@pytest.mark.parametrize(("factor", "equal"), [(1, True), (100, False)])
def test_two_settings_without_common_seeds_are_the_two_sample_t_test_or_welch_s(factor, equal):
    one, other = np.array([0.3, -0.2, 0.1, 0.4]), factor * np.array([0.1, -0.5, 0.6])
    values = table({"a": dict(enumerate(one)), "b": dict(enumerate(other, 10))})
    found = judge(values, "b").table.loc["a"]
    test = stats.ttest_ind(one, other, equal_var=equal)
    assert (found["low"], found["high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert found["pooled"] == equal


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (9, 3, 5, 2)])
def test_settings_without_common_seeds_are_dunnett_s(sizes):
    rng = np.random.default_rng(4)
    grid = drawn(rng, sizes, shared=False)
    groups = [row[~np.isnan(row)] for row in grid]
    interval = stats.dunnett(*groups[1:], control=groups[0], rng=rng).confidence_interval()
    found = against_the_first(grid)
    assert list(found["low_all"]) == pytest.approx(list(interval.low), abs=0.01)
    assert list(found["high_all"]) == pytest.approx(list(interval.high), abs=0.01)


def test_noise_is_the_residual_of_the_two_way_table():
    y = np.array(list(KEPT.values()))
    found = judge(table(KEPT), "random")
    residuals = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    assert found.degrees == (8 - 1) * (3 - 1)
    assert found.sd == pytest.approx(math.sqrt((residuals**2).sum() / 14))
    assert half(found.table).max() == pytest.approx(stats.t.isf(0.025, 14) * found.sd * math.sqrt(2 / 3))
    assert list(found.table["mean"]) == pytest.approx(list(y.mean(1)))
    assert list(found.table["sd"]) == pytest.approx(list(y.std(1, ddof=1)))


def test_missing_values_are_least_squares():
    rows = {setting: dict(enumerate(row)) for setting, row in KEPT.items()}
    del rows["block"][0], rows["random"][2], rows["grid"][1], rows["grid"][2]
    values = table(rows)
    settings, seeds = values["setting"].to_numpy(), values["seed"].to_numpy()
    columns = [settings == name for name in KEPT] + [seeds == seed for seed in (1, 2)]  # seed 0 is in the settings
    design = np.array(columns, float).T
    effects, squares, rank, _ = np.linalg.lstsq(design, values["value"].to_numpy())
    covariance = squares[0] / (len(values) - rank) * np.linalg.inv(design.T @ design)
    found = judge(values, "random").table
    for i, name in enumerate(KEPT):
        if name != "random":
            error = math.sqrt(covariance[i, i] + covariance[0, 0] - 2 * covariance[i, 0])
            assert found.loc[name, "difference"] == pytest.approx(effects[i] - effects[0])
            assert half(found.loc[name]) == pytest.approx(stats.t.isf(0.025, len(values) - rank) * error)


def test_a_seed_of_one_setting_alone_changes_no_difference():
    more = table({name: dict(enumerate(row)) for name, row in KEPT.items()} | {"grid": [*KEPT["grid"], 99.0]})
    columns = ["difference", "low", "high", "low_all", "high_all"]
    expected = judge(table(KEPT), "random").table[columns]
    pd.testing.assert_frame_equal(judge(more, "random").table[columns], expected, rtol=1e-4)


def test_a_seed_s_effect_changes_no_difference():
    other = table({name: np.add(row, (0, 50, -20)) for name, row in KEPT.items()})
    columns = ["difference", "low_all", "high_all", "verdict"]
    pd.testing.assert_frame_equal(judge(other, "random").table[columns], judge(table(KEPT), "random").table[columns])


def test_settings_of_other_seeds_are_judged_by_their_own_spread_beside_the_pool():
    rows = {name: dict(enumerate(row)) for name, row in KEPT.items()}
    rows["scratch"] = dict(enumerate(KEPT["scratch"], 10))
    found = judge(table(rows), "random")
    test = stats.ttest_ind(KEPT["scratch"], KEPT["random"], equal_var=False)
    scratch = found.table.loc["scratch"]
    assert (scratch["low"], scratch["high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert found.table["pooled"].drop(["random", "scratch"]).all()
    assert found.degrees == (7 - 1) * (3 - 1)
    assert "Not pooled: scratch." in found.note


# --- several comparisons at once ---


@pytest.mark.parametrize("degrees", [2, 6, 14, 200])
def test_the_quantile_of_a_family_is_that_of_the_multivariate_t(degrees):
    contrast = np.random.default_rng(5).standard_normal((4, 3))  # four estimates of rank 3
    contrast /= np.linalg.norm(contrast, axis=1, keepdims=True)
    t = critical(tuple(map(tuple, contrast @ contrast.T)), degrees)
    many = np.random.default_rng(6)
    sample = np.abs(many.standard_normal((400_000, 3)) @ contrast.T).max(1)
    sample /= np.sqrt(many.chisquare(degrees, 400_000) / degrees)
    assert (sample < t).mean() == pytest.approx(0.95, abs=0.0015)


def test_the_quantile_of_dunnett_s_family_is_scipy_s():
    correlation = np.where(np.eye(7), 1, 0.5)
    t = critical(tuple(map(tuple, correlation)), 14)
    family = stats.multivariate_t(shape=correlation, df=14, seed=np.random.default_rng(7))
    assert family.cdf([t] * 7, lower_limit=[-t] * 7) == pytest.approx(0.95, abs=0.001)


def test_the_quantile_of_all_pairs_is_tukey_s():
    found = pairs(table(KEPT), list(itertools.combinations(KEPT, 2)))
    ratio = half(found, "_all") / half(found)
    expected = stats.studentized_range.ppf(0.95, 8, 14) / math.sqrt(2) / stats.t.isf(0.025, 14)
    assert list(ratio) == pytest.approx([expected] * 28, rel=0.003)


def test_the_same_pair_twice_or_turned_round_is_one_comparison():
    found = pairs(table(KEPT), [("grid", "block"), ("block", "grid"), ("grid", "block")])
    assert list(found["low_all"]) == pytest.approx(list(found["low"]))
    assert found["difference"][0] == pytest.approx(-found["difference"][1])


def test_pairs_stay_in_the_order_given():
    found = pairs(table(KEPT), [("grid", "block"), ("depth 8", "random")])
    assert list(found["difference"]) == pytest.approx([68.12 - 64.48, 68.6667 - 68.5033], abs=1e-3)
    assert list(found["n"]) == [3, 3]


def test_pairs_count_common_seeds_or_those_of_the_smaller_setting():
    rows = {"a": [1.0, 1.2, 1.1], "b": {1: 1.3, 2: 1.1, 3: 1.4}, "c": {7: 1.0, 8: 1.1}}
    assert list(pairs(table(rows), [("a", "b"), ("a", "c")])["n"]) == [2, 2]


# --- trend, equivalence, words ---


def test_the_trend_over_depths_is_the_mean_slope_with_the_pooled_noise():
    log2 = {"depth 2": 1, "random": 2, "depth 8": 3}
    found = pairs(table(KEPT), [], log2).iloc[0]
    slopes = [np.polyfit([1, 2, 3], [KEPT[name][seed] for name in log2], 1)[0] for seed in range(3)]
    sd = judge(table(KEPT), "random").sd
    assert found["difference"] == pytest.approx(np.mean(slopes))
    assert half(found) == pytest.approx(stats.t.isf(0.025, 14) * sd / math.sqrt(3 * 2))


def test_a_trend_is_judged_together_with_the_pairs():
    depths, two = {"depth 2": 1, "random": 2, "depth 8": 3}, [("block", "grid"), ("depth 8", "random")]
    alone, both = pairs(table(KEPT), two), pairs(table(KEPT), two, depths)
    assert (half(both, "_all")[:2] > half(alone, "_all")).all()
    assert half(both, "_all")[2] > 1.1 * half(pairs(table(KEPT), [], depths), "_all")[0]
    assert list(half(both)[:2]) == pytest.approx(list(half(alone)))


@pytest.mark.parametrize(
    ("values", "margin", "said"),
    [
        ((1.0, 1.3, 0.5), None, "within 0.83"),
        ((1.0, 1.3, 0.5), 1, "within 0.83, equivalent within 1"),
        ((1.0, 1.3, 0.5), 0.7, "within 0.83"),
        ((3.0, 3.2, 3.1), None, "higher by 2.10 (1.85 to 2.35)"),
        ((-3.0, -3.2, -3.1), 4, "lower by 4.10 (3.67 to 4.53)"),
        ((-3.0, -3.2, -3.1), 5, "lower by 4.10 (3.67 to 4.53), equivalent within 5"),
        ((1.25, 1.25, 1.25), None, "higher by 0.250 (0.002 to 0.498)"),
        ((110.0, 120.0, 99.0), None, "higher by 109 (83 to 135)"),
    ],
)
def test_verdicts_are_sentences(values, margin, said):
    found = judge(table({"base": (1.0, 1.1, 0.9), "other": values}), "base", margin)
    assert found.table["verdict"].to_dict() == {"base": "baseline", "other": said}


def test_the_kept_ablation_reads_as_issued():
    found = judge(table(KEPT), "random", margin=1.5)
    assert found.table["verdict"].to_dict() == {
        "random": "baseline",
        "depth 2": "within 1.3, equivalent within 1.5",
        "depth 8": "within 1.4, equivalent within 1.5",
        "block": "lower by 4.0 (2.8 to 5.3)",
        "grid": "within 1.6",
        "shifted_grid": "within 1.5, equivalent within 1.5",
        "blockwise": "lower by 2.6 (1.4 to 3.9)",
        "scratch": "lower by 7.5 (6.3 to 8.8)",
    }
    assert "Not pooled" not in found.note
    assert list(found.table["n"]) == [3] * 8


def test_spread_is_mean_deviation_and_number():
    assert spread([81.0, 81.5, 80.6]) == "81.03 ± 0.45 (n 3)"
    assert spread([81.0], digits=1) == "81.0 (n 1)"
    assert spread([]) == ""


# --- seeds ---


def test_seeds_needed_and_detectable_are_each_other_s_reverse():
    for n in (2, 3, 10):
        points = detectable(0.54, 8, n)
        assert seeds_needed(0.54, 8, points * 1.001) == n
        assert seeds_needed(0.54, 8, points * 0.999) == n + 1
    assert detectable(0.54, 8, 1) == math.inf


def test_seeds_needed_of_a_paired_design_are_those_of_the_t_test():
    n = seeds_needed(1, 2, 1)

    def power(n):  # of the difference's s.d., sqrt(2)
        return stats.nct.sf(stats.t.isf(0.025, n - 1), n - 1, math.sqrt(n / 2))

    assert power(n) >= 0.8 > power(n - 1)


@pytest.mark.parametrize(("sd", "settings", "points"), [(0, 8, 1), (math.nan, 8, 1), (1, 1, 1), (1, 8, 0)])
def test_seeds_needed_wants_something_to_reckon_with(sd, settings, points):
    with pytest.raises(ValueError, match="above 0"):
        seeds_needed(sd, settings, points)


# --- several classifiers of a MAE ---


def nested(rng, numbers, between, within):
    """One setting with a MAE for each of `numbers` of classifiers."""
    mae = np.repeat(np.arange(len(numbers)), numbers)
    value = 50 + between * rng.standard_normal(len(numbers))[mae] + within * rng.standard_normal(len(mae))
    return pd.DataFrame({"setting": "a", "mae": mae, "seed": np.arange(len(mae)), "value": value})


@pytest.mark.parametrize("numbers", [[3] * 4000, [1, 2, 6] * 2000])
def test_the_parts_of_the_variance_are_found(numbers):
    rng = np.random.default_rng(8)
    parts = [nested(rng, numbers, 0.5, 1.0), nested(rng, numbers, 0.5, 1.0).assign(setting="b")]
    parts[1]["value"] += 30
    assert variance_parts(pd.concat(parts)) == pytest.approx((0.5, 1.0), rel=0.05)


def test_parts_of_the_variance_that_nothing_tells_are_nan():
    rng = np.random.default_rng(9)
    between, within = variance_parts(nested(rng, [1, 1, 1], 1, 1))
    assert math.isnan(between)
    assert math.isnan(within)
    between, within = variance_parts(nested(rng, [3], 1, 1))
    assert math.isnan(between)
    assert within > 0
    assert variance_parts(nested(rng, [2, 2], 0, 0)) == (0, 0)


# --- little to go by ---


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"a": [1.0], "b": [2.0]}, "one seed"),
        ({"a": [1.0, 2.0, 1.5], "b": [2.0]}, "one seed"),
        ({"a": [1.0, 1.4, 1.2], "b": {7: 2.0}, "c": [1.1, 1.0, 1.3]}, "one seed"),
        ({"a": [1.1, 1.1], "b": [1.3, 1.3]}, "no spread between seeds"),
        ({"a": [1.1, 1.7], "b": [1.1, 1.7]}, "no spread between seeds"),
        ({"a": [1.0, math.nan], "b": [2.0, 3.0]}, "one seed"),
    ],
)
def test_too_little_is_said_and_has_no_interval(rows, said):
    found = judge(table(rows), "a").table.loc["b"]
    assert found["verdict"] == said
    assert found[["low", "high", "low_all", "high_all", "p"]].isna().all()


def test_a_setting_with_one_seed_is_judged_by_the_others_noise():
    found = judge(table(KEPT | {"new": [75.0]}), "random")
    new = found.table.loc["new"]
    assert math.isnan(new["sd"])
    assert new["n"] == 1
    assert new["low_all"] > 0
    assert half(new) > 1.2 * half(found.table.loc["grid"])


def test_one_setting_has_no_differences():
    found = judge(table({"a": [1.0, 2.0]}), "a")
    assert found.table["verdict"].to_dict() == {"a": "baseline"}
    assert (found.sd, found.degrees) == (pytest.approx(math.sqrt(0.5)), 1)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: judge(table(KEPT), "shuffled"), "shuffled.*random, depth 2"),
        (lambda: judge(table({}), "random"), "random"),
        (lambda: pairs(table(KEPT), [("block", "shuffled")]), "shuffled"),
        (lambda: pairs(table(KEPT), [("block", "block")]), "two settings"),
        (lambda: pairs(table(KEPT), [], {"block": 1, "grid": 1}), "two values"),
        (lambda: judge(pd.concat([table(KEPT)] * 2), "random"), "twice"),
        (lambda: judge(table(KEPT | {"block": [math.inf]}), "random"), "infinite"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()
