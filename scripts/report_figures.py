"""The figures of the report: curves from kept numbers alone, pictures from finished models and the test images.

A figure is a function that returns (figure, caption), or None where it cannot be drawn, and a line in FIGURES or
PICTURES; its file has the name of the line.
"""

import functools
import itertools
from typing import NamedTuple

import pandas as pd
import torch

from engine import figures
from engine.checkpoints import load_model
from engine.device import generator
from engine.errors import UserError
from engine.figures import NAMES, plt
from images.load import load_dataset
from images.pixels import normalize, to_pixels
from model import MASK_STRATEGIES, MAE_ViT, PatchShuffle, ViT_Classifier
from scripts.results import MEASURES, by_block
from scripts.settings import SCRATCH

BASE = "depth 4, random"
PRETRAINING = {"with pretraining": BASE, "from scratch": SCRATCH}
DEPTHS = {f"depth {depth}": f"depth {depth}, random" for depth in (2, 4, 8)}
MASKS = {strategy: f"depth 4, {strategy}" for strategy in MASK_STRATEGIES}
SETTINGS = list(dict.fromkeys([SCRATCH, *DEPTHS.values(), *MASKS.values()]))
MOST_CLASSES = 20  # with more, a table of all pairs of classes cannot be read


class Runs(NamedTuple):
    """The runs of a report.

    Args:
        records: {directory: Record}; table: of the same, see scripts.results.
        entries: rows as compare has them, each with a setting of SETTINGS.
        watched: the accuracy that all classifiers have at every epoch.
    """

    records: dict
    table: pd.DataFrame
    entries: pd.DataFrame
    watched: str

    def of(self, setting, kind):
        """The Records of a setting's "mae" or "classifier", by seed, each once."""
        rows = self.entries[self.entries.setting == setting].sort_values("seed")
        return [self.records[run] for run in rows[kind].dropna().unique()]

    def seeds(self, *settings):
        return sorted(set(self.entries.seed[self.entries.setting.isin(settings)]))


# --- from numbers ---


def draw_metric(settings, kind, metric, caption, runs):
    """A column of metrics.csv by epoch; metric None: the accuracy watched."""
    name, metric = NAMES[metric or runs.watched], metric or runs.watched
    ylabel = f"{kind.replace('mae', 'MAE')} {name}" if metric.endswith("loss") else name
    found = {label: [record.metrics for record in runs.of(setting, kind)] for label, setting in settings.items()}
    return figures.draw_seeds(
        {label: tables for label, tables in found.items() if tables}, metric, ylabel
    ), caption.format(name)


def draw_probe(settings, what, runs):
    found = {label: [record.metrics for record in runs.of(setting, "mae")] for label, setting in settings.items()}
    probed = {label: [[row for row in t if row.get("probe/knn_acc", -1) >= 0] for t in found[label]] for label in found}
    found = {label: found[label] for label, tables in probed.items() if tables and min(map(len, tables)) > 1}
    caption = f"k-NN accuracy during pretraining by {what}; at most 1,000 test and 5,000 training images."
    return (figures.draw_seeds(found, "probe/knn_acc", NAMES["probe/knn_acc"]), caption) if found else None


def draw_by_block(settings, what, runs):
    """Each measure of the frozen features after each encoder block, where more than the last was measured."""
    curves = {name: [] for name, measure in MEASURES.items() if measure.kind == "features"}
    for label, setting in settings.items():
        stored = [features for record in runs.of(setting, "mae") for features in record.features]
        stored = [by_block(features) for features in stored if features["settings"]["train_images"] is None]
        stored = [blocks for blocks in stored if len(blocks) > 1]
        for name, some in curves.items():
            column = MEASURES[name].column
            values = [{block: row[column] for block, row in blocks.items()} for blocks in stored]
            some += [figures.curve(label, values)] if values else []
    caption = f"Linear probe and k-NN after each encoder block by {what}; all labels, mean of the patches."
    return (figures.draw_blocks(curves), caption) if all(curves.values()) else None


