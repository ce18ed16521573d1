"""train_classifier.py from end to end: where it starts from, how accuracy is counted, the epoch chosen on held-out
images.
"""

import math
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from starting import SET, SIZE, classify, classify_and_choose, pretrain, unfinish, untimed_metrics, weights

import mae_pretrain
import train_classifier
from engine import predictions
from engine.checkpoints import digest, load_file, load_model
from engine.predictions import read_predictions
from engine.records import read_metrics, read_run
from images.load import load_dataset
from images.pixels import ImageSet, normalize
from model import ViT_Classifier

pytestmark = pytest.mark.usefixtures("empty_directory", "few_shapes")


# --- where it starts ---


def test_a_classifier_starts_from_the_pretrained_encoder(mae):
    start = weights(mae)["encoder.transformer.0.attn.qkv.weight"]
    name = "transformer.0.attn.qkv.weight"
    run = classify("--pretrained_model_path", mae, "--base_learning_rate", "1e-7")
    assert (weights(run)[name] - start).abs().max() < 1e-5
    assert run.name.endswith(f"from_{mae.name}")
    parent = read_run(run).parent
    assert parent.items() >= {"name": mae.name, "settings": read_run(mae).settings}.items()
    assert parent["digest"] == digest(weights(mae))


def test_a_classifier_from_scratch_starts_elsewhere(mae):
    start = weights(mae)["encoder.transformer.0.attn.qkv.weight"]
    run = classify("--base_learning_rate", "1e-7")
    assert (weights(run)["transformer.0.attn.qkv.weight"] - start).abs().max() > 1e-3  # the same draw, but not trained
    assert "_scratch" in run.name
    assert read_run(run).parent is None
    assert read_metrics(run)[0].keys() >= {"epoch", "test/loss", "test/acc", "test/acc_mean_of_batches", "train/loss"}


def test_a_pretrained_file_and_its_run_directory_are_the_same(mae):
    run = classify("--pretrained_model_path", mae / "model.pt")
    before = (run / "model.pt").stat().st_mtime_ns
    assert classify("--pretrained_model_path", mae) == run
    assert (run / "model.pt").stat().st_mtime_ns == before


def test_a_classifier_takes_the_data_of_its_mae_and_keeps_how_that_was_pretrained():
    mae = pretrain("--decoder_depth", "2", "--mask_strategy", "block")
    train_classifier.main(f"--pretrained_model_path {mae} --total_epoch 1 --batch_size 8 --train_images 40".split())
    run = read_run(next(Path("logs/classifier").iterdir()))
    assert run.settings["dataset"] == "shapes"
    kept = {name: run.parent["settings"][name] for name in ("decoder_depth", "mask_strategy", "mask_ratio", "seed")}
    assert kept == {"decoder_depth": 2, "mask_strategy": "block", "mask_ratio": 0.75, "seed": 42}


def test_a_foreign_file_does_not_choose_where_is_written(mae):
    other = Path("ESCAPED")
    other.mkdir()
    (other / "other.pt").write_text("of someone else")
    content = load_file(mae / "model.pt")
    torch.save({**content, "name": "x/../../../ESCAPED"}, "foreign.pt")
    run = classify("--pretrained_model_path", "foreign.pt", "--overwrite")
    assert run.resolve().parent == Path("logs/classifier").resolve()
    assert [path.name for path in other.iterdir()] == ["other.pt"]


def test_the_head_starts_as_the_official_one_or_as_pytorchs(few_shapes):
    heads = []
    for flags in ("--preset official", ""):
        args = train_classifier.parse_args([*SIZE, "--dataset", "shapes", *flags.split()])
        experiment = train_classifier.Classification(args)
        experiment.load("cpu")
        heads.append(experiment.build().head)
    official, plain = heads
    assert official.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    assert official.bias.abs().max() == 0
    assert plain.weight.std() > 0.01


