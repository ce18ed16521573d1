"""The training scripts as a user starts them, on tiny models and few images; inside this process, where importing torch
costs nothing.
"""

import json
import os
import shlex
import signal

import torch

import mae_pretrain
import train_classifier
from engine.checkpoints import load_file
from engine.errors import exit_in_one_line
from engine.records import read_config, read_metrics
from engine.run import Session

SIZE = shlex.split("--patch_size 8 --embed_dim 12 --encoder_depth 1 --num_heads 2 --device cpu")
SET = shlex.split("--dataset shapes --train_images 40 --total_epoch 3 --batch_size 16 --max_device_batch_size 8")
SET += ["--base_learning_rate", "0.01"]
SWITCHES = "--mask_strategy blockwise --norm_pix_loss --decoder_embed_dim 24 --positions sincos --optimizer muon"
TIMING = {"seconds", "speed/images_per_sec", "memory/peak_mb"}


def pretrain(*more):
    """Pretrain with these flags; the run's directory."""
    args = mae_pretrain.parse_args([*SIZE, "--decoder_depth", "1", *SET, *map(str, more)])
    with exit_in_one_line():
        return mae_pretrain.pretrain(args)


def classify(*more):
    """Train a classifier with these flags; the run's directory."""
    size = ["--device", "cpu"] if "--pretrained_model_path" in more else SIZE
    args = train_classifier.parse_args([*size, *SET, *map(str, more)])
    with exit_in_one_line():
        return train_classifier.train_classifier(args)


def pretrain_with_switches(*more):
    return pretrain(*shlex.split(SWITCHES), *more)


def classify_and_choose(*more):
    return classify("--val_images", "10", *more)


def classify_officially(*more):
    return classify("--preset", "official", "--encoder_depth", "2", "--clip_grad", "1", *more)


def weights(directory):
    return load_file(directory)["model"]


def same_weights(one, other, tolerance=0.0):
    one, other = weights(one), weights(other)
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


def untimed_metrics(directory):
    """metrics.csv but for the timing, and without nan, which does not equal itself."""
    return [{k: v for k, v in row.items() if k not in TIMING and v == v} for row in read_metrics(directory)]


def interrupt(patch, *after):
    """Let Ctrl-C come after these steps, counted from 1; a list that has an entry for each step."""
    tick, steps = Session.tick, []

    def tick_and_stop(self):
        steps.append(1)
        if len(steps) in after:
            os.kill(os.getpid(), signal.SIGINT)
        return tick(self)

    patch.setattr(Session, "tick", tick_and_stop)
    return steps


def unfinish(directory):
    """Let a finished run be one that was stopped after its last checkpoint."""
    (directory / "model.pt").unlink()
    (directory / "config.json").write_text(json.dumps(read_config(directory) | {"finished": False}))
