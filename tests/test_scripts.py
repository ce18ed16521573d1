"""The scripts as a user starts them; mostly inside this process, where importing torch costs nothing."""

import argparse
import csv
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

import evaluate_features
import mae_pretrain
import train_classifier
import utils
import visualize_predictions
from engine import processes, training
from engine.checkpoints import digest, load_file, load_model
from engine.errors import exit_in_one_line
from engine.run import Session, read_config, read_metrics
from images import data
from model import MASK_STRATEGIES, MAE_ViT, ViT_Classifier, mae_loss
from scripts import benchmark, compare, export, make_report, plot_curves, sweep
from scripts.ablations import BASE
from scripts.report_figures import mask_matrix
from scripts.results import read_features

ROOT = Path(__file__).parents[1]
SIZE = shlex.split("--patch_size 8 --embed_dim 12 --encoder_depth 1 --num_heads 2 --device cpu")
SET = shlex.split("--dataset shapes --train_images 40 --total_epoch 3 --batch_size 16 --max_device_batch_size 8")
SWITCHES = "--mask_strategy blockwise --norm_pix_loss "  # of pretraining, all on
SWITCHES += "--decoder_embed_dim 24 --positions sincos"
NEW = ("norm_pix_loss", "decoder_embed_dim", "positions")
FULL_SHAPES = data.shapes
TIMING = {"seconds", "speed/images_per_sec", "memory/peak_mb"}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    """Work in an empty directory; drawn test sets of 100 images and training sets of 50."""
    draw = data.shapes
    monkeypatch.setattr(data, "shapes", lambda count, img_size, seed: draw(min(count, 50 * (seed + 1)), img_size, seed))
    monkeypatch.chdir(tmp_path)


def pretrain(*more):
    args = mae_pretrain.parse_args([*SIZE, "--decoder_depth", "1", *SET, "--base_learning_rate", "0.01", *more])
    with exit_in_one_line():
        return mae_pretrain.pretrain(args)


def pretrain_with_switches(*more):
    return pretrain(*SWITCHES.split(), *more)


def classify(*more):
    size = [] if "--pretrained_model_path" in more else SIZE
    args = train_classifier.parse_args([*size, "--device", "cpu", *SET, "--base_learning_rate", "0.01", *more])
    with exit_in_one_line():
        return train_classifier.train_classifier(args)


def weights(directory):
    return load_file(directory)["model"]


def same_weights(one, other, tolerance=0.0):
    one, other = weights(one), weights(other)
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


def untimed_metrics(directory):  # and without nan, which does not equal itself
    return [{k: v for k, v in row.items() if k not in TIMING and v == v} for row in read_metrics(directory)]


# --- a run from end to end ---


def test_names_tell_what_sets_runs_apart():
    def mae(flags=""):
        return mae_pretrain.run_name(mae_pretrain.parse_args(shlex.split(flags)))

    def classifier(encoder_name, flags=""):
        _, args = train_classifier.load_pretrained(train_classifier.parse_args(shlex.split(flags)))
        return train_classifier.run_name(args, encoder_name)

    name = mae()
    assert name == "mae_cifar10_i32_p2_w192_e12_h3_d4_random_r0.75_ep2000_b4096_s42"
    changes = "train_images 100,img_size 64,patch_size 4,embed_dim 96,encoder_depth 6,num_heads 6,decoder_depth 8,"
    changes += "mask_ratio 0.5,mask_strategy grid,total_epoch 1,batch_size 8,seed 1,augment,dataset shapes,"
    changes += "norm_pix_loss,decoder_embed_dim 96,positions sincos,augment crop"
    names = [name, *(mae(f"--{change}") for change in changes.split(","))]
    assert len(set(names)) == len(names)
    assert "_pets_" in mae("--dataset folder --data_dir some/pets")
    assert mae(SWITCHES) == "mae_cifar10_i32_p2_w192_e12_h3_d4_dw24_sincos_blockwise_r0.75_normpix_ep2000_b4096_s42"
    assert "_pets_" in mae("--dataset npz --data_dir some/pets.npz")
    assert classifier(name) == f"cls_cifar10_ep100_b128_s42_from_{name}"
    assert classifier(None) == "cls_cifar10_ep100_b128_s42_scratch_i32_p2_w192_e12_h3"
    assert mae("--augment") == mae("--augment shift") == mae() + "_aug"
    assert "s42_augcrop_scratch_" in classifier(None, "--augment crop")
    name = classifier(None, "--train_images 500 --val_images 100 --augment")
    assert name == "cls_cifar10-500_val100_ep100_b128_s42_aug_scratch_i32_p2_w192_e12_h3"
    assert utils.as_flags(train_classifier.PRESETS["strong"]) == "--augment --pool mean"
    assert utils.as_flags(train_classifier.PRESETS["official"]).endswith(
        "--layer_decay 0.75 --drop_path 0.1 --label_smoothing 0.1 --mixup 0.8 --cutmix 1.0"
    )
    assert classifier("mae", "--preset strong") == "cls_cifar10_ep100_b128_s42_strong_from_mae"
    changed = "--preset official --no-augment --mixup 0 --layer_decay 0.65"
    assert classifier("mae", changed) == "cls_cifar10_ep100_b128_s42_official_noaug_ld0.65_mixup0_from_mae"
    switches = "--pool mean --decay_matrices_only --layer_decay 0.75 --clip_grad 1 --drop_path 0.1 --mixup 0.8"
    assert (
        classifier("mae", switches)
        == "cls_cifar10_ep100_b128_s42_poolmean_matrices_ld0.75_clip1_dp0.1_mixup0.8_from_mae"
    )


@pytest.mark.parametrize(
    ("script", "preset"), [(mae_pretrain, "strong"), (train_classifier, "strong"), (train_classifier, "official")]
)
def test_a_preset_is_its_flags_given_by_hand_and_a_flag_of_ones_own_wins(script, preset):
    def parsed(flags):
        return vars(script.parse_args(shlex.split(flags)))

    values = script.PRESETS[preset]
    by_hand = parsed(utils.as_flags(values))
    assert parsed(f"--preset {preset}") == {**by_hand, "preset": preset}
    assert {name: by_hand[name] for name in values} == values != {}
    assert parsed("") == parsed("--preset reference")
    own = {name: value for name, value in script.PRESETS["reference"].items() if name in values}
    assert parsed(f"--preset={preset} {utils.as_flags(own)}") == {**by_hand, **own, "preset": preset}
    assert parsed(f"{utils.as_flags(own)} --preset {preset}") == {**by_hand, **own, "preset": preset}