def test_a_classifier_of_the_official_preset_stores_its_settings(mae):
    run = read_run(classify("--pretrained_model_path", mae, "--preset", "official"))
    assert run.settings.items() >= train_classifier.PRESETS["official"].items()
    assert run.starts[0]["arguments"]["preset"] == "official"


def drawn(script, flags, seed):
    """The images that a run of this seed trains on, as a set, and the digests that tell it from others."""
    args = script.parse_args([*SIZE, "--dataset", "shapes", "--seed", str(seed), *shlex.split(flags)])
    experiment = train_classifier.Classification(args) if script is train_classifier else mae_pretrain.Pretraining(args)
    experiment.load("cpu")
    images = experiment.train.images if script is train_classifier else experiment.images
    return {image.numpy().tobytes() for image in images}, experiment.digests


def test_each_seed_draws_its_own_images_of_one_set_and_a_label_seed_fixes_them():
    (one, facts), (other, same_facts) = (drawn(train_classifier, "--train_images 20", seed) for seed in (1, 2))
    assert len(one) == len(other) == 20
    assert len(one & other) < 15
    assert facts == same_facts  # so seeds are compared, and averaged
    fixed = [drawn(train_classifier, "--train_images 20 --label_seed 1", seed)[0] for seed in (1, 2)]
    assert fixed == [one, one]
    assert drawn(train_classifier, "--train_images 20 --val_images 20", 1)[0] == one
    assert drawn(mae_pretrain, "--train_images 20", 1)[0] == one  # as its classifiers of the same seed


# --- what it measures ---


@pytest.mark.parametrize("at_once", [7, 500])
def test_accuracy_counts_every_image_once_and_the_reports_figure_beside_it(at_once, monkeypatch):
    monkeypatch.setattr(predictions, "EVAL_BATCH", 48)

    class Model(torch.nn.Module):  # says class 1, wrong for the last 16 images only
        head = torch.nn.Identity()

        def pooled(self, images):
            assert len(images) <= at_once
            return torch.eye(10)[torch.ones(len(images), dtype=torch.long)]

    labels = torch.tensor([1] * 128 + [0] * 16)
    test = ImageSet(torch.zeros(144, 3, 4, 4, dtype=torch.uint8), labels, [])
    metrics, predicted = train_classifier.evaluate(Model(), test, "float32", at_once)
    assert predicted.tolist() == [1] * 144
    assert metrics["test/acc"] == pytest.approx(128 / 144)
    assert metrics["test/acc_mean_of_batches"] == pytest.approx(0.5)
    assert metrics["test/balanced_acc"] == pytest.approx(0.5)
    right, wrong = torch.eye(10)[1].log_softmax(0)[[1, 0]].neg().tolist()
    assert metrics["test/loss"] == pytest.approx((128 * right + 16 * wrong) / 144, rel=1e-5)


def scripted(accuracies, seen, evaluate=train_classifier.evaluate):
    """An `evaluate` that finds these val/acc, one after the other, and notes the number of images and the weights."""

    def evaluate_scripted(model, images, *args):
        seen.append((len(images.images), digest(model.state_dict())))
        scores, predicted = evaluate(model, images, *args)
        return scores | ({"val/acc": accuracies.pop(0)} if "val/acc" in scores else {}), predicted

    return evaluate_scripted


def test_the_epoch_is_chosen_on_held_out_images_and_the_test_set_is_used_once(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train_classifier, "evaluate", scripted([0.1, 0.4, 0.4, 0.3], seen))
    command = [*SIZE, *SET, "--total_epoch", "4"]
    train_classifier.main([*command, "--val_images", "10"])
    (run,) = Path("logs/classifier").iterdir()
    assert "_val10_" in run.name
    assert [count for count, _ in seen] == [10, 10, 10, 10, 100]
    assert len(set(seen)) == 5
    assert digest(weights(run)) == seen[4][1] == seen[1][1] != seen[3][1]
    rows = read_metrics(run)
    columns = ["test/loss", "test/acc", "test/acc_mean_of_batches", "chosen_epoch"]
    assert rows[0].keys() >= {"epoch", "val/loss", "val/acc", *columns, "train/loss"}
    assert [row["val/acc"] for row in rows] == [0.1, 0.4, 0.4, 0.3]
    assert all(math.isnan(row[name]) for row in rows[:3] for name in columns)
    assert rows[3]["chosen_epoch"] == 2
    said = capsys.readouterr().out
    assert f"{rows[3]['test/acc']:.2%}" in said
    assert "epoch 2, chosen on held-out images" in said
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


