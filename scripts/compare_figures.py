"""The pictures of compare.py: each measure over what varies, and curves by epoch."""

import functools
import math
import textwrap

from engine.figures import STYLES, WRAP, MaxNLocator, draw_seeds, name_of, plt
from scripts.results import MEASURES, common_accuracy
from scripts.settings import SCRATCH

WIDE = 16  # times the smallest number of an axis: from there on it is logarithmic
CAPTION = (
    "Large points: means; small points: the seeds; dashed: the baseline. Bars: 95 % interval of the difference from "
    "the baseline, for all settings together: a setting whose bar misses the dashed line differs from the baseline."
)


def draw_point(axes, x, row, across=False, **look):
    """Draw a mean, a small point for each seed and the interval's bar; across: at height x."""
    order = -1 if across else 1
    axes.plot(*([x] * len(row.seeds), row.seeds)[::order], ".", alpha=0.5, **look)
    axes.plot(*(x, row.mean)[::order], "o", markersize=6, **look)
    axes.plot(*([x, x], [row.low, row.high])[::order], **look)


def limits(rows):
    """(low, high) of an axis that shows all seeds, with a margin."""
    low, high = rows.seeds.map(min).min(), rows.seeds.map(max).max()
    room = 0.35 * (high - low) or 0.1 * abs(high) or 1
    return low - room, high + room


def draw_names(axes, rows, baseline, labels):
    """A row for each of the labels."""
    for row in rows.itertuples():
        draw_point(axes, labels.index(row.Index), row, across=True, color=STYLES[row.Index == baseline][0])
    if baseline in rows.index:
        axes.axvline(rows["mean"][baseline], color=STYLES[1][0], linestyle="--", linewidth=1)
    axes.set(xlim=limits(rows), ylim=(len(labels) - 0.5, -0.5))
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, WRAP) for label in labels], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(alpha=0.3, axis="x")


def axis_of(values):
    """(the varying number for the x axis, by name; {setting: its line}), or None if rows show the settings better.

    Args:
        values: {setting: {name: value}} of what varies; train_images may be "all", the end of an axis.
    """
    settings = [own for label, own in values.items() if not label.startswith(SCRATCH)] or list(values.values())
    found = {
        name: {own.get(name, "") for own in settings} for name in dict.fromkeys(n for own in settings for n in own)
    }
    numeric = [n for n in found if len(found[n]) > 1 and all(type(v) in (int, float) for v in found[n] - {"all"})]
    if not numeric:
        return None
    over = max(numeric, key=lambda name: len(found[name]))
    follow = [n for n in numeric if len({(own[over], own.get(n)) for own in settings}) == len(found[over])]
    others = [name for name in found if len(found[name]) > 1 and name not in follow]
    lines = {label: [f"{n}={own[n]}" for n in others if n in own] for label, own in values.items() if over in own}
    lines = {label: " ".join([SCRATCH] * label.startswith(SCRATCH) + words) for label, words in lines.items()}
    return (over, lines) if len(settings) >= 2 * len(set(lines.values())) else None


