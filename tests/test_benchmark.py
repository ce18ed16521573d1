"""The benchmark: each path's steps on tiny models, and what is made of their seconds."""

import csv
import json
import statistics
from pathlib import Path

import pytest
import torch

from engine.figures import plt
from scripts import benchmark
from scripts.benchmark_paths import PATHS, take_steps
from scripts.cost import gflop_per_image

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "encoder_depth": 1, "num_heads": 2, "batch_size": 8}
SLOW = {"huggingface", "lightly"}  # to import


@pytest.fixture(autouse=True)
def images(monkeypatch, tmp_path):
    """Work in an empty directory; flags of a tiny model and of images for it."""
    monkeypatch.chdir(tmp_path)
    benchmark.write_images("images.npz", 16)
    return {**SIZES, "dataset": "npz", "data_dir": str(tmp_path / "images.npz"), "device": "cpu"}


def matrix_flop(tokens, width, depth):
    """Forward pass of transformer blocks: 2 for each weight and token; keys by queries, and weights by values."""
    return depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


@pytest.mark.parametrize("width", [None, 24])
def test_the_cost_counts_the_matrix_products_of_a_step(width):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "encoder_depth": 2, "num_heads": 3, "decoder_depth": 1}
    flop = 3 * matrix_flop(1 + 4, 12, 2) + 2 * 2 * 4 * 48 * 12  # pixels need no gradient
    flop += 3 * (matrix_flop(1 + 16, width or 12, 1) + 2 * 16 * 48 * (width or 12))
    flop += 3 * 2 * 5 * 12 * width if width else 0  # from the encoder's width to the decoder's
    settings = {**sizes, "decoder_embed_dim": width, "total_epoch": 3, "mask_strategy": "grid"}
    assert gflop_per_image(settings, "mae") == pytest.approx(flop / 1e9)
    whole = 3 * (matrix_flop(1 + 16, 12, 2) + 2 * 12 * 10) + 2 * 2 * 16 * 48 * 12
    last = 3 * (2 * 16 * 10 * 12**2 + 2 * 2 * 17 * 16 * 12)  # its queries, projection and MLP are of one token
    assert gflop_per_image({**settings, "num_classes": 10}, "classifier") == pytest.approx((whole - last) / 1e9)


def as_words(flags):
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path in SLOW else []) for path in PATHS if "compiled" not in path],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_path_takes_steps_that_train_and_tells_what_they_cost(path, images, monkeypatch):
    pytest.importorskip(PATHS[path].needs)
    models, optimizer = [], torch.optim.AdamW

    def noting(parameters, **options):
        made = optimizer(parameters, **options)
        models.append([(p, p.detach().clone()) for group in made.param_groups for p in group["params"]])
        return made

    monkeypatch.setattr(torch.optim, "AdamW", noting)
    found = take_steps(path, 0, [*PATHS[path].flags.split(), *as_words(images)])
    assert len(found["seconds"]) >= 3
    assert min(found["seconds"]) > 0
    assert found["precision"] == "float32"  # at this width
    assert found["gflop_per_image"] > 0
    assert any((parameter != before).any() for parameter, before in models[0])


def answer(path, flags, seconds):
    """What a path may have told, its first step slow."""
    asked.append((path, flags["batch_size"], seconds))
    return {"seconds": [9.0, 0.5, 0.1 * len(asked)], "precision": "float32", "gflop_per_image": 2.0, "memory_mb": 7.0}


asked = []


@pytest.fixture
def answers(monkeypatch):
    asked.clear()
    monkeypatch.setattr(benchmark, "take_turn", answer)
    monkeypatch.setattr(benchmark, "matmul_gflops", lambda *_: 100.0)


def test_the_paths_take_turns_and_each_has_a_row(answers, capsys):
    benchmark.main(["--paths", "naive", "ours", "--seconds", "6", "--device", "cpu", "--output", "deep/b"])
    assert asked == [(path, 64, 2.0) for _ in range(3) for path in ("naive", "ours")]
    with open("deep/b/steps.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["naive", "ours"]
    for i, row in enumerate(rows.values()):
        median = statistics.median([0.5] * 3 + [0.1 * (2 * turn + i + 1) for turn in range(3)])
        assert float(row["images_per_sec"]) == pytest.approx(64 / median)
        assert float(row["share_of_peak"]) == pytest.approx(64 / median * 2 / 100)
        assert (row["steps"], float(row["first_step_s"]), float(row["memory_mb"])) == ("6", 9, 7)
    assert json.loads(Path("deep/b/steps.json").read_text())["torch"] == torch.__version__
    assert "share_of_peak" in capsys.readouterr().out


def test_a_path_whose_package_is_missing_is_left_out(answers, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lightly" else True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    benchmark.main(["--paths", "lightly", "ours", "--device", "cpu", "--output", "b"])
    assert {path for path, _, _ in asked} == {"ours"}
    assert "pip install lightly" in capsys.readouterr().out


@pytest.mark.slow
def test_the_growth_of_the_cost_is_a_table_and_a_picture(answers):
    benchmark.main(["--growth", "--device", "cpu", "--output", "b"])
    with open("b/growth.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(asked) == 16
    assert [int(row["batch_size"]) for row in rows if row["varied"] == "batch_size"] == [2**n for n in range(3, 11)]
    assert all(float(row["ms_per_image"]) == pytest.approx(1000 / float(row["images_per_sec"])) for row in rows)
    assert plt.imread("b/growth.png").shape[1] > 1000


def test_a_place_that_cannot_be_written_is_told_before_anything_is_timed(answers, capsys):
    Path("file").touch()
    with pytest.raises(SystemExit) as leaving:
        benchmark.main(["--output", "file/b"])
    assert leaving.value.code == 2
    assert "file" in capsys.readouterr().err
    assert not asked


@pytest.mark.slow
def test_the_machines_arithmetic_is_measured():
    assert benchmark.matmul_gflops(torch.device("cpu"), "float32") > 1


@pytest.mark.slow
def test_a_path_of_several_processes_is_one_turn(images):
    torch.set_num_threads(2)  # a process each
    found = benchmark.take_turn("ours float32, a process a core", images, 0)
    assert found.keys() == {"seconds", "precision", "gflop_per_image", "memory_mb"}
    assert len(found["seconds"]) >= 3


@pytest.mark.slow
def test_a_path_that_ends_is_named(images, capfd):
    with pytest.raises(ValueError, match=r"'naive' has ended.*--batch_size.*--paths"):
        benchmark.take_turn("naive", {**images, "data_dir": "nowhere.npz"}, 0)
    assert "nowhere.npz" in capfd.readouterr().err
