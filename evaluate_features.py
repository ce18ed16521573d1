"""Measure what a frozen encoder knows about the classes: k-NN and a linear probe on its features, by block.

python evaluate_features.py --model_path logs/pretrain/<run>
python evaluate_features.py --model_path logs/pretrain/<run> --layers all --untrained
python evaluate_features.py --model_path logs/pretrain/<run> logs/classifier/<run> --pool mean --train_images 1000

The table is also written beside each model: features.csv, features.json (with all settings) and, for --layers all,
features.png. The same command again skips what is measured. The test images are used once a row, to measure; the
probe's weight decay is chosen on training images.
"""

import argparse
import contextlib
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

import utils
from engine.checkpoints import digest, load_model
from engine.device import autocast, environment, generator, peak_memory_mb, pick_device, pick_precision, tune
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.features import FROZEN_MEASURES, POOLS, extract_features, knn_predict, linear_probe
from engine.figures import draw_blocks, save
from engine.files import replacing
from engine.run import csv_text
from images import data
from model import MAE_ViT, ViT_Classifier

BATCH = {"cuda": 1000, "cpu": 100, "mps": 100}  # images at once; on a CPU 250 are slower
CACHE_BYTES = 1200 * 10**6  # of features at once, at least one block's; the default model's 12 blocks fit
COLUMNS = "{encoder:10} {layer:>5} {pool:>5} {knn/acc:>8} {linear/acc:>8} {linear/weight_decay:>13} {seconds:>8}"
HEADER = {
    "encoder": "encoder",
    "layer": "block",
    "pool": "pool",
    "knn/acc": "k-NN",
    "linear/acc": "linear",
    "linear/weight_decay": "weight decay",
    "seconds": "seconds",
}


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    group = parser.add_argument_group("features")
    group.add_argument(
        "--model_path", nargs="+", required=True, help="model.pt or run directory, of MAEs or classifiers"
    )
    group.add_argument("--layers", choices=("last", "all"), default="last", help="after which blocks")
    group.add_argument(
        "--pool", nargs="+", choices=POOLS, default=list(POOLS), help="the cls token, the mean of the patches' tokens"
    )
    group.add_argument("--untrained", action="store_true", help="measure the same encoder with fresh weights, too")
    group = parser.add_argument_group("images")
    group.add_argument("--dataset", choices=data.DATASETS, help="default: the one the model was trained on")
    group.add_argument("--data_dir", help="default: as in its training")
    group.add_argument(
        "--train_images",
        type=utils.positive_int,
        help="number of labelled images, the same number of each class; default: all",
    )
    group = parser.add_argument_group("run")
    utils.add_device_arguments(group, "which training images are held out; the untrained encoder's weights")
    group.add_argument("--overwrite", action="store_true", help="measure again what is measured already")
    group.add_argument("--save", help="also write the features, labels and class names to this .npz file")
    return parser.parse_args(argv)


def measure(features, labels, queries, query_labels, num_classes, seed):
    """k-NN and linear probe of training features (N, D) on test features (Q, D): their part of a row of the table."""
    started = time.monotonic()
    neighbours = knn_predict(features, labels, queries, num_classes)
    knn_acc = (neighbours == query_labels).cpu().double().mean().item()  # waits for the device
    halfway = time.monotonic()
    held_out = generator("cpu", seed, "held out")
    predicted, weight_decay = linear_probe(features, labels, queries, num_classes, held_out)
    linear_acc = (predicted == query_labels).cpu().double().mean().item()
    return {
        "knn/acc": knn_acc,
        "linear/acc": linear_acc,
        "linear/weight_decay": weight_decay,
        "knn/seconds": halfway - started,
        "linear/seconds": time.monotonic() - halfway,
    }


def in_passes(layers, layer_bytes):
    """The blocks in groups whose features fit into CACHE_BYTES; the images pass the encoder once for each group."""
    at_once = max(1, CACHE_BYTES // layer_bytes)
    return [layers[start : start + at_once] for start in range(0, len(layers), at_once)]


def rows_of(encoder, train, test, args, precision, add):
    """Yield a row of the table for each block and pool.

    Args:
        encoder: on the device; train, test: ImageSets, anywhere.
        add: takes a name and an array, for each set of features.
    """
    device, depth = encoder.cls_token.device, len(encoder.transformer)
    layers = list(range(1, depth + 1)) if args.layers == "all" else [depth]
    layer_bytes = 4 * (len(train.images) + len(test.images)) * encoder.cls_token.shape[-1] * len(args.pool)
    train_labels, test_labels = train.labels.to(device), test.labels.to(device)

    def features_of(images, layers):
        with autocast(precision, device):
            return extract_features(
                encoder, images, lambda part: data.normalize(part.to(device)), layers, args.pool, BATCH[device.type]
            )

    for group in in_passes(layers, layer_bytes):
        train_features, test_features = features_of(train.images, group), features_of(test.images, group)
        for (layer, pool), features in train_features.items():
            queries = test_features[layer, pool]
            add(f"train_{pool}_{layer}", features)
            add(f"test_{pool}_{layer}", queries)
            scores = measure(features, train_labels, queries, test_labels, len(train.classes), args.seed)
            yield {"layer": layer, "pool": pool, **scores}


@contextlib.contextmanager
def npz_file(path):
    """Yields a function (name, array) that adds to a new .npz file, written whole or not at all; no path: to none."""
    if path is None:
        yield ignore
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:

        def add(name, array):
            array = array.cpu() if isinstance(array, torch.Tensor) else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)

        yield add


