"""The training loop: the plan of a run, the schedule, one update, one epoch, and a run from its start to its end.

mae_pretrain.py and train_classifier.py say what is trained, on which batches and on which loss: an experiment each.
"""

import itertools
import math
import time
from typing import NamedTuple

import torch

from engine import processes
from engine.device import (
    PRECISIONS,
    autocast,
    compile_mode,
    compiled,
    environment,
    generator,
    images_at_once,
    loss_scaler,
    peak_memory_mb,
    pick_device,
    pick_precision,
    tune,
)
from engine.errors import UserError, counted
from engine.optimizers import OPTIMIZERS
from engine.run import Run

SMALLEST_SCALE = 2.0**-14  # of the loss in fp16, 30 halvings below the first; below it, no step can succeed

# --- the plan ---


def cosine_lr(step, *, peak, warmup_steps, total_steps, end=0.0):
    """Learning rate of update `step` (from 0): linear warm-up, then half a cosine towards `end` at total_steps.

    The last warm-up step has the peak exactly; without warm-up, step 0 has.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start = max(warmup_steps - 1, 0)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - start) / (total_steps - start)))


def micro_batches(start, count, largest):
    """Slices that cut `count` images from `start` on into the fewest parts of at most `largest`, as even as can be."""
    parts = math.ceil(count / largest)
    edges = [start + count * i // parts for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


class Plan(NamedTuple):
    """A run's batches, steps and learning rates, and this process's part of each batch; from `plan_training`."""

    batch_size: int
    slices: list  # of the global batch: this process's micro-batches
    steps_per_epoch: int
    warmup_steps: int
    total_steps: int
    peak_lr: float
    end_lr: float

    @property
    def num_images(self):
        """Images that this process trains on in the whole run, each epoch counted."""
        return self.total_steps * (self.slices[-1].stop - self.slices[0].start)

    def lr(self, step):
        return cosine_lr(
            step, peak=self.peak_lr, warmup_steps=self.warmup_steps, total_steps=self.total_steps, end=self.end_lr
        )

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
        args: with batch_size, total_epoch, base_learning_rate, end_rate and warmup_epoch, where None stands
            for `warmup`.
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
        fits = num_images // world_size * world_size
        raise UserError(
            f"--batch_size {batch_size} is more than the {counted(num_images, 'training image')}; give --batch_size "
            f"{fits} or less."
        )
    warmup_epochs = warmup * args.total_epoch if args.warmup_epoch is None else args.warmup_epoch
    if not 0 <= warmup_epochs <= args.total_epoch:
        raise UserError(f"--warmup_epoch {warmup_epochs:g} is not within 0 to --total_epoch {args.total_epoch}.")
    peak_lr = args.base_learning_rate * batch_size / 256
    if args.end_rate > peak_lr > 0:
        raise UserError(f"--end_rate {args.end_rate:g} is above the peak learning rate, {peak_lr:.2g}; give less.")
    slices, steps_per_epoch = micro_batches(rank * share, share, at_once), num_images // batch_size
    warmup_steps, total_steps = round(warmup_epochs * steps_per_epoch), args.total_epoch * steps_per_epoch
    return Plan(batch_size, slices, steps_per_epoch, warmup_steps, total_steps, peak_lr, args.end_rate)


# --- steps ---


def epoch_order(num_images, seed, epoch, device):
    """The order in which an epoch takes the images, (N,) int64; drawn on the CPU, so that it is the same everywhere."""
    return torch.randperm(num_images, generator=generator("cpu", seed, epoch, "order")).to(device)


def update(setup, model, optimizer, loss_of, batch, lr):
    """One step of the optimizer on the global batch: gradients of micro-batches added up, of processes averaged.

    Where scaled gradients are infinite or nan, weights and optimizer stay as they are, and the scale is halved.

    Args:
        setup: has the plan with this process's micro-batches, the precision, the scaler of the loss (the same on all
            processes), and clip_grad: a larger norm of all gradients together is scaled down to this; 0: never.
        loss_of: takes a part of each tensor of the batch, (b, ...), and returns the mean loss over its b images.
        batch: tensors (B, ...).
        lr: the learning rate; a group of the optimizer's parameters may have an lr_scale, by which it is multiplied.

    Returns:
        The mean loss over the global batch.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
    slices = setup.plan.slices
    loss_sum, count = 0, slices[-1].stop - slices[0].start
    for part in slices:
        with autocast(setup.precision, setup.device):
            loss = loss_of(*(tensor[part] for tensor in batch)) * ((part.stop - part.start) / count)
        setup.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    loss = processes.average_over_ranks(model, loss_sum)  # an infinite gradient becomes everyone's
    if setup.clip_grad:
        setup.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), setup.clip_grad)
    setup.scaler.step(optimizer)
    setup.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss


def train_one_epoch(setup, experiment, optimizer, loss_of, session):
    """Take the remaining steps of the current epoch; return its metrics, {column: number}.

    Args:
        experiment: as `train` takes it; loss_of: its loss, compiled or not.
        session: has progress, a dictionary that is updated here (epoch and step to go on from, loss_sum and seconds so
            far, the scaler's state), and tick(), called after each step. tick() returns True after the first step since
            this start, which may compile; images/s leave that step out.
    """
    progress, started, plan, scaler = session.progress, time.monotonic(), setup.plan, setup.scaler
    timed_from, timed_step = started, progress["step"]
    if "scaler" in progress:
        scaler.load_state_dict(progress["scaler"])
    epoch = progress["epoch"]
    order = epoch_order(experiment.num_images, experiment.args.seed, epoch, setup.device)
    for step in range(progress["step"], plan.steps_per_epoch):
        batch = experiment.draw_batch(order[step * plan.batch_size : (step + 1) * plan.batch_size], epoch, step)
        lr = plan.lr(epoch * plan.steps_per_epoch + step)
        progress["loss_sum"] = progress["loss_sum"] + update(setup, experiment.model, optimizer, loss_of, batch, lr)
        progress["step"] = step + 1
        if scaler.is_enabled():
            progress["scaler"] = scaler.state_dict()
            check_scale(progress)
        progress["seconds"], started = progress["seconds"] + time.monotonic() - started, time.monotonic()
        if session.tick():
            timed_from, timed_step = time.monotonic(), step + 1
    loss = float(progress["loss_sum"]) / plan.steps_per_epoch  # waits for the device
    now, timed_images = time.monotonic(), (plan.steps_per_epoch - timed_step) * plan.batch_size
    return {
        "train/loss": loss,
        "lr": plan.lr((epoch + 1) * plan.steps_per_epoch - 1),
        "speed/images_per_sec": timed_images / (now - timed_from) if timed_images else math.nan,
        "seconds": progress["seconds"] + now - started,
    }


def check_scale(progress):
    """Raises UserError where the loss is scaled so far down that no step in fp16 can succeed any more."""
    if progress["scaler"]["scale"] < SMALLEST_SCALE:
        raise UserError(
            f"Gradients are infinite or nan at epoch {progress['epoch'] + 1}, step {progress['step']}, at any scale of "
            f"the loss. A lower --base_learning_rate or --precision float32 may help."
        )


# --- a run ---


class Setup(NamedTuple):
    """How a run computes on this process."""

    device: torch.device
    precision: str  # one of PRECISIONS
    plan: Plan
    at_once: int  # the most images at once on the device
    scaler: torch.amp.GradScaler  # of the loss; does nothing but in fp16
    clip_grad: float = 0.0  # the largest norm of all gradients together; 0: any
    compile_mode: str | None = None  # torch.compile's for the loss; None: eager


