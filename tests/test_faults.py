"""What a run survives: kills, a full disk, damage, a second writer, lost processes, foreign files, any arguments.

Runs happen in real processes, forked from a server that has imported torch once.
"""

import importlib
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mae_pretrain
import train_classifier
import visualize_predictions
from engine import run as runs
from engine.checkpoints import load_file, load_model, save_file
from engine.records import read_config, read_metrics
from engine.run import Run
from images import load
from images.pixels import ImageSet
from images.shapes import shapes
from masks import MASK_STRATEGIES
from model import MAE_ViT, PatchShuffle, ViT_Classifier

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
MAE, CLS, VIS = "mae_pretrain", "train_classifier", "visualize_predictions"
SIZE = "--patch_size 8 --embed_dim 12 --encoder_depth 1 --num_heads 2 --device cpu"
SET = "--dataset shapes --train_images 80 --batch_size 8 --base_learning_rate 0.05"
COMMAND = {MAE: f"{SIZE} --decoder_depth 1 {SET} --total_epoch 5", CLS: f"{SIZE} {SET} --total_epoch 5"}
OFFICIAL = "--preset official --encoder_depth 2 --drop_path 0.5 --clip_grad 1"  # a first block is never dropped
RUNS = [
    (MAE, "--precision float32"),
    (MAE, "--precision bf16 --max_device_batch_size 4"),
    (MAE, "--precision fp16 --mask_strategy blockwise --max_device_batch_size 3 --augment shift"),
    (CLS, f"--precision bf16 --max_device_batch_size 4 {OFFICIAL}"),
    (CLS, f"--optimizer muon --precision fp16 --max_device_batch_size 4 {OFFICIAL}"),
    (CLS, "--precision float32 --augment shift --train_images 60 --val_images 20 --total_epoch 8"),
]
TIMING = {"seconds", "speed/images_per_sec", "memory/peak_mb"}


def run_script(
    script, arguments, directory, images=80, save_every_step=True, environment=(), file_limit=None, memory=None
):
    """The body of a process: the script with these arguments, few drawn images, its output in directory/output."""
    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    torch.set_num_threads(1)
    load.shapes = lambda count, img_size, seed: shapes(min(count, images), img_size, seed)
    if save_every_step:
        runs.SAVE_INTERVAL = runs.LEAST_SAVE_INTERVAL = 0
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if memory:  # bytes more than are in use now
        limit = memory + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.argv = [f"{script}.py"]
    importlib.import_module(script).main(shlex.split(arguments))


