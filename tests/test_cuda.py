"""What only a GPU can show: training there as on a CPU, precisions, compiled steps, continuing, where images live."""

import shlex

import pytest
import torch
from starting import interrupt

import mae_pretrain
import train_classifier
from engine.checkpoints import load_file
from engine.device import generator, peak_memory_mb
from engine.records import read_config, read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SIZE = "--patch_size 8 --embed_dim 32 --encoder_depth 2 --num_heads 2"
SET = "--dataset shapes --train_images 200 --batch_size 20 --total_epoch 2 --base_learning_rate 1e-2"


@pytest.fixture(autouse=True)
def in_an_empty_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def pretrain(more):
    flags = f"{SIZE} --decoder_depth 1 {SET} --device cuda {more}"
    return mae_pretrain.pretrain(mae_pretrain.parse_args(shlex.split(flags)))


def classify(more):
    flags = f"{SIZE} {SET} --device cuda {more}"
    return train_classifier.train_classifier(train_classifier.parse_args(shlex.split(flags)))


def largest_difference(one, other):
    """Between the weights of two runs."""
    one, other = load_file(one)["model"], load_file(other)["model"]
    return max((one[name] - other[name]).abs().max().item() for name in one)


def losses(run):
    return [row["train/loss"] for row in read_metrics(run)]


both_scripts = pytest.mark.parametrize("start", [pretrain, classify])


def test_a_classifier_trains_as_on_a_cpu():
    gpu = classify("--precision float32 --log_dir gpu")
    cpu = classify("--precision float32 --log_dir cpu --device cpu")
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-3)
    assert read_config(gpu)["starts"][-1]["processor"] == torch.cuda.get_device_name(0)


@both_scripts
@pytest.mark.parametrize(
    "how", ["--precision fp16", "--precision bf16", "--precision auto --compile --max_device_batch_size 5"]
)
def test_losses_are_about_those_of_float32(start, how, capsys):
    if "bf16" in how and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("too old a GPU for bf16")
    fast, plain = start(f"{how} --log_dir fast"), start("--precision float32 --log_dir plain")
    assert losses(fast) == pytest.approx(losses(plain), rel=0.05)


@both_scripts
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_cuda_graphs_have_the_losses_of_eager_steps(start, precision, monkeypatch):
    modes, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: modes.append(how["mode"]) or compile_(f, **how))
    flags = f"--augment shift --precision {precision}"
    graphs, eager = start(f"{flags} --compile --log_dir graphs"), start(f"{flags} --no-compile --log_dir eager")
    assert modes == ["reduce-overhead"]
    assert losses(graphs) == pytest.approx(losses(eager), rel=1e-4 if precision == "float32" else 0.02)


@both_scripts
@pytest.mark.parametrize("precision", ["float32", "fp16", "auto"])
def test_a_stopped_run_goes_on_as_if_it_had_not(start, precision, monkeypatch):
    flags = f"--augment shift --precision {precision}"
    whole = start(f"{flags} --log_dir whole")
    steps = interrupt(monkeypatch, 13)
    with pytest.raises(SystemExit):
        start(f"{flags} --log_dir parts")
    parts = start(f"{flags} --log_dir parts")
    assert len(steps) == 20
    assert largest_difference(whole, parts) < 1e-3 < largest_difference(whole, start(f"{flags} --seed 1"))


@both_scripts
def test_its_files_hold_cpu_tensors(start):
    run = start("")
    for name in ("model.pt", "checkpoint.pt"):
        assert "cuda" not in repr(torch.load(run / name, weights_only=True))


def test_a_generator_follows_from_its_key():
    gpu = torch.device("cuda")
    one, same, other = (
        torch.rand(9, generator=generator(gpu, step, "masks"), device=gpu).tolist() for step in (1, 1, 2)
    )
    assert one == same != other


def test_evaluating_takes_no_more_memory_than_training():
    torch.cuda.reset_peak_memory_stats()
    run = classify("--max_device_batch_size 4 --img_size 64 --patch_size 4 --total_epoch 1")
    trained = read_metrics(run)[-1]["memory/peak_mb"]  # noted before the epoch's evaluation
    assert peak_memory_mb(torch.device("cuda")) <= 1.05 * trained
