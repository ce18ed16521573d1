"""What both training scripts share and no other file owns: errors a user can mend, random generators, device and
precision, the learning-rate schedule, batches cut by rank, the update, the process group."""

import argparse
import contextlib
import ctypes
import hashlib
import inspect
import itertools
import math
import os
import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NO_MEMORY = "out of memory|can't allocate memory|bad_alloc|ALLOC_FAILED"  # PyTorch has a class for the first only

# --- command line ---


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that mean "left out"."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help and answers a bad argument with one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextlib.contextmanager
def exit_on_bad_input():
    """Turn what the user can mend, a ValueError or a file trouble, into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def exit_when_out_of_memory():
    """Turn a refusal of memory, by the device or this machine, into one line and exit code 1."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error), re.IGNORECASE):
            raise
        wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        sys.exit(
            f"Out of memory{f' ({wanted[1]} more were asked for)' if wanted else ''}. A smaller model or "
            f"--max_device_batch_size needs less."
        )


def positive_int(text):
    """An argparse type: 1, 2, 3, ..."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def non_negative_float(text):
    """An argparse type: a finite number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def add_data_arguments(parser, datasets):
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=datasets, default="cifar10", help="what to train and test on")
    group.add_argument("--data_dir", default="data", help="where the files are, or are downloaded to")
    group.add_argument("--train_images", type=positive_int, help="train on so many images, equally many of each class")
    group.add_argument("--augment", action="store_true", help="random shifts by up to 4 pixels and mirroring")
    return group


SIZE_HELP = {
    "img_size": "pixels along an image's edge",
    "patch_size": "pixels along a patch's edge",
    "embed_dim": "width of the tokens, encoder and decoder alike",
    "encoder_depth": "transformer blocks of the encoder",
    "num_heads": "attention heads, encoder and decoder alike",
    "decoder_depth": "transformer blocks of the decoder",
}


def add_size_arguments(group, names, note=""):
    for name in names:
        group.add_argument(f"--{name}", type=positive_int, help=SIZE_HELP[name] + note)


def add_optimisation_arguments(parser, warmup, device_batch_size, **defaults):
    group = parser.add_argument_group("optimisation")
    group.add_argument("--total_epoch", type=positive_int, help="epochs")
    group.add_argument(
        "--warmup_epoch", type=non_negative_float, help=f"epochs of linear warm-up; left out: {warmup} of all"
    )
    group.add_argument("--batch_size", type=positive_int, help="images an update, over all devices")
    group.add_argument(
        "--max_device_batch_size",
        type=positive_int,
        help=f"images at once on a device, more are accumulated; left out: {device_batch_size['cuda']} on a GPU, "
        f"{device_batch_size['cpu']} on a CPU",
    )
    group.add_argument(
        "--base_learning_rate", type=non_negative_float, help="peak rate for a batch of 256; scaled with it"
    )
    group.add_argument("--weight_decay", type=non_negative_float, default=0.05, help="AdamW's, on every parameter")
    parser.set_defaults(**defaults)


def fill_in(args, values):
    """The arguments with those of `values` that were left out."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **values, **given})


def defaults(constructor):
    """The defaults of a model's constructor, so that they are written in one place."""
    return {name: parameter.default for name, parameter in inspect.signature(constructor).parameters.items()}


def add_run_arguments(parser, log_dir):
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=42, help="all random draws follow from it")
    group.add_argument("--log_dir", default=log_dir, help="the run's directory is made in here")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto takes CUDA where there is one")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bf16"), default="auto", help="auto takes the faster on this device"
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the model; left out: on CUDA only",
    )
    group.add_argument("--overwrite", action="store_true", help="start anew where a run of this name exists")
    group.add_argument(
        "--dry_run", action="store_true", help="a few steps through every line, on drawn images, leaving nothing"
    )


# --- randomness ---


def generator(device, *key):
    """A torch.Generator that follows from the key alone, as in generator("cpu", seed, epoch, step, "masks")."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


# --- device and precision ---

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def pick_device(name, local_rank=0):
    """torch.device for "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: there is no such device here.
    """
    found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if len(found) > 1 else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    if name not in found:
        raise ValueError(f"--device {name} is not there; this machine has {', '.join(found)}.")
    return torch.device(name)


def pick_precision(name, device, embed_dim):
    """ "bf16" or "float32" for "auto": the faster of the two, as measured.

    On a CPU with bf16 arithmetic (Zen 4), after `tune`: 1.7 times as fast at width 96, 1.1 to 1.5 at 64, equal at 32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "bf16" if embed_dim >= 64 and {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def compiled(model, choice, device):
    """The model through torch.compile, or as it is: as asked, else on CUDA only, where runs are long enough to pay."""
    wanted = device.type == "cuda" if choice is None else choice
    return torch.compile(model, dynamic=False) if wanted else model


def autocast(precision, device):
    """Context of the forward pass: bf16 matrix products, or plain float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


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


def peak_memory_mb(device):
    """The most memory so far: of the device on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss would begin with what the parent process had
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def count_gflop(step):
    """What calling step() computes, in 1e9 multiplications and additions; plain attention, as fused is not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


# --- the plan of a training run ---


def cosine_lr(step, *, peak, warmup_steps, total_steps):
    """Learning rate of update `step` (from 0): linear warm-up, then half a cosine towards 0 at total_steps.

    The last warm-up step has the peak exactly; without warm-up, step 0 has.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start = max(warmup_steps - 1, 0)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - start) / (total_steps - start)))