@pytest.fixture
def start(server, tmp_path):
    """Start a script; what still lives at the end of the test is killed."""
    started = []

    def start(*arguments, **options):
        process = server.Process(target=run_script, args=arguments, kwargs={"directory": tmp_path, **options})
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def ends(process, seconds=60):
    """Its exit code."""
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def until(condition, seconds=60):
    """Wait for a condition; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)
    return value


def until_saved(directory, times):
    """Wait until checkpoint.pt of the only run there has been replaced so many times; its path."""
    versions = set()

    def enough():
        versions.update(path.stat().st_mtime_ns for path in directory.glob("*/checkpoint.pt"))
        return len(versions) > times

    until(enough)
    return only_run(directory) / "checkpoint.pt"


def only_run(directory):
    return next(directory.glob("*/config.json")).parent


def same(one, other, tolerance=0.0):
    """Whether two finished runs have the same weights and the same metrics, but for the timing.

    With a tolerance not in probe/knn_acc: a rounding can change a whole answer.
    """
    weights, others = load_file(one)["model"], load_file(other)["model"]
    left_out = TIMING | ({"probe/knn_acc"} if tolerance else set())
    rows, other_rows = (
        [{key: value for key, value in row.items() if key not in left_out} for row in read_metrics(run)]
        for run in (one, other)
    )
    return (
        all(torch.allclose(weights[name], others[name], rtol=0, atol=tolerance) for name in weights)
        and len(rows) == len(other_rows)
        and all(
            row == pytest.approx(other, rel=0, abs=tolerance, nan_ok=True)
            for row, other in zip(rows, other_rows, strict=True)
        )
    )


# --- stops ---


@pytest.mark.parametrize(("script", "options"), RUNS)
def test_killed_six_times_a_run_ends_with_the_bits_of_one_that_was_not(script, options, start, tmp_path):
    command, draw = f"{COMMAND[script]} {options}", random.Random(options)
    whole = start(script, f"{command} --log_dir whole")
    done = (0, 0)
    for _ in range(6):
        victim = start(script, f"{command} --log_dir killed")
        checkpoint = until_saved(tmp_path / "killed", draw.randint(1, 4))
        time.sleep(draw.uniform(0, 0.02))
        victim.kill()
        assert ends(victim) == -signal.SIGKILL
        progress = load_file(checkpoint, "checkpoint")["progress"]
        assert (progress["epoch"], progress["step"]) >= done  # nothing lost
        done = progress["epoch"], progress["step"]
    assert not (checkpoint.parent / "model.pt").exists()
    assert ends(start(script, f"{command} --log_dir killed")) == 0
    assert ends(whole) == 0
    assert same(only_run(tmp_path / "whole"), only_run(tmp_path / "killed"))
    assert len(read_config(checkpoint.parent)["starts"]) == 7


def test_a_full_disk_ends_with_a_message_and_the_old_checkpoint_whole(start, tmp_path):
    whole = start(CLS, f"{COMMAND[CLS]} --log_dir whole")
    first = start(CLS, f"{COMMAND[CLS]} --log_dir full")
    checkpoint = until(lambda: next(tmp_path.glob("full/*/checkpoint.pt"), None))
    first.kill()
    first.join()
    before = checkpoint.read_bytes()
    full = start(CLS, f"{COMMAND[CLS]} --log_dir full", file_limit=len(before) // 2)
    assert ends(full) == 1
    output = (tmp_path / "output").read_text()
    assert re.search(r"Cannot write: .*File too large.*last good checkpoint has \d+ epochs? and \d+ steps?", output)
    assert "Traceback" not in output
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob("*.tmp"))
    assert ends(start(CLS, f"{COMMAND[CLS]} --log_dir full")) == 0
    assert ends(whole) == 0
    assert same(only_run(tmp_path / "whole"), only_run(tmp_path / "full"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to a limit on memory")
def test_a_run_out_of_memory_says_so_and_fits_in_smaller_parts(start, tmp_path):
    command = f"{COMMAND[MAE]} --patch_size 2 --embed_dim 256 --batch_size 80 --total_epoch 1"
    command += " --precision float32 --log_dir logs"
    assert ends(start(MAE, command, memory=600 * 2**20)) == 1
    assert re.search(r"\nOut of memory \(\d+ bytes more were asked for\)\. .*\n$", (tmp_path / "output").read_text())
    assert ends(start(MAE, f"{command} --max_device_batch_size 8", memory=600 * 2**20)) == 0


def test_a_second_process_on_a_run_is_refused_while_the_first_lives(start, tmp_path):
    command = f"{COMMAND[MAE]} --log_dir two"
    first = start(MAE, f"{command} --total_epoch 500")
    until(lambda: list(tmp_path.glob("two/*/checkpoint.pt")))
    assert ends(start(MAE, f"{command} --total_epoch 500")) == 2
    assert ends(start(MAE, f"{command} --total_epoch 500 --overwrite")) == 2
    assert (tmp_path / "output").read_text().count("error: Another process is at work on two/") == 2
    first.kill()
    first.join()
    heir = start(MAE, f"{command} --total_epoch 500")
    until(lambda: len(read_config(only_run(tmp_path / "two"))["starts"]) == 2)
    os.kill(heir.pid, signal.SIGTERM)
    assert ends(heir) == 128 + signal.SIGTERM


def test_a_run_whose_weights_burst_says_where(start, tmp_path):
    command = f"{COMMAND[CLS]} --base_learning_rate 1e30 --warmup_epoch 0 --log_dir burst"
    assert ends(start(CLS, command)) == 1
    output = (tmp_path / "output").read_text()
    assert re.search(r"(train/loss is (nan|inf)|A weight is infinite or nan) at epoch 1, by step \d+ \(lr ", output)
    assert "Traceback" not in output


# --- damage ---


def test_a_thousand_flipped_bytes_of_a_checkpoint_are_refused_or_harmless(start, tmp_path):
    assert ends(start(MAE, f"{COMMAND[MAE]} --log_dir flips --total_epoch 1")) == 0
    path = only_run(tmp_path / "flips") / "checkpoint.pt"
    whole, content, draw, refused = path.read_bytes(), load_file(path), random.Random(0), 0
    for position in draw.sample(range(len(whole)), 1000):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ draw.randint(1, 255)]) + whole[position + 1 :])
        try:
            found = load_file(path)
        except ValueError:
            refused += 1
        else:
            assert equal(content, found)
    assert refused > 300


def test_a_tensor_that_a_flipped_bit_makes_a_directory_is_refused(tmp_path):
    save_file(tmp_path / "a.pt", {"kind": "checkpoint", "weight": torch.ones(3)})
    whole = (tmp_path / "a.pt").read_bytes()
    attributes = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 1) + 38
    (tmp_path / "a.pt").write_bytes(whole[:attributes] + b"\x10" + whole[attributes + 1 :])
    with pytest.raises(ValueError, match="marked as a directory"):
        load_file(tmp_path / "a.pt")


def equal(one, other):
    """Whether nested dictionaries and lists of tensors and plain values are the same."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


