"""Mask strategies: which patches of an image a MAE sees.

A strategy only scores patches, score(batch_size, grid_size, num_visible, generator, device) -> (B, N) float: those of a
grid_size x grid_size grid in raster order. The num_visible lowest of each image stay visible (`model.PatchShuffle`), so
every strategy hides equally many. To add one: write such a function and name it in MASK_STRATEGIES. One with other
parameters is one more line there: "blockwise_small": functools.partial(blockwise_scores, smallest=0.1).
"""

import math

import torch


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


def blockwise_scores(batch_size, grid_size, num_visible, generator, device, num_blocks=24, smallest=16 / 196):
    """Several large blocks are hidden, one after another, until the count is reached (the paper's "block").

    BEiT's block-wise masking (Bao et al. 2021, arXiv:2106.08254, algorithm 1): areas from `smallest` (a
    fraction of the image) to all that is to be hidden, aspect ratios from 0.3 to 1 / 0.3. BEiT stops at "enough"; here
    the last block is cut along a line in a random direction, so that the count is exact.
    """
    num_patches = grid_size**2

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(batch_size, *shape, generator=generator, device=device)

    grid = torch.arange(grid_size, device=device)
    smallest = smallest * num_patches
    area = uniform(smallest, max(smallest, num_patches - num_visible), num_blocks)
    aspect = uniform(math.log(0.3), -math.log(0.3), num_blocks).exp()

    def spans(length):  # (B, K) lengths -> (B, K, g) bool, one span of that length at a uniform place
        length = length.round().clamp(1, grid_size)
        start = (uniform(0, 1, num_blocks) * (grid_size - length + 1)).floor()
        return (grid >= start[..., None]) & (grid < (start + length)[..., None])

    rows, columns = spans((area * aspect).sqrt()), spans((area / aspect).sqrt())
    scores = torch.zeros(batch_size, grid_size, grid_size, device=device)  # num_blocks - k: block k was first to cover
    for k in reversed(range(num_blocks)):
        scores.masked_fill_(rows[:, k, :, None] & columns[:, k, None, :], num_blocks - k)
    down, right = uniform(-0.5, 0.5, 1, 1), uniform(-0.5, 0.5, 1, 1)
    ramp = (down * grid[:, None] + right * grid) / grid_size  # (B, g, g) within 0.5 of its middle value
    return (scores + 0.9 * ramp).flatten(1)


MASK_STRATEGIES = {
    "random": random_scores,
    "block": block_scores,
    "grid": grid_scores,
    "shifted_grid": shifted_grid_scores,
    "blockwise": blockwise_scores,
}
