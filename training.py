"""The training loop: the plan of a run, the schedule, the optimizers, one update, one epoch.

mae_pretrain.py and train_classifier.py decide what is trained, and on which loss.
"""

import itertools
import math
import time
from collections import defaultdict
from typing import NamedTuple

import torch

import processes
from errors import UserError

UNSCALED = torch.amp.GradScaler("cpu", enabled=False)  # does nothing
SMALLEST_SCALE = 2.0**-14  # of a loss in fp16: 30 halvings after the first, no step can be taken any more

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

    @property
    def num_images(self):
        """Images that this process trains on in the whole run, each epoch counted."""
        return self.total_steps * (self.slices[-1].stop - self.slices[0].start)

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


def plan_training(args, num_images, warmup, at_once, rank, world_size):
    """Cut the global batch by process and into micro-batches that fit the device; lay out the learning rate.

    An epoch's last short batch is dropped. The rate scales with the batch: peak = base * batch / 256 (Goyal et al.
    2017, arXiv:1706.02677).

    Args:
        args: with batch_size, total_epoch, base_learning_rate and warmup_epoch, where None stands for `warmup`.
        warmup: fraction of all epochs.
        at_once: the most images at once on this device.

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
        slices=micro_batches(rank * share, share, at_once),
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        total_steps=args.total_epoch * steps_per_epoch,
        peak_lr=args.base_learning_rate * batch_size / 256,
    )


# --- optimizers ---

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3, x^5 on each singular value x; five times
MOMENTUM = 0.95


def adamw(model, groups, dtype, **options):
    return torch.optim.AdamW(groups, fused=True, **options)


def orthogonalized(matrices, dtype):
    """Bring all singular values of matrices (n, R, C), R <= C, near 1 (about 0.7 to 1.2); multiply in dtype."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)  # singular values up to 1
    x = x.to(dtype)  # (n, R, C)
    for _ in range(5):
        gram = x @ x.mT  # (n, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Muon for the matrices of the transformer blocks, AdamW for all else.

    A matrix steps by its momentum (Nesterov's), orthogonalized (Jordan et al. 2024, "Muon", kellerjordan.github.io/
    posts/muon); times 0.2 sqrt(max(rows, columns)) the step is as long as AdamW's, so rate and decay are those of AdamW
    (Liu et al. 2025, arXiv:2502.16982, section 2.2). The weight (3 D, D) of queries, keys and values is three matrices.
    Biases, LayerNorms, tokens, positions, patch embedding, decoder.embed and heads are AdamW's.

    Args:
        model: whose blocks are called transformer.
        groups: of its parameters, as AdamW takes them, each split into a part for each kind; options: AdamW's.
        dtype: of the matrix products; bf16, which Jordan used, is 2.7 times (width 64) as fast on a Zen 4 or more.
    """

    def __init__(self, model, groups, dtype, **options):
        self.dtype = dtype
        blocks = [pair for pair in model.named_parameters() if "transformer." in pair[0] and pair[1].ndim == 2]
        matrices = {weight: 3 if "qkv" in name else 1 for name, weight in blocks}
        split = []
        for group in groups:
            for count in (0, 1, 3):  # matrices in each weight; 0: AdamW's
                params = [p for p in group["params"] if matrices.get(p, 0) == count]
                split += [{**group, "params": params, "matrices": count}] if params else []
        super().__init__(split, fused=True, **options)
        self._step_supports_amp_scaling = False  # as fused AdamW's does: a GradScaler is to unscale all gradients

    @torch.no_grad()
    def step(self):
        """Step; the blocks' matrices have no gradient afterwards. Those of one shape, or its transpose, go together."""
        stacks = defaultdict(list)
        for group in self.param_groups:
            lr, count = group["lr"], group["matrices"]
            for p in group["params"]:
                if not count or p.grad is None:
                    continue
                if not self.state[p]:  # AdamW looks for a step in each state that it loads
                    self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                wide = p.shape[0] // count <= p.shape[1]
                for views in zip(*(x.chunk(count) for x in (p, p.grad, self.state[p]["momentum"])), strict=True):
                    views = views if wide else [x.T for x in views]  # (R, C) each
                    stacks[views[0].shape].append((*views, 1 - lr * group["weight_decay"], -lr))
                p.grad = None  # so that AdamW passes it over
        for shape, entries in stacks.items():
            weights, grads, momenta, kept, rates = zip(*entries, strict=True)
            torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
            updates = torch.stack(torch._foreach_lerp(grads, momenta, MOMENTUM))  # (n, R, C)
            torch._foreach_mul_(weights, kept)
            scales = [0.2 * shape[1] ** 0.5 * rate for rate in rates]
            torch._foreach_add_(weights, torch._foreach_mul(orthogonalized(updates, self.dtype).unbind(), scales))
        super().step()


