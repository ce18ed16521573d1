"""The training loop, held against loops written here from the recipe alone, and against facts that need no program.

A plain loop uses nothing of the program but its models, drawn images and files: torch's AdamW, the learning rate by
formula, the whole batch at once, augmentation image by image.
"""

import argparse
import functools
import hashlib
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import cropped_one_by_one
from starting import interrupt
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mae_pretrain
import train_classifier
from engine import processes, training
from engine.checkpoints import load_file, load_model
from engine.device import loss_scaler
from engine.errors import UserError
from engine.optimizers import orthogonalized
from engine.records import read_metrics
from images.pixels import normalize
from images.shapes import shapes
from model import MAE_Encoder, MAE_ViT, PatchShuffle, ViT_Classifier

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "encoder_depth": 2, "num_heads": 3}
SEED, BATCH, EPOCHS, STEPS, WARMUP = 5, 14, 2, 3, 3  # 50 images: 3 steps an epoch, 8 images left over
PEAK = 1e-3 * BATCH / 256
RUN = f"--device cpu --precision float32 --seed {SEED} --dataset shapes --train_images 50 --batch_size {BATCH} "
RUN += f"--total_epoch {EPOCHS} --warmup_epoch {WARMUP / STEPS} --base_learning_rate 1e-3"
SWITCHES = [("", {})]  # flags, and what they say to the model
SWITCHES += [
    (
        "--norm_pix_loss --decoder_embed_dim 16 --positions sincos",
        {"norm_pix_loss": True, "decoder_embed_dim": 16, "positions": "sincos"},
    ),
    ("--optimizer muon", {}),
]
TOLERANCE = {"": 1e-6, "shift": 1e-6, "crop": 1e-5}  # a pixel of a crop that lies between two values is rounded
SIZE_FLAGS = " ".join(f"--{name} {value}" for name, value in SIZE.items())


@pytest.fixture(autouse=True)
def in_an_empty_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_shapes(monkeypatch):
    """Drawn sets: 50 images for training, 140 for testing."""
    monkeypatch.setattr("images.load.shapes", lambda count, size, seed: shapes(140 if seed else 50, size, seed))


def pretrain(flags):
    return mae_pretrain.pretrain(mae_pretrain.parse_args(shlex.split(flags)))


def classify(flags):
    return train_classifier.train_classifier(train_classifier.parse_args(shlex.split(flags)))


# --- plain loops ---


def drawn_from(*key):
    """The documented generator: seeded by 63 bits of the BLAKE2b digest of the key as Python prints it."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") // 2
    return torch.Generator().manual_seed(seed)


def batch_of(images, epoch, step, augment):
    """The indices and the pixels in [-1, 1] of one batch."""
    ids = torch.randperm(len(images), generator=drawn_from(SEED, epoch, "order"))[step * BATCH : (step + 1) * BATCH]
    pixels = images[ids]
    if augment == "crop":
        pixels = cropped_one_by_one(pixels, drawn_from(SEED, epoch, step, "augment"))
    elif augment:
        draw = drawn_from(SEED, epoch, step, "augment")
        down, right = (torch.randint(-4, 5, (BATCH, 1), generator=draw).flatten().tolist() for _ in range(2))
        mirrored = (torch.rand(BATCH, 1, generator=draw) < 0.5).flatten().tolist()
        size = SIZE["img_size"]
        moved = []
        for image, dy, dx, mirror in zip(pixels, down, right, mirrored, strict=True):
            padded = F.pad(image[None].float(), (4, 4, 4, 4), mode="replicate")[0]
            image = padded[:, 4 + dy : 4 + dy + size, 4 + dx : 4 + dx + size]
            moved.append(image.flip(2) if mirror else image)
        pixels = torch.stack(moved)
    return ids, (pixels / 255 - 0.5) / 0.5


def rate(step):
    """Linear warm-up to the peak, then half a cosine that would be 0 one step after the last."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return PEAK * (1 + math.cos(math.pi * (step - WARMUP + 1) / (EPOCHS * STEPS - WARMUP + 1))) / 2