def write_uneven(counts, path="rare.npz"):
    """Two classes of 8 x 8 noise, so many images of each to train on and to test on."""
    labels, random = np.repeat([0, 1], counts), np.random.default_rng(0)
    arrays = {f"{part}_images": random.integers(0, 256, (20, 8, 8)).astype(np.uint8) for part in ("train", "test")}
    np.savez(path, **arrays, train_labels=labels, test_labels=labels)
    return shlex.split(f"--img_size 8 --dataset npz --data_dir {path} --total_epoch 2 --batch_size 8")


@pytest.mark.parametrize("flags", ["", "--val_images 10"])
def test_a_finished_classifier_keeps_what_it_predicts_for_each_test_image(flags):
    run = classify(*shlex.split(flags))
    _, test = load_dataset("shapes", "data", 32)
    with torch.no_grad():
        predicted = load_model(run, ViT_Classifier)[0](normalize(test.images)).argmax(1)
    kept = pd.read_csv(run / "predictions.csv", index_col="image")
    assert list(kept.label) == [test.classes[i] for i in test.labels]
    assert list(kept.prediction) == [test.classes[i] for i in predicted]
    assert (kept.label == kept.prediction).mean() == pytest.approx(read_metrics(run)[-1]["test/acc"])
    assert read_predictions(run / "predictions.csv") == list(zip(kept.label, kept.prediction, strict=True))
    (run / "predictions.csv").unlink()
    unfinish(run)  # stopped between its last checkpoint and its end
    classify(*shlex.split(flags))
    assert kept.equals(pd.read_csv(run / "predictions.csv", index_col="image"))


@pytest.mark.parametrize("flags", ["", "--val_images 2"])
@pytest.mark.parametrize("counts", [(18, 2), (10, 10)])
def test_balanced_accuracy_stands_beside_accuracy_where_classes_are_uneven(capsys, counts, flags):
    train_classifier.main([*SIZE, *write_uneven(counts), *shlex.split(flags)])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "test accuracy" in line)
    row = read_metrics(next(Path("logs/classifier").iterdir()))[-1]
    assert ("test/balanced_acc" in row) == ("balanced" in line) == (counts == (18, 2))
    if "balanced" in line:
        assert f", balanced {row['test/balanced_acc']:.2%}" in line


def test_balanced_class_weights_are_inverse_to_the_shares_and_one_in_the_mean():
    flags = [*SIZE, *write_uneven((16, 4)), *shlex.split("--label_smoothing 0.1 --class_weights balanced")]
    experiment = train_classifier.Classification(train_classifier.parse_args(flags))
    experiment.load("cpu")
    experiment.build()
    assert "_balanced_" in experiment.identity["name"]
    images, labels = experiment.train.images, experiment.train.labels
    weights = torch.tensor([20 / (2 * 16), 20 / (2 * 4)])
    assert weights[labels].mean() == 1
    logits, targets = experiment.model(normalize(images)), F.one_hot(labels, 2).float()
    whole = experiment.loss(images, labels)
    torch.testing.assert_close(whole, -((targets * 0.9 + 0.05) * logits.log_softmax(1) * weights).sum(1).mean())
    torch.testing.assert_close(experiment.loss(images, targets), whole)  # mixed labels, too
    parts = [experiment.loss(images[part], labels[part]) * len(labels[part]) for part in (slice(15), slice(15, 20))]
    torch.testing.assert_close(sum(parts) / 20, whole)  # micro-batches step like the whole batch
