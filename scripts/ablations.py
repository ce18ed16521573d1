"""The settings that the ablations compare, and their runs by setting."""

from engine.errors import UserError
from engine.run import read_config
from model import MASK_STRATEGIES
from scripts.results import by_setting, check_alike, common_accuracy, find_results, is_pretrained, tables_of

BASE, SCRATCH = "depth 4, random", "from scratch"
PRETRAINING = {"with pretraining": BASE, "from scratch": SCRATCH}
VARIED = ("decoder_depth", "mask_strategy", "masks")
DEPTHS = {f"depth {depth}": f"depth {depth}, random" for depth in (2, 4, 8)}
MASKS = {strategy: f"depth 4, {strategy}" for strategy in MASK_STRATEGIES}
SETTINGS = list(dict.fromkeys([SCRATCH, *DEPTHS.values(), *MASKS.values()]))


def collect(runs):
    """Finished runs by setting, such as "depth 4, random".

    Returns:
        {setting: [Result, ...] by seed}; {run directory of a classifier: why it is not among them}.

    Raises:
        UserError: there are none, or they differ in more than depth, strategy and seed.
    """
    found, left_out = find_results(runs)
    results = []
    for result in found:
        if result.classifier is None:
            left_out[result.mae] = "no classifier comes from it"
        elif result.mae is None and is_pretrained(result):
            left_out[result.classifier] = "its MAE is not there or not finished"
        elif setting_of(result) not in SETTINGS:
            left_out[result.classifier] = f"{setting_of(result)} is none of the settings that the report compares"
        else:
            results.append(result)
    for kind in ("classifier", "mae"):
        check_alike(filter(None, (getattr(result, kind) for result in results)), VARIED)
    results = by_setting(results, setting_of)
    if BASE not in results:
        raise UserError(f"{runs} holds no finished classifier of {BASE}; run scripts/reproduce_report.sh first.")
    return results, left_out


def setting_of(result):
    """For example "depth 4, random"."""
    if result.mae is None:
        return SCRATCH
    arguments = read_config(result.mae)["arguments"]
    return "depth {decoder_depth}, {mask_strategy}".format(**arguments)


def accuracy_by_epoch(results):
    """The column of metrics.csv in which all classifiers have an accuracy of every epoch."""
    return common_accuracy(tables_of(results[BASE], "classifier"))
