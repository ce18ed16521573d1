"""Pretrain a MAE with every combination of settings and every seed, measure its features, fine-tune it.

    python -m scripts.sweep --decoder_depth 2 4 8 --mask_strategy random block --seed 1 2 3 --total_epoch 200
    python -m scripts.sweep --mask_ratio 0.5 0.75 --finetune "--total_epoch 30 --layer_decay 0.65 0.75" --jobs 2

A job is a MAE with all that starts from it, or the classifiers from scratch of one size. Seed follows seed, so that a
sweep stopped early has whole seeds. The same command again continues it, and passes over what is finished.
"""

import collections
import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import evaluate_features
import mae_pretrain
import train_classifier
import utils
from engine import processes
from engine.errors import UserError, exit_in_one_line
from engine.records import read_run
from engine.training import plan_training
from masks import MASK_STRATEGIES

ROOT = Path(__file__).parents[1]
SIZES = tuple(train_classifier.SIZE_WORDS)
REFUSED = {"log_dir", "overwrite", "dry_run", "output_model_path", "pretrained_model_path"}  # would hit all runs alike
SWITCH = {"on": "--", "off": "--no-"}
OUTPUT = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
# A command of a job: its script and flags; its arguments; the directory of the run that it trains or measures
Step = collections.namedtuple("Step", ("words", "args", "directory"))


def parse_args(argv=None):
    """The arguments, with settings of MAEs and finetunings as `combinations` makes them."""
    text = "Other flags are mae_pretrain.py's, with one value or several: --mask_strategy all --norm_pix_loss off on"
    parser = utils.Parser(description=__doc__.split("\n")[0], epilog=text)
    text = "train_classifier.py's flags, with one value or several, in quotes; none: no classifiers; default: no flags"
    parser.add_argument("--finetune", metavar="FLAGS", help=text)
    parser.add_argument("--labels", nargs="+", metavar="N", help="fine-tune and probe on so many labels; default: all")
    parser.add_argument("--scratch", action="store_true", help="classifiers from scratch of the same sizes, too")
    parser.add_argument("--log_dir", default="logs/sweep", help="the runs are made in here")
    text = "that run at the same time; default: one for each GPU, or one"
    parser.add_argument("--jobs", type=utils.positive_int, help=text)
    parser.add_argument("--list", action="store_true", help="print the jobs that are left, a line each; run nothing")
    pairs = itertools.pairwise(["", *(sys.argv[1:] if argv is None else argv)])
    words = [f" {word}" if before == "--finetune" else word for before, word in pairs]  # argparse: --x is no value
    args, words = parser.parse_known_args(words)
    args.settings = combinations(parser, words, REFUSED)
    tuning = shlex.split(args.finetune or "") + (["--train_images", *args.labels] if args.labels else [])
    args.finetunings = [] if tuning[:1] == ["none"] else combinations(parser, tuning, {*REFUSED, *SIZES})
    return args


def combinations(parser, words, refused):
    """All combinations of the flags' values, [{flag: value}, ...]: --seed 1 2 --norm_pix_loss off on gives four.

    A flag without a value has None; if a flag is given twice, the last counts. All with the first seed come first.
    """
    values = {}
    for word in words:
        if word.startswith("--") or not values:
            flag, *value = word.split("=", 1)
            values[flag] = value
        else:
            values[flag].append(word)
    for flag, some in values.items():
        if flag[2:] in refused or (len(some) > 1 and flag[2:] in utils.FREE - {"data_dir", "preset"}):
            said = " ".join([flag, *some])
            parser.error(f"{flag} is set by the sweep, or cannot differ between its runs; leave out {said}.")
    if values.get("--mask_strategy") == ["all"]:
        values["--mask_strategy"] = list(MASK_STRATEGIES)
    choices = [
        [(SWITCH[value] + flag[2:], None) if value in SWITCH else (flag, value) for value in values[flag] or [None]]
        for flag in sorted(values, key=lambda flag: flag != "--seed")
    ]
    return [dict(chosen) for chosen in itertools.product(*choices)]


def parsed(module, flags):
    """A script's words and arguments; a bad flag ends here, with the script's own message."""
    words = [word for flag, value in flags.items() for word in (flag, value) if word is not None]
    script, own_name = f"{module.__name__}.py", sys.argv[0]
    sys.argv[0] = script  # begins a message
    args = module.parse_args(words)
    if module is not evaluate_features:  # a batch larger than the images ends here
        plan_training(args, args.train_images or args.batch_size, module.WARMUP, args.batch_size, 0, 1)
    sys.argv[0] = own_name
    return [script, *words], args


def given(args, *names):
    """{flag: value} of some arguments, to hand them on; "auto" is every script's default."""
    return {f"--{name}": str(getattr(args, name)) for name in names if getattr(args, name) != "auto"}


