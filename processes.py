"""The processes that torchrun started, if any, and what they tell each other; with one process nothing happens."""

import os

import torch
import torch.distributed as dist


def join(device):
    """Join the processes that torchrun started, if any: (rank, world_size)."""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def leave():
    """Wait for the others, then close the connections: a process that just ends can take its peers down with it."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first():
    return int(os.environ.get("RANK", 0)) == 0


def shared_out(count, largest):
    """Slices of at most `largest` that cover `count` things once; of several processes each gets its share of them."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return [slice(start, start + largest) for start in range(rank() * largest, count, world_size * largest)]


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
    flat = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
    return loss


def group_device():
    """Where the process group, if there is one, wants tensors that it sends."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def largest_over_ranks(*numbers):
    """Of each number the largest that any process has."""
    if not dist.is_initialized():
        return numbers
    largest = torch.tensor(numbers, device=group_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def what_first_has(numbers):
    """The whole numbers that the first process has."""
    if not dist.is_initialized():
        return numbers
    first = torch.tensor(numbers, device=group_device())
    dist.broadcast(first, 0)
    return first.tolist()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()
