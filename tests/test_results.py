"""Reading many runs and telling settings apart; the runs are written by hand."""

import json
import math
import shutil

import pytest
import torch

from engine.checkpoints import digest, save_file
from scripts import results
from scripts.results import paired_difference


def write_run(directory, *, finished=True, test_acc=0.5, **arguments):
    """A run of 1 epoch as far as results.py reads it; precision and images are no arguments, but facts."""
    directory.mkdir(parents=True)
    facts = {name: arguments.pop(name, "same") for name in ("precision", "images")}
    shared = {"seed": 1, "device": "cpu", "precision": "auto", "total_epoch": 1 if finished else 2}
    arguments = {**shared, "train_images": None, **arguments}
    (directory / "config.json").write_text(json.dumps({"name": directory.name, "arguments": arguments, **facts}))
    (directory / "metrics.csv").write_text(f"epoch,test/acc\n1,{test_acc}\n")
    return directory


def test_results_are_the_finished_classifiers_with_their_maes(tmp_path):
    mae = write_run(tmp_path / "pretrain" / "mae_a")
    write_run(tmp_path / "pretrain" / "mae_b", finished=False)
    one, two, scratch = (
        write_run(tmp_path / "classifier" / name, seed=seed)
        for name, seed in (("cls_s1_from_mae_a", 10), ("cls_s2_from_mae_a", 9), ("cls_scratch", 3))
    )
    left = [write_run(tmp_path / "classifier" / f"cls_s1_from_mae_{name}") for name in "bc"]
    left.append(write_run(tmp_path / "classifier" / "cls_s2_scratch", finished=False))
    found, left_out = results.find_results(tmp_path)
    assert found == [(10, one, mae, None), (9, two, mae, None), (3, scratch, None, None)]
    reasons = [f"its MAE, mae_{name}, is not there or not finished" for name in "bc"]
    unfinished = dict.fromkeys([left[2], tmp_path / "pretrain" / "mae_b"], "not finished, 1 of 2 epochs")
    assert left_out == unfinished | dict(zip(left, reasons, strict=False))
    groups = results.by_setting(found, lambda result: result.mae is None)
    assert groups == {False: [(9, two, mae, None), (10, one, mae, None)], True: [(3, scratch, None, None)]}


def write_features(path, **changes):
    row = {"encoder": "trained", "layer": 1, "pool": "mean", "linear/acc": 0.3, "knn/acc": 0.2}
    stored = {"name": "mae_a", "model_digest": "aa", "dataset": "folder", "data_dir": "x/pets", "rows": [row]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**stored, "arguments": {"train_images": None}, **changes}))
    return path


def test_a_mae_without_a_classifier_is_a_result_and_directories_are_anything(tmp_path):
    mae = write_run(tmp_path / "one" / "pretrain" / "mae_a", seed=5)
    scratch = write_run(tmp_path / "two" / "cls_scratch")
    (tmp_path / "two" / "config.json").write_text("{}")  # an exported model's
    assert results.find_results(mae, tmp_path / "two", tmp_path) == (
        [(1, scratch, None, None), (5, None, mae, None)],
        {},
    )
    with pytest.raises(ValueError, match=r"No directory .*three"):
        results.find_results(tmp_path / "three")


def test_a_classifiers_mae_may_lie_elsewhere_or_be_known_by_its_arguments_alone(tmp_path):
    near, far = (write_run(tmp_path / sweep / "pretrain" / "mae_a", lr=lr) for sweep, lr in (("x", 1), ("y", 2)))
    for sweep in ("x", "labels", "gone"):
        name = f"{'mae_b' if sweep == 'gone' else 'mae_a'}"
        run = write_run(tmp_path / sweep / "classifier" / f"cls_from_{name}")
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "pretraining": {"lr": 2}}))
    found, left_out = results.find_results(tmp_path)
    assert {result.classifier.parents[1].name: result.mae for result in found} == {
        "x": near,
        "labels": far,
        "gone": None,
    }
    assert not left_out


