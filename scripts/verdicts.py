"""What the seeds say of settings: how much they differ, at least and at most.

Values are a pandas.DataFrame with columns setting (text), seed and value, one finite number for each setting and seed.
The model is value = setting + seed + noise, by least squares: the paired t-test (Student 1908) for any number of
settings, the seed a block (Fisher 1935; none where no seed is shared). A seed of one setting alone tells nothing. Noise
is taken as normal, and pooled: k settings of n seeds give (k - 1)(n - 1) degrees of freedom, not n - 1.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from scripts.chance import critical


class Model(NamedTuple):
    y: np.ndarray  # (values,)
    design: np.ndarray  # (values, settings + seeds), 0 or 1
    weights: np.ndarray  # (settings + seeds, values), of the effects: weights @ y
    sd: float  # of the noise, NaN without degrees of freedom
    degrees: int
    apart: list  # rows of settings that are not in it, as their noise is larger


class Verdicts(NamedTuple):
    table: pd.DataFrame  # of each setting: mean, sd, n (seeds), and contrasts() of its difference from the baseline
    sd: float  # of the pooled noise
    degrees: int  # of freedom
    note: str  # says so


def read(values, needed):
    """(settings, seeds) values, NaN where there is none, and the settings' names in order of appearance."""
    values = values.dropna(subset="value")
    (setting, names), (seed, seeds) = pd.factorize(values["setting"]), pd.factorize(values["seed"])
    if missing := [name for name in needed if name not in names]:
        raise ValueError(f"No values of {missing[0]}. There are values of {', '.join(names) or 'nothing'}.")
    grid = np.full((len(names), len(seeds)), np.nan)
    grid[setting, seed] = values["value"]
    if np.isfinite(grid).sum() < len(values):
        raise ValueError("A setting has a seed twice, or a value is infinite. Give one finite value for each seed.")
    return grid, list(names)


def fit(grid, apart=()):
    """The Model of a (settings, seeds) array, without settings whose noise is significantly (1 %) larger.

    For each setting, an exact F test (Bonferroni) compares the squared residuals with and without it (Russell and
    Bradley 1958; without blocks: Cochran 1941). Brown and Forsythe's test (1974) needs more seeds: with 3, no values of
    8 settings reach its 1 % point; with 2, all do.
    """
    setting, seed = np.nonzero(~np.isnan(grid))
    y, design = grid[setting, seed], np.eye(len(grid))[setting]
    if len(set(seed)) < len(seed):
        design = np.hstack([design, np.eye(grid.shape[1])[seed]])
    weights = np.linalg.pinv(design, rcond=1e-9)
    maker = np.eye(len(y)) - design @ weights  # maker @ y: residuals
    residuals, degrees, p = maker @ y, round(np.trace(maker)), np.ones(len(grid))
    residuals[np.abs(residuals) < 1e-9 * np.abs(y).max(initial=0)] = 0  # rounding
    squares = residuals @ residuals
    for i in set(setting):
        own = setting == i
        inverse = np.linalg.pinv(maker[np.ix_(own, own)], rcond=1e-9, hermitian=True)
        used, part = np.linalg.matrix_rank(inverse), residuals[own] @ inverse @ residuals[own]
        if used < degrees and part > 0:
            p[i] = special.fdtrc(used, degrees - used, part / used * (degrees - used) / max(squares - part, 1e-30))
    if p.min(initial=1) * len(set(setting)) < 0.01:
        return fit(np.where(np.arange(len(grid))[:, None] == p.argmin(), np.nan, grid), [*apart, p.argmin()])
    return Model(y, design, weights, math.sqrt(squares / degrees) if degrees else math.nan, degrees, apart)


def own_spread(grid, weights):
    """A contrast from its settings' values alone: (estimate, standard error (NaN: one seed), degrees of freedom).

    Paired by common seeds (Student 1908); with fewer than two, by each setting's s.d. (Welch 1947).
    """
    grid, weights = grid[weights != 0], weights[weights != 0]
    common, n = weights @ grid[:, ~np.isnan(grid).any(0)], (~np.isnan(grid)).sum(1)
    if len(common) > 1:
        return common.mean(), common.std(ddof=1) / math.sqrt(len(common)), len(common) - 1
    if n.min() < 2:
        return weights @ np.nanmean(grid, 1), math.nan, 1
    parts = weights**2 * np.nanvar(grid, 1, ddof=1) / n
    degrees = parts.sum() ** 2 / max((parts**2 / (n - 1)).sum(), 1e-99)
    return weights @ np.nanmean(grid, 1), math.sqrt(parts.sum()), degrees


