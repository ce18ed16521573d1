"""Comparing settings, from runs written by hand with known answers."""

import csv
import math
from pathlib import Path

import pytest
from made_runs import change, make_classifier, make_features, make_mae, make_pair

from engine.figures import plt
from scripts import compare
from scripts.settings import pick_baseline

DEPTHS = (2, 4)
NOISE = {1: -0.01, 2: 0, 3: 0.01}  # standard deviation 0.01


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


def compared(*directories, **options):
    """{(setting, measure): row of compare.csv}, with numbers as floats."""
    asked = [word for name, words in options.items() for word in (f"--{name}", *words)]
    compare.main([*(directories or ["runs"]), *asked, "--output", "out"])
    with open("out/compare.csv") as file:
        rows = list(csv.DictReader(file))
    numbers = ("n", "mean", "sd", "difference", "low", "high", "low_all", "high_all")
    rows = [row | {name: float(row[name]) if row.get(name) else None for name in numbers} for row in rows]
    return {(row["setting"], row["measure"]): row for row in rows}


def settings_of(rows, measure="fine-tuned"):
    return {setting: row["n"] for (setting, name), row in rows.items() if name == measure}


@pytest.fixture
def drawn(monkeypatch):
    """{file name: the figure that was to be saved}."""
    figures = {}
    monkeypatch.setattr(compare, "save", lambda figure, path: figures.setdefault(path.stem, figure))
    Path("out").mkdir()
    return figures


# --- what the data say ---


@pytest.mark.slow
def test_equal_settings_are_within_a_bound_and_a_shift_of_several_standard_deviations_is_told():
    for seed in (1, 2, 3):
        for depth, accuracy in ((2, 0.5), (4, 0.5 + NOISE[1 + seed % 3]), (6, 0.5 - NOISE[seed]), (8, 0.57)):
            make_pair(seed, accuracy + NOISE[seed], decoder_depth=depth)
    rows = compared()
    found = {depth: rows[f"decoder_depth={depth}", "fine-tuned"] for depth in (2, 4, 6, 8)}
    assert found[2]["verdict"] == "baseline"
    assert [found[depth]["verdict"].split()[0] for depth in (4, 6, 8)] == ["within", "within", "higher"]
    row = found[8]
    assert {name: row[name] for name in ("mean", "sd", "n", "difference")} == pytest.approx(
        {"mean": 57, "sd": 1, "n": 3, "difference": 7}
    )
    assert row["decoder_depth"] == "8"
    assert row["low_all"] < row["low"] < 7 < row["high"] < row["high_all"]
    assert rows["decoder_depth=8", "k-NN while pretraining"]["mean"] == pytest.approx(12)
    assert rows["decoder_depth=8", "MAE training loss"]["mean"] == 1
    report = Path("out/compare.md").read_text()
    assert f"| decoder_depth=8 | +7.00 ({row['low']:+.2f} to {row['high']:+.2f}): {row['verdict']} |" in report
    assert "fine-tuned: decoder_depth=8 has the best mean; all others are shown to be worse." in report
    assert report.index("| decoder_depth=8 | 57.00") < report.index("| decoder_depth=2 | 50.00")  # the best comes first
    lower = compared(baseline=["decoder_depth=8"])["decoder_depth=2", "fine-tuned"]
    assert lower["verdict"].startswith("lower")
    assert lower["difference"] == pytest.approx(-7)


@pytest.mark.slow
def test_what_cannot_be_told_from_the_best_is_named_and_what_more_seeds_would_decide(capsys):
    for seed in (1, 2, 3):
        for strategy, mean, i in (("block", 0.6, seed), ("grid", 0.4, 1 + seed % 3), ("random", 0.599, 4 - seed)):
            make_pair(seed, mean + NOISE[i] / 9, mask_strategy=strategy)
    rows = compared(margin=["9"], baseline=["mask_strategy=random"])
    assert (
        "mask_strategy=block has the best mean; not shown to be worse: mask_strategy=random." in capsys.readouterr().out
    )
    assert rows["mask_strategy=block", "fine-tuned"]["verdict"].endswith("equivalent within 9")
    assert not any("equivalent" in row["verdict"] for (_, measure), row in rows.items() if measure == "test loss")
    assert "3 seeds can show a difference of" in Path("out/compare.md").read_text()
    compared(where=["mask_strategy=block"])
    assert "told" not in capsys.readouterr().out


