"""Pretrain a masked autoencoder. The defaults are the full CIFAR-10 experiment:

    python mae_pretrain.py
    python mae_pretrain.py --decoder_depth 8 --mask_strategy block
    torchrun --nproc_per_node=4 mae_pretrain.py

Recipe: He et al. 2021 (arXiv:2111.06377), appendix A.1, at CIFAR size.
"""

import functools
import tempfile
import time

import torch
from torchvision.utils import make_grid

import data
import utils
from model import MASK_STRATEGIES, MAE_ViT, mae_loss
from runs import Run, load_model, mae_run_name, start_of

SIZE = ("img_size", "patch_size", "embed_dim", "encoder_depth", "num_heads", "decoder_depth")
DEVICE_BATCH_SIZE = utils.DEVICE_BATCH_SIZE["pretraining"]
IMAGE_LOGS = 50  # reconstructions shown in TensorBoard over a run


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    utils.add_data_arguments(parser, data.DATASETS)
    group = parser.add_argument_group("model")
    utils.add_size_arguments(group, SIZE)
    group = parser.add_argument_group("masking")
    group.add_argument("--mask_ratio", type=float, help="fraction of patches hidden, in (0, 1)")
    group.add_argument("--mask_strategy", choices=MASK_STRATEGIES, help="which patches are hidden")
    utils.add_optimisation_arguments(
        parser,
        total_epoch=2000,
        warmup="a tenth",
        batch_size=4096,
        device_batch_size=DEVICE_BATCH_SIZE,
        base_learning_rate=1.5e-4,
    )
    utils.add_run_arguments(parser, log_dir="logs/pretrain")
    parser.add_argument_group("output").add_argument("--model_path", help="copy the finished model.pt to here")
    parser.set_defaults(**utils.defaults(MAE_ViT))
    return parser.parse_args(argv)


def train_step(model, optimizer, slices, precision, images, masks, lr):
    """One update on the global batch; its mean loss.

    Args:
        slices: this process's parts; images: (B, 3, H, W) uint8; masks: (B, N) int64, the patches in shuffled order.
    """

    def loss_of(part):
        x = data.normalize(images[part])
        with utils.autocast(precision, x.device):
            pred, mask = model(x, masks[part])
        return mae_loss(pred, x, mask)  # each image has equally many hidden patches

    return utils.update(model, optimizer, slices, lr, loss_of)


def train_one_epoch(step, shuffle, images, plan, args, progress, tick):
    """The rest of the epoch that progress stands in; returns its metrics.

    Every draw follows from (seed, epoch, step) and is made for the global batch: neither a stop in between nor the
    number of processes changes which images are seen, and under which masks.

    Args:
        step: (images, masks, lr) -> mean loss; images: (N, 3, H, W) uint8; tick: called after each step.
    """
    device, epoch, started = images.device, progress["epoch"], time.monotonic()
    order = torch.randperm(len(images), generator=utils.generator("cpu", args.seed, epoch, "order")).to(device)
    for i in range(progress["step"], plan.steps_per_epoch):
        batch = images[order[i * args.batch_size : (i + 1) * args.batch_size]]
        if args.augment:
            batch = data.flip_and_crop(batch, utils.generator(device, args.seed, epoch, i, "augment"))
        masks = shuffle(args.batch_size, utils.generator(device, args.seed, epoch, i, "masks"), device)
        lr = plan.lr(epoch * plan.steps_per_epoch + i)
        progress["loss_sum"] = progress["loss_sum"] + step(batch, masks, lr)
        progress["step"] = i + 1
        progress["seconds"], started = progress["seconds"] + time.monotonic() - started, time.monotonic()
        tick(progress)
    loss = float(progress["loss_sum"]) / plan.steps_per_epoch  # waits for the device
    seconds = progress["seconds"] + time.monotonic() - started
    speed = plan.steps_per_epoch * args.batch_size / seconds
    lr = plan.lr((epoch + 1) * plan.steps_per_epoch - 1)
    memory = utils.peak_memory_mb(device)
    return {"train/loss": loss, "lr": lr, "speed/images_per_sec": speed, "seconds": seconds, "memory/peak_mb": memory}


def reconstruction_grid(model, images, masks):
    """Masked input, reconstruction and original, a row each: (3, H, W) uint8."""
    rows = torch.cat([*model.reconstruct(images, masks), images])
    return make_grid(data.to_pixels(rows), nrow=len(images))


@utils.exit_when_out_of_memory()
def pretrain(args):
    """Train one run to its end, on from where it stopped; returns its directory."""
    with utils.exit_on_bad_input():
        rank, world_size, device = utils.start_process_group(args.device)
        run = Run(args.log_dir, mae_run_name(vars(args)), vars(args), args.overwrite, writer=rank == 0)
        if run.finished:
            print(f"Finished already: {run.directory}")
            run.export(args.model_path)
            return run.directory

        torch.manual_seed(args.seed)
        model_args = {name: getattr(args, name) for name in utils.defaults(MAE_ViT)}
        model = MAE_ViT(**model_args).to(device)
        precision = utils.pick_precision(args.precision, device, args.embed_dim)
        utils.tune(model, device, precision, (args.img_size // args.patch_size) ** 2)
        train, test = data.load_dataset(args.dataset, args.data_dir, args.img_size, args.train_images)
        images = train.images.to(device)
        plan = utils.plan_training(args, len(images), 0.1, DEVICE_BATCH_SIZE[device.type], rank, world_size)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=plan.peak_lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
        )
        facts = utils.facts(args, model, plan, precision, train.digest())
        run.open(facts, device=device.type, processes=world_size, micro_batches=len(plan.slices))
        utils.barrier()
        progress = run.restore(model, optimizer)

    compiled = utils.compiled(model, args.compile, device)
    step = functools.partial(train_step, compiled, optimizer, plan.slices, precision)
    shown = torch.randperm(len(test.images), generator=utils.generator("cpu", "shown"))[:16]
    shown = data.normalize(test.images[shown].to(device))
    shown_masks = model.shuffle(len(shown), utils.generator(device, "shown"), device)

    with run:
        run.start_bar(plan.steps_per_epoch * args.batch_size, args.batch_size, args.total_epoch, progress)
        for epoch in range(progress["epoch"], args.total_epoch):
            metrics = train_one_epoch(step, model.shuffle, images, plan, args, progress, run.tick)
            run.check_finite(metrics["train/loss"], epoch, plan.steps_per_epoch)
            last = epoch + 1 == args.total_epoch
            if last or epoch % max(1, args.total_epoch // IMAGE_LOGS) == 0:
                run.log_image(epoch + 1, "reconstruction", reconstruction_grid(model, shown, shown_masks))
            progress = start_of(epoch + 1)
            run.end_epoch(progress, metrics, last)
        trained_on = {"dataset": args.dataset, "data_dir": args.data_dir}
        run.finish({"kind": "MAE_ViT", "model_args": model_args, "model": model.state_dict(), **trained_on})
        run.export(args.model_path)
    return run.directory


def main(argv=None):
    args = parse_args(argv)
    if not args.dry_run:
        directory = pretrain(args)
        utils.leave_process_group()
        if utils.is_first_process():
            print(f"Pretrained: {directory / 'model.pt'}")
        return
    with tempfile.TemporaryDirectory() as log_dir:
        directory = pretrain(utils.dry(args, log_dir))
        utils.leave_process_group()
        if utils.is_first_process():
            load_model(directory, MAE_ViT)
            print("Dry run: trained, logged, saved and reloaded.")


if __name__ == "__main__":
    main()