@pytest.mark.parametrize("script", [mae_pretrain, train_classifier])
def test_the_help_of_a_preset_shows_its_values(script, capsys):
    for preset in script.PRESETS:
        with pytest.raises(SystemExit):
            script.parse_args(["--preset", preset, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert utils.as_flags(script.PRESETS["strong"]) in text
        for name, value in {**script.PRESETS["reference"], **script.PRESETS[preset]}.items():
            if value not in (None, False):
                assert re.search(rf"--{name}\b[^:]*?[^-]* \(default: {value}\)", text), name


def test_a_mae_of_a_preset_is_the_run_of_its_flags():
    preset = pretrain("--preset", "strong")
    assert pretrain(*utils.as_flags(mae_pretrain.PRESETS["strong"]).split()) == preset
    assert read_config(preset)["arguments"]["preset"] == "strong"


def test_a_classifier_of_the_official_preset_is_a_run_like_any_other():
    """Its settings are stored; it is drawn, measured and taken to timm."""
    mae = pretrain()
    run = classify("--pretrained_model_path", str(mae), "--preset", "official")
    arguments = read_config(run)["arguments"]
    assert arguments.items() >= {"preset": "official", **train_classifier.PRESETS["official"]}.items()
    assert len(arguments) == len(vars(train_classifier.parse_args([]))) + 1  # and the encoder's digest
    visualize_predictions.main(["--model_path", str(run), "--num_images", "3"])
    evaluate_features.main(["--model_path", str(run), "--train_images", "40"])
    export.main([str(run), "--to", "timm"])
    assert {"predictions.png", "features_40.csv", "timm.pt"} <= {path.name for path in run.iterdir()}


def test_pretraining_leaves_a_complete_run_behind():
    directory = pretrain("--model_path", "out/mae.pt")
    assert directory == Path("logs/pretrain/mae_shapes-40_i32_p8_w12_e1_h2_d1_random_r0.75_ep3_b16_s42")
    assert {path.name for path in directory.iterdir()} >= {"config.json", "metrics.csv", "checkpoint.pt", "model.pt"}
    assert list(directory.glob("events.out.tfevents.*"))
    with open(directory / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    columns = ["epoch", "train/loss", "lr", "speed/images_per_sec", "seconds", "memory/peak_mb"]
    assert list(rows[0]) == [*columns, "test/loss", "knn/acc"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["train/loss"]) < float(rows[0]["train/loss"])
    config = read_config(directory)
    assert config["arguments"]["mask_strategy"] == "random"
    assert config["effective_batch_size"] == 16
    assert config["peak_learning_rate"] == pytest.approx(0.01 * 16 / 256)
    content = load_file("out/mae.pt", "MAE_ViT")
    MAE_ViT(**content["model_args"]).load_state_dict(content["model"])


@pytest.mark.parametrize(("img_size", "times"), [(32, 3), (40, 3), (96, 1), (128, 1)])
def test_reconstructions_in_tensorboard_are_large_enough_to_see(img_size, times):
    mae = MAE_ViT(img_size=img_size, patch_size=img_size // 4, embed_dim=12, encoder_depth=1, decoder_depth=1)
    images = torch.rand(2, 3, img_size, img_size) * 2 - 1
    grid = mae_pretrain.reconstruction_grid(mae, images)
    side = times * img_size
    assert grid.shape == (3, 3 * (side + 4) + 4, 2 * (side + 4) + 4)
    last = grid[:, -side - 4 : -4 : times, -side - 4 : -4 : times]
    assert torch.equal(last, data.to_pixels(images[1]))


def test_probes_look_at_test_images_now_and_then_and_change_nothing():
    rows = read_metrics(pretrain("--probe_every", "2", "--log_dir", "probed"))
    assert [row["knn/acc"] == row["knn/acc"] for row in rows] == [False, True, True]  # every second epoch, and the last
    run = next(Path("probed").iterdir())
    assert same_weights(run, pretrain("--probe_every", "0", "--log_dir", "plain"))
    assert "knn/acc" not in read_metrics(next(Path("plain").iterdir()))[0]

    model, _ = load_model(run, MAE_ViT)
    train, test = data.load_dataset("shapes", "data", 32, 40)
    with torch.no_grad():
        bank, asked = (
            F.normalize(model.encoder(data.normalize(images.images))[:, 1:].mean(1), dim=1) for images in (train, test)
        )
        right = 0
        for feature, label in zip(asked, test.labels.tolist(), strict=True):
            similarity, nearest = (bank @ feature).sort(descending=True)
            votes = [0.0] * 10
            for weight, neighbour in zip(
                (similarity[:20] / 0.07).exp().tolist(), train.labels[nearest[:20]], strict=True
            ):
                votes[neighbour] += weight
            right += votes.index(max(votes)) == label
        assert rows[2]["knn/acc"] == pytest.approx(right / 100)
        images = data.normalize(test.images)
        pred, mask = model(images, model.shuffle(100, torch.Generator().manual_seed(0)))
        assert rows[2]["test/loss"] == pytest.approx(mae_loss(pred, images, mask).item(), rel=0.05)  # under other masks


def some_parts(which, count, size):
    return [slice(start, start + size) for start in range(0, count, size)][which]


def test_a_probe_is_the_same_by_two_processes_or_in_small_parts_and_its_k_nn_in_float32(monkeypatch):
    model = MAE_ViT(patch_size=8, embed_dim=12, encoder_depth=1, num_heads=2, decoder_depth=1)
    sets, knn_predict = data.load_dataset("shapes", "data", 32, 40), mae_pretrain.knn_predict

    def in_float32(*inputs):
        assert not torch.is_autocast_enabled("cpu")
        return knn_predict(*inputs)

    monkeypatch.setattr(mae_pretrain, "knn_predict", in_float32)
    alone = mae_pretrain.probe(model, *sets, "bf16", 10)
    found = []  # what the one process, then the other, has to add up
    with monkeypatch.context() as patch:
        patch.setattr(processes, "sum_over_ranks", lambda tensor: found.append(tensor.clone()) or tensor)
        for half in (slice(0, None, 2), slice(1, None, 2)):
            patch.setattr(processes, "shared_out", functools.partial(some_parts, half))
            mae_pretrain.probe(model, *sets, "bf16", 10)
        sums = [one + other for one, other in zip(found[:3], found[3:], strict=True)]
        patch.setattr(processes, "sum_over_ranks", lambda tensor: tensor.copy_(sums.pop(0)))
        both = mae_pretrain.probe(model, *sets, "bf16", 10)
    assert both == pytest.approx(alone)
    few, many = (mae_pretrain.probe(model, *sets, "float32", at_once) for at_once in (7, 100))
    assert few == pytest.approx(many)


def test_a_mae_of_unlabelled_images_is_tested_but_for_k_nn_and_no_classifier_is_trained_on_them(image_folder, capsys):
    flags = ["--dataset", "folder", "--data_dir", str(image_folder / "train" / "cat"), "--img_size", "16"]
    flags += ["--train_images", "2", "--batch_size", "2"]
    run = pretrain(*flags, "--probe_every", "2")
    assert [row["test/loss"] > 0 for row in read_metrics(run)] == [False, True, True]
    assert "knn/acc" not in read_metrics(run)[0]
    for start, arguments in (classify, flags), (evaluate_features.main, [["--model_path", str(run)]]):
        with pytest.raises(SystemExit) as leaving:
            start(*arguments)
        assert leaving.value.code == 2
        assert "without classes or test/ serves pretraining only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "images", "expected"),
    [
        ("", 50_000, 100),  # 20 probes in 2000 epochs
        ("--total_epoch 30 --batch_size 32", 5000, 30),  # the quickstart can afford the last one only
        ("--total_epoch 30 --batch_size 32", 50_000, 5),  # 7 probes of 6,000 images in 3 % of 1.5 million
        ("--total_epoch 5 --batch_size 32", 500_000, 1),
        ("--probe_every 7", 50_000, 7),
        ("--probe_every 0", 50_000, 0),
    ],
)
def test_probes_are_about_20_or_fewer_where_epochs_are_short(flags, images, expected):
    args = mae_pretrain.parse_args(shlex.split(flags))
    assert mae_pretrain.probe_interval(args, training.plan_training(args, images, 0.1, 128, 0, 1), 6000) == expected


def test_a_classifier_starts_from_the_pretrained_encoder():
    mae = pretrain()
    start = weights(mae)["encoder.transformer.0.attn.qkv.weight"]
    name = "transformer.0.attn.qkv.weight"
    pretrained = classify("--pretrained_model_path", str(mae), "--base_learning_rate", "1e-7")
    assert (weights(pretrained)[name] - start).abs().max() < 1e-5
    scratch = classify("--base_learning_rate", "1e-7")
    assert (weights(scratch)[name] - start).abs().max() > 1e-3  # the same draw, but not trained
    assert pretrained.name.endswith(f"from_{mae.name}")
    assert "scratch" in scratch.name
    assert list(read_metrics(scratch)[0])[:4] == ["epoch", "test/loss", "test/acc", "test/acc_mean_of_batches"]


def test_a_mae_of_all_switches_goes_on_to_fine_tuning_and_features():
    mae = pretrain_with_switches()
    positions = weights(mae)["encoder.pos_embedding"]
    run = classify("--pretrained_model_path", str(mae), "--base_learning_rate", "1e-7")
    assert (weights(run)["pos_embedding"] - positions).abs().max() < 1e-5
    evaluate_features.main(["--model_path", str(mae), "--device", "cpu", "--train_images", "40", "--untrained"])
    assert (mae / "features_40.csv").read_text().count("\n") == 5
    visualize_predictions.main(["--model_path", str(mae), "--num_images", "1"])


def test_runs_and_models_from_before_the_switches_are_read_and_continued(capsys):
    run = pretrain()
    config, content = read_config(run), load_file(run)
    for name in NEW:
        del config["arguments"][name], content["arguments"][name], content["model_args"][name]
    (run / "config.json").write_text(json.dumps(config))
    torch.save(content, run / "model.pt")
    load_model(run, MAE_ViT)
    assert pretrain() == run
    assert "Finished already" in capsys.readouterr().out
    (run / "model.pt").unlink()
    assert pretrain() == run  # from its checkpoint
    load_model(run, MAE_ViT)


@pytest.mark.parametrize("start", [pretrain, classify])
def test_a_run_from_before_a_flag_was_there_had_its_default(start, capsys):
    run = start()
    config = read_config(run)
    del config["arguments"]["weight_decay"]
    (run / "config.json").write_text(json.dumps(config))
    assert start() == run
    with pytest.raises(SystemExit):
        start("--weight_decay", "0.1")
    assert "is a run with weight_decay 0.05, and now weight_decay is 0.1" in capsys.readouterr().err


def test_a_pretrained_file_and_its_run_directory_are_the_same():
    mae = pretrain("--model_path", "mae.pt")
    run = classify("--pretrained_model_path", "mae.pt")
    before = (run / "model.pt").stat().st_mtime_ns
    assert classify("--pretrained_model_path", str(mae)) == run
    assert (run / "model.pt").stat().st_mtime_ns == before


def test_a_classifier_of_another_encoder_under_the_same_name_is_refused(capsys):
    mae = pretrain()
    classify("--pretrained_model_path", str(mae))
    pretrain("--overwrite", "--weight_decay", "0.1")
    with pytest.raises(SystemExit):
        classify("--pretrained_model_path", str(mae))
    error = capsys.readouterr().err
    assert "other weights of the pretrained encoder" in error
    assert "--overwrite starts it again" in error


@pytest.mark.parametrize("start", [pretrain, classify])
def test_a_finished_run_says_so_and_is_not_trained_again(start, capsys):
    first = start()
    before = (first / "metrics.csv").read_text()
    assert start() == first
    assert "Finished already" in capsys.readouterr().out
    assert (first / "metrics.csv").read_text() == before
    start("--overwrite")
    assert (first / "metrics.csv").read_text() != before  # the timing


@pytest.mark.parametrize("at_once", [7, 500])
def test_accuracy_counts_every_image_once_and_the_reports_figure_beside_it(at_once, monkeypatch):
    monkeypatch.setattr(train_classifier, "EVAL_BATCH", 48)

    class Model(torch.nn.Module):  # says class 1, wrong for the last 16 images only
        def forward(self, images):
            assert len(images) <= at_once
            return torch.eye(10)[torch.ones(len(images), dtype=torch.long)]

    labels = torch.tensor([1] * 128 + [0] * 16)
    test = data.ImageSet(torch.zeros(144, 3, 4, 4, dtype=torch.uint8), labels, [])
    metrics = train_classifier.evaluate(Model(), test, "float32", at_once)
    assert metrics["test/acc"] == pytest.approx(128 / 144)
    assert metrics["test/acc_mean_of_batches"] == pytest.approx(0.5)
    right, wrong = torch.eye(10)[1].log_softmax(0)[[1, 0]].neg().tolist()
    assert metrics["test/loss"] == pytest.approx((128 * right + 16 * wrong) / 144, rel=1e-5)


def classify_and_choose(*more):
    return classify("--val_images", "10", *more)


def scripted(accuracies, seen, evaluate=train_classifier.evaluate):
    """An `evaluate` that finds these val/acc, one after the other, and notes the number of images and the weights."""

    def evaluate_scripted(model, images, *args):
        seen.append((len(images.images), digest(model.state_dict())))
        scores = evaluate(model, images, *args)
        return {**scores, "val/acc": accuracies.pop(0)} if "val/acc" in scores else scores

    return evaluate_scripted


def test_the_epoch_is_chosen_on_held_out_images_and_the_test_set_is_used_once(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train_classifier, "evaluate", scripted([0.1, 0.4, 0.4, 0.3], seen))
    command = [*SIZE, *SET, "--total_epoch", "4"]
    train_classifier.main([*command, "--val_images", "10"])
    run = Path("logs/classifier/cls_shapes-40_val10_ep4_b16_s42_scratch_i32_p8_w12_e1_h2")
    assert [count for count, _ in seen] == [10, 10, 10, 10, 100]
    assert len(set(seen)) == 5
    assert digest(weights(run)) == seen[4][1] == seen[1][1] != seen[3][1]
    rows = read_metrics(run)
    columns = ["epoch", "val/loss", "val/acc", "test/loss", "test/acc", "test/acc_mean_of_batches", "chosen_epoch"]
    assert list(rows[0])[:8] == [*columns, "train/loss"]
    assert [row["val/acc"] for row in rows] == [0.1, 0.4, 0.4, 0.3]
    assert all(math.isnan(row[name]) for row in rows[:3] for name in columns[3:])
    assert rows[3]["chosen_epoch"] == 2
    said = f"test accuracy {rows[3]['test/acc']:.2%} (epoch 2, chosen on held-out images)"
    assert said in capsys.readouterr().out
    train_classifier.main(command)
    plain = run.with_name(run.name.replace("_val10", ""))
    assert digest(weights(plain)) == seen[3][1]  # trained on the same images


def test_a_stopped_run_does_not_forget_its_best_epoch(monkeypatch):
    """Stopped at the end of the second epoch, and while the test set is used."""
    seen = {"whole": [], "parts": []}
    monkeypatch.setattr(train_classifier, "evaluate", scripted([0.4, 0.2, 0.3], seen["whole"]))
    whole = classify_and_choose("--log_dir", "whole")
    evaluate = scripted([0.4, 0.2, 0.3], seen["parts"])

    def stopping(*args):
        scores = evaluate(*args)
        if len(seen["parts"]) in (2, 4):
            os.kill(os.getpid(), signal.SIGINT)
        return scores

    monkeypatch.setattr(train_classifier, "evaluate", stopping)
    for _ in range(2):
        with pytest.raises(SystemExit):
            classify_and_choose("--log_dir", "parts")
    parts = classify_and_choose("--log_dir", "parts")
    assert seen["parts"] == seen["whole"]
    assert [count for count, _ in seen["parts"]] == [10, 10, 10, 100]
    assert digest(weights(parts)) == digest(weights(whole)) == seen["parts"][0][1]
    assert untimed_metrics(parts) == untimed_metrics(whole)
    assert read_metrics(parts)[-1]["chosen_epoch"] == 1


# --- equal results ---


def classify_officially(*more):
    return classify("--preset", "official", "--encoder_depth", "2", "--clip_grad", "1", *more)


STARTS = [pretrain, pretrain_with_switches, classify, classify_and_choose, classify_officially]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("augment", [[], ["--augment"], ["--augment", "crop"]])
def test_a_run_stopped_anywhere_ends_with_the_bits_of_one_that_was_not(start, augment, monkeypatch):
    whole = start("--log_dir", "whole", *augment)
    again = start("--log_dir", "again", *augment)
    assert same_weights(whole, again)
    tick, ticks = Session.tick, []

    def stop_at_3_and_4(self):  # of 2 + 2 + 2 steps: inside an epoch, and at the end of one
        ticks.append(1)
        if len(ticks) in (3, 4):
            os.kill(os.getpid(), signal.SIGINT)
        tick(self)

    monkeypatch.setattr(Session, "tick", stop_at_3_and_4)
    for _ in range(2):
        with pytest.raises(SystemExit) as leaving:
            start("--log_dir", "parts", *augment)
        assert leaving.value.code == 130
    parts = start("--log_dir", "parts", *augment)
    assert len(ticks) == 6
    assert same_weights(whole, parts)
    assert untimed_metrics(whole) == untimed_metrics(parts)


@pytest.mark.parametrize("start", [pretrain, classify, classify_officially])
def test_accumulated_micro_batches_step_like_one_batch(start):
    whole, parts = start("--log_dir", "whole", "--max_device_batch_size", "16"), start("--log_dir", "parts")
    uneven = start("--log_dir", "uneven", "--max_device_batch_size", "6")  # 5, 5 and 6 images
    assert same_weights(whole, parts, tolerance=1e-5)
    assert same_weights(whole, uneven, tolerance=1e-5)
    assert not same_weights(whole, start("--log_dir", "other", "--seed", "1"), tolerance=1e-3)


def test_ctrl_c_in_a_real_process_and_the_same_command_again(tmp_path):
    command = [sys.executable, str(ROOT / "mae_pretrain.py"), *SIZE, "--decoder_depth", "1", "--dataset", "shapes"]
    command += shlex.split("--total_epoch 4 --batch_size 64 --train_images 1000")

    command += ["--log_dir", "parts"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums in another order have other bits
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(read_metrics(run) for run in tmp_path.glob("parts/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "shapes", FULL_SHAPES)
        for log_dir in ("parts", "whole"):
            mae_pretrain.main([*command[2:-1], log_dir])
    whole, parts = next(tmp_path.glob("whole/*")), next(tmp_path.glob("parts/*"))
    assert len(read_config(parts)["starts"]) == 2
    assert same_weights(whole, parts)
    assert untimed_metrics(whole) == untimed_metrics(parts)


# --- bad input ---


def bad_files():
    Path("text.pt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, "foreign.pt")
    Path("nothing/train").mkdir(parents=True)
    Path("text/train/a").mkdir(parents=True)
    Path("text/test/a").mkdir(parents=True)
    Path("folder.png").mkdir()
    for part in ("train", "test"):
        Path(f"text/{part}/a/0.png").write_text("not an image")


MAE, CLS, VIS = "mae_pretrain", "train_classifier", "visualize_predictions"
BAD = [
    (MAE, "--batch_size 64 --max_device_batch_size 8 --train_images 40", "64 is more than the 40 training images"),
    (MAE, "--patch_size 5", "patch_size 5 does not divide img_size 32"),
    (MAE, "--mask_ratio 0", "mask_ratio 0.0 does not split 16 patches"),
    (MAE, "--mask_ratio 0.99", "mask_ratio 0.99 does not split 16 patches"),
    (MAE, "--mask_ratio 1", "mask_ratio 1.0 does not split"),
    (MAE, "--mask_ratio most", "--mask_ratio: invalid float value: 'most'"),
    (MAE, "--mask_strategy spiral", "--mask_strategy: invalid choice: 'spiral' .choose from .*random"),
    (MAE, "--dataset mnist", "--dataset: invalid choice: 'mnist' .choose from .*cifar10"),
    (MAE, "--dataset folder --data_dir nowhere", "nowhere is missing. --data_dir must hold images"),
    (MAE, "--dataset folder --data_dir nothing", "nothing/train holds no images"),
    (MAE, "--dataset folder --data_dir text", "Cannot read text/train/a/0.png as an image"),
    (MAE, "--num_heads 5", "num_heads 5 does not divide embed_dim 12; these do: 1, 2, 3"),
    (MAE, "--total_epoch 0", "--total_epoch: '0' is not a positive whole number"),
    (MAE, "--total_epoch -3", "--total_epoch: '-3' is not a positive whole number"),
    (MAE, "--warmup_epoch -1", "--warmup_epoch: '-1' is not 0 or a positive number"),
    (MAE, "--total_epoch 2 --warmup_epoch 3", "--warmup_epoch 3 is not within 0 to --total_epoch 2"),
    (MAE, "--base_learning_rate nan", "--base_learning_rate: 'nan' is not 0 or a positive number"),
    (MAE, "--weight_decay -1", "--weight_decay: '-1' is not 0 or a positive number"),
    (MAE, "--train_images 41", "--train_images 41 is not 10 classes times"),
    (MAE, "--device cuda:7", "--device cuda:7 is not there; this machine has cpu"),
    (MAE, "--device gpu", "--device gpu is not there"),
    (MAE, "--precision fp8", "--precision: invalid choice"),
    (MAE, "--decoder_dept 3", "unrecognized arguments: --decoder_dept 3"),
    (MAE, "--mask_ratio nan", "mask_ratio nan does not split"),
    (MAE, "--mask_ratio -0.5", "mask_ratio -0.5 does not split"),
    (MAE, "--img_size 0", "--img_size: '0' is not a positive whole number"),
    (MAE, "--embed_dim 1.5", "--embed_dim: '1.5' is not a positive whole number"),
    (MAE, "--encoder_depth 0", "--encoder_depth: '0'"),
    (MAE, "--decoder_depth deep", "--decoder_depth: 'deep'"),
    (MAE, "--num_heads 0", "--num_heads: '0'"),
    (MAE, "--augment zoom", "--augment: 'zoom' is neither shift nor crop"),
    (CLS, "--augment zoom", "--augment: 'zoom' is neither shift nor crop"),
    (MAE, "--decoder_embed_dim 0", "--decoder_embed_dim: '0'"),
    (MAE, "--positions sincos --embed_dim 14", "'sincos' need a width that is a multiple of 4, not 14"),
    (MAE, "--decoder_embed_dim 5", "decoder_embed_dim 5 is a multiple neither of the encoder's head width 6"),
    (MAE, "--batch_size 0", "--batch_size: '0'"),
    (MAE, "--max_device_batch_size 0", "--max_device_batch_size: '0'"),
    (MAE, "--seed x", "--seed: 'x' is not a whole number"),
    (MAE, "--seed 9223372036854775808", "--seed: '9223372036854775808' is not a whole number of at most 63 bits"),
    (MAE, "--probe_every -1", "--probe_every: '-1' is not 0 or a positive whole number"),
    (MAE, "--train_images 0", "--train_images: '0'"),
    (MAE, "--base_learning_rate inf", "--base_learning_rate: 'inf'"),
    (MAE, "--warmup_epoch soon", "--warmup_epoch: 'soon'"),
    (MAE, "--device cpu:1", "--device cpu:1 is not there"),
    (MAE, "extra", "unrecognized arguments: extra"),
    (MAE, "--batch_size", "--batch_size: expected one argument"),
    (MAE, "--log_dir text.pt", "Not a directory: 'text.pt"),
    (MAE, "--dataset folder --data_dir text.pt", "text.pt is no directory. --data_dir must hold"),
    (CLS, "--num_heads 5", "num_heads 5 does not divide embed_dim 12"),
    (CLS, "--total_epoch 0", "--total_epoch: '0'"),
    (CLS, "--warmup_epoch 9", "--warmup_epoch 9 is not within"),
    (CLS, "--pretrained_model_path nowhere.pt", "No file nowhere.pt"),
    (CLS, "--pretrained_model_path text.pt", "Cannot read text.pt"),
    (CLS, "--pretrained_model_path foreign.pt", "foreign.pt holds no model of this program; MAE_ViT is needed"),
    (CLS, "--pretrained_model_path nothing", "No file nothing/model.pt"),
    (CLS, "--decoder_depth 2", "unrecognized arguments: --decoder_depth 2"),
    (CLS, "--val_images 0", "--val_images: '0' is not a positive whole number"),
    (CLS, "--val_images 15", "--val_images 15 is not 10 classes times 1 to 4 images; try 10"),
    (CLS, "--val_images 50", "--val_images 50 is not 10 classes times 1 to 4 images; try 40"),
    (CLS, "--val_images 20", "With --val_images 20, --train_images 40 is not 10 classes times 1 to 3 .* try 30"),
    (CLS, "--patch_size 5", "patch_size 5 does not divide img_size 32"),
    (CLS, "--preset weak", "--preset: invalid choice: 'weak' .choose from .*reference.*strong"),
    (CLS, "--preset", "--preset: expected one argument"),
    (CLS, "--pool max", "--pool: invalid choice: 'max'"),
    (CLS, "--drop_path 1.5", "--drop_path: '1.5' is not a number from 0 to 1"),
    (CLS, "--layer_decay nan", "--layer_decay: 'nan' is not 0 or a positive number"),
    (CLS, "--mixup -1", "--mixup: '-1' is not 0 or a positive number"),
    (VIS, "", "one of the arguments --model_path --masks is required"),
    (VIS, "--model_path nowhere.pt", "No file nowhere.pt"),
    (VIS, "--model_path text.pt", "Cannot read text.pt"),
    (VIS, "--masks --mask_ratio 0", "mask_ratio 0.0 does not split 256 patches"),
    (VIS, "--masks --model_path a.pt", "--model_path: not allowed with argument --masks"),
    (VIS, "--masks --grid_size 0", "--grid_size: '0'"),
    (VIS, "--masks --grid_size 1", "A grid_size of 1 is one patch: at least 2 patches are needed"),
    (VIS, "--masks --output a.txt", "--output: 'a.txt' does not end in .png"),
    (VIS, "--model_path a.pt --output folder.png", "--output folder.png is a directory; name a file"),
    (VIS, "--model_path a.pt --num_images 101", "--num_images 101 is more than the 100 that fit in a picture"),
    (VIS, "--masks --mask_ratio 0.5 0.75", "--masks draws one --mask_ratio at a time"),
    (VIS, "--masks --images a.png", "--images goes with --model_path"),
    (VIS, "--model_path a.pt --images a.png --num_images 2", "--images goes with .* without --num_images"),
    (VIS, f"--model_path a.pt --images {'a.png ' * 101}", "--images has 101 files, more than the 100 that fit"),
    (VIS, "--masks --num_images -1", "--num_images: '-1'"),
    (VIS, "--masks --mask_strategy spiral", "invalid choice: 'spiral'"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), BAD)
def test_bad_input_gets_one_line_exit_code_2_and_no_run_directory(script, arguments, message, capsys, monkeypatch):
    bad_files()
    before = {
        MAE: [*SIZE, "--decoder_depth", "1", *SET],
        CLS: [*(SIZE if "pretrained" not in arguments else []), *SET],
        VIS: [],
    }[script]
    module = {MAE: mae_pretrain, CLS: train_classifier, VIS: visualize_predictions}[script]
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as leaving:
        module.main([*before, *shlex.split(arguments)])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith(f"{script}.py: error: ")
    assert re.search(message, error), error
    assert not Path("logs").exists()


def test_checkpoints_that_do_not_fit_are_named(capsys):
    mae, classifier = pretrain(), classify()
    (mae / "cut.pt").write_bytes((mae / "model.pt").read_bytes()[:-2000])
    for main, arguments, message in [
        (train_classifier.main, ["--pretrained_model_path", classifier], "holds ViT_Classifier; MAE_ViT is needed"),
        (
            train_classifier.main,
            ["--pretrained_model_path", mae, "--patch_size", "4"],
            "has patch_size=8 but --patch_size",
        ),
        (train_classifier.main, ["--pretrained_model_path", mae / "cut.pt"], "Cannot read .*cut.pt"),
        (
            visualize_predictions.main,
            ["--model_path", mae / "checkpoint.pt"],
            "checkpoint.pt holds checkpoint; MAE_ViT or ViT_Classifier is needed",
        ),
        (visualize_predictions.main, ["--model_path", mae / "cut.pt"], "Cannot read .*cut.pt"),
        (visualize_predictions.main, ["--model_path", classifier, "--mask_ratio", "0.5"], "which masks nothing"),
    ]:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        assert leaving.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_mae_with_a_strategy_that_is_gone_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(MASK_STRATEGIES, "mine", MASK_STRATEGIES["random"])
    mae = pretrain("--mask_strategy", "mine")
    monkeypatch.delitem(MASK_STRATEGIES, "mine")
    with pytest.raises(SystemExit):
        visualize_predictions.main(["--model_path", str(mae)])
    assert re.search("mask_strategy 'mine' is unknown; choose from random, .*\n$", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "model.pt"])
def test_a_damaged_file_of_a_run_is_named(name, capsys):
    directory = pretrain()
    if name == "metrics.csv":
        (directory / "model.pt").unlink()
        (directory / name).write_text("epoch,train/loss\n1,0.5\n2,half\n")
    else:
        (directory / name).write_bytes((directory / name).read_bytes()[:-100])
    with pytest.raises(SystemExit) as leaving:
        mae_pretrain.main([*SIZE, "--decoder_depth", "1", *SET, "--base_learning_rate", "0.01"])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert f"Cannot read {directory / name}: " in error
    assert error.count("\n") == 1


def test_a_damaged_checkpoint_of_a_run_stops_it(capsys):
    directory = pretrain()
    (directory / "model.pt").unlink()
    (directory / "checkpoint.pt").write_bytes((directory / "checkpoint.pt").read_bytes()[:500])
    with pytest.raises(SystemExit) as leaving:
        pretrain()
    assert leaving.value.code == 2
    assert "Cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("start", [pretrain, classify])
@pytest.mark.parametrize(("which", "what"), [(0, "training images"), (1, "test images")])
def test_other_images_under_the_same_name_are_refused(finished, start, which, what, monkeypatch, capsys):
    directory = start()
    if not finished:
        (directory / "model.pt").unlink()
    draw = data.shapes
    monkeypatch.setattr(data, "shapes", lambda count, size, seed: draw(count, size, seed + 5 * (seed == which)))
    with pytest.raises(SystemExit):
        start()
    assert f"is a run with other {what}" in capsys.readouterr().err


def test_a_finished_run_on_a_folder_looks_at_its_images_again(image_folder, capsys):
    flags = ["--dataset", "folder", "--data_dir", str(image_folder), "--batch_size", "2", "--img_size", "16"]
    flags += ["--train_images", "4"]
    classify(*flags)
    classify(*flags)
    assert "Finished already" in capsys.readouterr().out
    (image_folder / "train" / "cat").rename(image_folder / "train" / "x")
    (image_folder / "train" / "dog").rename(image_folder / "train" / "cat")
    (image_folder / "train" / "x").rename(image_folder / "train" / "dog")
    with pytest.raises(SystemExit):
        classify(*flags)
    assert "is a run with other training images" in capsys.readouterr().err
    image_folder.rename(image_folder.with_name("moved"))
    with pytest.raises(SystemExit):
        classify(*flags)
    assert "is missing" in capsys.readouterr().err


def test_an_edited_strategy_does_not_answer_with_the_old_run(monkeypatch, capsys):
    pretrain()
    monkeypatch.setitem(MASK_STRATEGIES, "random", MASK_STRATEGIES["block"])
    with pytest.raises(SystemExit):
        pretrain()
    assert "is a run with other masks from the strategy of this name" in capsys.readouterr().err


def test_a_classifier_takes_the_data_of_its_mae_and_keeps_how_that_was_pretrained():
    mae = pretrain("--decoder_depth", "2", "--mask_strategy", "block")
    train_classifier.main(f"--pretrained_model_path {mae} --total_epoch 1 --batch_size 8 --train_images 40".split())
    config = read_config(next(Path("logs/classifier").iterdir()))
    assert config["arguments"]["dataset"] == "shapes"
    kept = {name: config["pretraining"][name] for name in ("decoder_depth", "mask_strategy", "mask_ratio", "seed")}
    assert kept == {"decoder_depth": 2, "mask_strategy": "block", "mask_ratio": 0.75, "seed": 42}


def test_a_foreign_file_does_not_choose_where_is_written(capsys):
    mae, other = pretrain(), Path("ESCAPED")
    other.mkdir()
    (other / "other.pt").write_text("of someone else")
    content = load_file(mae / "model.pt")
    torch.save({**content, "run_name": "x/../../../ESCAPED"}, "foreign.pt")
    with pytest.raises(SystemExit) as leaving:
        classify("--pretrained_model_path", "foreign.pt", "--overwrite")
    assert leaving.value.code == 2
    assert "cannot be the name of a run's directory" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["other.pt"]


def test_an_argument_that_contradicts_the_stored_run_is_named(capsys):
    pretrain()
    with pytest.raises(SystemExit) as leaving:
        pretrain("--weight_decay", "0.3")
    assert leaving.value.code == 2
    assert "weight_decay 0.05, and now weight_decay is 0.3" in capsys.readouterr().err


def test_a_mistake_in_a_new_strategy_keeps_its_traceback(monkeypatch):
    def mistaken(*args):
        return torch.zeros(3).view(2, 2)  # torch's RuntimeError

    def refused(*args):
        raise ValueError("not a square")

    for strategy, error, message in (
        (mistaken, RuntimeError, "invalid for input of size 3"),
        (refused, ValueError, "not"),
    ):
        monkeypatch.setitem(MASK_STRATEGIES, "new", strategy)
        with pytest.raises(error, match=message):
            mae_pretrain.main([*SIZE, "--decoder_depth", "1", *SET, "--mask_strategy", "new", "--overwrite"])


# --- pictures and help ---


def drawn(monkeypatch, *arguments):
    """The figures that visualize_predictions draws."""
    figures = []
    monkeypatch.setattr(visualize_predictions, "save", lambda figure, path: figures.append(figure))
    visualize_predictions.main(list(arguments))
    visualize_predictions.plt.close("all")
    return figures


def picture_size(path):
    return visualize_predictions.plt.imread(path).shape


def test_pictures_of_a_mae_and_of_another_mask():
    mae = pretrain()
    visualize_predictions.main(["--model_path", str(mae), "--num_images", "3"])
    visualize_predictions.main(["--model_path", str(mae / "model.pt"), "--mask_strategy", "block", "--num_images", "3"])
    assert picture_size(mae / "reconstructions.png")[0] > 400
    assert (mae / "reconstructions.png").read_bytes() != (mae / "reconstructions_block.png").read_bytes()


def test_pictures_of_normalised_pixels_tell_the_models_own_loss_and_what_they_borrow(monkeypatch):
    figures = []
    monkeypatch.setattr(visualize_predictions, "save", lambda figure, path: figures.append(figure))
    mae = pretrain("--norm_pix_loss", "--total_epoch", "1")
    visualize_predictions.main(["--model_path", str(mae), "--num_images", "100"])
    title = figures[0]._suptitle.get_text()
    assert "with their true mean and variance" in title
    own = read_metrics(mae)[0]["test/loss"]  # on the same 100 images, under other masks
    error = next(place.get_ylabel() for place in figures[0].axes if "error" in place.get_ylabel())
    assert float(error.split()[-1]) == pytest.approx(own, rel=0.05)
    visualize_predictions.plt.close(figures[0])
    images = data.normalize(data.load_dataset("shapes", "data", 32)[1].images)
    matrix = mask_matrix({BASE: [SimpleNamespace(mae=mae)]}, ["random"], ["random"], images, "cpu")
    assert matrix.item() == pytest.approx(own, rel=0.05)


def test_several_masks_are_drawn_below_each_other_and_the_original_below_them(monkeypatch):
    run = pretrain("--total_epoch", "1")
    masks = shlex.split("--mask_strategy random block --mask_ratio 0.5 0.75 --num_images 2")
    (figure,) = drawn(monkeypatch, "--model_path", str(run), *masks)
    rows = [figure.axes[i : i + 2] for i in range(0, len(figure.axes), 2)]
    pixels = [[place.images[0].get_array() for place in row] for row in rows]
    labels = [row[0].get_ylabel() for row in rows]
    settings = [f"{strategy}\n{share}% hidden" for strategy in ("random", "block") for share in (50, 75)]
    assert labels[0:8:2] == settings
    assert all(re.fullmatch(r"reconstruction\nerror \d\.\d{4}", label) for label in labels[1:8:2])
    assert labels[8:] == ["original"]
    for masked, hidden in zip(pixels[0:8:2], (0.5, 0.75) * 2, strict=True):
        assert (masked[0] == 128).all(-1).mean() == hidden
        assert (masked[0] == pixels[8][0]).all(-1).mean() == 1 - hidden


def test_a_mae_of_unlabelled_images_is_shown_on_the_held_out_ones(image_folder, monkeypatch):
    flags = ["--dataset", "folder", "--data_dir", str(image_folder / "train" / "cat"), "--img_size", "16"]
    run = pretrain(*flags, *shlex.split("--train_images 2 --batch_size 2 --total_epoch 1"))
    pictures = drawn(monkeypatch, "--model_path", str(run))
    original = pictures[0].axes[-1].images[0].get_array()
    held_out = data.load_dataset("folder", flags[3], 16, labelled=False)[1].images
    assert (original == held_out[0].permute(1, 2, 0).numpy()).all()


def turned_photo(path):
    """A JPEG of 96 x 64, green above red, stored as a turned camera stores it."""
    upright = Image.new("RGB", (96, 64), "green")
    upright.paste("red", (0, 32, 96, 64))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def test_own_images_are_reconstructed_upright_and_cropped_as_a_folder_is(monkeypatch):
    turned_photo("photo.jpg")
    Image.new("L", (20, 20), 100).save("grey.png")
    run = pretrain("--total_epoch", "1")
    (figure,) = drawn(monkeypatch, "--model_path", str(run), "--images", "photo.jpg", "grey.png")
    assert [place.get_title() for place in figure.axes] == ["photo.jpg", "grey.png", *[""] * 4]
    photo, grey = (place.images[0].get_array() for place in figure.axes[4:])
    assert (photo == data.read_image("photo.jpg", 32).permute(1, 2, 0).numpy()).all()
    assert (photo[4, 16, 1] > 100) & (photo[28, 16, 0] > 200)  # green above, red below
    assert (grey == 100).all()


def test_a_classifier_names_three_classes_for_own_images_and_asks_for_no_data_set(monkeypatch):
    turned_photo("photo.jpg")
    run = classify("--total_epoch", "1")
    monkeypatch.setattr(data, "load_dataset", None)
    (figure,) = drawn(monkeypatch, "--model_path", str(run), "--images", "photo.jpg")
    model, content = load_model(run, ViT_Classifier)
    with torch.no_grad():
        shares = model(data.normalize(data.read_image("photo.jpg", 32))[None])[0].softmax(dim=0)
    best = sorted(zip(shares.tolist(), content["classes"], strict=True), reverse=True)[:3]
    assert figure.axes[0].get_title() == "photo.jpg"
    assert figure.axes[0].get_xlabel() == "\n".join(f"{name} {share:.0%}" for share, name in best)


def test_own_images_that_cannot_be_read_are_named(capsys):
    run = pretrain("--total_epoch", "1")
    Path("text.png").write_text("not an image")
    for path, message in ("nowhere.png", "No file nowhere.png."), ("text.png", "Cannot read text.png as an image"):
        with pytest.raises(SystemExit) as leaving:
            visualize_predictions.main(["--model_path", str(run), "--images", path])
        assert leaving.value.code == 2
        assert message in capsys.readouterr().err


def test_picture_of_a_classifier_and_curves():
    run = classify()
    visualize_predictions.main(["--model_path", str(run), "--num_images", "10", "--output", "deep/p.png"])
    assert picture_size("deep/p.png")[1] > 400
    plot_curves.main([str(run), str(run), "--label", "a", "b", "--output", "c.png"])
    assert picture_size("c.png")[1] > 400


def test_curves_are_of_the_held_out_images_where_all_runs_have_them(capsys):
    val, test = str(classify_and_choose()), str(classify())
    for arguments, expected in [
        ([val], "accuracy on held-out images"),
        ([val, test], "test accuracy"),
        ([val, "--metric", "test/acc"], "test accuracy"),
        ([str(pretrain())], "k-NN accuracy"),
    ]:
        plot_curves.main(arguments)
        shown = re.findall(rf"epoch 3: .*{expected} 0\.\d{{4}}", capsys.readouterr().out)
        assert len(shown) == len([argument for argument in arguments if Path(argument).is_dir()])


@pytest.mark.parametrize("start", [pretrain, classify])
def test_a_picture_of_one_image_has_its_whole_title(start, monkeypatch):
    figures = []
    monkeypatch.setattr(visualize_predictions, "save", lambda figure, path: figures.append(figure))
    visualize_predictions.main(["--model_path", str(start("--total_epoch", "1")), "--num_images", "1"])
    figure = figures[0]
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 > -2
    assert title.x1 < figure.bbox.width + 2
    assert title.y0 > max(axes.get_window_extent().y1 for axes in figure.axes)
    visualize_predictions.plt.close(figure)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mae_i32_d4_shifted_grid_s1", "mae_i32_d8_random_s1"], ["d4 shifted grid", "d8 random"]),
        (
            ["cls_b8_s1_from_mae_d4_s1", "cls_b8_s2_from_mae_d4_s2", "cls_b8_s1_scratch_i32"],
            ["pretrained s1", "pretrained s2", "from scratch"],
        ),
        (["cls_s1_from_mae_s42", "cls_s42_from_mae_s42"], ["s1", "s42"]),
        (["mae_i32_d4_s1"], ["mae_i32_d4_s1"]),
        (["lr3e-4/mae_d4", "pretrain/mae_d4"], ["lr3e-4", "pretrain"]),
        (["cls_s1_from_mae_s2", "cls_s2_from_mae_s1"], ["logs/cls_s1_from_mae_s2", "logs/cls_s2_from_mae_s1"]),
        (["mae_d4", "mae_d4_aug"], ["logs/mae_d4", "logs/mae_d4_aug"]),
    ],
)
def test_curves_are_named_by_what_differs_in_their_runs_names(names, expected):
    assert plot_curves.short_names([Path("logs") / name for name in names]) == expected


def written_run(name, **metrics):
    """A run directory with 2 epochs of these metrics, as far as a plot reads it."""
    run = Path(name)
    run.mkdir()
    columns = {"train/loss": 0.5, **metrics}
    row = ",".join(map(str, columns.values()))
    (run / "metrics.csv").write_text(f"epoch,{','.join(columns)}\n1,{row}\n2,{row}\n")
    return str(run)


@pytest.mark.parametrize("count", [1, 24])
def test_the_legend_of_long_names_lies_below_the_plots_and_leaves_them_their_size(count, monkeypatch):
    figures = []
    monkeypatch.setattr(plot_curves, "save", lambda figure, path: figures.append(figure))
    size = "cifar10-jpeg_i32_p4_w64_e4_h4_d4_blockwise_r0.75_ep3_b128"
    names = [f"cls_cifar10-jpeg-10000_ep8_b100_s{i}_from_mae_{size}_s{i}" for i in range(count)]
    plot_curves.main([*(written_run(name, **{"test/acc": 0.5}) for name in names), "--label", *names])
    (figure,) = figures
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == count
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    for axes in figure.axes:
        assert axes.get_window_extent().y0 > box.y1
        assert (axes.get_window_extent().size / figure.dpi > (4, 3)).all()
    plot_curves.plt.close(figure)


def test_k_nn_accuracy_is_drawn_for_the_runs_that_have_it(capsys):
    plot_curves.main([written_run("mae_d2"), written_run("mae_d4", **{"knn/acc": 0.25})])
    said = capsys.readouterr().out
    assert "d2  epoch 2: training loss 0.5000\n" in said
    assert "d4  epoch 2: training loss 0.5000, k-NN accuracy 0.2500\n" in said
    with pytest.raises(SystemExit):
        plot_curves.main(["mae_d2", "mae_d4", "--metric", "knn/acc"])
    assert "mae_d2 has no knn/acc; it has epoch, train/loss" in capsys.readouterr().err


def test_curves_can_be_drawn_from_the_scripts_path_as_well(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "plot_curves.py", written_run("mae_d2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("curves.png\n")


def test_gallery_of_masks_needs_no_model():
    visualize_predictions.main(["--masks"])
    assert picture_size("masks.png")[0] > 400
    command = ["--masks", "--mask_strategy", "grid", "--grid_size", "4"]
    figure = visualize_predictions.draw_masks(visualize_predictions.parse_args(command))
    share = figure.axes[6].images[0].get_array()
    assert (share.sum(), share[0, 0]) == (4, 1)
    visualize_predictions.plt.close(figure)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        (mae_pretrain, []),
        (mae_pretrain, ["--compile", "--norm_pix_loss"]),
        (train_classifier, []),
        (train_classifier, ["--compile", "--val_images", "5000"]),
    ],
)
def test_dry_run_goes_through_every_line_and_leaves_nothing(script, more, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)  # slow; tests/test_model.py really compiles
    output = "--model_path" if script is mae_pretrain else "--output_model_path"
    script.main(["--dry_run", *SIZE, output, "mine.pt", *more])
    assert "saved and reloaded" in capsys.readouterr().out
    assert not list(Path().iterdir())


PARSERS = [mae_pretrain, train_classifier, evaluate_features, visualize_predictions, plot_curves, benchmark]
PARSERS += [export, make_report, compare, sweep]


@pytest.mark.parametrize("script", PARSERS)
def test_help_shows_every_flag_with_a_text(script, capsys, monkeypatch):
    added, add_argument = {}, argparse._ActionsContainer.add_argument

    def noted(self, *names, **options):
        added[names[0]] = options.get("help")
        return add_argument(self, *names, **options)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", noted)
    with pytest.raises(SystemExit) as leaving:
        script.parse_args(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert len(added) >= 3
    for name, text in added.items():
        assert re.search(rf"^  (-h, )?{name}\b", shown, re.MULTILINE), name
        assert text, f"{name} has no text"
    assert "(default: None)" not in shown
    assert ":\n\noptions:" not in shown  # the description before them is a whole sentence


COMMAND = re.compile(r" *(scripts/setup.sh && )?(\.venv/bin/python|python|torchrun) ")
PAGES = [ROOT / "README.md", *ROOT.glob("logs/report/*.md"), ROOT / "pretrained" / "README.md"]


def test_the_shipped_model_is_what_its_page_tells_of_and_fills_in_a_photo(tmp_path):
    shipped = tmp_path / "pretrained"
    shutil.copytree(ROOT / "pretrained", shipped)
    file = (shipped / "model.pt").read_bytes()
    assert hashlib.sha256(file).hexdigest() in (shipped / "README.md").read_text()
    _, content = load_model(shipped, MAE_ViT)
    assert content["arguments"].items() <= read_config(shipped)["arguments"].items()
    assert read_features(shipped / "features.json")["model_digest"] == digest(content["model"])
    photo = data.shapes(1, 32, 0).images[0]
    Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((300, 200)).save("photo.png")
    visualize_predictions.main(["--model_path", str(shipped), "--images", "photo.png"])
    assert picture_size(shipped / "reconstructions_images.png")[0] > 200


def test_commands_in_the_readme_its_pages_and_the_scripts_have_flags_that_exist():
    commands = []
    modules = (mae_pretrain, train_classifier, evaluate_features, visualize_predictions)
    parsers = {f"{module.__name__}.py": module for module in modules}
    parsers |= {module.__name__: module for module in (benchmark, compare, export, make_report, plot_curves, sweep)}
    for path in [*PAGES, *ROOT.glob("*.py")]:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if COMMAND.match(line) else []
            for script in parsers.keys() & set(words):
                parsers[script].parse_args(words[words.index(script) + 1 :])
                commands.append(words)
    assert len(commands) > 20


def test_links_in_the_readme_and_its_pages_lead_to_files():
    for page in PAGES:
        links = re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text())
        assert links
        for link in links:
            assert (page.parent / link).is_file(), f"{page}: {link}"


def test_the_readmes_python_runs():
    (code,) = re.findall(r"```python\n(import torch.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copytree(ROOT / "pretrained", "pretrained")
    classify("--pretrained_model_path", str(pretrain()), "--output_model_path", "logs/quickstart/seed42/pretrained.pt")
    names = {}
    exec(code, names)
    assert names["features"].shape == (1, 65, 96)
    assert names["pixels"].dtype == torch.uint8
    assert names["name"] in data.SHAPES


def test_the_defaults_are_the_references_recipe():
    args = vars(mae_pretrain.parse_args([]))
    expected = {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 192,
        "encoder_depth": 12,
        "num_heads": 3,
        "decoder_depth": 4,
    }
    expected |= {"mask_ratio": 0.75, "mask_strategy": "random", "total_epoch": 2000, "batch_size": 4096, "seed": 42}
    expected |= {"base_learning_rate": 1.5e-4, "weight_decay": 0.05, "dataset": "cifar10"}
    assert {key: args[key] for key in expected} == expected
    assert mae_pretrain.DEVICE_BATCH_SIZE["cuda"] == 512
    args = vars(train_classifier.parse_args([]))
    expected = {"total_epoch": 100, "batch_size": 128, "base_learning_rate": 1e-3}
    assert {key: args[key] for key in expected} == expected
    assert train_classifier.DEVICE_BATCH_SIZE["cuda"] == 256
