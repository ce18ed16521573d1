"""The report of the ablations, from runs of a toy model."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_scripts import classify, few_shapes, picture_size, pretrain  # noqa: F401

from engine.checkpoints import load_model
from engine.device import count_parameters
from engine.figures import plt
from engine.run import csv_text, read_config, read_metrics
from images import data
from model import MASK_STRATEGIES, MAE_ViT, ViT_Classifier, mae_loss
from scripts import make_report, report_figures, report_findings
from scripts.ablations import BASE, SCRATCH, collect
from scripts.results import MEASURES, Difference, Result, difference, spread, values_of


def change(run, part, **values):
    """Write other values into config.json, or into one of its parts."""
    config = read_config(run)
    (config[part] if part else config).update(values)
    (run / "config.json").write_text(json.dumps(config))


def test_the_report_of_a_small_sweep(monkeypatch):
    plan = [(seed, depth, name) for seed in "12" for depth, name in (("4", "random"), ("2", "random"), ("4", "grid"))]
    plan += [("1", "4", name) for name in MASK_STRATEGIES if name not in ("random", "grid")]
    for seed, depth, strategy in plan:
        common = ["--total_epoch", "2", "--seed", seed, "--log_dir"]
        settings = ["--decoder_depth", depth, "--mask_strategy", strategy, "--probe_every", "1"]
        mae = pretrain(*settings, *common, "runs/pretrain")
        classify("--pretrained_model_path", str(mae), *common, "runs/classifier")
    scratch = [classify("--total_epoch", "2", "--seed", seed, "--log_dir", "runs/classifier") for seed in "12"]
    compared, draw = [], report_figures.draw_disagreements

    def draw_and_note(test, *answers_and_path):
        compared.append(answers_and_path[:2])
        draw(test, *answers_and_path)

    monkeypatch.setattr(report_figures, "draw_disagreements", draw_and_note)
    make_report.main(["--runs", "runs", "--output", "out", "--images", "2"])
    report = Path("out/REPORT.md").read_text()
    figures = re.findall(r"\((\w+\.png)\)", report)
    assert len(figures) == 16
    assert all(picture_size(f"out/{name}")[0] > 200 for name in figures)
    results = collect(Path("runs"))[0]
    test = data.load_dataset("shapes", "data", 32)[1]
    said = [report_figures.answers(results[setting][0], test, "cpu")[1] for setting in (BASE, SCRATCH)]
    assert not torch.equal(*said)
    assert [predicted.tolist() for predicted in compared[0]] == [predicted.tolist() for predicted in said]
    runs = results["depth 4, grid"]
    images, errors = data.normalize(test.images[:2]), []
    for result in runs:
        mae, _ = load_model(result.mae, MAE_ViT)
        pred, mask = mae(images, mae.shuffle(2))
        errors.append(mae_loss(pred, images, mask).item())
    error = report_figures.mask_matrix(results, ["grid"], ["grid"], images, "cpu").item()
    assert error == pytest.approx(sum(errors) / 2)
    assert [result.seed for result in runs] == [1, 2]
    accuracies = [100 * read_metrics(result.classifier)[-1]["test/acc"] for result in runs]
    assert f"| grid | {spread(accuracies)} |  |  | " in report  # no features
    assert f"| depth 4, grid | {spread(accuracies)} | " in report  # beside its price
    assert re.search(r"8 > 4 > 2: \*\*.*\*\*: 8 > 4 no runs; 4 > 2 \w+.* n 2\)", report)
    assert re.search(r"random > blockwise, as in the paper: \*\*one seed\*\* .* n 1\)", report)
    kept = list(Path("out/runs").glob("*/*/metrics.csv"))
    assert len(kept) == 2 * len(plan) + len(scratch)
    (runs[1].mae / "model.pt").unlink()
    make_report.main(["--runs", "runs", "--output", "other", "--images", "2"])
    captions = r"!\[[^]]*(?:, seed|seeds:) 1\.\]\((\w+)\.png\)"  # of the seed that has its weights
    assert set(re.findall(captions, Path("other/REPORT.md").read_text())) == set(report_figures.PICTURES)
    assert "seeds: 1, 2." in report
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
    make_report.main(["--runs", "runs", "--output", "out", "--images", "2"])
    report = Path("out/REPORT.md").read_text()
    assert "at the epoch chosen on held-out images" in report
    assert "chosen on the test set" not in report
    assert "Classifier accuracy on held-out images by mask strategy" in report
    assert "nan" not in report


# --- kept runs, written by hand ---

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "encoder_depth": 2, "num_heads": 2}
START = {"command": "python x.py", "python": "3", "torch": "2", "timm": "1", "commit": None, "threads": 1}
START["processor"] = "CPU"


def keep_run(directory, rows, parameters=1, **arguments):
    """A finished run as the report keeps it: no weights."""
    directory.mkdir(parents=True)
    shared = {"dataset": "shapes", "data_dir": "data", "train_images": None, "log_dir": f"logs/{directory.parent.name}"}
    config = {"name": directory.name, "arguments": {**SIZES, **shared, "total_epoch": len(rows), **arguments}}
    config |= {"parameters": parameters, "precision": "float32", "images": "ab", "test_set": "cd"}
    config["starts"] = [START]
    (directory / "config.json").write_text(json.dumps(config))
    steps = {"seconds": 6, "speed/images_per_sec": 9, "memory/peak_mb": 7, "train/loss": 1}
    rows = [{"epoch": epoch, **steps, **row} for epoch, row in enumerate(rows, start=1)]
    (directory / "metrics.csv").write_text(csv_text(rows, header=True))
    return directory


def keep_classifier(seed, mae, accuracy, classes=10, first=None, **arguments):
    """A classifier of two epochs; first: metrics of the first one, by name."""
    parameters = count_parameters(ViT_Classifier(**SIZES, num_classes=classes))
    name = f"cls_s{seed}_from_{mae.name}" if mae else f"cls_s{seed}_scratch"
    rows = [{"test/acc": acc, "test/acc_mean_of_batches": acc + 0.001} for acc in (0.1, accuracy)]
    rows[0] |= first or {}
    digest = {"encoder_digest": mae.name} if mae else {}
    return keep_run(Path("runs/classifier") / name, rows, parameters, seed=seed, **digest, **arguments)


def keep_mae(seed, depth, strategy="random", **arguments):
    rows = [{"knn/acc": acc, "speed/images_per_sec": speed} for acc, speed in ((0.11, 900), (math.nan, 9), (0.12, 8))]
    where = Path("runs/pretrain") / f"mae_d{depth}_{strategy}_s{seed}"
    return keep_run(where, rows, seed=seed, decoder_depth=depth, mask_strategy=strategy, **arguments)


def keep_features(path, mae, linear, knn, **changes):
    """What evaluate_features.py writes of a MAE whose digest is its name."""
    scores = {"knn/acc": knn, "linear/acc": linear}
    shown = [("trained", 1, 0.9), ("trained", 2, None), ("untrained", 1, 0.01), ("untrained", 2, 0.01)]
    rows = [
        {"encoder": encoder, "layer": layer, "pool": pool, **(dict.fromkeys(scores, value) if value else scores)}
        for encoder, layer, mean in shown
        for pool, value in (("mean", mean), ("cls", 0.02))
    ]
    facts = {"name": mae.name, "model_digest": mae.name, "dataset": "shapes", "data_dir": "data", "seconds": 60}
    facts |= {"arguments": {"train_images": None}, **START, "command": "python evaluate_features.py", **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows}))
    path.with_suffix(".csv").write_text(csv_text(rows, header=True))


def keep_sweep(accuracy=0.5, **arguments):
    """Three depths and no pretraining, three seeds: depth moves only what the frozen features are worth."""
    for seed in (1, 2, 3):
        keep_classifier(seed, None, accuracy - 0.05 - seed / 1000, **arguments)
        for depth in (2, 4, 8):
            mae = keep_mae(seed, depth)
            keep_classifier(seed, mae, accuracy + [0.01, -0.01, 0.004][(seed + depth // 4) % 3], **arguments)
            better = depth / 100 + [0.001, 0.002, 0.004][(seed + depth // 4) % 3]
            keep_features(Path(f"runs/encoders/d{depth}_s{seed}_features.json"), mae, 0.3 + better, 0.2 - better)


def report_of(runs="runs", output="out"):
    make_report.main(["--runs", runs, "--output", output])
    return (Path(output) / "REPORT.md").read_text()


def test_three_measures_stand_side_by_side_and_where_they_disagree_is_said():
    keep_sweep()
    report = report_of()
    results, _ = collect(Path("runs"))
    deep = {
        measure: spread([*values_of(results["depth 8, random"], MEASURES[measure]).values()]) for measure in MEASURES
    }
    assert deep["linear probe"] == "38.23 ± 0.15 (n 3)"
    assert f"| depth 8 | {deep['fine-tuned']} | {deep['linear probe']} | {deep['k-NN']} | " in report
    assert re.search(r"\| from scratch \| 44\.80 ± 0\.10 \(n 3\) \|  \|  \| ", report)
    measured = {name: difference(results, "depth 8, random", "depth 2, random", MEASURES[name]) for name in MEASURES}
    assert {name: d.verdict for name, d in measured.items()} == {
        "fine-tuned": "not decided",
        "linear probe": "higher",
        "k-NN": "lower",
    }
    cells = [f"{d.mean:+.2f} ({d.interval()}, n 3)" for d in measured.values()]
    row = "| depth 8, random minus depth 2, random | {}: not decided | {}: better | {}: worse |".format(*cells)
    assert row in report
    assert "   - linear probe: **holds**: 8 > 4 holds (+" in report
    said = "The measures disagree: fine-tuned not decided, linear probe holds, k-NN does not hold."
    assert said in report.partition("8 > 4 > 2")[2].partition("3. block")[0]
    assert report.count("disagree:") == 1
    assert [plt.imread(f"out/{name}_by_depth.png").shape[1] > 900 for name in ("knn", "blocks")] == [True, True]
    assert "`python evaluate_features.py`" in report
    assert "No linear probe" not in report


def test_findings_and_tables_say_what_the_runs_hold():
    reached = {"random": 0.5, "block": 0.7, "grid": 0.6, "shifted_grid": 0.65, "blockwise": 0.4}
    for seed in (1, 2, 3):
        keep_classifier(seed, None, 0.2, first={"train/loss": 3 + seed / 10, "test/acc": 0.3})
        for k, (strategy, accuracy) in enumerate(reached.items(), start=1):
            mae = keep_mae(seed, 4, strategy)
            keep_classifier(seed, mae, accuracy + (seed - 2) * k / 1000, first={"test/acc": 0.25 - seed / 1000})
        for depth, accuracy in ((2, 0.45), (8, 0.51)):
            keep_classifier(seed, keep_mae(seed, depth), accuracy)
    report = report_of()
    for said in (
        "higher final accuracy: **holds** (+30.00,",
        "in accuracy: **does not hold** (-5.20,",
        "lower by: **holds** (+2.20,",
        "8 > 4 > 2: **holds**: 8 > 4 holds (+1.00, +0.75 to +1.25, n 3); 4 > 2 holds (+5.00,",
        "block > grid > random: **holds**: block > grid holds (+10.00,",
        "grid > random holds (+10.00,",
        "random > blockwise, as in the paper: **holds** (+10.00,",
        "against the paper's: **holds** (+30.00,",
        "one that does not: **holds** (+5.00,",
        "| depth 4, block minus depth 4, random | +20.00 (+19.75 to +20.25, n 3): better |",
        "| depth 4, blockwise minus depth 4, random | -10.00 (-10.99 to -9.01, n 3): worse |",
        "| block | 70.00 ± 0.20 (n 3) |  |  | 70.10 ± 0.20 (n 3) | 70.00 ± 0.20 (n 3) |",
        "| from scratch | 20.00 ± 0.00 (n 3) |  |  | 20.10 ± 0.00 (n 3) | 30.00 ± 0.00 (n 3) |",
    ):
        assert said in report, said
    # images/s, minutes of pretraining and of fine-tuning, MB
    assert re.search(r"\n\| depth 4, grid \| 60.00 .*\| 9 \| 0\.3 \| 0\.2 \| 7 \|\n", report)
    assert re.search(r"\n\| from scratch \| 20.00 .*\| 9 \| 0 \| 0\.2 \| 7 \|\n", report)


def test_the_published_report_is_what_the_kept_runs_say(monkeypatch):
    monkeypatch.setattr(make_report, "draw_all", lambda *_: {})
    kept = Path(__file__).parents[1] / "logs" / "report"
    published, _, commands = re.split("(?=## Figures|## Commands)", (kept / "REPORT.md").read_text())
    again, _, commands_again = re.split("(?=## Figures|## Commands)", report_of(str(kept / "runs")))
    assert again == published
    assert commands_again == commands


def test_measures_that_agree_are_not_spoken_of():
    assert report_findings.disagreement({"a": "holds", "b": "holds"}) == ""
    assert report_findings.disagreement({"a": "holds", "b": "not decided"}).startswith(
        "Not all measures decide: a holds, b"
    )


def test_kept_numbers_alone_make_the_same_report_and_leave_its_pictures(capsys):
    keep_sweep()
    report = report_of()
    assert "figure03" in capsys.readouterr().out.partition("Not in the report: ")[2]
    assert "figure03" not in report
    Path("out/figure03.png").write_bytes(b"a picture")
    Path("out/REPORT.md").write_text(report.replace("## Commands", "![Seen before.](figure03.png)\n\n## Commands"))
    before = {path: path.read_bytes() for path in Path("out/runs").rglob("*") if path.is_file()}
    Path("runs").rename("gone")
    again = report_of("out/runs")
    assert {path: path.read_bytes() for path in Path("out/runs").rglob("*") if path.is_file()} == before
    assert sum(path.name == "features.csv" for path in before) == 9
    assert Path("out/figure03.png").read_bytes() == b"a picture"
    assert "### Figure 3\n\n![Seen before.](figure03.png)\n\nSeen before." in again
    untouched = re.sub(r"### Figure 3\n.*?(?=###)", "", again, flags=re.DOTALL)
    assert untouched == report
    change(next(Path("gone/classifier").iterdir()), None, parameters=9)  # another sweep into the same place
    assert "figure03" not in report_of("gone")


def test_features_that_are_missing_are_named_with_the_command_that_measures_them(capsys):
    keep_sweep()
    for path in Path("runs/encoders").glob("d8_s1*"):
        path.unlink()
    run = "logs/pretrain/mae_d8_random_s1"  # where it was trained
    asked = f"measures them: `python evaluate_features.py --layers all --model_path {run}`"
    assert asked in report_of()
    assert asked in capsys.readouterr().out
    shutil.rmtree("runs/encoders")
    assert "`python evaluate_features.py --layers all --model_path logs/pretrain/*`" in report_of()


def test_runs_that_the_report_does_not_name_are_said_to_be_left_out(capsys):
    keep_sweep()
    odd = keep_classifier(1, keep_mae(1, 6), 0.5)
    unfinished = keep_classifier(4, None, 0.5)
    change(unfinished, "arguments", total_epoch=9)
    for text in (report_of(), capsys.readouterr().out):
        assert f"Left out: {odd}: depth 6, random is none of the settings that the report compares." in text
        assert f"Left out: {unfinished}: not finished, 2 of 9 epochs." in text


def test_runs_of_an_earlier_report_go_and_nothing_else():
    keep_sweep()
    old, theirs = Path("out/runs/classifier/cls_old"), Path("out/runs/pretrain/mae_theirs")
    keep_run(old, [{}])
    (keep_run(theirs, [{}]) / "model.pt").touch()
    kept = Path("out/runs/pretrain/mae_d2_random_s1/features.json")
    kept.parent.mkdir()
    Path("runs/encoders/d2_s1_features.json").rename(kept)
    make_report.keep_numbers(collect(Path("runs"))[0], Path("runs"), Path("out"))
    assert not kept.exists()
    assert Path("out/runs/pretrain/mae_d2_random_s2/features.json").exists()
    assert not old.exists()
    assert {path.name for path in theirs.iterdir()} == {"config.json", "metrics.csv", "model.pt"}
    keep_classifier(9, keep_mae(9, 6), 0.5).rename("out/runs/classifier/cls_s9_from_mae_d6_random_s9")
    report_of("out/runs")
    assert Path("out/runs/classifier/cls_s9_from_mae_d6_random_s9").exists()  # a source is never cleared


@pytest.mark.parametrize(("accuracy", "classes", "said"), [(0.5, 10, False), (0.103, 10, True), (0.103, 100, False)])
def test_a_sweep_at_chance_says_so(accuracy, classes, said):
    keep_sweep(accuracy, classes=classes)
    results = collect(Path("runs"))[0]
    assert make_report.num_classes(read_config(results["from scratch"][0].classifier)) == classes
    warning = make_report.chance_warning(results)
    assert (warning is not None and "is not surely above chance (1 of 10 classes)" in warning) == said


@pytest.mark.parametrize(
    ("dataset", "data_dir", "shown"),
    [
        ("cifar10", "data", True),
        ("folder", "data/cifar10-jpeg", True),
        ("shapes", "data", False),
        ("cifar100", "data", False),
        ("folder", "data/cifar100-jpeg", False),
        ("folder", "cifar10/pets", False),
    ],
)
def test_the_source_reports_numbers_stand_beside_its_data_set_alone(dataset, data_dir, shown):
    mae = keep_mae(1, 4, dataset=dataset, data_dir=data_dir)
    keep_classifier(1, mae, 0.5)
    results = {"depth 4, random": [Result(1, Path("runs/classifier/cls_s1_from_mae_d4_random_s1"), mae)]}
    assert ("| 79.76 |" in make_report.accuracy_table(results, make_report.DEPTHS)) == shown


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
    assert report_findings.judge({"a": gain, "b": gain}).startswith("**holds**: a holds (+1.")
    assert report_findings.judge({"a": gain, "b": loss, "c": None}).startswith("**does not hold**: a holds")
    assert "**not decided**: a holds" in report_findings.judge({"a": gain, "b": one_seed})
    assert report_findings.judge({"": one_seed}) == "**one seed** (+1.00, no interval, n 1)"
