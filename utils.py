"""What the scripts share: the command line, random generators, device and precision, and where a run is at work."""

import argparse
import contextlib
import ctypes
import hashlib
import inspect
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

import processes
from errors import UserError

# --- command line ---


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that a flag's text tells or that mean "no"."""

    def _get_help_string(self, action):
        left_out = action.default is None or action.default is False  # 0.0 is a default to show
        return action.help if left_out else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help and answers a bad argument with one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text):
    """An argparse type: 1, 2, 3, ..."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def seed(text):
    """An argparse type: a whole number that PyTorch takes as a seed."""
    if not re.fullmatch(r"-?\d+", text, re.ASCII) or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at most 63 bits")
    return int(text)


def png_path(text):
    """An argparse type: the path of a picture to write."""
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)


def file_path(text):
    """An argparse type: the path of a file to write."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; give the file to write, such as {text}/model.pt")
    return text


def shift_or_crop(text):
    """An argparse type: what augmentation.py has in AUGMENTATIONS for "shift" or "crop"."""
    if text not in ("shift", "crop"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither shift nor crop")
    return text == "shift" or text


def non_negative_int(text):
    """An argparse type: 0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive whole number")
    return int(text)


def non_negative_float(text):
    """An argparse type: 0 or a positive number, finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive number")
    return value


def fraction(text):
    """An argparse type: a number from 0 to 1."""
    value = non_negative_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


class NamedValues(argparse.Action):
    """NAME=VALUE ... as a dictionary of numbers and words, by name; None where nothing is given."""

    def __call__(self, parser, namespace, texts, option_string=None):
        values = {}
        for text in texts:
            name, _, value = text.partition("=")
            if not re.fullmatch(r"[a-zA-Z]\w*=[\w.+-]+", text, re.ASCII) or name in values:
                parser.error(f"argument {option_string}: {text!r} is not NAME=VALUE, or given twice")
            values[name] = number_or_word(value)
        setattr(namespace, self.dest, dict(sorted(values.items())))


def number_or_word(text):
    """An int, else a finite float, else the text itself."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(kind(text)):
                return kind(text)
    return text


def named(values):
    """Such a dictionary, or None, as part of a name: "_width=0.3"."""
    return "".join(f"_{name}={value}" for name, value in (values or {}).items())


def add_mask_args(group, what=""):
    group.add_argument(
        "--mask_args",
        nargs="+",
        action=NamedValues,
        metavar="NAME=VALUE",
        help=f"the strategy's own parameters, as in smallest=0.2 of blockwise{what}",
    )


DATA_DEFAULTS = {"dataset": "cifar10", "data_dir": "data"}


def add_data_arguments(parser, datasets, pretrained=False):
    """Args: pretrained: a pretrained model brings its own defaults, which the script fills in."""
    group = parser.add_argument_group("data")
    texts = {
        "dataset": "what to train and test on",
        "data_dir": "directory of the files, or to download them to; for npz the file",
    }
    for name, text in texts.items():
        default, choices = DATA_DEFAULTS[name], datasets if name == "dataset" else None
        if pretrained:
            default, text = None, f"{text} (default: the pretrained model's; from scratch {default})"
        group.add_argument(f"--{name}", choices=choices, default=default, help=text)
    group.add_argument("--train_images", type=positive_int, help="train on this many, equally many of each class")
    group.add_argument(
        "--augment",
        nargs="?",
        const=True,
        type=shift_or_crop,
        metavar="{shift,crop}",
        help="mirroring, and random shifts by up to 4 pixels (shift, or no value) or random resized crops (crop; MAE "
        "paper, table 1e)",
    )
    group.add_argument("--no-augment", dest="augment", action="store_false", help="none (default: set by --preset)")
    return group


SIZE_HELP = {
    "img_size": "pixels along an image's edge",
    "patch_size": "pixels along a patch's edge",
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


def add_optimisation_arguments(parser, warmup, device_batch_size, optimizers):
    """Args: warmup: its default as a fraction of all epochs; device_batch_size: its default by type of device."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--total_epoch", type=positive_int, help="epochs")
    group.add_argument(
        "--warmup_epoch", type=non_negative_float, help=f"epochs of linear warm-up; default: {warmup:g} x --total_epoch"
    )
    group.add_argument("--batch_size", type=positive_int, help="images an update, over all devices")
    group.add_argument(
        "--max_device_batch_size",
        type=positive_int,
        help=f"images at once on a device, more are accumulated; default: {device_batch_size['cuda']} on a GPU, "
        f"{device_batch_size['cpu']} on a CPU",
    )
    group.add_argument(
        "--base_learning_rate", type=non_negative_float, help="peak for a batch of 256; scales with --batch_size"
    )
    group.add_argument("--weight_decay", type=non_negative_float, default=0.05, help="weight decay (AdamW)")
    group.add_argument(
        "--optimizer",
        choices=optimizers,
        help="muon: for the matrices of the transformer blocks, at AdamW's rate and weight decay; AdamW for all else",
    )
    return group


