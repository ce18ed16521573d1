"""The pictures of compare.py: each measure over what varies, and curves by epoch."""

import functools
import math
import statistics

from matplotlib.ticker import MaxNLocator

from engine.figures import STYLES, draw_cells, draw_seeds, plt, save
from scripts.plot_curves import NAMES
from scripts.results import common_accuracy, paired_difference, tables_of, written

WIDE = 16  # times the smallest number of an axis: from there on it is logarithmic
INTERVALS = (
    "Large points: mean; bars: its 95 % interval over seeds (Student's t), cut off at the frame; small points: the "
    "seeds. The table of differences, which pairs the seeds, says whether two settings differ."
)

# --- what there is to draw over ---


def axes_of(settings):
    """Names to use as axes of plots: those that vary, but not together with an earlier one."""
    found = {}
    for name in dict.fromkeys(name for setting in settings for name in setting):
        column = [setting.get(name, "") for setting in settings]
        places = tuple(map(column.index, column))  # equal where values are equal
        if len(set(places)) > 1:
            found.setdefault(places, name)
    return list(found.values())


def is_numeric(name, settings):
    """Whether an axis can be made of a name's values; None, as in train_images=all, is at its end."""
    known = {setting.get(name, "") for setting in settings} - {None}
    return len(known) > 1 and all(type(value) in (int, float) for value in known)


def crossed(names, settings):
    """Whether more than half of all combinations of some names' values are there."""
    counts = [len({setting.get(name) for setting in settings}) for name in names]
    return len(settings) > math.prod(counts) / 2


# --- one measure ---


def draw_point(axes, x, numbers, colour, across=False):
    """The mean of the seeds' numbers, its 95 % interval, and a small point each; across: x is a height."""
    difference = paired_difference(dict(enumerate(numbers)), dict.fromkeys(range(len(numbers)), 0))
    half = None if len(numbers) == 1 else [[difference.high - difference.mean]]
    look = {"fmt": "o", "color": colour, "elinewidth": 1.2, "capsize": 3, "markersize": 6}
    if across:
        axes.errorbar([difference.mean], [x], xerr=half, **look)
        axes.plot(numbers, [x] * len(numbers), ".", color=colour, alpha=0.6)
    else:
        axes.errorbar([x], [difference.mean], yerr=half, **look)
        axes.plot([x] * len(numbers), numbers, ".", color=colour, alpha=0.6)


def limits(numbers):
    """Of an axis that shows all seeds, with some room."""
    low, high = (choose(n for some in numbers.values() for n in some) for choose in (min, max))
    room = 0.35 * (high - low) or 0.1 * abs(high) or 1
    return low - room, high + room


def draw_names(axes, numbers, unit, labels, baseline):
    """A row for each label, {label: numbers of the seeds}, and a line at the baseline's mean."""
    for label, some in numbers.items():
        draw_point(axes, labels.index(label), some, STYLES[label == baseline][0], across=True)
    if baseline in numbers:
        axes.axvline(statistics.mean(numbers[baseline]), color=STYLES[1][0], linestyle="--", linewidth=1)
    axes.set(xlabel=unit, xlim=limits(numbers), ylim=(len(labels) - 0.5, -0.5))
    axes.set_yticks(range(len(labels)), labels)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(alpha=0.3, axis="x")


def draw_lines(axes, numbers, unit, places, lines, over):
    """A line over a number for each of `lines`, {label: line}; a level where `places` {label: number} has none."""
    known = sorted({x for x in places.values() if x is not None})
    is_wide = known[0] > 0 and known[-1] >= WIDE * known[0]
    last = known[-1] ** 2 / known[-2] if is_wide else 2 * known[-1] - known[-2]  # of None
    ticks = {x: str(x) for x in known} | ({last: "all"} if None in places.values() else {})
    drawn = dict.fromkeys(lines.values())
    for i, line in enumerate(drawn):
        colour, dashes = STYLES[i % len(STYLES)]
        points = {label: some for label, some in numbers.items() if lines[label] == line}
        if not points:
            continue
        if line in points and line not in places:  # a label
            axes.axhline(statistics.mean(points[line]), color=colour, linestyle=dashes, label=line)
            continue
        aside = 0.012 * (i - (len(drawn) - 1) / 2)  # so that the bars of several lines can be seen
        points = {last if places[label] is None else places[label]: some for label, some in points.items()}
        points = {
            x * (known[-1] / known[0]) ** aside if is_wide else x + aside * (known[-1] - known[0]): some
            for x, some in points.items()
        }
        axes.plot(list(points), list(map(statistics.mean, points.values())), color=colour, linestyle=dashes, label=line)
        for x, some in points.items():
            draw_point(axes, x, some, colour)
    if is_wide:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.margins(x=0.06)
    axes.set(xlabel=over, ylabel=unit, ylim=limits(numbers))
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False)


