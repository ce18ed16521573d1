"""Tables, figures and findings of the ablations, from their run directories and the test images: no training.

python -m scripts.make_report --runs logs/ablation --output logs/report

What is compared are means over seeds; two settings are told apart by the differences of runs with equal seeds.
"""

import itertools
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.ticker import MaxNLocator, PercentFormatter

import data
import utils
from checkpoints import load_model
from errors import UserError, as_user_error, exit_in_one_line
from figures import STYLES, plt, save, show
from model import MASK_STRATEGIES, MAE_ViT, PatchShuffle, ViT_Classifier, mae_loss
from runs import FREE_ARGUMENTS, read_config, read_metrics

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond, the last one, which is a little wide
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
BASE, SCRATCH = "depth 4, random", "from scratch"
COUNTS = ("", "_mean_of_batches")  # endings of test/acc
DEPTHS = {f"depth {depth}": f"depth {depth}, random" for depth in (2, 4, 8)}
MASKS = {strategy: f"depth 4, {strategy}" for strategy in MASK_STRATEGIES}
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


# --- runs ---


class Result(NamedTuple):
    """One seed of a setting: a classifier and the MAE its encoder comes from, None from scratch."""

    seed: int
    classifier: Path
    mae: Path | None


def collect(runs):
    """Finished runs by setting, such as "depth 4, random": {setting: [Result, ...]}, by seed.

    Raises:
        UserError: there are none, or they differ in more than depth, strategy and seed.
    """
    results, common = {}, {}
    for directory in sorted(runs.glob("classifier/*/")):
        if not (directory / "model.pt").exists():
            print(f"Not finished, left out: {directory}")
            continue
        config = read_config(directory)
        encoder = config["name"].partition("_from_mae_")[2]
        mae = runs / "pretrain" / f"mae_{encoder}" if encoder else None
        if mae and not (mae / "model.pt").exists():
            print(f"Left out: {directory}, as {mae} is not there or not finished")
            continue
        check_alike(common.setdefault("classifier", config), config, directory)
        setting = SCRATCH
        if mae:
            pretraining = read_config(mae)
            check_alike(common.setdefault("pretrain", pretraining), pretraining, mae)
            setting = "depth {decoder_depth}, {mask_strategy}".format(**pretraining["arguments"])
        results.setdefault(setting, []).append(Result(config["arguments"]["seed"], directory, mae))
    if BASE not in results:
        raise UserError(f"{runs} holds no finished classifier of {BASE}; run scripts/reproduce_report.sh first.")
    return {setting: sorted(found) for setting, found in results.items()}


def check_alike(first, config, directory):
    """Refuse a run that differs from the first of its kind in more than what a sweep varies."""
    varied = {"seed", "decoder_depth", "mask_strategy", "encoder_digest", *FREE_ARGUMENTS}
    facts = ("precision", "images")
    one, other = ({**run["arguments"], **{name: run[name] for name in facts}} for run in (first, config))
    for name in sorted(one.keys() & other.keys() - varied | set(facts)):
        if one[name] != other[name]:
            raise UserError(
                f"{directory} has {name} {other[name]}, others have {one[name]}. Report one sweep at a time: "
                f"give each its own LOGS, or move runs away."
            )


def accuracy(result):
    """In %, of the test images: at the last epoch, or at the one chosen on held-out images (--val_images)."""
    return 100 * read_metrics(result.classifier)[-1]["test/acc"]


def watched(result):
    """The accuracy that a classifier has of every epoch."""
    return "val/acc" if "val/acc" in read_metrics(result.classifier)[0] else "test/acc"


# --- statistics ---


def spread(values):
    """ "81.03 ± 0.21 (n 3)", mean and standard deviation; one value without."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} (n {len(values)})"


class Difference(NamedTuple):
    """Mean difference over equal seeds and its 95 % interval, infinite with one seed."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self):
        if self.n == 1:
            return "one seed"
        if self.low == self.high:  # equal differences, by chance
            return "not decided"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not decided"

    @property
    def interval(self):
        return f"{self.low:+.2f} to {self.high:+.2f}" if self.n > 1 else "no interval"


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


