"""Time whole training steps, batch drawn to weights updated: ours, a naive loop's and other libraries'.

    python -m scripts.benchmark                                          all paths in turn
    python -m scripts.benchmark --paths ours naive --patch_size 4        the training script's own flags

The table goes to the terminal and, as CSV with machine and versions in a JSON file beside it, to --output.
"""

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

import mae_pretrain
import train_classifier
import utils
from engine import processes, training
from engine.device import PRECISIONS, autocast, environment, peak_memory_mb, pick_device
from engine.errors import UserError, as_user_error, exit_in_one_line
from images.load import load_dataset
from images.pixels import normalize
from model import MAE_Encoder
from scripts.cost import gflop_per_image

ROUNDS = 3  # over all paths, so that other work on the machine slows all alike
PRETRAINING = mae_pretrain.parse_args, mae_pretrain.Pretraining
FINE_TUNING = train_classifier.parse_args, train_classifier.Classification

# --- (experiment, setup) -> step(i) ---


def in_turn(experiment, setup):
    """The indices of step i's images, as the training scripts draw them."""
    count, size = experiment.num_images, setup.plan.batch_size
    order = torch.randperm(count).to(setup.device)
    return lambda i: order[torch.arange(i * size, (i + 1) * size) % count]


def ours(experiment, setup):
    """The step of a training script: its model, optimizer, batches and loss."""
    (model, optimizer, loss_of), ids = training.build(experiment, setup), in_turn(experiment, setup)
    draw, lr = experiment.draw_batch, setup.plan.peak_lr
    return lambda i: training.update(setup, model, optimizer, loss_of, draw(ids(i), 0, i), lr)


