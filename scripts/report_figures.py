"""The figures of the report: curves from CSV and JSON alone, pictures from finished models and the test images."""

import itertools
import math

import torch

from engine.checkpoints import load_model
from engine.device import generator
from engine.errors import UserError
from engine.features import FROZEN_MEASURES
from engine.figures import (
    WRONG,
    curve,
    draw_blocks,
    draw_matrix,
    draw_predictions,
    draw_rows,
    draw_seeds,
    plt,
    save,
    show,
)
from engine.run import read_config
from images import data
from model import MASK_STRATEGIES, MAE_ViT, PatchShuffle, ViT_Classifier, mae_loss
from scripts.ablations import BASE, DEPTHS, MASKS, PRETRAINING, SCRATCH, accuracy_by_epoch
from scripts.results import by_block, read_features, tables_of

# the names of what only models and test images can show
PICTURES = (
    "figure03",
    "figure06",
    "figure11",
    "confusion",
    "disagreements",
    "masks_crossed",
    "reconstructions_by_depth",
)
MOST_CLASSES = 20  # with more, a table of all pairs of classes cannot be read

# --- what the models do ---


@torch.no_grad()
def answers(result, test, device):
    """What a classifier says of each test image: confidence (N,) and class, (N,) int64."""
    model = load_model(result.classifier, ViT_Classifier)[0].to(device)
    parts = [model(data.normalize(part.to(device))).softmax(1).cpu() for part in test.images.split(500)]
    return torch.cat(parts).max(1)


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
                masks = shuffle(len(images), generator("cpu", "bank", other)).to(device)
                for x, ids in zip(images.to(device).split(100), masks.split(100), strict=True):
                    pred, mask = model(x, ids)
                    table[i, j] += mae_loss(pred, x, mask, model.norm_pix_loss).item() * len(x)
    return table / len(images) / torch.tensor([[len(results[MASKS[strategy]])] for strategy in trained])


# --- one figure ---


def draw_reconstructions(models, images, path):
    """What each MAE, by name, is shown and what it makes of it, and the originals below; one strategy, one mask."""
    rows = {}
    for name, model in models.items():
        strategy = model.shuffle.mask_strategy
        masks = model.shuffle(len(images), generator("cpu", "report", strategy))
        rows[f"{strategy}\nmask"], rows[name] = model.reconstruct(images, masks)
    rows["original"] = images
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.15 * len(images) + 1.4, 1.2 * len(rows) + 0.4))
    draw_rows(axes, {name: data.to_pixels(row) for name, row in rows.items()}, fontsize=9)
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
        order = torch.randperm(len(chosen), generator=generator("cpu", "report"))
        for place, i in zip(places, order[chosen[order]].tolist(), strict=False):
            place.set_frame_on(True)
            show(place, test.images[i])
            wrong = other[i] if right[i] else one[i]
            place.set_title(test.classes[test.labels[i]], fontsize=9)
            place.set_xlabel(f"other said\n{test.classes[wrong]}", fontsize=9)
    save(figure, path)