def compare(results, one, other, value=accuracy):
    """The paired difference of two settings in value(result); None where one is missing."""
    if one not in results or other not in results:
        return None
    return paired_difference(*({result.seed: value(result) for result in results[name]} for name in (one, other)))


def judge(claims):
    """What the data say of {claim: the difference that it expects above 0, None without runs}: a sentence's end.

    Several claims hold together if each holds, and do not if one is reversed.
    """
    words = {"better": "holds", "worse": "reversed"}
    verdicts = [words.get(d.verdict, d.verdict) if d else "no runs" for d in claims.values()]
    numbers = [f" ({d.mean:+.2f}, {d.interval}, n {d.n})" if d else "" for d in claims.values()]
    if len(claims) == 1:
        return f"**{verdicts[0]}**{numbers[0]}"
    whole = "does not hold" if "reversed" in verdicts else "holds" if set(verdicts) == {"holds"} else "not decided"
    return f"**{whole}**: " + "; ".join(map("{} {}{}".format, claims, verdicts, numbers))


# --- figures ---


def draw_curves(groups, metric, ylabel, path):
    """A line for each {label: tables of one seed each}, with the range of the seeds as a band."""
    figure, place = plt.subplots(figsize=(8.5, 4.2))
    for (label, tables), (colour, line) in zip(groups.items(), itertools.cycle(STYLES), strict=False):
        epochs = [row["epoch"] for row in tables[0]]
        values = torch.tensor([[row[metric] for row in table] for table in tables], dtype=torch.float64).numpy()
        name = f"{label} (n {len(tables)})"
        place.plot(epochs, values.mean(0), linestyle=line, color=colour, label=name, linewidth=1.8)
        if len(tables) > 1:
            place.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    if metric.endswith("/acc"):
        place.yaxis.set_major_formatter(PercentFormatter(1))
        place.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    place.set(xlabel="epoch", ylabel=ylabel)
    place.xaxis.set_major_locator(MaxNLocator(integer=True))
    place.grid(alpha=0.3)
    title = "mean, band: range of the seeds" if any(len(tables) > 1 for tables in groups.values()) else None
    place.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # beside the lines
    save(figure, path)


def draw_reconstructions_of(models, images, path):
    """What each MAE, by name, is shown and what it makes of it, and the originals below; one strategy, one mask."""
    rows, shown = [], None
    for name, model in models.items():
        strategy = model.shuffle.mask_strategy
        masks = model.shuffle(len(images), utils.generator("cpu", "report", strategy))
        masked, reconstructed = model.reconstruct(images, masks)
        if strategy != shown:
            rows.append((f"{strategy}\nmask", masked))
        rows.append((name, reconstructed))
        shown = strategy
    rows.append(("original", images))
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.15 * len(images) + 1.4, 1.2 * len(rows) + 0.4))
    for places, (name, pictures) in zip(axes, rows, strict=True):
        places[0].set_ylabel(name, fontsize=9)
        for place, picture in zip(places, data.to_pixels(pictures), strict=True):
            show(place, picture)
    save(figure, path)


def draw_table_of_colours(values, rows, columns, xlabel, ylabel, path, form="{:.3f}"):
    """A matrix as coloured cells with their numbers."""
    figure, place = plt.subplots(figsize=(1.0 * len(columns) + 2.6, 0.75 * len(rows) + 1.6))
    place.imshow(values.numpy(), cmap="viridis")
    place.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    place.set_yticks(range(len(rows)), rows)
    place.set(xlabel=xlabel, ylabel=ylabel)
    middle = (values.min() + values.max()) / 2
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        colour = "white" if values[i, j] < middle else "black"
        place.text(j, i, form.format(values[i, j].item()), ha="center", va="center", fontsize=8, color=colour)
    save(figure, path)