def contrasts(grid, names, model, rows, margin=None):
    """Judge [{setting: weight}], such as {one: 1, other: -1}: columns of a table with a row for each.

    These are difference; low, high: 95 % interval; low_all, high_all: 95 % intervals that hold together; p: two-sided,
    not adjusted; n: seeds that its settings share or, without any, the fewest seeds of one; pooled: True if the model
    judged it, False if own_spread() did, with Bonferroni's share (a setting is apart, or no seed is shared); verdict.
    """
    weights = np.array([[row.get(name, 0) for name in names] for row in rows], float).reshape(-1, len(names))
    if not ((weights > 0).any(1) & (weights < 0).any(1)).all():
        raise ValueError("A comparison takes two settings, a trend two values of x.")
    effects = np.pad(weights, ((0, 0), (0, model.design.shape[1] - len(names))))
    linear = effects @ model.weights  # (contrasts, values), estimates are linear @ y
    lengths = np.linalg.norm(linear, axis=1)
    pooled = np.isclose(linear @ model.design, effects).all(1) & (model.degrees > 0)
    found = [
        (linear[i] @ model.y, model.sd * lengths[i], model.degrees) if pooled[i] else own_spread(grid, weights[i])
        for i in range(len(rows))
    ]
    difference, error, degrees = np.array(found, float).reshape(-1, 3).T
    error[error < 1e-9 * np.nanmax(np.abs(grid), initial=0)] = 0  # rounding
    share = 0.05 / max(np.isfinite(error).sum(), 1)  # of each in the family's 5 % (Bonferroni)
    one, together = (error * special.stdtrit(degrees, 1 - errors / 2) for errors in (0.05, share))
    if pooled.any():
        units = linear[pooled] / lengths[pooled, None]
        correlation = tuple(map(tuple, np.round(units @ units.T, 7)))
        together[pooled] = error[pooled] * critical(correlation, model.degrees, share * pooled.sum())
    columns = {"difference": difference}
    for name, half in (("", one), ("_all", together)):
        half = np.where(half > 0, half, np.nan)
        columns |= {f"low{name}": difference - half, f"high{name}": difference + half}
    columns["p"] = 2 * special.stdtr(degrees, -np.abs(difference) / np.where(error > 0, error, np.nan))
    columns["n"] = [t.all(0).sum() or t.sum(1).min() for t in (~np.isnan(grid[w != 0]) for w in weights)]
    verdicts = [sentence(*row, margin) for row in zip(difference, together, strict=True)]
    return columns | {"pooled": pooled, "verdict": verdicts}


def sentence(difference, half, margin=None):
    """ "higher by 1.8 (0.4 to 3.1)" or "within 1.4"; "equivalent" where all of the interval is within a margin.

    half: of the interval's width; NaN with too few seeds. (Schuirmann 1987 asks for less, an interval of 90 %.)
    """
    if not half > 0:
        return "no spread between seeds" if half == 0 else "one seed"
    size, digits = abs(difference), max(0, 1 - math.floor(math.log10(half)))
    if size > half:  # more digits where the end near 0 would read 0.0
        digits = max(digits, min(digits + 2, -math.floor(math.log10(size - half))))
    text, far = f"{size:.{digits}f} ({size - half:.{digits}f} to ", f"{size + half:.{digits}f}"
    text = f"within {far}" if size <= half else f"{'higher' if difference > 0 else 'lower'} by {text}{far})"
    return text + (f", equivalent within {margin:g}" if margin and size + half < margin else "")


def judge(values, baseline, margin=None):
    """Verdicts of all settings against the baseline. If it has the best mean, they show which are worse (Hsu 1984)."""
    grid, names = read(values, [baseline])
    model, others = fit(grid), [name for name in names if name != baseline]
    rows = [{baseline: -1, other: 1} for other in others]
    found = pd.DataFrame(contrasts(grid, names, model, rows, margin), others)
    of = pd.DataFrame(grid, pd.Index(names, name="setting"))
    table = pd.DataFrame({"mean": of.mean(axis=1), "sd": of.std(axis=1), "n": of.count(axis=1)})
    table = table.join(found.drop(columns="n"))
    table["verdict"] = table["verdict"].astype(object).fillna("baseline")
    pool = "settings, seeds as blocks" if model.design.shape[1] > len(names) else "settings"
    note = f"Noise: s.d. {model.sd:.3g}, pooled over {pool}; degrees of freedom: {model.degrees}."
    note = note if model.degrees else "No intervals: they need two settings with two seeds each."
    if len(own := found.index[~found["pooled"] & found["low"].notna()]):
        note += f" Not pooled: {', '.join(own)}."
    if model.apart:
        note += f" The noise of {', '.join(names[i] for i in model.apart)} is larger."
    return Verdicts(table, model.sd, model.degrees, note)


def minus(one, other):
    """The contrast {setting: weight} of one setting's mean less another's."""
    return {one: 1, other: -1}


def slope(x):
    """The contrast {setting: weight} that is the slope over x, {setting: number}; per doubling where x is a log2."""
    steps = pd.Series(x, dtype=float) - pd.Series(x, dtype=float).mean()
    return dict(steps / max(steps @ steps, 1e-99))


def judge_together(values, rows):
    """contrasts() of several {setting: weight}, such as minus(one, other): a row of a table for each."""
    grid, names = read(values, [name for row in rows for name in row])
    return pd.DataFrame(contrasts(grid, names, fit(grid), rows))


def spread(values, digits=2):
    """ "81.03 ± 0.21 (n 3)", mean and standard deviation; one value without, and nothing of none."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation} (n {len(values)})" if len(values) else ""
