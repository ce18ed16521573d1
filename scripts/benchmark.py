"""Time whole training steps, batch drawn to weights updated: ours, a naive loop's and other libraries'.

python -m scripts.benchmark                  the paths in turn, against each other and against the machine's floor
python -m scripts.benchmark --growth         how the cost grows with batch, patch, image and decoder depth

Tables go to the terminal and, as CSV with machine and versions in a JSON file beside it, to --output. Our paths step as
mae_pretrain.py and train_classifier.py do: the same models, losses, masks, micro-batches and update.
"""

import contextlib
import csv
import ctypes
import functools
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import data
import runs
import utils
from figures import STYLES, plt, save
from model import MAE_Encoder, MAE_ViT, ViT_Classifier, mae_loss

TURN = 5  # seconds
NUM_IMAGES = 10_000  # drawn at random: what is in them does not matter here


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows, of our pretraining only")
    parser.add_argument("--paths", nargs="+", choices=[*PATHS], default=[*PATHS], help="what to compare")
    parser.add_argument("--batch_size", type=utils.positive_int, help="left out: 64 on a CPU, the scripts' on CUDA")
    parser.add_argument("--seconds", type=float, default=60, help="time for each path, about; --growth: four sizes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--embed_dim", type=utils.positive_int, default=utils.defaults(MAE_ViT)["embed_dim"])
    parser.add_argument("--output", type=Path, default=Path("logs/benchmark"), help="directory for CSV, JSON and plot")
    return parser.parse_args(argv)


# --- paths: (images, model arguments, batch size, precision, compiled) -> step(i) -> loss ---


def batches(images, batch_size):
    """The batch of step i, drawn on the device as the training scripts do."""
    order = torch.randperm(len(images)).to(images.device)
    return lambda i: images[order[torch.arange(i * batch_size, (i + 1) * batch_size) % len(images)]]


def classifier(images, model_args):
    sizes = {name: model_args[name] for name in utils.defaults(ViT_Classifier) if name in model_args}
    return ViT_Classifier(**sizes).to(images.device)


