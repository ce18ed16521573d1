"""The command line that the scripts share: argument types, groups of flags, presets, and the name of a run."""

import argparse
import contextlib
import difflib
import hashlib
import inspect
import math
import os
import re
import sys
import tempfile
from pathlib import Path

from engine.checkpoints import FILES
from engine.device import COMPILE_FROM, PRECISIONS
from engine.optimizers import OPTIMIZERS
from images.augmentation import AUGMENTATIONS
from images.load import DATASETS, data_name

# --- argument types ---


USUAL_NAMES = {"lr": "base_learning_rate", "blr": "base_learning_rate", "bs": "batch_size", "wd": "weight_decay"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag's default, except None (the flag's text explains it) and False."""

    def _get_help_string(self, action):
        left_out = action.default is None or action.default is False  # 0.0 is a default to show
        return action.help if left_out else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help and answers a bad argument with one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Exit with one line, which says what flag may have been meant by an unknown one."""
        hints, unknown = [], message.startswith("unrecognized")
        for name in re.findall(r"(?<!\S)--([^\s=]+)", message) if unknown else []:
            word = name.replace("-", "_")
            near = difflib.get_close_matches(f"--{USUAL_NAMES.get(word, word)}", self._option_string_actions, n=1)
            hints += [f"; --{name}: did you mean {near[0]}?"] if near else []
        self.exit(2, f"{self.prog}: error: {message}{''.join(hints)}\n")


def number(kind, low, high, what):
    """Make an argparse type: a number of `kind` from low to high; errors call it `what`."""

    def parsed(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parsed


positive_int = number(int, 1, math.inf, "a positive whole number")
non_negative_int = number(int, 0, math.inf, "0 or a positive whole number")
non_negative_float = number(float, 0, sys.float_info.max, "0 or a positive number")
fraction = number(float, 0, 1, "a number from 0 to 1")
seed = number(int, -(2**63), 2**63 - 1, "a whole number of at most 63 bits")  # that PyTorch takes


def picture_path(text):
    """An argparse type: the path of a picture to write."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .pdf or .svg")
    return Path(text)


def file_path(text):
    """An argparse type: the path of a file to write."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; give the file to write, such as {text}/model.pt")
    return text


# --- groups of flags ---

DATA_DEFAULTS = {"dataset": "cifar10", "data_dir": "data"}


def add_data_arguments(parser, pretrained=False):
    """Args: pretrained: a pretrained model brings its own defaults, which the script fills in."""
    group = parser.add_argument_group("data")
    default = {name: None if pretrained else value for name, value in DATA_DEFAULTS.items()}
    note = "; default: the pretrained model's; from scratch {}" if pretrained else ""
    text = "what to train and test on" + note.format(DATA_DEFAULTS["dataset"])
    group.add_argument("--dataset", choices=DATASETS, default=default["dataset"], help=text)
    text = "directory of the files, or to download them to; for npz the file" + note.format(DATA_DEFAULTS["data_dir"])
    group.add_argument("--data_dir", default=default["data_dir"], help=text)
    text = "train on this many, drawn by --seed: equally many of each class, or in proportion to its size"
    group.add_argument("--train_images", type=positive_int, help=text)
    text = "shift: mirror, and shift by up to 4 pixels; crop: mirror, and random resized crops (MAE paper, table 1e)"
    text += "; official: crops, RandAugment and random erasing (table 9)"
    group.add_argument("--augment", choices=AUGMENTATIONS, default="none", help=text)
    return group


def add_label_seed(group):
    group.add_argument("--label_seed", type=seed, help="draws the labelled images; default: --seed")


def label_seed(args):
    return args.seed if args.label_seed is None else args.label_seed


SIZE_HELP = {
    "img_size": "pixels along an image's edge",
    "patch_size": "pixels along a patch's edge",
    "in_chans": "channels of the images, up to 16; 1: colour becomes grey",
    "embed_dim": "width of the tokens",
    "encoder_depth": "transformer blocks of the encoder",
    "num_heads": "attention heads of a block",
    "decoder_depth": "transformer blocks of the decoder",
}