def step_by_muon(model, groups, momenta):
    """Step and take the gradient from each matrix of the blocks. The formula's x x^T x needs no transpose."""
    for name, weight in model.named_parameters():
        if "transformer" not in name or weight.ndim == 1:
            continue
        (group,) = (group for group in groups if any(weight is other for other in group["params"]))
        momenta[name] = 0.95 * momenta.get(name, 0) + weight.grad
        updates = (weight.grad + 0.95 * momenta[name]).split(weight.shape[1] if "qkv" in name else weight.shape[0])
        for i, x in enumerate(updates):
            x = x / x.square().sum().sqrt()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            part = weight.data[i * len(x) : (i + 1) * len(x)]
            part -= group["lr"] * (group["weight_decay"] * part + 0.2 * max(x.shape) ** 0.5 * x)
        weight.grad = None


def plain_loop(model, betas, loss_of, evaluate=lambda model: {}, groups=None, rate=rate, clip=0, muon=False):
    """Train the model; a row of metrics an epoch.

    Args:
        groups: of parameters; lr_scale: by what a group's rate is multiplied; clip: the largest norm of the gradients.
    """
    optimizer = torch.optim.AdamW(groups or model.parameters(), betas=betas, weight_decay=0.05)
    rows, momenta = [], {}
    for epoch in range(EPOCHS):
        losses = []
        for step in range(STEPS):
            lr = rate(epoch * STEPS + step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1)
            optimizer.zero_grad()
            loss = loss_of(model, epoch, step)
            loss.backward()
            if clip:
                norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in model.parameters()))
                for parameter in model.parameters():
                    parameter.grad *= min(1, clip / norm)
            if muon:
                step_by_muon(model, optimizer.param_groups, momenta)
            optimizer.step()
            losses.append(loss.item())
        rows.append({"train/loss": sum(losses) / STEPS, "lr": lr, **evaluate(model)})
    return rows


def check_same(directory, kind, model, rows, tolerance):
    """A finished run has these weights and these metrics."""
    trained, _ = load_model(directory, kind)
    for (name, ours), theirs in zip(trained.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for ours, theirs in zip(read_metrics(directory), rows, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("augment", ["", "shift", "crop"])
@pytest.mark.parametrize("parts", [14, 5])  # at once; 5 makes parts of 4, 5 and 5
@pytest.mark.parametrize(("switches", "how"), SWITCHES)
def test_pretraining_ends_with_the_weights_of_a_plain_loop(switches, how, augment, parts, few_shapes):
    flags = f"{RUN} {SIZE_FLAGS} --decoder_depth 1 --max_device_batch_size {parts} {augment and f'--augment {augment}'}"
    run = pretrain(f"{flags} {switches}")
    images = shapes(50, 16, seed=0).images

    def loss_of(model, epoch, step):
        _, x = batch_of(images, epoch, step, augment)
        order = torch.rand(BATCH, 16, generator=drawn_from(SEED, epoch, step, "masks")).argsort(1)
        pred, _ = model(x, order)
        total = 0
        for image, prediction, hidden in zip(x, pred, order[:, 4:].tolist(), strict=True):  # a quarter is visible
            for patch in hidden:
                row, column = patch // 4 * 4, patch % 4 * 4
                pixels = image[:, row : row + 4, column : column + 4]
                if how:
                    pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6) ** 0.5
                total = total + ((prediction[patch].view(3, 4, 4) - pixels) ** 2).mean()
        return total / (BATCH * 12)

    torch.manual_seed(SEED)
    model = MAE_ViT(**SIZE, decoder_depth=1, **how)
    rows = plain_loop(model, (0.9, 0.95), loss_of, muon="muon" in switches)
    check_same(run, MAE_ViT, model, rows, TOLERANCE[augment])


@pytest.mark.parametrize("augment", ["", "shift", "crop"])
@pytest.mark.parametrize("parts", [14, 5])
@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_a_classifier_ends_with_the_weights_of_a_plain_loop(augment, parts, start, few_shapes):
    flags = f"{RUN} --max_device_batch_size {parts} {augment and f'--augment {augment}'} "
    mae = pretrain(f"{RUN} {SIZE_FLAGS} --decoder_depth 1 --seed 1") if start == "pretrained" else None
    run = classify(flags + (f"--pretrained_model_path {mae}" if mae else SIZE_FLAGS))
    train, test = shapes(50, 16, seed=0), shapes(140, 16, seed=1)

    def logits_of(model, x):
        return model.head(MAE_Encoder.forward(model, x)[:, 0])

    def loss_of(model, epoch, step):
        ids, x = batch_of(train.images, epoch, step, augment)
        right = logits_of(model, x).log_softmax(1)[torch.arange(BATCH), train.labels[ids]]
        return -right.mean()

    def evaluate(model):
        with torch.no_grad():
            logits = logits_of(model, (test.images / 255 - 0.5) / 0.5)
        right = (logits.argmax(1) == test.labels).tolist()
        batches = [right[:128], right[128:]]
        means = [sum(batch) / len(batch) for batch in batches]
        loss = F.cross_entropy(logits, test.labels).item()
        return {"test/acc": sum(right) / 140, "test/acc_mean_of_batches": sum(means) / 2, "test/loss": loss}

    torch.manual_seed(SEED)
    model = ViT_Classifier(**SIZE, num_classes=10)
    if mae:
        encoder = load_model(mae, MAE_ViT)[0].encoder.state_dict()
        model.load_state_dict({**encoder, "head.weight": model.head.weight, "head.bias": model.head.bias})
    check_same(run, ViT_Classifier, model, plain_loop(model, (0.9, 0.999), loss_of, evaluate), TOLERANCE[augment])


def test_losses_of_a_classifier_in_bf16_are_computed_in_float32(few_shapes):
    images, model = shapes(50, 16, seed=0), ViT_Classifier(**SIZE, num_classes=10)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(normalize(images.images))
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float(), images.labels).item()
    experiment = train_classifier.Classification(train_classifier.parse_args(shlex.split(SIZE_FLAGS)))
    experiment.model = model
    with torch.autocast("cpu", torch.bfloat16):
        assert experiment.loss(images.images, images.labels).item() == expected


