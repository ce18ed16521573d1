"""Many finished runs: which there are, what sets them apart, and how sure a difference between two settings is.

A setting has a result for each seed. Two settings are told apart by the differences of results with equal seeds.
"""

import functools
import json
import math
import statistics
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import utils
from engine.checkpoints import digest, load_file
from engine.errors import UserError
from engine.features import FROZEN_MEASURES
from engine.run import FREE_ARGUMENTS, read_config, read_metrics
from images import data
from model import MAE_ViT
from train_classifier import PRESETS

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the last one, which is a little wide
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
NO_SETTING = {"seed", "encoder_digest", "dry_run", *FREE_ARGUMENTS}  # differ from run to run of one setting
NONE = {"train_images": "all", "warmup_epoch": "default"}  # what None stands for; elsewhere "none"

# --- runs ---


class Result(NamedTuple):
    """One seed of a setting.

    Args:
        classifier: its run directory; None: a MAE that no classifier here comes from.
        mae: the run directory of the MAE that its encoder comes from; None: from scratch, or it is not here.
        features: what evaluate_features.py stored of that MAE (.json); None: it is not measured.
    """

    seed: int
    classifier: Path | None
    mae: Path | None
    features: Path | None = None


def is_finished(directory):
    """Whether a run's metrics.csv holds its last epoch; kept runs have no weights."""
    metrics = read_metrics(directory)
    return bool(metrics) and metrics[-1]["epoch"] == read_config(directory)["arguments"]["total_epoch"]


def find_runs(directories):
    """{run directory: its config} of all runs in and below some directories, each once.

    Raises:
        UserError: one of the directories is not there.
    """
    found = {}
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"No directory {directory}.")
        for path in sorted(directory.rglob("config.json")):
            config = read_config(path.parent)
            if "arguments" in config:  # an exported model has a config.json, too
                found.setdefault(path.parent.resolve(), (path.parent, config))
    return dict(found.values())


def find_results(*directories, equal_labels=False):
    """A Result for each finished classifier in and below some directories, then for each MAE that none comes from.

    Args:
        equal_labels: where classifiers differ in their number of labels (without any: where features do), features
            belong to the classifier that had as many; others are a Result of their MAE. Else only those on all labels
            count.

    Returns:
        [Result, ...], in the order of the runs' names; {run directory: why it is not among them}.

    Raises:
        UserError: a classifier's encoder is not the MAE's of that name, or not the one whose features are stored.
    """
    runs, features, left_out = find_runs(directories), find_features(directories), {}
    for directory, config in runs.items():
        if not is_finished(directory):
            epochs = f"{len(read_metrics(directory))} of {config['arguments']['total_epoch']} epochs"
            left_out[directory] = f"not finished, {epochs}"
    finished = {directory: config for directory, config in runs.items() if directory not in left_out}
    maes = [directory for directory, config in finished.items() if config["name"].startswith("mae_")]
    classifiers = {directory: config for directory, config in finished.items() if directory not in maes}
    counts = {config["arguments"].get("train_images") for config in classifiers.values()}
    labels = {stored["arguments"]["train_images"] for stored in features.values()}
    if not (equal_labels and len(counts or labels) > 1):
        equal_labels, labels = False, {None}
    results, used = [], set()  # used: what features of which MAE have a classifier, as (MAE, labels)
    for directory, config in classifiers.items():
        seed, encoder = config["arguments"]["seed"], config["name"].partition("_from_")[2]
        mae = mae_of(directory, maes) if encoder else None
        if encoder and mae is None and "pretraining" not in config:
            left_out[directory] = f"its MAE, {encoder}, is not there or not finished"
            continue
        count = config["arguments"]["train_images"] if equal_labels else None
        measured = features_of(mae, features, count, directory) if mae else None
        used |= {(mae, count), (mae, "any")}
        results.append(Result(seed, directory, mae, measured))
    for mae in maes:
        seed = read_config(mae)["arguments"].get("seed")
        for count in sorted(labels, key=lambda count: count or math.inf):
            measured = features_of(mae, features, count)
            if measured and (mae, count) not in used:
                results.append(Result(seed, None, mae, measured))
                used.add((mae, "any"))
        if (mae, "any") not in used:
            results.append(Result(seed, None, mae))
    return results, left_out


