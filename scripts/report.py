"""The course report's findings, tables and figures, of the runs of its two ablations: no training.

    python -m scripts.report logs/ablation --output logs/report
    python -m scripts.report logs/report/runs --output logs/report    # from the CSV and JSON that a report keeps

Of kept CSV and JSON alone it draws tables and curves; the pictures that need a model or the images stay as they are.
"""

import itertools
import re
import shutil
from pathlib import Path

import pandas as pd

import utils
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.records import find_runs
from scripts import verdicts
from scripts.compare import COSTS, cost_table, difference_text, long_table, mean_table
from scripts.report_figures import BASE, CELLS, DEPTHS, MASKS, SCRATCH, SETTINGS, Runs, draw_all
from scripts.results import MEASURES, Measure, common_accuracy, markdown_table, origins, table_of
from scripts.settings import entries_of, what_varies, without_doubles

KEPT = ("config.json", "metrics.csv", "features.csv", "features.json")  # of a run, beside the report
COMPARED = {name: MEASURES[name] for name in ("fine-tuned", "linear probe", "k-NN")}
AS_REPORTED = {"fine-tuned, mean of batch means": Measure("test/acc_mean_of_batches", "classifier")}  # as they count
EARLY = {f"early {name}": Measure(f"early/{name}", "classifier", name == "acc") for name in ("acc", "loss", "epochs")}
# The course report's accuracies in %, one seed each: means of batch means
SOURCE = {"depth 2, random": "79.61", "depth 4, random": "79.76", "depth 8, random": "81.03"}
SOURCE |= {"depth 4, block": "82.80", "depth 4, grid": "80.24"}


def deeper(settings):
    """{words: contrast}, each above 0 if a deeper decoder is better; settings: {"depth 2": setting, ...}."""
    two, four, eight = settings.values()
    doubling = verdicts.slope({two: 1, four: 2, eight: 3})
    return {"8 > 4": verdicts.minus(eight, four), "4 > 2": verdicts.minus(four, two), "for each doubling": doubling}


def masked(*claims):
    """The contrasts of claims such as "block > grid"."""
    return {claim: verdicts.minus(*(MASKS[strategy] for strategy in claim.split(" > "))) for claim in claims}


def more_with_cells():
    """The contrast of a doubling with masks in cells against one with random masks."""
    random, cells = (deeper(settings)["for each doubling"] for settings in (DEPTHS, CELLS))
    return cells | {setting: -weight for setting, weight in random.items()}


PRETRAINED = "Pretraining gives a higher final accuracy"
CLAIMS = {  # {text: {words: contrast}}: a claim holds where its contrast {setting: weight} is above 0
    PRETRAINED: {"": verdicts.minus(BASE, SCRATCH)},
    "A deeper decoder gives a better encoder, 8 > 4 > 2": deeper(DEPTHS),
    "block > grid > random": masked("block > grid", "grid > random"),
}
OF_PAPERS = {  # about masks, too
    "random > blockwise, as in the MAE paper": masked("random > blockwise"),
    "block > blockwise, the report's block against the paper's": masked("block > blockwise"),
    "shifted_grid > grid, a lattice that trains all position embeddings against one that does not": masked(
        "shifted_grid > grid"
    ),
    "noise > random, as ColorMAE finds": masked("noise > random"),
    "cells > random, as Pixio masks": masked("cells > random"),
    "A deeper decoder gives a better encoder also with masks in cells, as in Pixio": deeper(CELLS),
    "A doubling of the depth gains more with masks in cells than with random ones": {"": more_with_cells()},
}


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, default=Path("logs/ablation"), help="directory with the runs")
    text = "where to write REPORT.md, figures and numbers"
    parser.add_argument("--output", type=Path, default=Path("logs/report"), help=text)
    return parser.parse_args(argv)


# --- runs ---


def collect(directory):
    """The Runs that the report compares, and {run: why it is not among them}.

    Raises:
        UserError: there are none, or they differ in more than depth, strategy and seed.
    """
    records = {str(record.directory): record for record in find_runs(directory)}
    if BASE not in (names := {run: setting_of(record) for run, record in records.items()}).values():
        raise UserError(f"{directory} holds no classifier of {BASE}; run scripts/reproduce_report.sh first.")
    table, left_out = table_of(records.values()), {}
    entries, settings = entries_of(table)
    for entry in entries.itertuples():
        if not entry.finished:
            left_out[entry.run] = f"not finished, {table.epochs[entry.run]} of {table.total_epoch[entry.run]} epochs"
        elif not entry.classifier:
            left_out[entry.run] = "no finished classifier comes from it"
        elif names[entry.run] not in SETTINGS:
            left_out[entry.run] = f"{names[entry.run]} is none of the settings that the report compares"
    entries = entries[~entries.run.isin(left_out.keys())]
    for name in set(what_varies(settings.loc[entries.index])) - {"decoder_depth", "mask_strategy"}:
        values = ", ".join(map(str, settings.loc[entries.index, name].dropna().unique()))
        raise UserError(f"The runs in {directory} differ in {name} ({values}); move those of other sweeps away.")
    entries, twice = without_doubles(entries.assign(setting=entries.run.map(names), unit=entries.run.map(names)))
    watched = common_accuracy([records[run].metrics for run in entries.run])
    first = pd.DataFrame.from_dict({run: early(records[run].metrics, watched) for run in entries.run}, orient="index")
    return Runs(records, table.join(first), entries, watched), left_out | twice


