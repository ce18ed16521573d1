"""Pretrain a masked autoencoder (MAE). The defaults are the full CIFAR-10 experiment.

    python mae_pretrain.py
    python mae_pretrain.py --decoder_depth 8 --mask_strategy block
    torchrun --nproc_per_node=4 mae_pretrain.py

Recipe: He et al. 2021 (arXiv:2111.06377), appendix A.1, at CIFAR size.
"""

import argparse
import functools
import math

import torch
from torchvision.utils import make_grid

import augmentation
import data
import processes
import training
import utils
from checkpoints import digest, load_model
from errors import exit_in_one_line
from features import extract_features, knn_predict
from model import MASK_STRATEGIES, POSITIONS, MAE_ViT, mae_loss
from runs import Run

SIZE = ("img_size", "patch_size", "embed_dim", "encoder_depth", "num_heads", "decoder_depth")
WARMUP = 0.1  # of all epochs
# Images at once on a device: on a GPU the reference's; on a CPU 512 are no faster and take 12 GB of memory, not 4.
DEVICE_BATCH_SIZE = {"cuda": 512, "cpu": 128, "mps": 128}
IMAGE_LOGS = 50  # reconstructions shown in TensorBoard over a run
PROBES, PROBE_SHARE = 20, 0.03  # over a run: at most so many, on at most this share of the images trained on
PROBED = ("test/loss", "knn/acc")  # the second with labels only
# Recipes for --preset: values of flags by name. What a row leaves out is as in the first.
PRESETS = {
    "reference": {
        "total_epoch": 2000,
        "batch_size": 4096,
        "base_learning_rate": 1.5e-4,
        "optimizer": "adamw",
        "augment": False,
        **utils.defaults(MAE_ViT),
    },
    "strong": {"norm_pix_loss": True},
}


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    utils.add_data_arguments(parser, data.DATASETS)
    group = parser.add_argument_group("model")
    utils.add_size_arguments(group, SIZE)
    group.add_argument(
        "--decoder_embed_dim",
        type=utils.positive_int,
        help="width of the decoder's tokens; default: embed_dim (MAE paper, table 1b)",
    )
    group.add_argument(
        "--positions", choices=POSITIONS, help="position embeddings: learned, or fixed sines and cosines (appendix A.1)"
    )
    group.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        help="predict each patch's pixels normalised by their mean and variance (MAE paper, table 1d)",
    )
    group = parser.add_argument_group("masking")
    group.add_argument("--mask_ratio", type=float, help="fraction of patches hidden, in (0, 1)")
    group.add_argument("--mask_strategy", choices=MASK_STRATEGIES, help="which patches are hidden")
    utils.add_mask_args(group)
    utils.add_optimisation_arguments(parser, WARMUP, DEVICE_BATCH_SIZE, training.OPTIMIZERS)
    utils.add_run_arguments(parser, log_dir="logs/pretrain").add_argument(
        "--probe_every",
        type=utils.non_negative_int,
        help=f"epochs between probes (k-NN accuracy, reconstruction error of test images); 0: never; default: about "
        f"{PROBES} probes in a run, fewer where they would take more than {100 * PROBE_SHARE:.0f} %% of its time",
    )
    parser.add_argument_group("output").add_argument(
        "--model_path", type=utils.file_path, help="copy the finished model.pt to this file"
    )
    utils.add_presets(parser, PRESETS, argv)
    return parser.parse_args(argv)


def run_name(args):
    """For example mae_cifar10_i32_p2_w192_e12_h3_d4_random_r0.75_ep2000_b4096_s42; a switch that is off has no part."""
    size = "i{img_size}_p{patch_size}_w{embed_dim}_e{encoder_depth}_h{num_heads}_d{decoder_depth}".format(**vars(args))
    size += f"_dw{args.decoder_embed_dim}" if args.decoder_embed_dim else ""
    size += f"_{args.positions}" if args.positions != "learned" else ""
    augmented = {False: "", True: "_aug", "crop": "_augcrop"}[args.augment]
    masks = f"{args.mask_strategy}{utils.named(args.mask_args)}_r{args.mask_ratio}"
    masks += "_normpix" if args.norm_pix_loss else ""
    rest = f"ep{args.total_epoch}_b{args.batch_size}_s{args.seed}{augmented}"
    rest += f"_{args.optimizer}" if args.optimizer != "adamw" else ""
    return f"mae_{data.name_of(args)}_{size}_{masks}_{rest}"


