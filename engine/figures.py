"""How things are drawn: without a display, in colours and lines for all kinds of colour vision.

Each `draw_` function draws into the axes it is given, or returns a figure of its own.
"""

import logging
import math
import os
import textwrap

import numpy as np

os.environ["MPLBACKEND"] = "agg"  # a notebook's may name a module that is not here
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # not of fonts without the usual weight
plt.rcParams["font.family"] = ["DejaVu Sans"]  # comes with matplotlib; `undrawable` adds others
plt.rcParams["figure.constrained_layout.use"] = True  # leaves room for titles and legends
# of Okabe and Ito's palette, each with a line of its own
STYLES = [("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", "-."), ("#cc79a7", ":"), ("#000000", (0, (5, 1)))]
(RIGHT, _), (WRONG, _) = STYLES[:2]  # blue and vermilion
WRAP = 55  # characters in a line of a legend
NAMES = {  # of columns of metrics.csv, on axes
    "train/loss": "training loss",
    "test/loss": "test loss",
    "test/acc": "test accuracy",
    "val/loss": "loss on held-out images",
    "val/acc": "accuracy on held-out images",
    "probe/knn_acc": "k-NN accuracy",
    "lr": "learning rate",
    "speed/images_per_sec": "images/s",
}


def name_of(metric):
    """The name of a column of metrics.csv on an axis: from NAMES, else the column's own."""
    return NAMES.get(metric, metric)


def is_share(metric):
    """Whether a column of metrics.csv holds shares, which axes show in %."""
    return metric.endswith("acc")


def show(axes, image):
    """Draw one image, (C, H, W) uint8 or grey (H, W) in [0, 1], without ticks. Of 3 or more channels, the first 3 are
    shown in colour; of 1 or 2, the first in grey.
    """
    if image.ndim == 3:
        image = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0] / 255
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_rows(axes, rows, names=(), fontsize=11):
    """Draw {label: images, each as `show` takes it} into axes (rows, columns), a row for each label.

    Args:
        names: of files, above the first row.
    """
    for place, name in zip(axes[0], names, strict=False):
        place.set_title(short(name, 14), fontsize=9, parse_math=False)
    for places, (label, images) in zip(axes, rows.items(), strict=True):
        places[0].set_ylabel(label, fontsize=fontsize)
        for place, image in zip(places, images, strict=True):
            show(place, image)


def rows_of(rows, columns):
    """Make a figure for a table of images, wide enough for a title: (figure, axes (rows, columns))."""
    return plt.subplots(rows, columns, figsize=(max(1.3 * columns + 1, 5), 1.3 * rows + 0.6), squeeze=False)


def grid_of(count, height):
    """Make a figure with `count` axes, up to 8 in a row, each row `height` inches high: (figure, axes (count,))."""
    columns = min(8, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, height * rows + 0.6), squeeze=False)
    for place in axes.flat[count:]:
        place.axis("off")
    return figure, axes.flat[:count]


def draw_title(figure, text):
    """A title in as many lines as the figure's width needs."""
    figure.suptitle(textwrap.fill(text, int(12 * figure.get_figwidth())), fontsize=11)


def short(name, longest=20):
    """A file's name, its middle left out where it is long."""
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"


def draw_predictions(images, classes, labels, predicted, confidence, more=""):
    """Each image with ground truth, prediction and confidence; right and wrong differ in colour, sign and frame.

    Args:
        images: (B, C, H, W) uint8; labels and predicted: (B,) int64, places in classes; confidence: (B,) in [0, 1].
        more: the end of the title.
    """
    (figure, axes), classes = grid_of(len(images), 2.1), drawable(classes)
    for place, image, label, guess, sure in zip(axes, images, labels, predicted, confidence, strict=True):
        sign, colour, width = ("✓", RIGHT, 2) if label == guess else ("✗", WRONG, 4)
        show(place, image)
        for spine in place.spines.values():
            spine.set(color=colour, linewidth=width)
        place.set_title(classes[label], fontsize=9, pad=3)
        place.set_xlabel(f"{sign} {classes[guess]} {sure:.0%}", fontsize=9, color=colour)
    right = int((predicted == labels).sum())
    draw_title(figure, f"Above: ground truth. Below: prediction and confidence. {right} of {len(images)} right{more}")
    return figure


def draw_most_likely(images, names, classes, probabilities, count=3):
    """Each image of unknown class with its name, and below it the most likely classes with their probability.

    Args:
        images: (B, C, H, W) uint8; names: B file names; probabilities: (B, C).
    """
    likely = probabilities.topk(min(count, len(classes)), dim=1)
    (figure, axes), classes = grid_of(len(images), 2.45), drawable(classes)
    for place, image, name, sure, guesses in zip(axes, images, names, *likely, strict=True):
        show(place, image)
        place.set_title(short(name), fontsize=9, pad=3, parse_math=False)
        lines = [f"{short(classes[guess])} {share:.0%}" for guess, share in zip(guesses, sure, strict=True)]
        place.set_xlabel("\n".join(lines), fontsize=9, parse_math=False)
    draw_title(figure, f"The {likely.values.shape[1]} most likely classes, with confidence")
    return figure


