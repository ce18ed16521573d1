"""The same command again: equal results, however a run was stopped or cut into parts; a finished run is not trained
again; a run of other images, masks, encoders or settings is refused; damaged files are named.
"""

import itertools
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from starting import (
    SET,
    SIZE,
    classify,
    classify_and_choose,
    classify_officially,
    interrupt,
    pretrain,
    pretrain_with_switches,
    same_weights,
    unfinish,
    untimed_metrics,
    weights,
)

import evaluate_features
import mae_pretrain
import visualize_predictions
from engine.checkpoints import digest, load_file, load_model
from engine.device import environment
from engine.optimizers import OPTIMIZERS
from engine.records import find_runs, read_metrics, read_run
from engine.run import Session
from images import load
from images.shapes import SHAPES
from masks import MASK_STRATEGIES
from model import ViT_Classifier
from scripts import export

ROOT = Path(__file__).parents[1]
STARTS = {"mae": pretrain, "classifier": classify}  # by the name of the fixture that has such a run


# --- equal results ---


@pytest.mark.parametrize(
    ("start", "augment"),
    [
        *((start, "none") for start in (pretrain_with_switches, classify_and_choose, classify_officially)),
        *((start, augment) for start in (pretrain, classify) for augment in ("none", "shift", "crop")),
    ],
)
def test_a_run_stopped_anywhere_ends_with_the_bits_of_one_that_was_not(
    start, augment, few_shapes, empty_directory, monkeypatch
):
    whole = start("--augment", augment, "--log_dir", "whole")
    ticks = interrupt(monkeypatch, 3, 4)  # of 2 + 2 + 2 steps: inside an epoch, and at the end of one
    for _ in range(2):
        with pytest.raises(SystemExit) as leaving:
            start("--augment", augment, "--log_dir", "parts")
        assert leaving.value.code == 130
    parts = start("--augment", augment, "--log_dir", "parts")
    assert len(ticks) == 6
    assert same_weights(whole, parts)
    assert untimed_metrics(whole) == untimed_metrics(parts)


@pytest.mark.parametrize("start", [pretrain, classify, classify_officially])
def test_accumulated_micro_batches_step_like_one_batch(start, few_shapes, empty_directory):
    whole, *others = (
        start("--log_dir", f"{at_once}_{seed}", "--max_device_batch_size", at_once, "--seed", seed)
        for at_once, seed in ((16, 42), (8, 42), (6, 42), (16, 1))  # 6: parts of 5, 5 and 6 images
    )
    assert [same_weights(whole, other, tolerance=1e-5) for other in others] == [True, True, False]