def test_features_on_fewer_labels_go_with_the_classifier_that_had_as_many(tmp_path):
    mae = write_run(tmp_path / "pretrain" / "mae_a", dataset="folder", data_dir="pets")
    few, all_labels = (
        write_run(tmp_path / "classifier" / f"cls_{count}_from_mae_a", train_images=count) for count in (10, None)
    )
    files = [
        write_features(mae / f"features{end}.json", arguments={"train_images": count})
        for end, count in (("", None), ("_10", 10), ("_20", 20))
    ]
    found, _ = results.find_results(tmp_path, equal_labels=True)
    assert found == [(1, few, mae, files[1]), (1, all_labels, mae, files[0]), (1, None, mae, files[2])]
    found, _ = results.find_results(tmp_path)
    assert found == [(1, few, mae, files[0]), (1, all_labels, mae, files[0])]


def test_the_features_of_a_mae_are_its_own_on_its_own_images_and_all_labels(tmp_path):
    mae = write_run(tmp_path / "pretrain" / "mae_a", dataset="folder", data_dir="pets")
    write_run(tmp_path / "classifier" / "cls_s1_from_mae_a", encoder_digest="aa")
    encoders = tmp_path / "encoders"
    for name, changes in {
        "a_features_10.json": {"arguments": {"train_images": 10}},
        "a_features_shapes.json": {"dataset": "shapes"},
        "b_features.json": {"name": "mae_b"},
        "c_features.json": {"data_dir": "x/cars"},
        "d_features.json": {"rows": []},
    }.items():
        write_features(encoders / name, **changes)
    ((result,), _) = results.find_results(tmp_path)
    assert result.features is None
    assert [measure.value(result) for measure in results.MEASURES.values()] == [50, None, None]
    mine = write_features(mae / "features.json")
    write_features(encoders / "e_features.json", model_digest="older")
    ((result,), _) = results.find_results(tmp_path)
    assert result.features == mine
    assert [measure.value(result) for measure in results.MEASURES.values()] == pytest.approx([50, 30, 20])
    assert results.values_of([result], results.MEASURES["k-NN"]) == {1: 20}
    mine.unlink()
    (encoders / "a_features_10.json").unlink()
    with pytest.raises(ValueError, match=r"e_features.json is of another MAE .digest older. than the encoder of .*cls"):
        results.find_results(tmp_path)


def test_a_classifier_of_another_mae_of_that_name_is_refused(tmp_path):
    mae = write_run(tmp_path / "pretrain" / "mae_a")
    weights = {"weight": torch.ones(1)}
    save_file(mae / "model.pt", {"kind": "MAE_ViT", "model": weights})
    classifier = write_run(tmp_path / "classifier" / "cls_s1_from_mae_a", encoder_digest=digest(weights))
    assert len(results.find_results(tmp_path)[0]) == 1
    shutil.rmtree(classifier)
    write_run(classifier, encoder_digest="other")
    with pytest.raises(
        ValueError, match=r"model.pt is of another MAE .* than the encoder of .*cls_s1.* .digest other."
    ):
        results.find_results(tmp_path)


def test_the_same_seed_twice_in_a_setting_is_refused(tmp_path):
    one, other = (results.Result(1, tmp_path / name, tmp_path / "mae") for name in "ab")
    with pytest.raises(ValueError, match=r"Seed 1 of depth 4 is there twice: .*a and .*b"):
        results.by_setting([one, other], lambda result: "depth 4")


