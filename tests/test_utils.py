import argparse
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils

ROOT = Path(__file__).parents[1]


def plan(num_images=1000, rank=0, world_size=1, **changes):
    args = {"batch_size": 64, "max_device_batch_size": 16, "total_epoch": 10, "warmup_epoch": None}
    args = argparse.Namespace(**{**args, "base_learning_rate": 1e-3, **changes})
    return utils.plan_training(args, num_images, 0.1, 10, rank, world_size)


def test_schedule_hits_its_end_points():
    rates = [utils.cosine_lr(step, peak=2.0, warmup_steps=5, total_steps=21) for step in range(22)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[4] == max(rates) == 2.0
    assert rates[12] == pytest.approx(1 + math.cos(8 / 17 * math.pi))
    assert rates[21] == pytest.approx(0, abs=1e-12)
    assert rates[20] > 0
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_schedule_without_warm_up_starts_at_the_peak():
    assert utils.cosine_lr(0, peak=3.0, warmup_steps=0, total_steps=10) == 3.0


def test_plan_scales_the_rate_and_drops_the_last_short_batch():
    assert plan().peak_lr == pytest.approx(1e-3 * 64 / 256)
    assert plan().steps_per_epoch == 15  # of 1000 / 64 = 15.6
    assert plan().warmup_steps == 15
    assert plan(warmup_epoch=2.0).warmup_steps == 30


def test_processes_and_micro_batches_share_the_global_batch_out():
    indexes = torch.arange(64)
    parts = [indexes[part] for rank in range(2) for part in plan(rank=rank, world_size=2).slices]
    assert [len(part) for part in parts] == [16] * 4
    assert torch.equal(torch.cat(parts), indexes)


@pytest.mark.parametrize(("count", "sizes"), [(8, [8]), (16, [16]), (17, [8, 9]), (101, [14, 14, 15, 14, 15, 14, 15])])
def test_micro_batches_are_as_few_and_even_as_can_be(count, sizes):
    slices = utils.micro_batches(5, count, 16)
    assert [part.stop - part.start for part in slices] == sizes
    assert torch.equal(torch.cat([torch.arange(200)[part] for part in slices]), torch.arange(5, 5 + count))
    assert plan(batch_size=count, max_device_batch_size=None).slices == utils.micro_batches(0, count, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2000}, "2000 is more than the 1000 training images"),
        ({"world_size": 3}, "not a multiple of the 3 processes"),
        ({"warmup_epoch": 11.0}, "--warmup_epoch 11 is not within 0 to --total_epoch 10"),
        ({"warmup_epoch": -1.0}, "--warmup_epoch -1 is not within"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_a_way_out(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


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


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), " (2.00 GiB more were"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), ". A smaller"),
        (RuntimeError("std::bad_alloc"), ". A smaller"),
        (MemoryError(), ". A smaller"),
    ],
)
def test_too_little_memory_gets_one_line(error, line):
    with pytest.raises(SystemExit, match=re.escape(f"Out of memory{line}")), utils.exit_when_out_of_memory():
        raise error


def test_another_error_is_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="shape"), utils.exit_when_out_of_memory():
        raise RuntimeError("shape mismatch")
