"""Masked autoencoder for small images, its masks, and the classifier that reuses its encoder.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), at CIFAR size:
an encoder that sees only the visible patches, a light decoder that sees them all, a loss on the hidden pixels.

Axes in the comments: B images, C channels, N patches, V visible patches, D width, P = C * patch_size**2 numbers in a
patch.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from engine.errors import UserError
from masks import MASK_STRATEGIES

# --- patches ---


def patchify(images, patch_size):
    """Cut images (B, C, H, W) into patches (B, N, P): raster order, a patch's numbers as (channel, row, column)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size):
    """Put patches (B, N, P) of square images back together: (B, C, H, W). The inverse of `patchify`."""
    grid_size = math.isqrt(patches.shape[1])
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid_size, p=patch_size, q=patch_size)


def mean_and_std(patches):
    """Mean and deviation of each patch (B, N, P), (B, N, 1) each, as the official MAE normalises it for the loss."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


# --- masks ---


class PatchShuffle(nn.Module):
    """Orders each image's patches, visible ones first, by a mask strategy.

    The strategy only scores; the split is made here, so every strategy hides equally many patches and the encoder
    sees a full rectangle of tokens (MAE paper, section 3, "Simple implementation").

    Three tensors describe a mask. ids_shuffle lists the patches, visible ones first. ids_restore, its inverse, gives
    each patch's position in that list. mask is True where the patch is hidden:

    >>> shuffle = PatchShuffle(grid_size=2, mask_ratio=0.5, mask_strategy="grid")  # patches 0 1 above 2 3
    >>> ids_shuffle = shuffle(batch_size=1)
    >>> ids_shuffle  # 0 and 3 are visible; patches.take_along_dim(ids_shuffle[..., None], 1) has this order
    tensor([[0, 3, 1, 2]])
    >>> ids_restore = ids_shuffle.argsort(dim=1)
    >>> ids_restore, ids_restore >= shuffle.num_visible  # patch 1 is at place 2; the mask
    (tensor([[0, 2, 3, 1]]), tensor([[False,  True,  True, False]]))

    Raises:
        UserError: the strategy is unknown, there is one patch only, or mask_ratio leaves nothing visible or hidden.
    """

    def __init__(self, grid_size, mask_ratio, mask_strategy):
        super().__init__()
        if mask_strategy not in MASK_STRATEGIES:
            raise UserError(f"mask_strategy {mask_strategy!r} is unknown; choose from {', '.join(MASK_STRATEGIES)}.")
        num_patches = grid_size**2
        if num_patches < 2:
            raise UserError("A grid_size of 1 is one patch: at least 2 patches are needed. Use a smaller patch_size.")
        self.num_visible = int(num_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
        if not 0 < self.num_visible < num_patches:
            least = math.ceil(1000 / num_patches) / 1000
            raise UserError(
                f"mask_ratio {mask_ratio} must leave at least one of {num_patches} patches visible and hide at least "
                f"one; use {least} to {1 - least:.3f}."
            )
        self.grid_size, self.mask_ratio, self.mask_strategy = grid_size, mask_ratio, mask_strategy

    def forward(self, batch_size, generator=None, device=None):
        """Draw a mask for each image: ids_shuffle (B, N) int64, the visible patches in its first num_visible columns.

        Raises:
            ValueError: the strategy's scores have a wrong shape, are not finite real numbers, or are a mask (bool,
                False where visible) with a wrong number of visible patches. Sorting these would hide wrong patches.
        """
        score, shape = MASK_STRATEGIES[self.mask_strategy], (batch_size, self.grid_size**2)
        scores = score(batch_size, self.grid_size, self.num_visible, generator, device)
        if not isinstance(scores, torch.Tensor) or scores.shape != shape or scores.is_complex():
            found = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, torch.Tensor) else type(scores)
            raise ValueError(f"mask_strategy {self.mask_strategy!r} must give real scores {shape}, not {found}.")
        if scores.device.type == "cpu" and not scores.isfinite().all():  # a GPU would have to be waited for
            raise ValueError(f"mask_strategy {self.mask_strategy!r} gave nan or infinite scores.")
        if scores.dtype == torch.bool and (scores.sum(dim=1) != shape[1] - self.num_visible).any():
            raise ValueError(
                f"mask_strategy {self.mask_strategy!r} gave a mask; {self.num_visible} of {shape[1]} patches must be "
                f"visible in it (mask_ratio {self.mask_ratio}), not {shape[1] - int(scores[0].sum())}, say."
            )
        return scores.argsort(dim=1, stable=True)  # (B, N)


# --- model ---


def transformer(embed_dim, depth, num_heads, qkv_bias=False, norm_eps=1e-5):
    """Pre-norm blocks (Dosovitskiy et al. 2020); the defaults are the reference's."""
    if embed_dim % num_heads:
        divisors = ", ".join(str(n) for n in range(1, min(embed_dim, 32) + 1) if embed_dim % n == 0)
        raise UserError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}; these do: {divisors}.")
    how = {"qkv_bias": qkv_bias, "norm_layer": partial(nn.LayerNorm, eps=norm_eps)}
    return nn.Sequential(*(Block(embed_dim, num_heads, **how) for _ in range(depth)))