def test_evaluating_a_classifier_in_bf16_ranks_logits_that_bf16_cannot_tell_apart(few_shapes):
    torch.manual_seed(0)
    images, model = shapes(50, 16, seed=0), ViT_Classifier(**SIZE, num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        exact = model(normalize(images.images))
    images = images._replace(labels=exact.argmax(1))
    torch.nn.init.constant_(model.head.bias, 1000.0)  # where bf16 counts in steps of 4
    scores, _ = train_classifier.evaluate(model, images, "bf16", 50)
    assert scores["test/acc"] > 0.95
    assert scores["test/loss"] == pytest.approx(F.cross_entropy(exact, images.labels).item(), rel=0.03)


@pytest.mark.parametrize("script", ["mae_pretrain", "train_classifier"])
def test_no_more_images_pass_the_model_at_once_than_in_training(script, few_shapes, monkeypatch):
    sizes, embed = [], MAE_Encoder.embed
    monkeypatch.setattr(MAE_Encoder, "embed", lambda self, x, *ids: sizes.append(len(x)) or embed(self, x, *ids))
    flags = f"{RUN} {SIZE_FLAGS} --max_device_batch_size 5"
    pretrain(f"{flags} --decoder_depth 1") if script == "mae_pretrain" else classify(flags)
    assert {*sizes} - {16} == {4, 5}  # 16 are shown in TensorBoard
    assert sum(sizes) > EPOCHS * STEPS * BATCH + 140


def mixed_slowly(x, targets, epoch, step, mixup, cutmix):
    """Mixup or CutMix, image by image and pixel by pixel."""
    draw = np.random.default_rng(drawn_from(SEED, epoch, step, "mixup").initial_seed())
    use_cutmix = draw.random() < 0.5 if mixup and cutmix else bool(cutmix)
    share = draw.beta(*[cutmix if use_cutmix else mixup] * 2)
    pairs = list(enumerate(draw.permutation(len(x)).tolist()))
    if use_cutmix:
        side = int(16 * (1 - share) ** 0.5)  # of 16 x 16 pixels
        top, left = (middle - side // 2 for middle in (draw.integers(16), draw.integers(16)))
        inside = torch.tensor(
            [[top <= i < top + side and left <= j < left + side for j in range(16)] for i in range(16)]
        )
        share = 1 - inside.sum().item() / 256
        x = torch.stack([torch.where(inside, x[other], x[one]) for one, other in pairs])
    else:
        x = torch.stack([share * x[one] + (1 - share) * x[other] for one, other in pairs])
    return x, torch.stack([share * targets[one] + (1 - share) * targets[other] for one, other in pairs])


CLASSIFIER_SWITCHES = [
    "--pool mean",
    "--decay_matrices_only",
    "--layer_decay 0.5",
    "--clip_grad 0.3",
    "--drop_path 0.6",
]
CLASSIFIER_SWITCHES += ["--label_smoothing 0.2", "--mixup 0.8", "--cutmix 1", "--mixup 0.8 --cutmix 1"]


ALL_SWITCHES = " ".join(CLASSIFIER_SWITCHES)


@pytest.mark.parametrize("switches", [*CLASSIFIER_SWITCHES, ALL_SWITCHES, f"{ALL_SWITCHES} --optimizer muon"])
def test_a_classifier_with_switches_ends_with_the_weights_of_a_plain_loop(switches, few_shapes):
    wanted = train_classifier.parse_args(shlex.split(switches))
    mae = pretrain(
        f"{RUN} {SIZE_FLAGS} --decoder_depth 1 --seed 1 --base_learning_rate 0.1"
    )  # also a LayerNorm of its own
    flags = f"{RUN} --base_learning_rate 2e-2 --weight_decay 0.5 --max_device_batch_size 5 {switches}"
    run = classify(f"{flags} --pretrained_model_path {mae}")
    train = shapes(50, 16, seed=0)

    def loss_of(model, epoch, step):
        ids, x = batch_of(train.images, epoch, step, augment=False)
        targets = torch.eye(10)[train.labels[ids]]
        if wanted.mixup or wanted.cutmix:
            x, targets = mixed_slowly(x, targets, epoch, step, wanted.mixup, wanted.cutmix)
        targets = targets * (1 - wanted.label_smoothing) + wanted.label_smoothing / 10
        tokens = model.embed(x)  # (B, 1 + N, D)
        drawn = torch.rand(BATCH, 2, 2, generator=drawn_from(SEED, epoch, step, "drop path"))
        for block, rate, numbers in zip(model.transformer, (0, wanted.drop_path), drawn.unbind(1), strict=True):
            for branch, number in (
                (lambda x, block=block: block.attn(block.norm1(x)), numbers[:, 0]),
                (lambda x, block=block: block.mlp(block.norm2(x)), numbers[:, 1]),
            ):
                images = zip(tokens, branch(tokens), number.tolist(), strict=True)
                tokens = torch.stack([x if n >= 1 - rate else x + change / (1 - rate) for x, change, n in images])
        pooled = tokens[:, 1:].mean(1) if wanted.pool == "mean" else tokens[:, 0]
        return -(targets * model.head(model.layer_norm(pooled)).log_softmax(1)).sum(1).mean()

    torch.manual_seed(SEED)
    model = ViT_Classifier(**SIZE, num_classes=10)
    encoder = load_model(mae, MAE_ViT)[0].encoder.state_dict()
    fresh = {name: value for name, value in model.state_dict().items() if name.startswith("head")}
    if wanted.pool == "mean":
        fresh |= model.layer_norm.state_dict(prefix="layer_norm.")
    model.load_state_dict({**encoder, **fresh})
    groups = []
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        block = name.startswith("transformer.") and int(name.split(".")[1])
        last = name.startswith(("head.", "layer_norm."))
        depth = SIZE["encoder_depth"] + 1 if last else block + 1 if block is not False else 0
        groups.append(
            {
                "params": [parameter],
                "weight_decay": 0.5 if matrix or not wanted.decay_matrices_only else 0,
                "lr_scale": wanted.layer_decay ** (SIZE["encoder_depth"] + 1 - depth),
            }
        )
    rate_of, muon = (lambda step: 20 * rate(step)), wanted.optimizer == "muon"
    rows = plain_loop(model, (0.9, 0.999), loss_of, groups=groups, rate=rate_of, clip=wanted.clip_grad, muon=muon)
    check_same(run, ViT_Classifier, model, rows, tolerance=1e-5)


def test_layer_decay_counts_twelve_blocks():
    flags = "--img_size 4 --patch_size 2 --embed_dim 2 --encoder_depth 12 --num_heads 1 --layer_decay 0.5"
    experiment = train_classifier.Classification(train_classifier.parse_args(flags.split()))
    model = experiment.model = ViT_Classifier(**experiment.model_args)
    scales = {weight: group["lr_scale"] for group in experiment.parameter_groups() for weight in group["params"]}
    found = [{scales[parameter] for parameter in block.parameters()} for block in model.transformer]
    assert found == [{0.5**k} for k in range(12, 0, -1)]
    assert (scales[model.cls_token], scales[model.head.weight]) == (0.5**13, 1)


def test_the_logged_rate_is_the_one_that_the_optimizer_used(few_shapes):
    used = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    runs = pretrain(f"{RUN} {SIZE_FLAGS} --decoder_depth 1"), classify(f"{RUN} {SIZE_FLAGS}")
    hook.remove()
    assert used == [rate(step) for step in range(EPOCHS * STEPS)] * 2
    for run in runs:
        assert [row["lr"] for row in read_metrics(run)] == [used[2], used[5]]


# --- the plan ---


def plan(num_images=1000, rank=0, world_size=1, **changes):
    args = {"batch_size": 64, "total_epoch": 10, "warmup_epoch": None, "end_rate": 0.0}
    args = argparse.Namespace(**{**args, "base_learning_rate": 1e-3, **changes})
    return training.plan_training(args, num_images, 0.1, 16, rank, world_size)


@pytest.mark.parametrize(
    ("flags", "free", "at_once", "parts"),
    [
        ("", 79e9, 2048, 2),
        ("", 16e9, 512, 8),
        ("--patch_size 4", 79e9, 8192, 1),  # never more than the batch
        ("--embed_dim 384 --batch_size 256", 16e9, 256, 1),
        ("--img_size 512 --embed_dim 1024", 16e9, 1, 4096),
        ("--max_device_batch_size 1000", 79e9, 1000, 5),
    ],
)
def test_micro_batches_on_a_gpu_follow_its_memory_and_the_models_tokens(flags, free, at_once, parts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 80 * 10**9))
    args = mae_pretrain.parse_args(["--precision", "float32", *flags.split()])
    experiment = SimpleNamespace(args=args, device_batch_size=mae_pretrain.DEVICE_BATCH_SIZE, num_images=50000)
    experiment.warmup = 0.1
    setup = training.set_up(experiment, torch.device("cuda"))
    assert (setup.at_once, len(setup.plan.slices)) == (at_once, parts)
    assert setup.compile_mode == ("reduce-overhead" if parts == 1 else "default")
    monkeypatch.setattr(training.processes, "max_over_ranks", lambda *numbers: [max(-7, *numbers)])
    assert training.set_up(experiment, torch.device("cuda")).at_once == (1000 if "max" in flags else min(at_once, 7))


def test_schedule_hits_its_end_points():
    rates = [training.cosine_lr(step, peak=2.0, warmup_steps=5, total_steps=21) for step in range(22)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[4] == max(rates) == 2.0
    assert rates[12] == pytest.approx(1 + math.cos(8 / 17 * math.pi))
    assert rates[21] == pytest.approx(0, abs=1e-12)
    assert rates[20] > 0
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_schedule_without_warm_up_starts_at_the_peak():
    assert training.cosine_lr(0, peak=3.0, warmup_steps=0, total_steps=10) == 3.0


def test_schedule_ends_at_the_end_rate():
    rates = [training.cosine_lr(step, peak=2.0, warmup_steps=5, total_steps=21, end=0.5) for step in range(22)]
    assert rates[4] == 2.0
    assert rates[12] == pytest.approx(0.5 + 0.75 * (1 + math.cos(8 / 17 * math.pi)))
    assert rates[21] == pytest.approx(0.5)


def test_plan_scales_the_rate_and_drops_the_last_short_batch():
    assert plan().peak_lr == pytest.approx(1e-3 * 64 / 256)
    assert plan().steps_per_epoch == 15  # of 1000 / 64 = 15.6
    assert plan().total_steps == 150
    assert plan(num_images=64).steps_per_epoch == 1
    assert plan().num_images == 150 * 64
    assert plan(rank=3, world_size=4).num_images == 150 * 16
    assert plan().warmup_steps == 15
    assert [plan(warmup_epoch=epochs).warmup_steps for epochs in (0.0, 2.0, 10.0)] == [0, 30, 150]


def test_processes_and_micro_batches_share_the_global_batch_out():
    indexes = torch.arange(64)
    parts = [indexes[part] for rank in range(2) for part in plan(rank=rank, world_size=2).slices]
    assert [len(part) for part in parts] == [16] * 4
    assert torch.equal(torch.cat(parts), indexes)


@pytest.mark.parametrize(("count", "sizes"), [(8, [8]), (16, [16]), (17, [8, 9]), (101, [14, 14, 15, 14, 15, 14, 15])])
def test_micro_batches_are_as_few_and_even_as_can_be(count, sizes):
    slices = training.micro_batches(5, count, 16)
    assert [part.stop - part.start for part in slices] == sizes
    assert torch.equal(torch.cat([torch.arange(200)[part] for part in slices]), torch.arange(5, 5 + count))
    assert plan(batch_size=count).slices == training.micro_batches(0, count, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2000}, "2000 is more than the 1,000 training images"),
        ({"world_size": 3}, "not a multiple of the 3 processes"),
        ({"warmup_epoch": 11.0}, "--warmup_epoch 11 is not within 0 to --total_epoch 10"),
        ({"warmup_epoch": -1.0}, "--warmup_epoch -1 is not within"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_a_way_out(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


# --- optimizers ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_orthogonalized_matrices_keep_their_singular_vectors_and_have_singular_values_near_1(dtype, tolerance):
    matrices = (
        torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 1, 1e6])[:, None, None]
    )
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalized(matrices, dtype) @ right.mT  # (3, 8, 8)
    values = found.diagonal(dim1=1, dim2=2)
    assert 0.65 < values.min() < values.max() < 1.25
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=tolerance)


