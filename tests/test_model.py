import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import utils
from model import (
    MASK_STRATEGIES,
    MAE_Encoder,
    MAE_ViT,
    PatchShuffle,
    ViT_Classifier,
    bayer_matrix,
    mae_loss,
    patchify,
    unpatchify,
)

HERE = Path(__file__).parent
STRATEGIES = list(MASK_STRATEGIES)
RATIOS = (0.25, 0.5, 0.6, 0.75, 0.9)
GRIDS = (4, 8, 14, 16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def visible_maps(strategy, grid_size, mask_ratio, batch_size=32, seed=0):
    """(B, g, g) bool, True where visible."""
    shuffle = PatchShuffle(grid_size, mask_ratio, strategy)
    visible = torch.zeros(batch_size, grid_size**2, dtype=torch.bool)
    visible.scatter_(1, shuffle(batch_size, seeded(seed))[:, : shuffle.num_visible], True)
    return visible.view(batch_size, grid_size, grid_size)


def small_mae(**changes):
    torch.manual_seed(0)
    return MAE_ViT(
        **{"img_size": 8, "embed_dim": 24, "encoder_depth": 2, "num_heads": 3, "decoder_depth": 1, **changes}
    )


# --- the reference ---


@pytest.fixture(scope="module")
def parity():
    """The reference's worked example: weights, masks, and everything computed from them, in float32."""
    with np.load(HERE / "parity_small.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def under(parity, prefix):
    return {name.removeprefix(prefix): value for name, value in parity.items() if name.startswith(prefix)}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_mae_computes_the_references_numbers(parity):
    model = MAE_ViT(img_size=8, patch_size=2, embed_dim=48, encoder_depth=2, num_heads=3, decoder_depth=2)
    model.load_state_dict(under(parity, "mae/"))
    ids_shuffle = parity["forward_indexes"].T
    close(model.encoder(parity["image"], ids_shuffle[:, :4]), parity["features"].transpose(0, 1))
    pred, mask = model(parity["image"], ids_shuffle)
    close(unpatchify(pred, 2), parity["predicted_img"])
    close(unpatchify(mask[..., None].expand_as(pred).float(), 2), parity["mask"])
    loss = mae_loss(pred, parity["image"], mask)
    close(loss, parity["loss"])
    loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, parity[f"grad/{name}"])


def test_classifier_computes_the_references_logits(parity):
    model = ViT_Classifier(img_size=8, patch_size=2, embed_dim=48, encoder_depth=2, num_heads=3)
    model.load_state_dict(under(parity, "classifier/"))
    close(model(parity["image"]), parity["logits"])


@pytest.mark.parametrize(("model", "heading"), [(MAE_ViT, "# MAE_ViT"), (ViT_Classifier, "# ViT_Classifier")])
def test_default_state_dict_has_the_references_keys_and_shapes(model, heading):
    section = (HERE / "state_dict_keys.txt").read_text().split(heading)[1].split("\n\n")[0]
    theirs = dict(line.split(" ", 1) for line in section.splitlines()[1:])
    with torch.device("meta"):
        ours = {key: str(tuple(value.shape)) for key, value in model().state_dict().items()}
    assert ours == theirs


@pytest.mark.parametrize(("depth", "count"), [(2, 6_324_108), (4, 7_212_684), (8, 8_989_836)])
def test_parameter_counts_are_the_references(depth, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in MAE_ViT(decoder_depth=depth).parameters()) == count


# --- patches ---


def test_patchify_and_unpatchify_are_inverses():
    images = torch.randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(patches[0, 5], images[0, :, 4:8, 8:12].flatten())  # raster order; (channel, row, column)
    assert torch.equal(unpatchify(patches, 4), images)


# --- masks ---


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
    first, again, other = (visible_maps(strategy, 16, 0.75, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (strategy == "grid")


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"grid"}))
def test_images_of_a_batch_have_different_masks(strategy):
    assert len(visible_maps(strategy, 16, 0.75).flatten(1).unique(dim=0)) > 2