def our_update(task, model, optimizer, images, model_args, batch_size, precision, compiled):
    """What our paths have in common: i -> the batch of step i, the model to call, and loss_of -> one update."""
    utils.tune(model, images.device, precision, (model_args["img_size"] // model_args["patch_size"]) ** 2)
    slices = utils.micro_batches(0, batch_size, utils.DEVICE_BATCH_SIZE[task][images.device.type])
    update = functools.partial(utils.update, model, optimizer, slices, 1e-4)
    return batches(images, batch_size), utils.compiled(model, compiled, images.device), update


def ours_pretraining(images, model_args, batch_size, precision, compiled):
    model = MAE_ViT(**model_args).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    batch, forward, update = our_update(
        "pretraining", model, optimizer, images, model_args, batch_size, precision, compiled
    )

    def step(i):
        pixels, masks = batch(i), model.shuffle(batch_size, utils.generator(images.device, i), images.device)

        def loss_of(part):
            x = data.normalize(pixels[part])
            with utils.autocast(precision, x.device):
                pred, mask = forward(x, masks[part])
            return mae_loss(pred, x, mask)

        return update(loss_of)

    return step


def ours_fine_tuning(images, model_args, batch_size, precision, compiled):
    model = classifier(images, model_args)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    batch, forward, update = our_update(
        "fine-tuning", model, optimizer, images, model_args, batch_size, precision, compiled
    )
    labels = torch.randint(10, (batch_size,), device=images.device)

    def step(i):
        pixels = batch(i)

        def loss_of(part):
            with utils.autocast(precision, images.device):
                logits = forward(data.normalize(pixels[part]))
            return F.cross_entropy(logits.float(), labels[part])

        return update(loss_of)

    return step


class PilImages(Dataset):
    """What torchvision's CIFAR10 gives: a PIL image through transforms, one by one."""

    def __init__(self, images):
        self.images = images.permute(0, 2, 3, 1).cpu().numpy()
        self.transform = transforms.Compose(
            [transforms.ToPILImage(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), 0


def endless(loader):
    while True:
        yield from loader


def naive_loader(images, batch_size):
    workers = min(4, os.cpu_count())
    return endless(DataLoader(PilImages(images), batch_size, shuffle=True, drop_last=True, num_workers=workers))


def plain_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def naive_pretraining(images, model_args, batch_size, precision, compiled):
    """As a course's notebook would: a loader with workers, masks drawn image by image with NumPy, eager float32."""
    model = MAE_ViT(**model_args).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    loader, num_patches = naive_loader(images, batch_size), model.shuffle.grid_size**2

    def step(i):
        batch, _ = next(loader)
        batch = batch.to(images.device)
        masks = np.stack([np.random.permutation(num_patches) for _ in batch])
        pred, mask = model(batch, torch.from_numpy(masks).to(images.device))
        return plain_step(optimizer, mae_loss(pred, batch, mask))

    return step


def naive_fine_tuning(images, model_args, batch_size, precision, compiled):
    model = classifier(images, model_args)
    optimizer, loader = torch.optim.AdamW(model.parameters(), weight_decay=0.05), naive_loader(images, batch_size)

    def step(i):
        batch, labels = (tensor.to(images.device) for tensor in next(loader))
        features = MAE_Encoder.forward(model, batch)  # of all tokens
        return plain_step(optimizer, F.cross_entropy(model.head(features[:, 0]), labels))

    return step


def huggingface_pretraining(images, model_args, batch_size, precision, compiled):
    """transformers' ViTMAEForPreTraining, its scaled-dot-product attention."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width, heads = model_args["embed_dim"], model_args["num_heads"]
    sizes = {"image_size": model_args["img_size"], "patch_size": model_args["patch_size"], "hidden_size": width}
    sizes |= {"num_hidden_layers": model_args["encoder_depth"], "num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * width, "decoder_hidden_size": width, "decoder_intermediate_size": 4 * width}
    sizes |= {"decoder_num_hidden_layers": model_args["decoder_depth"], "decoder_num_attention_heads": heads}
    config = ViTMAEConfig(**sizes, qkv_bias=False, mask_ratio=model_args["mask_ratio"], attn_implementation="sdpa")
    model = ViTMAEForPreTraining(config).to(images.device).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    batch = batches(images, batch_size)

    def step(i):
        with utils.autocast(precision, images.device):
            loss = forward(data.normalize(batch(i))).loss
        return plain_step(optimizer, loss)

    return step


def lightly_pretraining(images, model_args, batch_size, precision, compiled):
    """lightly's MAE on timm's VisionTransformer, put together as its documentation does."""
    from lightly.models import utils as tokens
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    width, heads, patch_size = model_args["embed_dim"], model_args["num_heads"], model_args["patch_size"]
    depths = model_args["encoder_depth"], model_args["decoder_depth"]
    vit = VisionTransformer(model_args["img_size"], patch_size, 3, 0, embed_dim=width, depth=depths[0], num_heads=heads)
    encoder = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(
        num_patches=vit.patch_embed.num_patches,
        patch_size=patch_size,
        embed_dim=width,
        decoder_embed_dim=width,
        decoder_depth=depths[1],
        decoder_num_heads=heads,
        mlp_ratio=4.0,
    )
    model = torch.nn.ModuleList([encoder, decoder]).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    batch, length = batches(images, batch_size), encoder.sequence_length

    def loss_of(x):
        keep, hidden = tokens.random_token_mask((len(x), length), model_args["mask_ratio"], device=x.device)
        known = decoder.embed(encoder.encode(images=x, idx_keep=keep))
        everything = tokens.repeat_token(decoder.mask_token, (len(x), length)).to(known.dtype)
        decoded = decoder.decode(tokens.set_at_index(everything, keep, known))
        pred = decoder.predict(tokens.get_at_index(decoded, hidden))
        target = tokens.get_at_index(tokens.patchify(x, patch_size), hidden - 1)  # without the cls token
        return F.mse_loss(pred.float(), target)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step(i):
        with utils.autocast(precision, images.device):
            loss = loss_of(data.normalize(batch(i)))
        return plain_step(optimizer, loss)

    return step


class Way(NamedTuple):
    """How a path takes its steps."""

    task: str
    builder: Callable
    precision: str = "best"  # what --precision auto picks
    compiled: bool = False
    a_process_a_core: bool = False  # each with its share of the batch; on a CPU only


PATHS = {
    "ours": Way("pretraining", ours_pretraining),
    "ours compiled": Way("pretraining", ours_pretraining, compiled=True),
    "ours, a process a core": Way("pretraining", ours_pretraining, a_process_a_core=True),
    "ours float32": Way("pretraining", ours_pretraining, "float32"),
    "ours float32, a process a core": Way("pretraining", ours_pretraining, "float32", a_process_a_core=True),
    "naive": Way("pretraining", naive_pretraining, "float32"),
    "huggingface": Way("pretraining", huggingface_pretraining),
    "huggingface compiled": Way("pretraining", huggingface_pretraining, compiled=True),
    "lightly": Way("pretraining", lightly_pretraining),
    "fine-tuning": Way("fine-tuning", ours_fine_tuning),
    "fine-tuning compiled": Way("fine-tuning", ours_fine_tuning, compiled=True),
    "fine-tuning naive": Way("fine-tuning", naive_fine_tuning, "float32"),
}


# --- measuring: every path in processes of its own, a few steps of each in turn ---


def serve(name, device, batch_size, model_args, rank, processes, meeting, pipe):
    """The body of a process: build a path, take a "step" whenever asked, answer with its seconds.

    Asked to "rest", it gives its free memory back; asked to "end", it answers with the precision and with the memory
    that building and stepping took, in MB.

    Args:
        rank: this process's among the path's processes; meeting: a file, not there yet, for them to find each other.
    """
    warnings.simplefilter("ignore")  # of other libraries
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first ends the others
    before = utils.peak_memory_mb(torch.device("cpu"))
    _, builder, precision, compiled, _ = PATHS[name]
    if processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    if precision == "best":
        precision = utils.pick_precision("auto", device, model_args["embed_dim"])
    size = model_args["img_size"]
    images = torch.randint(256, (NUM_IMAGES, 3, size, size), dtype=torch.uint8, device=device)
    try:
        step = builder(images, model_args, batch_size // processes, precision, compiled)
    except ImportError as error:
        pipe.send(error)
        return
    pipe.send(None)
    steps = itertools.count()
    while (wish := pipe.recv()) != "end":
        pipe.send(timed(step, next(steps), device) if wish == "step" else give_memory_back(device))
    pipe.send((precision, utils.peak_memory_mb(device) - (0 if device.type == "cuda" else before)))
    utils.leave_process_group()


def give_memory_back(device):
    """What an allocator keeps for the next step, so that the paths need not all fit beside each other."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def timed(step, i, device):
    """Seconds of one step, the device's work included."""
    started = time.perf_counter()
    step(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def start(name, device, batch_size, model_args, meeting, processes):
    """Add a path's processes to the list; the pipes to talk to them, none where a package is missing."""
    context, pipes = multiprocessing.get_context("spawn"), []
    cores = torch.get_num_threads() if PATHS[name].a_process_a_core else 1
    count = max(n for n in range(1, cores + 1) if batch_size % n == 0)
    for rank in range(count):
        pipe, other = context.Pipe()
        args = (name, device, batch_size, model_args, rank, count, meeting, other)
        process = context.Process(target=serve, args=args)
        process.start()
        processes.append(process)
        other.close()
        pipes.append(pipe)
    for error in replies(name, pipes):
        if error:
            print(f"{name} is left out: {error}. pip install -r requirements-dev.txt brings it.")
            return []
    return pipes


def ask(name, pipes, wish):
    """The replies of all processes of a path."""
    for pipe in pipes:
        with contextlib.suppress(ConnectionError):  # then it has no answer either
            pipe.send(wish)
    return replies(name, pipes)


def replies(name, pipes):
    """What each of a path's processes says next, in any order.

    Raises:
        ValueError: one of them has ended.
    """
    said = {}
    try:
        while silent := [pipe for pipe in pipes if pipe not in said]:
            said |= {pipe: pipe.recv() for pipe in connection.wait(silent)}
        return [*said.values()]
    except (EOFError, ConnectionError):
        raise ValueError(
            f"The process of {name!r} has ended, by want of memory if nothing stands above: try a smaller --batch_size "
            f"or fewer --paths."
        ) from None


def take_turn(name, pipes, seconds):
    """Steps of one path alone, each in the seconds of its slowest process: the first one and those after it.

    The first gets back the memory given up for the others' turns. Whole seconds, as a naive loader's workers run ahead
    while others step.
    """
    first, times, end = max(ask(name, pipes, "step")), [], time.monotonic() + seconds
    while not times or time.monotonic() < end:
        times.append(max(ask(name, pipes, "step")))
    ask(name, pipes, "rest")
    return first, times


def measure(batch_sizes, device, model_args, seconds):
    """Time steps of all paths in turn; a row each.

    Args:
        batch_sizes: images a step, by path.

    Raises:
        ValueError: no path could start, or one has ended.
    """
    # the arithmetic of this machine, before anything else runs on it
    gflops = {precision: matmul_gflops(device, precision) for precision in ("float32", "bf16")}
    gflop = {task: gflop_per_image(task, device, model_args) for task in {PATHS[name].task for name in batch_sizes}}
    give_memory_back(device)
    processes, paths = [], {}
    try:
        with tempfile.TemporaryDirectory() as meeting:
            for i, (name, batch_size) in enumerate(batch_sizes.items()):
                if pipes := start(name, device, batch_size, model_args, f"{meeting}/{i}", processes):
                    paths[name] = pipes
            first = {name: take_turn(name, pipes, 0)[0] for name, pipes in paths.items()}
        times, begun = {name: [] for name in paths}, time.monotonic()
        while any(len(taken) < 5 for taken in times.values()) or time.monotonic() - begun < seconds * len(paths):
            for name, pipes in paths.items():
                times[name] += take_turn(name, pipes, min(TURN, seconds))[1]
        ends = {name: ask(name, pipes, "end") for name, pipes in paths.items()}
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
    if not paths:
        raise ValueError("Nothing to time: none of the --paths can run here.")
    rows = []
    for name, answers in ends.items():
        task, precision = PATHS[name].task, answers[0][0]
        seconds_a_step = statistics.median(times[name])
        images_per_sec = batch_sizes[name] / seconds_a_step
        rows.append(
            {
                "path": name,
                "task": task,
                "precision": precision,
                "batch_size": batch_sizes[name],
                "steps": len(times[name]),
                "first_step_s": first[name],
                "median_step_s": seconds_a_step,
                "images_per_sec": images_per_sec,
                "gflop_per_image": gflop[task],
                "floor_gflops": gflops[precision],
                "share_of_floor": images_per_sec * gflop[task] / gflops[precision],
                "memory_mb": sum(memory for _, memory in answers),
            }
        )
    return rows


def matmul_gflops(device, precision):
    """GFLOP/s of one large matrix product: what this machine's arithmetic gives."""
    n = 2048 if device.type == "cpu" else 8192
    one = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / min(timed(lambda i: one @ one, i, device) for i in range(10)) / 1e9


def gflop_per_image(task, device, model_args):
    """Of a training step, counted operation by operation."""
    builder = {"pretraining": ours_pretraining, "fine-tuning": ours_fine_tuning}[task]
    size = model_args["img_size"]
    images = torch.zeros(8, 3, size, size, dtype=torch.uint8, device=device)
    step = builder(images, model_args, 8, "float32", False)
    return utils.count_gflop(lambda: step(0)) / 8


def growth(device, model_args, seconds):
    """Our pretraining step while one size changes; a row each."""
    batch = 16 if device.type == "cpu" else 512
    changes = {
        "batch_size": [2**n for n in (range(3, 11) if device.type == "cpu" else range(6, 13))],
        "patch_size": [2, 4],
        "img_size": [32, 64, 96],
        "decoder_depth": [2, 4, 8],
    }
    rows = []
    for name, values in changes.items():
        for value in values:
            args = {**model_args, **({name: value} if name != "batch_size" else {})}
            sizes = {"ours": value if name == "batch_size" else batch}
            (row,) = measure(sizes, device, args, seconds / 4)
            rows.append({"varied": name, "value": value, "ms_per_image": 1000 / row["images_per_sec"], **row})
    return rows


# --- showing ---


def report(rows, path):
    """Print a table and write it as CSV, and where and from what it was measured as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = runs.environment()
    for name in ("transformers", "lightly"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    table = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(path)


def draw_growth(rows, path):
    names = list(dict.fromkeys(row["varied"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.2))
    for place, name in zip(axes, names, strict=True):
        shown = [row for row in rows if row["varied"] == name]
        values = [row["value"] for row in shown]
        place.plot(values, [row["ms_per_image"] for row in shown], "o-", color=STYLES[0][0])
        place.set(xlabel=name, ylabel="ms per image")
        if name == "batch_size":
            place.set_xscale("log", base=2)
        place.set_xticks(values, values)
        place.set_ylim(bottom=0, top=1.08 * max(row["ms_per_image"] for row in shown))
        place.grid(alpha=0.3)
    save(figure, path)
    print(path)


def default_batch_size(name, device):
    """What fits everywhere on a CPU; the scripts' defaults on CUDA, where paths that do not accumulate take 512."""
    if device.type == "cpu":
        return 64
    task, builder, *_ = PATHS[name]
    return 128 if task == "fine-tuning" else 4096 if builder is ours_pretraining else 512


def main(argv=None):
    args = parse_args(argv)
    model_args = {**utils.defaults(MAE_ViT), "embed_dim": args.embed_dim}
    with utils.exit_on_bad_input():
        device = utils.pick_device(args.device)
        if args.growth:
            rows = growth(device, model_args, args.seconds)
            report(rows, args.output / "growth.csv")
            draw_growth(rows, args.output / "growth.png")
            return
        names = [name for name in args.paths if device.type == "cpu" or not PATHS[name].a_process_a_core]
        batch_sizes = {name: args.batch_size or default_batch_size(name, device) for name in names}
        report(measure(batch_sizes, device, model_args, args.seconds), args.output / "steps.csv")


if __name__ == "__main__":
    main()
