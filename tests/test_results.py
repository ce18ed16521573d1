"""The table of runs, from runs written by hand."""

import builtins
import collections
import io
import json
from pathlib import Path

import pytest
from made_runs import change, make_classifier, make_features, make_mae

from engine.records import find_runs
from scripts import results
from scripts.results import MEASURES, table
from scripts.settings import entries_of, what_varies


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_is_a_row_with_settings_the_maes_last_metrics_and_frozen_features():
    mae = make_mae(3, decoder_depth=2)
    make_features(mae, 0.6, 0.5)
    make_features(mae, 0.4, 0.3, train_images=100)
    run = make_classifier(7, mae, 0.8, pool="mean")
    scratch = make_classifier(7, accuracy=0.7)
    runs = table("runs")
    assert list(runs.index) == sorted(map(str, (mae, run, scratch)))
    row, of_mae, of_scratch = (runs.loc[str(directory)] for directory in (run, mae, scratch))
    assert (row.kind, row.seed, row.epochs, row.finished, row["test/acc"]) == ("classifier", 7, 2, True, 0.8)
    assert (row.pool, row.train_images, row["mae/decoder_depth"], row["mae/seed"]) == ("mean", "all", 2, 3)
    assert (row.mae, of_scratch.mae, row.minutes) == (str(mae), None, 0.2)
    assert (of_mae["linear/acc"], of_mae["knn/acc"], of_mae["linear/acc@100"]) == (0.6, 0.5, 0.4)
    assert (of_mae.decoder_depth, of_mae.decoder_embed_dim, of_mae["probe/knn_acc"]) == (2, "none", 0.12)
    means = runs[runs.kind == "classifier"].groupby("mae/mask_ratio")["test/acc"].mean()
    assert means.to_dict() == {0.75: 0.8}
    assert {measure.column for measure in MEASURES.values()} - set(runs) == {"test/balanced_acc"}  # even classes


def test_each_file_is_read_once(monkeypatch):
    for seed in range(5):
        mae = make_mae(seed)
        make_features(mae, 0.6, 0.5)
        make_classifier(seed, mae)
    opened, real = collections.Counter(), io.open

    def count(path, *args, **kwargs):
        opened[Path(str(path)).resolve()] += 1
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", count)
    monkeypatch.setattr(io, "open", count)
    table("runs")
    written = {path.resolve() for path in Path("runs").rglob("*") if path.is_file() and path.name != "features.csv"}
    assert {path: opened[path] for path in opened if "runs" in path.parts} == dict.fromkeys(written, 1)


def test_a_directory_named_twice_counts_once_and_one_that_is_not_there_is_named():
    mae = make_mae(1)
    Path("runs/exported").mkdir()
    Path("runs/exported/config.json").write_text('{"architectures": ["x"]}')  # no run's
    assert len(table("runs", mae.resolve(), "runs/pretrain/../pretrain")) == 1
    with pytest.raises(ValueError, match="No directory gone"):
        table("runs", "gone")
    (mae / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"Cannot read .*config\.json.*--overwrite"):
        table("runs")


def test_a_mae_is_the_one_of_that_name_and_settings_first_of_the_same_sweep():
    near, far = make_mae(1, "x"), make_mae(1, "y")
    run, other = make_classifier(1, near, root="x"), make_classifier(1, far, root="z")
    of_far = make_classifier(1, far, root="y")
    runs = table("x", "y", "z")
    assert runs.mae[[str(run), str(of_far)]].tolist() == [str(near), str(far)]
    assert runs.mae[str(other)] == str(near)  # the first of two that are alike
    change(near, "settings", base_learning_rate=1)
    runs = table("x", "y", "z")
    assert {runs.mae[str(run)], runs.mae[str(other)]} == {str(far)}
    change(far, None, finished=False)
    assert table("x", "y", "z").mae[[str(run), str(other)]].isna().all()
    assert table("z").mae.isna().all()
    assert (table("z")["mae/decoder_depth"] == 4).all()


