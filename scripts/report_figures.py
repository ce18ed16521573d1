"""The figures of the report: curves from kept numbers alone, pictures from finished models and the test images.

A figure is a function that returns (figure, caption), or None where it cannot be drawn, and a line in FIGURES or
PICTURES; its file has the name of the line.
"""

from typing import NamedTuple

import pandas as pd
import torch

from engine import figures
from engine.checkpoints import load_model
from engine.device import generator
from engine.errors import UserError
from engine.figures import NAMES, plt
from engine.predictions import read_predictions
from images.load import load_dataset
from images.pixels import normalize, to_pixels
from masks import MASK_STRATEGIES
from model import MAE_ViT, ViT_Classifier
from scripts.results import MEASURES, by_block
from scripts.settings import SCRATCH

BASE = "depth 4, random"
PRETRAINING = {"with pretraining": BASE, "from scratch": SCRATCH}
DEPTHS = {f"depth {depth}": f"depth {depth}, random" for depth in (2, 4, 8)}
MASKS = {strategy: f"depth 4, {strategy}" for strategy in MASK_STRATEGIES}
CELLS = {label: f"{label}, cells" for label in DEPTHS}
SETTINGS = list(dict.fromkeys([SCRATCH, *DEPTHS.values(), *MASKS.values(), *CELLS.values()]))
MOST_CLASSES = 20  # with more, a table of all pairs of classes cannot be read


class Runs(NamedTuple):
    """The runs of a report, and what pictures are drawn from.

    Args:
        records: {directory: Record}; table: of the same, see scripts.results.
        entries: rows as compare has them, each with a setting of SETTINGS.
        watched: the accuracy that all classifiers have at every epoch.
        test: the test set; chosen: the places of its images in random order.
    """

    records: dict
    table: pd.DataFrame
    entries: pd.DataFrame
    watched: str
    test: tuple = ()
    chosen: torch.Tensor | None = None

    def of(self, setting, kind):
        """The Records of a setting's "mae" or "classifier", by seed, each once."""
        rows = self.entries[self.entries.setting == setting].sort_values("seed")
        return [self.records[run] for run in rows[kind].dropna().unique()]

    def model(self, setting, kind, constructor):
        """A setting's model, of the first seed."""
        return load_model(self.of(setting, kind)[0].directory, constructor)[0]

    @property
    def whose(self):
        return f"seed {min(self.entries.seed)}"


# --- from numbers ---


def draw_metric(settings, kind, metric, caption, runs):
    """A column of metrics.csv by epoch; metric None: the accuracy watched."""
    name, metric = NAMES[metric or runs.watched], metric or runs.watched
    ylabel = f"{kind.replace('mae', 'MAE')} {name}" if metric.endswith("loss") else name
    found = {label: [record.metrics for record in runs.of(setting, kind)] for label, setting in settings.items()}
    found = {label: tables for label, tables in found.items() if tables}
    return figures.draw_seeds(found, metric, ylabel), caption.format(name)


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


def draw_confusion(runs):
    """How often each class is taken for which, by the predictions that the first classifier has kept."""
    path = runs.of(BASE, "classifier")[0].directory / "predictions.csv"
    if not path.exists():
        return None
    labels, predicted = zip(*read_predictions(path), strict=True)
    classes = sorted({*labels, *predicted})
    if len(classes) > MOST_CLASSES:
        return None
    share = 100 * pd.crosstab(pd.Series(labels), pd.Series(predicted), normalize="index")  # % of each class
    share = share.reindex(index=classes, columns=classes, fill_value=0)
    names = [f"{name} ({share.loc[name, name]:.0f} %)" for name in classes]
    caption = f"Predictions in % of each class (per-class accuracy at the left), pretrained, {runs.whose}."
    return figures.draw_matrix(share.to_numpy(), names, classes, "prediction", "class"), caption


