"""Draw metrics of finished or running runs by epoch, a line for each run, from their metrics.csv alone.

python -m scripts.plot_curves logs/classifier/* --metric train/loss test/acc --output curves.png
"""

from pathlib import Path

import utils
from errors import UserError, as_user_error, exit_in_one_line
from figures import draw_curves, plt, save
from runs import read_metrics
from scripts.results import watched

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


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "--metric",
        nargs="+",
        help="columns of metrics.csv; left out: train/loss and the accuracy that all runs have, val/, test/ or knn/acc",
    )
    parser.add_argument("--label", nargs="+", help="a legend entry for each run; left out: its directory's name")
    parser.add_argument("--output", type=utils.png_path, default=Path("curves.png"), help="PNG to write")
    return parser.parse_args(argv)


@exit_in_one_line()
@as_user_error(OSError)
def main(argv=None):
    args = parse_args(argv)
    labels = args.label or [run.name for run in args.runs]
    if len(labels) != len(args.runs):
        raise UserError(f"--label has {len(labels)} entries for {len(args.runs)} runs; give one for each.")
    tables = [read_metrics(run) for run in args.runs]
    metrics = args.metric or ["train/loss", *filter(None, [watched(tables)])]
    for run, table in zip(args.runs, tables, strict=True):
        if not table:
            raise UserError(f"{run} has no metrics.csv with a complete epoch; name run directories.")
        if missing := set(metrics) - set(table[0]):
            raise UserError(f"{run} has no {', '.join(sorted(missing))}; it has {', '.join(table[0])}.")
    width = max(len(label) for label in labels)
    for label, table in zip(labels, tables, strict=True):
        last = ", ".join(f"{NAMES.get(metric, metric)} {table[-1][metric]:.4f}" for metric in metrics)
        print(f"{label:{width}}  epoch {table[-1]['epoch']}: {last}")
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.5 * len(metrics), 4), squeeze=False)
    for place, metric in zip(axes.flat, metrics, strict=True):
        curves = [
            (label, [row["epoch"] for row in table], [[row[metric] for row in table]])
            for label, table in zip(labels, tables, strict=True)
        ]
        draw_curves(place, curves, NAMES.get(metric, metric), percent=metric.endswith("/acc"))
        place.legend()
    save(figure, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