OPTIMIZERS = {"adamw": adamw, "muon": Muon}


# --- steps ---


def update(model, optimizer, slices, lr, loss_of, batch, scaler=UNSCALED, clip_grad=0.0):
    """One step of the optimizer on the global batch: gradients of micro-batches added up, of processes averaged.

    Where scaled gradients are infinite or nan, weights and optimizer stay as they are, and the scale is halved.

    Args:
        slices: this process's micro-batches; batch: tensors (B, ...); loss_of: takes a part of each of these tensors,
            (b, ...), and returns the mean loss over its b images.
        lr: the learning rate; a group of the optimizer's parameters may have an lr_scale, by which it is multiplied.
        scaler: a torch.amp.GradScaler; the same on all processes.
        clip_grad: a larger norm of all gradients together is scaled down to this; 0: never.

    Returns:
        The mean loss over the global batch.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
    loss_sum, count = 0, slices[-1].stop - slices[0].start
    for part in slices:
        loss = loss_of(*(tensor[part] for tensor in batch)) * ((part.stop - part.start) / count)
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
    loss = processes.average_over_ranks(model, loss_sum)  # an infinite gradient becomes everyone's
    if clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss


def train_one_epoch(model, optimizer, plan, order, draw_batch, loss_of, session, scaler=UNSCALED, clip_grad=0.0):
    """Take the remaining steps of the current epoch; its metrics.

    Args:
        order: (N,) int64, the training images' indices in the order of this epoch, on their device.
        draw_batch: (ids, epoch, step) -> the global batch of the images ids (B,), tensors (B, ...). Every draw in it
            follows from (seed, epoch, step) and is made for the global batch: neither a stop in between nor the number
            of processes changes which images are seen, and how.
        loss_of: as `update` takes it.
        session: has progress, a dictionary kept up to date here (epoch and step to go on from, loss_sum and seconds so
            far, the scaler's state), and tick(), called after each step.
        scaler, clip_grad: as `update` takes them.
    """
    progress, started = session.progress, time.monotonic()
    if "scaler" in progress:
        scaler.load_state_dict(progress["scaler"])
    epoch = progress["epoch"]
    for step in range(progress["step"], plan.steps_per_epoch):
        batch = draw_batch(order[step * plan.batch_size : (step + 1) * plan.batch_size], epoch, step)
        lr = plan.lr(epoch * plan.steps_per_epoch + step)
        loss = update(model, optimizer, plan.slices, lr, loss_of, batch, scaler, clip_grad)
        progress["loss_sum"] = progress["loss_sum"] + loss
        progress["step"] = step + 1
        if scaler.is_enabled():
            progress["scaler"] = scaler.state_dict()
            if progress["scaler"]["scale"] < SMALLEST_SCALE:
                raise UserError(
                    f"Gradients are infinite or nan at epoch {epoch + 1}, step {step + 1}, at any scale of the loss. A "
                    f"lower --base_learning_rate or --precision float32 may help."
                )
        progress["seconds"], started = progress["seconds"] + time.monotonic() - started, time.monotonic()
        session.tick()
    loss = float(progress["loss_sum"]) / plan.steps_per_epoch  # waits for the device
    seconds = progress["seconds"] + time.monotonic() - started
    return {
        "train/loss": loss,
        "lr": plan.lr((epoch + 1) * plan.steps_per_epoch - 1),
        "speed/images_per_sec": plan.steps_per_epoch * plan.batch_size / seconds,
        "seconds": seconds,
    }
