"""Compare finished runs of any sweeps: what they differ in, what each setting reaches, what the data decide.

    python -m scripts.compare logs/ablation
    python -m scripts.compare logs/ablation logs/lr3e-4 --baseline mask_ratio=0.75 --where decoder_depth=4

A setting is a MAE and how it is fine-tuned (finetune/...); its runs differ in their seeds alone. The unit is the MAE:
of several classifiers of one MAE the mean counts. Written are compare.md, compare.csv and pictures. Runs that are not
finished are drawn by epoch and not compared.
"""

from pathlib import Path

import numpy as np
import pandas as pd

import utils
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.figures import save
from engine.records import find_runs
from scripts import chance, verdicts
from scripts.compare_figures import CAPTION, draw_all_curves, draw_measures, draw_tuning
from scripts.cost import gflop_per_image
from scripts.results import MEASURES, markdown_table, origins, table_of
from scripts.settings import TUNED, entries_of, label_all, pick_baseline, where, without_doubles, written

TESTED = ("dataset", "img_size", "test_set")  # which images a run was tested on
TASK = {"mask_ratio", "mask_strategy", "masks", "norm_pix_loss", "patch_size", "img_size", "dataset"}  # of a MAE's loss

COSTS = (
    "Parameters, GFLOP, images/s and memory: of pretraining; in rows from scratch, of the classifier. Minutes are "
    "spent in training steps, mean over runs. Minutes and images/s depend on the machines and their other work; GFLOP "
    "do not."
)


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, help="runs, or directories with runs anywhere below")
    text = "the setting that the others are compared with, as printed, or a part that only one setting has, such as "
    text += 'decoder_depth=4, or "as most", the commonest values; default: the first setting, by its values'
    parser.add_argument("--baseline", nargs="+", help=text)
    parser.add_argument("--where", nargs="+", metavar="NAME=VALUE", help="compare only runs with these values")
    parser.add_argument("--margin", type=float, help="also say what is equal within so many points")
    parser.add_argument("--output", type=Path, help="where to write; default: compare/ in the first directory")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="of the pictures")
    parser.add_argument("--latex", action="store_true", help="print the means as a LaTeX table (package booktabs), too")
    return parser.parse_args(argv)


# --- what the data say ---


def long_table(runs, entries, measures=MEASURES):
    """A row for each measure, setting and seed: its value, in % where the measure is a share.

    The column unit is what was measured: the setting or, for measures of a MAE, the MAE's settings alone. Settings that
    share a unit have all of its seeds, and the unit is judged once. So MAEs without a classifier (it may come later)
    have no row if settings with classifiers have the same unit.
    """
    rows = []
    for name, (column, kind, percent) in measures.items():
        for entry in entries.itertuples():
            run = entry.classifier if kind == "classifier" else entry.mae
            labels = entry.labels if kind == "features" else ""
            value = runs[column + labels].get(run, np.nan) if column + labels in runs else np.nan
            unit = entry.setting if kind == "classifier" else f"{entry.unit} {labels}".strip()
            rows.append((name, unit, entry.setting, entry.seed, 100 * value if percent else value))
    found = pd.DataFrame(rows, columns=["measure", "unit", "setting", "seed", "value"]).dropna()
    of_units = found.groupby(["measure", "unit", "seed"], sort=False, as_index=False).value.mean()
    found = found[["measure", "unit", "setting"]].drop_duplicates().merge(of_units)
    tuned = found.setting.isin(entries.setting[entries.classifier.notna()])
    places = pd.MultiIndex.from_frame(found[["measure", "unit"]])
    found = found[tuned | ~places.isin(places[tuned])]
    probe = "k-NN while pretraining"  # says nothing new where k-NN was measured on all images
    probed, measured = (set(found.setting[found.measure == name]) for name in (probe, "k-NN"))
    return found[found.measure != probe] if probed <= measured else found


def judge_all(found, values, baseline, margin=None):
    """compare.csv: for each measure and setting mean, sd and n, the difference from the baseline and a verdict.

    Args:
        found: as `long_table` makes it; values: {setting: {name: value}} of what varies.

    Returns:
        The table; notes on what was pooled, and on what is best in the first measure.
    """
    tables, notes = [], []
    for measure, some in found.groupby("measure", sort=False):
        unit_of, percent = some.groupby("setting", sort=False).unit.first(), MEASURES[measure].percent
        units = some.drop_duplicates(["unit", "seed"])
        units = pd.DataFrame({"setting": units.unit, "seed": units.seed, "value": units.value})
        table, reason = units.groupby("setting").value.agg(mean="mean", sd="std", n="count"), "baseline not measured"
        if baseline in unit_of:
            reason, kind = "other images", MEASURES[measure].kind
            alike = [unit for s, unit in unit_of.items() if same_images(values[s], values[baseline], kind)]
            units = units[units.setting.isin(alike)]
            judged = verdicts.judge(units, unit_of[baseline], margin if percent else None)
            table = table.join(judged.table.drop(columns=list(table)))
            notes += [f"{measure}: {judged.note}{power(judged) if percent else ''}"]
            notes += filter(None, [best_of(measure, units)] if not tables and len(judged.table) > 1 else [])
        table = table.reindex(columns=[*table.columns.drop("verdict", errors="ignore"), "verdict"]).loc[unit_of]
        shared = (unit_of == unit_of.get(baseline)) & (unit_of.index != baseline)
        table["verdict"] = table.verdict.astype(object).fillna(reason).where(~shared.to_numpy(), "the same MAEs")
        varied = pd.DataFrame([values[setting] for setting in unit_of.index], unit_of.index, dtype=object)
        table = varied.join(table.set_axis(unit_of.index)).reset_index()
        table.insert(0, "measure", measure)
        tables.append(table)
    return pd.concat(tables, ignore_index=True), notes


