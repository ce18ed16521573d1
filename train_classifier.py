"""Train the encoder as a classifier, from a pretrained MAE or from scratch.

    python train_classifier.py --pretrained_model_path logs/pretrain/<run>
    python train_classifier.py

End-to-end fine-tuning (He et al. 2021, arXiv:2111.06377, section 4), at CIFAR size.
"""

import argparse
import functools
import math

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

import augmentation
import data
import processes
import training
import utils
from checkpoints import digest, load_model
from errors import UserError, exit_in_one_line
from model import MAE_ViT, ViT_Classifier, drop_path_scales
from runs import Run, read_metrics

SIZE = ("img_size", "patch_size", "embed_dim", "encoder_depth", "num_heads")
WARMUP = 0.05  # of all epochs
DEVICE_BATCH_SIZE = {"cuda": 256, "cpu": 128, "mps": 128}  # images at once on a device
EVAL_BATCH = 500  # images whose losses are summed at once
REPORT_BATCH = 128  # the course report averages the accuracies of batches of so many
# Recipes for --preset: values of flags by name. What a row leaves out is as in the first.
PRESETS = {
    "reference": {
        "total_epoch": 100,
        "batch_size": 128,
        "base_learning_rate": 1e-3,
        "optimizer": "adamw",
        "augment": False,
        "pool": "cls",
        "decay_matrices_only": False,
        "layer_decay": 1.0,
        "clip_grad": 0.0,
        "drop_path": 0.0,
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    },
    "strong": {"augment": True, "pool": "mean"},  # wins in 30 epochs: logs/report/RESULTS.md
    "official": {  # after the official MAE's fine-tuning (He et al. 2021, table 9), for long training
        "augment": True,
        "pool": "mean",
        "decay_matrices_only": True,
        "layer_decay": 0.75,
        "drop_path": 0.1,
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
}
IN_NAME = {  # what a run's name says of a flag, if its value is not the preset's
    "augment": "aug",
    "pool": "pool",
    "decay_matrices_only": "matrices",
    "layer_decay": "ld",
    "clip_grad": "clip",
    "drop_path": "dp",
    "label_smoothing": "ls",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "optimizer": "",
}
NOT_TESTED = dict.fromkeys(("test/loss", "test/acc", "test/acc_mean_of_batches", "chosen_epoch"), math.nan)


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    utils.add_data_arguments(parser, data.DATASETS, pretrained=True).add_argument(
        "--val_images",
        type=utils.positive_int,
        help="hold out so many training images, equally many of each class, keep the epoch that is best on them and "
        "test that one only; default: keep the last epoch, test after every epoch",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_path", help="model.pt or run directory of a MAE; default: from scratch")
    utils.add_size_arguments(group, SIZE, from_scratch=utils.defaults(ViT_Classifier))
    group.add_argument("--pool", choices=("cls", "mean"), help="what the head sees: the cls token or the patches' mean")
    group = utils.add_optimisation_arguments(parser, WARMUP, DEVICE_BATCH_SIZE, training.OPTIMIZERS)
    group.add_argument(
        "--decay_matrices_only",
        action=argparse.BooleanOptionalAction,
        help="no weight decay on biases, LayerNorms, the cls token and positions; else on every parameter",
    )
    group.add_argument(
        "--layer_decay",
        type=utils.fraction,
        help="a block's learning rate is this times the next one's; the embedding comes first, the head last; 1: off",
    )
    group.add_argument(
        "--clip_grad", type=utils.non_negative_float, help="largest norm of all gradients together; 0: off"
    )
    group = parser.add_argument_group("regularisation")
    group.add_argument(
        "--drop_path",
        type=utils.fraction,
        help="probability that an image skips the last block's attention or its MLP; smaller in earlier blocks",
    )
    group.add_argument("--label_smoothing", type=utils.fraction, help="share of a label spread evenly over all classes")
    alpha = "alpha of the Beta distribution of an image's share; 0: off"
    group.add_argument("--mixup", type=utils.non_negative_float, help=f"mix each image with another; {alpha}")
    group.add_argument(
        "--cutmix", type=utils.non_negative_float, help=f"the same with a rectangle; {alpha}; both: each step draws one"
    )
    utils.add_run_arguments(parser, log_dir="logs/classifier")
    parser.add_argument_group("output").add_argument(
        "--output_model_path", type=utils.file_path, help="copy the finished model.pt to this file"
    )
    utils.add_presets(parser, PRESETS, argv)
    return parser.parse_args(argv)


def run_name(args, encoder_name):
    """For example cls_cifar10_ep100_b128_s42_from_mae_..., or cls_cifar10_..._poolmean_scratch_i32_p2_w192_e12_h3.

    Args:
        encoder_name: the run the encoder comes from; None: from scratch.
    """
    size = "scratch_i{img_size}_p{patch_size}_w{embed_dim}_e{encoder_depth}_h{num_heads}".format(**vars(args))
    val = f"_val{args.val_images}" if args.val_images else ""
    name = f"cls_{data.name_of(args)}{val}_ep{args.total_epoch}_b{args.batch_size}_s{args.seed}"
    name += "" if args.preset == "reference" else f"_{args.preset}"
    for flag, value in {**PRESETS["reference"], **PRESETS[args.preset]}.items():
        if flag in IN_NAME and (given := getattr(args, flag)) != value:
            text = "" if given is True else str(given).removesuffix(".0")
            name += f"_no{IN_NAME[flag]}" if given is False else f"_{IN_NAME[flag]}{text}"
    return f"{name}_{f'from_{encoder_name}' if encoder_name else size}"


def build_optimizer(model, optimizer, precision, lr, weight_decay, layer_decay=1.0, decay_matrices_only=False):
    dtype, groups = utils.PRECISIONS[precision], [{"params": list(model.parameters())}]
    if layer_decay < 1 or decay_matrices_only:
        tokens = ("cls_token", "pos_embedding") if decay_matrices_only else ()
        groups = param_groups_layer_decay(
            model, weight_decay, tokens, weight_decay_exclude_1d=decay_matrices_only, layer_decay=layer_decay
        )
    return training.OPTIMIZERS[optimizer](model, groups, dtype, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)


def draw_batch(train, args, ids, epoch, step):
    """The images ids (B,) of an ImageSet as (B, 3, H, W) pixels, augmented where asked, and their labels (B,).

    Mixed images have labels (B, classes). With drop path also what it multiplies the blocks by, (B, depth, 2).
    """
    batch, labels = train.images[ids], train.labels[ids]
    device = batch.device
    batch = augmentation.AUGMENTATIONS[args.augment](batch, utils.generator(device, args.seed, epoch, step, "augment"))
    if args.mixup or args.cutmix:
        seed = utils.generator("cpu", args.seed, epoch, step, "mixup").initial_seed()
        batch, labels = augmentation.mix(batch, labels, len(train.classes), args.mixup, args.cutmix, seed)
    if not args.drop_path:
        return batch, labels
    draw = utils.generator(device, args.seed, epoch, step, "drop path")
    return batch, labels, drop_path_scales(len(batch), args.encoder_depth, args.drop_path, draw, device)


def loss_of(forward, precision, images, labels, scales=None, label_smoothing=0.0):
    """Mean loss of images (b, 3, H, W) from 0 to 255 with labels (b,), or (b, classes) of mixed ones.

    Args:
        forward: the model, compiled or not; scales: (b, depth, 2), its drop path.
    """
    with utils.autocast(precision, images.device):
        logits = forward(data.normalize(images), scales)
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


@torch.no_grad()
def evaluate(model, images, precision, at_once, name="test"):
    """Loss and accuracy over all test (or val) images, each counted once, whatever the batches and processes.

    At most at_once images pass the model together, as in training, so that evaluating needs no more memory.

    test/acc_mean_of_batches is the course report's figure: the mean of the accuracies of batches of 128, in which a
    short last batch counts as much as a full one. For comparison with it only.
    """
    pixels, labels, _ = images
    device = labels.device
    loss, correct = torch.zeros((), device=device), torch.zeros(len(labels), device=device)
    for part in processes.shared_out(len(labels), EVAL_BATCH):
        with utils.autocast(precision, device):
            logits = torch.cat([model(data.normalize(some)).float() for some in pixels[part].split(at_once)])
        correct[part] = (logits.argmax(dim=1) == labels[part]).float()
        loss += F.cross_entropy(logits, labels[part], reduction="sum")
    correct, loss = processes.sum_over_ranks(correct).cpu(), processes.sum_over_ranks(loss)  # MPS has no float64
    scores = {f"{name}/loss": loss.item() / len(correct), f"{name}/acc": correct.mean(dtype=torch.float64).item()}
    if name == "test":
        batches = torch.stack([part.mean() for part in correct.split(REPORT_BATCH)])
        scores["test/acc_mean_of_batches"] = batches.mean(dtype=torch.float64).item()
    return scores


def best_of(best, model, epoch, acc):
    """The epoch (from 1) of the highest accuracy so far, the first on a tie, with its accuracy and weights.

    Args:
        best: what this returned an epoch before; None: there is none.
    """
    if best and best["acc"] >= acc:
        return best
    return {"epoch": epoch, "acc": acc, "model": {name: tensor.clone() for name, tensor in model.state_dict().items()}}


def load_pretrained(args):
    """The MAE file named on the command line, and the arguments completed by its sizes and data; (None, ...) without.

    Raises:
        UserError: no such file, not a MAE, or a size flag that contradicts it.
    """
    if not args.pretrained_model_path:
        sizes = {name: utils.defaults(ViT_Classifier)[name] for name in SIZE}
        return None, utils.fill_in(args, {**sizes, **utils.DATA_DEFAULTS})
    _, pretrained = load_model(args.pretrained_model_path, MAE_ViT)
    sizes = {name: pretrained["model_args"][name] for name in SIZE}
    for name, stored in sizes.items():
        if getattr(args, name) not in (None, stored):
            raise UserError(
                f"{args.pretrained_model_path} has {name}={stored} but --{name} is {getattr(args, name)}. Leave the "
                f"flag out to use the stored value."
            )
    source = {name: pretrained[name] for name in utils.DATA_DEFAULTS} if args.dataset is None else utils.DATA_DEFAULTS
    return pretrained, utils.fill_in(args, {**sizes, **source, "encoder_digest": digest(pretrained["model"])})


def load_images(args, device):
    """(train, val, test) on the device, val None without --val_images; digests of both sets as they are on disk."""
    loaded = None if args.val_images else args.train_images  # hold_out needs all
    train, test = data.load_dataset(args.dataset, args.data_dir, args.img_size, loaded)
    digests, val = {"images": train.digest(), "test_set": test.digest()}, None
    if args.val_images:
        train, val = data.hold_out(train, args.val_images, args.train_images)
    return *utils.placed(device, train, val, test), digests


def scores_of_epoch(model, val, test, precision, at_once, session, last):
    """Loss and accuracy of this epoch's weights, on the test images or, where there are any, on the held-out ones.

    With held-out images, the test images are used once: after the last epoch, the model gets the best epoch's weights,
    is tested, and is saved with them.
    """
    if val is None:
        return evaluate(model, test, precision, at_once)
    scores = {**evaluate(model, val, precision, at_once, "val"), **NOT_TESTED}
    best = best_of(session.progress.get("best"), model, session.progress["epoch"] + 1, scores["val/acc"])
    session.progress["best"] = best
    if last:
        model.load_state_dict(best["model"])
        scores |= evaluate(model, test, precision, at_once) | {"chosen_epoch": best["epoch"]}
    return scores


def train_classifier(args):
    """Train one run to its end, on from where it stopped; returns its directory."""
    device = utils.pick_device(args.device)
    rank, world_size = processes.join(device)
    with processes.together():
        pretrained, args = load_pretrained(args)
        name = run_name(args, pretrained and pretrained["run_name"])
        run = Run(args.log_dir, name, vars(args), args.overwrite, rank == 0, defaults=vars(parse_args([])))
        model_args = {name: getattr(args, name) for name in (*SIZE, "pool")}
        ViT_Classifier(**model_args)  # bad sizes end here, before the data is read
        train, val, test, digests = load_images(args, device)
        finished = run.is_finished(digests)
    if processes.broadcast([int(finished)])[0]:
        return run.pass_over(args.output_model_path)

    at_once = args.max_device_batch_size or DEVICE_BATCH_SIZE[device.type]
    plan = training.plan_training(args, len(train.images), WARMUP, at_once, rank, world_size)
    torch.manual_seed(args.seed)
    model_args["num_classes"] = len(train.classes)
    model = ViT_Classifier(**model_args)
    if pretrained:
        model.load_encoder(pretrained["model"])
    model = model.to(device)
    precision = utils.pick_precision(args.precision, device, args.embed_dim)
    utils.tune(model, device, precision, (args.img_size // args.patch_size) ** 2)
    recipe = plan.peak_lr, args.weight_decay, args.layer_decay, args.decay_matrices_only
    optimizer = build_optimizer(model, args.optimizer, precision, *recipe)
    draw = functools.partial(draw_batch, train, args)
    forward = utils.compiled(model, args.compile, device, plan.num_images)
    loss = functools.partial(loss_of, forward, precision, label_smoothing=args.label_smoothing)
    scaler = utils.loss_scaler(precision, device)

    facts = {"parameters": utils.count_parameters(model), "precision": precision, **digests, **plan.facts()}
    if pretrained:
        facts["pretraining"] = pretrained.get("arguments", pretrained["model_args"])
    start = utils.this_start(device, world_size, plan) if rank == 0 else {}
    with run.open(model, optimizer, plan, facts, start) as session:
        for epoch in range(session.progress["epoch"], args.total_epoch):
            order = utils.epoch_order(len(train.images), args.seed, epoch, train.images.device)
            metrics = training.train_one_epoch(
                model, optimizer, plan, order, draw, loss, session, scaler, args.clip_grad
            )
            session.check_finite(metrics["train/loss"])
            metrics["memory/peak_mb"] = utils.peak_memory_mb(device)
            last = epoch + 1 == args.total_epoch
            session.end_epoch(scores_of_epoch(model, val, test, precision, at_once, session, last) | metrics)
        trained_on = {"dataset": args.dataset, "data_dir": args.data_dir, "classes": train.classes}
        session.finish({"kind": "ViT_Classifier", "model_args": model_args, "model": model.state_dict(), **trained_on})
    run.export(args.output_model_path)
    return run.directory


@exit_in_one_line()
def main(argv=None):
    with utils.shrunk_if_dry(parse_args(argv)) as args:
        directory = train_classifier(args)
        processes.leave()
        if processes.is_first():
            load_model(directory, ViT_Classifier)
            row = read_metrics(directory)[-1]
            chosen = f" (epoch {row['chosen_epoch']:.0f}, chosen on held-out images)" if "chosen_epoch" in row else ""
            result = f"Trained: {directory}/model.pt, test accuracy {row['test/acc']:.2%}{chosen}"
            print("Dry run: trained, evaluated, logged, saved and reloaded." if args.dry_run else result)


if __name__ == "__main__":
    main()