def is_pretrained(result):
    """Whether there is a MAE in it, here or not."""
    return result.mae is not None or "_from_" in read_config(result.classifier)["name"]


def mae_of(classifier, maes):
    """The run in `maes` that a classifier's encoder comes from, preferably in the same sweep; or None."""
    config = read_config(classifier)
    name, wanted = config["name"].partition("_from_")[2], config["arguments"].get("encoder_digest")
    for mae in (mae for mae in maes if mae == classifier.parents[1] / "pretrain" / name):
        return mae
    for mae in (mae for mae in maes if read_config(mae)["name"] == name):
        other = wanted and digest_of(mae) not in (None, wanted)
        stored, facts = read_config(mae)["arguments"], config.get("pretraining", {})
        if not other and all(stored[name] == value for name, value in facts.items() if name in stored):
            return mae
    return None


def digest_of(mae):
    """Digest of the weights in a run's model.pt; None where there is none."""
    return digest(load_file(mae)["model"]) if (mae / "model.pt").exists() else None


def features_of(mae, features, labels=None, classifier=None):
    """Path of a MAE's features on `labels` images (None: on all), those with the most rows; None if there are none.

    Args:
        features: {.json: its content}, of all MAEs.

    Raises:
        UserError: the MAE in model.pt, or in all its features, is another one than the classifier's encoder.
    """
    features = {path: stored for path, stored in features.items() if of_mae(stored, mae)}
    if classifier:
        wanted = read_config(classifier)["arguments"].get("encoder_digest")  # old runs have none
        models = {mae / "model.pt": own} if wanted and (own := digest_of(mae)) else {}
        for found in (models, {path: stored["model_digest"] for path, stored in features.items()}):
            if wanted and found and wanted not in found.values():
                path, other = next(iter(found.items()))
                raise UserError(
                    f"{path} is of another MAE (digest {other}) than the encoder of {classifier} (digest {wanted}). "
                    f"Train the classifier or measure the features again (--overwrite), or move them away."
                )
    else:
        wanted = digest_of(mae) if features else None  # kept MAEs have no weights
    features = {path: stored for path, stored in features.items() if wanted in (None, stored["model_digest"])}
    features = {path: stored for path, stored in features.items() if stored["arguments"]["train_images"] == labels}
    features = {path: stored for path, stored in features.items() if path.parent == mae} or features
    return max(features, key=lambda path: len(features[path]["rows"]), default=None)


def find_features(directories):
    """What evaluate_features.py stored in and below some directories: {.json: its content}."""
    found = {}
    for path in sorted(path for directory in directories for path in directory.rglob("*features*.json")):
        stored = read_features(path)
        if "model_digest" in stored and by_block(stored, "knn/acc"):
            found[path] = stored
    return found


def read_features(path):
    """The content of a .json file that evaluate_features.py has written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Measure the features again (--overwrite).") from error


def of_mae(stored, mae):
    """Whether features are of the MAE of a run directory, on the images that it was trained on."""
    config = read_config(mae)
    return stored["name"] == config["name"] and name_of_data(stored) == name_of_data(config["arguments"])


def name_of_data(arguments):
    """Of the data set; a folder or file goes by its own name."""
    return data.name_of(types.SimpleNamespace(**arguments | {"train_images": None}))


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


def facts_of(config):
    """{name: value} of what a config.json says is computed, its images and masks as digests; a folder by its name.

    Without the seed, and without where and how it is computed, but for the precision.
    """
    arguments = config["arguments"]
    if arguments:  # a run made before a switch was there had it off
        off = utils.defaults(MAE_ViT) if "decoder_depth" in arguments else {"val_images": None, **PRESETS["reference"]}
        arguments = {"optimizer": "adamw"} | off | arguments
    facts = {name: value for name, value in arguments.items() if name not in NO_SETTING}
    if "data_dir" in config["arguments"]:
        facts["dataset"] = name_of_data(config["arguments"])
    return facts | {name: config[name] for name in ("precision", "images", "test_set", "masks") if name in config}


def what_differs(directories):
    """In which arguments, precision, images and masks some runs differ: {name: {value: the first run that has it}}.

    A name is compared among the runs that have it.
    """
    found = {}
    for directory in directories:
        for name, value in facts_of(read_config(directory)).items():
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


def written(setting):
    """For example "decoder_depth=4 mask_ratio=0.75", of {name: value}."""
    values = {name: NONE.get(name.rpartition("/")[2], "none") if v is None else v for name, v in setting.items()}
    return " ".join(f"{name}={value}" for name, value in values.items())


# --- measures ---


def tables_of(results, kind):
    """metrics.csv of each result's run of a kind, "classifier" or "mae"."""
    return [read_metrics(getattr(result, kind)) for result in results]