class Payload:
    def __reduce__(self):
        return (os.system, ("touch was_run",))


def bad_model_files(directory):
    """Files that are no model of this program, in every way that came to mind, by name."""
    model_args = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "encoder_depth": 1, "num_heads": 2}
    content = {"kind": "MAE_ViT", "model_args": {**model_args, "decoder_depth": 1}}
    content |= {"name": "toy", "settings": {}, "parent": None, "dataset": "shapes", "data_dir": "data"}
    content["model"] = MAE_ViT(**content["model_args"]).state_dict()
    save_file(directory / "whole.pt", content)
    load_model(directory / "whole.pt", MAE_ViT, ViT_Classifier)
    whole = (directory / "whole.pt").read_bytes()
    middle = len(whole) // 2
    raw = {
        "empty": b"",
        "text": b"not a model",
        "zeros": bytes(5000),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "cut_start": whole[1000:],
        "cut_middle": whole[: middle - 100] + whole[middle + 100 :],
        "cut_half": whole[:middle],
        "cut_end": whole[:-1],
        "hole": whole[: middle - 2000] + bytes(4000) + whole[middle + 2000 :],
        "twice": whole[:middle] + whole,
    }
    for name, content_bytes in raw.items():
        (directory / f"{name}.pt").write_bytes(content_bytes)
    np.savez(directory / "numpy.npz", a=np.zeros(5))
    (directory / "folder.pt").mkdir()
    (directory / "dangling.pt").symlink_to(directory / "nowhere.pt")
    names = [*(f"{name}.pt" for name in raw), "numpy.npz", "folder.pt", "dangling.pt", "absent.pt"]
    weights = content["model"]
    contents = {
        "tensor": torch.zeros(3),
        "list": [content],
        "state_dict": weights,
        "payload": {**content, "payload": Payload()},
        "module": torch.nn.Linear(2, 2),
        "other_kind": {**content, "kind": "Unet"},
        "checkpoint": {**content, "kind": "checkpoint"},
        "no_sizes": {key: value for key, value in content.items() if key != "model_args"},
        "no_name": {key: value for key, value in content.items() if key != "name"},
        "no_dataset": {key: value for key, value in content.items() if key != "dataset"},
        "no_weights": {**content, "model": None},
        "other_sizes": {**content, "model_args": {**content["model_args"], "embed_dim": 24}},
        "bad_sizes": {**content, "model_args": {**content["model_args"], "num_heads": 5}},
        "unknown_size": {**content, "model_args": {**content["model_args"], "experts": 5}},
        "weight_missing": {**content, "model": {key: weights[key] for key in list(weights)[1:]}},
        "weight_reshaped": {**content, "model": {**weights, "encoder.cls_token": torch.zeros(1, 1, 13)}},
    }
    for name, value in contents.items():
        torch.save(value, directory / f"{name}.pt")
    torch.save(content, directory / "old_format.pt", _use_new_zipfile_serialization=False)
    return [*names, *(f"{name}.pt" for name in contents), "old_format.pt"]


def test_bad_model_files_get_one_line_from_every_script_that_reads_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = bad_model_files(tmp_path)
    assert len(names) >= 25
    for name in names:
        for module, flag in ((train_classifier, "--pretrained_model_path"), (visualize_predictions, "--model_path")):
            with pytest.raises(SystemExit) as leaving:
                module.main([flag, name])
            error = capsys.readouterr().err
            assert leaving.value.code == 2, error
            assert error.count("\n") == 1, error
            assert name in error
    assert not (tmp_path / "was_run").exists()
    assert not (tmp_path / "logs").exists()


# --- several processes ---


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def group(start, script, arguments, directories):
    """Start a process in each directory, as torchrun does."""
    shared = {"WORLD_SIZE": str(len(directories)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(
            script,
            arguments,
            directory=directory,
            save_every_step=False,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, directory in enumerate(directories)
    ]


VAL = "--train_images 60 --val_images 20"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (MAE, "--augment shift --optimizer muon"),
        (MAE, "--augment crop --norm_pix_loss --decoder_embed_dim 24 --positions sincos"),
        (CLS, f"--augment shift {VAL}"),
        (CLS, OFFICIAL),
    ],
)
def test_one_two_and_four_processes_train_like_a_plain_one(script, options, start, tmp_path):
    command = f"{COMMAND[script]} {options} --max_device_batch_size 2 --total_epoch 2"
    assert ends(start(script, f"{command} --log_dir plain")) == 0
    for count in (1, 2, 4):
        processes = group(start, script, f"{command} --log_dir {count}", [tmp_path] * count)
        assert [ends(process) for process in processes] == [0] * count
        run = only_run(tmp_path / str(count))
        assert same(only_run(tmp_path / "plain"), run, tolerance=1e-4)
        assert read_config(run)["starts"][-1]["processes"] == count
    assert same(only_run(tmp_path / "plain"), only_run(tmp_path / "1"))