def same_images(one, other, kind):
    """Whether two settings {name: value} were tested on the same images, as far as is known."""
    names = [f"{TUNED}{name}" if kind == "classifier" and f"{TUNED}{name}" in one else name for name in TESTED]
    return all(one[name] == other[name] for name in names if name in one and name in other)


def power(judged):
    """What so many seeds can decide: a sentence; nothing without a spread."""
    settings, n = len(judged.table), int(judged.table.n.max())
    if not judged.sd > 0 or settings < 2 or n < 2:
        return ""
    points, seeds = chance.detectable(judged.sd, settings, n), chance.seeds_needed(judged.sd, settings, 1)
    return f" {n} seeds can show a difference of {points:.1f} points (power 80 %); one point needs {seeds} seeds."


def best_of(measure, units):
    """Which setting is the best in a measure, and which are not shown to be worse: a sentence, "" without intervals."""
    means = units.groupby("setting").value.mean()
    best = means.idxmax() if MEASURES[measure].percent else means.idxmin()
    others = verdicts.judge(units, best).table.drop(best)
    close = list(others.index[~((others.low_all > 0) | (others.high_all < 0))])
    if others.low_all.isna().all():
        return ""
    worse = f"not shown to be worse: {', '.join(close)}" if close else "all others are shown to be worse"
    worse = "but no other is shown to be worse" if len(close) == len(others) else worse
    return f"{measure}: {best} has the best mean; {worse}."


def tuned_often(runs, entries):
    """What the classifiers of MAEs reach, and how far it spreads where MAEs have several.

    Returns:
        The sentence, "" where there is no such MAE; a table with columns setting, mae (its seed), seed, value (in %).
    """
    tuned = entries[entries.classifier.notna() & entries.pretrained.astype(bool)]
    values = pd.DataFrame({"setting": tuned.setting, "mae": tuned.seed, "seed": tuned.tuning_seed})
    values["value"] = 100 * runs["test/acc"].reindex(tuned.classifier).to_numpy() if len(tuned) else []
    between, within = chance.variance_parts(values)
    text = f"fine-tuned: s.d. {within:.2f} between classifiers of one MAE"
    text += f", {between:.2f} more between MAEs of a setting." if between >= 0 else "."
    return text if within >= 0 else "", values


def notes_of(found, entries, values, usual, left_out):
    """What else a reader must know beside the numbers, a line each."""
    lines = [f"Unless a setting says otherwise: {written(usual)}."] if usual else []
    lines += [f"Not compared: {run}: {reason}." for run, reason in left_out.items()]
    seeds = entries.groupby("setting").seed.nunique()
    for (measure, setting), n in found.groupby(["measure", "setting"], sort=False).size().items():
        lines += [f"{setting}: {measure} of {n} of {seeds[setting]} seeds."] if n < seeds[setting] else []
    if TASK & {name for setting in values.values() for name in setting}:
        lines.append("MAE training losses cannot be compared where masks, patches, images or norm_pix_loss differ.")
    return lines


# --- what is written ---


def digits_of(measure):
    return 4 if measure.endswith("loss") else 2


def mean_table(found):
    """Settings x measures: mean ± standard deviation (n)."""
    groups = found.groupby(["measure", "setting"]).value
    cells = {key: verdicts.spread(values, digits_of(key[0])) for key, values in groups}
    return pd.Series(cells).unstack(0, fill_value="")[found.measure.unique()]


def difference_text(row, measure):
    """ "+0.11 (-0.12 to +0.34): within 0.5", of a row with a difference, its interval and a verdict."""
    if not row.low < row.high:
        return row.verdict
    difference, low, high = (f"{number:+.{digits_of(measure)}f}" for number in (row.difference, row.low, row.high))
    return f"{difference} ({low} to {high}): {row.verdict}"


def difference_table(judged):
    """Settings x measures: the difference from the baseline, its 95 % interval, and the verdict."""
    cells = {(row.measure, row.setting): difference_text(row, row.measure) for row in judged.itertuples()}
    return pd.Series(cells).unstack(0, fill_value="")[judged.measure.unique()]


