"""In what runs differ: each run's setting is a MAE and how it is fine-tuned (finetune/...), named by what varies."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from engine.errors import UserError
from scripts.results import ABOUT

TUNED = "finetune/"
FOLLOWS = {  # a digest says something new only where all of these are the same
    "images": ("dataset", "img_size", "train_images", "val_images"),
    "test_set": ("dataset", "img_size"),
    "masks": ("mask_strategy", "mask_ratio", "img_size", "patch_size"),
}
SCRATCH = "from scratch"
MANY = 3  # where more settings vary, a label has only those that differ from most
AS_MOST = "as most"  # a label without any


class Entry(NamedTuple):
    """What is compared: a classifier with its MAE, or a MAE (and a number of labels) that none comes from."""

    run: str
    classifier: str | None  # a row of the table of runs
    mae: str | None  # a row of it, where the MAE is among them
    labels: str  # the suffix of its features' columns
    pretrained: bool  # whether there is a MAE, here or not
    seed: int  # the MAE's, where there is one
    tuning_seed: int | None  # the classifier's
    finished: bool


def entries_of(runs):
    """The Entries to compare and their settings, from a table as `scripts.results.table` makes it.

    Returns:
        entries: a row for each Entry; settings: a row for each: the MAE's settings as name, the classifier's as
            finetune/name, or also as name if every classifier has the same value as its MAE.
    """
    objects = runs.select_dtypes("object").drop(columns=[*ABOUT], errors="ignore")
    told = {run: row.dropna().to_dict() for run, row in objects.iterrows()}
    plain = {run: {name: v for name, v in values.items() if "/" not in name} for run, values in told.items()}
    measured = [name.removeprefix("knn/acc") for name in runs if name.startswith("knn/acc")]
    done = runs[(runs.kind == "classifier") & runs.finished.astype(bool)]
    by_labels = len(set(done.train_images) if len(done) else measured) > 1
    entries, settings = [], []
    for run, row in runs[runs.kind == "classifier"].iterrows():
        mae = {name.removeprefix("mae/"): v for name, v in told[run].items() if name.startswith("mae/")}
        labels = f"@{row.train_images}" if by_labels and row.train_images != "all" else ""
        seed = mae.pop("seed", row.seed)
        entries.append(Entry(run, run, row.mae, labels, bool(mae), seed, row.seed, row.finished))
        tuning = {TUNED + name: value for name, value in plain[run].items()}
        settings.append((plain[row.mae] if row.mae else mae) | tuning)
    used = {(entry.mae, entry.labels) for entry in entries if entry.finished}
    for run, row in runs[runs.kind == "mae"].iterrows():
        ends = [end for end in (measured if by_labels else [""]) if row.get(f"knn/acc{end}", np.nan) >= 0]
        ends = [end for end in ends if (run, end) not in used]
        for end in ends or ([] if run in {mae for mae, _ in used} else [""]):
            entries.append(Entry(run, None, run, end, True, row.seed, None, row.finished))
            labels = {f"{TUNED}train_images": int(end[1:]) if end else "all"} if by_labels else {}
            settings.append(plain[run] | labels)
    entries = pd.DataFrame(entries, columns=Entry._fields, dtype=object)
    return entries, without_twins(pd.DataFrame(settings, dtype=object))


def without_twins(settings):
    """The settings; finetune/name becomes name if every classifier has the same value as its MAE."""
    has_mae = any(not name.startswith(TUNED) for name in settings)
    for name in [name for name in settings if name.startswith(TUNED)]:
        last = name.removeprefix(TUNED)
        if not has_mae:
            settings = settings.rename(columns={name: last})
        elif last in settings and (settings[last] == settings[name])[settings[[last, name]].notna().all(axis=1)].all():
            settings[last] = settings[last].where(settings[last].notna(), settings[name])
            settings = settings.drop(columns=name)
    return settings


def is_written(word, setting):
    """Whether a typed NAME=VALUE fits a setting {name: value} (1.5e-4 fits 0.00015); None: it has no such name."""
    name, _, text = word.partition("=")
    value = setting.get(name, setting.get(TUNED + name))
    if value is None or value != value:
        return None
    try:
        return float(text) == float(value)
    except ValueError:
        return text.lower() == str(value).lower()


def where(entries, settings, words):
    """The entries and settings that fit all NAME=VALUE words; those without a value of a name (from scratch) fit, too.

    Raises:
        UserError: there are none.
    """
    said = [[is_written(word, row) for word in words or ()] for row in settings.to_dict("records")]
    keep = [False not in row for row in said]
    if words and not any(True in row and False not in row for row in said):
        raise UserError(f"--where {' '.join(words)} fits no run; there are the settings {', '.join(settings)}.")
    return entries[keep], settings[keep]


def what_varies(settings):
    """The names of settings that vary between entries; digests only if no setting explains them (FOLLOWS)."""

    def varies(name):
        prefix, _, last = name.rpartition("/")
        others = (f"{prefix}/{other}" if f"{prefix}/{other}" in settings else other for other in FOLLOWS.get(last, ()))
        others = [settings[other].map(str) for other in others if other in settings] or [[0] * len(settings)]
        return settings[name].groupby(others).nunique().max() > 1

    return list(filter(varies, settings))


def in_order(values):
    """A sort key: numbers first, then words, then missing values."""
    return [(0, v, "") if isinstance(v, (int, float)) and v == v else (1 + pd.isna(v), 0, str(v)) for v in values]


def written(setting):
    """For example "decoder_depth=4 mask_ratio=0.75", of {name: value}."""
    return " ".join(f"{name}={value}" for name, value in setting.items())


def label_all(entries, settings):
    """Name each entry's setting by what varies; the entries sorted by its values, from scratch last.

    Returns:
        The entries with the columns setting and unit (its part of the MAE alone); {setting: {name: value} of what
        varies}; the values that labels leave out.
    """
    varied, both = what_varies(settings), entries.pretrained.nunique() > 1
    different = settings[varied].drop_duplicates()
    usual = {name: different[name].value_counts().index[0] for name in varied if len(varied) > MANY}
    unnamed = AS_MOST if usual else "pretrained" if both else "all runs"
    keys, labels, units, values = {}, {}, {}, {}
    for i, row in settings[varied].iterrows():
        found = row.dropna().to_dict()
        told = {name: value for name, value in found.items() if not usual or value != usual[name]}
        scratch = both and not entries.pretrained[i]
        keys[i] = scratch, bool(usual) and len(told), in_order([told.get(name, np.nan) for name in varied])
        labels[i] = " ".join(filter(None, [SCRATCH if scratch else "", written(told)])) or unnamed
        units[i] = written({name: v for name, v in told.items() if not name.startswith(TUNED)}) or unnamed
        values.setdefault(labels[i], found)
    entries = entries.loc[sorted(keys, key=keys.get)].assign(setting=pd.Series(labels), unit=pd.Series(units))
    return entries, {label: values[label] for label in entries.setting.unique()}, usual


def without_doubles(entries):
    """The finished entries, one of each setting, seed and seed of fine-tuning; and {run: why it is not among them}."""
    entries, key = entries[entries.finished.astype(bool)], ["setting", "seed", "tuning_seed"]
    first = entries.groupby(key, dropna=False).run.transform("first")
    twice = entries[entries.run != first]
    return entries.drop(twice.index), {twice.run[i]: f"same setting and seed as {first[i]}" for i in twice.index}


def pick_baseline(asked, values):
    """The setting named `asked`, else the one with all of its words and the fewest others; without `asked`, the first.

    Args:
        values: {setting: {name: value}} of what varies, also of what labels leave out.

    Raises:
        UserError: there is none, or there are several.
    """
    asked = " ".join(asked or [next(iter(values))])
    if asked in values:
        return asked
    fitting = [s for s in values if all(is_written(w, values[s]) or w in s.split() for w in asked.split())]
    counts = [0 if setting == AS_MOST else len(setting.split()) for setting in fitting]
    if counts.count(min(counts, default=0)) != 1:
        found = f"{len(fitting)} settings" if fitting else "no setting"
        raise UserError(f"--baseline {asked} fits {found}; there are: {', '.join(values)}.")
    return fitting[counts.index(min(counts))]
