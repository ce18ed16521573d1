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
from engine.device import pick_device
from engine.errors import as_user_error, exit_in_one_line
from engine.run import read_config, read_metrics
from scripts.ablations import BASE, DEPTHS, MASKS, PRETRAINING, SCRATCH, SETTINGS, accuracy_by_epoch, collect
from scripts.cost import gflop_per_image, num_classes
from scripts.report_figures import draw_all
from scripts.report_findings import findings
from scripts.results import (
    MEASURES,
    accuracy,
    difference,
    markdown_table,
    minutes,
    name_of_data,
    paired_difference,
    read_features,
    spread,
    tables_of,
    values_of,
)

KEPT = ("config.json", "metrics.csv", "features.csv", "features.json")  # of a run, beside the report
# The course report's accuracies in %, one seed each: means of batch means
SOURCE = {
    "depth 2, random": 79.61,
    "depth 4, random": 79.76,
    "depth 8, random": 81.03,
    "depth 4, block": 82.80,
    "depth 4, grid": 80.24,
}


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs", type=Path, default=Path("logs/ablation"), help="directory with pretrain/ and classifier/"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("logs/report"), help="where to write REPORT.md, figures and numbers"
    )
    parser.add_argument("--images", type=utils.positive_int, default=500, help="test images for masks_crossed.png")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args(argv)


# --- tables ---


def accuracy_table(results, settings):
    """A row a setting: each measure; fine-tuned also as the course report counts, at the best epoch, and there."""
    found = {label: results[setting] for label, setting in settings.items() if setting in results}
    columns = {
        f"{name}, %": [spread([*values_of(seeds, measure).values()]) for seeds in found.values()]
        for name, measure in MEASURES.items()
    }
    tables = [tables_of(seeds, "classifier") for seeds in found.values()]
    columns["fine-tuned, mean of batch means, %"] = [
        spread([100 * table[-1]["test/acc_mean_of_batches"] for table in seeds]) for seeds in tables
    ]
    if accuracy_by_epoch(results) != "val/acc":
        columns["best epoch, chosen on the test set, %"] = [
            spread([100 * max(epoch["test/acc"] for epoch in table) for table in seeds]) for seeds in tables
        ]
    dataset = dataset_of(results)
    if dataset.startswith("cifar10") and not dataset.startswith("cifar100"):
        sources = [SOURCE.get(settings[label]) for label in found]
        columns["course report (n 1, mean of batch means), %"] = [
            f"{number:.2f}" if number else "" for number in sources
        ]
    return markdown_table(["", *columns], zip(found, *columns.values(), strict=True))


def difference_table(results, pairs):
    """A row a pair: in each measure the paired difference with its interval, and what follows; no table without any."""
    says = {"higher": "better", "lower": "worse"}

    def cell(pair, measure):
        d = difference(results, *pair, measure)
        return f"{d.text()}: {says.get(d.verdict, d.verdict)}" if d else ""

    rows = [
        [f"{one} minus {other}", *(cell((one, other), measure) for measure in MEASURES.values())]
        for one, other in pairs
    ]
    rows = [row for row in rows if any(row[1:])]
    header = ["difference in points (95 % interval): the first is", *MEASURES]
    return markdown_table(header, rows) if rows else ""


def cost_table(results):
    """A row a setting: its accuracy and what that cost; of the classifier alone from scratch."""
    rows = []
    for setting in SETTINGS:
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
                    f"{minutes(found, 'mae'):.1f}" if kind == "mae" else "0",
                    f"{minutes(found, 'classifier'):.1f}",
                    f"{max(memory):,.0f}",
                ]
            )
    header = ["", "fine-tuned, %", "parameters", "GFLOP per image", "images/s"]
    header += ["minutes of pretraining steps", "of fine-tuning steps", "peak memory, MB"]
    return markdown_table(header, rows)


def commands(results):
    """What was run, where and for how long."""
    lines, machines = [], {}
    for setting, found in results.items():
        for result in found:
            for run in filter(None, (result.mae, result.classifier)):
                starts, seconds = read_config(run)["starts"], sum(row["seconds"] for row in read_metrics(run))
                lines.append([setting, result.seed, f"{seconds / 60:.1f}", f"`{starts[-1]['command']}`"])
                machines.update(dict.fromkeys(map(machine, starts)))
            if result.features:
                stored = read_features(result.features)
                lines.append([setting, result.seed, f"{stored['seconds'] / 60:.1f}", f"`{stored['command']}`"])
                machines[machine(stored)] = None
    header = ["setting", "seed", "minutes (training: of steps)", "command"]
    return "\n".join(f"- {name}" for name in machines) + "\n\n" + markdown_table(header, lines)


def machine(start):
    """Where and by which version a run was started."""
    versions = f"Python {start['python']}, PyTorch {start['torch']}, timm {start['timm']}"
    commit = f"commit {start['commit']}{'' if start['clean'] else ' with changes'}" if start["commit"] else "no commit"
    threads = f"{start['threads']} thread{'s' if start['threads'] > 1 else ''} a run"
    return f"{start['processor']}, {threads}; {versions}; {commit}"


