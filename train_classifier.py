"""Train the encoder as a classifier, from a pretrained MAE or from scratch.

    python train_classifier.py --pretrained_model_path logs/pretrain/<run>
    python train_classifier.py

End-to-end fine-tuning (He et al. 2021, arXiv:2111.06377, section 4), at CIFAR size.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.optim import param_groups_layer_decay
from torch import nn

import utils
from engine import processes
from engine.checkpoints import load_model
from engine.device import generator
from engine.errors import exit_in_one_line
from engine.predictions import accuracies_of, predict
from engine.records import read_metrics
from engine.training import train
from engine.weights import not_flags, parent_of, read_weights, say
from images.augmentation import AUGMENTATIONS, check_channels, mix
from images.load import draw, load_dataset
from images.pixels import normalize
from model import MAE_ViT, ViT_Classifier, drop_path_scales

WARMUP = 0.05  # of all epochs
DEVICE_BATCH_SIZE = {"cuda": 256, "cpu": 128, "mps": 128}  # images at once, on a GPU of the default model
# Recipes for --preset: values of flags by name. What a row leaves out is as in the first, or the flag's own default.
PRESETS = {
    "reference": {"total_epoch": 100, "batch_size": 128, "base_learning_rate": 1e-3},
    "augmented": {"augment": "shift", "pool": "mean"},  # wins in 30 epochs: logs/report/RESULTS.md
    "official": {  # after the official MAE's fine-tuning (He et al. 2021, table 9), for long training
        "augment": "official",
        "pool": "mean",
        "head_std": 2e-5,
        "end_rate": 1e-6,
        "decay_matrices_only": True,
        "layer_decay": 0.75,
        "drop_path": 0.1,
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
}
# What a run's name says, in this order: each flag's word, and its value. Those of ALWAYS at their default, too.
NAME_WORDS = {
    "dataset": "", "train_images": "n", "val_images": "val", "label_seed": "draw", "augment": "aug",
    "total_epoch": "ep", "warmup_epoch": "wu", "batch_size": "b", "base_learning_rate": "lr",
    "end_rate": "end", "weight_decay": "wd", "optimizer": "", "pool": "pool", "head_std": "head",
    "decay_matrices_only": "matrices", "layer_decay": "ld", "clip_grad": "clip", "drop_path": "dp",
    "label_smoothing": "ls", "mixup": "mixup", "cutmix": "cutmix", "class_weights": "", "seed": "s",
}  # fmt: skip
SIZE_WORDS = {
    "img_size": "i", "patch_size": "p", "in_chans": "c", "embed_dim": "w", "encoder_depth": "e", "num_heads": "h",
}  # fmt: skip
ALWAYS = {"dataset", "total_epoch", "seed"}


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    group = utils.add_data_arguments(parser, pretrained=True)
    utils.add_label_seed(group)
    text = "hold out so many training images, drawn as --train_images, keep the epoch that is best on them and test "
    text += "that one only; default: keep the last epoch, test after every epoch"
    group.add_argument("--val_images", type=utils.positive_int, help=text)
    group = parser.add_argument_group("model")
    text = "a MAE's run or file, weights of the reference, official MAE, timm or transformers; default: from scratch"
    group.add_argument("--pretrained_model_path", help=text)
    utils.add_size_arguments(group, SIZE_WORDS, from_scratch=utils.defaults(ViT_Classifier))
    text = "what the head sees: the cls token or the patches' mean"
    group.add_argument("--pool", choices=("cls", "mean"), default="cls", help=text)
    text = "first weights of the head: standard deviation of a truncated normal, biases 0; 0: PyTorch's own"
    group.add_argument("--head_std", type=utils.non_negative_float, default=0.0, help=text)
    group = utils.add_optimisation_arguments(parser, WARMUP, DEVICE_BATCH_SIZE)
    text = "no weight decay on biases, LayerNorms, the cls token and positions; else on every parameter"
    group.add_argument("--decay_matrices_only", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "a block's learning rate is this times the next one's; the embedding comes first, the head last; 1: off"
    group.add_argument("--layer_decay", type=utils.fraction, default=1.0, help=text)
    text = "largest norm of all gradients together; 0: off"
    group.add_argument("--clip_grad", type=utils.non_negative_float, default=0.0, help=text)
    text = "balanced: an image's loss weighs inversely to its class's share of the training images"
    group.add_argument("--class_weights", choices=("none", "balanced"), default="none", help=text)
    group = parser.add_argument_group("regularisation")
    text = "probability that an image skips the last block's attention or its MLP; smaller in earlier blocks"
    group.add_argument("--drop_path", type=utils.fraction, default=0.0, help=text)
    text = "share of a label spread evenly over all classes"
    group.add_argument("--label_smoothing", type=utils.fraction, default=0.0, help=text)
    alpha = "alpha of the Beta distribution of an image's share; 0: off"
    text = f"mix each image with another; {alpha}"
    group.add_argument("--mixup", type=utils.non_negative_float, default=0.0, help=text)
    text = f"paste a rectangle of another image; {alpha}; both: each step draws one"
    group.add_argument("--cutmix", type=utils.non_negative_float, default=0.0, help=text)
    utils.add_run_arguments(parser, log_dir="logs/classifier")
    utils.add_presets(parser, PRESETS, argv)
    return parser.parse_args(argv)


def run_name(args, parent=None, sizes=None):
    """For example cls_cifar10_ep100_s42_from_mae_..., or cls_cifar10_ep100_s42_scratch, the run of all defaults.

    Args:
        parent: the name of the run that the encoder comes from; None: from scratch.
        sizes: the parent's settings; the name contains the classifier's sizes that differ from them.
    """
    settings, defaults = utils.settings_of(args), {**utils.defaults(ViT_Classifier), **vars(parse_args([]))}
    parts = utils.name_parts(settings, NAME_WORDS, defaults, ALWAYS)
    if parent:
        changed = utils.name_parts(settings, SIZE_WORDS, utils.defaults(ViT_Classifier) | sizes if sizes else settings)
        return utils.joined(["cls", *parts, *changed, "from", parent])
    sizes = utils.name_parts(settings, SIZE_WORDS, utils.defaults(ViT_Classifier))
    return utils.joined(["cls", *parts, "scratch", *sizes])


def load_pretrained(args):
    """Read --pretrained_model_path: (the MAE's content, None from scratch; args with sizes and data set filled in).

    Raises:
        UserError: no such file, not a MAE, or a size flag that contradicts it. Another image size, patch size or
            number of channels is allowed: the weights are resampled.
    """
    if not args.pretrained_model_path:
        sizes = {name: utils.defaults(ViT_Classifier)[name] for name in SIZE_WORDS}
        return None, utils.fill_in(args, {**sizes, **utils.DATA_DEFAULTS})
    asked = {name: getattr(args, name) for name in SIZE_WORDS}
    pretrained = read_weights(args.pretrained_model_path, MAE_ViT, sizes=asked)
    sizes = {name: (utils.defaults(ViT_Classifier) | pretrained["model_args"])[name] for name in SIZE_WORDS}
    source = utils.DATA_DEFAULTS
    if args.dataset is None:
        source = {name: pretrained.get(name, value) for name, value in source.items()}
    return pretrained, utils.fill_in(args, {**sizes, **source})


class Classification:
    """What this script trains: an experiment as `engine.training.train` describes it.

    A batch is (images (B, C, H, W) from 0 to 255, labels (B,)). Mixed images have labels (B, classes). With drop path,
    a third tensor (B, depth, 2) has the blocks' factors, see `drop_path_scales`.
    """

    warmup, device_batch_size, betas = WARMUP, DEVICE_BATCH_SIZE, (0.9, 0.999)
    class_weights = None  # (classes,) float

    def __init__(self, args):
        self.pretrained, args = load_pretrained(args)
        self.args, self.arguments, parent = args, utils.free_arguments(args), parent_of(self.pretrained)
        self.model_args = {name: getattr(args, name) for name in (*SIZE_WORDS, "pool")} | not_flags(self.pretrained)
        check_channels(args.augment, args.in_chans)
        with torch.device("meta"):
            ViT_Classifier(**self.model_args)  # bad sizes end here, before the images are read
        name = run_name(args, parent and parent["name"], parent and parent["settings"])
        self.identity = {"kind": "classifier", "name": name, "settings": utils.settings_of(args), "parent": parent}

    def load(self, device):
        args = self.args
        train, test = load_dataset(args.dataset, args.data_dir, args.img_size, in_chans=args.in_chans)
        self.digests = {"images": train.digest(), "test_set": test.digest()}  # of all, so that seeds are comparable
        train, val = draw(train, args.train_images, utils.label_seed(args), args.val_images)
        self.train, self.test, self.val = train.to(device), test.to(device), val and val.to(device)
        self.num_images = len(train.images)
        if args.class_weights == "balanced":
            counts = self.train.labels.bincount(minlength=len(train.classes)).clamp(min=1)
            self.class_weights = self.num_images / (len(counts) * counts)  # the mean over images is 1

    def build(self):
        self.model_args["num_classes"] = len(self.train.classes)
        self.model = ViT_Classifier(**self.model_args)
        if self.args.head_std:
            trunc_normal_(self.model.head.weight, std=self.args.head_std)
            nn.init.zeros_(self.model.head.bias)
        if self.pretrained:
            self.model.load_encoder(self.pretrained["model"])
            say(self.pretrained)
        return self.model

    def parameter_groups(self):
        args = self.args
        if args.layer_decay == 1 and not args.decay_matrices_only:
            return [{"params": list(self.model.parameters())}]
        tokens = ("cls_token", "pos_embedding") if args.decay_matrices_only else ()
        matrices = {"weight_decay_exclude_1d": args.decay_matrices_only}
        return param_groups_layer_decay(self.model, args.weight_decay, tokens, layer_decay=args.layer_decay, **matrices)

    def draw_batch(self, ids, epoch, step):
        args, batch, labels = self.args, self.train.images[ids], self.train.labels[ids]
        key, device = (args.seed, epoch, step), batch.device
        batch = AUGMENTATIONS[args.augment](batch, generator(device, *key, "augment"))
        if args.mixup or args.cutmix:
            seed = generator("cpu", *key, "mixup").initial_seed()
            batch, labels = mix(batch, labels, len(self.train.classes), args.mixup, args.cutmix, seed)
        if not args.drop_path:
            return batch, labels
        random = generator(device, *key, "drop path")
        return batch, labels, drop_path_scales(len(batch), args.encoder_depth, args.drop_path, random, device)

    def loss(self, images, labels, scales=None):
        logits, smoothing = self.model(normalize(images), scales).float(), self.args.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        # PyTorch's own mean divides by the sum of the weights: micro-batches would not add up to the whole batch.
        return F.cross_entropy(logits, labels, self.class_weights, reduction="none", label_smoothing=smoothing).mean()

    def evaluate(self, session, setup):
        """Loss and accuracy of this epoch's weights on the test images or, where there are any, on the held-out ones.

        With held-out images, the test images are used once: after the last epoch, the model gets the best epoch's
        weights, is tested, and is saved with them.
        """
        if self.val is None:
            return self.tested(session, setup)
        scores, _ = evaluate(self.model, self.val, setup.precision, setup.at_once, "val")
        best = best_of(session.progress.get("best"), self.model, session.epoch, scores["val/acc"])
        session.progress["best"] = best
        if session.epoch == self.args.total_epoch:
            self.model.load_state_dict(best["model"])
            scores |= self.tested(session, setup) | {"chosen_epoch": best["epoch"]}
        return scores

    def tested(self, session, setup):
        """Loss and accuracy on the test images, {column: number}; the last epoch puts its predictions into progress."""
        scores, predicted = evaluate(self.model, self.test, setup.precision, setup.at_once)
        if session.epoch == self.args.total_epoch:
            session.progress["predictions"] = torch.stack([self.test.labels.cpu(), predicted])
        return scores

    def content(self):
        return {"kind": "ViT_Classifier", "model_args": self.model_args, "classes": self.train.classes}


def evaluate(model, images, precision, at_once, name="test"):
    """Loss and accuracy over all test (or val) images, {column: number}, and the predicted classes (N,)."""
    predicted, loss = predict(model, images, normalize, precision, at_once)
    scores = accuracies_of(images.labels.cpu(), predicted)
    scores = scores if name == "test" else {"val/acc": scores["test/acc"]}
    return {f"{name}/loss": loss, **scores}, predicted


def best_of(best, model, epoch, acc):
    """The best epoch so far, {epoch (from 1), acc, model (its weights)}; of equal accuracies the first.

    Args:
        best: the result for the previous epoch; None: there is none.
    """
    if best and best["acc"] >= acc:
        return best
    return {"epoch": epoch, "acc": acc, "model": {name: tensor.clone() for name, tensor in model.state_dict().items()}}


def train_classifier(args):
    """Train one run to its end, on from where it stopped; returns its directory."""
    return train(args, Classification)


@exit_in_one_line()
def main(argv=None):
    with utils.shrunk_if_dry(parse_args(argv)) as args:
        directory = train_classifier(args)
        processes.leave()
        if processes.is_first():
            load_model(Path(directory, "model.pt"), ViT_Classifier)
            row = read_metrics(directory)[-1]
            balanced = f", balanced {row['test/balanced_acc']:.2%}" if "test/balanced_acc" in row else ""
            chosen = f" (epoch {row['chosen_epoch']:.0f}, chosen on held-out images)" if "chosen_epoch" in row else ""
            result = f"Trained: {directory}/model.pt, test accuracy {row['test/acc']:.2%}{balanced}{chosen}"
            print("Dry run: trained, evaluated, logged, saved and reloaded." if args.dry_run else result)


if __name__ == "__main__":
    main()
