"""Time whole training steps, batch drawn to weights updated: ours, a naive loop's and other libraries'.

python -m scripts.benchmark                  the paths in turn, against each other and against the machine's peak
python -m scripts.benchmark --growth         how the cost grows with batch, patch, image and decoder depth

Tables go to the terminal and, as CSV with machine and versions in a JSON file beside it, to --output. What is timed is
in benchmark_paths.py.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import utils
from engine.device import PRECISIONS, environment, pick_device
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.figures import STYLES, plt, save
from scripts.benchmark_paths import PATHS, timed

ROUNDS = 3  # over all paths, so that what else the machine does meets all alike


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows, of our pretraining only")
    parser.add_argument("--paths", nargs="+", choices=[*PATHS], default=[*PATHS], help="what to compare")
    parser.add_argument("--batch_size", type=utils.positive_int, help="default: 64 on a CPU; on CUDA up to 4096")
    parser.add_argument("--seconds", type=float, default=60, help="seconds for each path; --growth: for four sizes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("logs/benchmark"), help="directory for CSV, JSON and plot")
    return parser.parse_args(argv)


# --- measuring: every turn of a path in processes of its own ---


def write_images(path, img_size):
    """A .npz file for the training scripts. What is in the images does not matter here."""
    counts, draw = {"train": 5000, "test": 100}, np.random.default_rng(0)
    shape = img_size, img_size, 3
    images = {f"{part}_images": draw.integers(256, size=(n, *shape), dtype=np.uint8) for part, n in counts.items()}
    np.savez(path, **images, **{f"{part}_labels": np.arange(n) % 10 for part, n in counts.items()})


def take_turn(path, flags, seconds):
    """What `benchmark_paths.take_steps` tells of a path, with these flags of its training script, by name."""
    way, threads = PATHS[path], torch.get_num_threads()
    count = max(n for n in range(1, threads + 1) if flags["batch_size"] % n == 0) if way.a_process_a_core else 1
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command += ["-m", "scripts.benchmark_paths", path, str(seconds), *way.flags.split()]
    command += [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    environ = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // count))}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=root, env=environ)
    if done.returncode:
        raise UserError(
            f"The process of {path!r} has ended, probably out of memory unless an error is shown above: use a smaller "
            f"--batch_size or fewer --paths."
        )
    return json.loads(done.stdout.splitlines()[-1])


def time_paths(jobs, device, seconds, rounds=1):
    """Time steps of all jobs [(path, flags of its script by name)] in turn, a few times round: a row each."""
    turns = [[] for _ in jobs]
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(rounds):
            for (path, flags), taken in zip(jobs, turns, strict=True):
                images = {"dataset": "npz", "data_dir": f"{directory}/images.npz"}
                write_images(images["data_dir"], flags.get("img_size", 32))
                taken.append(take_turn(path, flags | images | {"device": device}, seconds / rounds))
    # the arithmetic of this machine, while nothing else runs on it; an unused precision may be 1000 times slower
    peaks = {precision: matmul_gflops(device, precision) for precision in {taken[0]["precision"] for taken in turns}}
    return [summary(path, flags["batch_size"], taken, peaks) for (path, flags), taken in zip(jobs, turns, strict=True)]


def summary(path, batch_size, turns, peaks):
    """A row of the table; peaks: GFLOP/s of the machine by precision."""
    times, precision = [step for turn in turns for step in turn["seconds"][1:]], turns[0]["precision"]
    images_per_sec, gflop = batch_size / statistics.median(times), turns[0]["gflop_per_image"]
    return {
        "path": path,
        "precision": precision,
        "batch_size": batch_size,
        "steps": len(times),
        "first_step_s": max(turn["seconds"][0] for turn in turns),
        "images_per_sec": images_per_sec,
        "gflop_per_image": gflop,
        "peak_gflops": peaks[precision],
        "share_of_peak": images_per_sec * gflop / peaks[precision],
        "memory_mb": max(turn["memory_mb"] for turn in turns),
    }


def matmul_gflops(device, precision):
    """GFLOP/s of one large matrix product: what this machine's arithmetic gives."""
    n = 2048 if device.type == "cpu" else 8192
    one = torch.randn(n, n, device=device, dtype=PRECISIONS[precision])
    return 2 * n**3 / min(timed(lambda: one @ one, device) for _ in range(10)) / 1e9


def time_growth(device, seconds):
    """Our pretraining step while one size changes; a row each."""
    batch, largest = (16, 1024) if device.type == "cpu" else (512, 4096)
    changes = {"batch_size": [largest // 2**n for n in reversed(range(8))], "patch_size": [2, 4]}
    changes |= {"img_size": [32, 64, 96], "decoder_depth": [2, 4, 8]}
    varied = [(name, value) for name, values in changes.items() for value in values]
    rows = time_paths([("ours", {"batch_size": batch, name: value}) for name, value in varied], device, seconds / 4)
    table = pd.DataFrame(varied, columns=["varied", "value"]).join(pd.DataFrame(rows))
    table.insert(2, "ms_per_image", 1000 / table["images_per_sec"])
    return table


# --- showing ---


def write_steps(table, path, device):
    """Print a table and write it as CSV, and where and from what it was measured as JSON."""
    installed = [name for name in ("transformers", "lightly") if importlib.util.find_spec(name)]
    facts = environment(device) | {name: metadata.version(name) for name in installed}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    table.to_csv(path, index=False)
    print(table.to_string(index=False, float_format="{:.3g}".format), path, sep="\n")


def draw_growth(table, path):
    names = table["varied"].unique()
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.2))
    for place, name in zip(axes, names, strict=True):
        shown = table[table["varied"] == name]
        place.plot(shown["value"], shown["ms_per_image"], "o-", color=STYLES[0][0])
        place.set(xlabel=name, ylabel="ms per image", ylim=(0, 1.08 * shown["ms_per_image"].max()))
        if name == "batch_size":
            place.set_xscale("log", base=2)
        place.set_xticks(shown["value"], shown["value"])
        place.grid(alpha=0.3)
    save(figure, path)
    print(path)


def main(argv=None):
    args = parse_args(argv)
    with exit_in_one_line(), as_user_error(OSError):
        device = pick_device(args.device)
        args.output.mkdir(parents=True, exist_ok=True)  # what cannot be written is told now
        if args.growth:
            table = time_growth(device, args.seconds)
            write_steps(table, args.output / "growth.csv", device)
            draw_growth(table, args.output / "growth.png")
            return
        names = [name for name in args.paths if device.type == "cpu" or not PATHS[name].a_process_a_core]
        for name in [name for name in names if not importlib.util.find_spec(PATHS[name].needs)]:
            print(f"{name} is left out: pip install {PATHS[name].needs} brings it.")
            names.remove(name)
        default = {name: 64 if device.type == "cpu" else PATHS[name].gpu_batch for name in names}
        jobs = [(name, {"batch_size": args.batch_size or default[name]}) for name in names]
        rows = time_paths(jobs, device, args.seconds, ROUNDS)
        write_steps(pd.DataFrame(rows), args.output / "steps.csv", device)


if __name__ == "__main__":
    main()