class Plan(NamedTuple):
    """What follows from the arguments, the number of images and this process's place among the others."""

    steps_per_epoch: int
    slices: list  # of the global batch: this process's micro-batches
    total_steps: int
    warmup_steps: int
    peak_lr: float

    def lr(self, step):
        return cosine_lr(step, peak=self.peak_lr, warmup_steps=self.warmup_steps, total_steps=self.total_steps)


# Images at once on a device: on a GPU the reference's. On a CPU, pretraining with 512 is no faster and takes 12 GB of
# memory instead of 4.
DEVICE_BATCH_SIZE = {"pretraining": {"cuda": 512, "cpu": 128}, "fine-tuning": {"cuda": 256, "cpu": 128}}


def micro_batches(start, count, largest):
    """Slices that cut `count` images from `start` on into the fewest parts of at most `largest`, as even as can be."""
    parts = math.ceil(count / largest)
    edges = [start + count * i // parts for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def plan_training(args, num_images, default_warmup, default_device_batch_size, rank=0, world_size=1):
    """Cut the global batch by process and into micro-batches that fit the device; lay out the learning rate.

    An epoch's last short batch is dropped. The rate scales with the batch: peak = base * batch / 256 (Goyal et al.
    2017, arXiv:1706.02677).

    Args:
        default_warmup: the fraction of all epochs to warm up in where --warmup_epoch is left out.
        default_device_batch_size: the most images at once where --max_device_batch_size is left out.

    Raises:
        ValueError: the batch is no multiple of world_size or larger than the data, or the warm-up longer than the run.
    """
    batch_size = args.batch_size
    if batch_size % world_size:
        raise ValueError(f"--batch_size {batch_size} is not a multiple of the {world_size} processes.")
    share = batch_size // world_size
    if batch_size > num_images:
        raise ValueError(f"--batch_size {batch_size} is more than the {num_images} training images; use at most that.")
    warmup_epochs = default_warmup * args.total_epoch if args.warmup_epoch is None else args.warmup_epoch
    if not 0 <= warmup_epochs <= args.total_epoch:
        raise ValueError(f"--warmup_epoch {warmup_epochs:g} is not within 0 to --total_epoch {args.total_epoch}.")
    steps_per_epoch = num_images // batch_size
    return Plan(
        steps_per_epoch=steps_per_epoch,
        slices=micro_batches(rank * share, share, args.max_device_batch_size or default_device_batch_size),
        total_steps=args.total_epoch * steps_per_epoch,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        peak_lr=args.base_learning_rate * batch_size / 256,
    )


def facts(args, model, plan, precision, images):
    """What a run's config.json tells beside the arguments; images: their digest."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "effective_batch_size": args.batch_size,
        "peak_learning_rate": plan.peak_lr,
        "warmup_steps": plan.warmup_steps,
        "total_steps": plan.total_steps,
        "precision": precision,
        "images": images,
    }


def dry(args, log_dir):
    """The same arguments, shrunk to two epochs of two small steps on drawn images, all output into log_dir."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    small = {"dataset": "fake", "train_images": 20 * processes, "total_epoch": 2, "warmup_epoch": None}
    small |= {"batch_size": 8 * processes, "max_device_batch_size": 4, "log_dir": log_dir}
    if vars(args).get("val_images"):
        small["val_images"] = 20
    output = {name: None for name in ("model_path", "output_model_path") if name in vars(args)}
    return argparse.Namespace(**{**vars(args), **small, **output})


# --- process group ---


def start_process_group(device_name):
    """Join the processes torchrun started, if any: (rank, world_size, device).

    Raises:
        ValueError: there is no such device here.
    """
    if "RANK" not in os.environ:
        return 0, 1, pick_device(device_name)
    device = pick_device(device_name, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def is_first_process():
    return int(os.environ.get("RANK", 0)) == 0


def sum_over_ranks(tensor):
    """Add a tensor up over all processes, in place; with one process nothing happens."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def average_over_ranks(model, loss):
    """Give every process the mean gradient, in place: equal shards of a batch then step as the whole would.

    Returns:
        The mean of all processes' losses; with one process nothing happens.
    """
    if not dist.is_initialized():
        return loss
    tensors = [*(parameter.grad for parameter in model.parameters()), loss]
    flat = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
    return loss


def update(model, optimizer, slices, lr, loss_of):
    """One step of the optimizer on the global batch: gradients of micro-batches added up, of processes averaged.

    Args:
        slices: this process's micro-batches; loss_of: slice -> the mean loss over its images.

    Returns:
        The mean loss over the global batch.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss_sum, count = 0, slices[-1].stop - slices[0].start
    for part in slices:
        loss = loss_of(part) * ((part.stop - part.start) / count)
        loss.backward()
        loss_sum += loss.detach()
    loss = average_over_ranks(model, loss_sum)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def barrier():
    if dist.is_initialized():
        dist.barrier()


def leave_process_group():
    """Wait for the others, then close the connections: a process that just ends can take its peers down with it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