def add_presets(parser, presets, argv):
    """Add --preset, whose row gives the other flags' defaults, so that a flag given by hand wins.

    Args:
        presets: {name: {flag: value}}; what a row leaves out is as in the first.
        argv: the command line, to see now which row; None: sys.argv's.
    """
    first = next(iter(presets))
    rows = ", ".join(f"{name}: {as_flags(presets[name])}" for name in presets if name != first)
    early = Parser(add_help=False)
    for each in (parser, early):
        each.add_argument("--preset", choices=presets, default=first, help=f"defaults of the other flags; {rows}")
    chosen = early.parse_known_args(argv)[0].preset
    parser.set_defaults(**{**presets[first], **presets[chosen]})


def as_flags(values):
    """Values by name as one would type them: --augment --layer_decay 0.75."""
    switch = {True: "--", False: "--no-"}
    return " ".join(
        f"{switch[value]}{name}" if isinstance(value, bool) else f"--{name} {value}" for name, value in values.items()
    )


def fill_in(args, values):
    """The arguments with those of `values` that were not given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **values, **given})


def defaults(constructor):
    """The defaults of a model's constructor, so that they are written in one place."""
    return {name: parameter.default for name, parameter in inspect.signature(constructor).parameters.items()}


def add_device_arguments(group, seed_help):
    group.add_argument("--seed", type=seed, default=42, help=seed_help)
    group.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:N or mps; auto takes CUDA where there is one, else the CPU; mps is untried",
    )
    group.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto takes the fastest on this device: on CUDA bf16 (Ampere and newer) or fp16 (Volta, Turing), on a CPU "
        "bf16 if it has instructions for it and embed_dim is at least 64, else float32",
    )


def add_run_arguments(parser, log_dir):
    group = parser.add_argument_group("run")
    add_device_arguments(group, "all random draws follow from it")
    group.add_argument("--log_dir", default=log_dir, help="the run's directory is made in here")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"torch.compile the model; default: on CUDA where a GPU has at least {COMPILE_FROM:,} images to train on, "
        f"counted in each epoch, as compiling takes about a minute",
    )
    group.add_argument("--overwrite", action="store_true", help="start again where a run of this name exists")
    group.add_argument(
        "--dry_run", action="store_true", help="a few steps on generated images to test the program; keeps no file"
    )
    return group


@contextlib.contextmanager
def shrunk_if_dry(args):
    """The arguments; for --dry_run shrunk to two epochs of two small steps on drawn images, leaving nothing behind."""
    if not args.dry_run:
        yield args
        return
    processes = int(os.environ.get("WORLD_SIZE", 1))
    small = {"dataset": "fake", "train_images": 20 * processes, "total_epoch": 2, "warmup_epoch": None}
    small |= {"batch_size": 8 * processes, "max_device_batch_size": 4}
    if vars(args).get("val_images"):
        small["val_images"] = 20
    output = {name: None for name in ("model_path", "output_model_path") if name in vars(args)}
    with tempfile.TemporaryDirectory() as log_dir:
        yield argparse.Namespace(**{**vars(args), **small, **output, "log_dir": log_dir})


# --- randomness ---


