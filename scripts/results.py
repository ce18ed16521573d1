"""All runs of some directories as one table, a row a run, and what can be measured of a run.

In a notebook that was started in the root of the repository:

    from scripts.results import table
    runs = table("logs/ablation")
    runs[runs.kind == "classifier"].groupby(["mae/mask_strategy", "mae/decoder_depth"])["test/acc"].agg(["mean", "std"])
"""

import collections
from typing import NamedTuple

import pandas as pd

import mae_pretrain
import train_classifier
import utils
from engine.errors import UserError
from engine.records import find_runs
from model import ViT_Classifier

NONE = {"train_images": "all", "warmup_epoch": "default"}  # what None stands for; elsewhere "none"
FACTS = ("precision", "images", "test_set", "masks")  # that tell runs apart as settings do
ABOUT = ("kind", "name", "finished", "epochs", "minutes", "parameters", "mae", "seed")  # no settings


class Measure(NamedTuple):
    """What a run is judged by: a column of the table.

    Args:
        kind: whose it is: of a "classifier", of a "mae", or of the "features" of a MAE's frozen encoder.
        percent: it is a share, shown in %.
    """

    column: str
    kind: str
    percent: bool = True


MEASURES = {
    "fine-tuned": Measure("test/acc", "classifier"),
    "balanced accuracy": Measure("test/balanced_acc", "classifier"),
    "linear probe": Measure("linear/acc", "features"),
    "k-NN": Measure("knn/acc", "features"),
    "k-NN while pretraining": Measure("probe/knn_acc", "mae"),
    "test loss": Measure("test/loss", "classifier", percent=False),
    "MAE training loss": Measure("train/loss", "mae", percent=False),
}


def table(*directories):
    """A row for each run in and below some directories.

    Columns:
        ABOUT: kind ("mae" or "classifier"), name, seed, finished, epochs that are done, minutes in training steps, ...;
            mae: the run, a row of this table, that a classifier's encoder comes from.
        settings and FACTS: as on the command line; mae/...: those of a classifier's MAE, here or not (dtype object).
        metrics: as in metrics.csv, of the last epoch: at it, or, with --val_images, at the epoch chosen on those.
        frozen features: linear/acc, knn/acc, ... as in features.csv, after the last block, mean of the patches' tokens;
            those on fewer labels, such as 1000, as linear/acc@1000.

    Raises:
        UserError: a directory is not there, a file cannot be read, or features are of another MAE than a classifier
            whose encoder should be the same.
    """
    return table_of(find_runs(*directories))


def table_of(records):
    """The same of Records."""
    maes = [record for record in records if record.kind == "mae"]
    complete = {"mae": completer(mae_pretrain, maes)}
    complete["classifier"] = completer(train_classifier, [record for record in records if record.kind != "mae"])
    rows = {}
    for record in records:
        parent = record.parent if record.kind == "classifier" else None
        mae = mae_of(record, maes) if parent else None
        row = {"kind": record.kind, "name": record.name, "seed": record.settings["seed"], "finished": record.finished}
        row |= {"epochs": len(record.metrics), "minutes": sum(row["seconds"] for row in record.metrics) / 60}
        row |= {"parameters": record.facts.get("parameters"), "mae": str(mae.directory) if mae else None}
        row |= complete[record.kind](record.settings)
        row |= {name: record.facts[name] for name in FACTS if name in record.facts}
        if parent:
            ours = parent.get("layout", "ours") == "ours"
            weights = {"weights": f"{parent['name']} {parent['digest']}"}  # whose settings nobody knows
            settings = complete["mae"](parent["settings"]) if ours else parent["settings"] | weights
            row |= {f"mae/{name}": value for name, value in settings.items()}
        numbers = {name: value for name, value in (record.metrics or [{}])[-1].items() if name != "epoch"}
        rows[str(record.directory)] = row, numbers | frozen(record)
    names = pd.Index(rows, name="directory")
    about = pd.DataFrame([row for row, _ in rows.values()], names, dtype=object)  # so that no number becomes a float
    about = about.astype({"finished": bool, "epochs": int, "minutes": float, "parameters": float})
    return about.join(pd.DataFrame([numbers for _, numbers in rows.values()], names, dtype=float))