def test_what_cannot_be_compared_is_told_apart(capsys):
    for seed in (1, 2, 3):
        make_pair(seed, 0.5 + seed / 100, decoder_depth=2)
        make_pair(seed + 1, 0.5, decoder_depth=4)
    make_pair(1, 0.5, decoder_depth=6)
    make_pair(4, math.nan, decoder_depth=2)
    running = make_classifier(5, make_mae(5, decoder_depth=2), 0.9, finished=False)
    make_pair(1, 0.9, decoder_depth=3, dataset="cifar100", tuned={"dataset": "cifar100"})
    other = {"facts": {"test_set": "ef"}}
    make_pair(1, 0.9, decoder_depth=10, **other, tuned=other)
    rows = compared(baseline=["decoder_depth=2"])
    found = {row["decoder_depth"]: row for (_, measure), row in rows.items() if measure == "fine-tuned"}
    verdicts = {depth: row["verdict"] for depth, row in found.items() if depth not in "46"}
    assert verdicts == {"2": "baseline", "3": "other images", "10": "other images"}
    assert {depth: row["n"] for depth, row in found.items()} == {"2": 3, "3": 1, "4": 3, "6": 1, "10": 1}
    assert [found[depth]["difference"] for depth in ("3", "10")] == [None, None]
    said = capsys.readouterr().out
    assert f"Not compared: {running}: not finished, 1 of 2 epochs." in said
    # seed 4 is nan, and of seed 5 the MAE alone is finished
    assert "dataset=shapes test_set=cd decoder_depth=2: fine-tuned of 3 of 5 seeds." in said
    assert "dataset=shapes test_set=cd decoder_depth=2 has the best mean" in said  # of those on the same images


@pytest.mark.slow
def test_runs_of_another_precision_or_on_other_labels_are_never_averaged():
    make_pair(1)
    make_pair(2, facts={"precision": "bf16"}, tuned={"facts": {"precision": "bf16"}})
    assert settings_of(compared()) == {"precision=bf16": 1, "precision=float32": 1}
    change(make_classifier(3, make_mae(3)), "settings", train_images=100)
    labels = {(row["precision"], row["finetune/train_images"]) for row in compared().values()}
    assert labels == {("bf16", "all"), ("float32", "all"), ("float32", "100")}


def test_commits_versions_and_changed_trees_are_told_where_they_differ(capsys):
    runs = [make_mae(seed) for seed in (1, 2, 3)]
    compared()
    assert "Commits" not in capsys.readouterr().out
    for run, commit, clean, source in zip(runs, ("a" * 40,) * 2 + ("b" * 40,), (True, False, True), "xyz", strict=True):
        change(run, "starts", 0, commit=commit, clean=clean, source=source)
    change(make_mae(4, finished=False), "starts", 0, torch="9")  # not compared
    compared()
    said = capsys.readouterr().out
    assert "Commits: aaaaaaa (1 run); aaaaaaa with changes y (1 run); bbbbbbb (1 run).\n" in said
    assert "Versions" not in said
    change(runs[0], "starts", 0, torch="9")
    compared()
    assert (
        "Versions: Python 3, PyTorch 2, timm 1 (2 runs); Python 3, PyTorch 9, timm 1 (1 run).\n"
        in capsys.readouterr().out
    )


# --- settings ---


@pytest.mark.slow
def test_a_setting_is_named_by_what_differs_and_by_nothing_that_follows_from_it():
    for seed, ratio in ((1, 0.5), (1, 0.75), (2, 0.5)):
        mae = make_mae(seed, mask_ratio=ratio, facts={"masks": f"m{ratio}", "peak_learning_rate": seed})
        run = make_classifier(seed, mae, facts={"effective_batch_size": seed})
    make_classifier(1, accuracy=0.4)
    assert list(settings_of(compared())) == ["mask_ratio=0.5", "mask_ratio=0.75", "from scratch"]
    change(run, "settings", base_learning_rate=0.3)
    assert "mask_ratio=0.5 finetune/base_learning_rate=0.3" in settings_of(compared())
    change(run, "settings", base_learning_rate=1e-3)
    change(mae, "facts", masks="drawn otherwise")
    assert "mask_ratio=0.5 masks=drawn otherwise" in settings_of(compared())


def test_what_a_mae_and_its_classifier_share_is_said_once_and_what_they_do_not_is_told_apart():
    for seed, augment in ((1, "none"), (2, "shift")):
        make_pair(seed, augment=augment, tuned={"augment": augment})
    assert set(settings_of(compared())) == {"augment=none", "augment=shift"}
    make_pair(3, augment="none", tuned={"augment": "shift"})
    assert set(settings_of(compared())) == {
        "augment=none finetune/augment=none",
        "augment=none finetune/augment=shift",
        "augment=shift finetune/augment=shift",
    }


