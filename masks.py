"""Mask strategies: which patches of an image a MAE sees.

A strategy is a function score(batch_size, grid_size, num_visible, generator, device) -> (B, N) float, the scores of a
grid_size x grid_size grid of patches in raster order. `model.PatchShuffle` keeps the num_visible lowest of each image
visible, so all strategies hide equally many. Of equal scores the first stay visible: add a little noise to break ties.
To add a strategy, write such a function and add it to MASK_STRATEGIES. A variant of one is one more line there:
"blockwise_small": functools.partial(blockwise_scores, smallest=0.1).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange


def random_scores(batch_size, grid_size, num_visible, generator, device):
    """Every patch equally likely, independently of its neighbours (MAE paper, section 3, "Masking")."""
    return torch.rand(batch_size, grid_size**2, generator=generator, device=device)


def block_scores(batch_size, grid_size, num_visible, generator, device):
    """One contiguous square of visible patches at a uniformly drawn place; all else is hidden.

    Where num_visible is no square number the square's last rows are not full. Not the paper's "block": see
    `blockwise_scores`.
    """
    width = math.isqrt(num_visible - 1) + 1  # the smallest square that holds num_visible
    height = -(-num_visible // width)
    grid = torch.arange(grid_size, device=device)
    top = torch.randint(grid_size - height + 1, (batch_size, 1), generator=generator, device=device)
    left = torch.randint(grid_size - width + 1, (batch_size, 1), generator=generator, device=device)
    row, column = (grid - top)[:, :, None], (grid - left)[:, None, :]  # (B, g, 1), (B, 1, g), inside the square from 0
    inside = (row >= 0) & (column >= 0) & (column < width)
    scores = torch.where(inside, row * width + column, grid_size**2)
    return scores.flatten(1).float()


def bayer_matrix(min_size, device):
    """Ranks of an ordered dither (Bayer 1973), (S, S), S the first power of two >= min_size.

    Its k lowest ranks are spread evenly for every k: a quarter of them is one of each 2 x 2, half a checkerboard.
    """
    ranks = torch.zeros(1, 1, device=device)
    while ranks.shape[0] < min_size:
        top, bottom = torch.cat([4 * ranks, 4 * ranks + 2], 1), torch.cat([4 * ranks + 3, 4 * ranks + 1], 1)
        ranks = torch.cat([top, bottom])
    return ranks


def grid_scores(batch_size, grid_size, num_visible, generator, device):
    """A regular lattice, the same for every image: 1 of each 2 x 2 visible at mask ratio 0.75."""
    ranks = bayer_matrix(grid_size, device)[:grid_size, :grid_size]
    return ranks.flatten().expand(batch_size, -1)


def shifted_grid_scores(batch_size, grid_size, num_visible, generator, device):
    """The lattice of `grid_scores` at a place drawn per image, so that every patch position is visible at times."""
    ranks = bayer_matrix(grid_size, device)
    size = ranks.shape[0]
    shift = torch.randint(size, (2, batch_size, 1), generator=generator, device=device)
    rows, columns = (torch.arange(grid_size, device=device) + shift) % size  # (B, g) each
    return ranks[rows[:, :, None], columns[:, None, :]].flatten(1)


def jittered_grid_scores(batch_size, grid_size, num_visible, generator, device):
    """One random patch of each 2 x 2 is visible at mask ratio 0.75 (uniform masking, Li et al. 2022, arXiv:2205.10063).

    At other ratios, the visible patches are spread evenly, too: the grid is cut into quarters again and again, and the
    quarters of each cut get equally many visible patches.
    """
    scores = torch.zeros(batch_size, 1, 1, device=device)
    while (size := scores.shape[1]) < grid_size:
        order = torch.rand(batch_size, size, size, 4, generator=generator, device=device).argsort(dim=-1)
        order = rearrange(order, "b h w (r c) -> b (h r) (w c)", r=2)  # of the four quarters of each square
        scores = scores.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) + size**2 * order
    return scores[:, :grid_size, :grid_size].flatten(1)


def cell_scores(batch_size, grid_size, num_visible, generator, device):
    """Whole cells of 2 x 2 patches are visible or hidden (Pixio, arXiv:2512.15715).

    A part of one cell makes the count exact. Where grid_size is odd, the cells of the last row and column are cut.
    """
    side = -(-grid_size // 2)
    cells = torch.rand(batch_size, side**2, generator=generator, device=device).argsort(dim=1)
    cells = cells.view(-1, side, side).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    within = torch.rand(batch_size, grid_size, grid_size, generator=generator, device=device)
    return (cells[:, :grid_size, :grid_size] + within).flatten(1)


def noise_scores(batch_size, grid_size, num_visible, generator, device, fine=1.0, coarse=2.0):
    """Hidden and visible blobs of medium size: the highest values of band-passed noise are hidden.

    ColorMAE's green noise, the best of its bands (Hinojosa et al. 2024, arXiv:2407.13036, section 3): white noise
    blurred by a narrow Gaussian, minus the same noise blurred by a wide one. `fine` and `coarse` are the standard
    deviations in patches, our choice.
    """
    margin = math.ceil(3 * coarse)  # a blur reaches this far: with it, edges are blurred like the middle
    white = torch.randn(batch_size, *[grid_size + 2 * margin] * 2, generator=generator, device=device)
    inner = torch.arange(grid_size, device=device)
    distance = inner[:, None] + margin - torch.arange(grid_size + 2 * margin, device=device)  # (g, g + 2 margin)

    def blurred(sigma):
        kernel = torch.softmax(-0.5 * (distance / sigma) ** 2, dim=1)
        return kernel @ white @ kernel.T  # (B, g, g)

    return (blurred(fine) - blurred(coarse)).flatten(1)


def blockwise_scores(batch_size, grid_size, num_visible, generator, device, smallest=16 / 196, attempts=40):
    """Several large blocks are hidden, one after another, until the count is reached (the paper's "block").

    BEiT's block-wise masking (Bao et al. 2021, arXiv:2106.08254, algorithm 1): areas from `smallest` (a fraction of the
    image) to what is still to be hidden, aspect ratios from 0.3 to 1 / 0.3. As in BEiT's code, a block is rejected if
    it is as high or as wide as the image or would hide too many. After ten rejections, BEiT stops and hides fewer. Here
    each image gets `attempts` tries; then patches with the most hidden neighbours are hidden to make the count exact.
    """

    def uniform(low, high):
        return low + (high - low) * torch.rand(attempts, batch_size, 1, generator=generator, device=device)

    smallest, num_hidden = smallest * grid_size**2, grid_size**2 - num_visible
    share, aspect = uniform(0, 1), uniform(math.log(0.3), -math.log(0.3)).exp()
    down, right = uniform(0, 1), uniform(0, 1)
    grid = torch.arange(grid_size, device=device)

    def span(length, place):  # (B, 1) each -> (B, g) bool
        start = (place * (grid_size - length + 1)).floor()
        return (grid >= start) & (grid < start + length)

    hidden = torch.zeros(batch_size, grid_size, grid_size, dtype=torch.bool, device=device)
    for k in range(attempts):
        to_hide = num_hidden - hidden.sum((1, 2))[:, None]  # (B, 1)
        area = smallest + share[k] * (to_hide - smallest)
        height, width = (area * aspect[k]).sqrt().round(), (area / aspect[k]).sqrt().round()
        block = span(height, down[k])[:, :, None] & span(width, right[k])[:, None, :]
        new = (block & ~hidden).sum((1, 2))[:, None]
        fits = (height < grid_size) & (width < grid_size) & (new <= to_hide)
        hidden |= block & fits[..., None]
    touched = F.avg_pool2d(hidden[:, None].float(), 3, stride=1, padding=1)[:, 0]  # share of hidden ones around
    ties = 0.1 * torch.rand(batch_size, grid_size, grid_size, generator=generator, device=device)  # < 1 patch of 9
    return (2 * hidden + touched + ties).flatten(1)


MASK_STRATEGIES = {
    "random": random_scores,
    "block": block_scores,
    "grid": grid_scores,
    "shifted_grid": shifted_grid_scores,
    "jittered_grid": jittered_grid_scores,
    "cells": cell_scores,
    "noise": noise_scores,
    "blockwise": blockwise_scores,
}