def cost_table(runs, records, entries):
    """Settings x what they cost: of pretraining, or of the classifier alone from scratch."""
    rows = {}
    for setting, some in entries.groupby("setting", sort=False):
        first, kind = some.iloc[0], "mae" if some.pretrained.iloc[0] else "classifier"
        record = records[first[kind] or first.classifier]
        sizes = record.settings if first[kind] else record.parent["settings"]
        epochs = pd.DataFrame([row for run in some[kind].dropna().unique() for row in records[run].metrics])
        minutes = [runs.minutes[some[name].dropna().unique()].mean() for name in ("mae", "classifier")]
        rows[setting] = {
            "parameters": f"{record.facts['parameters']:,}" if first[kind] else "",
            "GFLOP per image": f"{gflop_per_image(sizes, kind):.3f}",
            "images/s": f"{epochs['speed/images_per_sec'].median():,.0f}" if len(epochs) else "",
            "minutes of pretraining": "" if np.isnan(minutes[0]) else f"{minutes[0]:.1f}",
            "of training a classifier": "" if np.isnan(minutes[1]) else f"{minutes[1]:.1f}",
            "peak memory, MB": f"{epochs['memory/peak_mb'].max():,.0f}" if len(epochs) else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def curves_of(records, entries):
    """{kind: {setting: metrics of its runs}}, each run once, without the finished MAE of an unfinished classifier."""
    groups = {"mae": {}, "classifier": {}}
    for entry in entries.itertuples():
        for kind in groups if entry.finished else ["classifier" if entry.classifier else "mae"]:
            if run := getattr(entry, kind):
                groups[kind].setdefault(entry.setting, {})[run] = records[run].metrics
    return {kind: {setting: [*some.values()] for setting, some in found.items()} for kind, found in groups.items()}


def markdown(title, baseline, tables, notes, captions):
    """The content of compare.md."""
    means, differences, costs = map(markdown_table, tables)
    figures = "\n".join(f"![{caption}]({name})\n\n{caption}\n" for name, caption in captions.items())
    return f"""# {title}

{means}
Mean ± standard deviation over n seeds, accuracies in %. Linear probe and k-NN are of the frozen encoder: the mean of \
the patches' tokens after the last block, on {TUNED}train_images labels where that is in the table, else on all.

## Differences to {baseline}

{differences}
In brackets the 95 % interval of this difference alone. The verdict stands on wider intervals, which hold for all \
settings of the column together: of twenty such columns without any true difference, one says otherwise. "Within 1.4": \
the two differ by at most 1.4 points, in either direction.

{"".join(f"- {line}{chr(10)}" for line in notes)}
## Cost

{costs}
{COSTS}

## Figures

{figures}"""


@exit_in_one_line()
@as_user_error(OSError)
def main(argv=None):
    args = parse_args(argv)
    records = {str(record.directory): record for record in find_runs(*args.directories)}
    runs = table_of(records.values())
    if not (len(runs) and runs.finished.any()):
        raise UserError(f"No finished run in {', '.join(map(str, args.directories))}.")
    everything, values, usual = label_all(*where(*entries_of(runs), args.where))
    entries, left_out = without_doubles(everything)
    running = everything[~everything.finished.astype(bool)]
    left_out |= {run: f"not finished, {runs.epochs[run]} of {runs.total_epoch[run]} epochs" for run in running.run}
    found = long_table(runs, entries)
    first, known = found.measure.iloc[0], found if args.baseline else found[found.measure == found.measure.iloc[0]]
    baseline = pick_baseline(args.baseline, {label: values[label] for label in known.setting.unique()})
    judged, notes = judge_all(found, values, baseline, args.margin)
    tuning, several = tuned_often(runs, entries)
    notes += [tuning] * bool(tuning) + notes_of(found, entries, values, usual, left_out)
    notes += origins(records, entries)
    means = judged[judged.measure == first].set_index("setting")["mean"]
    means = means.sort_values(ascending=not MEASURES[first].percent, kind="stable")
    order = list(dict.fromkeys([*means.index, *found.setting]))

    output = args.output or args.directories[0] / "compare"
    shown = {label: values[label] for label in values if label in order}
    figures = {"measures": (draw_measures(found, judged, shown, baseline), CAPTION)}
    figures |= {"fine_tuning": (draw_tuning(several, tuning), tuning)} if tuning else {}
    running = running.assign(setting=running.setting + ", not finished")
    figures |= draw_all_curves(curves_of(records, pd.concat([entries, running])))
    for name, (figure, _) in figures.items():
        save(figure, output / f"{name}.{args.format}")
    judged.to_csv(output / "compare.csv", index=False)
    means, differences = mean_table(found).loc[order], difference_table(judged).loc[order]
    tables = means, differences, means.iloc[:, :1].join(cost_table(runs, records, entries))
    captions = {f"{name}.{args.format}": caption for name, (_, caption) in figures.items()}
    text = markdown(", ".join(map(str, args.directories)), baseline, tables, notes, captions)
    (output / "compare.md").write_text(text)
    print(means.to_string(), f"{first}: difference from the baseline, {baseline}", sep="\n\n", end="\n\n")
    print(differences[[first]].to_string(header=False), end="\n\n")
    print(*notes, *(output / name for name in ("compare.md", "compare.csv", f"*.{args.format}")), sep="\n")
    if args.latex:
        print("", means.to_latex(escape=True).replace("±", r"$\pm$"), sep="\n", end="")


if __name__ == "__main__":
    main()
