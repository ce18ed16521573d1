"""The files of runs, read: a run is a record, read once; tables of numbers as CSV.

engine/run.py writes config.json, metrics.csv and the .pt files of a run, evaluate_features.py its features.
"""

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError

PARENT = dict.fromkeys(("name", "digest", "settings"))  # of the model that a run starts from


class Record(NamedTuple):
    """A run as it lies on disk, read once."""

    directory: Path
    kind: str  # "mae" or "classifier"
    name: str
    settings: dict  # what is computed: {flag: value}
    parent: dict | None  # of the model that it starts from: name, digest, settings
    facts: dict  # what follows from the settings and the images
    starts: list  # one for each time that it was started or continued
    finished: bool
    metrics: list  # of {column: number}, an epoch each
    features: list  # what evaluate_features.py wrote in the run's directory, a file each


def find_runs(*directories):
    """[Record, ...] of all runs in and below some directories, each once, sorted by path.

    Raises:
        UserError: one of the directories is not there, or a file of a run cannot be read.
    """
    found = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise UserError(f"No directory {directory}.")
        for path in directory.rglob("config.json"):
            found.setdefault(path.parent.resolve(), path.parent)
    records = (record_of(directory, read_config(directory)) for directory in sorted(found.values()))
    return [record for record in records if record]


def read_run(directory):
    """The Record of a run directory.

    Raises:
        UserError: there is none, or one of its files cannot be read.
    """
    if (record := record_of(Path(directory), read_config(directory))) is None:
        raise UserError(f"{Path(directory) / 'config.json'} is not a run's; name a run's directory.")
    return record


def record_of(directory, config):
    """The Record of a directory; None if its config.json, `config`, is not a run's but, say, an exported model's."""
    if not isinstance(config, dict) or not {"kind", "name", "finished", "settings"} <= config.keys():
        return None
    fields = {name: config.get(name) for name in ("kind", "name", "settings", "parent", "facts", "starts", "finished")}
    parts = fields["settings"], fields["facts"], fields["parent"] or PARENT, *(fields["starts"] or [None])
    if not all(isinstance(part, dict) for part in parts) or not PARENT.keys() <= parts[2].keys():
        path = directory / "config.json"
        wrong = "settings, facts, parent or starts are not what a run writes"
        raise UserError(f"{path} is damaged: {wrong}. Copy the file again, or start again (--overwrite).")
    features = [read_json(path) for path in sorted(directory.glob("*features*.json"))]
    features = [stored for stored in features if "rows" in stored and stored.get("name") == config["name"]]
    features = [stored for stored in features if not stored["settings"].get("img_size")]  # of another task
    return Record(directory, **fields, metrics=read_metrics(directory), features=features)


def read_config(directory):
    """config.json of a run directory: kind, name, finished, settings, parent, facts and starts."""
    return read_json(Path(directory) / "config.json")


def read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no {path.name}. Name a run's directory, such as logs/pretrain/<run>."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Copy the file again, or make it again (--overwrite).") from error


def read_metrics(directory):
    """metrics.csv of a run directory: a list of one dictionary of floats an epoch; epoch is an int, from 1."""
    path = Path(directory) / "metrics.csv"
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return [{"epoch": int(row.pop("epoch")), **{name: float(value) for name, value in row.items()}} for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error!r}. Copy the file again, or start again (--overwrite).") from error


def csv_text(rows):
    """Rows {column: value} as CSV; nan where a row lacks a column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), "nan", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
