"""Chance: how far several estimates stray at once, how many seeds that asks for, and what their spread consists of."""

import bisect
import functools
import math

import numpy as np
from scipy import optimize, special, stats


@functools.lru_cache
def critical(correlation, degrees, errors=0.05):
    """All |t| of estimates with this correlation (tuples) are below this, except with chance `errors` (Dunnett 1955).

    A multivariate t is a direction times a length whose square is F distributed. The code integrates over lengths and
    samples directions evenly (Sobol 1967): within 0.01, and exact for one estimate or several that are the same.
    """
    eigenvalues, vectors = np.linalg.eigh(np.array(correlation))
    rank = (eigenvalues > 1e-6).sum()
    directions = special.ndtri(stats.qmc.Sobol(rank, scramble=False).random_base2(13) + 2**-14)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    largest = np.abs(directions @ (vectors * np.sqrt(np.abs(eigenvalues)))[:, -rank:].T).max(1)
    one, bonferroni = (stats.t.isf(errors / 2 / m, degrees) for m in (1, len(correlation)))
    tail = functools.partial(special.fdtrc, rank, degrees)
    return optimize.brentq(lambda t: tail((t / largest) ** 2 / rank).mean() - errors, 0.99 * one, 1.01 * bonferroni)


def power_of(sd, settings, points, n):
    """Probability that n seeds of each setting show a difference from the baseline that is `points`, up or down.

    Uses judge()'s intervals, which hold for all settings together; sd: standard deviation of the pooled noise.
    """
    if settings < 2 or not (sd > 0 and points > 0):
        raise ValueError(f"Needs 2 settings, an s.d. and a difference above 0, not {settings}, {sd:g} and {points:g}.")
    m, degrees = settings - 1, (settings - 1) * (n - 1)
    correlation = tuple(tuple(1.0 if i == j else 0.5 for j in range(m)) for i in range(m))
    return stats.nct.sf(critical(correlation, degrees), degrees, points / (sd * math.sqrt(2 / n)))


def seeds_needed(sd, settings, points, power=0.8):
    """The smallest number of seeds with this power."""
    n = 2
    while power_of(sd, settings, points, n) < power:
        n *= 2
    return bisect.bisect_left(range(n), power, n // 2 + 1, key=lambda n: power_of(sd, settings, points, n))


def detectable(sd, settings, n, power=0.8):
    """The smallest difference that n seeds show with this power; infinite with one seed."""
    if n < 2:
        return math.inf
    return sd * optimize.brentq(lambda x: power_of(sd, settings, x * sd, n) - power, 1e-9, 100)


def variance_parts(values):
    """The s.d. between MAEs of a setting and the s.d. between classifiers of a MAE; NaN where there are too few.

    Method of moments (nested analysis of variance, unequal numbers too: Searle 1971); a negative variance is 0.

    Args:
        values: a pandas.DataFrame with columns setting, mae (its seed), seed (the classifier's), value.
    """
    values = values.dropna(subset="value")
    maes, settings = values.groupby(["setting", "mae"])["value"], values.groupby("setting")["value"]
    mean, sizes = maes.transform("mean"), maes.transform("size")
    inner, outer = len(values) - maes.ngroups, maes.ngroups - settings.ngroups  # degrees of freedom
    within = ((values["value"] - mean) ** 2).sum() / (inner or math.nan)
    each = (len(values) - (sizes / settings.transform("size")).sum()) / (outer or math.nan)  # classifiers of a MAE
    between = (((mean - settings.transform("mean")) ** 2).sum() / (outer or math.nan) - within) / each
    return math.sqrt(np.maximum(between, 0)), math.sqrt(within)