@pytest.mark.slow
def test_ctrl_c_in_a_real_process_and_the_same_command_again(empty_directory):
    flags = [*SIZE, *shlex.split("--decoder_depth 1 --dataset shapes --total_epoch 4 --batch_size 64")]
    flags += ["--train_images", "1000", "--log_dir"]
    command = [sys.executable, str(ROOT / "mae_pretrain.py"), *flags, "parts"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(read_metrics(run) for run in Path().glob("parts/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    for log_dir in ("parts", "whole"):
        mae_pretrain.main([*flags, log_dir])
    whole, parts = next(Path("whole").iterdir()), next(Path("parts").iterdir())
    assert len(read_run(parts).starts) == 2
    assert same_weights(whole, parts)
    assert untimed_metrics(whole) == untimed_metrics(parts)


# --- finished runs ---


@pytest.mark.parametrize("kind", STARTS)
def test_a_finished_run_says_so_and_is_not_trained_again(kind, request, capsys):
    run = request.getfixturevalue(kind)
    before = (run / "metrics.csv").read_text()
    assert STARTS[kind]() == run
    assert f"Finished already: {run}" in capsys.readouterr().out
    assert (run / "metrics.csv").read_text() == before
    STARTS[kind]("--overwrite")
    assert (run / "metrics.csv").read_text() != before  # the timing


def refused(start, capsys, *facts):
    """A start must end with exit code 2 and one line that has all these facts in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        start()
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for fact in map(str, facts):
        assert fact in error


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize(("which", "what"), [(0, "training images"), (1, "test images")])
def test_other_images_under_the_same_name_are_refused(finished, kind, which, what, request, monkeypatch, capsys):
    run, draw = request.getfixturevalue(kind), load.shapes
    if not finished:
        unfinish(run)
    monkeypatch.setattr(load, "shapes", lambda count, size, seed: draw(count, size, seed + 5 * (seed == which)))
    refused(STARTS[kind], capsys, run, what, "--overwrite", "--log_dir")


def test_a_finished_run_on_a_folder_looks_at_its_images_again(image_folder, empty_directory, capsys):
    flags = ["--dataset", "folder", "--data_dir", image_folder, "--batch_size", "2", "--img_size", "16"]
    flags += ["--train_images", "4"]
    run = classify(*flags)
    classify(*flags)
    assert "Finished already" in capsys.readouterr().out
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (image_folder / "train" / old).rename(image_folder / "train" / new)
    refused(lambda: classify(*flags), capsys, run, "training images", "--overwrite")
    image_folder.rename(image_folder.with_name("moved"))
    refused(lambda: classify(*flags), capsys, image_folder, "missing")


@pytest.mark.parametrize("finished", [True, False])
def test_an_edited_strategy_does_not_answer_with_the_old_run(finished, mae, monkeypatch, capsys):
    if not finished:
        unfinish(mae)
    monkeypatch.setitem(MASK_STRATEGIES, "random", MASK_STRATEGIES["block"])
    refused(pretrain, capsys, mae, "masks", "--overwrite")


@pytest.mark.parametrize("finished", [True, False])
def test_a_classifier_of_another_encoder_under_the_same_name_is_refused(finished, mae, capsys):
    run = classify("--pretrained_model_path", mae)
    if not finished:
        unfinish(run)
    content = load_file(mae)
    torch.save({**content, "model": {name: tensor + 1 for name, tensor in content["model"].items()}}, mae / "model.pt")
    refused(lambda: classify("--pretrained_model_path", mae), capsys, run, "pretrained encoder", "--overwrite")


def test_a_run_with_other_settings_under_this_name_is_refused(mae, capsys):
    """As where a directory was renamed, or the program's defaults changed."""
    other = mae.rename(mae.with_name(mae.name.replace("_s42", "_s7")))
    refused(lambda: pretrain("--seed", "7"), capsys, other, "seed 42", "7", "--overwrite", "--log_dir")


@pytest.mark.parametrize("name", ["scratch", "pretrained"])
def test_a_classifier_from_scratch_does_not_answer_for_a_pretrained_one_nor_the_other_way_round(
    name, mae, classifier, capsys
):
    starts = {"scratch": classify, "pretrained": lambda: classify("--pretrained_model_path", mae)}
    runs = {"scratch": classifier, "pretrained": starts["pretrained"]()}
    other = runs.pop(name)
    shutil.rmtree(other)
    runs.popitem()[1].rename(other)
    refused(starts[name], capsys, other, "encoder", "--overwrite")


# --- where it cannot write ---


@pytest.mark.parametrize("start", [pretrain, classify])
def test_a_place_for_the_model_that_cannot_be_written_is_refused_before_training(
    start, few_shapes, empty_directory, capsys, monkeypatch
):
    Path("file").touch()
    monkeypatch.setattr(Session, "tick", None)
    refused(
        lambda: start("--output_model_path", "file/model.pt"), capsys, "Cannot write in file", "--output_model_path"
    )


def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(mae, capsys, monkeypatch):
    Path("file").touch()
    monkeypatch.setattr(visualize_predictions, "images_to_draw", None)
    command = ["--model_path", str(mae), "--output", "file/picture.png"]
    refused(lambda: visualize_predictions.main(command), capsys, "Cannot write in file", "--output")


# --- a stopped run ---


def stopped(start, *more):
    """A run that a signal has stopped after its third step of six; its directory."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(SystemExit):
            start(*more)
    return next(path for path in Path("logs").glob("*/*") if not (path / "model.pt").exists())


@pytest.mark.slow
def test_a_stopped_mae_is_a_model_for_every_script(few_shapes, empty_directory, capsys):
    run = stopped(pretrain)
    for path in (run, run / "checkpoint.pt"):
        visualize_predictions.main(["--model_path", str(path), "--output", "picture.png"])
        evaluate_features.main(["--model_path", str(path)])
        export.main([str(path), "--to", "timm"])
        assert capsys.readouterr().out.count("a checkpoint, the model after 1 epoch\n") == 3
    classifier = read_run(classify("--pretrained_model_path", run))
    assert classifier.parent["name"] == f"{run.name}_epoch1"
    assert pretrain() == run
    (record,) = find_runs("logs/pretrain")
    assert record.features == []  # those of the checkpoint are not the finished model's
    assert read_run(classify("--pretrained_model_path", run)).parent["name"] == run.name


@pytest.mark.slow
def test_a_stopped_classifier_is_a_model_too(few_shapes, empty_directory, capsys):
    run = stopped(classify)
    visualize_predictions.main(["--model_path", str(run)])
    assert (run / "predictions.png").exists()
    model, content = load_model(run, ViT_Classifier)
    assert content["classes"] == list(SHAPES)
    assert digest(model.state_dict()) == digest(load_file(run / "checkpoint.pt")["model"])


def test_a_run_that_lost_its_config_goes_on_with_the_same_settings_only(few_shapes, empty_directory, capsys):
    whole = pretrain("--log_dir", "whole")
    run = stopped(pretrain)
    (run / "config.json").unlink()
    other = run.rename(run.with_name(run.name.replace("_s42", "_s7")))
    refused(lambda: pretrain("--seed", "7"), capsys, other, "seed 42", "--overwrite")
    other.rename(run)
    assert same_weights(whole, pretrain())


def test_a_run_goes_on_where_changed_code_measures_something_else(few_shapes, empty_directory, monkeypatch):
    run, evaluate = stopped(pretrain, "--probe_every", "1"), mae_pretrain.Pretraining.evaluate

    def other(experiment, *more):
        metrics = evaluate(experiment, *more)
        return {"test/new": 7.0, **{name: metrics[name] for name in metrics if name != "probe/knn_acc"}}

    monkeypatch.setattr(mae_pretrain.Pretraining, "evaluate", other)
    assert pretrain("--probe_every", "1") == run
    before, *after = read_metrics(run)
    assert math.isnan(before["test/new"])
    assert not math.isnan(before["probe/knn_acc"])
    assert after
    assert all(row["test/new"] == 7 and math.isnan(row["probe/knn_acc"]) and row["train/loss"] > 0 for row in after)


def test_another_optimizers_state_is_refused(few_shapes, empty_directory, capsys, monkeypatch):
    run = stopped(pretrain)
    for kind in (torch.optim.SGD, torch.optim.NAdam):

        def other(model, groups, dtype, lr, betas, weight_decay, kind=kind):
            return kind(groups, lr)

        monkeypatch.setitem(OPTIMIZERS, "adamw", other)
        refused(pretrain, capsys, run, "AdamW", kind.__name__, "--overwrite")


def test_a_start_knows_the_programs_source(monkeypatch, tmp_path):
    first = environment()["source"]
    assert environment()["source"] == first
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * (path.name == "model.py"))
    assert environment()["source"] != first


# --- damaged files ---


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "model.pt", "checkpoint.pt"])
def test_a_damaged_file_of_a_run_is_named(name, mae, capsys):
    if name in ("metrics.csv", "checkpoint.pt"):
        unfinish(mae)
    if name == "metrics.csv":
        (mae / name).write_text("epoch,train/loss\n1,0.5\n2,half\n")
    else:
        (mae / name).write_bytes((mae / name).read_bytes()[:-100])
    refused(lambda: mae_pretrain.main([*SIZE, "--decoder_depth", "1", *SET]), capsys, mae / name, "--overwrite")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *itertools.product(("settings", "facts", "starts"), (None, [], [1], "none")),
        *itertools.product(["parent"], ({"name": "mae"}, [1], "mae")),
    ],
)
def test_a_config_whose_parts_are_lost_is_told_in_one_line(part, value, mae, capsys):
    config = json.loads((mae / "config.json").read_text())
    (mae / "config.json").write_text(json.dumps(config | {part: value}))
    refused(pretrain, capsys, mae / "config.json", "--overwrite")
    pretrain("--overwrite")


def test_a_finished_run_without_its_model_says_how_to_get_it_again(mae, capsys):
    """As the kept ones, or where it was deleted; the same command alone passes it over."""
    for name in ("model.pt", "checkpoint.pt"):
        (mae / name).unlink()
    command = [*SIZE, "--decoder_depth", "1", *SET]
    refused(lambda: mae_pretrain.main(command), capsys, mae / "model.pt", "--overwrite")
    refused(lambda: classify("--pretrained_model_path", mae), capsys, mae / "model.pt", "--overwrite")
    mae_pretrain.main([*command, "--overwrite"])
    assert (mae / "model.pt").exists()


def test_an_unfinished_run_without_its_model_trains_on(mae):
    shutil.copytree(mae, "before")
    unfinish(mae)
    assert pretrain() == mae
    assert same_weights("before", mae)
    assert weights(mae).keys() == weights("before").keys()