def test_of_one_change_at_a_time_only_the_change_is_named():
    changes = ({"norm_pix_loss": True}, {}, {"positions": "sincos", "mask_ratio": 0.5}, {"decoder_embed_dim": 8})
    for i, settings in enumerate(changes):
        for seed in (1, 2):
            make_pair(seed, 0.5 + i / 100 + seed / 1000, end=str(i), **settings)
    rows = compared()
    differences = {setting: row["difference"] for (setting, measure), row in rows.items() if measure == "fine-tuned"}
    assert differences.pop("as most") is None
    assert differences == pytest.approx(
        {"norm_pix_loss=True": -1, "decoder_embed_dim=8": 2, "positions=sincos mask_ratio=0.5": 1}, abs=1e-6
    ) or differences == pytest.approx(
        {"norm_pix_loss=True": -1, "decoder_embed_dim=8": 2, "mask_ratio=0.5 positions=sincos": 1}, abs=1e-6
    )
    assert rows["norm_pix_loss=True", "fine-tuned"]["positions"] == "learned"
    said = Path("out/compare.md").read_text().partition("- Unless a setting says otherwise: ")[2].split(".\n")[0]
    usual = {"mask_ratio=0.75", "norm_pix_loss=False", "decoder_embed_dim=none", "positions=learned"}
    assert set(said.split()) == usual


def test_a_classifier_counts_the_settings_of_a_mae_that_is_not_there():
    for seed in (1, 2):
        for depth in DEPTHS:
            make_pair(seed, 0.5 + depth / 100 + seed / 1000 * depth, decoder_depth=depth)
    rows = compared("runs/classifier")
    assert {key for key in rows if key[1] != "test loss"} == {(f"decoder_depth={d}", "fine-tuned") for d in DEPTHS}
    assert "| decoder_depth=2 | 52.30 ± 0.14 (n 2) |  | 0.0" in Path("out/compare.md").read_text()  # and its cost


@pytest.mark.slow
def test_a_filter_keeps_what_was_typed_however_it_is_written_and_from_scratch(capsys):
    for rate in (1.5e-4, 3e-4):
        for depth in DEPTHS:
            make_pair(1, decoder_depth=depth, base_learning_rate=rate, end=str(rate))
    make_classifier(1, accuracy=0.4)
    rows = compared(where=["base_learning_rate=1.5e-4"], baseline=["decoder_depth=4"])
    assert set(settings_of(rows)) == {"decoder_depth=2", "decoder_depth=4", "from scratch"}
    label = "base_learning_rate=0.0003 decoder_depth=2"
    assert (
        compared(baseline=["base_learning_rate=3.0e-4", "decoder_depth=2"])[label, "fine-tuned"]["verdict"]
        == "baseline"
    )
    for words in (["depth=4"], ["decoder_depth=9"]):
        with pytest.raises(SystemExit) as exit_info:
            compared(where=words)
        said = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert words[0] in said
        assert "decoder_depth" in said


# --- seeds ---


def test_seeds_are_the_maes_where_all_classifiers_have_one():
    for seed in (1, 2, 3):
        for depth in DEPTHS:
            mae = make_mae(seed, decoder_depth=depth)
            make_classifier(42, mae, 0.5 + depth / 100 + NOISE[seed] * (1 + depth / 100))
    row = compared()["decoder_depth=4", "fine-tuned"]
    assert row["n"] == 3
    assert row["verdict"].startswith("higher by 2")


@pytest.mark.parametrize("seeds_of_maes", [(1,), (1, 2, 3)])
def test_several_classifiers_of_a_mae_are_one_value_their_mean(seeds_of_maes, drawn):
    for seed in (1, 2, 3):
        make_pair(seed, 0.5 + seed / 1000, decoder_depth=4)
    for mae_seed in seeds_of_maes:
        mae = make_mae(mae_seed, decoder_depth=2)
        make_features(mae, 0.3, 0.1 + mae_seed / 100)
        for seed in (1, 2, 3):
            make_classifier(seed, mae, 0.4 + mae_seed / 100 + seed / 1000)
    rows = compared(baseline=["decoder_depth=4"])
    tuned, knn = rows["decoder_depth=2", "fine-tuned"], rows["decoder_depth=2", "k-NN"]
    means = [40.2 + seed for seed in seeds_of_maes]
    assert (tuned["n"], knn["n"]) == (len(seeds_of_maes), len(seeds_of_maes))
    assert tuned["mean"] == pytest.approx(sum(means) / len(means))
    assert tuned["sd"] == (None if len(means) == 1 else pytest.approx(1))
    assert knn["mean"] == pytest.approx(10 + sum(seeds_of_maes) / len(seeds_of_maes))
    assert "s.d. 0.10 between classifiers of one MAE" in Path("out/compare.md").read_text()
    names = [tick.get_text() for tick in drawn["fine_tuning"].axes[0].get_yticklabels()]
    assert names == [
        f"decoder_depth={d}, MAE of seed {seed}" for d, some in ((2, seeds_of_maes), (4, (1, 2, 3))) for seed in some
    ]
    points = [list(line.get_xdata()) for line in drawn["fine_tuning"].axes[0].lines]
    assert [pytest.approx([40.1 + seed, 40.2 + seed, 40.3 + seed]) in points for seed in seeds_of_maes]


