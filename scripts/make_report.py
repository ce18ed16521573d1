"""Tables, figures and findings of the ablations, from their run directories and the test images: no training.

python -m scripts.make_report --runs logs/ablation --output logs/report
python -m scripts.make_report --runs logs/report/runs --output logs/report    # from the CSV and JSON of a report

Of kept CSV and JSON alone it draws tables and curves; the pictures that need a model or the images stay as they are.
"""

import itertools
import re
import shutil
import statistics
from pathlib import Path

import utils
from errors import as_user_error, exit_in_one_line
from runs import read_config, read_metrics
from scripts.ablations import BASE, DEPTHS, MASKS, PRETRAINING, SCRATCH, accuracy_by_epoch, collect
from scripts.cost import gflop_per_image
from scripts.report_figures import draw_all
from scripts.results import accuracy, difference, markdown_table, spread, tables_of

KEPT = ("config.json", "metrics.csv", "features.csv", "features.json")  # of a run, beside the report
COUNTS = ("", "_mean_of_batches")  # endings of test/acc
# The source report's accuracies in %, one seed each: means of batch means
SOURCE = {
    "depth 2, random": 79.61,
    "depth 4, random": 79.76,
    "depth 8, random": 81.03,
    "depth 4, block": 82.80,
    "depth 4, grid": 80.24,
}


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("logs/ablation"), help="holds pretrain/* and classifier/*")
    parser.add_argument("--output", type=Path, default=Path("logs/report"), help="REPORT.md, figures and CSV go here")
    parser.add_argument("--bank", type=utils.positive_int, default=500, help="test images of the mask matrix")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args(argv)


def judge(claims):
    """What the data say of {claim: the difference that it expects above 0, None without runs}: a sentence's end.

    Several claims hold together if each holds, and do not if one is reversed.
    """
    words = {"higher": "holds", "lower": "reversed"}
    verdicts = [words.get(d.verdict, d.verdict) if d else "no runs" for d in claims.values()]
    numbers = [f" ({d.mean:+.2f}, {d.interval}, n {d.n})" if d else "" for d in claims.values()]
    if len(claims) == 1:
        return f"**{verdicts[0]}**{numbers[0]}"
    whole = "does not hold" if "reversed" in verdicts else "holds" if set(verdicts) == {"holds"} else "not decided"
    return f"**{whole}**: " + "; ".join(map("{} {}{}".format, claims, verdicts, numbers))


# --- the report ---


def accuracy_table(results, settings):
    """A row a setting: test accuracy in both counts, at the best epoch, and what the source report has."""
    chosen = accuracy_by_epoch(results) == "val/acc"
    rows = []
    for label, setting in settings.items():
        if setting in results:
            tables = tables_of(results[setting], "classifier")
            row = [label, *(spread([100 * table[-1][f"test/acc{name}"] for table in tables]) for name in COUNTS)]
            if not chosen:
                row.append(spread([100 * max(epoch["test/acc"] for epoch in table) for table in tables]))
            rows.append([*row, f"{SOURCE[setting]:.2f}" if setting in SOURCE else ""])
    header = ["", "accuracy, %", "mean of batch means, %"]
    header += [] if chosen else ["best epoch, chosen on the test set, %"]
    return markdown_table([*header, "source report (n 1, mean of batch means), %"], rows)


def difference_table(results, pairs):
    """A row a pair: paired difference in accuracy with its interval, and what follows; no table without any."""
    rows = []
    for one, other in pairs:
        d = difference(results, one, other)
        if d:
            says = {"higher": "the first is better", "lower": "the first is worse"}.get(d.verdict, "not decided")
            rows.append([f"{one} minus {other}", f"{d.mean:+.2f}", d.interval, d.n, says])
    return markdown_table(["difference", "points", "95 % interval", "n", "the data say"], rows) if rows else ""


def cost_table(results):
    """A row a setting: its accuracy and what that cost; of the classifier alone from scratch."""
    rows = []
    for setting in [SCRATCH, *dict.fromkeys([*DEPTHS.values(), *MASKS.values()])]:
        if setting in results:
            found = results[setting]
            kind = "mae" if found[0].mae else "classifier"
            config = read_config(getattr(found[0], kind))
            speeds = [row["speed/images_per_sec"] for table in tables_of(found, kind) for row in table]
            memory = [row["memory/peak_mb"] for table in tables_of(found, kind) for row in table]
            rows.append(
                [
                    setting,
                    spread([accuracy(result) for result in found]),
                    f"{config['parameters']:,}",
                    f"{gflop_per_image(config['arguments'], kind == 'mae'):.3f}",
                    f"{statistics.median(speeds):,.0f}",
                    minutes(found, "mae") if kind == "mae" else "0",
                    minutes(found, "classifier"),
                    f"{max(memory):,.0f}",
                ]
            )
    header = ["", "accuracy, %", "parameters", "GFLOP an image and step", "images/s"]
    header += ["minutes of pretraining steps", "of fine-tuning steps", "peak memory, MB"]
    return markdown_table(header, rows)