def how_many(arguments):
    """Training images, in words."""
    return f"{arguments['train_images']:,}" if arguments["train_images"] else "all"


def dataset_of(results):
    """The name of the data set; a folder goes by its own."""
    arguments = read_config(results[BASE][0].mae)["arguments"]
    return name_of_data(arguments)


def introduction(results):
    """What was run, how much of it, and what the numbers mean."""
    arguments = read_config(results[BASE][0].mae)["arguments"]
    finetune = read_config(results[BASE][0].classifier)["arguments"]
    folder = f" ({dataset_of(results)})" if arguments["dataset"] == "folder" else ""
    chosen = "the epoch chosen on held-out images" if accuracy_by_epoch(results) == "val/acc" else "the last epoch"
    return f"""\
{arguments["dataset"]}{folder}, {arguments["img_size"]} x {arguments["img_size"]}, patch {arguments["patch_size"]}, \
width {arguments["embed_dim"]}, encoder depth {arguments["encoder_depth"]}; {arguments["total_epoch"]} epochs of \
pretraining on {how_many(arguments)} images, {finetune["total_epoch"]} of training each classifier on \
{how_many(finetune)} labelled ones. Fine-tuned accuracy is correct / all test images at {chosen}. Linear probe and \
k-NN measure the frozen encoder, as `evaluate_features.py` does: the mean of the patches' tokens after the last \
block, all labels. Numbers are the mean ± standard deviation over n seeds; differences are between runs of equal \
seeds, with 95 % intervals from Student's t.
"""


def warnings(results, left_out):
    """What a reader must know before the numbers: each a line, also on the terminal."""
    lines = [chance_warning(results), missing_features(itertools.chain(*results.values()))]
    lines += [f"Left out: {directory}: {reason}." for directory, reason in left_out.items()]
    return [line for line in lines if line]


def chance_warning(results):
    """A sentence where the base setting's fine-tuned accuracy is not surely above guessing."""
    count = num_classes(read_config(results[BASE][0].classifier))
    accuracies = values_of(results[BASE], MEASURES["fine-tuned"])
    above = paired_difference(accuracies, dict.fromkeys(accuracies, 100 / count))
    if (above.low if above.n > 1 else above.mean) > 0:
        return None
    return (
        f"Fine-tuned accuracy of {BASE} is not surely above chance (1 of {count} classes): {above.mean:+.2f} points, "
        f"95 % interval {above.interval()}, n {above.n}. Differences between settings say little here."
    )


def missing_features(results):
    """A sentence with the command that measures what the report lacks; the MAEs are where their weights are."""
    features = {result.mae: result.features for result in results if result.mae}
    missing = [mae for mae, measured in features.items() if measured is None]
    if not missing:
        return None
    places = [str(mae if (mae / "model.pt").exists() else place_of(mae)) for mae in missing]
    if len(missing) == len(features):
        places = sorted({str(Path(place).parent / "*") for place in places})
    command = f"python evaluate_features.py --layers all --model_path {' '.join(places)}"
    return f"No linear probe and k-NN of {len(missing)} of {len(features)} MAEs. This measures them: `{command}`"


def place_of(run):
    """Where a run was trained, by its config.json."""
    return Path(read_config(run)["arguments"]["log_dir"]) / run.name


def write_report(results, left_out, output, captions):
    """REPORT.md, with the figures under their captions."""
    depth_pairs = itertools.combinations(reversed(DEPTHS.values()), 2)
    mask_pairs = [(one, other) for other, one in itertools.combinations(MASKS.values(), 2)]
    lines = warnings(results, left_out)
    notes = "".join(f"\n- {line}\n" for line in lines)
    figures = "\n".join(
        f"### {name.replace('figure', 'Figure ').replace(' 0', ' ').replace('_', ' ')}\n\n![{caption}]({name}.png)\n\n"
        f"{caption}\n"
        for name, caption in captions.items()
    )
    (output / "REPORT.md").write_text(
        f"""# What decoder depth and masking do

{introduction(results)}{notes}
## Findings of the course report

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
Parameters, GFLOP, images/s and memory: of pretraining; in the row from scratch, of the classifier. Minutes and
images/s depend on the machines and their other work; GFLOP do not.

## Figures

{figures}
## Commands

{commands(results)}"""
    )
    print(*lines, output / "REPORT.md", sep="\n")


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
        device = pick_device(args.device)
        results, left_out = collect(args.runs)
        args.output.mkdir(parents=True, exist_ok=True)
        captions = draw_all(results, args.output, args.images, device, kept_pictures(results, args.output))
        write_report(results, left_out, args.output, captions)
        keep_numbers(results, args.runs, args.output)


if __name__ == "__main__":
    main()