def draw_lines(axes, rows, baseline, values, over, lines):
    """Draw lines over the number `over`; lines: {setting: line}. Settings without it are horizontal lines."""
    known = sorted({values[label][over] for label in lines} - {"all"})
    is_wide = known[0] > 0 and len(known) > 1 and known[-1] >= WIDE * known[0]
    ticks = {x: x for x in known} | {"all": known[-1] ** 2 / known[-2] if is_wide else 2 * known[-1] - known[-2]}
    drawn = list(dict.fromkeys([*lines.values(), *(label for label in rows.index if label not in lines)]))
    for i, (line, (colour, dashes)) in enumerate(zip(drawn, STYLES * len(drawn), strict=False)):
        look = {"color": colour, "linestyle": dashes, "label": line or "pretrained"}
        if line not in lines.values():
            axes.axhline(rows["mean"][line], **look)
            continue
        aside, means = 0.012 * (i - (len(drawn) - 1) / 2), {}  # so that the bars of several lines can be seen
        for row in rows[[lines.get(label) == line for label in rows.index]].itertuples():
            x = ticks[values[row.Index][over]]
            x = x * (known[-1] / known[0]) ** aside if is_wide else x + aside * (known[-1] - known[0])
            means[x] = row.mean
            draw_point(axes, x, row, color=colour)
        axes.plot(sorted(means), [means[x] for x in sorted(means)], **look)
    if baseline in rows.index:
        axes.axhline(rows["mean"][baseline], color="grey", linestyle="--", linewidth=1)
    if is_wide:
        axes.set_xscale("log")
        axes.minorticks_off()
    shown = {str(name): x for name, x in ticks.items() if any(values[label][over] == name for label in lines)}
    axes.set_xticks(list(shown.values()), list(shown))
    axes.margins(x=0.06)
    axes.set(xlabel=over, ylim=limits(rows))
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False)


def draw_measures(found, judged, values, baseline):
    """Each measure in a part of its own: lines over a number that varies, else a row for each setting.

    Args:
        found, judged: compare's long table and its judged one; values: {setting: {name: value}} of what varies.
    """
    measures, axis = list(found.measure.unique()), axis_of(values)
    columns = min(3, len(measures))
    if axis:
        draw, width, height = functools.partial(draw_lines, values=values, over=axis[0], lines=axis[1]), 5, 4
    else:
        draw, height = functools.partial(draw_names, labels=list(values)), 0.4 * len(values) + 1.4
        width = 3.2 + 0.08 * min(WRAP, max(map(len, values))) / columns
    size, down = {"squeeze": False, "sharey": "none" if axis else "row"}, math.ceil(len(measures) / columns)
    figure, axes = plt.subplots(down, columns, figsize=(width * columns, height * down), **size)
    for place, measure in zip(axes.flat, measures, strict=False):
        rows = judged[judged.measure == measure].set_index("setting")
        rows = rows.reindex(columns=["mean", "low_all", "high_all"]).astype(float)
        level = rows["mean"].get(baseline, math.nan)
        rows["low"], rows["high"] = rows.low_all + level, rows.high_all + level
        rows["seeds"] = found[found.measure == measure].groupby("setting").value.agg(list)
        draw(place, rows, baseline)
        place.set_title(f"{measure}, %" if MEASURES[measure].percent else measure, fontsize=11)
    for place in axes.flat[len(measures) :]:
        place.axis("off")
    return figure


def draw_tuning(values, title):
    """A row for each MAE: its classifiers' accuracies as small points, their mean as a large one.

    Args:
        values: a pandas.DataFrame with columns setting, mae (its seed) and value, a row a classifier.
    """
    names = values.setting + ", MAE of seed " + values.mae.astype(str)
    rows = values.groupby(names, sort=False).value.agg(mean="mean", seeds=list).assign(low=math.nan, high=math.nan)
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(rows) + 1.2))
    draw_names(axes, rows, None, list(rows.index))
    axes.set_xlabel("fine-tuned, %")
    axes.set_title(title, fontsize=9)
    return figure


def draw_all_curves(groups):
    """Training loss and accuracy by epoch, of MAEs and of classifiers; {file name: (figure, caption)}.

    Args:
        groups: {kind: {label: metrics of a run each}}.
    """
    drawn = {}
    for kind, found in groups.items():
        tables = {label: [*filter(None, some)] for label, some in found.items() if any(some)}
        flat = [table for some in tables.values() for table in some]
        for metric in filter(None, ("train/loss", common_accuracy(flat))) if flat else ():
            what = f"{kind.replace('mae', 'MAE')}: {name_of(metric)}"
            caption = f"{what} by epoch: mean, band: range of the seeds."
            drawn[f"{kind}_{metric.replace('/', '_')}"] = draw_seeds(tables, metric, what), caption
    return drawn