def common_accuracy(tables):
    """The accuracy column that all these tables have: on held-out images, on the test images, by k-NN, or None."""
    names = ("val/acc", "test/acc", "knn/acc")
    return next((name for name in names if all(name in table[0] for table in tables if table)), None)


def by_block(stored, name):
    """{encoder block, from 1: accuracy} of stored features: a trained encoder's, mean of the patches' tokens."""
    rows = [row for row in stored["rows"] if (row["encoder"], row["pool"]) == ("trained", "mean")]
    return {row["layer"]: row[name] for row in rows}


def percent(share):
    return None if share is None else 100 * share


def last_value(kind, name, result):
    """Of a column of metrics.csv at the last epoch of a result's "classifier" or "mae"; None where there is none."""
    run = getattr(result, kind)
    value = read_metrics(run)[-1].get(name, math.nan) if run else math.nan
    return None if math.isnan(value) else value


def accuracy(result):
    """In %, of the test images: at the last epoch, or at the one chosen on held-out images (--val_images)."""
    return percent(last_value("classifier", "test/acc", result))


def frozen_accuracy(name, result):
    """In %, of the test images, of a measure on the frozen features after the last block; None: not measured."""
    if result.features is None:
        return None
    accuracies = by_block(read_features(result.features), name)
    return 100 * accuracies[max(accuracies)]


def minutes(results, kind):
    """Mean over seeds of the time in the training epochs of their "classifier" or "mae"."""
    tables = tables_of(results, kind)
    return statistics.mean(sum(row["seconds"] for row in table) for table in tables) / 60


class Measure(NamedTuple):
    """Something measured of a run.

    Args:
        kind: "classifier" or "mae", whose run it is; its seeds are what values are told apart by.
        value: takes a Result; None where that has no such run, or it was not measured.
    """

    kind: str
    value: Callable


MEASURES = {  # in %
    "fine-tuned": Measure("classifier", accuracy),
    **{name: Measure("mae", functools.partial(frozen_accuracy, column)) for name, column in FROZEN_MEASURES.items()},
}


def values_of(results, measure):
    """{seed: value} of the results that have it; a MAE with several classifiers counts once."""
    values = {seed_of(result, measure.kind): measure.value(result) for result in results}
    return {seed: value for seed, value in values.items() if value is not None}


def seed_of(result, kind):
    """The seed of a result's "classifier" or "mae"."""
    return read_config(result.mae)["arguments"]["seed"] if kind == "mae" and result.mae else result.seed


# --- statistics ---


def spread(values, digits=2):
    """ "81.03 ± 0.21 (n 3)", mean and standard deviation; one value without, and nothing of none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation} (n {len(values)})"


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
        if self.high - self.low < 1e-9:  # equal differences, by chance
            return "not decided"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not decided"

    def interval(self, digits=2):
        """ "-0.12 to +0.34"."""
        return f"{self.low:+.{digits}f} to {self.high:+.{digits}f}" if self.n > 1 else "no interval"

    def text(self, digits=2):
        """ "+0.11 (-0.12 to +0.34, n 3)"."""
        return f"{self.mean:+.{digits}f} ({self.interval(digits)}, n {self.n})"


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


def difference(results, one, other, measure=MEASURES["fine-tuned"]):
    """The paired difference of two settings in a Measure; None where one is missing."""
    if one not in results or other not in results:
        return None
    return paired_difference(*(values_of(results[name], measure) for name in (one, other)))


def markdown_table(header, rows):
    """A table in Markdown; cells are written as str() does."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def aligned(header, rows):
    """A table as text; cells are text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)) for line in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)