def jobs_of(setting, args):
    """Two jobs, lists of Steps: classifiers from scratch (empty without --scratch); pretrain, measure, fine-tune."""
    words, mae = parsed(mae_pretrain, setting | {"--log_dir": f"{args.log_dir}/pretrain"})
    directory = Path(mae.log_dir, mae_pretrain.Pretraining(mae).identity["name"])  # bad sizes and masks end here
    scratch, job = [], [Step(words, mae, directory)]
    sources = [(job, {"--pretrained_model_path": str(directory)})]
    sources += [(scratch, given(mae, *SIZES))] if args.scratch else []
    model = {"--model_path": str(directory)} | given(mae, "data_dir", "device", "precision")
    few = ({"--train_images": count, "--label_seed": str(mae.seed)} for count in args.labels or [])
    for what in [{"--layers": "all"}, *few]:
        job.append(Step(*parsed(evaluate_features, model | what), directory))
    for tuning in args.finetunings:
        data = () if "--dataset" in tuning else ("dataset", "data_dir")
        flags = given(mae, "device", "precision", "seed", *data) | tuning | {"--log_dir": f"{args.log_dir}/classifier"}
        for steps, source in sources:
            words, own = parsed(train_classifier, source | flags)
            own = utils.fill_in(own, {name: getattr(mae, name) for name in SIZES} | utils.DATA_DEFAULTS)
            name = train_classifier.run_name(own, directory.name if steps is job else None)
            steps.append(Step(words, own, Path(own.log_dir, name)))
    return scratch, job


def unfinished(job):
    """Commands of a job's steps that are left: all if the first is; else those without a result since its last start.

    This reads only config.json and the features; the scripts themselves refuse other images, for example.
    """
    left, since = [], ""
    for step in job:
        run = read_run(step.directory) if (step.directory / "config.json").exists() else None
        if run and step.words[0] == "evaluate_features.py":
            asked = {name: getattr(step.args, name) for name in ("train_images", "layers", "pool")}
            found = [stored for stored in run.features if asked.items() <= stored["settings"].items()]
            done = any(stored["time"] >= since and stored["test_set"] == run.facts["test_set"] for stored in found)
        else:
            done = run and run.finished and run.settings == utils.settings_of(step.args)
            done = done and run.starts[0]["time"] >= since
        if step is job[0] and not done:
            return [step.words for step in job]
        since = since or run.starts[-1]["time"]
        left += [] if done else [step.words]
    return left


def environments(count, device):
    """Environment variables for `count` workers (None: one for each GPU): each gets a GPU and a share of the cores."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.replace(",", " ").split() if device in ("auto", "cuda") else []
    shares = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}]
    count = count or len(shares)
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))} if count > 1 else {}
    return [threads | os.environ | shares[i % len(shares)] for i in range(count)]


def run(jobs, environments):
    """Run jobs, [(name, [words of a command, ...]), ...], one in each environment at a time.

    After a failure (exit code 1) or a signal (128 + its number), which is passed on, nothing more is started.
    """
    jobs, running, stopped = iter(jobs), set(), []  # stopped: (exit code, why), the decisive one first

    def work(environment):
        for name, words in ((name, words) for name, job in jobs for words in job if not stopped):
            command = [sys.executable, ROOT / words[0], *words[1:]]  # in a session of its own, out of Ctrl-C's reach
            process = subprocess.Popen(command, env=environment, start_new_session=True, **OUTPUT)
            running.add(process)
            if stopped and stopped[0][0] > 128:  # since
                process.terminate()
            for line in itertools.chain([f"python {shlex.join(words)}\n"], process.stdout):
                with contextlib.suppress(BrokenPipeError):  # Ctrl-C has ended what we print to, a tee
                    print(f"[{name}] {line}", end="", flush=True)
            if process.wait():
                stopped.append((1, f"job {name} ended with exit code {process.returncode}"))
            running.remove(process)

    def stop(number, frame):
        stopped.insert(0, (128 + number, signal.Signals(number).name))
        for process in list(running):
            process.terminate()

    for number in processes.STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    with ThreadPoolExecutor(len(environments)) as pool:
        list(pool.map(work, environments))
    if stopped:
        mended = "" if stopped[0][0] > 128 else "When that is mended, "
        print(f"Stopped: {stopped[0][1]}. {mended}{'t' if mended else 'T'}he same command continues.", file=sys.stderr)
        sys.exit(stopped[0][0])


@exit_in_one_line()
def main(argv=None):
    args = parse_args(argv)
    listed = [job for setting in args.settings for job in jobs_of(setting, args) if job]
    jobs = {job[0].directory: job for job in listed}
    for first, *_ in listed:
        other = jobs[first.directory][0].args.data_dir
        if other != first.args.data_dir:
            raise UserError(f"{first.args.data_dir} and {other} would both be {first.directory}; rename one of them.")
    left = [(f"{i}/{len(jobs)}", steps) for i, job in enumerate(jobs.values(), 1) if (steps := unfinished(job))]
    print(f"Jobs: {len(jobs)}, finished: {len(jobs) - len(left)}", file=sys.stderr)
    if args.list:
        for _, job in left:
            print(" && ".join(shlex.join([sys.executable, *words]) for words in job))
        return
    run(left, environments(args.jobs, next(iter(jobs.values()))[0].args.device))
    print(f"Compare: python -m scripts.compare {shlex.quote(args.log_dir)}")


if __name__ == "__main__":
    main()