def test_a_matrix_without_a_gradient_only_decays():
    assert orthogonalized(torch.zeros(1, 2, 3), torch.float32).eq(0).all()


# --- one update, one epoch ---


class Weight(torch.nn.Module):
    """One number."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.0))


CPU = torch.device("cpu")
UNSCALED = loss_scaler("float32", CPU)


def setup_of(slices, scaler=UNSCALED, clip_grad=0.0, steps_per_epoch=1, total_steps=1):
    """How a toy computes: these micro-batches of batches that end with the last of them, at the full rate."""
    plan = training.Plan(
        slices[-1].stop, slices, steps_per_epoch, warmup_steps=0, total_steps=total_steps, peak_lr=1, end_lr=0
    )
    return training.Setup(CPU, "float32", plan, 16, scaler, clip_grad)


def test_an_update_follows_the_mean_of_this_processs_part_of_the_batch():
    model, values = Weight(), torch.tensor([9.0, 9, 9, 1, 2, 6, 9])
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    setup = setup_of([slice(3, 4), slice(4, 6)])
    loss = training.update(setup, model, optimizer, lambda x: (model.weight * x + 1).mean(), [values], 0.5)
    assert loss.item() == 1
    assert model.weight.item() == -0.5 * 3  # the rate times the mean of 1, 2 and 6


def product(model):
    """A loss: the mean of the weight times some numbers."""
    return lambda x: (model.weight * x).mean()


@pytest.mark.parametrize("slices", [[slice(0, 4)], [slice(0, 1), slice(1, 4)]])
@pytest.mark.parametrize(("clip_grad", "gradient"), [(0.0, 2.0), (3.0, 2.0), (0.5, 0.5)])
def test_a_scaled_loss_steps_like_a_plain_one(slices, clip_grad, gradient):
    weights, values = [], torch.tensor([0.5, 1.5, 2.0, 4.0])
    for scaler in (UNSCALED, torch.amp.GradScaler("cpu", init_scale=3.0)):
        model = Weight()
        optimizer = torch.optim.SGD(model.parameters())
        for _ in range(3):
            training.update(setup_of(slices, scaler, clip_grad), model, optimizer, product(model), [values], 0.1)
            weights.append(model.weight.item())
    assert weights == pytest.approx([-0.1 * gradient * step for step in (1, 2, 3)] * 2)


def bursting(rank, meeting, answers):
    """The body of a process of two: three steps, of which the gradient of the second process's second is infinite."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model, scaler = Weight(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer, weights = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True), []
    for value in (1.0, math.inf if rank else 1.0, 1.0):
        training.update(setup_of([slice(0, 1)], scaler), model, optimizer, product(model), [torch.tensor([value])], 0.1)
        weights.append(model.weight.item())
    answers.put((weights, scaler.get_scale(), optimizer.state[model.weight]["step"].item()))