@pytest.mark.slow
def test_a_measure_of_maes_is_judged_once_for_all_that_was_fine_tuned_from_them():
    for seed in (1, 2, 3):
        for depth in DEPTHS:
            mae = make_mae(seed, decoder_depth=depth)
            make_features(mae, 0.3, 0.2 + depth / 100 + NOISE[seed] * depth)
            for epochs in (2, 3):
                make_classifier(seed, mae, total_epoch=epochs, end=str(epochs))
    rows = compared()
    knn = {setting: row for (setting, measure), row in rows.items() if measure == "k-NN"}
    assert [row["verdict"] for row in knn.values()][:2] == ["baseline", "the same MAEs"]
    alone = compared(where=["finetune/total_epoch=2"])["decoder_depth=4", "k-NN"]
    for name in ("difference", "low_all", "high_all", "n"):
        same = {row[name] for setting, row in knn.items() if setting.startswith("decoder_depth=4")}
        assert list(same) == [pytest.approx(alone[name])]


def test_the_same_setting_and_seed_twice_counts_once(capsys):
    first = make_pair(1, 0.5, root="one")
    run = make_classifier(1, make_mae(1, root="runs"), 0.6)
    assert compared("one", "runs")["all runs", "fine-tuned"]["mean"] == pytest.approx(50)
    assert f"Not compared: {run}: same setting and seed as {first}." in capsys.readouterr().out


@pytest.mark.parametrize(("running", "setting"), [(False, "all runs"), (True, "finetune/train_images=500")])
def test_a_mae_whose_classifier_is_still_to_come_is_of_the_setting_of_the_others(running, setting):
    for seed in (1, 2):
        mae = make_mae(seed, train_images=500)
        make_features(mae, 0.3, 0.2)
        if seed == 1:
            make_classifier(seed, mae, train_images=500)
    if running:  # on other labels
        make_classifier(2, mae, train_images=100, finished=False)
    rows = compared()
    found = {(s, measure): row["n"] for (s, measure), row in rows.items() if measure in ("fine-tuned", "k-NN")}
    assert found == {(setting, "fine-tuned"): 1, (setting, "k-NN"): 2}


def test_few_labels_go_from_100_to_all_fine_tuned_and_frozen(drawn):
    for seed in (1, 2):
        mae = make_mae(seed)
        for count in (100, 500, None):
            if count:
                make_classifier(seed, mae, count / 1000, train_images=count, end=str(count))
            make_features(mae, (count or 1000) / 2000, 0.2, train_images=count)
    rows = compared()
    names = [f"finetune/train_images={count}" for count in (100, 500, "all")]
    assert [rows[name, "linear probe"]["mean"] for name in names] == pytest.approx([5, 25, 50])
    assert rows[names[1], "fine-tuned"]["mean"] == pytest.approx(50)
    assert (names[2], "fine-tuned") not in rows
    (axes,) = (place for place in drawn["measures"].axes if place.get_title() == "linear probe, %")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100", "500", "all"]


# --- the baseline ---


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        ("a=1", "as most"),
        ("as most", "as most"),
        ("b=2 a=1", "as most"),
        ("a=3 b=2", "a=3"),
        ("a=3.0", "a=3"),
        ("a=3", "a=3"),
        ("b=4", "a=3 b=4"),
        ("lr=1e-1", "a=3 b=4"),
        ("", "as most"),
    ],
)
def test_a_baseline_may_be_named_by_what_its_label_leaves_out_however_it_is_written(asked, label):
    values = {"as most": {"a": 1, "b": 2}, "a=3": {"a": 3, "b": 2}, "a=3 b=4": {"a": 3, "b": 4, "finetune/lr": 0.1}}
    assert pick_baseline(asked.split(), values) == label
    with pytest.raises(ValueError, match="fits no setting"):
        pick_baseline(["a=1", "b=4"], values)