def add_size_arguments(group, names, from_scratch=None):
    """Args: from_scratch: the default sizes without a pretrained model; None: the caller sets the defaults."""
    for name in names:
        note = f"; default: as in the pretrained model, {from_scratch[name]} from scratch" if from_scratch else ""
        group.add_argument(f"--{name}", type=positive_int, help=SIZE_HELP[name] + note)


def add_optimisation_arguments(parser, warmup, device_batch_size):
    """Args: warmup: its default as a fraction of all epochs; device_batch_size: its default by type of device."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--total_epoch", type=positive_int, help="epochs")
    text = f"epochs of linear warm-up; default: {warmup:g} x --total_epoch"
    group.add_argument("--warmup_epoch", type=non_negative_float, help=text)
    group.add_argument("--batch_size", type=positive_int, help="images an update, over all devices")
    text = f"images at once per device (gradient accumulation); default: {device_batch_size['cpu']} on a CPU; on a GPU "
    text += f"{device_batch_size['cuda']} for the default model, more for smaller models, times 4 with 40 GB free"
    group.add_argument("--max_device_batch_size", type=positive_int, help=text)
    text = "peak for a batch of 256; scales with --batch_size"
    group.add_argument("--base_learning_rate", type=non_negative_float, help=text)
    text = "learning rate at the end of the cosine; does not scale with --batch_size"
    group.add_argument("--end_rate", type=non_negative_float, default=0.0, help=text)
    group.add_argument("--weight_decay", type=non_negative_float, default=0.05, help="weight decay (AdamW)")
    text = "muon: for the matrices of the transformer blocks, at AdamW's rate and weight decay; AdamW for all else"
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help=text)
    return group


def add_device_arguments(group, seed_help):
    group.add_argument("--seed", type=seed, default=42, help=seed_help)
    text = "auto, cpu, cuda, cuda:N or mps; auto takes CUDA where there is one, else the CPU; mps is untried"
    group.add_argument("--device", default="auto", help=text)
    text = "auto takes the fastest on this device: on CUDA bf16 (Ampere and newer) or fp16 (Volta, Turing), on a CPU "
    text += "bf16 if it has instructions for it and embed_dim is at least 64, else float32"
    group.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help=text)


def add_run_arguments(parser, log_dir):
    group = parser.add_argument_group("output")
    group.add_argument("--output_model_path", type=file_path, help="copy the finished model.pt to this file")
    group = parser.add_argument_group("run")
    add_device_arguments(group, "all random draws follow from it")
    group.add_argument("--log_dir", default=log_dir, help="the run's directory is made in here")
    text = f"torch.compile the step; default: on CUDA where a GPU has at least {COMPILE_FROM:,} images to train on, "
    text += "counting each epoch, because compiling takes about a minute"
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help=text)
    group.add_argument("--overwrite", action="store_true", help="start again, deleting an earlier run of this name")
    text = "a few steps on generated images to test the program; keeps no file"
    group.add_argument("--dry_run", action="store_true", help=text)
    return group


# --- presets and defaults ---


def add_presets(parser, presets, argv, inherited=None):
    """Add --preset: it sets the defaults of other flags, so a flag on the command line wins.

    Args:
        presets: {name: {flag: value}}; a flag that a preset leaves out has its value from the first preset.
        argv: the command line, read here to find the preset; None: sys.argv.
        inherited: {flag: value}; they replace values of the first preset, but not those of another one.
    """
    first = next(iter(presets))
    rows = ", ".join(f"{name}: {as_flags(presets[name])}" for name in presets if name != first)
    early = Parser(add_help=False)
    for each in (parser, early):
        each.add_argument("--preset", choices=presets, default=first, help=f"defaults of the other flags; {rows}")
    chosen = early.parse_known_args(argv)[0].preset
    parser.set_defaults(**{**presets[first], **(inherited or {}), **(presets[chosen] if chosen != first else {})})


def as_flags(values):
    """Values by name as one would type them: --norm_pix_loss --layer_decay 0.75."""
    switch = {True: "--", False: "--no-"}
    return " ".join(
        f"{switch[value]}{name}" if isinstance(value, bool) else f"--{name} {value}" for name, value in values.items()
    )


def fill_in(args, values):
    """A copy of the arguments; those that are None or missing come from `values`, {name: value}."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **values, **given})


