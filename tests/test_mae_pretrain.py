"""mae_pretrain.py from end to end: what a run leaves behind, its probes and its switches."""

import csv
import functools
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from starting import classify, pretrain, pretrain_with_switches, same_weights, weights

import evaluate_features
import mae_pretrain
import visualize_predictions
from engine import processes, training
from engine.checkpoints import load_file, load_model
from engine.records import read_metrics, read_run
from images import load
from images.pixels import normalize, to_pixels
from model import MAE_ViT

pytestmark = pytest.mark.usefixtures("empty_directory", "few_shapes")


def test_pretraining_leaves_a_complete_run_behind():
    directory = pretrain("--output_model_path", "out/mae.pt")
    assert directory == Path("logs/pretrain/mae_shapes_n40_p8_w12_e1_h2_d1_random_r0.75_ep3_b16_lr0.01_s42")
    assert {path.name for path in directory.iterdir()} >= {"config.json", "metrics.csv", "checkpoint.pt", "model.pt"}
    assert list(directory.glob("events.out.tfevents.*"))
    with open(directory / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    columns = ["epoch", "train/loss", "lr", "speed/images_per_sec", "seconds", "memory/peak_mb"]
    assert list(rows[0]) == [*columns, "test/loss", "probe/knn_acc"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["train/loss"]) < float(rows[0]["train/loss"])
    run = read_run(directory)
    assert (run.kind, run.name, run.parent, run.finished) == ("mae", directory.name, None, True)
    assert run.settings["mask_strategy"] == "random"
    assert run.facts["effective_batch_size"] == 16
    assert run.facts["peak_learning_rate"] == pytest.approx(0.01 * 16 / 256)
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
    assert torch.equal(last, to_pixels(images[1]))


def test_probes_look_at_test_images_now_and_then_and_change_nothing(mae):
    """Beside a run of the same settings that is probed at its end only."""
    run = pretrain("--probe_every", "2", "--log_dir", "probed")
    rows = read_metrics(run)
    assert [row["probe/knn_acc"] == row["probe/knn_acc"] for row in rows] == [False, True, True]  # and the last
    never = pretrain("--probe_every", "0", "--log_dir", "plain")
    assert same_weights(run, never)
    assert same_weights(run, mae)
    assert not {"probe/knn_acc", "test/loss"} & read_metrics(never)[-1].keys()


def test_a_probe_measures_what_a_plain_loop_does(mae):
    row, (model, _) = read_metrics(mae)[-1], load_model(mae, MAE_ViT)
    train, test = load.load_dataset("shapes", "data", 32)
    train, _ = load.draw(train, 40, seed=42)
    with torch.no_grad():
        bank, asked = (
            F.normalize(model.encoder(normalize(images.images))[:, 1:].mean(1), dim=1) for images in (train, test)
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
        assert row["probe/knn_acc"] == pytest.approx(right / 100)
        loss = model.loss(normalize(test.images), model.shuffle(100, torch.Generator().manual_seed(0)))
        assert row["test/loss"] == pytest.approx(loss.item(), rel=0.05)  # under other masks


def some_parts(which, count, size):
    return [slice(start, start + size) for start in range(0, count, size)][which]


def test_a_probe_is_the_same_by_two_processes_or_in_small_parts_and_its_k_nn_in_float32(monkeypatch):
    model = MAE_ViT(patch_size=8, embed_dim=12, encoder_depth=1, num_heads=2, decoder_depth=1)
    sets, knn_predict = load.load_dataset("shapes", "data", 32), mae_pretrain.knn_predict

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


def test_a_mae_of_unlabelled_images_is_tested_but_for_k_nn_and_no_classifier_is_trained_on_them(image_folder, capsys):
    flags = ["--dataset", "folder", "--data_dir", str(image_folder / "train" / "cat"), "--img_size", "16"]
    flags += ["--train_images", "2", "--batch_size", "2"]
    run = pretrain(*flags, "--probe_every", "2")
    assert [row["test/loss"] > 0 for row in read_metrics(run)] == [False, True, True]
    assert "probe/knn_acc" not in read_metrics(run)[0]
    with pytest.raises(SystemExit) as leaving:
        classify(*flags)
    assert leaving.value.code == 2
    assert str(image_folder / "train" / "cat") in capsys.readouterr().err


def test_a_mae_of_all_switches_goes_on_to_fine_tuning():
    mae = pretrain_with_switches()
    positions = weights(mae)["encoder.pos_embedding"]
    run = classify("--pretrained_model_path", mae, "--base_learning_rate", "1e-7")
    assert (weights(run)["pos_embedding"] - positions).abs().max() < 1e-5


def test_a_mistake_in_a_new_strategy_keeps_its_traceback(monkeypatch):
    def mistaken(*args):
        return torch.zeros(3).view(2, 2)  # torch's RuntimeError

    def refused(*args):
        raise ValueError("not a square")

    for strategy, error in ((mistaken, RuntimeError), (refused, ValueError)):
        monkeypatch.setitem(mae_pretrain.MASK_STRATEGIES, "new", strategy)
        with pytest.raises(error):
            pretrain("--mask_strategy", "new")


def test_grey_images_are_trained_on_measured_and_drawn_with_one_channel():
    mae = pretrain("--in_chans", "1")
    assert "_p8_c1_w12_" in mae.name
    assert weights(mae)["encoder.patchify.weight"].shape == (12, 1, 8, 8)
    run = classify("--pretrained_model_path", mae)
    assert weights(run)["patchify.weight"].shape == (12, 1, 8, 8)
    assert read_run(run).settings["in_chans"] == 1
    evaluate_features.main(["--model_path", str(mae), "--train_images", "20"])
    for model in (mae, run):
        visualize_predictions.main(["--model_path", str(model), "--num_images", "2"])
    assert (mae / "reconstructions.png").exists()
    assert (run / "predictions.png").exists()