@pytest.mark.parametrize(("grid_size", "ratio"), list(itertools.product(GRIDS, RATIOS)))
def test_block_leaves_one_contiguous_square_visible(grid_size, ratio):
    for visible in visible_maps("block", grid_size, ratio):
        rows, columns = visible.any(1).nonzero().flatten(), visible.any(0).nonzero().flatten()
        box = visible[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert abs(box.shape[0] - box.shape[1]) <= 1  # as square as the count allows
        assert box[:-1].all()  # full but for its last row
        filled = int(box[-1].sum())
        assert box[-1, :filled].all()  # which is filled from one side


def test_block_is_uniformly_placed():
    corners = visible_maps("block", 4, 0.75, batch_size=9000).flatten(1).float().argmax(1)  # 2 x 2 in 4 x 4: 9 places
    counts = corners.bincount()
    assert (counts > 0).sum() == 9
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


def test_shifted_grid_shows_every_place_equally_often():
    share = visible_maps("shifted_grid", 8, 0.75, batch_size=4000).float().mean(0)
    assert (share - 0.25).abs().max() < 0.04


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


@pytest.mark.parametrize("ratio", [-0.1, 0, 0.001, 0.99, 1, 1.5, float("nan")])
def test_mask_ratio_must_leave_something_to_see_and_to_predict(ratio):
    if ratio == 0.001:  # hides one patch: int() rounds the visible ones down
        assert PatchShuffle(8, ratio, "random").num_visible == 63
        return
    with pytest.raises(ValueError, match="mask_ratio"):
        PatchShuffle(8, ratio, "random")


def test_a_new_strategy_needs_only_a_line(monkeypatch):
    def left_to_right(batch_size, grid_size, num_visible, generator, device):
        return (torch.arange(grid_size**2, device=device) % grid_size).float().expand(batch_size, -1)  # with ties

    monkeypatch.setitem(MASK_STRATEGIES, "left", left_to_right)
    visible = visible_maps("left", 4, 0.5)
    assert visible[:, :, :2].all()
    assert not visible[:, :, 2:].any()


# --- model ---


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hidden_pixels_do_not_reach_the_encoder(strategy):
    model = small_mae(mask_strategy=strategy)
    images, ids = torch.randn(4, 3, 8, 8), model.shuffle(4, seeded())
    _, mask = model(images, ids)
    hidden = unpatchify(mask[..., None].expand(-1, -1, 12), 2)
    changed = torch.where(hidden, torch.randn_like(images), images)
    assert not torch.equal(changed, images)
    ids_keep = ids[:, : model.shuffle.num_visible]
    assert torch.equal(model.encoder(images, ids_keep), model.encoder(changed, ids_keep))
    assert not torch.equal(model.encoder(images), model.encoder(changed))


def test_loss_is_the_mean_over_hidden_pixels_and_has_no_gradient_elsewhere():
    images, pred = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 12, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    errors = []
    for b in range(2):
        for n in range(4):
            row, column = n // 2 * 2, n % 2 * 2
            patch = images[b, :, row : row + 2, column : column + 2].flatten()
            errors += [(p - q) ** 2 for p, q in zip(pred[b, n].tolist(), patch.tolist(), strict=True) if mask[b, n]]
    loss = mae_loss(pred, images, mask)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    loss.backward()
    assert torch.equal(pred.grad.abs().sum(-1) > 0, mask)


def test_forward_without_masks_draws_new_ones():
    model, images = small_mae(), torch.randn(8, 3, 8, 8)
    first, second = model(images)[1], model(images)[1]
    assert not torch.equal(first, second)
    assert (first.sum(1) == 12).all()


needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile on a CPU needs a C++ compiler")


fast_paths = pytest.mark.parametrize(
    ("precision", "compiled", "tolerance"),
    [("float32", False, 1e-5), ("bf16", False, 1e-2), pytest.param("float32", True, 1e-5, marks=needs_compiler)],
)


@fast_paths
def test_the_fast_paths_have_the_plain_ones_loss_and_gradients(precision, compiled, tolerance):
    images = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1

    def loss_and_norm(model, precision, compiled=False):
        with utils.autocast(precision, images.device):
            pred, mask = utils.compiled(model, compiled, images.device)(images, model.shuffle(4, seeded()))
        loss = mae_loss(pred, images, mask)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        return loss.item(), norm.item()

    plain, fast = small_mae(encoder_depth=1), small_mae(encoder_depth=1)
    utils.tune(fast, images.device, precision, num_patches=16)
    assert [model.encoder.transformer[0].attn.fused_attn for model in (plain, fast)] == [True, False]
    assert loss_and_norm(fast, precision, compiled) == pytest.approx(loss_and_norm(plain, "float32"), rel=tolerance)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_forward_pass_keeps_to_the_gpu_and_reads_no_number_back(strategy):
    # fake tensors have a device and no numbers: they need no GPU, do not mix devices, and refuse .item()
    with FakeTensorMode():
        with torch.device("cuda"):
            model, classifier = MAE_ViT(mask_strategy=strategy), ViT_Classifier()
        pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        images = data.normalize(data.flip_and_crop(pixels, generator=None))
        masks = model.shuffle(4, device=images.device)
        pred, mask = model(images, masks)
        results = masks, mae_loss(pred, images, mask), *model.reconstruct(images, masks), classifier(images)
    assert {result.device.type for result in results} == {"cuda"}


def test_reconstruction_keeps_visible_patches_and_greys_hidden_ones():
    model, images = small_mae(), torch.randn(4, 3, 8, 8)
    ids = model.shuffle(4, seeded())
    pred, mask = model(images, ids)
    masked, reconstructed = (patchify(picture, 2) for picture in model.reconstruct(images, ids))
    assert torch.equal(masked[~mask], patchify(images, 2)[~mask])
    assert torch.equal(reconstructed[~mask], patchify(images, 2)[~mask])
    assert not masked[mask].any()
    assert torch.equal(reconstructed[mask], pred[mask])


def test_classifier_takes_the_encoder_and_keeps_its_own_head():
    model, classifier = small_mae(), ViT_Classifier(8, 2, 24, 2, 3, num_classes=5)
    head = classifier.head.weight.clone()
    classifier.load_encoder(model.state_dict())
    assert torch.equal(classifier.head.weight, head)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(classifier(images), classifier.head(model.encoder(images)[:, 0]))


@fast_paths
def test_the_classifier_has_the_loss_and_gradients_of_computing_all_tokens(precision, compiled, tolerance):
    images, labels = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1, torch.arange(4)
    model = ViT_Classifier(8, 2, 24, 2, 3)

    def whole(images):
        return model.head(MAE_Encoder.forward(model, images)[:, 0])

    def loss_and_gradients(forward, precision):
        model.zero_grad()
        with utils.autocast(precision, images.device):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    plain = loss_and_gradients(whole, "float32")
    fast = loss_and_gradients(utils.compiled(model, compiled, images.device), precision)
    for ours, theirs in zip(fast, plain, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_tiny_model_learns_one_batch_by_heart():
    model = small_mae(decoder_depth=2)
    images, ids = torch.randn(4, 3, 8, 8), model.shuffle(4, seeded())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        pred, mask = model(images, ids)
        loss = mae_loss(pred, images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05  # predicting the mean gives 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size 3 does not divide img_size 8"),
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 24; these do: 1, 2, 3, 4, 6, 8, 12, 24"),
        ({"mask_strategy": "spiral"}, "spiral.*random, block, grid, shifted_grid, blockwise"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_mae(**changes)