def completer(script, records):
    """A function that completes settings: flags that only others of these records have get their defaults.

    A word replaces None, which would count as a missing value.
    """
    defaults = vars(utils.fill_in(script.parse_args([]), utils.defaults(ViT_Classifier)))
    known = dict.fromkeys(name for record in records for name in record.settings)

    def complete(settings):
        found = settings | {name: defaults.get(name) for name in known if name not in settings}
        return {name: NONE.get(name, "none") if value is None else value for name, value in found.items()}

    return complete


def mae_of(classifier, maes):
    """The finished run among `maes` that a classifier's encoder comes from, preferably of the same sweep; or None."""
    parent = classifier.parent
    found = [mae for mae in maes if (mae.name, mae.settings) == (parent["name"], parent["settings"]) and mae.finished]
    found.sort(key=lambda mae: mae.directory.parents[1:2] != classifier.directory.parents[1:2])
    for stored in found[0].features if found else ():
        if parent["digest"] not in (None, stored["model_digest"]):
            raise UserError(
                f"The features in {found[0].directory} are of another MAE (digest {stored['model_digest']}) than the "
                f"encoder of {classifier.directory} (digest {parent['digest']}). Train the classifier or measure the "
                f"features again (--overwrite), or move them away."
            )
    return found[0] if found else None


def frozen(record):
    """{column: value} of a MAE's stored features on its own images, on each number of labels those with most rows."""
    found = {}
    for stored in sorted(record.features, key=lambda stored: len(stored["rows"])):
        rows = by_block(stored)
        if record.kind == "mae" and rows and stored["settings"]["dataset"] == record.settings["dataset"]:
            labels = stored["settings"]["train_images"]
            found |= {f"{name}@{labels}" if labels else name: value for name, value in rows[max(rows)].items()}
    return {name: value for name, value in found.items() if "/" in name}


def by_block(stored):
    """{encoder block, from 1: {column: value}} of stored features: a trained encoder's, mean of the patches' tokens."""
    rows = [row for row in stored["rows"] if (row["encoder"], row["pool"]) == ("trained", "mean")]
    return {row["layer"]: row for row in rows}


def origins(records, entries, least=2):
    """Lines on the commits, versions and machines of the entries' runs; each only if there are at least `least`."""
    told = {
        "Commits": lambda start: f"{str(start['commit'])[:7]}{changes(start)}",
        "Versions": lambda start: "Python {python}, PyTorch {torch}, timm {timm}".format(**start),
        "Machines": lambda start: "{processor}, threads of a run: {threads}".format(**start),
    }
    used = [records[run] for run in entries[["mae", "classifier"]].melt().value.dropna().unique()]
    lines = []
    for what, of in told.items():
        values = [value for record in used for value in {of(start) for start in record.starts + record.features}]
        counts = collections.Counter(sorted(values))
        runs = "; ".join(f"{value} ({n} run{'s' if n > 1 else ''})" for value, n in counts.items())
        lines += [f"{what}: {runs}."] if len(counts) >= least else []
    return lines


def changes(start):
    """Words for uncommitted changes at a start, with the digest of the source; empty if there were none."""
    return "" if start["clean"] in (True, None) else f" with changes {start.get('source') or ''}".rstrip()


def common_accuracy(tables):
    """The accuracy column that all these tables have: on held-out images, on the test images, by k-NN, or None."""
    names = ("val/acc", "test/acc", "probe/knn_acc")
    return next((name for name in names if all(name in table[0] for table in tables if table)), None)


def markdown_table(frame):
    """A DataFrame in Markdown; cells are written as str() does."""
    lines = ["", *frame.columns], ["---"] * (1 + len(frame.columns)), *frame.reset_index().values.tolist()
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
