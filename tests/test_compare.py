"""Comparing settings, from runs written by hand with known answers."""

import csv
import json
import math
from pathlib import Path

import pytest
from test_report import change, few_shapes, keep_classifier, keep_features, keep_mae  # noqa: F401

from engine.figures import draw_matrix, plt
from scripts import compare, compare_figures
from scripts.results import Result


def keep(seed, depth, accuracy, **arguments):
    """A classifier and its MAE."""
    mae = keep_mae(seed, depth, **arguments)
    return keep_classifier(seed, mae, accuracy, **{k: v for k, v in arguments.items() if k != "mask_ratio"}), mae


def compared(*directories, baseline=()):
    """{(setting, measure): row of compare.csv}, with numbers as floats."""
    asked = ["--baseline", *baseline] if baseline else []
    compare.main([*(directories or ["runs"]), "--output", "out", *asked])
    with open("out/compare.csv") as file:
        rows = list(csv.DictReader(file))
    numbers = ("n", "mean", "sd", "difference", "low", "high", "pairs")
    rows = [row | {name: float(row[name]) if row[name] else None for name in numbers} for row in rows]
    return {(row["setting"], row["measure"]): row for row in rows}


def test_equal_settings_are_not_decided_and_a_shift_of_3_standard_deviations_is():
    noise = {1: -0.01, 2: 0, 3: 0.01}  # standard deviation 0.01
    for seed in (1, 2, 3):
        keep(seed, 2, 0.5)
        keep(seed, 4, 0.5)
        keep(seed, 6, 0.52 + noise[seed])
        keep(seed, 8, 0.53 + noise[seed])
    rows = compared()
    verdicts = {depth: rows[f"decoder_depth={depth}", "fine-tuned"]["verdict"] for depth in (2, 4, 6, 8)}
    assert verdicts == {2: "baseline", 4: "not decided", 6: "not decided", 8: "higher"}
    row = rows["decoder_depth=8", "fine-tuned"]
    assert (row["decoder_depth"], row["n"], row["pairs"]) == ("8", 3, 3)
    assert rows["decoder_depth=8", "k-NN while pretraining"]["mean"] == pytest.approx(12)
    assert rows["decoder_depth=8", "MAE training loss"]["mean"] == 1
    half = 4.303 / 3**0.5  # of a standard deviation of 1 %
    expected = {"mean": 53, "sd": 1, "difference": 3, "low": 3 - half, "high": 3 + half}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert "| decoder_depth=8 | +3.00 (+0.52 to +5.48, n 3): higher |" in Path("out/compare.md").read_text()
    assert compared(baseline=["decoder_depth=8"])["decoder_depth=2", "fine-tuned"]["verdict"] == "lower"


def test_what_cannot_be_compared_is_told_apart(capsys):
    for seed in (1, 2, 3):
        keep(seed, 2, 0.5 + seed / 100)
        keep(seed + 1, 4, 0.5)
    keep(1, 6, 0.5)
    keep(9, 8, 0.5)
    keep(4, 2, math.nan)
    running, _ = keep(5, 2, 0.9)
    lines = (running / "metrics.csv").read_text().splitlines(keepends=True)
    (running / "metrics.csv").write_text("".join(lines[:-1]))
    keep_classifier(1, keep_mae(1, 3, dataset="cifar100"), 0.9, dataset="cifar100")
    for run in keep(1, 10, 0.9):
        change(run, None, test_set="ef")
    rows = compared(baseline=["decoder_depth=2"])
    found = {row["decoder_depth"]: row for (_, measure), row in rows.items() if measure == "fine-tuned"}
    assert {depth: (row["verdict"], row["n"], row["pairs"]) for depth, row in found.items()} == {
        "2": ("baseline", 3, 0),
        "3": ("other images", 1, 0),
        "4": ("not decided", 3, 2),
        "6": ("one seed", 1, 1),
        "8": ("no common seed", 1, 0),
        "10": ("other images", 1, 0),
    }
    said = capsys.readouterr().out
    assert f"Not compared: {running}: not finished, 1 of 2 epochs." in said
    # seed 4 is nan, and of seed 5 the MAE alone is finished
    assert "dataset=shapes test_set=cd decoder_depth=2: fine-tuned of 3 of 5 seeds." in said
    assert "No difference is given between results on different images" in said