def generator(device, *key):
    """A torch.Generator that follows from the key alone, as in generator("cpu", seed, epoch, step, "masks")."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def epoch_order(num_images, seed, epoch, device):
    """The order in which an epoch takes the images, (N,) int64; drawn on the CPU, so that it is the same everywhere."""
    return torch.randperm(num_images, generator=generator("cpu", seed, epoch, "order")).to(device)


# --- device and precision ---

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
COMPILE_FROM = 2_000_000  # images for a GPU to train on: an estimate of where a minute of compiling pays


def pick_device(name):
    """torch.device for "auto" (CUDA if any), "cpu", "cuda" (of torchrun's processes one each), "cuda:1" or "mps".

    Raises:
        UserError: there is no such device here, or RANK is set without LOCAL_RANK, which says whose GPU is whose.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found = ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda":
        if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
            raise UserError(
                "RANK is set and LOCAL_RANK is not, so this process cannot tell which GPU is its own. Start with "
                "torchrun, which sets both; or set LOCAL_RANK (in a job of srun: to $SLURM_LOCALID)."
            )
        name = f"cuda:{os.environ['LOCAL_RANK'] if 'RANK' in os.environ else 0}"
    if name not in found:
        raise UserError(f"--device {name} is not there; this machine has {', '.join(found)}.")
    return torch.device(name)


def pick_precision(name, device, embed_dim):
    """One of PRECISIONS; for "auto" the fastest on this device.

    On CUDA that is what its tensor cores compute in: bf16 from capability 8.0 on, fp16 from 7.0 on. On a CPU with bf16
    arithmetic (Zen 4), after `tune`, bf16 was measured 1.7 times as fast at width 96, 1.1 to 1.5 at 64, equal at 32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "float32"
    if device.type != "cpu":
        return "float32"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "bf16" if embed_dim >= 64 and {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def compiled(model, choice, device, num_images=math.inf):
    """The model's forward pass through torch.compile, or the model as it is.

    Where compiling fails (no compiler, too old a GPU, a damaged cache), one line says why, and the run goes on without.

    Args:
        choice: whether to compile; None: on CUDA, from COMPILE_FROM images on.
        num_images: that this device will train on, each epoch counted.
    """
    if not (device.type == "cuda" and num_images >= COMPILE_FROM if choice is None else choice):
        return model
    from torch._dynamo.exc import ShortenTraceback  # slow; errors of the compiler, never the model's own

    fast, tried = torch.compile(model, dynamic=False), False

    def forward(*inputs):
        nonlocal fast, tried
        try:
            if torch.is_grad_enabled() and not tried:
                try_backward(model, fast(*inputs))
                tried = True
            return fast(*inputs)
        except ShortenTraceback as error:
            cause = getattr(error, "inner_exception", error)
            why = f"{type(cause).__name__}: {cause}".splitlines()[0]
            print(f"Cannot compile the model ({why}); the run goes on without torch.compile.", file=sys.stderr)
        fast = model
        return model(*inputs)

    return forward


def try_backward(model, outputs):
    """Take a compiled model's backward pass, which is compiled only now, and drop the gradients."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(output.sum() for output in outputs if output.requires_grad)
    torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


def autocast(precision, device):
    """Context of the forward pass: matrix products in bf16 or fp16, or plain float32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")


def loss_scaler(precision, device):
    """For fp16, scales the loss up, as small gradients would become 0; for other precisions, does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def tune(model, device, precision, num_patches):
    """Settings that change the speed of a step, in place; measured on 2 cores of a Zen 4 CPU, default MAE, batch 32.

    glibc gives each large block back to the system when it is freed, and the next step pays for every page again:
    kept, a float32 step is up to 1.28 times as fast. Attention as plain matrix products is faster than the fused
    kernel, whose backward pass is slow here: in bf16 1.3 to 2.8 times a whole step, at up to 256 patches, as plain
    products take memory with their square; in float32 0.97 to 1.2 times at up to 64.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 256 * 2**20)
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm's Attention
            module.fused_attn = num_patches > (256 if precision == "bf16" else 64)


class InMainMemory:
    """Images (N, 3, H, W) that stay where they are: indexed like a tensor, but a batch of them comes to the device."""

    def __init__(self, images, batch_device):
        self.images, self.batch_device = images, batch_device
        self.device = images.device  # where an index should be

    def __len__(self):
        return len(self.images)

    def __getitem__(self, ids):
        return self.images[ids].pin_memory().to(self.batch_device, non_blocking=True)


def free_memory(device):
    """Bytes that a GPU has left; of other devices no limit."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def placed(device, *sets):
    """The ImageSets on the device; None stays None.

    Images that would take over half of its free memory stay in main memory, said in one line: the other half is for
    the model and its activations.
    """
    needed, free, put = sum(part.images.nbytes for part in sets if part), free_memory(device), torch.Tensor.to
    if needed > free / 2:
        put = InMainMemory
        if processes.is_first():
            print(
                f"The images ({needed / 2**20:,.0f} MB) would take over half of the {free / 2**20:,.0f} MB free on "
                f"{device}: they stay in main memory, and each batch is copied to {device}."
            )
    return [part and part._replace(images=put(part.images, device), labels=part.labels.to(device)) for part in sets]


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def peak_memory_mb(device):
    """The most memory so far: of the device on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss would begin with what the parent process had
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


# --- where a run is at work ---


def environment(device=None):
    """Where and from what a run was started: command, time, commit, versions, machine.

    Args:
        device: the one that computes; None: the one that --device auto takes.
    """
    source = Path(__file__).parent

    def git(*command):
        try:
            return subprocess.check_output(
                ["git", "-C", source, *command], stderr=subprocess.DEVNULL, text=True
            ).strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    commit = git("rev-parse", "HEAD")
    cuda = device.type == "cuda" if device else torch.cuda.is_available()
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "clean": git("status", "--porcelain", "--untracked-files=no") == "" if commit else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "cuda": torch.version.cuda if cuda else None,
        "processor": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def this_start(device, world_size, plan):
    """What config.json keeps of each start of a run."""
    return {**environment(device), "device": device.type, "processes": world_size, "micro_batches": len(plan.slices)}


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
