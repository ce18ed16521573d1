"""Many finished runs: which there are, what sets them apart, and how sure a difference between two settings is.

A setting has a result for each seed. Two settings are told apart by the differences of results with equal seeds.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from runs import FREE_ARGUMENTS, read_config, read_metrics

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the last one, which is a little wide
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
NO_SETTING = {"seed", "encoder_digest", *FREE_ARGUMENTS}  # differ from run to run of one setting

# --- runs ---


class Result(NamedTuple):
    """One seed of a setting: run directories of a classifier and of the MAE its encoder comes from, None if neither."""

    seed: int
    classifier: Path
    mae: Path | None


def find_results(runs):
    """A Result for each finished classifier in `runs`/classifier, its MAE in `runs`/pretrain; names what it leaves out.

    Returns:
        [Result, ...], in the order of the classifiers' names.
    """
    results = []
    for directory in sorted(runs.glob("classifier/*/")):
        if not (directory / "model.pt").exists():
            print(f"Not finished, left out: {directory}")
            continue
        config = read_config(directory)
        encoder = config["name"].partition("_from_mae_")[2]
        mae = runs / "pretrain" / f"mae_{encoder}" if encoder else None
        if mae and not (mae / "model.pt").exists():
            print(f"Left out: {directory}, as {mae} is not there or not finished")
            continue
        results.append(Result(config["arguments"]["seed"], directory, mae))
    return results


def by_setting(results, setting):
    """Group results by what `setting` says of each: {setting(result): [Result, ...] by seed}.

    Raises:
        UserError: two results of a setting have the same seed.
    """
    groups = {}
    for result in results:
        seeds = groups.setdefault(setting(result), {})
        if other := seeds.get(result.seed):
            runs = f"{other.classifier} and {result.classifier}"
            raise UserError(f"Seed {result.seed} of {setting(result)} is there twice: {runs}.")
        seeds[result.seed] = result
    return {name: sorted(seeds.values()) for name, seeds in groups.items()}


def what_differs(directories):
    """In which arguments, precision and images some runs differ: {name: {value: the first run that has it}}.

    Not in seed, nor in where and how they are computed. A name is compared among the runs that have it.
    """
    found = {}
    for directory in directories:
        config = read_config(directory)
        facts = {name: value for name, value in config["arguments"].items() if name not in NO_SETTING}
        for name, value in {**facts, "precision": config["precision"], "images": config["images"]}.items():
            found.setdefault(name, {}).setdefault(value, directory)
    return {name: values for name, values in found.items() if len(values) > 1}


def check_alike(directories, varied):
    """Refuse runs of one kind that differ in more than the arguments in `varied`.

    Raises:
        UserError: names the first such argument, two values and a run.
    """
    for name, values in sorted(what_differs(directories).items()):
        if name not in varied:
            one, other = list(values)[:2]
            raise UserError(
                f"{values[other]} has {name} {other}, others have {one}. Report one sweep at a time: "
                f"give each its own LOGS, or move runs away."
            )


# --- measures ---


def tables_of(results, kind):
    """metrics.csv of each result's run of a kind, "classifier" or "mae"."""
    return [read_metrics(getattr(result, kind)) for result in results]


def watched(tables):
    """The accuracy by which all these runs can be watched: on held-out images, on the test images, by k-NN, or None."""
    names = ("val/acc", "test/acc", "knn/acc")
    return next((name for name in names if all(name in table[0] for table in tables if table)), None)


def accuracy(result):
    """In %, of the test images: at the last epoch, or at the one chosen on held-out images (--val_images)."""
    return 100 * read_metrics(result.classifier)[-1]["test/acc"]


# --- statistics ---


def spread(values):
    """ "81.03 ± 0.21 (n 3)", mean and standard deviation; one value without."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} (n {len(values)})"


class Difference(NamedTuple):
    """Mean difference over n equal seeds and its 95 % interval, infinite with one seed."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self):
        """Of the first against the second: "higher", "lower", "not decided" or "one seed"."""
        if self.n == 1:
            return "one seed"
        if self.low == self.high:  # equal differences, by chance
            return "not decided"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not decided"

    @property
    def interval(self):
        """ "-0.12 to +0.34"."""
        return f"{self.low:+.2f} to {self.high:+.2f}" if self.n > 1 else "no interval"


def paired_difference(one, other):
    """Of two {seed: value}, one minus other; None without common seeds."""
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    n = len(differences)
    if n == 0:
        return None
    mean, half = statistics.mean(differences), math.inf
    if n > 1:
        t = STUDENT_T[min(n - 1, len(STUDENT_T)) - 1]
        half = t * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def difference(results, one, other, measure=accuracy):
    """The paired difference of two settings in measure(result); None where one is missing."""
    if one not in results or other not in results:
        return None
    return paired_difference(*({result.seed: measure(result) for result in results[name]} for name in (one, other)))


def markdown_table(header, rows):
    """A table in Markdown; cells are written as str() does."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"