def test_a_setting_is_named_by_the_arguments_that_differ_and_by_nothing_that_follows_from_them():
    for seed, ratio in ((1, 0.5), (1, 0.75), (2, 0.5)):
        mae = keep_mae(seed, 4, mask_ratio=ratio, weight_decay=0.05).rename(f"runs/pretrain/mae_{ratio}_s{seed}")
        change(mae, None, name=mae.name, masks=f"m{ratio}")
        run = keep_classifier(seed, mae, 0.5, weight_decay=0.05, device="cpu" if seed == 1 else "cuda")
        change(run, None, images="ab", peak_learning_rate=seed)
    keep_classifier(1, None, 0.4, weight_decay=0.05)
    assert [setting for setting, measure in compared() if measure == "fine-tuned"] == [
        "mask_ratio=0.5",
        "mask_ratio=0.75",
        "from scratch",
    ]
    change(mae, "arguments", weight_decay=0.3)
    assert "mask_ratio=0.5 pretraining/weight_decay=0.3" in {setting for setting, _ in compared()}
    change(run, "arguments", weight_decay=0.3)
    assert "weight_decay=0.3 mask_ratio=0.5" in {setting for setting, _ in compared()}
    change(run, "arguments", weight_decay=0.05)
    change(mae, "arguments", weight_decay=0.05)
    change(mae, None, masks="drawn otherwise")
    assert "mask_ratio=0.5 masks=drawn otherwise" in {setting for setting, _ in compared()}


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("norm_pix_loss", True, ["norm_pix_loss=False", "norm_pix_loss=True"]),
        ("optimizer", "muon", ["pretraining/optimizer=adamw", "pretraining/optimizer=muon"]),
    ],
)
def test_a_run_from_before_a_switch_was_there_had_it_off(flag, value, expected):
    for seed in (1, 2):
        keep_classifier(seed, keep_mae(seed, 2), 0.5)
        later = keep_mae(seed, 2, "later", **{flag: value})
        change(later, "arguments", mask_strategy="random")
        keep_classifier(seed, later, 0.6)
    settings = [(setting, row["n"]) for (setting, measure), row in compared().items() if measure == "fine-tuned"]
    assert settings == [(setting, 2) for setting in expected]


def test_a_run_from_before_images_were_held_out_is_not_one_that_held_some_out():
    for seed in (1, 2):
        keep_classifier(seed, keep_mae(seed, 2), 0.5)
    for seed in (3, 4):
        change(keep_classifier(seed, keep_mae(seed, 2), 0.6), "arguments", val_images=10)
    settings = [(setting, row["n"]) for (setting, measure), row in compared().items() if measure == "fine-tuned"]
    assert settings == [("val_images=10", 2), ("val_images=none", 2)]


def test_of_one_change_at_a_time_only_the_change_is_named():
    usual = {"norm_pix_loss": False, "positions": "learned", "decoder_embed_dim": None, "mask_ratio": 0.75}
    changes = ({"norm_pix_loss": True}, {}, {"positions": "sincos", "mask_ratio": 0.5}, {"decoder_embed_dim": 8})
    for depth, change_ in enumerate(changes):
        for seed in (1, 2):
            mae = keep_mae(seed, 2, f"m{depth}")
            change(mae, "arguments", mask_strategy="random", **{**usual, **change_})
            keep_classifier(seed, mae, 0.5 + depth / 100)
    rows = compared()
    assert [(setting, row["difference"]) for (setting, measure), row in rows.items() if measure == "fine-tuned"] == [
        ("as most", None),
        ("norm_pix_loss=True", pytest.approx(-1)),
        ("decoder_embed_dim=8", pytest.approx(2)),
        ("mask_ratio=0.5 positions=sincos", pytest.approx(1)),
    ]
    assert rows["norm_pix_loss=True", "fine-tuned"]["positions"] == "learned"
    told = "mask_ratio=0.75 norm_pix_loss=False decoder_embed_dim=none positions=learned"
    assert f"\n- Unless a setting says otherwise: {told}.\n" in Path("out/compare.md").read_text()