METRIC = functools.partial(functools.partial, draw_metric)
FIGURES = {
    "figure02": METRIC({"random, depth 4": BASE}, "mae", "train/loss", "MAE {}."),
    "figure04": METRIC(PRETRAINING, "classifier", "train/loss", "Classifier {}, with and without pretraining."),
    "figure05": METRIC(PRETRAINING, "classifier", None, "Classifier {}, with and without pretraining."),
    "figure07": METRIC(DEPTHS, "mae", "train/loss", "MAE {} by decoder depth."),
    "figure08": METRIC(DEPTHS, "classifier", None, "Classifier {} by decoder depth."),
    "figure09": METRIC(MASKS, "mae", "train/loss", "MAE {} by mask strategy: other tasks, so not a ranking."),
    "figure10": METRIC(MASKS, "classifier", None, "Classifier {} by mask strategy."),
    "knn_by_depth": functools.partial(draw_probe, DEPTHS, "decoder depth"),
    "knn_by_mask": functools.partial(draw_probe, MASKS, "mask strategy"),
    "blocks_by_depth": functools.partial(draw_by_block, DEPTHS, "decoder depth"),
    "blocks_by_mask": functools.partial(draw_by_block, MASKS, "mask strategy"),
}


# --- from models and images ---


class Shown(NamedTuple):
    """What pictures are drawn from: runs with weights; a test set; places of some of its images, in random order."""

    runs: Runs
    test: tuple
    chosen: torch.Tensor
    count: int
    device: torch.device

    @property
    def whose(self):
        return f"seed {self.runs.seeds(BASE)[0]}"

    def images(self, count):
        return normalize(self.test.images[self.chosen[:count]])

    def model(self, setting, kind, constructor):
        """A setting's model, of the first seed."""
        return load_model(self.runs.of(setting, kind)[0].directory, constructor)[0].to(self.device)


@torch.no_grad()
def answers(shown, setting):
    """What a setting's classifier says of each test image: confidence (N,) and class, (N,) int64."""
    model = shown.model(setting, "classifier", ViT_Classifier)
    parts = [model(normalize(part.to(shown.device))).softmax(1).cpu() for part in shown.test.images.split(500)]
    return torch.cat(parts).max(1)


def draw_reconstructions(settings, caption, shown):
    """What each MAE is shown and what it makes of it, and the originals below; one strategy, one mask."""
    images, rows = shown.images(8), {}
    for label, setting in settings.items():
        if setting in set(shown.runs.entries.setting):
            model = shown.model(setting, "mae", MAE_ViT).cpu()
            strategy = model.shuffle.mask_strategy
            masks = model.shuffle(len(images), generator("cpu", "report", strategy))
            rows[f"{strategy}\nmask"], rows[label] = model.reconstruct(images, masks)
    rows["original"] = images
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.15 * len(images) + 1.4, 1.2 * len(rows) + 0.4))
    figures.draw_rows(axes, {name: to_pixels(row) for name, row in rows.items()}, fontsize=9)
    borrowed = " Hidden patches are shown with their true mean and variance." if model.norm_pix_loss else ""
    return figure, f"{caption}, {shown.whose}.{borrowed}"


@torch.no_grad()
def error_under(model, strategy, images, device):
    """A MAE's mean loss on images under the masks of a strategy, the same for all MAEs."""
    shuffle = PatchShuffle(model.shuffle.grid_size, model.shuffle.mask_ratio, strategy)
    masks = shuffle(len(images), generator("cpu", "bank", strategy)).to(device)
    parts = zip(images.to(device).split(100), masks.split(100), strict=True)
    return sum(model.loss(x, ids).item() * len(x) for x, ids in parts) / len(images)


def draw_masks_crossed(shown):
    """Error of every strategy's MAEs under every strategy, mean over seeds."""
    runs, images, rows = shown.runs, shown.images(shown.count), {}
    for strategy, setting in MASKS.items():
        models = [load_model(record.directory, MAE_ViT)[0].to(shown.device) for record in runs.of(setting, "mae")]
        errors = [[error_under(model, other, images, shown.device) for other in MASK_STRATEGIES] for model in models]
        rows |= {strategy: torch.tensor(errors).mean(0)} if errors else {}
    figure = figures.draw_matrix(
        torch.stack([*rows.values()]), list(rows), list(MASK_STRATEGIES), "tested under", "trained under"
    )
    norm = models[-1].norm_pix_loss if models else False
    of_pixels = "hidden pixels, normalised by each patch's mean and variance," if norm else "hidden pixels"
    seeds = ", ".join(map(str, runs.seeds(*MASKS.values())))
    return figure, (
        f"Mean squared error of {of_pixels} on {len(images)} test images, the same masks for all: trained under one "
        f"strategy, tested under another, mean over seeds: {seeds}."
    )


def draw_answers(shown):
    confidence, predicted = answers(shown, BASE)
    places, test = shown.chosen[:32], shown.test
    figure = figures.draw_predictions(
        test.images[places], test.classes, test.labels[places], predicted[places], confidence[places]
    )
    return figure, f"Predictions on random test images, {shown.whose}."


