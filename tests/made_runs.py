"""Runs on disk, written by hand with known numbers: what scripts.results, compare, report and plot_curves read."""

import functools
import json
import math
import operator
from pathlib import Path

from engine.records import csv_text

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "encoder_depth": 2, "num_heads": 2}
DATA = {"dataset": "shapes", "train_images": None, "augment": "none"}
MAE = {**DATA, **SIZES, "decoder_depth": 4, "decoder_embed_dim": None, "positions": "learned", "norm_pix_loss": False}
MAE |= {"mask_ratio": 0.75, "mask_strategy": "random", "warmup_epoch": None, "base_learning_rate": 1.5e-4}
CLASSIFIER = {**DATA, **SIZES, "val_images": None, "pool": "cls", "base_learning_rate": 1e-3}
START = {
    "command": "python x.py",
    "python": "3",
    "torch": "2",
    "timm": "1",
    "commit": None,
    "clean": True,
    "threads": 1,
}
START |= {"processor": "CPU", "arguments": {"dataset": "shapes", "data_dir": "data", "log_dir": "logs"}}
STEPS = {"seconds": 6, "speed/images_per_sec": 9, "memory/peak_mb": 7}


def write_run(directory, kind, settings, rows, parent=None, finished=True, **facts):
    """A run's config.json and metrics.csv: epochs 1, 2, ... of rows; its directory."""
    facts = {"parameters": 5, "precision": "float32", "images": "ab", "test_set": "cd", **facts}
    config = {"kind": kind, "name": directory.name, "finished": finished, "settings": settings, "parent": parent}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**config, "facts": facts, "starts": [START]}))
    rows = [{"epoch": epoch, **STEPS, **row} for epoch, row in enumerate(rows, start=1)]
    (directory / "metrics.csv").write_text(csv_text(rows))
    return directory


def make_mae(seed, root="runs", finished=True, end="", loss=1, facts=None, **settings):
    """A MAE of three epochs; end: of its name, to tell it from others; its directory."""
    settings = {**MAE, "total_epoch": 3, **settings, "seed": seed}
    words = [f"d{settings['decoder_depth']}", settings["mask_strategy"], f"r{settings['mask_ratio']}", end, f"s{seed}"]
    rows = [{"train/loss": loss, "probe/knn_acc": acc} for acc in (0.11, math.nan, 0.12)]
    rows = rows if finished else rows[:1]
    directory = Path(root, "pretrain", "_".join(["mae", *filter(None, words)]))
    return write_run(directory, "mae", settings, rows, finished=finished, **facts or {})


def parent_of(mae):
    config = json.loads((mae / "config.json").read_text())
    return {"name": config["name"], "digest": f"digest of {config['name']}", "settings": config["settings"]}


def make_classifier(
    seed, mae=None, accuracy=0.5, root="runs", finished=True, end="", first=None, facts=None, **settings
):
    """A classifier of two epochs, from a MAE's directory or from scratch; first: other numbers of its first epoch."""
    parent = parent_of(mae) if mae else None
    name = "_".join(filter(None, ["cls", end, f"s{seed}", f"from_{parent['name']}" if mae else "scratch"]))
    rows = [{"train/loss": 1, "test/loss": 2 - acc, "test/acc": acc} for acc in (0.1, accuracy)]
    rows = [row | {"test/acc_mean_of_batches": row["test/acc"] + 0.001} for row in rows]
    rows[0] |= first or {}
    settings = {**CLASSIFIER, "total_epoch": 2, **settings, "seed": seed}
    directory, rows = Path(root, "classifier", name), rows if finished else rows[:1]
    return write_run(directory, "classifier", settings, rows, parent, finished, **facts or {})


def make_pair(seed, accuracy=0.5, tuned=None, **settings):
    """A MAE with these settings and a classifier from it, with `tuned` ones; the classifier's directory."""
    return make_classifier(seed, make_mae(seed, **settings), accuracy, root=settings.get("root", "runs"), **tuned or {})


def make_features(mae, linear, knn, train_images=None, layers=(1, 2), **changes):
    """What evaluate_features.py writes beside a MAE, on so many labels: these after the last block, 0.9 before."""
    name, config = f"features_{train_images}" if train_images else "features", parent_of(mae)
    shown = [(e, layer, pool) for e in ("trained", "untrained") for layer in layers for pool in ("mean", "cls")]
    rows = []
    for encoder, layer, pool in shown:
        scores = (linear, knn) if layer == max(layers) else (0.9, 0.9)
        scores = scores if (encoder, pool) == ("trained", "mean") else (0.01, 0.01)
        rows.append({"encoder": encoder, "layer": layer, "pool": pool, "linear/acc": scores[0], "knn/acc": scores[1]})
    settings = {"dataset": config["settings"]["dataset"], "train_images": train_images, "layers": "all", "seed": 42}
    stored = {"name": config["name"], "kind": "MAE_ViT", "model_digest": config["digest"], "settings": settings}
    stored |= {**START, "command": "python evaluate_features.py", "seconds": 60, **changes, "rows": rows}
    (mae / f"{name}.json").write_text(json.dumps(stored))
    (mae / f"{name}.csv").write_text(csv_text(rows))
    return mae / f"{name}.json"


def change(run, *parts, **values):
    """Write other values into config.json, or into one of its parts."""
    config = json.loads((run / "config.json").read_text())
    functools.reduce(operator.getitem, [part for part in parts if part is not None], config).update(values)
    (run / "config.json").write_text(json.dumps(config))