def test_a_classifier_counts_the_arguments_of_a_mae_that_is_not_there():
    for seed, depth in ((1, 2), (2, 2), (1, 4), (2, 4)):
        run, mae = keep(seed, depth, 0.5 + depth / 100 + seed / 1000 * depth)
        change(run, None, pretraining=json.loads((mae / "config.json").read_text())["arguments"])
    rows = compared("runs/classifier")
    assert {(setting, measure) for setting, measure in rows} == {
        ("decoder_depth=2", "fine-tuned"),
        ("decoder_depth=4", "fine-tuned"),
    }


def test_seeds_are_the_maes_where_all_classifiers_have_one():
    for seed in (1, 2, 3):
        for depth in (2, 4):
            keep_classifier(42, keep_mae(seed, depth), 0.5 + depth / 100 + seed / 1000 * depth)
    row = compared()["decoder_depth=4", "fine-tuned"]
    assert (row["n"], row["pairs"], row["verdict"]) == (3, 3, "higher")


@pytest.mark.parametrize("seeds_of_maes", [(1,), (1, 2, 3)])
def test_a_mae_with_several_classifiers_counts_once(seeds_of_maes):
    for seed in (1, 2, 3):
        keep_features(Path(f"runs/d4_s{seed}_features.json"), keep(seed, 4, 0.5)[1], 0.3, 0.2 + seed / 1000)
    for mae_seed in seeds_of_maes:
        mae = keep_mae(mae_seed, 2)
        keep_features(Path(f"runs/d2_s{mae_seed}_features.json"), mae, 0.3, 0.1 + mae_seed / 100)
        for seed in (1, 2, 3):
            run = keep_classifier(seed, mae, 0.4 + seed / 1000)
            run.rename(f"{run}_again")
    rows = compared(baseline=["decoder_depth=4"])
    knn, tuned = rows["decoder_depth=2", "k-NN"], rows["decoder_depth=2", "fine-tuned"]
    assert (knn["n"], knn["verdict"]) == ((1, "one seed") if len(seeds_of_maes) == 1 else (3, "lower"))
    assert knn["mean"] == pytest.approx(10 + sum(seeds_of_maes) / len(seeds_of_maes))
    assert (tuned["n"], tuned["mean"]) == (3, pytest.approx(40.2))


def test_a_run_is_known_by_its_name_and_not_by_its_directorys():
    mae = keep_mae(1, 2)
    keep_features(Path("runs/pretrain/features.json"), mae, 0.3, 0.2)
    keep_classifier(1, mae, 0.5)
    mae.rename("runs/pretrain/mine")
    rows = compared()
    assert [row["mean"] for row in rows.values() if row["measure"] in ("fine-tuned", "k-NN")] == [50, 20]
    assert len({setting for setting, _ in rows}) == 1


def test_the_same_setting_and_seed_twice_counts_once(capsys):
    first, _ = keep(1, 2, 0.5)
    Path("runs").rename("one")
    keep(1, 2, 0.6)
    assert compared("one", "runs")["all runs", "fine-tuned"]["mean"] == pytest.approx(50)
    run = Path("runs", *first.parts[1:])
    assert f"Not compared: {run}: same setting and seed as {Path('one', *first.parts[1:])}." in capsys.readouterr().out