def plain_steps(model, loss_of, fused=None):
    """Steps with PyTorch's AdamW, as documentation has them; loss_of(i) -> loss of step i."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=fused)

    def step(i):
        optimizer.zero_grad()
        loss_of(i).backward()
        optimizer.step()

    return step


def naive_batches(args, device):
    """Batches of a loader with workers, each image through PIL and transforms, as torchvision's CIFAR10 gives it."""
    train, _ = load_dataset(args.dataset, args.data_dir, args.img_size)
    pixels, labels, workers = train.images.permute(0, 2, 3, 1).numpy(), train.labels, min(4, os.cpu_count())
    steps = [transforms.ToPILImage(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    transform = transforms.Compose(steps)
    how = {"num_workers": workers, "multiprocessing_context": "fork", "shuffle": True, "drop_last": True}
    how["collate_fn"] = lambda ids: (torch.stack([transform(pixels[i]) for i in ids]), labels[ids])
    while True:
        for batch in DataLoader(range(len(pixels)), args.batch_size, **how):
            yield [tensor.to(device) for tensor in batch]


def naive(experiment, setup):
    """As a course's notebook would: eager, masks drawn image by image with NumPy; a classifier computes all tokens."""
    model, batches = experiment.build().to(setup.device), naive_batches(experiment.args, setup.device)

    def loss_of(i):
        images, labels = next(batches)
        if experiment.identity["kind"] == "classifier":
            return F.cross_entropy(model.head(MAE_Encoder.forward(model, images)[:, 0]), labels)
        masks = np.stack([np.random.permutation(model.shuffle.grid_size**2) for _ in images])
        return model.loss(images, torch.from_numpy(masks).to(setup.device))

    return plain_steps(model, loss_of)


def library_steps(model, loss_of, experiment, setup):
    """Steps of another library's model: our batches and precision, its own masks and loss."""
    loss_of = torch.compile(loss_of) if experiment.args.compile else loss_of
    ids = in_turn(experiment, setup)

    def loss_of_step(i):
        with autocast(setup.precision, setup.device):
            return loss_of(normalize(experiment.images[ids(i)]))

    return plain_steps(model, loss_of_step, fused=True)


def huggingface(experiment, setup):
    """transformers' ViTMAEForPreTraining, its scaled-dot-product attention."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    args, width = experiment.args, experiment.args.embed_dim
    sizes = {"image_size": args.img_size, "patch_size": args.patch_size, "hidden_size": width}
    sizes |= {"num_hidden_layers": args.encoder_depth, "num_attention_heads": args.num_heads}
    sizes |= {"intermediate_size": 4 * width, "decoder_hidden_size": width, "decoder_intermediate_size": 4 * width}
    sizes |= {"decoder_num_hidden_layers": args.decoder_depth, "decoder_num_attention_heads": args.num_heads}
    config = ViTMAEConfig(**sizes, qkv_bias=False, mask_ratio=args.mask_ratio, attn_implementation="sdpa")
    model = ViTMAEForPreTraining(config).to(setup.device).train()
    return library_steps(model, lambda images: model(images).loss, experiment, setup)


def lightly(experiment, setup):
    """lightly's MAE on timm's VisionTransformer, put together as its documentation does."""
    from lightly.models import utils as tokens
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    args, width, patch_size = experiment.args, experiment.args.embed_dim, experiment.args.patch_size
    sizes = {"embed_dim": width, "depth": args.encoder_depth, "num_heads": args.num_heads, "num_classes": 0}
    encoder = MaskedVisionTransformerTIMM(vit=VisionTransformer(args.img_size, patch_size, **sizes))
    sizes = {"embed_dim": width, "decoder_embed_dim": width, "mlp_ratio": 4.0, "patch_size": patch_size}
    sizes |= {"decoder_depth": args.decoder_depth, "decoder_num_heads": args.num_heads}
    decoder = MAEDecoderTIMM(num_patches=encoder.sequence_length - 1, **sizes)

    def loss_of(x):
        shape = len(x), encoder.sequence_length
        keep, hidden = tokens.random_token_mask(shape, args.mask_ratio, device=x.device)
        known = decoder.embed(encoder.encode(images=x, idx_keep=keep))
        everything = tokens.repeat_token(decoder.mask_token, shape).to(known.dtype)
        decoded = decoder.decode(tokens.set_at_index(everything, keep, known))
        pred = decoder.predict(tokens.get_at_index(decoded, hidden))
        target = tokens.get_at_index(tokens.patchify(x, patch_size), hidden - 1)  # without the cls token
        return F.mse_loss(pred.float(), target)

    return library_steps(torch.nn.ModuleList([encoder, decoder]).to(setup.device), loss_of, experiment, setup)


# --- the paths ---


class Way(NamedTuple):
    """How a path takes its steps."""

    start: Callable
    flags: str = "--no-compile"  # of the training script
    script: tuple = PRETRAINING
    gpu_batch: int = 512  # images a step; those that accumulate gradients take the script's default
    a_process_a_core: bool = False  # each with its share of the batch; on a CPU only
    needs: str = "torch"  # package


OURS, TUNED = Way(ours, gpu_batch=4096), Way(ours, script=FINE_TUNING, gpu_batch=128)
HUGGINGFACE, FLOAT32 = Way(huggingface, needs="transformers"), "--precision float32 --no-compile"
PATHS = {
    "ours": OURS,
    "ours_compiled": OURS._replace(flags="--compile"),
    "ours_per_core": OURS._replace(a_process_a_core=True),
    "ours_muon": OURS._replace(flags="--no-compile --optimizer muon"),
    "ours_half_decoder": OURS._replace(flags="--no-compile --decoder_embed_dim 96"),
    "ours_float32": OURS._replace(flags=FLOAT32),
    "ours_float32_per_core": OURS._replace(flags=FLOAT32, a_process_a_core=True),
    "naive": Way(naive, flags=FLOAT32),
    "huggingface": HUGGINGFACE,
    "huggingface_compiled": HUGGINGFACE._replace(flags="--compile"),
    "lightly": Way(lightly, needs="lightly"),
    "tuning": TUNED,
    "tuning_compiled": TUNED._replace(flags="--compile"),
    "tuning_naive": TUNED._replace(start=naive, flags=FLOAT32),
}


def timed(work, device):
    """Seconds that it takes, the device's work included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def take_steps(path, seconds, flags):
    """Take a path's steps, at least three: a dictionary of their seconds (the first allocates memory, and compiles).

    Args:
        seconds: to go on for after the first step; flags: the command line of the training script.
    """
    before, (parse_args, start_experiment) = peak_memory_mb(torch.device("cpu")), PATHS[path].script
    experiment, times, end = start_experiment(parse_args(flags)), [], math.inf
    device = pick_device(experiment.args.device)
    processes.join(device)
    experiment.load(device)
    setup = training.set_up(experiment, device)
    step = PATHS[path].start(experiment, setup)
    while len(times) < 3 or processes.max_over_ranks(int(time.monotonic() < end))[0]:  # all stop after the same step
        times.append(timed(lambda: step(len(times)), device))
        end = min(end, time.monotonic() + seconds)  # the first sets it
    memory = peak_memory_mb(device) - (0 if device.type == "cuda" else before)
    return {
        "seconds": list(processes.max_over_ranks(*times)),
        "batch_size": setup.plan.batch_size,
        "precision": setup.precision,
        "gflop_per_image": gflop_per_image(experiment.model_args, experiment.identity["kind"]),
        "memory_mb": processes.sum_over_ranks(torch.tensor(memory)).item(),
    }


# --- turns: processes of their own ---


def take_turn(path, flags, seconds):
    """Run `take_steps` for a path in new processes, with these flags of its script; return its result."""
    (parse_flags, _), threads = PATHS[path].script, torch.get_num_threads()
    batch_size = parse_flags(flags).batch_size
    count = max(n for n in range(1, threads + 1) if batch_size % n == 0) if PATHS[path].a_process_a_core else 1
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command += ["-m", "scripts.benchmark", "--turn", path, "--seconds", str(seconds), *flags]
    environ = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // count))}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=root, env=environ)
    if done.returncode:
        raise UserError(
            f"The process of {path} has ended, probably out of memory unless an error is shown above: use a smaller "
            f"--batch_size or fewer --paths."
        )
    return json.loads(done.stdout.splitlines()[-1])


def summary(path, turns, peaks):
    """A row of the table; peaks: GFLOP/s of the machine by precision."""
    times, first = [step for turn in turns for step in turn["seconds"][1:]], turns[0]
    images_per_sec = first["batch_size"] / statistics.median(times)
    return {
        "path": path,
        **{name: first[name] for name in ("precision", "batch_size", "gflop_per_image")},
        "steps": len(times),
        "first_step_s": max(turn["seconds"][0] for turn in turns),
        "images_per_sec": images_per_sec,
        "peak_gflops": peaks[first["precision"]],
        "share_of_peak": images_per_sec * first["gflop_per_image"] / peaks[first["precision"]],
        "memory_mb": max(turn["memory_mb"] for turn in turns),
    }


def matmul_gflops(device, precision):
    """GFLOP/s of one large matrix product: what this machine's arithmetic gives."""
    n = 2048 if device.type == "cpu" else 8192
    one = torch.randn(n, n, device=device, dtype=PRECISIONS[precision])
    return 2 * n**3 / min(timed(lambda: one @ one, device) for _ in range(10)) / 1e9


def parse_args(argv=None):
    """The arguments, among them flags of the training scripts, which refuse bad ones here."""
    text = "Other flags are of the paths' training scripts, such as --batch_size (default: 64; on CUDA up to 4096)."
    parser = utils.Parser(description=__doc__.split("\n")[0], epilog=text)
    text = f"what to compare, of {', '.join(PATHS)}; default: all"
    parser.add_argument("--paths", nargs="+", choices=[*PATHS], metavar="PATH", help=text)
    text = "take steps of this path, in this process, and print JSON"
    parser.add_argument("--turn", choices=[*PATHS], metavar="PATH", help=text)
    parser.add_argument("--seconds", type=float, default=60, help="seconds for each path")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("logs/benchmark"), help="directory for CSV and JSON")
    args, flags = parser.parse_known_args(argv)
    args.flags, args.paths = [*flags, "--device", args.device], args.paths or [*PATHS]
    for path in [args.turn] if args.turn else args.paths:
        PATHS[path].script[0](args.flags)
    return args


@exit_in_one_line()
@as_user_error(OSError)
def main(argv=None):
    args = parse_args(argv)
    if args.turn:
        warnings.simplefilter("ignore")  # of other libraries
        found = take_steps(args.turn, args.seconds, args.flags)
        if processes.is_first():
            print(json.dumps(found))
        return processes.leave()
    device, turns = pick_device(args.device), {}
    args.output.mkdir(parents=True, exist_ok=True)  # what cannot be written is told now
    for path in [path for path in args.paths if device.type == "cpu" or not PATHS[path].a_process_a_core]:
        if importlib.util.find_spec(PATHS[path].needs):
            turns[path] = []
        else:
            print(f"{path} is left out: pip install {PATHS[path].needs} brings it.")
    for path in [*turns] * ROUNDS:
        batch_size = 64 if device.type == "cpu" else PATHS[path].gpu_batch
        own = f"--dataset shapes --batch_size {batch_size} {PATHS[path].flags}".split()
        turns[path].append(take_turn(path, own + args.flags, args.seconds / ROUNDS))
    # the arithmetic of this machine, while nothing else runs on it; an unused precision may be 1000 times slower
    precisions = {some[0]["precision"] for some in turns.values()}
    peaks = {precision: matmul_gflops(device, precision) for precision in precisions}
    table = pd.DataFrame([summary(path, some, peaks) for path, some in turns.items()])
    installed = [name for name in ("transformers", "lightly") if importlib.util.find_spec(name)]
    facts = environment(device) | {name: metadata.version(name) for name in installed}
    (args.output / "steps.json").write_text(json.dumps(facts, indent=2) + "\n")
    table.to_csv(args.output / "steps.csv", index=False)
    print(table.to_string(index=False, float_format="{:.3g}".format), args.output / "steps.csv", sep="\n")


if __name__ == "__main__":
    main()