def draw_grid(axes, numbers, unit, settings, down, over):
    """Means as cells over two numbers, those of the settings {label: {name: value}}."""
    rows, columns = (sorted({setting[name] for setting in settings.values()}) for name in (down, over))
    cells = [[math.nan] * len(columns) for _ in rows]
    for label, setting in settings.items():
        if label in numbers:
            place = rows.index(setting[down]), columns.index(setting[over])
            cells[place[0]][place[1]] = statistics.mean(numbers[label])
    draw_cells(axes, cells, rows, columns, over, down, "{:.4f}" if unit == "loss" else "{:.2f}")


# --- all ---


def draw_measures(measured, values, baseline, scratch, losses, path):
    """Each measure in a part of its own: cells over two numbers, lines over one, else a row for each setting.

    Args:
        measured: {measure: {label: {seed: number}}}; values: {label: {name: value}}; both of all labels.
        scratch: how the labels begin that have no pretraining; losses: the measures that are no accuracy.

    Returns:
        {file name: caption}.
    """
    placed = {label: setting for label, setting in values.items() if not label.startswith(scratch)} or values
    names = axes_of(placed.values())
    numeric = [name for name in names if is_numeric(name, placed.values())]
    words = [name for name in names if name not in numeric]
    columns, has_none = min(3, len(measured)), any(None in setting.values() for setting in placed.values())
    if len(names) == len(numeric) == 2 and crossed(names, placed.values()) and not has_none:
        counts = [len({setting[name] for setting in placed.values()}) for name in names]
        draw = functools.partial(draw_grid, settings=placed, down=names[0], over=names[1])
        size, caption = (1.1 * counts[1] + 2, 0.75 * counts[0] + 2), "Mean over seeds; the numbers are in the table."
    elif len(numeric) == 1 and crossed(names, placed.values()):
        (over,) = numeric
        own = {
            label: written({name: setting[name] for name in words if name in setting})
            for label, setting in values.items()
        }
        starts = {label: [scratch] if label.startswith(scratch) else [] for label in values}
        places = {label: setting[over] for label, setting in values.items() if over in setting}
        lines = {label: " ".join(filter(None, [*starts[label], own[label]])) or "pretrained" for label in places}
        lines |= {label: label for label in values if label not in places}
        draw = functools.partial(draw_lines, places=places, lines=lines, over=over)
        size, caption = (5, 4), INTERVALS
    else:
        draw = functools.partial(draw_names, labels=list(values), baseline=baseline)
        size, caption = (3.2 + 0.09 * max(map(len, values)) / columns, 0.4 * len(values) + 1.4), INTERVALS
    count = math.ceil(len(measured) / columns)
    shape = {"figsize": (size[0] * columns, size[1] * count), "squeeze": False}
    figure, axes = plt.subplots(count, columns, sharey="row" if draw.func is draw_names else "none", **shape)
    for place, (measure, labels) in zip(axes.flat, measured.items(), strict=False):
        numbers = {label: list(seeds.values()) for label, seeds in labels.items()}
        draw(place, numbers, "loss" if measure in losses else "accuracy, %")
        place.set_title(measure, fontsize=11)
    for place in axes.flat[len(measured) :]:
        place.axis("off")
    save(figure, path)
    return {path.stem: caption}


def draw_all_curves(results, running, output):
    """Training loss and accuracy by epoch, of MAEs and of classifiers; {file name: caption}.

    Args:
        running: {label: results} of runs that are not finished.
    """
    captions, shown = {}, results | {f"{label}, not finished": found for label, found in running.items()}
    for kind in ("mae", "classifier"):
        tables = {label: tables_of([r for r in found if getattr(r, kind)], kind) for label, found in shown.items()}
        tables = {label: list(filter(None, seeds)) for label, seeds in tables.items()}
        tables = {label: seeds for label, seeds in tables.items() if seeds}
        flat = [table for seeds in tables.values() for table in seeds]
        for metric in filter(None, ("train/loss", common_accuracy(flat))) if flat else ():
            name, what = f"{kind}_{metric.replace('/', '_')}", f"{kind.replace('mae', 'MAE')}: {NAMES[metric]}"
            save(draw_seeds(tables, metric, what), output / f"{name}.png")
            captions[name] = f"{what} by epoch: mean, band: range of the seeds."
    return captions