def test_runs_that_differ_in_more_than_the_sweep_are_refused(tmp_path):
    base = write_run(tmp_path / "base", encoder_digest="ee", depth=4, width=8)
    alike = write_run(tmp_path / "alike", seed=2, device="cuda", encoder_digest="ff", depth=4)  # an older one
    deeper = write_run(tmp_path / "deeper", seed=2, depth=8, width=8)
    assert results.what_differs([base, alike]) == {}
    assert results.what_differs([base, alike, deeper]) == {"depth": {4: base, 8: deeper}}
    results.check_alike([base, alike, deeper], {"depth"})
    with pytest.raises(ValueError, match=r"deeper has depth 8, others have 4"):
        results.check_alike([base, alike, deeper], {"mask_strategy"})
    for name in ("precision", "images"):
        other = write_run(tmp_path / name, **{name: "other"})
        with pytest.raises(ValueError, match=f"has {name} other, others have same"):
            results.check_alike([base, other], {"depth"})


def test_the_accuracy_watched_is_of_held_out_images_where_all_have_it():
    val, test = [{"val/acc": 0.5, "test/acc": math.nan}], [{"test/acc": 0.5}]
    assert results.common_accuracy([val, val]) == "val/acc"
    assert results.common_accuracy([val, test]) == results.common_accuracy([test]) == "test/acc"
    assert results.common_accuracy([[{"knn/acc": 0.5}]]) == "knn/acc"
    assert results.common_accuracy([test, [{"train/loss": 0.5}]]) is None


def test_paired_differences_and_what_they_decide():
    difference = paired_difference({1: 0.5, 2: 0.7, 9: 0}, {1: 0.4, 2: 0.5, 8: 1})
    assert difference.mean == pytest.approx(0.15)
    assert difference.high - difference.mean == pytest.approx(12.706 * 0.1 / 2**0.5 / 2**0.5)
    assert (difference.n, difference.verdict) == (2, "not decided")
    assert paired_difference({1: 1, 2: 1.01}, {1: 0, 2: 0}).verdict == "higher"
    assert paired_difference({1: -1, 2: -0.99}, {1: 0, 2: 0}).verdict == "lower"
    one_seed = paired_difference({1: 1.0}, {1: 0.0})
    assert (one_seed.verdict, one_seed.interval()) == ("one seed", "no interval")
    assert paired_difference({1: 1}, {2: 1}) is None
    assert paired_difference({1: 1, 2: 2}, {1: 0, 2: 1}).verdict == "not decided"  # equal by chance
    shares = {1: 100 * 0.54, 2: 100 * 0.55}, {1: 100 * 0.53, 2: 100 * 0.54}  # equal but for rounding
    assert paired_difference(*shares).verdict == "not decided"
    many = {seed: seed % 2 for seed in range(100)}
    assert paired_difference(many, dict.fromkeys(many, 0)).high == pytest.approx(0.5 + 2.042 * 0.50252 / 10, abs=1e-4)


def test_intervals_hold_95_percent_of_students_t():
    x = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    for freedom, quantile in enumerate(results.STUDENT_T, start=1):
        density = (1 + (quantile * x) ** 2 / freedom) ** (-(freedom + 1) / 2)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        inside = 2 * scale * quantile * torch.trapezoid(density, x).item()
        assert inside == pytest.approx(0.95, abs=6e-5), freedom


def test_settings_differ_by_any_measure_and_a_missing_one_by_none(tmp_path):
    groups = {}
    for name, seed, acc in [("deep", 0, 0.5), ("deep", 1, 0.6), ("flat", 0, 0.2), ("flat", 1, 0.4)]:
        run = write_run(tmp_path / name / str(seed), test_acc=acc)
        groups.setdefault(name, []).append(results.Result(seed, run, None))
    assert results.difference(groups, "deep", "flat").mean == pytest.approx(25)
    seeds = results.Measure("classifier", lambda result: 2 * result.seed)
    assert results.difference(groups, "deep", "flat", seeds).mean == 0
    assert results.difference(groups, "deep", "none") is results.difference(groups, "none", "deep") is None
    assert results.spread([10, 20]) == "15.00 ± 7.07 (n 2)"
    assert results.spread([10]) == "10.00 (n 1)"