def draw_confusion(labels, predicted, classes):
    """How often each class is taken for which: a figure and its caption, without a full stop."""
    count = len(classes)
    confusion = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
    share = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)  # % of each class
    if count <= MOST_CLASSES:
        names = [f"{name} ({share[i, i]:.0f} %)" for i, name in enumerate(classes)]
        caption = "Predictions in % of each class (per-class accuracy at the left), pretrained"
        return draw_matrix(share, names, classes, "prediction", "class", "{:.0f}"), caption
    wrong = share.fill_diagonal_(0).flatten()
    pairs = [i for i in wrong.argsort(descending=True, stable=True)[:MOST_CLASSES].tolist() if wrong[i] > 0]
    figure, axes = plt.subplots(figsize=(8, 6.5))
    axes.barh(range(len(pairs)), wrong[pairs].tolist(), color=WRONG)
    axes.set_yticks(range(len(pairs)), [f"{classes[i // count]}: {classes[i % count]}" for i in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="% of the images of the class", ylabel="class: prediction")
    axes.grid(alpha=0.3, axis="x")
    return figure, f"The {len(pairs)} most frequent mistakes, in % of the class, pretrained"


# --- all figures ---


def draw_all_curves(results, output):
    """Losses and accuracies by epoch, of the settings that a figure of the course report compares."""
    acc = accuracy_by_epoch(results)
    whose = "accuracy on held-out images" if acc == "val/acc" else "test accuracy"
    curves = {
        "figure02": ({"random, depth 4": BASE}, "mae", "train/loss", "MAE training loss."),
        "figure04": (
            PRETRAINING,
            "classifier",
            "train/loss",
            "Classifier training loss, with and without pretraining.",
        ),
        "figure05": (PRETRAINING, "classifier", acc, f"Classifier {whose}, with and without pretraining."),
        "figure07": (DEPTHS, "mae", "train/loss", "MAE training loss by decoder depth."),
        "figure08": (DEPTHS, "classifier", acc, f"Classifier {whose} by decoder depth."),
        "figure09": (MASKS, "mae", "train/loss", "MAE training loss by mask strategy: other tasks, so not a ranking."),
        "figure10": (MASKS, "classifier", acc, f"Classifier {whose} by mask strategy."),
    }
    for name, (settings, kind, metric, _) in curves.items():
        ylabel = whose if metric == acc else f"{'MAE' if kind == 'mae' else kind} training loss"
        found = {label: tables_of(results[setting], kind) for label, setting in settings.items() if setting in results}
        save(draw_seeds(found, metric, ylabel), output / f"{name}.png")
    return {name: caption for name, (*_, caption) in curves.items()}


def has_knn(table):
    """Whether a metrics.csv has k-NN accuracies of several epochs."""
    return sum(not math.isnan(row.get("knn/acc", math.nan)) for row in table) > 1


def of_several_blocks(results):
    """The stored features that were measured after more than the last block."""
    features = [read_features(result.features) for result in results if result.features]
    return [stored for stored in features if len(by_block(stored, "knn/acc")) > 1]


def draw_all_probes(results, output):
    """What the frozen features are worth, by epoch of pretraining and by encoder block, where that was measured."""
    captions = {}
    for name, what, settings in (("depth", "decoder depth", DEPTHS), ("mask", "mask strategy", MASKS)):
        found = {label: results[setting] for label, setting in settings.items() if setting in results}
        tables = {label: tables_of(seeds, "mae") for label, seeds in found.items()}
        tables = {label: seeds for label, seeds in tables.items() if all(map(has_knn, seeds))}
        if tables:
            save(draw_seeds(tables, "knn/acc", "k-NN accuracy"), output / f"knn_by_{name}.png")
            captions[f"knn_by_{name}"] = (
                f"k-NN accuracy during pretraining by {what}; at most 1,000 test and 5,000 training images."
            )
        found = {label: of_several_blocks(seeds) for label, seeds in found.items()}
        found = {label: stored for label, stored in found.items() if stored}
        if found:
            curves = {
                measure: [
                    curve(label, [by_block(stored, column) for stored in seeds]) for label, seeds in found.items()
                ]
                for measure, column in FROZEN_MEASURES.items()
            }
            save(draw_blocks(curves), output / f"blocks_by_{name}.png")
            captions[f"blocks_by_{name}"] = (
                f"Linear probe and k-NN after each encoder block by {what}; all labels, mean of the patches."
            )
    return captions


def draw_all_reconstructions(results, images, output, device):
    """Of the first of the seeds, on the same images and masks, and the error of every strategy under every other."""
    trained = [strategy for strategy, setting in MASKS.items() if setting in results]
    pictures = {"figure03": {"reconstruction": BASE}, "figure11": MASKS, "reconstructions_by_depth": DEPTHS}
    for name, settings in pictures.items():
        found = {label: results[setting][0].mae for label, setting in settings.items() if setting in results}
        models = {label: load_model(mae, MAE_ViT)[0] for label, mae in found.items()}
        draw_reconstructions(models, images[:8], output / f"{name}.png")
    matrix = mask_matrix(results, trained, list(MASK_STRATEGIES), images, device)
    figure = draw_matrix(matrix, trained, list(MASK_STRATEGIES), "tested under", "trained under")
    save(figure, output / "masks_crossed.png")
    whose = f"seed {results[BASE][0].seed}"
    seeds = ", ".join(map(str, sorted({result.seed for name in trained for result in results[MASKS[name]]})))
    borrowed, of_pixels = "", "hidden pixels"
    if any(model.norm_pix_loss for model in models.values()):
        borrowed = " Hidden patches are shown with their true mean and variance."
        of_pixels = "hidden pixels, normalised by each patch's mean and variance,"
    return {
        "figure03": f"Masked input, reconstruction, original, {whose}.{borrowed}",
        "figure11": f"Reconstructions of the same images by the MAE of each mask strategy, {whose}.{borrowed}",
        "reconstructions_by_depth": "Reconstructions of the same images under the same masks by decoder depth, "
        f"{whose}.{borrowed}",
        "masks_crossed": f"Mean squared error of {of_pixels} on {len(images)} test images, the same masks for all: "
        f"trained under one strategy, tested under another, mean over seeds: {seeds}.",
    }


def draw_answers(results, test, chosen, output, device):
    """What the first seed's classifier says of some images and of each class, and where one from scratch differs."""
    confidence, predicted = answers(results[BASE][0], test, device)
    whose = f"seed {results[BASE][0].seed}"
    shown = chosen[:32]
    figure = draw_predictions(test.images[shown], test.classes, test.labels[shown], predicted[shown], confidence[shown])
    save(figure, output / "figure06.png")
    figure, caption = draw_confusion(test.labels, predicted, test.classes)
    save(figure, output / "confusion.png")
    captions = {"figure06": f"Predictions on random test images, {whose}.", "confusion": f"{caption}, {whose}."}
    if SCRATCH in results:
        _, other = answers(results[SCRATCH][0], test, device)
        draw_disagreements(test, predicted, other, output / "disagreements.png")
        captions["disagreements"] = f"Images that only one of the two classifiers gets right, {whose}."
    return captions


def with_weights(results):
    """The results of the seeds of which all runs have their weights; and a run without, or None.

    Kept runs have none. So a seed that was trained elsewhere leaves the pictures to the others.
    """
    every = itertools.chain(*results.values())
    runs = [(result.seed, run) for result in every for run in (result.classifier, result.mae) if run]
    without = {seed: run for seed, run in runs if not (run / "model.pt").exists()}
    left = {label: [result for result in found if result.seed not in without] for label, found in results.items()}
    return {label: found for label, found in left.items() if found}, next(iter(without.values()), None)


def images_for_pictures(results):
    """The test images, if they are there; else None and the reason."""
    config = read_config(results[BASE][0].classifier)["arguments"]
    try:
        return data.load_dataset(config["dataset"], config["data_dir"], config["img_size"])[1], None
    except UserError as error:
        return None, str(error)


def draw_all(results, output, bank, device, kept):
    """All figures; their captions by file name, in order.

    Args:
        kept: {file name: caption} of the pictures of an earlier report of these runs; they stay where they cannot be
            drawn.
    """
    captions = draw_all_curves(results, output) | draw_all_probes(results, output)
    drawable, without = with_weights(results)
    whole = drawable.keys() == results.keys()
    test, reason = images_for_pictures(drawable) if whole else (None, f"{without} has no model.pt")
    if test:
        chosen = torch.randperm(len(test.images), generator=generator("cpu", "report"))
        images = data.normalize(test.images[chosen[:bank]])
        captions |= draw_all_reconstructions(drawable, images, output, device)
        captions |= draw_answers(drawable, test, chosen, output, device)
    else:
        kept = {name: caption for name, caption in kept.items() if name in PICTURES}
        missing = ", ".join(name for name in PICTURES if name not in kept)
        print(f"Not drawn: {reason}. Kept: {', '.join(kept) or 'none'}. Not in the report: {missing or 'none'}")
        captions |= kept
    return dict(sorted(captions.items(), key=lambda item: (not item[0].startswith("figure"), item[0])))