FIGURES = {  # name: (function, its first arguments)
    "figure02": (draw_metric, {"random, depth 4": BASE}, "mae", "train/loss", "MAE {}."),
    "figure04": (draw_metric, PRETRAINING, "classifier", "train/loss", "Classifier {}, with and without pretraining."),
    "figure05": (draw_metric, PRETRAINING, "classifier", None, "Classifier {}, with and without pretraining."),
    "figure07": (draw_metric, DEPTHS, "mae", "train/loss", "MAE {} by decoder depth."),
    "figure08": (draw_metric, DEPTHS, "classifier", None, "Classifier {} by decoder depth."),
    "figure09": (draw_metric, MASKS, "mae", "train/loss", "MAE {} by mask strategy: other tasks, so not a ranking."),
    "figure10": (draw_metric, MASKS, "classifier", None, "Classifier {} by mask strategy."),
    "blocks_by_depth": (draw_by_block, DEPTHS, "decoder depth"),
    "blocks_by_mask": (draw_by_block, MASKS, "mask strategy"),
    "confusion": (draw_confusion,),
}


# --- from models and images ---


def draw_reconstructions(settings, caption, shown):
    """What each MAE is shown and what it makes of it, and the originals below; one strategy, one mask."""
    images, rows = normalize(shown.test.images[shown.chosen[:8]]), {}
    for label, setting in settings.items():
        if setting in set(shown.entries.setting):
            model = shown.model(setting, "mae", MAE_ViT)
            strategy = model.shuffle.mask_strategy
            masks = model.shuffle(len(images), generator("cpu", "report", strategy))
            rows[f"{strategy}\nmask"], rows[label] = model.reconstruct(images, masks)
    rows["original"] = images
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.15 * len(images) + 1.4, 1.2 * len(rows) + 0.4))
    figures.draw_rows(axes, {name: to_pixels(row) for name, row in rows.items()}, fontsize=9)
    borrowed = " Hidden patches are shown with their true mean and variance." if model.norm_pix_loss else ""
    return figure, f"{caption}, {shown.whose}.{borrowed}"


@torch.no_grad()
def draw_answers(shown):
    test = shown.test.where(shown.chosen[:32])
    said = shown.model(BASE, "classifier", ViT_Classifier)(normalize(test.images)).softmax(1)
    confidence, predicted = said.max(1)
    figure = figures.draw_predictions(test.images, test.classes, test.labels, predicted, confidence)
    return figure, f"Predictions on random test images, {shown.whose}."


PICTURES = {  # the same, of models and images
    "figure03": (draw_reconstructions, {"reconstruction": BASE}, "Masked input, reconstruction, original"),
    "figure06": (draw_answers,),
    "figure11": (draw_reconstructions, MASKS, "Reconstructions of the same images by the MAE of each mask strategy"),
    "reconstructions_by_depth": (
        *(draw_reconstructions, DEPTHS),
        "Reconstructions of the same images under the same masks by decoder depth",
    ),
}


# --- all ---


def with_images(runs):
    """(Runs of the seeds whose runs all have weights, None), or (None, the reason): kept runs have no weights."""
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
    return runs._replace(entries=left, test=test, chosen=chosen), None


def draw_all(runs, output, kept):
    """All figures; their captions by file name, in order.

    Args:
        kept: {file name: caption} of an earlier report of these runs: of pictures that stay where they cannot be drawn.
    """
    shown, reason = with_images(runs)
    captions = {}
    for figures_of, some in ((runs, FIGURES), *([(shown, PICTURES)] if shown else [])):
        for name, (draw, *arguments) in some.items():
            if found := draw(*arguments, figures_of):
                figures.save(found[0], output / f"{name}.png")
                captions[name] = found[1]
    kept = {name: caption for name, caption in kept.items() if name in PICTURES or name == "confusion"}
    captions = kept | captions
    if not shown:
        missing = ", ".join(name for name in PICTURES if name not in kept)
        print(f"Not drawn: {reason}. Kept: {', '.join(kept) or 'none'}. Not in the report: {missing or 'none'}")
    return dict(sorted(captions.items(), key=lambda item: (not item[0].startswith("figure"), item[0])))