def draw_disagreements(test, one, other, path, columns=8):
    """Some test images that only the pretrained classifier gets right, and some that only the other does."""
    right, other_right = one == test.labels, other == test.labels
    groups = {"only pretrained right": right & ~other_right, "only from scratch right": other_right & ~right}
    figure, axes = plt.subplots(2, columns, figsize=(1.5 * columns, 4.6), squeeze=False)
    for places, (title, chosen) in zip(axes, groups.items(), strict=True):
        places[0].set_ylabel(f"{title}:\n{int(chosen.sum()):,} of {len(chosen):,}", fontsize=9)
        for place in places:
            place.set_xticks([])
            place.set_yticks([])
            place.set_frame_on(False)
        order = torch.randperm(len(chosen), generator=utils.generator("cpu", "report"))
        for place, i in zip(places, order[chosen[order]].tolist(), strict=False):
            place.set_frame_on(True)
            show(place, test.images[i])
            wrong = other[i] if right[i] else one[i]
            place.set_title(test.classes[test.labels[i]], fontsize=9)
            place.set_xlabel(f"not {test.classes[wrong]}", fontsize=9)
    save(figure, path)


# --- what the models do ---


@torch.no_grad()
def predictions(directory, test, device):
    """The class that a classifier gives each test image, (N,) int64."""
    model, _ = load_model(directory, ViT_Classifier)
    model = model.to(device)
    parts = [model(data.normalize(part.to(device))).argmax(1).cpu() for part in test.images.split(500)]
    return torch.cat(parts)


@torch.no_grad()
def mask_matrix(results, trained, tested, images, device):
    """Error of hidden pixels, (trained under, tested under), mean over seeds, on the same images and masks."""
    table = torch.zeros(len(trained), len(tested))
    for i, strategy in enumerate(trained):
        for result in results[MASKS[strategy]]:
            model, _ = load_model(result.mae, MAE_ViT)
            model = model.to(device)
            for j, other in enumerate(tested):
                shuffle = PatchShuffle(model.shuffle.grid_size, model.shuffle.mask_ratio, other)
                masks = shuffle(len(images), utils.generator("cpu", "bank", other)).to(device)
                for x, ids in zip(images.to(device).split(100), masks.split(100), strict=True):
                    pred, mask = model(x, ids)
                    table[i, j] += mae_loss(pred, x, mask).item() * len(x)
    return table / len(images) / torch.tensor([[len(results[MASKS[strategy]])] for strategy in trained])


def gflop_per_image(arguments, kind):
    """Of a training step of a MAE or a classifier, forward and backward."""
    constructor = MAE_ViT if kind == "mae" else ViT_Classifier
    model = constructor(**{name: arguments[name] for name in utils.defaults(constructor) if name in arguments})
    images = torch.zeros(1, 3, arguments["img_size"], arguments["img_size"])

    def step():
        output = model(images)
        (output[0] if kind == "mae" else output).sum().backward()

    return utils.count_gflop(step)


