"""Train the encoder as a classifier, from a pretrained MAE or from scratch.

    python train_classifier.py --pretrained_model_path logs/pretrain/<run>
    python train_classifier.py

End-to-end fine-tuning on the cls token (He et al. 2021, arXiv:2111.06377, section 4), at CIFAR size.
"""

import functools
import math
import tempfile
import time

import torch
import torch.nn.functional as F

import data
import utils
from model import MAE_ViT, ViT_Classifier
from runs import Run, classifier_run_name, digest, load_model, read_metrics, start_of

SIZE = ("img_size", "patch_size", "embed_dim", "encoder_depth", "num_heads")
DEVICE_BATCH_SIZE = utils.DEVICE_BATCH_SIZE["fine-tuning"]
EVAL_BATCH = 500  # images at once
REPORT_BATCH = 128  # the source report averages the accuracies of batches of so many
NOT_TESTED = dict.fromkeys(("test/loss", "test/acc", "test/acc_mean_of_batches", "chosen_epoch"), math.nan)


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    utils.add_data_arguments(parser, data.DATASETS).add_argument(
        "--val_images",
        type=utils.positive_int,
        help="hold out so many training images, equally many of each class, keep the epoch that is best on them and "
        "test that one only; left out: keep the last, test each",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_path", help="model.pt or run directory of a MAE; left out: from scratch")
    utils.add_size_arguments(group, SIZE, "; left out: the pretrained model's, from scratch the reference's")
    utils.add_optimisation_arguments(
        parser,
        total_epoch=100,
        warmup="a twentieth",
        batch_size=128,
        device_batch_size=DEVICE_BATCH_SIZE,
        base_learning_rate=1e-3,
    )
    utils.add_run_arguments(parser, log_dir="logs/classifier")
    parser.add_argument_group("output").add_argument("--output_model_path", help="copy the finished model.pt to here")
    return parser.parse_args(argv)


def train_step(model, optimizer, slices, precision, images, labels, lr):
    """One update on the global batch; its mean loss.

    Args:
        slices: this process's parts; images: (B, 3, H, W) uint8; labels: (B,) int64.
    """

    def loss_of(part):
        with utils.autocast(precision, images.device):
            logits = model(data.normalize(images[part]))
        return F.cross_entropy(logits.float(), labels[part])

    return utils.update(model, optimizer, slices, lr, loss_of)


def train_one_epoch(step, train, plan, args, progress, tick):
    """The rest of the epoch that progress stands in; returns its metrics. Draws follow from (seed, epoch, step) only.

    Args:
        step: (images, labels, lr) -> mean loss; tick: called after each step.
    """
    device, epoch, started = train.images.device, progress["epoch"], time.monotonic()
    order = torch.randperm(len(train.images), generator=utils.generator("cpu", args.seed, epoch, "order")).to(device)
    for i in range(progress["step"], plan.steps_per_epoch):
        ids = order[i * args.batch_size : (i + 1) * args.batch_size]
        batch = train.images[ids]
        if args.augment:
            batch = data.flip_and_crop(batch, utils.generator(device, args.seed, epoch, i, "augment"))
        lr = plan.lr(epoch * plan.steps_per_epoch + i)
        progress["loss_sum"] = progress["loss_sum"] + step(batch, train.labels[ids], lr)
        progress["step"] = i + 1
        progress["seconds"], started = progress["seconds"] + time.monotonic() - started, time.monotonic()
        tick(progress)
    loss = float(progress["loss_sum"]) / plan.steps_per_epoch  # waits for the device
    seconds = progress["seconds"] + time.monotonic() - started
    speed = plan.steps_per_epoch * args.batch_size / seconds
    lr = plan.lr((epoch + 1) * plan.steps_per_epoch - 1)
    memory = utils.peak_memory_mb(device)
    return {"train/loss": loss, "lr": lr, "speed/images_per_sec": speed, "seconds": seconds, "memory/peak_mb": memory}


@torch.no_grad()
def evaluate(model, images, precision, rank, world_size, name="test"):
    """Loss and accuracy over all test (or val) images, each counted once, whatever the batches and processes.

    test/acc_mean_of_batches is the source report's figure: the mean of the accuracies of batches of 128, in which a
    short last batch counts as much as a full one. For comparison with it only.
    """
    pixels, labels, _ = images
    device = pixels.device
    loss, correct = torch.zeros((), device=device), torch.zeros(len(labels), device=device)
    for start in range(rank * EVAL_BATCH, len(labels), world_size * EVAL_BATCH):
        part = slice(start, start + EVAL_BATCH)
        with utils.autocast(precision, device):
            logits = model(data.normalize(pixels[part])).float()
        correct[part] = (logits.argmax(dim=1) == labels[part]).float()
        loss += F.cross_entropy(logits, labels[part], reduction="sum")
    correct, loss = utils.sum_over_ranks(correct), utils.sum_over_ranks(loss)
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
    """The MAE file named on the command line and the arguments completed by its sizes; (None, ...) from scratch.

    Raises:
        ValueError: no such file, not a MAE, or a size flag that contradicts it.
    """
    if not args.pretrained_model_path:
        return None, utils.fill_in(args, {name: utils.defaults(ViT_Classifier)[name] for name in SIZE})
    _, pretrained = load_model(args.pretrained_model_path, MAE_ViT)
    sizes = {name: pretrained["model_args"][name] for name in SIZE}
    for name, stored in sizes.items():
        if getattr(args, name) not in (None, stored):
            raise ValueError(
                f"{args.pretrained_model_path} has {name}={stored} but --{name} is {getattr(args, name)}. Leave the "
                f"flag out to use the stored value."
            )
    return pretrained, utils.fill_in(args, {**sizes, "encoder_digest": digest(pretrained["model"])})


@utils.exit_when_out_of_memory()
def train_classifier(args):
    """Train one run to its end, on from where it stopped; returns its directory."""
    with utils.exit_on_bad_input():
        rank, world_size, device = utils.start_process_group(args.device)
        pretrained, args = load_pretrained(args)
        name = classifier_run_name(vars(args), pretrained and pretrained["run_name"])
        run = Run(args.log_dir, name, vars(args), args.overwrite, writer=rank == 0)
        if run.finished:
            print(f"Finished already: {run.directory}")
            run.export(args.output_model_path)
            return run.directory

        ViT_Classifier(**{name: getattr(args, name) for name in SIZE})  # bad sizes end here, before the data is read
        loaded = None if args.val_images else args.train_images  # hold_out needs all
        train, test = data.load_dataset(args.dataset, args.data_dir, args.img_size, loaded)
        images_digest = train.digest()
        if args.val_images:
            train, val = data.hold_out(train, args.val_images, args.train_images)
            val = val.to(device)
        train, test = train.to(device), test.to(device)
        torch.manual_seed(args.seed)
        model_args = {**{name: getattr(args, name) for name in SIZE}, "num_classes": len(train.classes)}
        model = ViT_Classifier(**model_args)
        if pretrained:
            model.load_encoder(pretrained["model"])
        model = model.to(device)
        precision = utils.pick_precision(args.precision, device, args.embed_dim)
        utils.tune(model, device, precision, (args.img_size // args.patch_size) ** 2)
        plan = utils.plan_training(args, len(train.images), 0.05, DEVICE_BATCH_SIZE[device.type], rank, world_size)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=plan.peak_lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
        )
        facts = utils.facts(args, model, plan, precision, images_digest)
        run.open(facts, device=device.type, processes=world_size, micro_batches=len(plan.slices))
        utils.barrier()
        progress = run.restore(model, optimizer)

    compiled = utils.compiled(model, args.compile, device)
    step = functools.partial(train_step, compiled, optimizer, plan.slices, precision)
    with run:
        run.start_bar(plan.steps_per_epoch * args.batch_size, args.batch_size, args.total_epoch, progress)
        for epoch in range(progress["epoch"], args.total_epoch):
            metrics = train_one_epoch(step, train, plan, args, progress, run.tick)
            run.check_finite(metrics["train/loss"], epoch, plan.steps_per_epoch)
            best, progress, last = progress.get("best"), start_of(epoch + 1), epoch + 1 == args.total_epoch
            if not args.val_images:
                scores = evaluate(model, test, precision, rank, world_size)
            else:
                scores = {**evaluate(model, val, precision, rank, world_size, "val"), **NOT_TESTED}
                progress["best"] = best = best_of(best, model, epoch + 1, scores["val/acc"])
                if last:  # from here on the model is the chosen one, in the checkpoint too
                    model.load_state_dict(best["model"])
                    scores |= evaluate(model, test, precision, rank, world_size) | {"chosen_epoch": best["epoch"]}
            run.end_epoch(progress, {**scores, **metrics}, last)
        trained_on = {"dataset": args.dataset, "data_dir": args.data_dir, "classes": train.classes}
        run.finish({"kind": "ViT_Classifier", "model_args": model_args, "model": model.state_dict(), **trained_on})
        run.export(args.output_model_path)
    return run.directory


def main(argv=None):
    args = parse_args(argv)
    if not args.dry_run:
        directory = train_classifier(args)
        utils.leave_process_group()
        if utils.is_first_process():
            row = read_metrics(directory)[-1]
            chosen = f" (epoch {row['chosen_epoch']:.0f}, chosen on held-out images)" if "chosen_epoch" in row else ""
            print(f"Trained: {directory / 'model.pt'}, test accuracy {row['test/acc']:.2%}{chosen}")
        return
    with tempfile.TemporaryDirectory() as log_dir:
        directory = train_classifier(utils.dry(args, log_dir))
        utils.leave_process_group()
        if utils.is_first_process():
            load_model(directory, ViT_Classifier)
            print("Dry run: trained, evaluated, logged, saved and reloaded.")


if __name__ == "__main__":
    main()
