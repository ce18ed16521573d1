"""List the jobs of scripts/sweep.sh, a line a job: its commands, joined by &&. All flags are checked first.

Each argument names flags of mae_pretrain.py and their values, as in "mask_ratio=0.5,0.9 norm_pix_loss=off,on"; all
combinations are tried. The other settings are the environment variables of sweep.sh, and START, which begins a command.
"""

import itertools
import os
import shlex
import sys
from pathlib import Path

import evaluate_features
import mae_pretrain
import train_classifier
import utils
from engine.errors import UserError, exit_in_one_line
from engine.training import plan_training
from model import MAE_ViT

SET_BY = {"dataset": "DATASET", "data_dir": "DATA_DIR", "seed": "SEEDS", "log_dir": "LOGS"}
SCRIPTS = {f"{module.__name__}.py": module for module in (mae_pretrain, evaluate_features, train_classifier)}
IN_NAME = {*utils.defaults(MAE_ViT), "augment", "optimizer", "total_epoch", "batch_size", "train_images"}


def combinations(grid):
    """Of "mask_ratio=0.5,0.9 decoder_depth=2": [{"mask_ratio": "0.5", "decoder_depth": "2"}, ...].

    Raises:
        UserError: a flag without values, or one that has a variable of its own.
    """
    values = {}
    for word in grid.split():
        flag, _, listed = word.partition("=")
        values[flag] = [value for value in listed.split(",") if value]
        if not flag or not values[flag]:
            raise UserError(f"VARY holds {word}; it needs flags with values, as in embed_dim=96,192.")
        if flag in SET_BY:
            raise UserError(f"VARY holds {flag}; set {SET_BY[flag]} instead.")
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def words_of(setting):
    """The command line of a setting: "on" and "off" turn a switch."""
    flags = []
    for flag, value in setting.items():
        flags += {"on": [f"--{flag}"], "off": [f"--no-{flag}"]}.get(value, [f"--{flag}", value])
    return flags


def variable(name):
    """The words in an environment variable."""
    return os.environ.get(name, "").split()


def mae_job(setting, seed):
    """Commands that train a MAE, measure its features and fine-tune it; its run directory."""
    not_in_name = [f"{flag}_{value}" for flag, value in setting.items() if flag not in IN_NAME]
    logs = Path(os.environ["LOGS"], "_".join(not_in_name))  # runs of the same name need different directories
    data_dir, epochs = os.environ["DATA_DIR"], os.environ["EPOCHS"]
    pretrain = ["mae_pretrain.py", "--dataset", os.environ["DATASET"], "--data_dir", data_dir, *variable("SIZE")]
    pretrain += ["--total_epoch", epochs, "--seed", seed, "--log_dir", f"{logs}/pretrain"]
    pretrain += [*variable("PRETRAIN_FLAGS"), *words_of(setting)]
    mae = checked(*pretrain)
    measure = ["evaluate_features.py", "--model_path", mae, "--data_dir", data_dir]
    measures = [[*measure, "--layers", "all"], *([*measure, "--train_images", count] for count in variable("LABELS"))]
    return [pretrain, *measures, *classifiers(["--pretrained_model_path", mae], seed, logs)], mae


def scratch_job(setting, seed):
    """Commands that train classifiers from scratch; the run directory of the first."""
    size = {flag: value for flag, value in setting.items() if flag in train_classifier.SIZE}
    commands = classifiers([*variable("SIZE"), *words_of(size)], seed, os.environ["LOGS"])
    return commands, commands and checked(*commands[0])


def classifiers(source, seed, logs):
    """Commands that train a classifier on each number of labels."""
    epochs = os.environ["FINETUNE_EPOCHS"]
    command = ["train_classifier.py", "--dataset", os.environ["DATASET"], "--data_dir", os.environ["DATA_DIR"], *source]
    command += ["--total_epoch", epochs, "--seed", seed, "--log_dir", f"{logs}/classifier", *variable("FINETUNE_FLAGS")]
    on_few = [[*command, "--train_images", count] for count in variable("LABELS")]
    return [] if epochs == "0" else on_few or [command]


def parsed(script, *flags):
    """The arguments of a command. A bad flag gets the script's own message."""
    sys.argv[0] = script  # which begins the message
    return SCRIPTS[script].parse_args(flags)


def checked(script, *flags):
    """The run directory of a command; None where it depends on a model."""
    args, module = parsed(script, *flags), SCRIPTS[script]
    if module is evaluate_features:
        return None
    plan_training(args, args.train_images or args.batch_size, module.WARMUP, args.batch_size, rank=0, world_size=1)
    if module is mae_pretrain:
        MAE_ViT(**{name: getattr(args, name) for name in utils.defaults(MAE_ViT)}).shuffle(1)
        return f"{args.log_dir}/{mae_pretrain.run_name(args)}"
    if args.pretrained_model_path:
        return None
    _, args = train_classifier.load_pretrained(args)
    return f"{args.log_dir}/{train_classifier.run_name(args, None)}"


@exit_in_one_line()
def main(grids):
    """Print the jobs seed by seed, so that a sweep stopped early has whole seeds; a job of two grids comes once.

    Raises:
        UserError: different settings would be runs of the same name.
    """
    sys.argv[0], jobs = "sweep.sh", {}
    settings = [setting for grid in grids for setting in combinations(grid)]
    for seed in variable("SEEDS"):
        for make in [scratch_job, mae_job] if variable("SCRATCH") else [mae_job]:
            for setting in settings:
                commands, directory = make(setting, seed)
                if not commands:
                    continue
                arguments, words = parsed(*commands[0]), shlex.join(words_of(setting))
                _, others, first = jobs.setdefault(directory, (commands, arguments, words))
                if arguments != others:
                    sys.argv[0] = "sweep.sh"
                    raise UserError(
                        f"{first!r} and {words!r} would both be the run {directory}. Let run_name of the training "
                        f"script tell them apart."
                    )
    for commands, _, _ in jobs.values():
        for command in commands[1:]:
            checked(*command)
        print(" && ".join(f"{os.environ['START']} {shlex.join(command)}" for command in commands))


if __name__ == "__main__":
    main(sys.argv[1:])
