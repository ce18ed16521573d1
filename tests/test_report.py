"""The report of the ablations, from runs of a toy model."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_scripts import classify, few_shapes, picture_size, pretrain  # noqa: F401

import data
from figures import plt
from model import MASK_STRATEGIES
from runs import read_config, read_metrics
from scripts import make_report, report_figures
from scripts.ablations import collect
from scripts.results import Difference, spread


def change(run, part, **values):
    """Write other values into config.json, or into one of its parts."""
    config = read_config(run)
    (config[part] if part else config).update(values)
    (run / "config.json").write_text(json.dumps(config))


def test_the_report_of_a_small_sweep():
    plan = [(seed, depth, name) for seed in "12" for depth, name in (("4", "random"), ("2", "random"), ("4", "grid"))]
    plan += [("1", "4", name) for name in MASK_STRATEGIES if name not in ("random", "grid")]
    for seed, depth, strategy in plan:
        common = ["--total_epoch", "2", "--seed", seed, "--log_dir"]
        mae = pretrain("--decoder_depth", depth, "--mask_strategy", strategy, *common, "runs/pretrain")
        classify("--pretrained_model_path", str(mae), *common, "runs/classifier")
    scratch = [classify("--total_epoch", "2", "--seed", seed, "--log_dir", "runs/classifier") for seed in "12"]
    odd = classify("--pretrained_model_path", str(mae), "--seed", "7", "--log_dir", "runs/classifier")
    change(odd, "arguments", total_epoch=9)
    make_report.main(["--runs", "runs", "--output", "out", "--bank", "2"])
    report = Path("out/REPORT.md").read_text()
    assert f"- Left out: {odd}: not finished." in report
    shutil.rmtree(odd)
    figures = re.findall(r"\((\w+\.png)\)", report)
    assert len(figures) == 14
    assert all(picture_size(f"out/{name}")[0] > 200 for name in figures)
    runs = collect(Path("runs"))[0]["depth 4, grid"]
    assert [result.seed for result in runs] == [1, 2]
    accuracies = [100 * read_metrics(result.classifier)[-1]["test/acc"] for result in runs]
    assert f"| grid | {spread(accuracies)} |" in report
    assert re.search(r"\| grid \| .* \| 80\.24 \|", report)
    assert f"| depth 4, grid | {spread(accuracies)} | " in report  # beside its price
    assert re.search(r"8 > 4 > 2: \*\*.*\*\*: 8 > 4 no runs; 4 > 2 \w+.* n 2\)", report)
    assert re.search(r"random > blockwise, as in the paper: \*\*one seed\*\* .* n 1\)", report)
    kept = list(Path("out/runs").glob("*/*/metrics.csv"))
    assert len(kept) == 2 * len(plan) + len(scratch)
    change(scratch[1], "arguments", weight_decay=0.3)
    with pytest.raises(ValueError, match=r"has weight_decay 0\.3, others have 0\.05"):
        collect(Path("runs"))
    shutil.rmtree(scratch[1])
    shutil.rmtree(runs[1].mae)
    assert len(collect(Path("runs"))[0]["depth 4, grid"]) == 1
    change(runs[0].mae, None, precision="bf16")
    with pytest.raises(ValueError, match="has precision bf16, others have float32"):
        collect(Path("runs"))


def test_the_report_of_runs_that_held_images_out_watches_those_and_tests_once():
    mae = pretrain("--decoder_depth", "4", "--log_dir", "runs/pretrain")
    for more in (["--pretrained_model_path", str(mae)], []):
        classify("--val_images", "10", "--train_images", "20", *more, "--log_dir", "runs/classifier")
    make_report.main(["--runs", "runs", "--output", "out", "--bank", "2"])
    report = Path("out/REPORT.md").read_text()
    assert "at the epoch chosen on held-out images" in report
    assert "chosen on the test set" not in report
    assert "Classifier accuracy on held-out images by mask strategy" in report
    assert "nan" not in report


# --- pictures ---


def test_confusion_of_many_classes_is_a_picture_that_can_be_read():
    labels = torch.arange(100).repeat_interleave(10)
    predicted = labels.clone()
    predicted[70:77] = 3
    predicted[10:12] = 9
    names = [f"class {i}" for i in range(100)]
    figure, caption = report_figures.draw_confusion(labels, predicted, names)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["class 7: class 3", "class 1: class 9"]
    assert [bar.get_width() for bar in axes.patches][:2] == pytest.approx([70, 20])
    assert len(axes.patches) == 2  # of at most 20
    assert max(figure.get_size_inches()) < 12
    assert "mistakes" in caption
    plt.close(figure)
    figure, _ = report_figures.draw_confusion(labels[:100], predicted[:100], names[:10])
    assert figure.axes[0].get_yticklabels()[7].get_text() == "class 7 (30 %)"
    plt.close(figure)


def test_a_disagreement_shows_what_the_other_classifier_said(monkeypatch):
    drawn = []
    monkeypatch.setattr(report_figures, "save", lambda figure, path: drawn.append(figure))
    images = data.ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ["cat", "dog"])
    report_figures.draw_disagreements(images, torch.tensor([0, 0]), torch.tensor([1, 1]), Path("x.png"), columns=2)
    shown = [(place.get_title(), place.get_xlabel()) for place in drawn[0].axes]
    assert shown == [("cat", "other said\ndog"), ("", ""), ("dog", "other said\ncat"), ("", "")]
    plt.close(drawn[0])


def test_claims_hold_are_reversed_or_are_not_decided():
    gain, loss = Difference(1, 0.9, 1.1, 2), Difference(-1, -1.1, -0.9, 2)
    one_seed = Difference(1, -math.inf, math.inf, 1)
    assert make_report.judge({"a": gain, "b": gain}).startswith("**holds**: a holds (+1.")
    assert make_report.judge({"a": gain, "b": loss, "c": None}).startswith("**does not hold**: a holds")
    assert "**not decided**: a holds" in make_report.judge({"a": gain, "b": one_seed})
    assert make_report.judge({"": one_seed}) == "**one seed** (+1.00, no interval, n 1)"
