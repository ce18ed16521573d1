"""Draw metrics of finished or running runs by epoch, a line for each run, from their metrics.csv alone.

python -m scripts.plot_curves logs/classifier/* --metric train/loss test/acc --output curves.png
"""

import collections
import functools
import math
import operator
import os
import sys
from pathlib import Path

if not __package__:  # started as python scripts/plot_curves.py, which puts scripts/ on the path and not the root
    sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.figures import draw_curves, draw_legend, plt, save
from engine.run import read_metrics
from scripts.results import common_accuracy

NAMES = {
    "train/loss": "training loss",
    "test/loss": "test loss",
    "test/acc": "test accuracy",
    "val/loss": "loss on held-out images",
    "val/acc": "accuracy on held-out images",
    "knn/acc": "k-NN accuracy",
    "lr": "learning rate",
    "speed/images_per_sec": "images/s",
}
KINDS = {"_from_": "pretrained", "_scratch_": "from scratch", "": "MAE"}  # by what is in a run's name


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "--metric",
        nargs="+",
        help="columns of metrics.csv; default: train/loss and the accuracy that all runs have (val/acc, test/acc or "
        "knn/acc), else the k-NN accuracy of those that have it",
    )
    parser.add_argument("--label", nargs="+", help="a legend entry for each run; default: what differs in their paths")
    parser.add_argument("--output", type=utils.png_path, default=Path("curves.png"), help="PNG to write")
    return parser.parse_args(argv)


def short_names(runs):
    """Of each run directory's path the parts that not all runs of its kind have; where that is not enough, the path."""
    if len(runs) == 1:
        return [runs[0].name]
    kinds = [next(mark for mark in KINDS if mark in run.name) for run in runs]
    parts = [collections.Counter(str(run).replace(os.sep, "_").split("_")) for run in runs]
    names = []
    for kind, words in zip(kinds, parts, strict=True):
        shared = functools.reduce(operator.and_, (w for k, w in zip(kinds, parts, strict=True) if k == kind))
        own = words - shared  # a seed is in a classifier's name and in its MAE's
        names.append(" ".join([KINDS[kind], *own] if len(set(kinds)) > 1 else own))
    return names if all(names) and len(set(names)) == len(runs) else list(map(str, runs))


@exit_in_one_line()
@as_user_error(OSError)
def main(argv=None):
    args = parse_args(argv)
    labels = args.label or short_names(args.runs)
    if len(labels) != len(args.runs):
        raise UserError(f"--label has {len(labels)} entries for {len(args.runs)} runs; give one for each.")
    tables = [read_metrics(run) for run in args.runs]
    for run, table in zip(args.runs, tables, strict=True):
        if not table:
            raise UserError(f"{run} has no metrics.csv with a complete epoch; name run directories.")
        if missing := set(args.metric or ["train/loss"]) - set(table[0]):
            raise UserError(f"{run} has no {', '.join(sorted(missing))}; it has {', '.join(table[0])}.")
    some = "knn/acc" if any("knn/acc" in table[0] for table in tables) else None
    metrics = args.metric or ["train/loss", *filter(None, [common_accuracy(tables) or some])]
    width = max(len(label) for label in labels)
    for label, table in zip(labels, tables, strict=True):
        row = table[-1]
        last = ", ".join(f"{NAMES.get(metric, metric)} {row[metric]:.4f}" for metric in metrics if metric in row)
        print(f"{label:{width}}  epoch {row['epoch']}: {last}")
    size = (5.5 * len(metrics), 4)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, squeeze=False)
    for place, metric in zip(axes.flat, metrics, strict=True):
        curves = [
            (label, [row["epoch"] for row in table], [[row.get(metric, math.nan) for row in table]])
            for label, table in zip(labels, tables, strict=True)
        ]
        draw_curves(place, curves, NAMES.get(metric, metric), percent=metric.endswith("/acc"))
    draw_legend(figure)
    save(figure, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