@pytest.mark.parametrize(("running", "setting"), [(False, "all runs"), (True, "train_images=500")])
def test_a_mae_whose_classifier_is_still_to_come_is_of_the_setting_of_the_others(running, setting):
    for seed in (1, 2):
        mae = keep_mae(seed, 2, train_images=500)
        keep_features(Path(f"runs/d2_s{seed}_features.json"), mae, 0.3, 0.2)
        if seed == 1:
            keep_classifier(seed, mae, 0.5, train_images=500)
    if running:  # on other labels
        run = keep_classifier(2, mae, 0.5, train_images=100)
        (run / "metrics.csv").write_text("".join((run / "metrics.csv").read_text().splitlines(keepends=True)[:-1]))
    assert {key: row["n"] for key, row in compared().items()} == {
        (setting, "fine-tuned"): 1,
        (setting, "linear probe"): 2,
        (setting, "k-NN"): 2,
        (setting, "MAE training loss"): 2,
    }


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        ("a=1", "as most"),
        ("as most", "as most"),
        ("b=2 a=1", "as most"),
        ("a=3 b=2", "a=3"),
        ("a=3", "a=3"),
        ("b=4", "a=3 b=4"),
        ("", "as most"),
    ],
)
def test_a_baseline_may_be_named_by_what_its_label_leaves_out(asked, label):
    values = {"as most": {"a": 1, "b": 2}, "a=3": {"a": 3, "b": 2}, "a=3 b=4": {"a": 3, "b": 4}}
    assert compare.pick_baseline(asked.split(), list(values), values) == label
    with pytest.raises(ValueError, match="fits no setting"):
        compare.pick_baseline(["a=1", "b=4"], list(values), values)


@pytest.mark.parametrize(("asked", "count"), [(["decoder_depth=3"], "no setting"), (["decoder_depth=2"], "2 settings")])
def test_a_baseline_that_fits_no_single_setting_is_refused_with_the_list(capsys, asked, count):
    labels = ["decoder_depth=2 a=1", "decoder_depth=2 a=2", "from scratch"]
    values = {label: {} for label in labels}
    with pytest.raises(ValueError, match=f"--baseline {asked[0]} fits {count}; there are: {', '.join(labels)}"):
        compare.pick_baseline(asked, labels, values)
    assert compare.pick_baseline(["a=2", "decoder_depth=2"], labels, values) == labels[1]
    assert compare.pick_baseline(["from scratch"], labels, values) == labels[2]
    assert compare.pick_baseline(["a"], ["a b", "a"], {"a b": {}, "a": {}}) == "a"
    keep(1, 2, 0.5)
    with pytest.raises(SystemExit) as exit_info:
        compare.main(["runs", "--baseline", *asked])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_few_labels_go_from_100_to_all_fine_tuned_and_frozen(monkeypatch):
    for seed in (1, 2):
        mae = keep_mae(seed, 2)
        for count in (100, 500, None):
            if count:
                run = keep_classifier(seed, mae, count / 1000, train_images=count)
                run.rename(f"{run}_{count}")
            place, arguments = mae / f"features_{count}.json", {"train_images": count}
            keep_features(place, mae, (count or 1000) / 2000, 0.2, arguments=arguments)
    figures = []
    monkeypatch.setattr(compare_figures, "save", lambda figure, path: figures.append(figure))
    Path("out").mkdir()
    rows = compared()
    assert rows["train_images=100", "linear probe"]["mean"] == pytest.approx(5)
    assert rows["train_images=500", "fine-tuned"]["mean"] == pytest.approx(50)
    assert rows["train_images=all", "linear probe"]["mean"] == pytest.approx(50)
    assert ("train_images=all", "fine-tuned") not in rows
    (axes,) = (place for place in figures[0].axes if place.get_title() == "linear probe")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100", "500", "all"]
    assert list(axes.lines[0].get_xdata()) == [100, 500, 900]
    plt.close("all")


# --- figures ---


def drawn(monkeypatch, values, numbers):
    """The axes of one measure; numbers of the seeds by label."""
    figures = []
    monkeypatch.setattr(compare_figures, "save", lambda figure, path: figures.append(figure))
    measured = {"fine-tuned": {label: dict(enumerate(some)) for label, some in numbers.items()}}
    compare_figures.draw_measures(measured, values, next(iter(values)), "from scratch", (), Path("measures.png"))
    plt.close("all")
    return figures[0].axes[0]