# --- the report ---


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def accuracy_table(results, settings):
    """A row a setting: test accuracy in both counts, at the best epoch, and what the source report has."""
    chosen = watched(results[BASE][0]) == "val/acc"
    rows = []
    for label, setting in settings.items():
        if setting in results:
            tables = [read_metrics(result.classifier) for result in results[setting]]
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
        d = compare(results, one, other)
        if d:
            says = f"the first is {d.verdict}" if d.verdict in ("better", "worse") else "not decided"
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
                    f"{gflop_per_image(config['arguments'], kind):.3f}",
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

    watch = watched(results[BASE][0])
    ahead = compare(results, BASE, SCRATCH, lambda result: 100 * early(result, watch))
    loss = compare(results, SCRATCH, BASE, lambda result: early(result, "train/loss"))

    def gain(one, other):
        return {f"{one} > {other}": compare(results, MASKS[one], MASKS[other])}

    depth = {
        f"{one} > {other}": compare(results, DEPTHS[f"depth {one}"], DEPTHS[f"depth {other}"])
        for one, other in ((8, 4), (4, 2))
    }
    return f"""\
1. Pretraining gives a higher final accuracy: {judge({"": compare(results, BASE, SCRATCH)})}. It is ahead over the \
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


def tables_of(found, kind):
    return [read_metrics(getattr(result, kind)) for result in found]


def tables_by_label(results, settings, kind):
    return {label: tables_of(results[name], kind) for label, name in settings.items() if name in results}


def draw_all(results, output, bank, device):
    """All figures; their captions by file name, in order."""
    base = results[BASE][0]
    config = read_config(base.classifier)["arguments"]
    _, test = data.load_dataset(config["dataset"], config["data_dir"], config["img_size"])
    chosen = torch.randperm(len(test.images), generator=utils.generator("cpu", "report"))
    images = data.normalize(test.images[chosen[:bank]])
    captions = draw_all_curves(results, output) | draw_all_reconstructions(results, images, output, device)
    visualize(base.classifier, output / "figure06.png")
    captions["figure06"] = "Predictions on random test images."
    captions |= draw_answers(results, test, output, device)
    return dict(sorted(captions.items(), key=lambda item: (not item[0].startswith("figure"), item[0])))


def visualize(run, path):
    """What visualize_predictions.py draws of a run."""
    script = Path(__file__).parents[1] / "visualize_predictions.py"
    if code := subprocess.call([sys.executable, script, "--model_path", run, "--output", path]):
        sys.exit(f"{script.name} could not draw {run} (exit code {code}).")


def draw_all_curves(results, output):
    ways, acc = {"with pretraining": BASE, "from scratch": SCRATCH}, watched(results[BASE][0])
    whose = "accuracy on held-out images" if acc == "val/acc" else "test accuracy"
    curves = {
        "figure02": ({"random, depth 4": BASE}, "mae", "train/loss", "MAE training loss."),
        "figure04": (ways, "classifier", "train/loss", "Classifier training loss, with and without pretraining."),
        "figure05": (ways, "classifier", acc, f"Classifier {whose}, with and without pretraining."),
        "figure07": (DEPTHS, "mae", "train/loss", "MAE training loss by decoder depth."),
        "figure08": (DEPTHS, "classifier", acc, f"Classifier {whose} by decoder depth."),
        "figure09": (MASKS, "mae", "train/loss", "MAE training loss by mask strategy: other tasks, so not a ranking."),
        "figure10": (MASKS, "classifier", acc, f"Classifier {whose} by mask strategy."),
    }
    for name, (settings, kind, metric, _) in curves.items():
        ylabel = whose if metric == acc else f"{'MAE' if kind == 'mae' else kind} training loss"
        draw_curves(tables_by_label(results, settings, kind), metric, ylabel, output / f"{name}.png")
    return {name: caption for name, (*_, caption) in curves.items()}


def draw_all_reconstructions(results, images, output, device):
    """Of the first seeds, on the same images and masks, and the error of every strategy under every other."""
    visualize(results[BASE][0].mae, output / "figure03.png")
    trained = [strategy for strategy, setting in MASKS.items() if setting in results]
    for name, settings in {"figure11": MASKS, "reconstructions_by_depth": DEPTHS}.items():
        found = {label: results[setting][0].mae for label, setting in settings.items() if setting in results}
        models = {label: load_model(mae, MAE_ViT)[0] for label, mae in found.items()}
        draw_reconstructions_of(models, images[:8], output / f"{name}.png")
    matrix = mask_matrix(results, trained, list(MASK_STRATEGIES), images, device)
    draw_table_of_colours(
        matrix, trained, list(MASK_STRATEGIES), "tested under", "trained under", output / "masks_crossed.png"
    )
    return {
        "figure03": "Masked input, reconstruction, original.",
        "figure11": "Reconstructions of the same images by the MAE of each mask strategy, first seed.",
        "reconstructions_by_depth": "Reconstructions of the same images under the same masks by decoder depth, first "
        "seed.",
        "masks_crossed": f"Mean squared error of hidden pixels on {len(images)} test images, the same masks for all: "
        "trained under one strategy, tested under another, mean over seeds.",
    }


def draw_answers(results, test, output, device):
    """Which classes the first seed's classifier takes for which, and where it and the one from scratch disagree."""
    answers = predictions(results[BASE][0].classifier, test, device)
    captions = {"confusion": "Predictions in % of each class (per-class accuracy at the left), pretrained, first seed."}
    count = len(test.classes)
    confusion = torch.bincount(test.labels * count + answers, minlength=count**2).view(count, count)
    share = 100 * confusion / confusion.sum(1, keepdim=True)
    names = [f"{name} ({share[i, i]:.0f} %)" for i, name in enumerate(test.classes)]
    draw_table_of_colours(share, names, test.classes, "prediction", "class", output / "confusion.png", "{:.0f}")
    if SCRATCH in results:
        other = predictions(results[SCRATCH][0].classifier, test, device)
        draw_disagreements(test, answers, other, output / "disagreements.png")
        captions["disagreements"] = "Images that only one of the two classifiers gets right, first seed."
    return captions