def defaults(constructor):
    """The defaults of a model's constructor, so that they are written in one place."""
    return {name: parameter.default for name, parameter in inspect.signature(constructor).parameters.items()}


@contextlib.contextmanager
def shrunk_if_dry(args):
    """Yield the arguments; for --dry_run, with 2 epochs of 2 small steps, generated images and a temporary log_dir."""
    if not args.dry_run:
        yield args
        return
    processes = int(os.environ.get("WORLD_SIZE", 1))
    small = {"dataset": "fake", "train_images": 20 * processes, "total_epoch": 2, "warmup_epoch": None}
    small |= {"batch_size": 8 * processes, "max_device_batch_size": 4}
    if vars(args).get("val_images"):
        small["val_images"] = 20
    with tempfile.TemporaryDirectory() as log_dir:
        yield argparse.Namespace(**{**vars(args), **small, "output_model_path": None, "log_dir": log_dir})


# --- what identifies a run ---

# Flags that say where and how a run computes, not what: they are not in its name and may change when it is continued.
# But the precision that is in use must stay the same: it is among the run's facts.
FREE = {"data_dir", "device", "precision", "compile", "max_device_batch_size", "probe_every", "preset"}
FREE |= {"log_dir", "overwrite", "dry_run", "pretrained_model_path", "output_model_path"}
WEIGHTS = {".pt", ".pth", ".bin", ".safetensors"}
LONGEST_NAME = 255  # bytes, of file systems


def settings_of(args):
    """What is computed: {flag: value} of the arguments that are not FREE; a folder or file by its name."""
    settings = {flag: value for flag, value in vars(args).items() if flag not in FREE}
    if settings.get("init_from"):
        path = Path(settings["init_from"]).resolve()
        path = path.parent if path.name in FILES else path
        settings["init_from"] = path.stem if path.suffix in WEIGHTS else path.name
    return settings | {"dataset": data_name(args.dataset, args.data_dir)}


def free_arguments(args):
    """The FREE arguments, {flag: value}: where and how a run computes; dataset as it was typed."""
    return {flag: value for flag, value in vars(args).items() if flag in FREE} | {"dataset": args.dataset}


def name_parts(settings, words, defaults, always=()):
    """The parts of a run's name: one for each setting that is not the default, in the order of `words`.

    Args:
        settings, defaults: {flag: value}; words: {flag: word before its value in the name}.
        always: flags that are in the name even at their default.
    """
    said = [flag for flag in words if flag in always or settings[flag] != defaults[flag]]
    return [spelled(words[flag], settings[flag]) for flag in said]


def spelled(word, value):
    """A setting in a name: ep15, normpix, nonormpix."""
    if isinstance(value, bool):
        return word if value else f"no{word}"
    return f"{word}{value}".removesuffix(".0" if isinstance(value, float) else "")


def joined(parts):
    """The name of a run's directory; if it is too long for a file system, its end becomes a digest of the name."""
    name = "_".join(parts).replace("/", "_").replace("\0", "_")  # a part may come from a file
    encoded = os.fsencode(name)
    if len(encoded) <= LONGEST_NAME:
        return name
    digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    return f"{encoded[: LONGEST_NAME - 17].decode(errors='ignore')}_{digest}"  # no half of a letter
