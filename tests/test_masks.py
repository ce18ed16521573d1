import doctest
import itertools
import math
import re
import sys
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch

from engine.errors import UserError
from masks import MASK_STRATEGIES, bayer_matrix
from model import MAE_ViT, PatchShuffle

README = (Path(__file__).parent.parent / "README.md").read_text()


def left_scores(batch_size, grid_size, num_visible, generator, device):
    """The left stays visible: nothing is drawn, and the patches of a column score alike."""
    return (torch.arange(grid_size**2, device=device) % grid_size).float().expand(batch_size, -1)


def row_scores(*args):
    """The strategy that the README adds."""
    names = {"torch": torch}
    exec(re.search(r"```python\n(def row_scores.*?)```", README, re.DOTALL)[1], names)
    return names["row_scores"](*args)


ADDED = {"left": left_scores, "row": row_scores}  # as a user would; all that holds for every strategy holds for them
STRATEGIES = list(MASK_STRATEGIES | ADDED)
DRAWN = ["random", "block", "shifted_grid", "jittered_grid", "cells", "noise", "blockwise", "row"]  # for each image
RATIOS = (0.25, 0.5, 0.6, 0.75, 0.9)
GRIDS = (4, 8, 14, 16)


@pytest.fixture(autouse=True)
def added_strategies(monkeypatch):
    for name, score in ADDED.items():
        monkeypatch.setitem(MASK_STRATEGIES, name, score)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def visible_maps(strategy, grid_size, mask_ratio, batch_size=32, seed=0):
    """(B, g, g) bool, True where visible."""
    shuffle = PatchShuffle(grid_size, mask_ratio, strategy)
    visible = torch.zeros(batch_size, grid_size**2, dtype=torch.bool)
    visible.scatter_(1, shuffle(batch_size, seeded(seed))[:, : shuffle.num_visible], True)
    return visible.view(batch_size, grid_size, grid_size)


def test_the_docstrings_examples_are_true():
    assert doctest.testmod(sys.modules["model"]) == (0, 5)