@pytest.mark.parametrize(("script", "options"), [(MAE, ""), (CLS, VAL)])
def test_a_signal_to_one_process_of_four_stops_all_and_two_continue(script, options, start, tmp_path):
    command = f"{COMMAND[script]} {options} --batch_size 4 --total_epoch 6"
    processes = group(start, script, f"{command} --log_dir parts", [tmp_path] * 4)
    until(lambda: any(read_metrics(run) for run in tmp_path.glob("parts/*")))
    os.kill(processes[2].pid, signal.SIGTERM)
    assert [ends(process) for process in processes] == [128 + signal.SIGTERM] * 4
    progress = load_file(only_run(tmp_path / "parts") / "checkpoint.pt")["progress"]
    assert 0 < progress["epoch"] < 6
    assert [ends(process) for process in group(start, script, f"{command} --log_dir parts", [tmp_path] * 2)] == [0, 0]
    assert ends(start(script, f"{command} --log_dir whole")) == 0
    assert same(only_run(tmp_path / "whole"), only_run(tmp_path / "parts"), tolerance=1e-3)


def test_a_machine_that_does_not_see_the_checkpoint_is_named(start, tmp_path):
    first = start(MAE, f"{COMMAND[MAE]} --log_dir parts")
    until_saved(tmp_path / "parts", 3)
    first.kill()
    first.join()
    processes = group(start, MAE, f"{COMMAND[MAE]} --log_dir parts", [tmp_path, tmp_path / "elsewhere"])
    assert ends(processes[1]) == 2
    assert ends(processes[0]) != 0
    assert "must be on a file system that all machines share" in (tmp_path / "elsewhere" / "output").read_text()


def test_a_finished_run_is_finished_for_all_also_where_they_do_not_see_it(start, tmp_path):
    assert ends(start(MAE, f"{COMMAND[MAE]} --log_dir logs")) == 0
    processes = group(start, MAE, f"{COMMAND[MAE]} --log_dir logs", [tmp_path, tmp_path / "elsewhere"])
    assert [ends(process) for process in processes] == [0, 0]
    assert (tmp_path / "output").read_text().count("Finished already") == 1
    assert (tmp_path / "elsewhere" / "output").read_text() == ""


