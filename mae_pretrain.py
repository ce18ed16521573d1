"""Pretrain a masked autoencoder (MAE). The defaults are the full CIFAR-10 experiment.

    python mae_pretrain.py
    python mae_pretrain.py --decoder_depth 8 --mask_strategy block
    torchrun --nproc_per_node=4 mae_pretrain.py

Recipe: He et al. 2021 (arXiv:2111.06377), appendix A.1, at CIFAR size.
"""

import argparse
import math
from pathlib import Path

import torch
from torchvision.utils import make_grid

import utils
from engine import processes
from engine.checkpoints import digest, load_model
from engine.device import autocast, generator
from engine.errors import exit_in_one_line
from engine.features import extract_features, knn_predict
from engine.training import train
from engine.weights import not_flags, parent_of, read_weights, start_from
from images.augmentation import AUGMENTATIONS, check_channels
from images.load import draw, load_dataset, sample
from images.pixels import normalize, to_pixels
from masks import MASK_STRATEGIES
from model import POSITIONS, MAE_ViT, PatchShuffle

SIZE = ("img_size", "patch_size", "in_chans", "embed_dim", "encoder_depth", "num_heads", "decoder_depth")
WARMUP = 0.1  # of all epochs
# Images at once on a device, on a GPU of the default model; on a CPU 512 are no faster and take 12 GB, not 4.
DEVICE_BATCH_SIZE = {"cuda": 512, "cpu": 128, "mps": 128}
IMAGE_LOGS = 50  # reconstructions shown in TensorBoard over a run
PROBES, PROBE_SHARE = 20, 0.03  # over a run: the most probes; the most images in them, per image trained on
# What a run's name says, in this order: each flag's word, and its value. Those of ALWAYS at their default, too.
NAME_WORDS = {
    "dataset": "", "train_images": "n", "img_size": "i", "patch_size": "p", "in_chans": "c", "embed_dim": "w",
    "encoder_depth": "e", "num_heads": "h", "decoder_depth": "d", "decoder_embed_dim": "dw", "positions": "",
    "mask_strategy": "", "mask_ratio": "r", "norm_pix_loss": "normpix", "augment": "aug", "total_epoch": "ep",
    "warmup_epoch": "wu", "batch_size": "b", "base_learning_rate": "lr", "end_rate": "end",
    "weight_decay": "wd", "optimizer": "", "seed": "s", "init_from": "from_",
}  # fmt: skip
ALWAYS = {"dataset", "decoder_depth", "mask_strategy", "mask_ratio", "total_epoch", "seed"}
MODEL_FLAGS = {name: value for name, value in utils.defaults(MAE_ViT).items() if name in NAME_WORDS}
# Recipes for --preset: values of flags by name. What a row leaves out is as in the first, or the flag's own default.
PRESETS = {
    "reference": {"total_epoch": 2000, "batch_size": 4096, "base_learning_rate": 1.5e-4, **MODEL_FLAGS},
    "features": {"optimizer": "muon"},  # better features: logs/report/RESULTS.md
}


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    utils.add_data_arguments(parser)
    group = parser.add_argument_group("model")
    text = "start from these weights: a run (its settings, except epochs, become the defaults), or a file of the "
    text += "reference, the official MAE, timm or transformers; the decoder is used only if it fits"
    group.add_argument("--init_from", help=text)
    utils.add_size_arguments(group, SIZE)
    text = "width of the decoder's tokens; default: embed_dim (MAE paper, table 1b)"
    group.add_argument("--decoder_embed_dim", type=utils.positive_int, help=text)
    text = "position embeddings: learned, or fixed sines and cosines (appendix A.1)"
    group.add_argument("--positions", choices=POSITIONS, help=text)
    text = "predict each patch's pixels normalised by their mean and variance (MAE paper, table 1d)"
    group.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction, help=text)
    group = parser.add_argument_group("masking")
    group.add_argument("--mask_ratio", type=float, help="fraction of patches hidden, in (0, 1)")
    group.add_argument("--mask_strategy", choices=MASK_STRATEGIES, help="which patches are hidden")
    utils.add_optimisation_arguments(parser, WARMUP, DEVICE_BATCH_SIZE)
    group = utils.add_run_arguments(parser, log_dir="logs/pretrain")
    text = "epochs between probes (k-NN accuracy, reconstruction error of test images); 0: never; default: about "
    text += f"{PROBES} probes in a run, fewer where they would take more than {100 * PROBE_SHARE:.0f} %% of its time"
    group.add_argument("--probe_every", type=utils.non_negative_int, help=text)
    utils.add_presets(parser, PRESETS, argv, inherited(argv))
    return parser.parse_args(argv)