@pytest.mark.parametrize(("strategy", "grid_size", "ratio"), list(itertools.product(STRATEGIES, GRIDS, RATIOS)))
def test_every_strategy_hides_exactly_the_asked_number(strategy, grid_size, ratio):
    num_patches = grid_size**2
    shuffle = PatchShuffle(grid_size, ratio, strategy)
    ids = shuffle(16, seeded())
    assert torch.equal(
        ids.sort(dim=1).values, torch.arange(num_patches).expand(16, -1)
    )  # visible and hidden: all, once
    assert shuffle.num_visible == int(num_patches * (1 - ratio))
    assert (visible_maps(strategy, grid_size, ratio).sum((1, 2)) == int(num_patches * (1 - ratio))).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_generator_state_draws_the_same_masks(strategy):
    first, again = (visible_maps(strategy, 16, 0.75, seed=0) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("strategy", DRAWN)
def test_masks_differ_by_image_and_by_generator_state(strategy):
    first, other = (visible_maps(strategy, 16, 0.75, seed=seed) for seed in (0, 1))
    assert len(first.flatten(1).unique(dim=0)) > 2
    assert not torch.equal(first, other)


def test_the_grid_is_the_same_for_every_image_and_seed():
    grids = torch.cat([visible_maps("grid", 16, 0.75, seed=seed) for seed in (0, 1)])
    assert len(grids.unique(dim=0)) == 1


@pytest.mark.parametrize(("grid_size", "ratio"), list(itertools.product(GRIDS, RATIOS)))
def test_block_leaves_one_contiguous_square_visible(grid_size, ratio):
    for visible in visible_maps("block", grid_size, ratio):
        rows, columns = visible.any(1).nonzero().flatten(), visible.any(0).nonzero().flatten()
        box = visible[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert abs(box.shape[0] - box.shape[1]) <= 1  # as square as the count allows
        assert box[:-1].all()  # full but for its last row
        filled = int(box[-1].sum())
        assert box[-1, :filled].all()  # which is filled from one side


@pytest.mark.parametrize(
    ("grid_size", "ratio", "places"),
    [(4, 0.75, 3 * 3), (5, 0.84, 4 * 4), (5, 0.75, 4 * 3)],  # 2 x 2 in 4 x 4, 2 x 2 in 5 x 5, 2 rows of 3 in 5 x 5
)
def test_block_is_uniformly_placed(grid_size, ratio, places):
    corners = visible_maps("block", grid_size, ratio, batch_size=1000 * places).flatten(1).float().argmax(1)
    counts = corners.bincount()
    assert (counts > 0).sum() == places
    assert (counts[counts > 0] - 1000).abs().max() < 150  # 5 standard deviations


@pytest.mark.parametrize("grid_size", GRIDS)
@pytest.mark.parametrize("strategy", ["grid", "shifted_grid"])
def test_grid_is_one_of_each_2_x_2_at_075_and_a_checkerboard_at_05(strategy, grid_size):
    quarter = visible_maps(strategy, grid_size, 0.75).float()
    assert (torch.nn.functional.avg_pool2d(quarter[:, None], 2) == 0.25).all()
    assert ((quarter.sum(1) > 0).sum(1) == grid_size // 2).all()  # in straight rows and columns
    half = visible_maps(strategy, grid_size, 0.5)
    assert (half[:, 1:] ^ half[:, :-1]).all()
    assert (half[:, :, 1:] ^ half[:, :, :-1]).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_shifted_grid_is_the_grid_moved_around(ratio):
    (grid,) = visible_maps("grid", 8, ratio, batch_size=1)
    moved = torch.stack([grid.roll((down, right), (0, 1)) for down in range(8) for right in range(8)])
    drawn = visible_maps("shifted_grid", 8, ratio)
    assert (drawn[:, None] == moved).all((2, 3)).any(1).all()


@pytest.mark.parametrize("ratio", [0.75, 0.92])
def test_shifted_grid_shows_every_place_equally_often(ratio):
    share = visible_maps("shifted_grid", 8, ratio, batch_size=4000).float().mean(0)
    assert (share - int(64 * (1 - ratio)) / 64).abs().max() < 0.03


def test_bayer_matrix_is_the_textbooks():
    assert bayer_matrix(4, "cpu").tolist() == [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]


def edges(visible):
    """Mean number of neighbouring pairs of patches of which one is visible, of (B, g, g) bool."""
    pairs = [visible.diff(dim=dim).float().sum((1, 2)).mean().item() for dim in (1, 2)]
    return sum(pairs)


@pytest.mark.parametrize("grid_size", [7, 8, 14])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_neighbours_are_alike_or_not_as_the_strategys_name_promises(grid_size, ratio):
    cells, noise, random, jittered = (
        edges(visible_maps(strategy, grid_size, ratio, batch_size=500))
        for strategy in ("cells", "noise", "random", "jittered_grid")
    )
    assert cells < 0.75 * random
    assert noise < 0.9 * random
    assert random < jittered


@pytest.mark.parametrize("strategy", ["random", "jittered_grid", "cells", "noise"])
@pytest.mark.parametrize(("grid_size", "ratio"), [(8, 0.75), (7, 0.6), (14, 0.9)])
def test_every_place_is_visible_equally_often(strategy, grid_size, ratio):
    share = visible_maps(strategy, grid_size, ratio, batch_size=4000).float().mean(0)
    wanted = int(grid_size**2 * (1 - ratio)) / grid_size**2
    assert (share - wanted).abs().max() < 5 * math.sqrt(wanted * (1 - wanted) / 4000)


@pytest.mark.parametrize("visible", [1, 2, 3])
@pytest.mark.parametrize("grid_size", [4, 8, 14])
def test_jittered_grid_shows_equally_many_of_each_2_x_2(visible, grid_size):
    shown = visible_maps("jittered_grid", grid_size, 1 - visible / 4).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
    assert (shown.sum((2, 4)) == visible).all()
    assert len(shown.movedim(3, 2).flatten(3).view(-1, 4).unique(dim=0)) == math.comb(4, visible)  # each choice


def test_jittered_grid_is_even_at_small_ratios_too():
    sixteenth = visible_maps("jittered_grid", 16, 15 / 16, batch_size=500).unflatten(1, (-1, 4)).unflatten(3, (-1, 4))
    assert (sixteenth.sum((2, 4)) == 1).all()  # one of each 4 x 4
    assert sixteenth.any(0).all()


def test_cells_are_whole_but_for_one():
    cells = visible_maps("cells", 8, 0.7, batch_size=500).unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).sum((2, 4))
    partial = ((cells > 0) & (cells < 4)).sum((1, 2))
    assert (partial == 1).all()  # 19 visible patches: 4 cells and 3 patches of another
    assert (visible_maps("cells", 7, 0.75).sum((1, 2)) == 12).all()


def test_noise_has_blobs_and_gaps_but_no_large_ones():
    visible = visible_maps("noise", 16, 0.75, batch_size=500).float()

    def alike(distance):  # correlation of patches that are so far apart
        pairs = (visible[..., :-distance] - 0.25) * (visible[..., distance:] - 0.25)
        return (pairs.mean() / (0.25 * 0.75)).item()

    assert alike(1) > 0.3
    assert alike(3) < -0.05  # after a blob comes a gap
    assert abs(alike(9)) < 0.05


@pytest.mark.parametrize(("grid_size", "wanted"), [(14, 37.5), (8, 18.3)])
def test_blockwise_masks_have_as_much_edge_as_beits(grid_size, wanted):
    assert edges(visible_maps("blockwise", grid_size, 0.75, batch_size=3000)) == pytest.approx(wanted, abs=0.6)


def beit_mask(grid_size, num_hidden, smallest, random):
    """BEiT's algorithm as a plain loop over one image: (g, g) bool, True where hidden, at most num_hidden of them."""
    hidden = torch.zeros(grid_size, grid_size, dtype=torch.bool)
    failures = 0
    while failures < 10 and (to_hide := num_hidden - int(hidden.sum())):
        area, aspect = random.uniform(smallest, to_hide), math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if height < grid_size and width < grid_size:
            top, left = random.randint(0, grid_size - height), random.randint(0, grid_size - width)
            block = hidden[top : top + height, left : left + width]
            if 0 < (~block).sum() <= to_hide:
                block[:] = True
                failures = 0
    return hidden


def test_blockwise_hides_the_middle_as_often_as_beits_algorithm():
    random = Random(0)
    beit = torch.stack([beit_mask(8, 48, 64 * 16 / 196, random) for _ in range(1000)])
    assert 47.7 < beit.sum((1, 2)).float().mean() < 48  # it gives up at times
    ours = ~visible_maps("blockwise", 8, 0.75, batch_size=3000)
    assert (ours.float().mean(0) - beit.float().mean(0)).abs().max() < 0.07


@pytest.mark.parametrize(("share_hidden", "smallest"), [(0.25, 16 / 196), (0.3, 0.02), (0.1, 0.1)])
def test_blockwise_draws_the_papers_areas_and_aspect_ratios_at_uniform_places(share_hidden, smallest):
    num_visible = round(64**2 * (1 - share_hidden))
    score = partial(MASK_STRATEGIES["blockwise"], smallest=smallest, attempts=1)
    scores = score(1000, 64, num_visible, seeded(), "cpu").view(-1, 64, 64)
    block = scores >= 2  # all other patches are below
    block = block[block.any((1, 2))]  # a block that would hide too many is not taken
    assert len(block) > 400
    lines = torch.stack([block.any(2), block.any(1)])  # (2, B, 64)
    start, length = lines.int().argmax(2), lines.sum(2)
    assert torch.equal(block.sum((1, 2)), length.prod(0))  # full rectangles
    area = length.prod(0) / 64**2
    assert area.min() > 0.9 * smallest
    assert area.max() <= share_hidden
    assert area.mean() == pytest.approx((smallest + share_hidden) / 2, abs=0.02)
    aspect = (length[0] / length[1]).log() / -torch.tensor(0.3).log()  # from -1 to 1
    assert aspect.abs().max() < 1.06
    assert aspect.mean() == pytest.approx(0, abs=0.15)
    assert aspect.square().mean() == pytest.approx(1 / 3, abs=0.07)
    assert ((start + 0.5) / (64 - length + 1)).mean() == pytest.approx(0.5, abs=0.04)


def test_blockwise_makes_up_the_count_with_patches_beside_hidden_ones():
    scores = MASK_STRATEGIES["blockwise"](200, 8, 16, seeded(), "cpu", attempts=3).view(-1, 8, 8)
    blocks = scores >= 2
    beside = torch.nn.functional.max_pool2d(blocks[:, None].float(), 3, 1, 1)[:, 0].bool()
    lacking = (blocks.sum((1, 2)) < 48) & (beside.sum((1, 2)) > 48)
    assert lacking.sum() > 50
    hidden = torch.zeros(200, 64, dtype=torch.bool)
    hidden.scatter_(1, scores.flatten(1).argsort(dim=1)[:, 16:], True)
    assert (hidden.view(-1, 8, 8) & ~beside)[lacking].sum() == 0


@pytest.mark.parametrize("ratio", [-0.1, 0, 1e-17, 0.001, 0.99, 1, 1.5, *map(float, ("nan", "inf", "-inf"))])
def test_mask_ratio_must_leave_something_to_see_and_to_predict(ratio):
    if ratio == 0.001:  # hides one patch: int() rounds the visible ones down
        assert PatchShuffle(8, ratio, "random").num_visible == 63
        return
    with pytest.raises(ValueError, match="mask_ratio"):
        PatchShuffle(8, ratio, "random")


@pytest.mark.parametrize("grid_size", [2, 3, 5, *GRIDS])
def test_a_refused_mask_ratio_is_told_the_range_that_is_accepted(grid_size):
    with pytest.raises(ValueError, match="mask_ratio 1 must leave") as error:
        PatchShuffle(grid_size, 1, "random")
    least, most = map(float, re.search(r"use (\d\.\d{1,3}) to (\d\.\d{1,3})\.$", str(error.value)).groups())
    assert 0 < PatchShuffle(grid_size, least, "random").num_visible < grid_size**2
    assert PatchShuffle(grid_size, most, "random").num_visible == 1
    with pytest.raises(ValueError, match="must leave at least one"):
        PatchShuffle(grid_size, most + 0.001, "random")


def test_one_patch_is_refused_as_one_patch():
    with pytest.raises(UserError, match=r"at least 2 patches are needed\. .* patch_size"):
        MAE_ViT(img_size=8, patch_size=8)


def test_a_new_strategy_needs_only_a_line():
    visible = visible_maps("left", 4, 0.5)
    assert visible[:, :, :2].all()
    assert not visible[:, :, 2:].any()
    rows = visible_maps("row", 4, 0.75)
    assert torch.equal(rows.sum(2) == 4, rows.any(2))  # whole ones


def band_scores(batch_size, grid_size, num_visible, generator, device, width=0.3, side="left"):
    """A strategy with parameters of its own: hides a band at one side first."""
    if not 0 < width < 1:
        raise UserError(f"width must be in (0, 1), not {width}")
    columns = torch.arange(grid_size) / grid_size
    hidden = columns < width if side == "left" else columns >= 1 - width
    return hidden.float().expand(batch_size, grid_size, -1).flatten(1)


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (torch.rand(32, 4, 4), r"\(32, 4, 4\) torch.float32"),
        (torch.rand(1, 16), r"\(1, 16\) torch.float32"),
        (torch.rand(32, 16, 1), r"\(32, 16, 1\) torch.float32"),
        (torch.zeros(32, 16, dtype=torch.complex64), "complex64"),
        ([[0.5] * 16] * 32, "list"),
        (torch.tensor([0.5, math.nan] * 8).expand(32, -1), "nan or infinite"),
        (torch.arange(16).expand(32, -1) >= 8, "4 of 16 patches must be visible .* not 8"),
        (torch.arange(16).expand(32, -1) >= 2, "4 of 16 patches must be visible .* not 2"),
    ],
)
def test_scores_that_are_none_are_refused_by_the_strategys_name(monkeypatch, scores, found):
    monkeypatch.setitem(MASK_STRATEGIES, "mine", lambda *args: scores)
    with pytest.raises(ValueError, match=f"mask_strategy 'mine' .*{found}") as error:
        visible_maps("mine", 4, 0.75)
    assert not isinstance(error.value, UserError)  # the student's own mistake keeps its traceback


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.bool])
def test_scores_may_be_any_real_numbers(monkeypatch, dtype):
    monkeypatch.setitem(MASK_STRATEGIES, "half", lambda *args: (torch.arange(16) // 8).to(dtype).expand(32, -1))
    visible = visible_maps("half", 4, 0.5)
    assert visible[:, :2].all()
    assert not visible[:, 2:].any()
