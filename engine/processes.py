"""The processes that torchrun started, if any, and the numbers they exchange; the signals that one gets.

A single process exchanges nothing.
"""

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import UserError, as_user_error

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Ctrl-C, a closed terminal, SLURM's --signal
REPEAT_SECONDS = 3  # torchrun sends a signal that its processes may have got already
LONGEST_WAIT = timedelta(hours=2)  # for each other: one may have a large folder of images to decode


def join(device):
    """Join the processes that torchrun started, if any.

    Raises:
        UserError: RANK is set, and what else torchrun sets is not.
    """
    if "RANK" not in os.environ:
        return
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    with as_user_error(ValueError):
        dist.init_process_group("nccl" if gpu else "gloo", timeout=LONGEST_WAIT, device_id=gpu)


def leave():
    """Wait for the others, then close the connections: a process that just ends can take its peers down with it."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def together():
    """All processes complete the block, or none: after a UserError in one process, the others exit without a message.

    Inside, no process may wait for another, except before the first line that can raise a UserError.
    """
    try:
        yield
    except UserError:
        max_over_ranks(1)
        raise
    if max_over_ranks(0)[0]:
        sys.exit(2)


def rank():
    """This process's place among the others, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first():
    """Whether this is the process that writes and prints."""
    return rank() == 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def shared_out(count, largest):
    """This process's slices of at most `largest` items; the slices of all processes cover `count` items once."""
    return [slice(start, start + largest) for start in range(rank() * largest, count, world_size() * largest)]


def sum_over_ranks(tensor):
    """Add a tensor up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def average_over_ranks(model, loss):
    """Give every process the mean gradient, in place: equal shards of a batch then step as the whole would.

    Returns:
        The mean of all processes' losses.
    """
    if not dist.is_initialized():
        return loss
    tensors = [*(parameter.grad for parameter in model.parameters()), loss]
    flat = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
    return loss


def group_device():
    """The device, "cuda" or "cpu", that tensors must be on to be sent to other processes."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def max_over_ranks(*numbers):
    """The maximum of each number over all processes."""
    if not dist.is_initialized():
        return numbers
    largest = torch.tensor(numbers, device=group_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def broadcast(numbers):
    """The whole numbers that the first process has."""
    if not dist.is_initialized():
        return numbers
    first = torch.tensor(numbers, device=group_device())
    dist.broadcast(first, 0)
    return first.tolist()


def barrier():
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def noted_signals():
    """Yield a list that collects the signals of STOPS; the same signal again, later, ends the process at once.

    Repeats within REPEAT_SECONDS count as one. If signals are left in the list when the block ends, the program exits.
    """
    noted, noted_at = [], {}

    def note(number, frame):
        if number not in noted_at:
            noted.append(number)
            noted_at[number] = time.monotonic()
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving.\n".encode())
        elif time.monotonic() - noted_at[number] > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    handlers = {number: signal.signal(number, note) for number in heard}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if noted:
        sys.exit(128 + max(noted))