def inherited(argv):
    """Defaults from the model of --init_from, {flag: value}: its sizes; of our runs, all settings except epochs."""
    early = utils.Parser(add_help=False)
    for flag, kind in {"--init_from": str, "--dataset": str, "--num_heads": utils.positive_int}.items():
        early.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    given, _ = early.parse_known_args(argv)
    if given.init_from is None:
        return {}
    content = read_weights(given.init_from, MAE_ViT, sizes={"num_heads": given.num_heads})
    found = {**content["settings"], **content["model_args"]}
    found |= {name: content[name] for name in utils.DATA_DEFAULTS if name in content}
    own = {"total_epoch", "warmup_epoch", "init_from"}
    own |= {*utils.DATA_DEFAULTS, "train_images"} if given.dataset else set()
    return {name: found[name] for name in ({"data_dir"} | NAME_WORDS.keys()) & found.keys() - own}


def run_name(args):
    """For example mae_cifar10_d4_random_r0.75_ep2000_s42, the run of all defaults."""
    return utils.joined(["mae", *utils.name_parts(utils.settings_of(args), NAME_WORDS, vars(parse_args([])), ALWAYS)])


class Pretraining:
    """What this script trains: an experiment as `engine.training.train` describes it.

    A batch is (images (B, C, H, W) uint8, ids_shuffle (B, N)): which patches are hidden.
    """

    warmup, device_batch_size, betas = WARMUP, DEVICE_BATCH_SIZE, (0.9, 0.95)

    def __init__(self, args):
        self.args, self.arguments = args, utils.free_arguments(args)
        self.start = args.init_from and read_weights(args.init_from, MAE_ViT, sizes=vars(args))
        self.model_args = {name: getattr(args, name) for name in MODEL_FLAGS} | not_flags(self.start)
        check_channels(args.augment, args.in_chans)
        with torch.device("meta"):
            MAE_ViT(**self.model_args)  # bad sizes and masks end here, before the images are read
        name, parent = run_name(args), parent_of(self.start)
        self.identity = {"kind": "mae", "name": name, "settings": utils.settings_of(args), "parent": parent}

    def load(self, device):
        args = self.args
        where = args.dataset, args.data_dir, args.img_size
        train, test = load_dataset(*where, labelled=False, in_chans=args.in_chans)
        shuffle = PatchShuffle(args.img_size // args.patch_size, args.mask_ratio, args.mask_strategy)
        masks = digest({"masks": shuffle(100, generator("cpu", "digest"))})  # another where the strategy was edited
        self.digests = {"images": train.digest(), "test_set": test.digest(), "masks": masks}
        train, _ = draw(train, args.train_images, args.seed)
        sizes = ((train, 5000), (test, 1000))
        self.banks = [sample(images, count, generator("cpu", "probe")).to(device) for images, count in sizes]
        self.shown = normalize(sample(test, 16, generator("cpu", "shown")).images.to(device))
        self.images, self.num_images = train.images.to(device), len(train.images)

    def build(self):
        self.model = MAE_ViT(**self.model_args)
        if self.start:
            start_from(self.model, self.start)
        return self.model

    def parameter_groups(self):
        return [{"params": list(self.model.parameters())}]

    def draw_batch(self, ids, epoch, step):
        key, batch = (self.args.seed, epoch, step), self.images[ids]
        batch = AUGMENTATIONS[self.args.augment](batch, generator(batch.device, *key, "augment"))
        return batch, self.model.shuffle(len(batch), generator(batch.device, *key, "masks"), batch.device)

    def loss(self, images, ids_shuffle):
        return self.model.loss(normalize(images), ids_shuffle)

    def evaluate(self, session, setup):
        """Test loss and k-NN accuracy where a probe is due; now and then reconstructions for TensorBoard."""
        args, last = self.args, session.epoch == self.args.total_epoch
        if last or (session.epoch - 1) % max(1, args.total_epoch // IMAGE_LOGS) == 0:
            borrowed = " with each patch's true mean and variance" if args.norm_pix_loss else ""
            session.log_image(f"reconstruction{borrowed}", reconstruction_grid(self.model, self.shown))
        every = probe_interval(args, setup.plan, sum(len(bank.images) for bank in self.banks))
        if every and (last or session.epoch % every == 0):
            return probe(self.model, *self.banks, setup.precision, setup.at_once)
        return {}

    def content(self):
        return {"kind": "MAE_ViT", "model_args": self.model_args}


def probe_interval(args, plan, bank_size):
    """Epochs between probes; 0: none. Assumes that an image costs as much time in a probe as in training."""
    if args.probe_every is not None:
        return args.probe_every
    affordable = int(PROBE_SHARE * plan.total_steps * plan.batch_size / bank_size)
    return math.ceil(args.total_epoch / min(max(affordable, 1), PROBES))


@torch.no_grad()
def probe(model, train, test, precision, batch_size):
    """Reconstruction error of test images, and k-NN accuracy of the mean of their patch tokens: {column: number}.

    Without labels there is no accuracy.

    Every probe has the same images and masks, and counts each image once, with any number of processes.

    Args:
        train, test: ImageSets: the images that vote in the k-NN, and its queries; batch_size: images at once.
    """
    device, layer = test.images.device, len(model.encoder.transformer)
    ids_shuffle = model.shuffle(len(test.images), generator(device, "probe"), device)
    loss = torch.zeros((), device=device)
    with autocast(precision, device):
        for part in processes.shared_out(len(test.images), batch_size):
            x = normalize(test.images[part])
            loss += model.loss(x, ids_shuffle[part]) * len(x)
        loss = processes.sum_over_ranks(loss).item() / len(test.images)
        if not train.classes:
            return {"test/loss": loss}
        features = {}
        for name, images in (("train", train.images), ("test", test.images)):
            features[name] = torch.zeros(len(images), model.encoder.cls_token.shape[-1], device=device)
            for part in processes.shared_out(len(images), batch_size):
                found = extract_features(model.encoder, images[part], normalize, [layer], ["mean"], batch_size)
                features[name][part] = found[layer, "mean"]
            processes.sum_over_ranks(features[name])
    predicted = knn_predict(features["train"], train.labels, features["test"], len(train.classes))
    right = (predicted == test.labels).cpu().double().mean().item()
    return {"test/loss": loss, "probe/knn_acc": right}


def reconstruction_grid(model, images):
    """Masked input, reconstruction and original, a row each, small ones enlarged, always under the same masks.

    Returns:
        (3, H, W) uint8.
    """
    ids_shuffle = model.shuffle(len(images), generator(images.device, "shown"), images.device)
    rows = to_pixels(torch.cat([*model.reconstruct(images, ids_shuffle), images]))
    rows = rows[:, : 3 if rows.shape[1] >= 3 else 1]  # one channel is shown grey
    times = math.ceil(96 / rows.shape[-1])
    rows = rows.repeat_interleave(times, 2).repeat_interleave(times, 3)
    return make_grid(rows, nrow=len(images), padding=4)


def pretrain(args):
    """Train one run to its end, on from where it stopped; returns its directory."""
    return train(args, Pretraining)


@exit_in_one_line()
def main(argv=None):
    with utils.shrunk_if_dry(parse_args(argv)) as args:
        directory = pretrain(args)
        processes.leave()
        if processes.is_first():
            load_model(Path(directory, "model.pt"), MAE_ViT)
            print(
                "Dry run: trained, logged, saved and reloaded." if args.dry_run else f"Pretrained: {directory}/model.pt"
            )


if __name__ == "__main__":
    main()
