import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils

ROOT = Path(__file__).parents[1]


def test_generators_follow_from_their_key_alone():
    def draw(*key):
        return torch.rand(4, generator=utils.generator("cpu", *key)).tolist()

    assert draw(42, 1, "masks") == draw(42, 1, "masks")
    draws = [
        draw(*key) for key in ((42, 1, "masks"), (42, 1, "order"), (42, 2, "masks"), (43, 1, "masks"), (421, "masks"))
    ]
    assert len({tuple(row) for row in draws}) == len(draws)


def test_device_and_precision():
    cpu = torch.device("cpu")
    assert utils.pick_device("cpu") == cpu
    with pytest.raises(ValueError, match=r"--device cuda:9 is not there; this machine has cpu"):
        utils.pick_device("cuda:9")
    assert utils.pick_precision("bf16", cpu, 96) == "bf16"
    assert utils.pick_precision("auto", cpu, 32) == "float32"  # whatever the processor
    with utils.autocast("bf16", cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with utils.autocast("float32", cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_peak_memory_is_this_processs_own():
    large = torch.ones(100 * 2**18)  # 100 MB, which the child does not have
    code = "import torch, utils; print(utils.peak_memory_mb(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    mine = utils.peak_memory_mb(torch.device("cpu"))
    assert 100 < float(child.stdout) < mine - 50
    del large


def test_a_machine_without_git_runs_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = utils.environment()
    assert environment["commit"] is None
    assert environment["clean"] is None


def test_the_command_of_a_run_is_the_one_that_was_typed(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "tell.py").write_text("import utils; print(utils.environment()['command'])")
    typed = [sys.executable, "-m", "scripts.tell", "--output", "a b"]
    paths = {**os.environ, "PYTHONPATH": str(Path(utils.__file__).parent)}
    said = subprocess.check_output(typed, cwd=tmp_path, env=paths, text=True)
    assert said.strip().endswith(" -m scripts.tell --output 'a b'")
