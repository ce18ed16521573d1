"""The paths that scripts/benchmark.py times: our training scripts' own steps, a naive loop's and other libraries'."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import data
import mae_pretrain
import train_classifier
import training
import utils
from model import MAE_Encoder, MAE_ViT, ViT_Classifier, mae_loss

# --- (images, model arguments, batch size, precision, compiled) -> step(i) -> loss ---


def batches(images, batch_size):
    """The indices of step i's images, as the training scripts draw them."""
    order = torch.randperm(len(images)).to(images.device)
    return lambda i: order[torch.arange(i * batch_size, (i + 1) * batch_size) % len(images)]


def classifier(images, model_args):
    sizes = {name: model_args[name] for name in utils.defaults(ViT_Classifier) if name in model_args}
    return ViT_Classifier(**sizes).to(images.device)


def our_step(script, model, drawn_from, images, model_args, batch_size, precision, compiled):
    """The step of a training script: its batches, its loss, its optimizer.

    Args:
        drawn_from: what the script's draw_batch takes before the arguments.
    """
    device, args = images.device, script.parse_args([])
    utils.tune(model, device, precision, (model_args["img_size"] // model_args["patch_size"]) ** 2)
    slices = training.micro_batches(0, batch_size, script.DEVICE_BATCH_SIZE[device.type])
    optimizer = script.build_optimizer(model, args.optimizer, precision, 1e-4, args.weight_decay)
    ids = batches(images, batch_size)
    loss = functools.partial(script.loss_of, utils.compiled(model, compiled, device), precision)
    draw = functools.partial(script.draw_batch, *drawn_from, args)
    return lambda i: training.update(model, optimizer, slices, 1e-4, loss, draw(ids(i), 0, i))


def ours_pretraining(images, model_args, *how):
    model = MAE_ViT(**model_args).to(images.device)
    return our_step(mae_pretrain, model, (images, model.shuffle), images, model_args, *how)


def ours_fine_tuning(images, model_args, *how):
    labels = torch.randint(10, (len(images),), device=images.device)
    train = data.ImageSet(images, labels, [])
    return our_step(train_classifier, classifier(images, model_args), (train,), images, model_args, *how)


class PilImages(Dataset):
    """What torchvision's CIFAR10 gives: a PIL image through transforms, one by one."""

    def __init__(self, images):
        self.images = images.permute(0, 2, 3, 1).cpu().numpy()
        self.transform = transforms.Compose(
            [transforms.ToPILImage(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), 0


def endless(loader):
    while True:
        yield from loader


def naive_loader(images, batch_size):
    workers = min(4, os.cpu_count())
    return endless(DataLoader(PilImages(images), batch_size, shuffle=True, drop_last=True, num_workers=workers))


def plain_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def naive_pretraining(images, model_args, batch_size, precision, compiled):
    """As a course's notebook would: a loader with workers, masks drawn image by image with NumPy, eager float32."""
    model = MAE_ViT(**model_args).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    loader, num_patches = naive_loader(images, batch_size), model.shuffle.grid_size**2

    def step(i):
        batch, _ = next(loader)
        batch = batch.to(images.device)
        masks = np.stack([np.random.permutation(num_patches) for _ in batch])
        pred, mask = model(batch, torch.from_numpy(masks).to(images.device))
        return plain_step(optimizer, mae_loss(pred, batch, mask))

    return step


def naive_fine_tuning(images, model_args, batch_size, precision, compiled):
    model = classifier(images, model_args)
    optimizer, loader = torch.optim.AdamW(model.parameters(), weight_decay=0.05), naive_loader(images, batch_size)

    def step(i):
        batch, labels = (tensor.to(images.device) for tensor in next(loader))
        features = MAE_Encoder.forward(model, batch)  # of all tokens
        return plain_step(optimizer, F.cross_entropy(model.head(features[:, 0]), labels))

    return step


def huggingface_pretraining(images, model_args, batch_size, precision, compiled):
    """transformers' ViTMAEForPreTraining, its scaled-dot-product attention."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width, heads = model_args["embed_dim"], model_args["num_heads"]
    sizes = {"image_size": model_args["img_size"], "patch_size": model_args["patch_size"], "hidden_size": width}
    sizes |= {"num_hidden_layers": model_args["encoder_depth"], "num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * width, "decoder_hidden_size": width, "decoder_intermediate_size": 4 * width}
    sizes |= {"decoder_num_hidden_layers": model_args["decoder_depth"], "decoder_num_attention_heads": heads}
    config = ViTMAEConfig(**sizes, qkv_bias=False, mask_ratio=model_args["mask_ratio"], attn_implementation="sdpa")
    model = ViTMAEForPreTraining(config).to(images.device).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    ids = batches(images, batch_size)

    def step(i):
        with utils.autocast(precision, images.device):
            loss = forward(data.normalize(images[ids(i)])).loss
        return plain_step(optimizer, loss)

    return step


def lightly_pretraining(images, model_args, batch_size, precision, compiled):
    """lightly's MAE on timm's VisionTransformer, put together as its documentation does."""
    from lightly.models import utils as tokens
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    width, heads, patch_size = model_args["embed_dim"], model_args["num_heads"], model_args["patch_size"]
    depths = model_args["encoder_depth"], model_args["decoder_depth"]
    vit = VisionTransformer(model_args["img_size"], patch_size, 3, 0, embed_dim=width, depth=depths[0], num_heads=heads)
    encoder = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(
        num_patches=vit.patch_embed.num_patches,
        patch_size=patch_size,
        embed_dim=width,
        decoder_embed_dim=width,
        decoder_depth=depths[1],
        decoder_num_heads=heads,
        mlp_ratio=4.0,
    )
    model = torch.nn.ModuleList([encoder, decoder]).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    ids, length = batches(images, batch_size), encoder.sequence_length

    def loss_of(x):
        keep, hidden = tokens.random_token_mask((len(x), length), model_args["mask_ratio"], device=x.device)
        known = decoder.embed(encoder.encode(images=x, idx_keep=keep))
        everything = tokens.repeat_token(decoder.mask_token, (len(x), length)).to(known.dtype)
        decoded = decoder.decode(tokens.set_at_index(everything, keep, known))
        pred = decoder.predict(tokens.get_at_index(decoded, hidden))
        target = tokens.get_at_index(tokens.patchify(x, patch_size), hidden - 1)  # without the cls token
        return F.mse_loss(pred.float(), target)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step(i):
        with utils.autocast(precision, images.device):
            loss = loss_of(data.normalize(images[ids(i)]))
        return plain_step(optimizer, loss)

    return step


class Way(NamedTuple):
    """How a path takes its steps."""

    task: str
    builder: Callable
    precision: str = "best"  # what --precision auto picks
    compiled: bool = False
    a_process_a_core: bool = False  # each with its share of the batch; on a CPU only
    half_width: bool = False  # of the decoder

    def sizes(self, model_args):
        return model_args | ({"decoder_embed_dim": model_args["embed_dim"] // 2} if self.half_width else {})


PATHS = {
    "ours": Way("pretraining", ours_pretraining),
    "ours compiled": Way("pretraining", ours_pretraining, compiled=True),
    "ours, a process a core": Way("pretraining", ours_pretraining, a_process_a_core=True),
    "ours, decoder of half the width": Way("pretraining", ours_pretraining, half_width=True),
    "ours float32": Way("pretraining", ours_pretraining, "float32"),
    "ours float32, a process a core": Way("pretraining", ours_pretraining, "float32", a_process_a_core=True),
    "naive": Way("pretraining", naive_pretraining, "float32"),
    "huggingface": Way("pretraining", huggingface_pretraining),
    "huggingface compiled": Way("pretraining", huggingface_pretraining, compiled=True),
    "lightly": Way("pretraining", lightly_pretraining),
    "fine-tuning": Way("fine-tuning", ours_fine_tuning),
    "fine-tuning compiled": Way("fine-tuning", ours_fine_tuning, compiled=True),
    "fine-tuning naive": Way("fine-tuning", naive_fine_tuning, "float32"),
}


def default_batch_size(name, device):
    """What fits everywhere on a CPU; the scripts' defaults on CUDA, where paths that do not accumulate take 512."""
    if device.type == "cpu":
        return 64
    task, builder, *_ = PATHS[name]
    return 128 if task == "fine-tuning" else 4096 if builder is ours_pretraining else 512