def test_what_one_process_refuses_ends_the_others_in_silence(start, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    command = f"{COMMAND[MAE]} --log_dir logs"
    assert ends(start(MAE, command)) == 0
    (only_run(tmp_path / "logs") / "config.json").write_text("damaged")
    processes = group(start, MAE, command, [tmp_path, tmp_path / "elsewhere"])
    assert [ends(process) for process in processes] == [2, 2]
    assert "error: Cannot read" in (tmp_path / "output").read_text()
    assert (tmp_path / "elsewhere" / "output").read_text() == ""


def test_a_process_without_the_addresses_of_the_others_says_so(start, tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert ends(start(MAE, COMMAND[MAE], environment=environment)) == 2
    assert re.search(r"error: .*MASTER_ADDR.*\n$", (tmp_path / "output").read_text())


def test_a_signal_to_a_whole_job_is_one_though_it_comes_twice(tmp_path):
    command = f"{COMMAND[MAE]} --train_images 1000 --total_epoch 400 --log_dir stopped"
    job = torchrun("--standalone --nproc_per_node 2", command, tmp_path, start_new_session=True)
    until(lambda: any(read_metrics(run) for run in tmp_path.glob("stopped/*")))
    os.killpg(job.pid, signal.SIGTERM)
    error = job.communicate(timeout=60)[1]
    assert "same command continues" in error
    assert load_file(only_run(tmp_path / "stopped") / "checkpoint.pt")["progress"]["epoch"] > 0


def test_a_dry_run_of_several_processes(start, tmp_path):
    assert [ends(process) for process in group(start, MAE, f"{SIZE} --dry_run", [tmp_path] * 3)] == [0] * 3
    assert (tmp_path / "output").read_text().count("saved and reloaded") == 1


def torchrun(options, arguments, directory, **more):
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(options), str(ROOT / "mae_pretrain.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += shlex.split(arguments)
    return subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True, **more)


def test_two_nodes_that_meet_at_a_rendezvous_train_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    endpoint = f"127.0.0.1:{free_port()}"
    options = f"--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id 7 --rdzv_endpoint {endpoint}"
    nodes = [torchrun(options, f"{COMMAND[MAE]} --log_dir two", tmp_path) for _ in range(2)]
    for node in nodes:
        error = node.communicate(timeout=100)[1]
        assert node.returncode == 0, error
    mae_pretrain.main(shlex.split(f"{COMMAND[MAE]} --log_dir one"))
    assert same(only_run(tmp_path / "one"), only_run(tmp_path / "two"), tolerance=1e-4)
    assert read_config(only_run(tmp_path / "two"))["starts"][-1]["processes"] == 2


def test_a_killed_process_ends_the_job_and_the_run_continues_with_another_number(start, tmp_path):
    command = f"{COMMAND[MAE]} --train_images 1000 --total_epoch 400 --log_dir killed"
    job = torchrun("--standalone --nproc_per_node 2", command, tmp_path)
    until(lambda: any(read_metrics(run) for run in tmp_path.glob("killed/*")))
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    killed_at = time.monotonic()
    os.kill(int(workers[-1]), signal.SIGKILL)
    job.communicate(timeout=60)
    assert job.returncode not in (0, None)
    assert time.monotonic() - killed_at < 60
    epochs = len(read_metrics(only_run(tmp_path / "killed")))
    start(MAE, command, images=5000)
    until(lambda: len(read_metrics(only_run(tmp_path / "killed"))) > epochs)


# --- any arguments ---

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(
    st.sampled_from(sorted(MASK_STRATEGIES)),
    st.integers(2, 24),
    st.floats(0, 1),
    st.integers(0, 2**60),
    st.integers(1, 5),
)
def test_any_mask_is_exact_and_repeats_or_is_refused(strategy, grid_size, mask_ratio, seed, batch_size):
    num_patches = grid_size**2
    num_visible = int(num_patches * (1 - mask_ratio))
    if not 0 < mask_ratio < 1 or not 0 < num_visible < num_patches:
        with pytest.raises(ValueError, match="must leave at least one"):
            PatchShuffle(grid_size, mask_ratio, strategy)
        return
    shuffle = PatchShuffle(grid_size, mask_ratio, strategy)
    assert shuffle.num_visible == num_visible
    ids, again = (shuffle(batch_size, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(ids, again)
    assert torch.equal(ids.sort(dim=1).values, torch.arange(num_patches).expand(batch_size, -1))


class ReachedTheRun(Exception):
    """Everything was accepted."""


NUMBERS = st.one_of(
    st.integers(-2, 40).map(str), st.floats().map(repr), st.sampled_from(["", "x", "1e3", "0x10", "\u0661"])
)
FLAGS = ["img_size", "patch_size", "embed_dim", "encoder_depth", "num_heads", "train_images", "total_epoch", "seed"]
FLAGS += ["warmup_epoch", "batch_size", "max_device_batch_size", "base_learning_rate", "weight_decay"]
ONLY = {MAE: ["mask_ratio", "mask_strategy", "decoder_depth"], CLS: ["val_images"]}


def fifty_blank_images(count, size, seed):
    return ImageSet(torch.zeros(50, 3, size, size), torch.arange(50) % 10, list("abcdefghij"))


@SETTINGS
@given(drawn=st.data(), script=st.sampled_from([MAE, CLS]))
def test_any_command_line_is_accepted_or_gets_one_line(drawn, script, monkeypatch, capsys, tmp_path):
    flags = drawn.draw(st.dictionaries(st.sampled_from(FLAGS + ONLY[script]), NUMBERS, max_size=4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    monkeypatch.setattr(load, "shapes", fifty_blank_images)

    def reached(self, *args):
        raise ReachedTheRun

    monkeypatch.setattr(Run, "open", reached)
    module = {MAE: mae_pretrain, CLS: train_classifier}[script]
    size = f"--dataset shapes {SIZE} --batch_size 10".split()
    with pytest.raises((ReachedTheRun, SystemExit)) as leaving:
        module.main([*size, *(f"--{flag}={value}" for flag, value in flags.items())])
    error = capsys.readouterr().err
    if leaving.type is SystemExit:
        assert leaving.value.code == 2, flags
        assert error.count("\n") == 1, error
        assert error.startswith(f"{script}.py: error: "), error
    assert not list(tmp_path.iterdir())