def draw_curves(axes, curves, ylabel, percent=False):
    """Draw a line by epoch for each curve: the mean over seeds, with their range as a band.

    Args:
        curves: [(label, epochs (E,), values (S, E)), ...]; values has a row for each seed, nan: no value.
        percent: the values are shares of 1, to show in %.
    """
    for i, (label, epochs, values) in enumerate(curves):
        (colour, _), (_, line) = STYLES[i % 5], STYLES[(i + i // 5) % 5]  # 25 pairs, the first 5 those of STYLES
        values = np.asarray(values)
        known = np.isfinite(values).any(0)  # the others would break the line
        epochs, values = np.asarray(epochs)[known], values[:, known]
        few = len(epochs) < (20 if len(values) == 1 else 2)  # a line of 1 epoch shows nothing
        marker = "o" if few else None
        axes.plot(epochs, values.mean(0), linestyle=line, color=colour, label=label, marker=marker, linewidth=1.8)
        if len(values) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def curve(label, seeds):
    """A curve for `draw_curves`, only where all seeds have a value; seeds: [{epoch or block: value or nan}, ...]."""
    seeds = [{x: value for x, value in seed.items() if not math.isnan(value)} for seed in seeds]
    places = sorted(set.intersection(*map(set, seeds)))
    return f"{label} (n {len(seeds)})", places, [[seed[x] for x in places] for seed in seeds]


def draw_legend(figure):
    """Draw one legend below all axes, which have the same lines, in as many columns as fit; the figure grows for it."""
    lines, (width, height) = figure.axes[0].lines, figure.get_size_inches()
    labels = [textwrap.fill(line.get_label(), WRAP, break_on_hyphens=False) for line in lines]
    longest = max(len(part) for label in labels for part in label.splitlines())
    columns = max(1, int(width / (0.8 + 0.085 * longest)))
    rows = math.ceil(sum(len(label.splitlines()) for label in labels) / columns)
    figure.set_size_inches(width, height + 0.2 * rows)
    look = {"fontsize": 9, "handlelength": 3.5, "frameon": False}
    if figure.axes[0].collections:
        look |= {"title": "line: mean, band: range of the seeds", "title_fontsize": 9}
    figure.legend(lines, labels, loc="outside lower center", ncols=min(columns, len(labels)), **look)


def draw_seeds(groups, metric, ylabel):
    """Curves of a column of metrics.csv for each {label: tables of one seed each}, and a legend: a figure."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    curves = [
        curve(label, [{row["epoch"]: row[metric] for row in table} for table in tables])
        for label, tables in groups.items()
    ]
    draw_curves(axes, curves, ylabel, percent=is_share(metric))
    draw_legend(figure)
    return figure


def draw_blocks(measures):
    """Test accuracy by encoder block: a part for each {measure: curves as `draw_curves` takes them}, and a legend."""
    figure, axes = plt.subplots(1, len(measures), figsize=(11, 4.2), sharey=True)
    for place, (measure, curves) in zip(axes, measures.items(), strict=True):
        draw_curves(place, curves, f"test accuracy, {measure}", percent=True)
        place.set_xlabel("encoder block")
        place.tick_params(labelleft=True)
    draw_legend(figure)
    return figure


def draw_matrix(values, rows, columns, xlabel, ylabel):
    """A matrix (rows, columns) of shares in % as coloured cells with their numbers; all colours are from 0 to 100."""
    figure, axes = plt.subplots(figsize=(1.0 * len(columns) + 2.6, 0.75 * len(rows) + 1.6))
    axes.imshow(values, cmap="viridis", vmin=0, vmax=100)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 50 else "black")
    return figure


def undrawable(text):
    """The set of a text's letters that no installed font has; later figures use the fonts that have the others."""
    family, missing = plt.rcParams["font.family"], {ord(letter) for letter in text if not letter.isspace()}
    names = sorted({font.name for font in font_manager.fontManager.ttflist} - {*family})
    for name in [*family, *names]:
        if missing and "LastResort" not in name.replace(" ", ""):  # which has boxes for all letters
            path = font_manager.findfont(font_manager.FontProperties(family=[name]))
            found = missing & font_manager.get_font(path).get_charmap().keys()
            family += [name] if found and name not in family else []
            missing -= found
    plt.rcParams["font.family"] = family
    return {chr(letter) for letter in missing}


def drawable(classes):
    """The class names; if no installed font has some letter, "class 0", "class 1", ..., and a printed line says so."""
    if not (letters := undrawable("".join(classes))):
        return classes
    some = "".join(sorted(letters)[:5])
    print(f"No font here has {some}: the picture numbers the classes from 0. Fonts: apt install fonts-noto-cjk, say.")
    return [f"class {i}" for i in range(len(classes))]


def save(figure, path):
    """Write a figure, its directory made where missing, and close it; a letter that no font here has becomes "?"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = figure.findobj(Text)
    letters = undrawable("".join(text.get_text() for text in texts))
    for text in texts:
        text.set_family(plt.rcParams["font.family"])
        text.set_text(text.get_text().translate({ord(letter): "?" for letter in letters}))
    figure.savefig(path, dpi=150)
    plt.close(figure)
