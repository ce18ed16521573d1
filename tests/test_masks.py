import doctest
import itertools
import math
import re
import sys
from pathlib import Path

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
DRAWN = ["random", "block", "shifted_grid", "blockwise", "row"]  # for each image
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


def test_blockwise_hides_large_connected_blocks():
    def same_neighbours(visible):  # share of neighbouring pairs of patches that are both hidden or both visible
        return (visible[:, 1:] == visible[:, :-1]).float().mean()

    blockwise, noise = visible_maps("blockwise", 16, 0.75, 500), visible_maps("random", 16, 0.75, 500)
    assert same_neighbours(blockwise) > 0.85 > same_neighbours(noise)
    hidden = (~blockwise).float()
    inner = torch.nn.functional.avg_pool2d(hidden[:, None], 4, stride=1) == 1  # a wholly hidden 4 x 4
    assert inner.flatten(1).any(1).all()


def taken_apart(share_hidden, num_blocks, grid_size=64, **more):
    """The scores of 1,000 blockwise masks as blocks and a slope that orders the patches within a block.

    Returns:
        blocks: (1000, g, g) int, num_blocks in the first block, one less in the second, ..., 0 in none.
        slope: (2, 1000, 1, 1), the step from a row to the next and from a column to the next.
    """
    num_visible = round(grid_size**2 * (1 - share_hidden))
    scores = MASK_STRATEGIES["blockwise"](1000, grid_size, num_visible, seeded(), "cpu", num_blocks=num_blocks, **more)
    scores = scores.view(-1, grid_size, grid_size)
    slope = torch.stack([scores.diff(dim=dim).flatten(1).median(1).values for dim in (1, 2)])[..., None, None]
    line = torch.arange(grid_size)
    level = scores - slope[0] * line[:, None] - slope[1] * line
    blocks = level - level.flatten(1).min(1).values[:, None, None]
    assert (blocks - blocks.round()).abs().max() < 1e-3  # there is nothing else in a score
    return blocks.round().int(), slope


def rectangles(blocks):
    """Where the rectangles in (B, g, g) bool start and how long they are: two (2, B), rows first."""
    lines = torch.stack([blocks.any(2), blocks.any(1)])  # (2, B, g)
    start, length = lines.int().argmax(2), lines.sum(2)
    assert (length > 0).all()
    assert torch.equal(blocks.sum((1, 2)), length.prod(0))  # full
    assert torch.equal(lines.int().flip(2).argmax(2), blocks.shape[1] - start - length)  # without gaps
    return start, length


def test_blockwise_draws_the_papers_areas_and_aspect_ratios_at_uniform_places():
    # all tolerances on means and counts: 5 standard deviations
    start, length = rectangles(taken_apart(0.25, num_blocks=1)[0] == 1)
    area = length.prod(0) / 64**2
    assert area.min() > 0.075
    assert area.max() < 0.26
    assert area.mean() == pytest.approx((16 / 196 + 0.25) / 2, abs=0.008)
    aspect = (length[0] / length[1]).log() / -torch.tensor(0.3).log()  # from -1 to 1
    assert aspect.abs().max() < 1.06
    assert aspect.mean() == pytest.approx(0, abs=0.1)
    assert aspect.square().mean() == pytest.approx(1 / 3, abs=0.05)
    places = 64 - length + 1
    assert ((start + 0.5) / places).mean() == pytest.approx(0.5, abs=0.033)
    for at_edge in (start == 0, start + length == 64):
        assert at_edge.sum() == pytest.approx((1 / places).sum(), abs=37)


@pytest.mark.parametrize("share_hidden", [0.02, 16 / 196])
def test_blockwise_blocks_are_8_percent_of_the_image_where_no_more_is_to_be_hidden(share_hidden):
    _, length = rectangles(taken_apart(share_hidden, num_blocks=1)[0] == 1)
    assert (length.prod(0) / 64**2).mean() == pytest.approx(16 / 196, rel=0.01)


def test_blockwise_blocks_may_be_as_large_as_all_that_is_hidden():
    _, length = rectangles(taken_apart(0.98, num_blocks=1)[0] == 1)
    assert length.max() == 64  # a longer one ends at the edge
    assert 0.9 < length.prod(0).max() / 64**2 <= 1


@pytest.mark.parametrize("grid_size", [3, 4])
def test_blockwise_blocks_are_one_or_two_patches_long_on_the_smallest_grids(grid_size):
    _, length = rectangles(taken_apart(0.06, num_blocks=1, grid_size=grid_size)[0] == 1)
    assert set(length.unique().tolist()) == {1, 2}


def test_blockwise_hides_block_after_block_and_cuts_the_last_along_a_line():
    blocks, slope = taken_apart(0.25, num_blocks=4)
    assert set(blocks.unique().tolist()) == {0, 1, 2, 3, 4}
    _, length = rectangles(blocks == 4)
    assert length.prod(0).sum() > (blocks == 3).sum()  # drawn alike, but the first may cover the second
    assert (slope.abs().sum(0) * 63 < 1).all()  # no patch of a later block comes before one of an earlier block
    assert ((slope > 0).sum((1, 2, 3)) - 500).abs().max() < 80  # any direction; 5 standard deviations


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


@pytest.mark.parametrize("smallest", [0.02, 0.3])
def test_the_smallest_block_of_blockwise_can_be_chosen(smallest):
    _, length = rectangles(taken_apart(0.5, num_blocks=1, smallest=smallest)[0] == 1)
    area = length.prod(0) / 64**2
    assert area.min().item() == pytest.approx(smallest, abs=0.02)
    assert area.max().item() == pytest.approx(0.5, abs=0.02)


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