POSITIONS = ("learned", "sincos")


def init_token(*shape):
    return nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02))


def sincos_table(grid_size, embed_dim):
    """Fixed 2-D positions (N, 1, D), in the order of the official MAE's: sines and cosines of the column, then the row.

    Each of the two takes D / 2 numbers: D / 4 frequencies from 1 down to almost 1 / 10000 (Vaswani et al. 2017,
    arXiv:1706.03762, section 3.5), all sines before all cosines.
    """
    if embed_dim % 4:
        raise UserError(f"positions 'sincos' need a width that is a multiple of 4, not {embed_dim}.")
    frequencies = 10000 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    angles = torch.arange(grid_size)[:, None] * frequencies  # (g, D / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (g, D / 2)
    columns, rows = line.repeat(grid_size, 1), line.repeat_interleave(grid_size, dim=0)  # (N, D / 2) each
    return torch.cat([columns, rows], dim=1).unsqueeze(1)


def init_positions(positions, grid_size, embed_dim, cls=False):
    """Position embeddings (N, 1, D), or (1 + N, 1, D) with one for the cls token: learned weights or a fixed table."""
    if positions == "learned":
        return init_token(grid_size**2 + cls, 1, embed_dim)
    if positions == "sincos":
        return nn.Buffer(F.pad(sincos_table(grid_size, embed_dim), (0, 0, 0, 0, int(cls), 0)))  # 0 for cls
    raise UserError(f"positions {positions!r} is unknown; choose from {', '.join(POSITIONS)}.")