def test_all_processes_pass_over_a_step_in_which_one_has_an_infinite_gradient(server, tmp_path):
    answers = server.Queue()
    started = [server.Process(target=bursting, args=(rank, tmp_path / "meeting", answers)) for rank in range(2)]
    for process in started:
        process.start()
    one, other = answers.get(timeout=60), answers.get(timeout=60)
    for process in started:
        process.join()
    assert one == other == ([pytest.approx(-0.1), pytest.approx(-0.1), pytest.approx(-0.2)], 4.0, 2)


@pytest.mark.parametrize(
    ("script", "optimizer"), [("mae_pretrain", "adamw"), ("train_classifier", "adamw"), ("mae_pretrain", "muon")]
)
def test_a_stopped_run_in_fp16_goes_on_with_its_scale(script, optimizer, few_shapes, monkeypatch):
    """A scale that is too large for the first steps and then grows at every second one."""
    start = {"mae_pretrain": pretrain, "train_classifier": classify}[script]
    flags = f"{RUN} {SIZE_FLAGS} {'--decoder_depth 1' if script == 'mae_pretrain' else ''} --precision fp16"
    flags += f" --optimizer {optimizer}"
    scaler = functools.partial(torch.amp.GradScaler, "cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    monkeypatch.setattr(training, "loss_scaler", lambda *_: scaler(growth_interval=2))
    whole, steps = start(f"{flags} --log_dir whole"), interrupt(monkeypatch, 4)
    with pytest.raises(SystemExit):
        start(f"{flags} --log_dir parts")
    parts = start(f"{flags} --log_dir parts")
    assert len(steps) == EPOCHS * STEPS
    one, other = (load_file(run / "checkpoint.pt") for run in (whole, parts))
    assert one["progress"]["scaler"] == other["progress"]["scaler"]
    assert one["progress"]["scaler"]["scale"] == 2.0**12  # once too large, then grown twice in five steps
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def toy_experiment(model, num_images, draw_batch):
    args = argparse.Namespace(seed=SEED)
    return SimpleNamespace(args=args, model=model, num_images=num_images, draw_batch=draw_batch)


def test_gradients_that_are_never_finite_end_a_run_in_fp16():
    model = Weight()
    setup = setup_of([slice(0, 1)], torch.amp.GradScaler("cpu"), steps_per_epoch=100, total_steps=100)
    session = SimpleNamespace(progress={"epoch": 0, "step": 0, "loss_sum": 0.0, "seconds": 0.0}, tick=lambda: None)
    experiment = toy_experiment(model, 100, lambda *_: [torch.tensor([math.inf])])
    with pytest.raises(UserError, match="Gradients are infinite or nan at epoch 1, step 31, "):
        training.train_one_epoch(setup, experiment, torch.optim.SGD(model.parameters()), product(model), session)


@pytest.mark.parametrize(("first", "speed"), [(2, 4 / 2.5), (None, 8 / 5), (3, math.nan)])
def test_an_epoch_that_was_stopped_goes_on_with_what_it_had(first, speed, monkeypatch):
    """Its second and third step: order, loss and time are those of the whole epoch; the speed is without the first."""
    now, seen, ticks = [100.0], [], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    model, setup = Weight(), setup_of([slice(0, 4)], steps_per_epoch=3, total_steps=9)
    progress = {"epoch": 1, "step": 1, "loss_sum": 5.0, "seconds": 10.0}

    def draw_batch(ids, epoch, step):
        seen.append((ids.tolist(), epoch, step))
        now[0] += 2
        return (ids,)

    def loss_of(ids):
        return model.weight * 0 + len(seen)  # 1, then 2

    def tick():
        ticks.append(dict(progress))
        now[0] += 0.5
        return progress["step"] == first

    optimizer, session = torch.optim.SGD(model.parameters()), SimpleNamespace(progress=progress, tick=tick)
    metrics = training.train_one_epoch(setup, toy_experiment(model, 14, draw_batch), optimizer, loss_of, session)
    order = torch.randperm(14, generator=drawn_from(SEED, 1, "order")).tolist()
    assert seen == [(order[4:8], 1, 1), (order[8:12], 1, 2)]
    assert [(tick["step"], float(tick["loss_sum"]), tick["seconds"]) for tick in ticks] == [(2, 6, 12), (3, 8, 14.5)]
    assert metrics == {
        "train/loss": pytest.approx(8 / 3),
        "lr": setup.plan.lr(5),
        "seconds": 15,
        "speed/images_per_sec": pytest.approx(speed, nan_ok=True),
    }


@pytest.mark.parametrize("count", [1, 500, 999, 3001])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_several_processes_share_out_every_image_once(count, world_size, monkeypatch):
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: world_size > 1)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: world_size)
    taken = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        parts = [torch.arange(count)[part] for part in processes.shared_out(count, 500)]
        assert max(map(len, parts), default=0) <= 500
        assert len(parts) <= math.ceil(math.ceil(count / 500) / world_size)
        taken += parts
    assert torch.equal(torch.cat(taken).sort().values, torch.arange(count))