def how_many(arguments):
    return f"{arguments['train_images']:,}" if arguments["train_images"] else "all"


def write_report(results, output, captions):
    settings = {"with pretraining": BASE, "from scratch": SCRATCH}
    depth_pairs = itertools.combinations(reversed(DEPTHS.values()), 2)
    mask_pairs = [(one, other) for other, one in itertools.combinations(MASKS.values(), 2)]
    arguments = read_config(results[BASE][0].mae)["arguments"]
    finetune = read_config(results[BASE][0].classifier)["arguments"]
    folder = f" ({Path(arguments['data_dir']).name})" if arguments["dataset"] == "folder" else ""
    chosen = "the epoch chosen on held-out images" if watched(results[BASE][0]) == "val/acc" else "the last epoch"
    figures = "\n".join(
        f"### {name.replace('figure', 'Figure ').replace(' 0', ' ').replace('_', ' ')}\n\n![{caption}]({name}.png)\n\n"
        f"{caption}\n"
        for name, caption in captions.items()
    )
    (output / "REPORT.md").write_text(
        f"""# What decoder depth and masking do

{arguments["dataset"]}{folder}, {arguments["img_size"]} x {arguments["img_size"]}, patch {arguments["patch_size"]}, \
width {arguments["embed_dim"]}, encoder depth {arguments["encoder_depth"]}; {arguments["total_epoch"]} epochs of \
pretraining on {how_many(arguments)} images, {finetune["total_epoch"]} of training each classifier on \
{how_many(finetune)} labelled ones. Accuracy is correct / all test images at {chosen}, mean ± standard \
deviation over n seeds; differences are between runs of equal seeds, with 95 % intervals from Student's t.

## Findings of the source report

{findings(results)}
## Pretraining

{accuracy_table(results, settings)}
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


def keep_numbers(results, output):
    """Copy the CSV and config behind the report beside it."""
    for result in itertools.chain(*results.values()):
        for run in filter(None, (result.mae, result.classifier)):
            target = output / "runs" / run.parent.name / run.name
            target.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "metrics.csv"):
                shutil.copyfile(run / name, target / name)


def main(argv=None):
    args = parse_args(argv)
    with exit_in_one_line(), as_user_error(OSError):
        device = utils.pick_device(args.device)
        results = collect(args.runs)
        args.output.mkdir(parents=True, exist_ok=True)
        write_report(results, args.output, draw_all(results, args.output, args.bank, device))
        keep_numbers(results, args.output)


if __name__ == "__main__":
    main()