def build_optimizer(model, optimizer, precision, lr, weight_decay):
    groups, dtype = [{"params": list(model.parameters())}], utils.PRECISIONS[precision]
    return training.OPTIMIZERS[optimizer](model, groups, dtype, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def draw_batch(images, shuffle, args, ids, epoch, step):
    """The images ids (B,) of (N, 3, H, W) uint8, augmented where asked, and their masks as ids_shuffle (B, N)."""
    batch = images[ids]
    device = batch.device
    batch = augmentation.AUGMENTATIONS[args.augment](batch, utils.generator(device, args.seed, epoch, step, "augment"))
    return batch, shuffle(len(batch), utils.generator(device, args.seed, epoch, step, "masks"), device)


def loss_of(forward, precision, images, ids_shuffle, norm_pix_loss=False):
    """Mean loss of images (b, 3, H, W) uint8 under masks; forward: the model, compiled or not."""
    images = data.normalize(images)
    with utils.autocast(precision, images.device):
        pred, mask = forward(images, ids_shuffle)
    return mae_loss(pred, images, mask, norm_pix_loss)  # each image has equally many hidden patches


def mask_digest(shuffle, count=100):
    """16 hex digits that change where a strategy of this name draws other masks."""
    return digest({"masks": shuffle(count, utils.generator("cpu", "digest"))})


def probe_interval(args, plan, bank_size):
    """Epochs between probes, 0 for none. One forward pass of a probe is taken to cost as much as a training step."""
    if args.probe_every is not None:
        return args.probe_every
    affordable = int(PROBE_SHARE * plan.total_steps * plan.batch_size / bank_size)
    return math.ceil(args.total_epoch / min(max(affordable, 1), PROBES))


@torch.no_grad()
def probe(model, train, test, precision, batch_size):
    """What the model knows of test images: reconstruction error, and k-NN accuracy of the mean of its patch tokens.

    Without labels there is no accuracy.

    The same masks and images each time, each counted once, whatever the number of processes.

    Args:
        train, test: ImageSets, the bank of the k-NN and what it is asked; batch_size: images at once.
    """
    device, layer = test.images.device, len(model.encoder.transformer)
    ids_shuffle = model.shuffle(len(test.images), utils.generator(device, "probe"), device)
    loss = torch.zeros((), device=device)
    with utils.autocast(precision, device):
        for part in processes.shared_out(len(test.images), batch_size):
            x = data.normalize(test.images[part])
            pred, mask = model(x, ids_shuffle[part])
            loss += mae_loss(pred, x, mask, model.norm_pix_loss) * len(x)
        loss = processes.sum_over_ranks(loss).item() / len(test.images)
        if not train.classes:
            return {"test/loss": loss}
        features = {}
        for name, images in (("train", train.images), ("test", test.images)):
            features[name] = torch.zeros(len(images), model.encoder.cls_token.shape[-1], device=device)
            for part in processes.shared_out(len(images), batch_size):
                found = extract_features(model.encoder, images[part], data.normalize, [layer], ["mean"], batch_size)
                features[name][part] = found[layer, "mean"]
            processes.sum_over_ranks(features[name])
    predicted = knn_predict(features["train"], train.labels, features["test"], len(train.classes))
    right = (predicted == test.labels).cpu().double().mean().item()
    return {"test/loss": loss, "knn/acc": right}


def reconstruction_grid(model, images):
    """Masked input, reconstruction and original, a row each, small ones enlarged, always under the same masks.

    Returns:
        (3, H, W) uint8.
    """
    ids_shuffle = model.shuffle(len(images), utils.generator(images.device, "shown"), images.device)
    rows = data.to_pixels(torch.cat([*model.reconstruct(images, ids_shuffle), images]))
    times = math.ceil(96 / rows.shape[-1])
    rows = rows.repeat_interleave(times, 2).repeat_interleave(times, 3)
    return make_grid(rows, nrow=len(images), padding=4)


def load_images(args, device):
    """The images to train on, (N, 3, H, W) uint8, and others to look at, all on the device; the digests of both sets.

    Returns:
        images; banks: the training and the test ImageSet of a probe; shown: 16 test images, normalised; digests.
    """
    train, test = data.load_dataset(args.dataset, args.data_dir, args.img_size, args.train_images, labelled=False)
    banks = [data.draw(*bank, utils.generator("cpu", "probe")).to(device) for bank in ((train, 5000), (test, 1000))]
    shown = data.normalize(data.draw(test, 16, utils.generator("cpu", "shown")).images.to(device))
    return utils.placed(device, train)[0].images, banks, shown, {"images": train.digest(), "test_set": test.digest()}


def pretrain(args):
    """Train one run to its end, on from where it stopped; returns its directory."""
    device = utils.pick_device(args.device)
    rank, world_size = processes.join(device)
    with processes.together():
        run = Run(args.log_dir, run_name(args), vars(args), args.overwrite, rank == 0, defaults=vars(parse_args([])))
        torch.manual_seed(args.seed)
        model_args = {name: getattr(args, name) for name in utils.defaults(MAE_ViT)}
        model = MAE_ViT(**model_args).to(device)  # bad sizes and masks end here, before the data is read
        masks = mask_digest(model.shuffle)
        images, banks, shown, digests = load_images(args, device)
        digests["masks"] = masks
        finished = run.is_finished(digests)
    if processes.broadcast([int(finished)])[0]:
        return run.pass_over(args.model_path)

    at_once = args.max_device_batch_size or DEVICE_BATCH_SIZE[device.type]
    plan = training.plan_training(args, len(images), WARMUP, at_once, rank, world_size)
    precision = utils.pick_precision(args.precision, device, args.embed_dim)
    utils.tune(model, device, precision, model.shuffle.grid_size**2)
    optimizer = build_optimizer(model, args.optimizer, precision, plan.peak_lr, args.weight_decay)
    draw = functools.partial(draw_batch, images, model.shuffle, args)
    forward = utils.compiled(model, args.compile, device, plan.num_images)
    loss = functools.partial(loss_of, forward, precision, norm_pix_loss=args.norm_pix_loss)
    scaler = utils.loss_scaler(precision, device)
    every = probe_interval(args, plan, sum(len(bank.images) for bank in banks))
    look = functools.partial(probe, model, *banks, precision, at_once)
    not_probed = dict.fromkeys(PROBED if banks[0].classes else PROBED[:1], math.nan)

    facts = {"parameters": utils.count_parameters(model), "precision": precision, **digests, **plan.facts()}
    start = utils.this_start(device, world_size, plan) if rank == 0 else {}
    with run.open(model, optimizer, plan, facts, start) as session:
        for epoch in range(session.progress["epoch"], args.total_epoch):
            order = utils.epoch_order(len(images), args.seed, epoch, images.device)
            metrics = training.train_one_epoch(model, optimizer, plan, order, draw, loss, session, scaler)
            session.check_finite(metrics["train/loss"])
            metrics["memory/peak_mb"] = utils.peak_memory_mb(device)
            last = epoch + 1 == args.total_epoch
            if every:
                metrics |= look() if last or (epoch + 1) % every == 0 else not_probed
            if last or epoch % max(1, args.total_epoch // IMAGE_LOGS) == 0:
                borrowed = " with each patch's true mean and variance" if args.norm_pix_loss else ""
                session.log_image(f"reconstruction{borrowed}", reconstruction_grid(model, shown))
            session.end_epoch(metrics)
        trained_on = {"dataset": args.dataset, "data_dir": args.data_dir}
        session.finish({"kind": "MAE_ViT", "model_args": model_args, "model": model.state_dict(), **trained_on})
    run.export(args.model_path)
    return run.directory


@exit_in_one_line()
def main(argv=None):
    with utils.shrunk_if_dry(parse_args(argv)) as args:
        directory = pretrain(args)
        processes.leave()
        if processes.is_first():
            load_model(directory, MAE_ViT)
            print(
                "Dry run: trained, logged, saved and reloaded." if args.dry_run else f"Pretrained: {directory}/model.pt"
            )


if __name__ == "__main__":
    main()
