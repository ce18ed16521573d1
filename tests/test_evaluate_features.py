"""evaluate_features.py as a user starts it, on tiny models of fresh weights."""

import csv
import json
import re
import runpy
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate_features
from engine import features
from engine.checkpoints import save_file
from engine.device import generator
from engine.figures import plt
from evaluate_features import main
from images import load
from images.pixels import normalize
from model import MAE_ViT, ViT_Classifier

ROOT = Path(__file__).parents[1]
SIZE = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "encoder_depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    """Work in an empty directory; drawn training sets of 60 images and test sets of 150, so that batches are uneven."""
    draw = load.shapes
    monkeypatch.setattr(load, "shapes", lambda count, img_size, seed: draw(60 + 90 * seed, img_size, seed))
    monkeypatch.chdir(tmp_path)


def save_model(path, kind=MAE_ViT, seed=0, **trained_on):
    torch.manual_seed(seed)
    model = kind(**SIZE)
    content = {"kind": kind.__name__, "model_args": SIZE, "model": model.state_dict(), "name": Path(path).stem}
    content |= {"settings": {}, "parent": None, "dataset": "shapes", "data_dir": "data"}
    save_file(path, {**content, **trained_on})
    return model


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def untimed(path):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in read_table(path)]


def test_the_table_is_of_the_models_features_and_stands_beside_it(capsys):
    model = save_model("run/model.pt").eval()
    main(["--model_path", "run", "--device", "cpu", "--save", "deep/features.npz"])
    rows = read_table("run/features.csv")
    assert [(row["encoder"], row["layer"], row["pool"]) for row in rows] == [
        ("trained", "3", "cls"),
        ("trained", "3", "mean"),
    ]
    train, test = load.load_dataset("shapes", "data", 16)
    with np.load("deep/features.npz") as stored:
        saved = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "classes"}
        assert stored["classes"].tolist() == train.classes
    assert torch.equal(saved["train_labels"], train.labels)
    assert torch.equal(saved["test_labels"], test.labels)
    with torch.no_grad():
        tokens = {part: model.encoder(normalize(of.images)) for part, of in (("train", train), ("test", test))}
    shown = capsys.readouterr().out
    for row in rows:
        x, queries = (saved[f"{part}_{row['pool']}_3"] for part in ("train", "test"))
        for part, found in (("train", x), ("test", queries)):
            torch.testing.assert_close(found, features.POOLS[row["pool"]](tokens[part]), rtol=1e-5, atol=1e-5)
        predicted = features.knn_predict(x, train.labels, queries, 10)
        assert float(row["knn/acc"]) == (predicted == test.labels).double().mean().item()
        held_out = generator("cpu", 42, "held out")
        predicted, weight_decay = features.linear_probe(x, train.labels, queries, 10, held_out)
        assert float(row["linear/acc"]) == (predicted == test.labels).double().mean().item()
        assert float(row["linear/weight_decay"]) == weight_decay
        assert all(0 < float(row[f"{name}/seconds"]) < 60 for name in ("knn", "linear"))
        line = next(line for line in shown.splitlines() if line.split()[:3] == ["trained", "3", row["pool"]])
        assert line.split()[3:5] == [f"{float(row[name]):.2%}" for name in ("knn/acc", "linear/acc")]
    facts = json.loads(Path("run/features.json").read_text())
    assert (facts["train_images"], facts["test_images"], facts["kind"]) == (60, 150, "MAE_ViT")
    assert facts["rows"][1]["knn/acc"] == float(rows[1]["knn/acc"])
    assert facts.keys() >= {"command", "commit", "precision", "device", "seconds", "memory/peak_mb", "test_set"}
    settings = {"dataset": "shapes", "train_images": None, "layers": "last", "pool": ["cls", "mean"]}
    assert facts["settings"] == settings | {"untrained": False, "seed": 42, "label_seed": None, "img_size": None}
    assert not Path("run/features.png").exists()


def test_every_block_is_measured_and_drawn_beside_an_untrained_encoder(monkeypatch):
    save_model("run/model.pt", seed=1)
    drawn, seeds = [], set()

    def noting(*arguments):
        assert not torch.is_autocast_enabled("cpu")
        seeds.add(arguments[-1].initial_seed())
        return features.linear_probe(*arguments)

    monkeypatch.setattr(evaluate_features, "linear_probe", noting)
    monkeypatch.setattr(evaluate_features, "save", lambda figure, path: drawn.append((figure, path)))
    command = ["--layers", "all", "--seed", "5", "--precision", "bf16", "--save", "features.npz"]
    main(["--model_path", "run", "--untrained", *command])
    assert seeds == {generator("cpu", 5, "held out").initial_seed()}
    with np.load("features.npz") as one:
        both = {name: one[name] for name in one.files}
    main(["--model_path", "run/model.pt", *command])
    with np.load("features.npz") as one:
        assert sorted(one.files) == sorted(both)  # the trained encoder's only
        assert all((one[name] == both[name]).all() for name in one.files)
    rows = read_table("run/features.csv")
    expected = [(name, k, pool) for name in ("trained", "untrained") for k in "123" for pool in ("cls", "mean")]
    assert [(row["encoder"], row["layer"], row["pool"]) for row in rows] == expected
    figure, path = drawn[0]
    assert path == Path("run/features.png")
    for axes, name in zip(figure.axes, ("linear/acc", "knn/acc"), strict=True):
        assert axes.get_xlabel() == "encoder block"
        lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for encoder, pool in {(row["encoder"], row["pool"]) for row in rows}:
            mine = [row for row in rows if (row["encoder"], row["pool"]) == (encoder, pool)]
            assert lines[f"{encoder}, {pool}"] == ([1, 2, 3], [float(row[name]) for row in mine])
    plt.close("all")
    save_model("fresh.pt", seed=5)  # what an untrained one is
    main(["--model_path", "fresh.pt", "--layers", "all", "--seed", "5", "--precision", "bf16"])
    measured = [list(row.values())[1:] for row in untimed("fresh_features.csv")]
    assert measured == [list(row.values())[1:] for row in untimed("run/features.csv")[6:]]


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers_whatever_fits_into_memory(monkeypatch):
    save_model("run/model.pt")
    command = ["--model_path", "run", "--layers", "all", "--save"]
    monkeypatch.setattr(evaluate_features, "save", lambda figure, path: plt.close(figure))
    main([*command, "one.npz"])
    once, passes = untimed("run/features.csv"), []
    extract = evaluate_features.extract_features

    def noting(encoder, images, prepare, layers, *rest):
        passes.append((len(images), layers))
        return extract(encoder, images, prepare, layers, *rest)

    monkeypatch.setattr(evaluate_features, "extract_features", noting)
    layer_bytes = 210 * 12 * 2 * 4
    for limit, groups in [(1, [[1], [2], [3]]), (3 * layer_bytes - 1, [[1, 2], [3]]), (3 * layer_bytes, [[1, 2, 3]])]:
        monkeypatch.setattr(evaluate_features, "CACHE_BYTES", limit)
        passes.clear()
        main([*command, "more.npz"])
        assert untimed("run/features.csv") == once
        assert passes == [(count, group) for group in groups for count in (60, 150)]
        with np.load("one.npz") as one, np.load("more.npz") as more:
            assert sorted(one.files) == sorted(more.files)
            assert len(one.files) == 3 * 2 * 2 + 3
            assert all((one[name] == more[name]).all() for name in one.files)


def test_several_models_of_both_kinds_have_their_own_files():
    save_model("mae/model.pt")
    save_model("made/cls.pt", ViT_Classifier, classes=["whatever"] * 10)
    main(["--model_path", "mae", "made/cls.pt", "--pool", "mean", "--train_images", "20", "--dataset", "shapes"])
    places = ("mae/features_shapes_20.json", "made/cls_features_shapes_20.json")
    mae, classifier = (json.loads(Path(place).read_text()) for place in places)
    assert (mae["kind"], classifier["kind"]) == ("MAE_ViT", "ViT_Classifier")
    assert mae["train_images"] == classifier["train_images"] == 20
    assert [row["pool"] for row in classifier["rows"]] == ["mean"]
    assert mae["model_digest"] != classifier["model_digest"]


def test_few_labels_are_drawn_by_the_seed_unless_a_label_seed_fixes_them():
    save_model("mae/model.pt")

    def measured(*flags):
        main(["--model_path", "mae", "--pool", "mean", "--train_images", "20", *flags])
        drawn = f"_draw{flags[-1]}" if "--label_seed" in flags else ""
        return json.loads(Path(f"mae/features_20{drawn}.json").read_text())["images"]

    assert measured() == measured("--label_seed", "42") == measured("--seed", "1", "--label_seed", "42")
    assert len({measured(), measured("--seed", "1"), measured("--label_seed", "2")}) == 3


@pytest.mark.slow
def test_what_is_measured_is_passed_over_until_the_model_or_the_command_changes(capsys, monkeypatch):
    monkeypatch.setattr(evaluate_features, "save", lambda figure, path: (plt.close(figure), path.touch()))  # quick
    save_model("run/model.pt")
    measured = Path("run/features.json")

    def measures(*arguments):
        before = measured.read_bytes() if measured.exists() else None
        main(["--model_path", "run", *arguments])
        shown = capsys.readouterr().out
        assert "run/features.csv" in shown
        passed_over = measured.read_bytes() == before
        assert passed_over != ("k-NN" in shown)
        return not passed_over

    assert [measures(), measures(), measures("--device", "cpu"), measures("--overwrite")] == [True, False, False, True]
    assert [measures("--seed", "1"), measures("--layers", "all"), measures("--save", "a.npz")] == [True, True, True]
    assert measures("--layers", "all")
    assert [measures(), measures("--pool", "mean")] == [False, False]  # the fuller table stays
    assert Path("run/features.png").exists()
    assert [measures("--untrained"), measures("--layers", "all", "--pool", "mean")] == [True, True]
    assert measures("--untrained")
    assert not Path("run/features.png").exists()  # it was of another table
    save_model("run/model.pt", seed=1)
    assert [measures(), measures()] == [True, False]
    save_model("run/model.pt", seed=1, model_args={**SIZE, "num_heads": 1})  # the same weights
    assert [measures(), measures()] == [True, False]
    for text in ("{", "{}", "[]", '{"settings": {}}'):
        measured.write_text(text)
        with pytest.raises(SystemExit):
            main(["--model_path", "run"])
        assert re.search("run/features.json.*--overwrite", capsys.readouterr().err)
    measures("--overwrite")


def test_the_table_goes_to_another_directory_where_that_is_asked_for():
    save_model("run/model.pt")
    save_model("cls.pt", ViT_Classifier, classes=["whatever"] * 10)
    main(["--model_path", "run", "--output", "deep/mae"])
    main(["--model_path", "cls.pt", "--output", "deep/cls", "--pool", "mean"])
    main(["--model_path", "cls.pt", "--pool", "mean"])
    assert not list(Path("run").glob("*features*"))
    assert {path.name for path in Path("deep/mae").iterdir()} == {"features.csv", "features.json"}
    assert untimed("deep/cls/cls_features.csv") == untimed("cls_features.csv")


@pytest.mark.parametrize("arguments", ["--output file", "--output file/deep", "--save file/a.npz", ""])
def test_where_nothing_can_be_written_nothing_is_measured(arguments, capsys, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system", str(dir))

    save_model("run/model.pt")
    Path("file").touch()
    monkeypatch.setattr(evaluate_features, "extract_features", None)
    if not arguments:
        monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(SystemExit) as leaving:
        main(["--model_path", "run", *shlex.split(arguments)])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert re.search(r"(file|'run').*--output", error), error


def bad_files():
    Path("text.pt").write_text("not a checkpoint")
    save_file("checkpoint.pt", {"kind": "checkpoint"})
    save_model("mae.pt")
    save_model("nan.pt")
    content = torch.load("nan.pt")
    content["model"]["encoder.cls_token"][:] = torch.nan
    save_file("nan.pt", content)
    for name in ("train/a", "train/b", "test"):
        Path("pets", name).mkdir(parents=True)
        if name != "test":
            plt.imsave(f"pets/{name}/0.png", np.zeros((16, 16, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--model_path"),
        ("--model_path nowhere.pt", "nowhere.pt"),
        ("--model_path mae.pt text.pt", "text.pt"),
        ("--model_path checkpoint.pt", "checkpoint.pt.*MAE_ViT or ViT_Classifier"),
        ("--model_path mae.pt mae.pt --save a.npz", "--save.*one model.*2"),
        ("--model_path mae.pt mae.pt --output there", "--output.*one model.*2"),
        ("--model_path mae.pt --dataset folder --data_dir pets", "pets/test"),
        ("--model_path mae.pt --train_images 7", "--train_images 7.*10 classes"),
        ("--model_path mae.pt --layers 4", "--layers.*'4'.*last.*all"),
        ("--model_path mae.pt --pool max", "--pool.*'max'.*cls.*mean"),
        ("--model_path mae.pt --device cuda:7", "cuda:7"),
        ("--model_path nan.pt", "infinite or nan.*--precision float32"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_no_table(arguments, message, capsys, monkeypatch):
    bad_files()
    monkeypatch.setattr(sys, "argv", ["evaluate_features.py"])
    with pytest.raises(SystemExit) as leaving:
        main(shlex.split(arguments))
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("evaluate_features.py: error: ")
    assert re.search(message, error), error
    assert not list(Path().rglob("*features*"))
    assert not list(Path().rglob("*.npz*"))


def test_help_shows_every_flag_and_the_commands_above_have_flags_that_exist(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate_features.py", "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / "evaluate_features.py"), run_name="__main__")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert "(default: None)" not in text
    commands = re.findall(r"^python evaluate_features.py (.*)$", evaluate_features.__doc__, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        evaluate_features.parse_args(shlex.split(command))
