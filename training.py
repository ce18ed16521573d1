"""The training loop: the plan of a run, the schedule, one update, one epoch, and the processes that share the work.

What is trained, and on which loss, is the scripts' to say: mae_pretrain.py and train_classifier.py.
"""

import itertools
import math
import os
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from errors import UserError

# --- the plan ---


def cosine_lr(step, *, peak, warmup_steps, total_steps):
    """Learning rate of update `step` (from 0): linear warm-up, then half a cosine towards 0 at total_steps.

    The last warm-up step has the peak exactly; without warm-up, step 0 has.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start = max(warmup_steps - 1, 0)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - start) / (total_steps - start)))


def micro_batches(start, count, largest):
    """Slices that cut `count` images from `start` on into the fewest parts of at most `largest`, as even as can be."""
    parts = math.ceil(count / largest)
    edges = [start + count * i // parts for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


class Plan(NamedTuple):
    """What follows from the arguments, the number of images and this process's place among the others."""

    batch_size: int
    slices: list  # of the global batch: this process's micro-batches
    steps_per_epoch: int
    warmup_steps: int
    total_steps: int
    peak_lr: float

    def lr(self, step):
        return cosine_lr(step, peak=self.peak_lr, warmup_steps=self.warmup_steps, total_steps=self.total_steps)

    def facts(self):
        """What config.json tells of it."""
        return {
            "effective_batch_size": self.batch_size,
            "peak_learning_rate": self.peak_lr,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


def plan_training(args, num_images, warmup, device_batch_size, rank=0, world_size=1):
    """Cut the global batch by process and into micro-batches that fit the device; lay out the learning rate.

    An epoch's last short batch is dropped. The rate scales with the batch: peak = base * batch / 256 (Goyal et al.
    2017, arXiv:1706.02677).

    Args:
        args: with batch_size, total_epoch, base_learning_rate, and warmup_epoch and max_device_batch_size, where None
            stands for the defaults that follow.
        warmup: fraction of all epochs.
        device_batch_size: the most images at once on this device.

    Raises:
        UserError: the batch is no multiple of world_size or larger than the data, or the warm-up longer than the run.
    """
    batch_size = args.batch_size
    if batch_size % world_size:
        raise UserError(f"--batch_size {batch_size} is not a multiple of the {world_size} processes.")
    share = batch_size // world_size
    if batch_size > num_images:
        raise UserError(f"--batch_size {batch_size} is more than the {num_images} training images; use at most that.")
    warmup_epochs = warmup * args.total_epoch if args.warmup_epoch is None else args.warmup_epoch
    if not 0 <= warmup_epochs <= args.total_epoch:
        raise UserError(f"--warmup_epoch {warmup_epochs:g} is not within 0 to --total_epoch {args.total_epoch}.")
    steps_per_epoch = num_images // batch_size
    return Plan(
        batch_size=batch_size,
        slices=micro_batches(rank * share, share, args.max_device_batch_size or device_batch_size),
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        total_steps=args.total_epoch * steps_per_epoch,
        peak_lr=args.base_learning_rate * batch_size / 256,
    )


# --- processes ---


def join_processes(device):
    """Join the processes that torchrun started, if any: (rank, world_size)."""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def leave_processes():
    """Wait for the others, then close the connections: a process that just ends can take its peers down with it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_first_process():
    return int(os.environ.get("RANK", 0)) == 0


def shared_out(count, largest):
    """Slices of at most `largest` that cover `count` things once; of several processes each gets its share of them."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return [slice(start, start + largest) for start in range(rank * largest, count, world_size * largest)]


def sum_over_ranks(tensor):
    """Add a tensor up over all processes, in place; with one process nothing happens."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def average_over_ranks(model, loss):
    """Give every process the mean gradient, in place: equal shards of a batch then step as the whole would.

    Returns:
        The mean of all processes' losses; with one process nothing happens.
    """
    if not dist.is_initialized():
        return loss
    tensors = [*(parameter.grad for parameter in model.parameters()), loss]
    flat = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
    return loss


# --- steps ---


def update(model, optimizer, slices, lr, loss_of):
    """One step of the optimizer on the global batch: gradients of micro-batches added up, of processes averaged.

    Args:
        slices: this process's micro-batches; loss_of: slice -> the mean loss over its images.

    Returns:
        The mean loss over the global batch.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss_sum, count = 0, slices[-1].stop - slices[0].start
    for part in slices:
        loss = loss_of(part) * ((part.stop - part.start) / count)
        loss.backward()
        loss_sum += loss.detach()
    loss = average_over_ranks(model, loss_sum)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def train_one_epoch(model, optimizer, plan, order, batch_loss, progress, tick):
    """Take the remaining steps of the current epoch; its metrics.

    Args:
        order: (N,) int64, the training images' indices in the order of this epoch, on their device.
        batch_loss: (ids, epoch, step) -> loss_of, as `update` wants it, for the global batch of the images ids (B,).
            Every draw in it follows from (seed, epoch, step) and is made for the global batch: neither a stop in
            between nor the number of processes changes which images are seen, and how.
        progress: epoch and step to go on from, loss_sum and seconds of the steps before; changed in place.
        tick: called after each step.
    """
    epoch, started = progress["epoch"], time.monotonic()
    for step in range(progress["step"], plan.steps_per_epoch):
        loss_of = batch_loss(order[step * plan.batch_size : (step + 1) * plan.batch_size], epoch, step)
        lr = plan.lr(epoch * plan.steps_per_epoch + step)
        progress["loss_sum"] = progress["loss_sum"] + update(model, optimizer, plan.slices, lr, loss_of)
        progress["step"] = step + 1
        progress["seconds"], started = progress["seconds"] + time.monotonic() - started, time.monotonic()
        tick()
    loss = float(progress["loss_sum"]) / plan.steps_per_epoch  # waits for the device
    seconds = progress["seconds"] + time.monotonic() - started
    return {
        "train/loss": loss,
        "lr": optimizer.param_groups[0]["lr"],
        "speed/images_per_sec": plan.steps_per_epoch * plan.batch_size / seconds,
        "seconds": seconds,
    }