def test_a_mae_is_known_by_its_name_and_not_by_its_directorys():
    mae = make_mae(1)
    run = make_classifier(1, mae)
    mae.rename("runs/pretrain/mine")
    assert table("runs").mae[str(run)] == "runs/pretrain/mine"


def test_features_of_another_mae_of_that_name_are_refused():
    mae = make_mae(1)
    make_features(mae, 0.6, 0.5, model_digest="older")
    assert len(table("runs")) == 1
    make_classifier(1, mae)
    with pytest.raises(ValueError, match=r"mae_d4.* another MAE \(digest older\).*cls_s1.*digest of mae.*--overwrite"):
        table("runs")
    change(Path("runs/classifier/cls_s1_from_mae_d4_random_r0.75_s1"), "parent", digest=None)
    assert len(table("runs")) == 2


def test_features_are_a_maes_own_on_its_own_images_and_of_two_those_with_most_rows():
    mae = make_mae(1)
    make_features(mae, 0.6, 0.5, settings={"dataset": "other", "train_images": None})
    assert "linear/acc" not in table("runs")
    make_features(mae, 0.6, 0.5, layers=(2,)).rename(mae / "z_features.json")
    make_features(mae, 0.7, 0.5)
    assert table("runs")["linear/acc"].tolist() == [0.7]
    run = make_classifier(1)
    make_features(mae, 0.9, 0.9).rename(run / "features.json")
    assert table("runs/classifier").kind.tolist() == ["classifier"]  # a classifier's are not a MAE's
    assert "linear/acc" not in table("runs/classifier")


def test_a_run_from_before_a_flag_was_there_has_its_default():
    old, new = make_mae(1), make_mae(2, norm_pix_loss=True)
    config = (old / "config.json").read_text()
    (old / "config.json").write_text(config.replace('"norm_pix_loss": false, ', ""))
    make_classifier(1, old)
    runs = table("runs")
    assert [runs.norm_pix_loss[str(run)] for run in (old, new)] == [False, True]
    assert runs["mae/norm_pix_loss"].dropna().tolist() == [False]


def test_weights_from_elsewhere_are_told_apart_and_are_given_no_settings_of_ours():
    mae = make_mae(1)
    runs = [make_classifier(seed, mae, end=end) for end in ("good", "other") for seed in (1, 2)]
    for run in runs:
        name = run.name.split("_")[1]
        parent = {
            "name": "vit",
            "digest": f"digest of {name}",
            "layout": "official or timm",
            "settings": {"embed_dim": 24},
        }
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"parent": parent}))
    found = table("runs").loc[[str(run) for run in runs]].dropna(axis=1)
    assert {name: found[name].unique().tolist() for name in found if name.startswith("mae/")} == {
        "mae/embed_dim": [24],
        "mae/weights": ["vit digest of good", "vit digest of other"],
    }
    entries, settings = entries_of(table(*runs))
    assert entries.seed.tolist() == [1, 2, 1, 2]
    assert what_varies(settings) == ["weights"]


def test_the_accuracy_watched_is_of_held_out_images_where_all_have_it():
    val, test = [{"val/acc": 0.5, "test/acc": float("nan")}], [{"test/acc": 0.5}]
    assert results.common_accuracy([val, val]) == "val/acc"
    assert results.common_accuracy([val, test]) == results.common_accuracy([test]) == "test/acc"
    assert results.common_accuracy([[{"probe/knn_acc": 0.5}]]) == "probe/knn_acc"
    assert results.common_accuracy([test, [{"train/loss": 0.5}]]) is None


def test_the_kept_runs_are_all_read_and_finished_but_two_that_the_clock_stopped():
    kept = Path(__file__).parents[1]
    records = find_runs(kept / "logs" / "report", kept / "pretrained")
    assert len(records) >= 177
    stopped = [record for record in records if not record.finished]
    assert sorted((len(record.metrics), record.settings["total_epoch"]) for record in stopped) == [(4, 22), (42, 44)]
    assert all(record.name == record.directory.name for record in records if record.directory.parent.name == "pretrain")