# --- facts ---


def draw_folder(root, counts):
    """Three classes of noisy 8 x 8 images, each lit from another side: so many images of each in train/ and test/."""
    noise = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 120, 8).expand(8, 8)
    lit = {"above": ramp.T.flip(0), "below": ramp.T, "left": ramp.flip(1)}  # also when mirrored
    for part, count in counts.items():
        for name, light in lit.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = light[..., None] + torch.randint(136, (8, 8, 3), generator=noise)
                Image.fromarray(pixels.byte().numpy()).save(root / part / name / f"{i}.png")


@pytest.mark.parametrize("held_out", ["", "--val_images 30"])
def test_a_classifier_tells_classes_apart_that_differ_plainly(held_out, capsys):
    draw_folder(Path("lights"), {"train": 40, "test": 20})
    size = "--img_size 8 --patch_size 4 --embed_dim 24 --encoder_depth 1 --num_heads 2"
    flags = f"--dataset folder --data_dir lights {size} --total_epoch 12 --batch_size 15 --base_learning_rate 5e-2"
    train_classifier.main(shlex.split(f"{flags} --augment shift --device cpu {held_out}"))
    (run,) = Path("logs/classifier").iterdir()
    assert read_metrics(run)[-1]["test/acc"] >= 0.95
    assert f"test accuracy {read_metrics(run)[-1]['test/acc']:.2%}" in capsys.readouterr().out


@pytest.mark.slow
def test_pretraining_beats_the_mean_visible_colour():
    """Predicting an image's hidden pixels by the mean of its visible ones needs no learning."""
    flags = "--dataset shapes --train_images 1000 --img_size 16 --patch_size 4 --embed_dim 32 --encoder_depth 2 "
    flags += "--num_heads 2 --decoder_depth 1 --batch_size 50 --total_epoch 14 --base_learning_rate 2e-2 --device cpu"
    model, _ = load_model(pretrain(flags), MAE_ViT)
    images = shapes(1000, 16, seed=1).images / 127.5 - 1
    masks = PatchShuffle(4, 0.75, "random")(1000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        pred, hidden = model(images, masks)  # (1000, 16, 48), (1000, 16)
    patches = images.view(1000, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(1000, 16, 3, 16)
    colours, visible = patches.mean(3), (~hidden)[..., None]  # (1000, 16, 3), (1000, 16, 1)
    mean_colour = (colours * visible).sum(1) / visible.sum(1)  # (1000, 3)
    learned, guessed = (
        ((guess - patches) ** 2)[hidden].mean() for guess in (pred.view_as(patches), mean_colour[:, None, :, None])
    )
    assert learned < 0.95 * guessed