def test_one_number_is_drawn_as_a_line_with_intervals_and_from_scratch_as_a_level(monkeypatch):
    values = {"r=0.5": {"r": 0.5}, "r=0.75": {"r": 0.75}, "from scratch": {}}
    axes = drawn(monkeypatch, values, {"r=0.5": [1, 2, 3], "r=0.75": [4], "from scratch": [1.5]})
    line, level = (line for line in axes.lines if not line.get_label().startswith("_"))
    assert line.get_ydata().tolist() == [2, 4]
    assert list(level.get_ydata()) == [1.5, 1.5]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pretrained", "from scratch"]
    bars = [bar for container in axes.containers for bar in container[2]]
    low, high = bars[0].get_segments()[0][:, 1]
    assert [low, high] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5])
    assert len(bars) == 1  # one seed has no interval
    assert axes.get_xlabel() == "r"
    two = {"from scratch augment=no": [1.5], "from scratch augment=yes": [2.5]}
    values |= {label: {"augment": label[-2:]} for label in two}
    del values["from scratch"]
    axes = drawn(monkeypatch, values, {"r=0.5": [1], "r=0.75": [4], **two})
    levels = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label() in two}
    assert levels == {label: 2 * number for label, number in two.items()}


def test_a_legend_says_of_no_value_what_the_tables_say(monkeypatch):
    values = {f"d={d} n={n}": {"d": d, "train_images": n} for n in (500, None) for d in (1, 2)}
    axes = drawn(monkeypatch, values, {label: [1, 2] for label in values})
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train_images=500", "train_images=all"]


def test_arguments_that_change_together_are_one_and_two_numbers_make_cells(monkeypatch):
    values = {f"d={d} w={w} h={h}": {"d": d, "w": w, "h": h} for d in (1, 2) for w, h in ((8, 1), (16, 2), (32, 4))}
    numbers = {label: [10 * setting["d"] + setting["h"]] for label, setting in values.items()}
    del numbers["d=2 w=32 h=4"]
    axes = drawn(monkeypatch, values, numbers)
    assert [text.get_text() for text in axes.texts] == ["11.00", "12.00", "14.00", "21.00", "22.00"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("w", "d")


def test_names_and_what_is_hardly_crossed_get_a_row_each(monkeypatch):
    names = {f"m={name}": {"m": name} for name in "xyz"}
    loose = {f"m={m} d={d}": {"m": m, "d": d} for m, d in (("x", 1), ("x", 2), ("y", 4), ("z", 4))}
    for values in (names, loose):
        axes = drawn(monkeypatch, values, {label: [1, 2] for label in values})
        assert [tick.get_text() for tick in axes.get_yticklabels()] == list(values)
    lines = drawn(monkeypatch, {k: v for k, v in loose.items() if v["m"] == "x"}, {"m=x d=1": [1], "m=x d=2": [1]})
    assert lines.get_xlabel() == "d"


def test_runs_that_are_not_finished_are_drawn_by_epoch(monkeypatch):
    shown = []
    monkeypatch.setattr(compare_figures, "save", lambda figure, path: shown.append(figure))
    (run, _), (other, _) = keep(1, 2, 0.5), keep(2, 2, 0.5)
    captions = compare_figures.draw_all_curves({"a": [Result(1, run, None)]}, {"a": [Result(2, other, None)]}, Path())
    assert list(captions) == ["classifier_train_loss", "classifier_test_acc"]
    labels = [text.get_text() for text in shown[1].legends[0].get_texts()]
    assert labels == ["a (n 1)", "a, not finished (n 1)"]
    plt.close("all")


def test_a_cell_without_a_value_stays_empty():
    figure = draw_matrix([[1.0, math.nan]], "a", "xy", "", "")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.000"]
    plt.close(figure)