@pytest.mark.parametrize(("asked", "count"), [(["decoder_depth=3"], "no setting"), (["decoder_depth=2"], "2 settings")])
def test_a_baseline_that_fits_no_single_setting_is_refused_with_the_list(capsys, asked, count):
    values = {f"decoder_depth=2 a={a}": {"decoder_depth": 2, "a": a} for a in (1, 2)} | {"from scratch": {}}
    with pytest.raises(ValueError, match=f"{asked[0]} fits {count}; there are: {', '.join(values)}"):
        pick_baseline(asked, values)
    assert pick_baseline(["a=2", "decoder_depth=2"], values) == "decoder_depth=2 a=2"
    assert pick_baseline(["from", "scratch"], values) == "from scratch"
    make_pair(1)
    with pytest.raises(SystemExit) as exit_info:
        compared(baseline=asked)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_finished_is_said(capsys):
    make_mae(1, finished=False)
    with pytest.raises(SystemExit) as exit_info:
        compared()
    assert exit_info.value.code == 2
    assert "runs" in capsys.readouterr().err


# --- figures ---


def test_a_paper_gets_pictures_as_pdf_and_the_means_as_latex(capsys):
    for seed in (1, 2):
        make_pair(seed, 0.5 + seed / 100)
    compare.main(["runs", "--output", "out", "--format", "pdf", "--latex"])
    assert r"all runs & 51.50 $\pm$ 0.71 (n 2) &" in capsys.readouterr().out.partition(r"\toprule")[2]
    assert Path("out/measures.pdf").exists()
    assert "(measures.pdf)" in Path("out/compare.md").read_text()
    assert not Path("out/fine_tuning.pdf").exists()  # no MAE has several classifiers


def test_one_number_is_drawn_as_a_line_with_bars_and_from_scratch_as_a_level(drawn):
    for seed in (1, 2, 3):
        for ratio in (0.5, 0.75):
            make_pair(seed, ratio + NOISE[seed if ratio < 0.6 else 4 - seed], mask_ratio=ratio)
        make_classifier(seed, accuracy=0.4 + NOISE[seed])
    row = compared()["mask_ratio=0.75", "fine-tuned"]
    axes = drawn["measures"].axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines["pretrained"]) == pytest.approx([50, 75])
    assert list(lines["from scratch"]) == pytest.approx([40, 40])
    bars = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 2]
    assert any(bar == pytest.approx([50 + row["low_all"], 50 + row["high_all"]]) for bar in bars)
    assert axes.get_xlabel() == "mask_ratio"
    assert axes.get_title() == "fine-tuned, %"


def test_a_second_number_or_word_gives_a_line_each_and_what_follows_from_the_axis_does_not(drawn):
    for depth in (2, 4, 8):
        for strategy in ("random", "grid"):
            make_pair(1, depth / 10, decoder_depth=depth, decoder_embed_dim=depth, mask_strategy=strategy)
    compared()
    axes = drawn["measures"].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mask_strategy=grid", "mask_strategy=random"]


def test_names_and_what_is_hardly_crossed_get_a_row_each_the_baseline_marked(drawn):
    for strategy, depth in (("random", 2), ("block", 4), ("grid", 8)):
        make_pair(1, depth / 10, decoder_depth=depth, mask_strategy=strategy)
    rows = compared()
    axes = drawn["measures"].axes[0]
    assert {tick.get_text() for tick in axes.get_yticklabels()} == {setting for setting, _ in rows}
    assert [line.get_xdata() for line in axes.lines if line.get_linestyle() == "--"] == [[20, 20]]


def test_runs_that_are_not_finished_are_drawn_by_epoch(drawn):
    make_pair(1)
    make_classifier(2, make_mae(2), finished=False)
    make_mae(3, finished=False)
    compared()
    assert set(drawn) == {
        "measures",
        "mae_train_loss",
        "mae_probe_knn_acc",
        "classifier_train_loss",
        "classifier_test_acc",
    }
    labels = {
        name: [text.get_text() for text in drawn[name].legends[0].get_texts()] for name in drawn if name != "measures"
    }
    assert labels["classifier_test_acc"] == ["all runs (n 1)", "all runs, not finished (n 1)"]
    assert labels["mae_train_loss"] == ["all runs (n 2)", "all runs, not finished (n 1)"]