def set_up(experiment, device):
    """The Setup of an experiment, whose images are loaded, on a device.

    Raises:
        UserError: as `plan_training`.
    """
    args = experiment.args
    at_once = args.max_device_batch_size or experiment.device_batch_size[device.type]
    if device.type == "cuda" and not args.max_device_batch_size:
        free, num_patches = torch.cuda.mem_get_info(device)[0], (args.img_size // args.patch_size) ** 2
        at_once = images_at_once(at_once, num_patches, args.embed_dim, free)
        at_once = -processes.max_over_ranks(-at_once)[0]  # the minimum: all must split evaluation images alike
    place = processes.rank(), processes.world_size()
    plan = plan_training(args, experiment.num_images, experiment.warmup, at_once, *place)
    precision = pick_precision(args.precision, device, args.embed_dim)
    mode = compile_mode(args.compile, device, plan.num_images, len(plan.slices))
    scaler, clip_grad = loss_scaler(precision, device), getattr(args, "clip_grad", 0.0)
    return Setup(device, precision, plan, at_once, scaler, clip_grad, mode)


def build(experiment, setup):
    """Draw the model from the seed: (the model on its device, its optimizer, its loss, compiled where that pays)."""
    args = experiment.args
    torch.manual_seed(args.seed)
    model = experiment.build().to(setup.device)
    tune(model, setup.device, setup.precision, (args.img_size // args.patch_size) ** 2)
    recipe = {"lr": setup.plan.peak_lr, "betas": experiment.betas, "weight_decay": args.weight_decay}
    dtype = PRECISIONS[setup.precision]
    optimizer = OPTIMIZERS[args.optimizer](model, experiment.parameter_groups(), dtype, **recipe)
    return model, optimizer, compiled(experiment.loss, setup.compile_mode)


def train(args, start_experiment):
    """Train one run to its end, on from where it stopped; returns its directory.

    The order matters. All processes join first, so that an error in one ends the others, too. The run is checked before
    its images are read, which takes long. The seed is set just before the model draws its weights.

    Args:
        start_experiment: takes the arguments, checks what can be checked without images, and gives the experiment:

            args: the arguments, completed; identity, arguments: as `Run` takes them; warmup: as `plan_training` does;
            device_batch_size: {type of device: images at once, which `images_at_once` scales on a GPU}; betas: AdamW's.
            load(device): reads the images onto the device and sets num_images (to train on) and digests.
            build(): the model, its weights drawn from torch's seed; also kept as experiment.model.
            parameter_groups(): what the optimizer steps.
            draw_batch(ids, epoch, step): the global batch of the images ids (B,), tensors (B, ...). Every draw in it
            follows from (seed, epoch, step) alone: neither a stop nor the number of processes changes what is seen.
            loss(*parts): mean loss of a part (b, ...) of each of these tensors, under autocast.
            evaluate(session, setup): metrics after an epoch, {name: number, nan where not measured}.
            content(): as `Run.open` takes it.
    """
    device = pick_device(args.device)
    processes.join(device)
    with processes.together():
        experiment = start_experiment(args)
        run = Run(experiment.identity, experiment.arguments)
        experiment.load(device)
        finished = run.is_finished(experiment.digests)
    if processes.broadcast([int(finished)])[0]:
        return run.pass_over()

    setup = set_up(experiment, device)
    model, optimizer, loss_of = build(experiment, setup)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "precision": setup.precision}
    facts |= {"train_images": experiment.num_images} | experiment.digests | setup.plan.facts()
    start = {"processes": processes.world_size(), "micro_batches": len(setup.plan.slices)}
    start |= {"compile_mode": setup.compile_mode, **environment(device)}
    with run.open(model, optimizer, setup.plan, facts, start, experiment.content()) as session:
        while not session.is_done():
            metrics = train_one_epoch(setup, experiment, optimizer, loss_of, session)
            session.check_finite(metrics["train/loss"])
            metrics["memory/peak_mb"] = peak_memory_mb(device)
            session.end_epoch(metrics | experiment.evaluate(session, setup))
        session.finish()
    run.export()
    return run.directory
