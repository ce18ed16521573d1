"""The benchmark, on tiny models, its processes forked from the server that has imported torch."""

import csv
import json
import multiprocessing
import shlex
from pathlib import Path

import pytest
import torch

import utils
from model import MAE_ViT
from scripts import benchmark


@pytest.fixture(autouse=True)
def quick_processes(server, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "PROCESSES", "forkserver")
    monkeypatch.chdir(tmp_path)


def test_the_benchmark_times_paths_in_turn_and_several_processes_of_one(capsys, monkeypatch):
    asked = []  # fp16 takes minutes on a CPU without such arithmetic
    matmul_gflops = benchmark.matmul_gflops
    monkeypatch.setattr(benchmark, "matmul_gflops", lambda *args: asked.append(args[1]) or matmul_gflops(*args))
    paths = ["ours", "ours, decoder of half the width", "ours float32, a process a core", "fine-tuning"]
    torch.set_num_threads(2)  # a core each
    benchmark.main([*shlex.split("--batch_size 8 --seconds 0 --embed_dim 12 --device cpu --output b --paths"), *paths])
    with open("b/steps.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert list(rows) == paths
    assert asked == ["float32"]
    assert {row["precision"] for row in rows.values()} == {"float32"}  # at this width
    assert all(float(row["images_per_sec"]) == pytest.approx(8 / float(row["median_step_s"])) for row in rows.values())
    assert all(0 < float(row["share_of_peak"]) < 1 for row in rows.values())
    assert float(rows[paths[2]]["memory_mb"]) > 0
    assert float(rows[paths[1]]["gflop_per_image"]) < 0.8 * float(rows["ours"]["gflop_per_image"])
    assert json.loads(Path("b/steps.json").read_text())["torch"] == torch.__version__
    assert "share_of_peak" in capsys.readouterr().out


def test_a_path_of_the_benchmark_that_dies_is_named_and_ends_the_others(monkeypatch):
    monkeypatch.setitem(benchmark.PATHS, "gone", benchmark.PATHS["ours"])  # unknown in the process it starts
    sizes = {"ours": 8, "gone": 8}
    with pytest.raises(ValueError, match="The process of 'gone' has ended"):
        benchmark.measure(sizes, torch.device("cpu"), {**utils.defaults(MAE_ViT), "embed_dim": 12}, seconds=0)
    for process in multiprocessing.active_children():
        process.join(10)
        assert process.exitcode is not None


def test_one_of_a_paths_processes_that_dies_is_not_waited_for_behind_the_others():
    (alive, _), (dead, end) = (multiprocessing.Pipe() for _ in range(2))
    end.close()
    with pytest.raises(ValueError, match="has ended"):
        benchmark.replies("two", [alive, dead])
