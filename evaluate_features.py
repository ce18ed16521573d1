"""Measure what a frozen encoder knows about the classes: k-NN and a linear probe on its features, by block.

python evaluate_features.py --model_path logs/pretrain/<run>
python evaluate_features.py --model_path logs/pretrain/<run> --layers all --untrained
python evaluate_features.py --model_path logs/pretrain/<run> logs/classifier/<run> --pool mean --train_images 1000

The table is also written beside each model, or to --output: features.csv, features.json (with all settings) and, for
--layers all, features.png. The same command again skips what is measured. The test images are used once a row, to
measure; the probe's weight decay is chosen on training images.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch

import utils
from engine.device import autocast, environment, generator, peak_memory_mb, pick_device, pick_precision, tune
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.features import FROZEN_MEASURES, POOLS, extract_features, knn_predict, linear_probe
from engine.figures import draw_blocks, save
from engine.files import check_writable, replacing
from engine.records import csv_text
from engine.weights import read_weights, say
from images.load import DATASETS, data_name, draw, load_dataset
from images.pixels import normalize
from model import MAE_ViT, ViT_Classifier

MODELS = {model.__name__: model for model in (MAE_ViT, ViT_Classifier)}
BATCH = {"cuda": 1000, "cpu": 100, "mps": 100}  # images at once; on a CPU 250 are slower
CACHE_BYTES = 1200 * 10**6  # of features at once, at least one block's; the default model's 12 blocks fit
HEADER = "encoder    block  pool     k-NN   linear  weight decay  seconds"
COLUMNS = "{encoder:10} {layer:>5} {pool:>5} {knn/acc:8.2%} {linear/acc:8.2%} {linear/weight_decay:>13} {seconds:8.1f}"


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    group = parser.add_argument_group("features")
    text = "runs or files; MAEs, classifiers, or weights of others"
    group.add_argument("--model_path", nargs="+", required=True, help=text)
    group.add_argument("--layers", choices=("last", "all"), default="last", help="after which blocks")
    text = "the cls token, the mean of the patches' tokens"
    group.add_argument("--pool", nargs="+", choices=POOLS, default=list(POOLS), help=text)
    group.add_argument("--untrained", action="store_true", help="measure the same encoder with fresh weights, too")
    text = "of the encoder, where a file from elsewhere does not tell it"
    group.add_argument("--num_heads", type=utils.positive_int, help=text)
    group = parser.add_argument_group("images")
    group.add_argument("--dataset", choices=DATASETS, help="default: the one the model was trained on")
    group.add_argument("--data_dir", help="default: as in its training")
    text = "another size than the model was trained on: its positions are resampled"
    group.add_argument("--img_size", type=utils.positive_int, help=text)
    labels = "number of labelled images, drawn as train_classifier.py does; default: all"
    group.add_argument("--train_images", type=utils.positive_int, help=labels)
    utils.add_label_seed(group)
    group = parser.add_argument_group("run")
    utils.add_device_arguments(group, "which training images are taken and held out; the untrained encoder's weights")
    group.add_argument("--overwrite", action="store_true", help="measure again what is measured already")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, help="directory for the table of one model; default: beside the model")
    group.add_argument("--save", type=Path, help="also write its features, labels and class names to this .npz file")
    args = parser.parse_args(argv)
    if len(args.model_path) > 1 and (args.output or args.save):
        parser.error(f"--output and --save are for one model; --model_path names {len(args.model_path)}")
    return args


def frozen_accuracies(features, labels, queries, query_labels, num_classes, seed):
    """k-NN and linear probe of training features (N, D) on test features (Q, D): their part of a row of the table."""
    started, labels = time.monotonic(), labels.to(features.device)
    neighbours = knn_predict(features, labels, queries, num_classes).cpu()  # waits for the device
    halfway = time.monotonic()
    predicted, weight_decay = linear_probe(features, labels, queries, num_classes, generator("cpu", seed, "held out"))
    return {
        "knn/acc": (neighbours == query_labels).double().mean().item(),
        "linear/acc": (predicted.cpu() == query_labels).double().mean().item(),
        "linear/weight_decay": weight_decay,
        "knn/seconds": halfway - started,
        "linear/seconds": time.monotonic() - halfway,
    }


def measure_encoder(encoder, train, test, args, precision):
    """For each block and pool, yield (row of the table, training features (N, D), test features (Q, D)).

    The images pass through the encoder once for each group of blocks whose features fit into CACHE_BYTES.

    Args:
        encoder: on the device; train, test: ImageSets, on any device.
    """
    device, depth = encoder.cls_token.device, len(encoder.transformer)
    layers = list(range(1, depth + 1)) if args.layers == "all" else [depth]
    layer_bytes = 4 * (len(train.images) + len(test.images)) * encoder.cls_token.shape[-1] * len(args.pool)
    at_once, batch_size = max(1, CACHE_BYTES // layer_bytes), BATCH[device.type]

    def features_of(images, layers):
        with autocast(precision, device):
            return extract_features(encoder, images, lambda x: normalize(x.to(device)), layers, args.pool, batch_size)

    for start in range(0, len(layers), at_once):
        part = layers[start : start + at_once]
        train_features, test_features = features_of(train.images, part), features_of(test.images, part)
        for (layer, pool), features in train_features.items():
            queries = test_features[layer, pool]
            scores = frozen_accuracies(features, train.labels, queries, test.labels, len(train.classes), args.seed)
            yield {"layer": layer, "pool": pool, **scores}, features, queries


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


def table_path(path, args):
    """The path of the table, without suffix: in --output or beside the model. Its name has the stem of the model's file
    (not for a run directory), and the data set, number of images, label seed and image size that were given.
    """
    directory, stem = (path, []) if path.is_dir() else (path.parent, [path.stem])
    size, drawn = args.img_size and f"i{args.img_size}", args.label_seed is not None and f"draw{args.label_seed}"
    asked = (str(part) for part in (args.dataset, args.train_images, drawn, size) if part)
    name = "_".join([*stem, "features", *asked])
    return (args.output or directory) / name


def measured_already(place, settings, facts):
    """Whether the stored table has these facts, the model's digest among them, and all rows that are asked for.

    Raises:
        UserError: the stored file cannot be read.
    """
    path = place.with_name(f"{place.name}.json")
    if not path.exists():
        return False
    try:
        stored = json.loads(path.read_text())
        had = stored["settings"]
        covers = had["layers"] in ("all", settings["layers"]) and {*settings["pool"]} <= {*had["pool"]}
        covers = covers and had["untrained"] >= settings["untrained"]
        return covers and had["seed"] == settings["seed"] and facts.items() <= stored.items()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error!r}. Delete it, or measure again (--overwrite).") from error


def write_table(place, rows, facts, by_block):
    """Write the table and, by block, its picture; the .json last, because it says that all is there."""
    with replacing(place.with_name(f"{place.name}.csv")) as file:
        file.write(csv_text(rows).encode())
    picture = place.with_name(f"{place.name}.png")
    picture.unlink(missing_ok=True)  # of an earlier table
    if by_block:
        save(draw_layers(rows, facts["name"]), picture)
    with replacing(place.with_name(f"{place.name}.json")) as file:
        file.write(json.dumps({**facts, "rows": rows}, indent=1).encode())
    print(f"{place}.csv")


def measure_model(path, content, args):
    """Measure what `read_weights` gave, if that is not done: print its table row by row, and write its files."""
    started, device, model_args = time.monotonic(), pick_device(args.device), content["model_args"]
    precision = pick_precision(args.precision, device, model_args["embed_dim"])
    dataset, data_dir = (getattr(args, name) or content.get(name, v) for name, v in utils.DATA_DEFAULTS.items())
    train, test = load_dataset(dataset, data_dir, model_args["img_size"], in_chans=model_args.get("in_chans", 3))
    train, _ = draw(train, args.train_images, utils.label_seed(args))
    names = ("train_images", "label_seed", "layers", "pool", "untrained", "seed", "img_size")
    settings = {"dataset": data_name(dataset, data_dir), **{name: getattr(args, name) for name in names}}
    facts = {"name": content["name"], "kind": content["kind"], "model_digest": content["digest"]}
    facts |= {"model_args": model_args}  # of which the weights alone do not tell num_heads and norm_eps
    facts |= {"images": train.digest(), "test_set": test.digest(), "precision": precision}
    place = table_path(path, args)
    if not (args.overwrite or args.save) and measured_already(place, settings, facts):
        print(f"Measured already: {place}.csv")
        return
    for directory in (place.parent, *([args.save.parent] if args.save else [])):
        check_writable(directory, "--output")

    torch.manual_seed(args.seed)
    names = ("untrained", "trained") if args.untrained else ("trained",)  # in the order in which they draw weights
    models = {name: MODELS[content["kind"]](**model_args) for name in names}
    models["trained"].load_state_dict(content["model"], strict=False)  # weights from elsewhere have no decoder
    say(content)
    print(f"{content['name']}, {len(train.images):,} training and {len(test.images):,} test images", HEADER, sep="\n")
    rows, arrays = [], {"train_labels": train.labels, "test_labels": test.labels, "classes": train.classes}
    for name, model in reversed(models.items()):
        encoder = getattr(model, "encoder", model).to(device).eval()  # a MAE's; a classifier is one
        tune(encoder, device, precision, len(encoder.pos_embedding))
        for row, features, queries in measure_encoder(encoder, train, test, args, precision):
            rows.append({"encoder": name, **row})
            print(COLUMNS.format(**rows[-1], seconds=row["knn/seconds"] + row["linear/seconds"]), flush=True)
            if args.save and name == "trained":
                which = f"{row['pool']}_{row['layer']}"
                arrays |= {f"train_{which}": features.cpu(), f"test_{which}": queries.cpu()}
    if args.save:
        with replacing(args.save) as file:
            np.savez(file, **arrays)
    facts |= {"settings": settings, "data_dir": data_dir}
    facts |= {"train_images": len(train.images), "test_images": len(test.images)}
    facts |= {"seconds": time.monotonic() - started, "memory/peak_mb": peak_memory_mb(device), **environment(device)}
    write_table(place, rows, facts, by_block=args.layers == "all")


def main(argv=None):
    args = parse_args(argv)
    with exit_in_one_line(), as_user_error(OSError):
        kinds, sizes = MODELS.values(), {"img_size": args.img_size, "num_heads": args.num_heads}
        contents = [read_weights(path, *kinds, sizes=sizes) for path in args.model_path]  # all, before one is measured
        for path, content in zip(args.model_path, contents, strict=True):
            measure_model(Path(path), content, args)


if __name__ == "__main__":
    main()
