import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.device import (
    COMPILE_FROM,
    PRECISIONS,
    autocast,
    compile_mode,
    compiled,
    environment,
    generator,
    loss_scaler,
    peak_memory_mb,
    pick_device,
    pick_precision,
)

ROOT = Path(__file__).parents[1]


def test_generators_follow_from_their_key_alone():
    def draw(*key):
        return torch.rand(4, generator=generator("cpu", *key)).tolist()

    assert draw(42, 1, "masks") == draw(42, 1, "masks")
    draws = [
        draw(*key) for key in ((42, 1, "masks"), (42, 1, "order"), (42, 2, "masks"), (43, 1, "masks"), (421, "masks"))
    ]
    assert len({tuple(row) for row in draws}) == len(draws)


def test_device_and_precision():
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    with pytest.raises(ValueError, match=r"--device cuda:9 is not there; this machine has cpu"):
        pick_device("cuda:9")
    assert pick_precision("bf16", cpu, 96) == "bf16"
    assert pick_precision("auto", cpu, 32) == "float32"  # whatever the processor
    for name, dtype in PRECISIONS.items():
        with autocast(name, cpu):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert loss_scaler(name, cpu).is_enabled() == (name == "fp16")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "float32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 6), "bf16"), ((10, 0), "bf16")],
)
def test_a_gpu_computes_in_what_its_tensor_cores_have(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", torch.device("cuda"), 96) == expected
    assert pick_precision("float32", torch.device("cuda"), 96) == "float32"


def test_mps_is_taken_where_it_is_asked_for_and_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device mps is not there; this machine has cpu"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")
    assert pick_device("auto") == torch.device("cpu")
    assert pick_precision("auto", torch.device("mps"), 96) == "float32"


def test_a_process_that_cannot_tell_its_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is set and LOCAL_RANK is not"):
        pick_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("choice", "device", "num_images", "micro_batches", "expected"),
    [
        (None, "cuda", COMPILE_FROM, 1, "reduce-overhead"),
        (None, "cuda", COMPILE_FROM, 2, "default"),
        (None, "cuda", COMPILE_FROM - 1, 1, None),
        (None, "cpu", 10**9, 1, None),
        (True, "cuda", 1, 1, "reduce-overhead"),
        (True, "cpu", 1, 1, "default"),
        (False, "cuda", 10**9, 1, None),
    ],
)
def test_a_step_is_compiled_where_that_was_asked_or_pays(choice, device, num_images, micro_batches, expected):
    assert compile_mode(choice, torch.device(device), num_images, micro_batches) == expected


def test_each_step_of_cuda_graphs_is_marked(monkeypatch):
    done = []

    def compile_(function, dynamic, mode):
        return lambda x: done.append(mode) or function(x)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: done.append("mark"))
    assert [compiled(abs, mode)(-1) for mode in (None, "default", "reduce-overhead")] == [1, 1, 1]
    assert done == ["default", "mark", "reduce-overhead"]


@pytest.mark.parametrize(("device", "name"), [("cuda:1", "GPU 1"), ("cuda:0", "GPU 0"), ("cpu", "a CPU")])
def test_a_run_records_the_processor_that_it_uses(device, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device.index if device else 0}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("engine.device.cpu_name", lambda: "a CPU")
    device = torch.device(device)
    found = environment(device)
    assert found["processor"] == name
    assert found["cuda"] == ("13.0" if device.type == "cuda" else None)
    assert environment()["processor"] == "GPU 0"


def test_peak_memory_is_told_where_proc_does_not_tell_it(monkeypatch):
    """As in gVisor: free sandboxes, Cloud Run."""
    right = peak_memory_mb(torch.device("cpu"))
    monkeypatch.setattr(Path, "read_text", lambda self: "Name:\tpython\nVmRSS:\t 8 kB\n")
    assert right == pytest.approx(peak_memory_mb(torch.device("cpu")), rel=0.5)


@pytest.mark.slow
def test_peak_memory_is_this_processs_own():
    large = torch.ones(100 * 2**18)  # 100 MB, which the child does not have
    code = "import torch; from engine.device import peak_memory_mb; print(peak_memory_mb(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    mine = peak_memory_mb(torch.device("cpu"))
    assert 100 < float(child.stdout) < mine - 50
    del large


def test_a_machine_without_git_runs_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = environment()
    assert found["commit"] is None
    assert found["clean"] is None


@pytest.mark.slow
def test_a_run_is_clean_where_no_file_of_the_program_was_changed(tmp_path):
    shutil.copytree(ROOT / "engine", tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "c"]):
        subprocess.run([*git, *command], check=True)
    code = "from engine.device import environment; print(environment()['clean'])"

    def clean():
        command = [sys.executable, "-c", code, ROOT]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    (tmp_path / "masks.png").touch()  # what a command of the README leaves
    assert clean() == "True"
    with open(tmp_path / "engine" / "device.py", "a") as file:
        file.write("\n")
    assert clean() == "False"


@pytest.mark.slow
def test_the_command_of_a_run_is_the_one_that_was_typed(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "tell.py").write_text(
        "from engine.device import environment; print(environment()['command'])"
    )
    typed = [sys.executable, "-m", "scripts.tell", "--output", "a b"]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.check_output(typed, cwd=tmp_path, env=paths, text=True)
    assert said.strip().endswith(" -m scripts.tell --output 'a b'")
