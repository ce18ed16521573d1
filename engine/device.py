"""The device that computes: which one, its precision and its speed, its random generators; what machine it is in."""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from engine.errors import UserError

# --- device and precision ---

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
DEFAULT_SIZE = 256 * 192  # tokens x width of the default model
LARGE_GPU = 40e9  # bytes free
# Compiling pays if a GPU trains on this many images, each epoch counted. By first and later steps of one H100, it pays
# from 1.1 (patch 2) or 2.1 million (patch 4) in pretraining, 0.3 million in fine-tuning (logs/report/BENCHMARK.md).
COMPILE_FROM = 2_000_000


def pick_device(name):
    """torch.device for "auto" (CUDA if any), "cpu", "cuda" (under torchrun, a GPU for each process), "cuda:1" or "mps".

    Raises:
        UserError: there is no such device here, or RANK is set without LOCAL_RANK, which tells a process its GPU.
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


def images_at_once(standard, num_patches, embed_dim, free):
    """Images at once on a GPU: `standard` for the default model, more for fewer or smaller tokens; x 4 with 40 GB free.

    Pretraining the default model takes 6.7 GB with 512 and 26 GB with 2048; with 2048 an H100 is 1.15 times as fast.

    Args:
        free: bytes.
    """
    return max(1, standard * (4 if free >= LARGE_GPU else 1) * DEFAULT_SIZE // (num_patches * embed_dim))


def compile_mode(choice, device, num_images, num_micro_batches):
    """torch.compile's mode for a training step; None: do not compile.

    On small batches, a GPU waits for the CPU. CUDA graphs ("reduce-overhead") avoid it: on an H100, 1.65 times as fast
    at patch 4 and batch 1024, 1.55 times in fine-tuning. With several micro-batches, they would overwrite gradients.

    Args:
        choice: whether to compile; None: only on CUDA and with at least COMPILE_FROM images.
        num_images: how many this device will train on, each epoch counted.
    """
    if choice is None:
        choice = device.type == "cuda" and num_images >= COMPILE_FROM
    if not choice:
        return None
    return "reduce-overhead" if device.type == "cuda" and num_micro_batches == 1 else "default"


def compiled(function, mode):
    """The function, compiled by torch.compile in this mode; unchanged if mode is None."""
    if mode is None:
        return function
    fast = torch.compile(function, dynamic=False, mode=mode)
    if mode != "reduce-overhead":
        return fast

    def step(*inputs):
        torch.compiler.cudagraph_mark_step_begin()  # the graph may now overwrite the last step's outputs
        return fast(*inputs)

    return step


def autocast(precision, device):
    """Context of the forward pass: matrix products in bf16 or fp16, or plain float32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")


def loss_scaler(precision, device):
    """A GradScaler: for fp16 it scales the loss up, because small gradients would become 0; else it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def tune(model, device, precision, num_patches):
    """Settings that change the speed of a step, in place; measured on 2 cores of a Zen 4 CPU, default MAE, batch 32.

    glibc gives each large block back to the system when it is freed, and the next step pays for every page again. If
    glibc keeps the blocks, a float32 step is up to 1.28 times as fast. Attention as plain matrix products is faster
    than the fused kernel, whose backward pass is slow here. In bf16 it makes a whole step 1.3 to 2.8 times as fast; it
    is used up to 256 patches, because its memory grows with their square. In float32: 0.97 to 1.2 times, up to 64.
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
    """Peak memory so far, in MB (2**20 bytes): of the device on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):  # gVisor's has none
        return int(peak[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # on Linux it begins with what the parent process had
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --- randomness ---


def generator(device, *key):
    """A torch.Generator that follows from the key alone, as in generator("cpu", seed, epoch, step, "masks")."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


# --- where a run is at work ---


def environment(device=None):
    """Facts about the start of a run, {name: value}: command, time, commit, versions, machine.

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

    commit, code = git("rev-parse", "HEAD"), hashlib.blake2b(digest_size=8)
    for path in sorted(path for part in ("*.py", "engine/*.py", "images/*.py") for path in source.parent.glob(part)):
        code.update(path.name.encode() + path.read_bytes())
    cuda = device.type == "cuda" if device else torch.cuda.is_available()
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "source": code.hexdigest(),
        "clean": git("status", "--porcelain", "--untracked-files=no") == "" if commit else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "device": "cuda" if cuda else device.type if device else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "processor": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