def minutes(found, kind):
    """Mean over seeds of the time in training epochs."""
    return f"{statistics.mean(sum(row['seconds'] for row in table) for table in tables_of(found, kind)) / 60:.1f}"


def findings(results):
    """The source report's three findings and its explanation, each with what these runs say of it."""

    def early(result, metric):  # mean of the first fifth of the epochs
        values = [row[metric] for row in read_metrics(result.classifier)]
        return statistics.mean(values[: max(1, len(values) // 5)])

    watch = accuracy_by_epoch(results)
    ahead = difference(results, BASE, SCRATCH, lambda result: 100 * early(result, watch))
    loss = difference(results, SCRATCH, BASE, lambda result: early(result, "train/loss"))

    def gain(one, other):
        return {f"{one} > {other}": difference(results, MASKS[one], MASKS[other])}

    depth = {
        f"{one} > {other}": difference(results, DEPTHS[f"depth {one}"], DEPTHS[f"depth {other}"])
        for one, other in ((8, 4), (4, 2))
    }
    return f"""\
1. Pretraining gives a higher final accuracy: {judge({"": difference(results, BASE, SCRATCH)})}. It is ahead over the \
first fifth of the epochs, in accuracy: {judge({"": ahead})}; in training loss, lower by: {judge({"": loss})}.
2. A deeper decoder gives a better encoder, 8 > 4 > 2: {judge(depth)}.
3. block > grid > random: {judge(gain("block", "grid") | gain("grid", "random"))}.

The MAE paper finds random masks best. The source report explains its other order by its block and grid, which are not \
the paper's. Its grid, one of each 2 x 2, is the paper's; its block is not, blockwise is near it:

- random > blockwise, as in the paper: {judge(gain("random", "blockwise"))}.
- block > blockwise, the report's block against the paper's: {judge(gain("block", "blockwise"))}.
- shifted_grid > grid, a lattice that trains all position embeddings against one that does not: \
{judge(gain("shifted_grid", "grid"))}.

In brackets: difference in points of accuracy (of the loss: in its unit), 95 % interval, seeds. A difference holds \
where the interval lies above 0, is reversed where below, and is not decided where 0 is inside. Intervals are over \
seeds, not other test sets, and each stands alone: of many true zeros one in twenty looks decided.
"""


def commands(results):
    """What was run, where and for how long."""
    lines, places = [], {}
    for setting, found in results.items():
        for result in found:
            for run in filter(None, (result.mae, result.classifier)):
                starts, seconds = read_config(run)["starts"], sum(row["seconds"] for row in read_metrics(run))
                lines.append([setting, result.seed, f"{seconds / 60:.1f}", f"`{starts[-1]['command']}`"])
                places.update(dict.fromkeys(map(place, starts)))
    header = ["setting", "seed", "minutes of steps", "command"]
    return "\n".join(f"- {name}" for name in places) + "\n\n" + markdown_table(header, lines)


def place(start):
    """Where and by which version a run was started."""
    versions = f"Python {start['python']}, PyTorch {start['torch']}, timm {start['timm']}"
    commit = f"commit {start['commit']}{'' if start['clean'] else ' with changes'}" if start["commit"] else "no commit"
    threads = f"{start['threads']} thread{'s' if start['threads'] > 1 else ''} a run"
    return f"{start['processor']}, {threads}; {versions}; {commit}"


def how_many(arguments):
    """Training images, in words."""
    return f"{arguments['train_images']:,}" if arguments["train_images"] else "all"


def introduction(results):
    """What was run, how much of it, and what the numbers mean."""
    arguments = read_config(results[BASE][0].mae)["arguments"]
    finetune = read_config(results[BASE][0].classifier)["arguments"]
    folder = f" ({Path(arguments['data_dir']).name})" if arguments["dataset"] == "folder" else ""
    chosen = "the epoch chosen on held-out images" if accuracy_by_epoch(results) == "val/acc" else "the last epoch"
    return f"""\
{arguments["dataset"]}{folder}, {arguments["img_size"]} x {arguments["img_size"]}, patch {arguments["patch_size"]}, \
width {arguments["embed_dim"]}, encoder depth {arguments["encoder_depth"]}; {arguments["total_epoch"]} epochs of \
pretraining on {how_many(arguments)} images, {finetune["total_epoch"]} of training each classifier on \
{how_many(finetune)} labelled ones. Accuracy is correct / all test images at {chosen}, mean ± standard \
deviation over n seeds; differences are between runs of equal seeds, with 95 % intervals from Student's t.
"""


def write_report(results, lines, output, captions):
    """REPORT.md, with the figures under their captions; lines: what a reader must know before the numbers."""
    notes = "".join(f"\n- {line}\n" for line in lines)
    depth_pairs = itertools.combinations(reversed(DEPTHS.values()), 2)
    mask_pairs = [(one, other) for other, one in itertools.combinations(MASKS.values(), 2)]
    figures = "\n".join(
        f"### {name.replace('figure', 'Figure ').replace(' 0', ' ').replace('_', ' ')}\n\n![{caption}]({name}.png)\n\n"
        f"{caption}\n"
        for name, caption in captions.items()
    )
    (output / "REPORT.md").write_text(
        f"""# What decoder depth and masking do

{introduction(results)}{notes}
## Findings of the source report

{findings(results)}
## Pretraining

{accuracy_table(results, PRETRAINING)}
{difference_table(results, [(BASE, SCRATCH)])}
## Table 1: decoder depth

{accuracy_table(results, DEPTHS)}
{difference_table(results, depth_pairs)}
## Table 2: mask strategy

{accuracy_table(results, MASKS)}
{difference_table(results, mask_pairs)}
## What it costs

{cost_table(results)}
Parameters, GFLOP, images/s and memory are the pretraining's, from scratch the classifier's.

## Figures

{figures}
## Commands

{commands(results)}"""
    )
    print(output / "REPORT.md")


# --- what is kept ---


def kept_pictures(results, output):
    """{name: caption} of the pictures beside an earlier report of the same runs; nothing beside one of other runs."""
    for run, target in copies(results, output):
        config = target / "config.json"
        if not config.exists() or config.read_bytes() != (run / "config.json").read_bytes():
            return {}
    report = output / "REPORT.md"
    found = re.findall(r"^!\[(.*)\]\((\w+)\.png\)$", report.read_text(), re.MULTILINE) if report.exists() else []
    return {name: caption for caption, name in found if (output / f"{name}.png").exists()}


def copies(results, output):
    """(run directory, where the report keeps its numbers) of each run."""
    runs = [run for result in itertools.chain(*results.values()) for run in (result.mae, result.classifier) if run]
    return [(run, output / "runs" / run.parent.name / run.name) for run in dict.fromkeys(runs)]


def keep_numbers(results, source, output):
    """Copy the CSV and JSON behind the report beside it, in place of what an earlier report has kept there."""
    features = {result.mae: result.features for result in itertools.chain(*results.values())}
    files = {}
    for run, target in copies(results, output):
        files |= {target / name: run / name for name in ("config.json", "metrics.csv")}
        if measured := features.get(run):
            files |= {target / "features.json": measured, target / "features.csv": measured.with_suffix(".csv")}
    if source.resolve() != (output / "runs").resolve():
        clear(output / "runs", files.keys())
    for target, file in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.resolve() != target.resolve():
            shutil.copyfile(file, target)


def clear(directory, wanted):
    """Remove what an earlier report has kept of runs, but for the files wanted; runs that hold more are not ours."""
    for run in directory.glob("*/*"):
        if run.is_dir() and all(path.name in KEPT for path in run.iterdir()):
            for path in set(run.iterdir()) - wanted:
                path.unlink()
            if not any(run.iterdir()):
                run.rmdir()


def main(argv=None):
    args = parse_args(argv)
    with exit_in_one_line(), as_user_error(OSError):
        device = utils.pick_device(args.device)
        results, left_out = collect(args.runs)
        args.output.mkdir(parents=True, exist_ok=True)
        lines = [f"Left out: {directory}: {reason}." for directory, reason in left_out.items()]
        print(*lines, sep="\n", end="\n" if lines else "")
        kept = kept_pictures(results, args.output)
        write_report(results, lines, args.output, draw_all(results, args.output, args.bank, device, kept))
        keep_numbers(results, args.runs, args.output)


if __name__ == "__main__":
    main()