def draw_confusion(shown):
    """How often each class is taken for which."""
    labels, classes, predicted = shown.test.labels, shown.test.classes, answers(shown, BASE)[1]
    if (count := len(classes)) > MOST_CLASSES:
        return None
    confusion = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
    share = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)  # % of each class
    names = [f"{name} ({share[i, i]:.0f} %)" for i, name in enumerate(classes)]
    caption = f"Predictions in % of each class (per-class accuracy at the left), pretrained, {shown.whose}."
    return figures.draw_matrix(share, names, classes, "prediction", "class", "{:.0f}"), caption


def draw_disagreements(shown, columns=8):
    """Some test images that only the pretrained classifier gets right, and some that only the one from scratch does."""
    if SCRATCH not in set(shown.runs.entries.setting):
        return None
    test, one, other = shown.test, answers(shown, BASE)[1], answers(shown, SCRATCH)[1]
    right, other_right = one == test.labels, other == test.labels
    groups = {"only pretrained right": right & ~other_right, "only from scratch right": other_right & ~right}
    figure, axes = plt.subplots(2, columns, figsize=(1.5 * columns, 4.6), squeeze=False)
    for places, (title, is_chosen) in zip(axes, groups.items(), strict=True):
        places[0].set_ylabel(f"{title}:\n{int(is_chosen.sum()):,} of {len(is_chosen):,}", fontsize=9)
        for place in places:
            place.set(xticks=[], yticks=[], frame_on=False)
        order = torch.randperm(len(is_chosen), generator=generator("cpu", "report"))
        for place, i in zip(places, order[is_chosen[order]].tolist(), strict=False):
            place.set_frame_on(True)
            figures.show(place, test.images[i])
            wrong = other[i] if right[i] else one[i]
            place.set_title(test.classes[test.labels[i]], fontsize=9)
            place.set_xlabel(f"other said\n{test.classes[wrong]}", fontsize=9)
    return figure, f"Images that only one of the two classifiers gets right, {shown.whose}."


RECONSTRUCTIONS = functools.partial(functools.partial, draw_reconstructions)
PICTURES = {
    "figure03": RECONSTRUCTIONS({"reconstruction": BASE}, "Masked input, reconstruction, original"),
    "figure06": draw_answers,
    "figure11": RECONSTRUCTIONS(MASKS, "Reconstructions of the same images by the MAE of each mask strategy"),
    "confusion": draw_confusion,
    "disagreements": draw_disagreements,
    "masks_crossed": draw_masks_crossed,
    "reconstructions_by_depth": RECONSTRUCTIONS(
        DEPTHS, "Reconstructions of the same images under the same masks by decoder depth"
    ),
}


# --- all ---


def what_to_show(runs, count, device):
    """Shown, of the seeds of which all runs have their weights, as kept runs have none; else None, and the reason."""
    entries = runs.entries
    used = entries[["seed", "classifier", "mae"]].melt("seed").dropna()
    without = used[[not (runs.records[run].directory / "model.pt").exists() for run in used.value]]
    left = entries[~entries.seed.isin(without.seed)]
    if set(left.setting) != set(entries.setting):
        return None, f"{without.value.iloc[0]} has no model.pt"
    record = runs.of(BASE, "classifier")[0]
    where = record.starts[-1]["arguments"]
    try:
        _, test = load_dataset(where["dataset"], where["data_dir"], record.settings["img_size"])
    except UserError as error:
        return None, str(error)
    chosen = torch.randperm(len(test.images), generator=generator("cpu", "report"))
    return Shown(runs._replace(entries=left), test, chosen, count, device), None


def draw_all(runs, output, count, device, kept):
    """All figures; their captions by file name, in order.

    Args:
        count: of test images for masks_crossed.
        kept: {file name: caption} of the pictures of an earlier report of these runs; they stay where they cannot be
            drawn.
    """
    shown, reason = what_to_show(runs, count, device)
    drawn = itertools.chain(
        ((name, draw(runs)) for name, draw in FIGURES.items()),
        ((name, draw(shown)) for name, draw in (PICTURES if shown else {}).items()),
    )
    captions = {}
    for name, (figure, caption) in ((name, found) for name, found in drawn if found):
        figures.save(figure, output / f"{name}.png")
        captions[name] = caption
    if not shown:
        kept = {name: caption for name, caption in kept.items() if name in PICTURES}
        missing = ", ".join(name for name in PICTURES if name not in kept)
        print(f"Not drawn: {reason}. Kept: {', '.join(kept) or 'none'}. Not in the report: {missing or 'none'}")
        captions |= kept
    return dict(sorted(captions.items(), key=lambda item: (not item[0].startswith("figure"), item[0])))
