"""The benchmark: each path's steps on tiny models, and what is made of their seconds."""

import csv
import json
import shlex
import statistics
from pathlib import Path

import pytest
import torch

from scripts import benchmark
from scripts.benchmark import PATHS, take_steps
from scripts.cost import gflop_per_image

FLAGS = "--dataset shapes --device cpu --img_size 16 --patch_size 8 --embed_dim 12 --encoder_depth 1 --num_heads 2"
FLAGS = [*shlex.split(FLAGS), "--batch_size", "8"]
SLOW = {"huggingface", "lightly"}  # to import


@pytest.fixture(autouse=True)
def elsewhere(empty_directory, few_shapes):
    """Draw few images."""


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


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path in SLOW else []) for path in PATHS if "compiled" not in path],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_path_takes_steps_that_train_and_tells_what_they_cost(path, monkeypatch):
    pytest.importorskip(PATHS[path].needs)
    models, made = [], torch.optim.AdamW.__init__

    def noting(optimizer, *arguments, **options):  # Muon's, too
        made(optimizer, *arguments, **options)
        models.append([(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "__init__", noting)
    found = take_steps(path, 0, [*PATHS[path].flags.split(), *FLAGS])
    assert len(found["seconds"]) >= 3
    assert min(found["seconds"]) > 0
    assert found["precision"] == "float32"  # at this width
    assert found["gflop_per_image"] > 0
    assert any((parameter != before).any() for parameter, before in models[0])


def answer(path, flags, seconds):
    """What a path may have told, its first step slow."""
    asked.append((path, flags, seconds))
    batch_size = int(flags[len(flags) - flags[::-1].index("--batch_size")])
    found = {"precision": "float32", "batch_size": batch_size, "gflop_per_image": 2.0, "memory_mb": 7.0}
    return {"seconds": [9.0, 0.5, 0.1 * len(asked)], **found}


asked = []


@pytest.fixture
def answers(monkeypatch):
    asked.clear()
    monkeypatch.setattr(benchmark, "take_turn", answer)
    monkeypatch.setattr(benchmark, "matmul_gflops", lambda *_: 100.0)


def test_the_paths_take_turns_and_each_has_a_row(answers, capsys):
    flags = ["--patch_size", "4", "--batch_size", "48"]
    benchmark.main(["--paths", "naive", "ours", "--seconds", "6", "--device", "cpu", "--output", "deep/b", *flags])
    assert [(path, seconds) for path, _, seconds in asked] == [
        (path, 2.0) for _ in range(3) for path in ("naive", "ours")
    ]
    assert all(
        words[-6:] == [*flags, "--device", "cpu"] for _, words, _ in asked
    )  # after a path's own, so that they count
    with open("deep/b/steps.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["naive", "ours"]
    for i, row in enumerate(rows.values()):
        median = statistics.median([0.5] * 3 + [0.1 * (2 * turn + i + 1) for turn in range(3)])
        assert float(row["images_per_sec"]) == pytest.approx(48 / median)
        assert float(row["share_of_peak"]) == pytest.approx(48 / median * 2 / 100)
        assert (row["steps"], float(row["first_step_s"]), float(row["memory_mb"])) == ("6", 9, 7)
    assert json.loads(Path("deep/b/steps.json").read_text())["torch"] == torch.__version__
    assert "share_of_peak" in capsys.readouterr().out


def test_a_path_whose_package_is_missing_is_left_out(answers, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lightly" else True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    benchmark.main(["--paths", "lightly", "ours", "--device", "cpu", "--output", "b"])
    assert {path for path, _, _ in asked} == {"ours"}
    assert "pip install lightly" in capsys.readouterr().out


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
def test_a_path_of_several_processes_is_one_turn():
    torch.set_num_threads(2)  # a process each
    found = benchmark.take_turn("ours_float32_per_core", FLAGS, 0)
    assert found.keys() == {"seconds", "precision", "batch_size", "gflop_per_image", "memory_mb"}
    assert len(found["seconds"]) >= 3


@pytest.mark.slow
def test_a_path_that_ends_is_named(capfd):
    with pytest.raises(ValueError, match=r"naive has ended.*--batch_size.*--paths"):
        benchmark.take_turn("naive", [*FLAGS, "--embed_dim", "13"], 0)
    assert "embed_dim" in capfd.readouterr().err


def test_a_flag_that_one_path_does_not_have_is_told_before_anything_is_timed(answers, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--paths", "ours", "tuning", "--device", "cpu", "--decoder_depth", "4"])
    assert "unrecognized arguments: --decoder_depth" in capsys.readouterr().err
    assert not asked
