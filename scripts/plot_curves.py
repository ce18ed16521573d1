"""Draw metrics of finished or running runs by epoch, a line for each run.

python -m scripts.plot_curves logs/classifier/* --metric train/loss test/acc --output curves.png
"""

import math
from pathlib import Path

import utils
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.figures import draw_curves, draw_legend, is_share, name_of, plt, save
from engine.records import read_run
from scripts.results import common_accuracy, table_of
from scripts.settings import entries_of, label_all


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    text = "columns of metrics.csv; default: train/loss and the accuracy that all runs have (val/acc, test/acc or "
    text += "probe/knn_acc), else the k-NN accuracy of those that have it"
    parser.add_argument("--metric", nargs="+", help=text)
    parser.add_argument("--label", nargs="+", help="a legend entry for each run; default: in what the runs differ")
    text = "PNG, PDF or SVG to write"
    parser.add_argument("--output", type=utils.picture_path, default=Path("curves.png"), help=text)
    return parser.parse_args(argv)


def labels_of(records):
    """In what settings and seeds each run differs from the others; where that does not tell them apart, their paths."""
    entries, found = label_all(*entries_of(table_of(records)))[0], {}
    for entry in entries.itertuples():
        found |= {entry.classifier: entry.setting} | ({} if entry.mae in found else {entry.mae: entry.unit})
    kinds, seeds = {record.kind for record in records}, {record.settings["seed"] for record in records}
    labels = []
    for record in records:
        words = ["MAE" if len(kinds) > 1 and record.kind == "mae" else "", found[str(record.directory)]]
        words += [f"seed={record.settings['seed']}"] if len(seeds) > 1 else []
        labels.append(" ".join(filter(None, words)))
    return labels if len(set(labels)) == len(records) else [str(record.directory) for record in records]


@exit_in_one_line()
@as_user_error(OSError)
def main(argv=None):
    args = parse_args(argv)
    records = [read_run(run) for run in args.runs]
    for record in records:
        if not record.metrics:
            raise UserError(f"{record.directory} has no metrics.csv with a complete epoch; name run directories.")
        if missing := set(args.metric or ["train/loss"]) - set(record.metrics[0]):
            columns = ", ".join(record.metrics[0])
            raise UserError(f"{record.directory} has no {', '.join(sorted(missing))}; it has {columns}.")
    labels, tables = args.label or labels_of(records), [record.metrics for record in records]
    if len(labels) != len(records):
        raise UserError(f"--label has {len(labels)} entries for {len(records)} runs; give one for each.")
    some = "probe/knn_acc" if any("probe/knn_acc" in table[0] for table in tables) else None
    metrics = args.metric or ["train/loss", *filter(None, [common_accuracy(tables) or some])]
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.5 * len(metrics), 4), squeeze=False)
    for place, metric in zip(axes.flat, metrics, strict=True):
        curves = [
            (label, [row["epoch"] for row in table], [[row.get(metric, math.nan) for row in table]])
            for label, table in zip(labels, tables, strict=True)
        ]
        draw_curves(place, curves, name_of(metric), percent=is_share(metric))
    draw_legend(figure)
    save(figure, args.output)
    for label, table in zip(labels, tables, strict=True):
        last = ", ".join(f"{name_of(metric)} {table[-1][metric]:.4f}" for metric in metrics if metric in table[-1])
        print(f"{label:{max(map(len, labels))}}  epoch {table[-1]['epoch']}: {last}")
    print(args.output)


if __name__ == "__main__":
    main()
