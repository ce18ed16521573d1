import itertools
import math
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.device import autocast, compiled, tune
from images.augmentation import flip_and_shift, random_resized_crop
from images.pixels import normalize
from masks import MASK_STRATEGIES
from model import (
    MAE_Encoder,
    MAE_ViT,
    ViT_Classifier,
    block_output,
    drop_path_scales,
    patchify,
    transformer,
    unpatchify,
)
from scripts.cost import gflop_per_image

HERE = Path(__file__).parent
README = (HERE.parent / "README.md").read_text()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
    loss = model.loss(parity["image"], ids_shuffle)
    close(loss, parity["loss"])
    loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, parity[f"grad/{name}"])


def test_classifier_computes_the_references_logits(parity):
    model = ViT_Classifier(img_size=8, patch_size=2, embed_dim=48, encoder_depth=2, num_heads=3)
    model.load_state_dict(under(parity, "classifier/"))
    close(model(parity["image"]), parity["logits"])


@torch.no_grad()
def test_one_channel_has_the_loss_of_three_equal_ones_under_summed_kernels():
    colour = small_mae()
    state = colour.state_dict()
    grey = small_mae(in_chans=1)
    for name in ("decoder.head.weight", "decoder.head.bias"):  # (channel, row, column): the same of each channel
        state[name] = state[name][: len(state[name]) // 3].repeat(3, *[1] * (state[name].ndim - 1))
    colour.load_state_dict(state)
    state = {name: value[: len(value) // 3] if "head" in name else value for name, value in state.items()}
    state["encoder.patchify.weight"] = state["encoder.patchify.weight"].sum(1, keepdim=True)
    grey.load_state_dict(state)
    images, ids_shuffle = torch.rand(4, 1, 8, 8, generator=seeded()) * 2 - 1, colour.shuffle(4, seeded())
    close(grey.loss(images, ids_shuffle), colour.loss(images.expand(-1, 3, -1, -1), ids_shuffle))
    assert grey.reconstruct(images, ids_shuffle)[1].shape == images.shape


@torch.no_grad()
@pytest.mark.parametrize(("pool", "theirs"), [("cls", "token"), ("mean", "avg")])
def test_an_encoder_with_biases_of_q_k_and_v_and_another_eps_computes_what_timm_does(pool, theirs):
    timm = VisionTransformer(
        8, 2, 3, 5, embed_dim=24, depth=2, num_heads=3, global_pool="token" if pool == "cls" else "avg"
    )
    classifier = ViT_Classifier(8, 2, 24, 2, 3, num_classes=5, pool=pool, qkv_bias=True, norm_eps=1e-6)
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=seeded())
    names = {"pos_embedding": "pos_embed", "patchify": "patch_embed.proj", "transformer": "blocks"}
    names["layer_norm"] = "norm" if pool == "cls" else "fc_norm"
    state = {}
    for name, value in classifier.state_dict().items():
        first, dot, rest = name.partition(".")
        state[names.get(first, first) + dot + rest] = value
    state["pos_embed"] = torch.nn.functional.pad(state["pos_embed"].transpose(0, 1), (0, 0, 1, 0))
    timm.load_state_dict(state)
    images = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1
    close(classifier(images), timm.eval()(images))


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


def test_default_models_hide_75_percent_at_random_and_have_3_heads():
    with torch.device("meta"):
        mae, classifier = MAE_ViT(), ViT_Classifier()
    assert (mae.shuffle.mask_ratio, mae.shuffle.mask_strategy) == (0.75, "random")
    blocks = [*mae.encoder.transformer, *mae.decoder.transformer, *classifier.transformer]
    assert {block.attn.num_heads for block in blocks} == {3}


def test_tokens_and_positions_start_small_and_random():
    model = small_mae(embed_dim=192)
    for part in (model.encoder.cls_token, model.encoder.pos_embedding, model.decoder.mask_token):
        assert part.mean().abs() < 0.01
        assert part.std().item() == pytest.approx(0.02, rel=0.25)  # 5 standard deviations for the tokens' 192 numbers


@pytest.mark.parametrize(("width", "heads"), [(8, 1), (16, 2), (40, 5), (12, 3)])  # the encoder's 24 are 3 heads of 8
def test_a_decoder_of_another_width_keeps_the_heads_width_or_else_their_number(width, heads):
    blocks = small_mae(decoder_embed_dim=width).decoder.transformer
    assert {(block.attn.num_heads, block.norm1.weight.numel()) for block in blocks} == {(heads, width)}


def test_features_reach_a_decoder_of_another_width_through_a_linear_layer():
    model, images = small_mae(decoder_embed_dim=16), torch.randn(2, 3, 8, 8)
    ids, decoder = model.shuffle(2, seeded()), model.decoder
    pred, _ = model(images, ids)
    features = model.encoder(images, ids[:, :4])
    for b in range(2):
        seen = [decoder.embed.weight @ token + decoder.embed.bias for token in features[b]]
        places = dict(zip(ids[b, :4].tolist(), seen[1:], strict=True))
        tokens = [seen[0], *(places.get(patch, decoder.mask_token[0, 0]) for patch in range(16))]
        decoded = decoder.transformer((torch.stack(tokens) + decoder.pos_embedding[:, 0])[None])
        torch.testing.assert_close(pred[b], decoder.head(decoded[0, 1:]))


def test_a_decoder_of_the_encoders_width_has_no_layer_more():
    plain, same, narrow = (small_mae(decoder_embed_dim=width).state_dict() for width in (None, 24, 16))
    assert plain.keys() == same.keys() == narrow.keys() - {"decoder.embed.weight", "decoder.embed.bias"}
    assert all(torch.equal(plain[name], same[name]) for name in plain)


def test_a_narrow_decoders_arithmetic_is_counted():
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "encoder_depth": 1, "num_heads": 3, "decoder_depth": 2}
    full, narrow = (gflop_per_image({**sizes, "decoder_embed_dim": width}, "mae") for width in (None, 8))

    def decoder(width):  # of 17 tokens, 16 predicted
        block = 17 * 12 * width**2 + 2 * 17**2 * width
        return 2 * 3 * (2 * block + 16 * 12 * width)  # a product is 2 operations, and 2 more in the backward pass

    embed = 2 * 3 * 5 * 24 * 8
    assert full - narrow == pytest.approx((decoder(24) - decoder(8) - embed) / 1e9, rel=1e-6)


@pytest.mark.parametrize("width", [8, 24])
def test_sincos_positions_are_the_papers_formula_column_before_row(width):
    model = small_mae(positions="sincos", decoder_embed_dim=width)
    for table, size, cls in ((model.encoder.pos_embedding, 24, 0), (model.decoder.pos_embedding, width, 1)):
        assert table.shape == (cls + 16, 1, size)
        assert not table[:cls].any()
        for row, column in itertools.product(range(4), range(4)):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (2 * i / (size // 2)) for i in range(size // 4)]
                expected += [*map(math.sin, angles), *map(math.cos, angles)]
            assert table[cls + 4 * row + column, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_sincos_positions_are_not_trained_but_saved_and_a_classifier_starts_from_them():
    model, learned = small_mae(positions="sincos"), small_mae()
    assert model.state_dict().keys() == learned.state_dict().keys()
    names = {"encoder.pos_embedding", "decoder.pos_embedding"}
    assert dict(learned.named_parameters()).keys() - dict(model.named_parameters()).keys() == names
    classifier = ViT_Classifier(8, 2, 24, 2, 3)
    classifier.load_encoder(model.state_dict())
    assert torch.equal(classifier.pos_embedding, model.encoder.pos_embedding)
    assert classifier.pos_embedding.requires_grad


# --- patches ---


def test_patchify_and_unpatchify_are_inverses():
    images = torch.randn(2, 3, 12, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(patches[0, 5], images[0, :, 4:8, 8:12].flatten())  # raster order; (channel, row, column)
    assert torch.equal(unpatchify(patches, 4), images)


# --- model ---


def test_drop_path_grows_evenly_from_block_to_block():
    scales = drop_path_scales(20_000, 4, 0.6, seeded(), "cpu")
    assert (scales == 0).float().mean((0, 2)).tolist() == pytest.approx([0, 0.2, 0.4, 0.6], abs=0.02)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
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


def loss_of(pred, images, mask, **model_args):
    """The loss of a MAE that predicts pred, (B, N, P), where mask, (B, N), is hidden."""
    size = int((pred.shape[-1] / 3) ** 0.5)
    model = small_mae(img_size=images.shape[-1], patch_size=size, **model_args)
    model.forward = lambda images, ids_shuffle: (pred, mask)
    return model.loss(images)


@pytest.mark.parametrize("size", [1, 2, 8])  # of a patch
def test_loss_is_the_mean_over_hidden_pixels_and_has_no_gradient_elsewhere(size):
    images, pred = torch.randn(2, 3, 2 * size, 2 * size), torch.randn(2, 4, 3 * size**2, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    errors = []
    for b in range(2):
        for n in range(4):
            row, column = n // 2 * size, n % 2 * size
            patch = images[b, :, row : row + size, column : column + size].flatten()
            errors += [(p - q) ** 2 for p, q in zip(pred[b, n].tolist(), patch.tolist(), strict=True) if mask[b, n]]
    loss = loss_of(pred, images, mask)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    loss.backward()
    assert torch.equal(pred.grad.abs().sum(-1) > 0, mask)


def test_the_normalised_target_is_each_patchs_pixels_minus_their_mean_over_their_standard_deviation():
    images, pred, mask = torch.randn(2, 3, 4, 4) * 3 + 1, torch.randn(2, 4, 12), torch.rand(2, 4) < 0.7
    mask[0, 0] = True
    errors = []
    for b, n in mask.nonzero().tolist():
        row, column = n // 2 * 2, n % 2 * 2
        pixels = images[b, :, row : row + 2, column : column + 2].flatten().tolist()
        mean, deviation = statistics.mean(pixels), (statistics.variance(pixels) + 1e-6) ** 0.5
        errors += [(p - (x - mean) / deviation) ** 2 for p, x in zip(pred[b, n].tolist(), pixels, strict=True)]
    assert loss_of(pred, images, mask, norm_pix_loss=True).item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    flat = torch.full((2, 3, 4, 4), 0.3)  # no variance: the target is 0
    assert loss_of(pred, flat, mask, norm_pix_loss=True).item() == pytest.approx(
        pred[mask].square().mean().item(), rel=1e-4
    )


def test_a_perfect_normalised_prediction_is_reconstructed_as_the_image():
    model, images = small_mae(norm_pix_loss=True), torch.randn(4, 3, 8, 8) * 2 + 1
    patches = patchify(images, 2)
    perfect = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    model.decoder.forward = lambda features, ids_restore: perfect
    ids = model.shuffle(4, seeded())
    torch.testing.assert_close(model.reconstruct(images, ids)[1], images)
    assert model.loss(images, ids) < 1e-10


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 4, 16), (2, 1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("make", [small_mae, lambda: ViT_Classifier(8, 2, 24, 2, 3)])
def test_images_of_another_size_are_refused_with_both_sizes(make, shape):
    with pytest.raises(ValueError, match=re.escape(f"must be (B, 3, 8, 8), not {shape}")):
        make()(torch.zeros(shape))


def test_forward_without_masks_draws_new_ones():
    model, images = small_mae(), torch.randn(8, 3, 8, 8)
    first, second = model(images)[1], model(images)[1]
    assert not torch.equal(first, second)
    assert (first.sum(1) == 12).all()


needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile on a CPU needs a C++ compiler")


fast_paths = pytest.mark.parametrize(
    ("precision", "mode", "tolerance"),
    [("float32", None, 1e-5), ("bf16", None, 1e-2), pytest.param("float32", "default", 1e-5, marks=needs_compiler)],
)


@fast_paths
@pytest.mark.slow
def test_the_fast_paths_have_the_plain_ones_loss_and_gradients(precision, mode, tolerance, capsys):
    images = torch.randint(256, (4, 3, 8, 8), generator=seeded(), dtype=torch.uint8)

    def loss_and_norm(model, precision, mode=None):
        loss_of = compiled(model.loss, mode)
        with autocast(precision, images.device):
            loss = loss_of(normalize(images), model.shuffle(4, seeded()))
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        return loss.item(), norm.item()

    plain, fast = small_mae(encoder_depth=1), small_mae(encoder_depth=1)
    tune(fast, images.device, precision, num_patches=16)
    assert [model.encoder.transformer[0].attn.fused_attn for model in (plain, fast)] == [True, False]
    assert loss_and_norm(fast, precision, mode) == pytest.approx(loss_and_norm(plain, "float32"), rel=tolerance)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_a_forward_pass_keeps_to_the_gpu_and_reads_no_number_back(strategy):
    # fake tensors have a device and no numbers: they need no GPU, do not mix devices, and refuse .item()
    with FakeTensorMode():
        with torch.device("cuda"):
            model, classifier = MAE_ViT(mask_strategy=strategy), ViT_Classifier()
        pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        images = normalize(random_resized_crop(flip_and_shift(pixels, None), None))
        ids_shuffle = model.shuffle(4, device=images.device)
        loss, pictures = model.loss(images, ids_shuffle), model.reconstruct(images, ids_shuffle)
        results = ids_shuffle, loss, *pictures, classifier(images)
    assert {result.device.type for result in results} == {"cuda"}


def test_new_masks_are_drawn_on_the_images_device():
    with FakeTensorMode():
        with torch.device("cuda"):
            model, images = small_mae(), torch.zeros(4, 3, 8, 8)
        pred, mask = model(images)
    assert pred.device.type == mask.device.type == "cuda"


@pytest.mark.parametrize(("img_size", "ratio"), [(8, 0.75), (6, 0.6)])  # 4 of 16 and 3 of 9 patches visible
def test_reconstruction_keeps_visible_patches_and_greys_hidden_ones(img_size, ratio):
    model, images = small_mae(img_size=img_size, mask_ratio=ratio), torch.randn(4, 3, img_size, img_size)
    ids = model.shuffle(4, seeded())
    pred, mask = model(images, ids)
    masked, reconstructed = (patchify(picture, 2) for picture in model.reconstruct(images, ids))
    assert not reconstructed.requires_grad
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


@pytest.mark.parametrize("change", [lambda state: state.popitem(), lambda state: state.update({"encoder.x": 0})])
def test_classifier_takes_no_encoder_that_lacks_a_weight_or_has_an_unknown_one(change):
    state = small_mae().encoder.state_dict(prefix="encoder.")
    change(state)
    with pytest.raises(AssertionError):
        ViT_Classifier(8, 2, 24, 2, 3).load_encoder(state)


@fast_paths
def test_the_classifier_has_the_loss_and_gradients_of_computing_all_tokens(precision, mode, tolerance, capsys):
    torch.manual_seed(0)  # with some weights, bf16 is off by more
    images, labels = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1, torch.arange(4)
    model = ViT_Classifier(8, 2, 24, 2, 3)

    def whole(images):
        return model.head(MAE_Encoder.forward(model, images)[:, 0])

    def loss_and_gradients(forward, precision):
        model.zero_grad()
        with autocast(precision, images.device):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    plain = loss_and_gradients(whole, "float32")
    fast = loss_and_gradients(compiled(model, mode), precision)
    for ours, theirs in zip(fast, plain, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_blocks_result_for_the_cls_token_is_computed_for_it_alone():
    (block,), tokens = transformer(24, 1, 3), torch.randn(2, 17, 24)
    torch.testing.assert_close(block_output(block, tokens, cls_only=True), block(tokens)[:, :1])


def test_a_tiny_model_learns_one_batch_by_heart():
    model = small_mae(decoder_depth=2)
    images, ids = torch.randn(4, 3, 8, 8), model.shuffle(4, seeded())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model.loss(images, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05  # predicting the mean gives 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size 3 does not divide img_size 8"),
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 24; these do: 1, 2, 3, 4, 6, 8, 12, 24"),
        ({"embed_dim": 15, "num_heads": 2}, "num_heads 2 does not divide embed_dim 15; these do: 1, 3, 5, 15"),
        ({"decoder_embed_dim": 10}, "10 is a multiple neither of the encoder's head width 8 nor of num_heads 3"),
        ({"positions": "sincos", "decoder_embed_dim": 6}, "'sincos' need a width that is a multiple of 4, not 6"),
        ({"patch_size": 1, "in_chans": 1, "norm_pix_loss": True}, "no deviation .* where a patch is one number"),
        ({"positions": "rotary"}, "'rotary' is unknown; choose from learned, sincos"),
        ({"mask_strategy": "spiral"}, "spiral.*random, block, grid.*blockwise"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_mae(**changes)


def test_each_part_of_a_mae_can_be_frozen_by_itself():
    for part in small_mae(mask_strategy="blockwise").children():
        part.requires_grad_(False)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_traced_classifier_gives_its_logits_for_any_number_of_images(with_gradients):
    model, images = ViT_Classifier(8, 2, 24, 2, 3).eval(), torch.randn(4, 3, 8, 8)
    with torch.set_grad_enabled(with_gradients):
        torch.testing.assert_close(torch.jit.trace(model, images[:1])(images), model(images))