def ignore(name, array):
    pass


def print_row(row):
    shown = {name: f"{row[name]:.2%}" for name in ("knn/acc", "linear/acc")}
    print(COLUMNS.format(**row | shown, seconds=f"{row['knn/seconds'] + row['linear/seconds']:.1f}"), flush=True)


def draw_layers(rows, title):
    """Accuracy of the linear probe and of k-NN by block, a line for each encoder and pool: a figure."""
    measures = {}
    for measure, name in FROZEN_MEASURES.items():
        lines = {}
        for row in rows:
            lines.setdefault(f"{row['encoder']}, {row['pool']}", {})[row["layer"]] = row[name]
        measures[measure] = [(label, list(line), [list(line.values())]) for label, line in lines.items()]
    figure = draw_blocks(measures)
    figure.suptitle(title, fontsize=10)
    return figure


def place_of(path, args):
    """The path of the table, without its ending: beside the model, named by the file's stem (a run directory has none)
    and what was asked for.
    """
    directory, stem = (path, []) if path.is_dir() else (path.parent, [path.stem])
    return directory / "_".join([*stem, "features", *(str(part) for part in (args.dataset, args.train_images) if part)])


def measured_already(place, facts, args):
    """Whether the stored table has these facts, the model's digest among them, and all rows that are asked for.

    Raises:
        UserError: the stored file cannot be read.
    """
    path = place.with_name(f"{place.name}.json")
    if not path.exists():
        return False
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"Cannot read {path}: {error}. Delete it, or measure again (--overwrite).") from error
    if not facts.items() <= stored.items():
        return False
    had = argparse.Namespace(**stored["arguments"])
    has_rows = had.layers in ("all", args.layers) and {*args.pool} <= {*had.pool} and had.untrained >= args.untrained
    return has_rows and (had.train_images, had.seed) == (args.train_images, args.seed)


def write_files(place, rows, facts, args):
    """Write the table and its picture; the .json last, as it says that all is there."""
    with replacing(place.with_name(f"{place.name}.csv")) as file:
        file.write(csv_text(rows, header=True).encode())
    picture = place.with_name(f"{place.name}.png")
    picture.unlink(missing_ok=True)  # of an earlier table
    if args.layers == "all":
        save(draw_layers(rows, facts["name"]), picture)
    with replacing(place.with_name(f"{place.name}.json")) as file:
        file.write(json.dumps({**facts, "rows": rows}, indent=1).encode())
    print(f"{place}.csv")


def evaluate(path, model, content, args):
    """Measure one model, if that is not done already: print its table row by row, and write its files."""
    started, device, model_args = time.monotonic(), pick_device(args.device), content["model_args"]
    precision = pick_precision(args.precision, device, model_args["embed_dim"])
    dataset, data_dir = args.dataset or content["dataset"], args.data_dir or content["data_dir"]
    place = place_of(path, args)
    facts = {"name": content["run_name"], "kind": content["kind"], "model_digest": digest(content["model"])}
    train, test = data.load_dataset(dataset, data_dir, model_args["img_size"], args.train_images)
    facts |= {"dataset": dataset, "images": train.digest(), "test_set": test.digest(), "precision": precision}
    if not (args.overwrite or args.save) and measured_already(place, facts, args):
        print(f"Measured already: {place}.csv")
        return
    models = {"trained": model}
    if args.untrained:
        torch.manual_seed(args.seed)
        models["untrained"] = type(model)(**model_args)
    print(f"{content['run_name']}, {len(train.images):,} training and {len(test.images):,} test images")
    print(COLUMNS.format(**HEADER))
    rows = []
    with npz_file(args.save) as add:
        for name, model in models.items():
            encoder = getattr(model, "encoder", model).to(device).eval()  # a MAE's; a classifier is one
            tune(encoder, device, precision, len(encoder.pos_embedding))
            for row in rows_of(encoder, train, test, args, precision, add if name == "trained" else ignore):
                rows.append({"encoder": name, **row})
                print_row(rows[-1])
        for name, array in (("train_labels", train.labels), ("test_labels", test.labels), ("classes", train.classes)):
            add(name, array)
    facts |= {"arguments": vars(args), "model_args": model_args, "data_dir": data_dir}
    facts |= {"train_images": len(train.images), "test_images": len(test.images)}
    facts |= {"device": device.type, "seconds": time.monotonic() - started}
    facts |= {"memory/peak_mb": peak_memory_mb(device), **environment(device)}
    write_files(place, rows, facts, args)


def main(argv=None):
    args = parse_args(argv)
    with exit_in_one_line(), as_user_error(OSError):
        if args.save and len(args.model_path) > 1:
            raise UserError(f"--save takes the features of one model; --model_path names {len(args.model_path)}.")
        models = [load_model(path, MAE_ViT, ViT_Classifier) for path in args.model_path]  # all, before any is measured
        for path, (model, content) in zip(args.model_path, models, strict=True):
            evaluate(Path(path), model, content, args)


if __name__ == "__main__":
    main()