class MAE_Encoder(nn.Module):
    """ViT without head; given ids_keep, it computes the visible patches only.

    Args: as `MAE_ViT` takes them.
    """

    def __init__(
        self, img_size, patch_size, embed_dim, encoder_depth, num_heads, positions, in_chans, qkv_bias, norm_eps
    ):
        super().__init__()
        if img_size % patch_size:
            raise UserError(f"patch_size {patch_size} does not divide img_size {img_size}.")
        if not 1 <= in_chans <= 16:
            raise UserError(f"in_chans {in_chans} must be 1 to 16.")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.cls_token = init_token(1, 1, embed_dim)
        self.pos_embedding = init_positions(positions, img_size // patch_size, embed_dim)
        self.patchify = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.transformer = transformer(embed_dim, encoder_depth, num_heads, qkv_bias, norm_eps)
        self.layer_norm = nn.LayerNorm(embed_dim, eps=norm_eps)

    def embed(self, images, ids_keep=None):
        """Images (B, C, H, W) to tokens (B, 1 + V, D), cls first; all N patches where ids_keep is None."""
        if images.shape[1:] != (self.in_chans, self.img_size, self.img_size):
            size, found = self.img_size, tuple(images.shape)
            raise ValueError(f"img_size is {size}: images must be (B, {self.in_chans}, {size}, {size}), not {found}.")
        patches = patchify(images, self.patch_size)  # (B, N, P)
        count = images.shape[0]  # len(images) would be a fixed number in an exported program
        position = self.pos_embedding.transpose(0, 1).expand(count, -1, -1)  # (B, N, D)
        if ids_keep is not None:  # before the embedding, so that hidden patches cost nothing
            patches, position = (x.take_along_dim(ids_keep[..., None], 1) for x in (patches, position))  # (B, V, ...)
        tokens = F.linear(patches, self.patchify.weight.flatten(1), self.patchify.bias) + position  # as the convolution
        return torch.cat([self.cls_token.expand(count, -1, -1), tokens], dim=1)  # (B, 1 + V, D)

    def forward(self, images, ids_keep=None):
        """Encode images (B, C, H, W) to features (B, 1 + V, D), cls first."""
        return self.layer_norm(self.transformer(self.embed(images, ids_keep)))


class MAE_Decoder(nn.Module):
    """Predicts every patch's pixels from the visible patches' features.

    Args:
        embed_dim, num_heads: of the encoder.
        decoder_embed_dim: width of the decoder's tokens; None: embed_dim. If the width of the encoder's heads divides
            it, the decoder's heads have the same width; else the decoder has num_heads heads.
    """

    def __init__(
        self, img_size, patch_size, embed_dim, decoder_depth, num_heads, decoder_embed_dim, positions, in_chans
    ):
        super().__init__()
        width, head_width = decoder_embed_dim or embed_dim, embed_dim // num_heads
        if width % head_width == 0:
            num_heads = width // head_width
        elif width % num_heads:
            raise UserError(
                f"decoder_embed_dim {width} is a multiple neither of the encoder's head width {head_width} nor of "
                f"num_heads {num_heads}; use a multiple of one of them."
            )
        # equal widths need no layer: keys and distributions of the weights are then the reference's
        self.embed = nn.Identity() if width == embed_dim else nn.Linear(embed_dim, width)
        self.mask_token = init_token(1, 1, width)
        self.pos_embedding = init_positions(positions, img_size // patch_size, width, cls=True)
        self.transformer = transformer(width, decoder_depth, num_heads)
        self.head = nn.Linear(width, in_chans * patch_size**2)

    def forward(self, features, ids_restore):
        """Features (B, 1 + V, D) to pixels (B, N, P); ids_restore (B, N): patch positions in [visible, hidden]."""
        features = self.embed(features)  # (B, 1 + V, width of the decoder)
        batch_size, num_visible = len(features), features.shape[1] - 1
        hidden = self.mask_token.expand(batch_size, ids_restore.shape[1] - num_visible, -1).to(features.dtype)
        tokens = torch.cat([features[:, 1:], hidden], dim=1)  # (B, N, D), visible ones first
        tokens = tokens.take_along_dim(ids_restore[..., None], 1)  # in image order
        tokens = torch.cat([features[:, :1], tokens], dim=1)  # (B, 1 + N, D)
        tokens = self.transformer(tokens + self.pos_embedding.transpose(0, 1))
        return self.head(tokens[:, 1:])  # (B, N, P)


class MAE_ViT(nn.Module):
    """Masked autoencoder; attributes keep the reference's names, so weights move both ways.

    Args:
        img_size, patch_size: pixels along an edge; images are square.
        embed_dim, num_heads: of the encoder; of the decoder, too, where decoder_embed_dim is None.
        encoder_depth, decoder_depth: transformer blocks.
        mask_ratio: fraction of patches hidden, in (0, 1); int(N * (1 - mask_ratio)) stay visible.
        mask_strategy: a key of MASK_STRATEGIES.
        norm_pix_loss: predict each patch's pixels normalised by their mean and variance (MAE paper, table 1d).
        decoder_embed_dim: as `MAE_Decoder` takes it (table 1b).
        positions: "learned", or "sincos" for a fixed table (appendix A.1), of encoder and decoder.
        in_chans: channels of the images.
        qkv_bias, norm_eps: of the encoder: whether q, k and v have biases, and eps of the LayerNorms. The defaults are
            the reference's; weights from elsewhere bring their own.

    Raises:
        UserError: the sizes do not fit each other, or the mask leaves nothing to see or to predict.
    """

    def __init__(
        self,
        img_size=32,
        patch_size=2,
        embed_dim=192,
        encoder_depth=12,
        num_heads=3,
        decoder_depth=4,
        mask_ratio=0.75,
        mask_strategy="random",
        norm_pix_loss=False,
        decoder_embed_dim=None,
        positions="learned",
        in_chans=3,
        qkv_bias=False,
        norm_eps=1e-5,
    ):
        super().__init__()
        if norm_pix_loss and in_chans * patch_size**2 == 1:
            raise UserError("norm_pix_loss has no deviation to divide by where a patch is one number.")
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        self.encoder = MAE_Encoder(
            img_size, patch_size, embed_dim, encoder_depth, num_heads, positions, in_chans, qkv_bias, norm_eps
        )
        self.shuffle = PatchShuffle(img_size // patch_size, mask_ratio, mask_strategy)
        self.decoder = MAE_Decoder(
            img_size, patch_size, embed_dim, decoder_depth, num_heads, decoder_embed_dim, positions, in_chans
        )

    def forward(self, images, ids_shuffle=None):
        """Hide patches and predict them.

        Args:
            images: (B, C, H, W) in [-1, 1].
            ids_shuffle: (B, N) int64 from `self.shuffle`, which patches are hidden; None draws new ones.

        Returns:
            pred: (B, N, P), every patch's predicted pixels, visible ones too: in the images' range, or normalised.
            mask: (B, N) bool, True where the patch was hidden.
        """
        if ids_shuffle is None:
            ids_shuffle = self.shuffle(len(images), device=images.device)
        features = self.encoder(images, ids_shuffle[:, : self.shuffle.num_visible])  # (B, 1 + V, D)
        ids_restore = ids_shuffle.argsort(dim=1)  # (B, N), the inverse permutation
        pred = self.decoder(features, ids_restore)  # (B, N, P)
        return pred, ids_restore >= self.shuffle.num_visible

    def loss(self, images, ids_shuffle=None):
        """Mean squared error over hidden pixels only, in float32 (MAE paper, section 3, "Reconstruction target").

        Args: as `forward` takes them. To train on another loss, change it here.
        """
        pred, mask = self(images, ids_shuffle)
        target = patchify(images, self.patch_size)  # (B, N, P)
        if self.norm_pix_loss:
            mean, std = mean_and_std(target)
            target = (target - mean) / std
        error = (pred.float() - target).square().mean(dim=-1)  # (B, N)
        return (error * mask).sum() / mask.sum()  # each image has equally many hidden patches

    @torch.no_grad()
    def reconstruct(self, images, ids_shuffle):
        """The masked images and the model's reconstructions of them.

        With norm_pix_loss the model predicts neither brightness nor contrast, so each hidden patch gets its true mean
        and variance.

        Returns:
            masked: (B, C, H, W), the images with hidden patches grey (0); reconstructed: (B, C, H, W), the images with
            hidden patches as predicted (the loss does not train predictions of visible patches).
        """
        pred, mask = self(images, ids_shuffle)
        pred, patches, mask = pred.float(), patchify(images, self.patch_size), mask[..., None]
        if self.norm_pix_loss:
            mean, std = mean_and_std(patches)
            pred = pred * std + mean
        masked, reconstructed = patches.masked_fill(mask, 0), torch.where(mask, pred, patches)
        return unpatchify(masked, self.patch_size), unpatchify(reconstructed, self.patch_size)


def drop_path_scales(batch_size, depth, rate, generator, device):
    """Draw drop path's factors for each block's attention and MLP: (B, depth, 2), each 0 or 1 / (1 - the block's rate).

    Each factor is drawn independently. The rates grow linearly from 0 in the first block to `rate` in the last, as
    in the official MAE (Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382).
    """
    keep = 1 - torch.linspace(0, rate, depth, device=device)[:, None]  # (depth, 1)
    kept = torch.rand(batch_size, depth, 2, generator=generator, device=device) < keep
    return kept / keep.clamp(min=1e-6)  # a block of rate 1 keeps nothing


def block_output(block, tokens, scales=None, cls_only=False):
    """Output of a block of `transformer` for tokens (B, N, D): the same numbers as timm's Block computes.

    Args:
        scales: (B, 2), each image's factors for the outputs of attention and of the MLP; None: 1.
        cls_only: compute and return the first token only: (B, 1, D).
    """

    def scaled(branch, which):
        return branch if scales is None else branch * scales[:, which, None, None]

    normed = block.norm1(tokens)
    attended = attend_from_cls(block.attn, normed) if cls_only else block.attn(normed)
    tokens = (tokens[:, :1] if cls_only else tokens) + scaled(attended, 0)
    return tokens + scaled(block.mlp(block.norm2(tokens)), 1)


def cls_qkv(attn, tokens):
    """Query (B, heads, 1, D / heads) of the first of tokens (B, N, D), keys, values (B, heads, N, D / heads) of all."""
    heads, parts = attn.num_heads, [tokens.shape[-1], 2 * tokens.shape[-1]]
    to_q, to_kv = attn.qkv.weight.split(parts)
    q_bias, kv_bias = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(parts)
    q = rearrange(F.linear(tokens[:, :1], to_q, q_bias), "b n (h d) -> b h n d", h=heads)
    return q, *rearrange(F.linear(tokens, to_kv, kv_bias), "b n (two h d) -> two b h n d", two=2, h=heads)


def attend_from_cls(attn, tokens):
    """What timm's Attention gives for the first of tokens (B, N, D) only: (B, 1, D)."""
    q, k, v = cls_qkv(attn, tokens)
    return attn.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class ViT_Classifier(MAE_Encoder):
    """The MAE's encoder, without masking, and a linear layer on the final LayerNorm of one pooled token.

    Args:
        pool: "cls", the cls token (the last block then computes no other token); or "mean", the mean of the patches'
            tokens, the global_pool of the official MAE.

    Its positions are learned; they start from the MAE's, even fixed ones, as in the official fine-tuning.
    """

    def __init__(
        self,
        img_size=32,
        patch_size=2,
        embed_dim=192,
        encoder_depth=12,
        num_heads=3,
        num_classes=10,
        pool="cls",
        in_chans=3,
        qkv_bias=False,
        norm_eps=1e-5,
    ):
        super().__init__(
            img_size, patch_size, embed_dim, encoder_depth, num_heads, "learned", in_chans, qkv_bias, norm_eps
        )
        self.pool = pool
        self.head = nn.Linear(embed_dim, num_classes)

    def group_matcher(self, coarse=False):
        """Patterns by depth for timm's param_groups_layer_decay; LayerNorm and head match none and come last."""
        return {"stem": r"cls_token|pos_embedding|patchify", "blocks": r"transformer\.(\d+)"}

    def load_encoder(self, mae_state):
        """Take the encoder's weights out of a MAE_ViT state dict; the head keeps its initialisation.

        With pool="mean", the LayerNorm keeps it, too, as in the official MAE: the MAE's was trained on single tokens.
        """
        prefix = "encoder."
        encoder = {key.removeprefix(prefix): value for key, value in mae_state.items() if key.startswith(prefix)}
        if self.pool == "mean":
            encoder |= self.layer_norm.state_dict(prefix="layer_norm.")
        missing, unexpected = self.load_state_dict(encoder, strict=False)
        assert set(missing) == {"head.weight", "head.bias"}, missing
        assert not unexpected, unexpected

    def pooled(self, images, scales=None):
        """Images (B, C, H, W) in [-1, 1] to the head's input (B, D): the pooled token after the final LayerNorm.

        Args:
            scales: (B, depth, 2) from `drop_path_scales`, in training; None: no drop path.
        """
        tokens = self.embed(images)  # (B, 1 + N, D)
        for i, block in enumerate(self.transformer):
            last_of_cls = self.pool == "cls" and block is self.transformer[-1]
            tokens = block_output(block, tokens, None if scales is None else scales[:, i], cls_only=last_of_cls)
        return self.layer_norm(tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1))

    def forward(self, images, scales=None):
        """Classify images: logits (B, num_classes). Args: as `pooled` takes them."""
        return self.head(self.pooled(images, scales))
