"""Time whole training steps, batch drawn to weights updated: ours, a naive loop's and other libraries'.

python -m scripts.benchmark                  the paths in turn, against each other and against the machine's peak
python -m scripts.benchmark --growth         how the cost grows with batch, patch, image and decoder depth

Tables go to the terminal and, as CSV with machine and versions in a JSON file beside it, to --output. What is timed is
in benchmark_paths.py.
"""

import contextlib
import csv
import ctypes
import itertools
import json
import multiprocessing
import signal
import statistics
import tempfile
import time
import warnings
from importlib import metadata
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist

import utils
from engine import processes as group
from engine.device import PRECISIONS, environment, peak_memory_mb, pick_device, pick_precision
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.figures import STYLES, plt, save
from model import MAE_ViT
from scripts.benchmark_paths import PATHS, default_batch_size
from scripts.cost import gflop_per_image
from scripts.results import aligned

TURN = 5  # seconds
PROCESSES = "spawn"  # how they start: with nothing of this process, and CUDA wants it
NUM_IMAGES = 10_000  # drawn at random: what is in them does not matter here


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows, of our pretraining only")
    parser.add_argument("--paths", nargs="+", choices=[*PATHS], default=[*PATHS], help="what to compare")
    parser.add_argument("--batch_size", type=utils.positive_int, help="default: 64 on a CPU; on CUDA up to 4096")
    parser.add_argument("--seconds", type=float, default=60, help="seconds for each path; --growth: for four sizes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--embed_dim",
        type=utils.positive_int,
        default=utils.defaults(MAE_ViT)["embed_dim"],
        help=utils.SIZE_HELP["embed_dim"],
    )
    parser.add_argument("--output", type=Path, default=Path("logs/benchmark"), help="directory for CSV, JSON and plot")
    return parser.parse_args(argv)


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
    before = peak_memory_mb(torch.device("cpu"))
    way = PATHS[name]
    precision, model_args = way.precision, way.sizes(model_args)
    if processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    if precision == "best":
        precision = pick_precision("auto", device, model_args["embed_dim"])
    size = model_args["img_size"]
    images = torch.randint(256, (NUM_IMAGES, 3, size, size), dtype=torch.uint8, device=device)
    try:
        step = way.builder(images, model_args, batch_size // processes, precision, way.compiled)
    except ImportError as error:
        pipe.send(error)
        return
    pipe.send(None)
    steps = itertools.count()
    while (wish := pipe.recv()) != "end":
        pipe.send(timed(step, next(steps), device) if wish == "step" else give_memory_back(device))
    pipe.send((precision, peak_memory_mb(device) - (0 if device.type == "cuda" else before)))
    group.leave()


def give_memory_back(device):
    """Free what the allocator keeps for the next step, so that the paths need not all fit beside each other."""
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
    context, pipes = multiprocessing.get_context(PROCESSES), []
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
        UserError: one of them has ended.
    """
    said = {}
    try:
        while silent := [pipe for pipe in pipes if pipe not in said]:
            said |= {pipe: pipe.recv() for pipe in connection.wait(silent)}
        return [*said.values()]
    except (EOFError, ConnectionError):
        raise UserError(
            f"The process of {name!r} has ended, probably out of memory unless an error is shown above: use a smaller "
            f"--batch_size or fewer --paths."
        ) from None


def take_turn(name, pipes, seconds):
    """Time one path's steps: (seconds of the first, [of those after it]), each of its slowest process.

    The first step allocates its memory again. A turn lasts seconds, as a naive loader's workers prepare batches while
    others step.
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
        UserError: no path could start, or one has ended.
    """
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
        raise UserError("Nothing to time: none of the --paths can run here.")
    # the arithmetic of this machine, while nothing else runs on it; an unused precision may be 1000 times slower
    gflops = {precision: matmul_gflops(device, precision) for precision in {part[0][0] for part in ends.values()}}
    give_memory_back(device)
    return [
        row_of(name, batch_sizes[name], first[name], times[name], answers, model_args, gflops)
        for name, answers in ends.items()
    ]


def row_of(name, batch_size, first, times, answers, model_args, gflops):
    """What the table tells of a path; gflops of the machine by precision."""
    way, precision = PATHS[name], answers[0][0]
    gflop = gflop_per_image(way.sizes(model_args), way.task == "pretraining")
    images_per_sec = batch_size / statistics.median(times)
    return {
        "path": name,
        "task": way.task,
        "precision": precision,
        "batch_size": batch_size,
        "steps": len(times),
        "first_step_s": first,
        "median_step_s": statistics.median(times),
        "images_per_sec": images_per_sec,
        "gflop_per_image": gflop,
        "peak_gflops": gflops[precision],
        "share_of_peak": images_per_sec * gflop / gflops[precision],
        "memory_mb": sum(memory for _, memory in answers),
    }


def matmul_gflops(device, precision):
    """GFLOP/s of one large matrix product: what this machine's arithmetic gives."""
    n = 2048 if device.type == "cpu" else 8192
    one = torch.randn(n, n, device=device, dtype=PRECISIONS[precision])
    return 2 * n**3 / min(timed(lambda i: one @ one, i, device) for i in range(10)) / 1e9


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
    facts = environment()
    for name in ("transformers", "lightly"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print(aligned(rows[0], cells), path, sep="\n")


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


def main(argv=None):
    args = parse_args(argv)
    model_args = {**utils.defaults(MAE_ViT), "embed_dim": args.embed_dim}
    with exit_in_one_line(), as_user_error(OSError):
        device = pick_device(args.device)
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
