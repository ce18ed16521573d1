"""The settings that the ablations compare, and their runs by setting."""

from errors import UserError
from model import MASK_STRATEGIES
from runs import read_config
from scripts.results import by_setting, check_alike, find_results, tables_of, watched

BASE, SCRATCH = "depth 4, random", "from scratch"
PRETRAINING = {"with pretraining": BASE, "from scratch": SCRATCH}
DEPTHS = {f"depth {depth}": f"depth {depth}, random" for depth in (2, 4, 8)}
MASKS = {strategy: f"depth 4, {strategy}" for strategy in MASK_STRATEGIES}


def collect(runs):
    """Finished runs by setting, such as "depth 4, random": {setting: [Result, ...]}, by seed.

    Raises:
        UserError: there are none, or they differ in more than depth, strategy and seed.
    """
    results = find_results(runs)
    for kind in ("classifier", "mae"):
        check_alike(filter(None, (getattr(result, kind) for result in results)), ("decoder_depth", "mask_strategy"))
    results = by_setting(results, setting_of)
    if BASE not in results:
        raise UserError(f"{runs} holds no finished classifier of {BASE}; run scripts/reproduce_report.sh first.")
    return results


def setting_of(result):
    """For example "depth 4, random"."""
    if result.mae is None:
        return SCRATCH
    return "depth {decoder_depth}, {mask_strategy}".format(**read_config(result.mae)["arguments"])


def accuracy_by_epoch(results):
    """The column of metrics.csv in which all classifiers have an accuracy of every epoch."""
    return watched(tables_of(results[BASE], "classifier"))
