"""The report of the ablations, from runs written by hand, some with the weights of a toy model."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from made_runs import SIZES, change, make_classifier, make_features, make_mae

from engine.checkpoints import save_file
from engine.figures import plt
from engine.predictions import write_predictions
from images.shapes import shapes
from masks import MASK_STRATEGIES
from model import MAE_ViT, ViT_Classifier
from scripts import report, report_figures
from scripts.report_figures import PICTURES

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report_figures, "load_dataset", lambda *_: (None, few_shapes()))
    yield
    plt.close("all")


def few_shapes():
    return shapes(40, SIZES["img_size"], seed=1)


def write_report(*more, runs="runs", output="out"):
    report.main([str(runs), "--output", output, *more])
    return (Path(output) / "REPORT.md").read_text()


def make_sweep(accuracy=0.5, features=True):
    """Three depths and no pretraining, three seeds: depth moves only what the frozen features are worth."""
    for seed in (1, 2, 3):
        make_classifier(seed, accuracy=accuracy - 0.05 - seed / 1000)
        for depth in (2, 4, 8):
            noise = [0.001, 0.002, 0.004][(seed + depth // 4) % 3]
            mae = make_mae(seed, decoder_depth=depth)
            make_classifier(seed, mae, accuracy + [0.01, -0.01, 0.004][(seed + depth // 4) % 3])
            if features:
                make_features(mae, 0.3 + depth / 100 + noise, 0.2 - depth / 100 - noise)


def give_weights(seeds=(1,)):
    """Models beside the runs of these seeds."""
    for run in [*Path("runs/pretrain").iterdir(), *Path("runs/classifier").iterdir()]:
        if int(re.search(r"s(\d)", run.name)[1]) in seeds:
            torch.manual_seed(sum(run.name.encode()))
            made = {"name": run.name, "settings": {}, "parent": None, "dataset": "shapes", "data_dir": "data"}
            if run.parent.name == "pretrain":
                depth, strategy = re.match(r"mae_d(\d)_(.*)_r0", run.name).groups()
                given = {**SIZES, "decoder_depth": int(depth), "mask_strategy": strategy}
                made |= {"kind": "MAE_ViT", "model_args": given, "model": MAE_ViT(**given).state_dict()}
            else:
                given = {**SIZES, "num_classes": 10}
                made |= {"kind": "ViT_Classifier", "model_args": given, "classes": list(map(str, range(10)))}
                made |= {"model": ViT_Classifier(**given).state_dict()}
                labels = torch.arange(200) % 10
                write_predictions(run / "predictions.csv", made["classes"], labels, (labels + (labels == 5)) % 10)
            save_file(run / "model.pt", made)


# --- numbers and findings ---


@pytest.mark.usefixtures("undrawn")
def test_three_measures_stand_side_by_side_and_each_finding_is_judged_by_each():
    make_sweep()
    text = write_report()
    assert re.search(
        r"\| depth 8 \| 50\.\d\d ± .* \(n 3\) \| 38\.23 ± 0\.15 \(n 3\) \| 11\.77 ± 0\.15 \(n 3\) \| ", text
    )
    assert re.search(r"\| from scratch \| 44\.80 ± 0\.10 \(n 3\) \|  \|  \| ", text)
    row = next(line for line in text.splitlines() if line.startswith("| depth 8, random minus depth 2, random"))
    cells = [cell.partition(": ")[2].split()[0] for cell in row.split(" | ")[1:]]
    assert cells == ["within", "higher", "lower"]
    depth = text.partition("8 > 4 > 2:")[2].partition("3. block")[0]
    assert "fine-tuned: 8 > 4 **within" in depth
    assert "linear probe: 8 > 4 **holds**: higher by 4" in depth
    assert "k-NN: 8 > 4 **reversed**: lower by 4" in depth
    trends = re.findall(r"for each doubling \*\*(\w+)", depth)
    assert trends == ["within", "holds", "reversed"]
    assert "block > grid **no runs**" in text


@pytest.mark.usefixtures("undrawn")
def test_findings_and_tables_say_what_the_runs_hold():
    reached = {"random": 0.5, "block": 0.7, "grid": 0.6, "shifted_grid": 0.65, "blockwise": 0.4, "cells": 0.55}
    for seed in (1, 2, 3):
        first = {"train/loss": 3 + seed / 10, "test/acc": 0.3}
        make_classifier(seed, accuracy=0.2 + seed / 1000, first=first)
        for k, (strategy, accuracy) in enumerate(reached.items(), start=1):
            mae = make_mae(seed, mask_strategy=strategy)
            noise = ((seed + k) % 3 - 1) / 1000
            make_classifier(seed, mae, accuracy + noise, first={"test/acc": 0.25 - noise})
        for strategy, depth, accuracy in (
            *(("random", 2, 0.45), ("random", 8, 0.51)),
            *(("cells", 2, 0.45), ("cells", 8, 0.65)),
        ):
            mae = make_mae(seed, decoder_depth=depth, mask_strategy=strategy)
            make_classifier(seed, mae, accuracy + (seed * depth % 3) / 1000)
    text = write_report()
    for said in (
        "higher final accuracy: **holds**: higher by 29",
        "In the first epoch it is ahead in accuracy: **reversed**: lower by 5",
        "the training loss is higher: **holds**: higher by 2.",
        "8 > 4 **holds**: higher by 1.",
        "4 > 2 **holds**: higher by",
        "block > grid **holds**: higher by 10",
        "grid > random **holds**: higher by 10",
        "against the paper's:\n   - fine-tuned: **holds**: higher by 30",
        "cells > random, as Pixio masks:\n   - fine-tuned: **holds**: higher by 5",
        "noise > random, as ColorMAE finds:\n   - fine-tuned: **no runs**",
        "in cells than with random ones:\n   - fine-tuned: **holds**: higher by 7",  # 20 / 2 against 6 / 2 points
        "| depth 4, block minus depth 4, random | +20.00 (",
        "| depth 8, cells minus depth 2, cells | +20.0",
        "| depth 4, blockwise minus depth 4, random | -10.00 (",
        "| block | 70.00 ± 0.10 (n 3) | 70.10 ± 0.10 (n 3) | 82.80 |",
        "| from scratch | 20.20 ± 0.10 (n 3) | 20.30 ± 0.10 (n 3) |  |",
        "- Commits: None (63 runs).",
    ):
        assert said in text, said
    # parameters, images/s, minutes of pretraining and of fine-tuning, MB
    assert re.search(r"\n\| depth 4, grid \| 60.00 .*\| 5 \| \d\.\d+ \| 9 \| 0\.3 \| 0\.2 \| 7 \|\n", text)
    assert re.search(r"\n\| from scratch \| 20.20 .*\| 5 \| \d\.\d+ \| 9 \|  \| 0\.2 \| 7 \|\n", text)


@pytest.mark.usefixtures("undrawn")
def test_one_seed_decides_nothing():
    make_classifier(1, make_mae(1), 0.9)
    make_classifier(1, accuracy=0.1)
    assert "higher final accuracy: **one seed**" in write_report()


@pytest.mark.usefixtures("undrawn")
def test_runs_that_held_images_out_are_watched_on_those_and_tested_once():
    for mae in (make_mae(1), None):
        run = make_classifier(1, mae, val_images=10)
        text = (run / "metrics.csv").read_text().replace("test/loss", "val/acc")
        (run / "metrics.csv").write_text(text)
    text = write_report()
    assert "at the epoch chosen on held-out images" in text
    assert "Classifier accuracy on held-out images by mask strategy" in text
    assert "nan" not in text


def test_the_published_report_is_what_the_kept_runs_say(monkeypatch):
    monkeypatch.setattr(report, "draw_all", lambda *_: {})
    kept = ROOT / "logs" / "report"
    published, _, of_runs = re.split("(?=## Figures|## Runs)", (kept / "REPORT.md").read_text())
    again, _, of_runs_again = re.split("(?=## Figures|## Runs)", write_report(runs=kept / "runs"))
    assert again == published
    assert of_runs_again == of_runs


# --- what is there, and what is not ---


@pytest.mark.usefixtures("undrawn")
def test_kept_numbers_alone_make_the_same_report_and_leave_its_pictures(capsys):
    make_sweep()
    text = write_report()
    assert "figure03" in capsys.readouterr().out.partition("Not in the report: ")[2]
    assert "figure03" not in text
    Path("out/figure03.png").write_bytes(b"a picture")
    Path("out/REPORT.md").write_text(text.replace("## Runs", "![Seen before.](figure03.png)\n\n## Runs"))
    before = {path: path.read_bytes() for path in Path("out/runs").rglob("*") if path.is_file()}
    Path("runs").rename("gone")
    again = write_report(runs="out/runs")
    assert {path: path.read_bytes() for path in Path("out/runs").rglob("*") if path.is_file()} == before
    assert sum(path.name == "features.csv" for path in before) == 9
    assert Path("out/figure03.png").read_bytes() == b"a picture"
    assert "### Figure 3\n\n![Seen before.](figure03.png)\n\nSeen before." in again
    assert re.sub(r"### Figure 3\n.*?(?=###)", "", again, flags=re.DOTALL) == text
    assert "figure03" not in write_report(runs="gone")


@pytest.mark.usefixtures("undrawn")
def test_numbers_of_an_earlier_report_go_and_runs_with_more_in_them_stay():
    make_sweep(features=False)
    for name in ("old", "used"):
        shutil.copytree(next(Path("runs/pretrain").iterdir()), f"out/runs/pretrain/{name}")
    Path("out/runs/pretrain/used/model.pt").touch()
    write_report()
    assert not Path("out/runs/pretrain/old").exists()
    assert Path("out/runs/pretrain/used/config.json").exists()


@pytest.mark.usefixtures("undrawn")
def test_runs_that_the_report_does_not_name_are_said_to_be_left_out(capsys):
    make_sweep()
    odd = make_classifier(1, make_mae(1, decoder_depth=6))
    unfinished = make_classifier(4, finished=False)
    alone = make_mae(4)
    twice = make_classifier(1, end="z")
    write_report()
    said = capsys.readouterr().out
    assert f"Left out: {odd}: depth 6, random is none of the settings that the report compares." in said
    assert f"Left out: {unfinished}: not finished, 1 of 2 epochs." in said
    assert f"Left out: {alone}: no finished classifier comes from it." in said
    assert f"Left out: {twice}: same setting and seed as {Path('runs/classifier/cls_s1_scratch')}." in said


def test_runs_of_two_sweeps_or_none_are_refused(capsys):
    make_sweep()
    change(Path("runs/classifier/cls_s2_scratch"), "settings", weight_decay=0.3)
    with pytest.raises(ValueError, match=r"runs differ in .*weight_decay \(.*0\.3"):
        report.collect(Path("runs"))
    change(Path("runs/classifier/cls_s2_scratch"), "settings", weight_decay=0.05)
    change(Path("runs/pretrain/mae_d2_random_r0.75_s1"), "facts", precision="bf16")
    with pytest.raises(SystemExit) as exit_info:
        write_report()
    assert exit_info.value.code == 2
    assert "precision" in capsys.readouterr().err
    shutil.rmtree("runs")
    make_classifier(1)
    with pytest.raises(ValueError, match=r"runs holds no classifier of depth 4, random; .*reproduce_report"):
        report.collect(Path("runs"))


# --- pictures ---


@pytest.mark.slow
def test_all_pictures_are_drawn_from_weights_and_those_of_a_seed_without_left_out(capsys):
    make_sweep()
    for seed in (1, 2):
        for strategy in (set(MASK_STRATEGIES) - {"random"}) if seed == 1 else {"grid"}:
            make_classifier(seed, make_mae(seed, mask_strategy=strategy))
    give_weights()
    text = write_report()
    assert "Not drawn" not in capsys.readouterr().out
    figures = re.findall(r"\((\w+)\.png\)", text)
    assert set(figures) == {*report_figures.FIGURES, *PICTURES}
    assert all(plt.imread(f"out/{name}.png").shape[1] > 200 for name in figures)
    assert set(re.findall(r"!\[[^]]*, seed 1\.[^]]*\]\((\w+)\.png\)", text)) == {*PICTURES, "confusion"}


def test_the_table_of_classes_is_of_the_kept_predictions_and_many_classes_have_none():
    make_sweep(features=False)
    give_weights()
    runs, _ = report.collect(Path("runs"))
    figure, caption = report_figures.draw_confusion(runs)
    assert "seed 1" in caption
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names[4:7] == ["4 (100 %)", "5 (0 %)", "6 (100 %)"]
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert cells[5 * 10 + 6] == "100"  # 5 is always taken for 6
    path = runs.of("depth 4, random", "classifier")[0].directory / "predictions.csv"
    write_predictions(path, list(map(str, range(21))), torch.arange(21), torch.arange(21))
    assert report_figures.draw_confusion(runs) is None
    path.unlink()
    assert report_figures.draw_confusion(runs) is None


@pytest.mark.usefixtures("undrawn")
def test_without_the_images_pictures_are_not_drawn_and_the_reason_is_said(capsys, monkeypatch):
    make_sweep(features=False)
    give_weights()

    def missing(*_):
        raise report_figures.UserError("No directory pets.")

    monkeypatch.setattr(report_figures, "load_dataset", missing)
    write_report()
    assert "Not drawn: No directory pets." in capsys.readouterr().out
