"""Time whole training steps, batch drawn to weights updated: ours, a naive loop's and other libraries'.

    python -m scripts.benchmark                                          all paths in turn
    python -m scripts.benchmark --paths ours naive --patch_size 4        the training script's own flags

The table goes to the terminal and, as CSV with machine and versions in a JSON file beside it, to --output. What is
timed is in benchmark_paths.py.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch

import utils
from engine.device import PRECISIONS, environment, pick_device
from engine.errors import UserError, as_user_error, exit_in_one_line
from scripts.benchmark_paths import PATHS, timed

ROUNDS = 3  # over all paths, so that what else the machine does meets all alike


def parse_args(argv=None):
    """The arguments, among them flags of the training scripts, which refuse bad ones here."""
    text = (
        "Other flags are those of the paths' training scripts, such as --batch_size (default: 64; on CUDA up to 4096)."
    )
    parser = utils.Parser(description=__doc__.split("\n")[0], epilog=text)
    parser.add_argument("--paths", nargs="+", choices=[*PATHS], default=[*PATHS], help="what to compare")
    parser.add_argument("--seconds", type=float, default=60, help="seconds for each path")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("logs/benchmark"), help="directory for CSV and JSON")
    args, args.flags = parser.parse_known_args(argv)
    for path in args.paths:
        PATHS[path].script[0](args.flags)
    return args


def take_turn(path, flags, seconds):
    """What `benchmark_paths.take_steps` tells of a path, with these flags of its script, from processes of its own."""
    (parse_flags, _), threads = PATHS[path].script, torch.get_num_threads()
    batch_size = parse_flags(flags).batch_size
    count = max(n for n in range(1, threads + 1) if batch_size % n == 0) if PATHS[path].a_process_a_core else 1
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command += ["-m", "scripts.benchmark_paths", path, str(seconds), *flags]
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


@exit_in_one_line()
@as_user_error(OSError)
def main(argv=None):
    args = parse_args(argv)
    device, turns = pick_device(args.device), {}
    args.output.mkdir(parents=True, exist_ok=True)  # what cannot be written is told now
    for path in [path for path in args.paths if device.type == "cpu" or not PATHS[path].a_process_a_core]:
        if importlib.util.find_spec(PATHS[path].needs):
            turns[path] = []
        else:
            print(f"{path} is left out: pip install {PATHS[path].needs} brings it.")
    for path in [*turns] * ROUNDS:
        batch_size = 64 if device.type == "cpu" else PATHS[path].gpu_batch
        own = [
            "--dataset",
            "shapes",
            "--device",
            str(device),
            "--batch_size",
            str(batch_size),
            *PATHS[path].flags.split(),
        ]
        turns[path].append(take_turn(path, own + args.flags, args.seconds / ROUNDS))
    # the arithmetic of this machine, while nothing else runs on it; an unused precision may be 1000 times slower
    peaks = {
        precision: matmul_gflops(device, precision) for precision in {some[0]["precision"] for some in turns.values()}
    }
    table = pd.DataFrame([summary(path, some, peaks) for path, some in turns.items()])
    installed = [name for name in ("transformers", "lightly") if importlib.util.find_spec(name)]
    facts = environment(device) | {name: metadata.version(name) for name in installed}
    (args.output / "steps.json").write_text(json.dumps(facts, indent=2) + "\n")
    table.to_csv(args.output / "steps.csv", index=False)
    print(table.to_string(index=False, float_format="{:.3g}".format), args.output / "steps.csv", sep="\n")


if __name__ == "__main__":
    main()