def setting_of(record):
    """For example "depth 4, random"; of a MAE None."""
    if record.kind == "classifier":
        return (
            "depth {decoder_depth}, {mask_strategy}".format(**record.parent["settings"]) if record.parent else SCRATCH
        )


def early(metrics, watched):
    """Means over the first fifth of the epochs: {column: number}."""
    first = pd.DataFrame(metrics[: max(1, len(metrics) // 5)])
    return {"early/acc": first[watched].mean(), "early/loss": first["train/loss"].mean(), "early/epochs": len(first)}


# --- tables ---


def accuracy_table(found, settings):
    """A row for each setting: each measure; fine-tuned also as the course report counts it, and the report's number."""
    cells = mean_table(found[found.measure.isin([*COMPARED, *AS_REPORTED])]).add_suffix(", %")
    cells["course report (n 1, mean of batch means), %"] = cells.index.map(SOURCE).fillna("")
    labels = {setting: label for label, setting in settings.items() if setting in cells.index}
    return markdown_table(cells.loc[list(labels)].rename(labels))


def judge_claims(found, claims):
    """Judge {claim: contrast}: {(measure, claim): row of judge_together()}; a measure's intervals hold together."""
    judged = {}
    for measure, values in found[found.measure.isin(COMPARED)].groupby("measure", sort=False):
        there = {claim: contrast for claim, contrast in claims.items() if set(contrast) <= set(values.setting)}
        if there:
            rows = verdicts.judge_together(values, list(there.values())).itertuples()
            judged |= {(measure, claim): row for claim, row in zip(there, rows, strict=True)}
    return judged


def difference_table(found, pairs):
    """A row a pair: the difference in each measure, its interval and a verdict; no table without any."""
    claims, rows = {f"{one} minus {other}": verdicts.minus(one, other) for one, other in pairs}, {}
    for (measure, claim), row in judge_claims(found, claims).items():
        rows.setdefault(claim, {})[measure] = difference_text(row, measure)
    return markdown_table(pd.DataFrame.from_dict(rows, orient="index").fillna("")) if rows else ""


# --- findings ---


def said(row):
    """What the data say of a claim that a contrast is above 0: a few words."""
    if row is None or not row.low_all < row.high_all:
        return f"**{'no runs' if row is None else row.verdict}**"
    if row.low_all <= 0 <= row.high_all:
        return f"**{row.verdict} points**"
    return f"**{'holds' if row.low_all > 0 else 'reversed'}**: {row.verdict}"


def findings(found):
    """The course report's three findings and its explanation, each with what these runs say of it, by each measure."""
    texts = CLAIMS | OF_PAPERS
    contrasts = {(text, words): contrast for text, some in texts.items() for words, contrast in some.items()}
    judged, values = judge_claims(found, contrasts), dict(list(found.groupby("measure")))
    epochs = int(values["early epochs"].value.max())
    when = f"In the first {epochs} epochs (their mean)" if epochs > 1 else "In the first epoch"

    def lines(text):
        told = f"{text}:"
        for measure in (measure for measure in COMPARED if measure in values):
            claims = {words: said(judged.get((measure, (text, words)))) for words in texts[text]}
            claims = [f"{words} {verdict}" if len(claims) > 1 else verdict for words, verdict in claims.items()]
            told += f"\n   - {measure}: {'; '.join(claims)}."
        return told

    def early(measure, one, other):
        known, contrast = {one, other} <= set(values[measure].setting), verdicts.minus(one, other)
        return said(next(verdicts.judge_together(values[measure], [contrast]).itertuples()) if known else None)

    _, depth, masks = CLAIMS
    papers = "\n".join(f"- {lines(text)}" for text in OF_PAPERS)
    return f"""\
1. {PRETRAINED}: {said(judged.get(("fine-tuned", (PRETRAINED, ""))))}. {when} it is \
ahead in accuracy: {early("early acc", BASE, SCRATCH)}; and without it the training loss is higher: \
{early("early loss", SCRATCH, BASE)}.
2. {lines(depth)}
3. {lines(masks)}

The MAE paper finds random masks best. The course report explains its other order by its masks, which it says are not \
the paper's. Its grid, one of each 2 x 2, is the paper's; its block is not, but blockwise is. Pixio and ColorMAE have \
other masks, and Pixio a deeper decoder:

{papers}

Differences in points of accuracy (of the loss: in its unit), in brackets their 95 % interval; the intervals of all \
claims hold together, for each measure. A claim holds where the interval lies above 0 and is reversed where it lies \
below; else the difference is within so many points, in either direction. Intervals are over seeds, not other test sets.
"""


# --- the whole ---


def introduction(runs):
    """What was run, how much of it, and what the numbers mean."""
    record = runs.of(BASE, "classifier")[0]
    mae, tuned = (
        {**some, "images": some["train_images"] or "all"} for some in (record.parent["settings"], record.settings)
    )
    chosen = "the epoch chosen on held-out images" if runs.watched == "val/acc" else "the last epoch"
    return f"""\
{mae["dataset"]}, {mae["img_size"]} x {mae["img_size"]}, patch {mae["patch_size"]}, width {mae["embed_dim"]}, encoder \
depth {mae["encoder_depth"]}; {mae["total_epoch"]} epochs of pretraining on {mae["images"]} images, \
{tuned["total_epoch"]} of training each classifier on {tuned["images"]} labelled ones. Fine-tuned accuracy is correct \
/ all test images at {chosen}. Linear probe and k-NN measure the frozen encoder, as `evaluate_features.py` does: the \
mean of the patches' tokens after the last block, all labels. Numbers are the mean ± standard deviation over n seeds. \
Differences have their own 95 % interval in brackets, from the spread pooled over all settings, with seeds as blocks; \
the words after it stand on wider intervals, which hold for all differences of the column together.
"""


def write_report(runs, notes, output, captions):
    """REPORT.md, with the figures under their captions."""
    found = long_table(runs.table, runs.entries, COMPARED | AS_REPORTED | EARLY)
    sections = {  # labels of settings; pairs to compare
        "Pretraining": ({"with pretraining": BASE, SCRATCH: SCRATCH}, [(BASE, SCRATCH)]),
        "Table 1: decoder depth": (DEPTHS, [*itertools.combinations([*DEPTHS.values()][::-1], 2)]),
        "Table 2: mask strategy": (MASKS, [(setting, BASE) for setting in MASKS.values() if setting != BASE]),
        "Decoder depth with masks in cells": (CELLS, [*itertools.combinations([*CELLS.values()][::-1], 2)]),
    }
    order = [setting for setting in SETTINGS if setting in set(runs.entries.setting)]
    costs = mean_table(found)[["fine-tuned"]].join(cost_table(runs.table, runs.records, runs.entries)).loc[order]
    text = f"# What decoder depth and masking do\n\n{introduction(runs)}"
    text += "".join(f"\n- {note}\n" for note in notes)
    text += f"\n## Findings of the course report\n\n{findings(found)}"
    for title, (settings, pairs) in sections.items():
        text += f"\n## {title}\n\n{accuracy_table(found, settings)}\n{difference_table(found, pairs)}"
    text += f"\n## What it costs\n\n{markdown_table(costs)}\n{COSTS}\n\n## Figures\n\n"
    for name, caption in captions.items():
        title = name.replace("figure", "Figure ").replace(" 0", " ").replace("_", " ")
        text += f"### {title}\n\n![{caption}]({name}.png)\n\n{caption}\n\n"
    text += "## Runs\n\nIn `runs/`, each with its command, commit and machine in config.json.\n\n"
    (output / "REPORT.md").write_text(
        text + "".join(f"- {line}\n" for line in origins(runs.records, runs.entries, least=1))
    )


def kept_pictures(output):
    """{name: caption} of the pictures of an earlier report."""
    report = output / "REPORT.md"
    found = re.findall(r"^!\[(.*)\]\((\w+)\.png\)$", report.read_text(), re.MULTILINE) if report.exists() else []
    return {name: caption for caption, name in found if (output / f"{name}.png").exists()}


def keep_numbers(targets, output):
    """Copy the CSV and JSON behind the report beside it, in place of what an earlier report has kept there."""
    for old in (output / "runs").glob("*/*"):  # a run that holds more is not ours
        if old not in targets.values() and old.is_dir() and all(path.name in KEPT for path in old.iterdir()):
            shutil.rmtree(old)
    for directory, target in targets.items():
        target.mkdir(parents=True, exist_ok=True)
        for path in (directory / name for name in KEPT if (directory / name).exists()):
            shutil.copyfile(path, target / path.name)


@exit_in_one_line()
@as_user_error(OSError)
def main(argv=None):
    args = parse_args(argv)
    runs, left_out = collect(args.runs)
    notes = [f"Left out: {run}: {reason}." for run, reason in left_out.items()]
    args.output.mkdir(parents=True, exist_ok=True)
    used = map(Path, dict.fromkeys([*runs.entries.mae.dropna(), *runs.entries.run]))
    targets = {path: args.output / "runs" / path.parent.name / path.name for path in used}
    again = all(path.resolve() == target.resolve() for path, target in targets.items())  # from the kept numbers
    captions = draw_all(runs, args.output, kept_pictures(args.output) if again else {})
    write_report(runs, notes, args.output, captions)
    if not again:
        keep_numbers(targets, args.output)
    print(*notes, args.output / "REPORT.md", sep="\n")


if __name__ == "__main__":
    main()
