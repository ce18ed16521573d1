import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from engine import features
from engine.features import extract_features, fit_linear, knn_predict, linear_probe
from images.pixels import normalize
from model import MAE_ViT, ViT_Classifier

SIZE = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "encoder_depth": 3, "num_heads": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(count, num_classes=4, dim=6, noise=1.0, seed=0):
    """Labels and features around a place for each class, of very different scales, as an encoder's may be."""
    draw = seeded(seed)
    places = torch.randn(num_classes, dim, generator=seeded(7))
    labels = torch.randint(num_classes, (count,), generator=draw)
    x = places[labels] + noise * torch.randn(count, dim, generator=draw)
    return x * torch.logspace(-2, 2, dim) + 5, labels


def accuracy(predicted, labels):
    return (predicted == labels).float().mean().item()


# --- features ---


@pytest.mark.parametrize("kind", [MAE_ViT, ViT_Classifier])
def test_features_are_the_encoders_tokens_of_each_block_and_the_last_ones_are_normalised(kind):
    torch.manual_seed(0)
    model = kind(**SIZE)
    encoder = model.encoder if kind is MAE_ViT else model
    torch.nn.init.normal_(encoder.layer_norm.weight)  # else the LayerNorm's weights could be forgotten
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    found = extract_features(encoder, images, normalize, [2, 3], ["mean", "cls"], batch_size=3)
    with torch.no_grad():
        tokens = encoder.embed(normalize(images))
        second = encoder.transformer[1](encoder.transformer[0](tokens))
        last = encoder.layer_norm(encoder.transformer(tokens))
    expected = {(2, "mean"): second[:, 1:].mean(1), (2, "cls"): second[:, 0]}
    expected |= {(3, "mean"): last[:, 1:].mean(1), (3, "cls"): last[:, 0]}
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected)


def test_features_of_a_classifier_that_pools_the_mean_are_what_its_head_takes():
    model = ViT_Classifier(**SIZE, pool="mean")
    torch.nn.init.normal_(model.layer_norm.weight)
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    found = extract_features(model, images, normalize, [3], ["mean", "cls"], batch_size=3)
    with torch.no_grad():
        torch.testing.assert_close(model.head(found[3, "mean"]), model(normalize(images)))


def test_blocks_after_the_last_one_wanted_are_not_computed():
    encoder = MAE_ViT(**SIZE).encoder
    encoder.transformer[2].register_forward_hook(lambda *_: pytest.fail("computed"))
    extract_features(encoder, torch.zeros(1, 3, 8, 8), normalize, [1, 2], ["cls"], 10)


def test_features_of_a_bf16_encoder_are_float32_and_close():
    encoder = MAE_ViT(**SIZE).encoder
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    exact = extract_features(encoder, images, normalize, [3], ["mean"], 10)[3, "mean"]
    with torch.autocast("cpu", torch.bfloat16):
        half = extract_features(encoder, images, normalize, [3], ["mean"], 10)[3, "mean"]
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05


# --- k-NN ---


def plain_knn(x, labels, query, num_classes, k, temperature):
    """One query, by the recipe: cosines, the k largest, votes of exp(cosine / temperature)."""
    cosines = [(float(row @ query) / (math.hypot(*row.tolist()) * math.hypot(*query.tolist()))) for row in x]
    votes = [0.0] * num_classes
    for i in sorted(range(len(x)), key=lambda i: -cosines[i])[:k]:
        votes[labels[i]] += math.exp(cosines[i] / temperature)
    return votes.index(max(votes))


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (7, 1.0), (500, 0.02)])
def test_knn_is_a_plain_loops(k, temperature):
    (x, labels), (queries, _) = clusters(60, noise=2.0), clusters(40, noise=2.0, seed=1)
    expected = [plain_knn(x, labels.tolist(), query, 4, k, temperature) for query in queries]
    found = knn_predict(x, labels, queries, 4, k, temperature, batch_size=7)
    assert found.tolist() == expected
    assert len(set(expected)) == 4
    assert (k, temperature) == (20, 0.07) or expected != knn_predict(x, labels, queries, 4).tolist()


def test_the_defaults_of_knn_are_dinos():
    parameters = inspect.signature(knn_predict).parameters
    assert (parameters["k"].default, parameters["temperature"].default) == (20, 0.07)


def test_one_near_neighbour_outvotes_two_far_ones():
    angles = torch.tensor([0.1, 0.6, 0.7])
    bank, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([1, 0, 0])
    assert knn_predict(bank, labels, torch.tensor([[3.0, 0.0]]), 2).item() == 1
    assert knn_predict(bank, labels, torch.tensor([[3.0, 0.0]]), 2, temperature=10.0).item() == 0


# --- linear probe ---


def objective(x, labels, weight, bias, weight_decay):
    """What the probe minimises, of standardised features."""
    return F.cross_entropy(F.linear(x, weight, bias), labels) + weight_decay / 2 * weight.square().sum()


def standardised(x):
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()


def plain_fit(x, labels, num_classes, weight_decay):
    """The objective's minimum by another optimiser, in float64."""
    weight, bias = (torch.zeros(shape).double().requires_grad_() for shape in ((num_classes, x.shape[1]), num_classes))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(x, labels, weight, bias, weight_decay)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def test_the_probe_is_softmax_regression_on_standardised_features(monkeypatch):
    monkeypatch.setattr(features, "ROWS", 64)  # not a divisor of 300
    monkeypatch.setattr(features, "CONVERGED", 0)
    x, labels = clusters(300)
    weights, biases = fit_linear(x, labels, 4, [0.5, 0.1, 1e-2])
    assert (weights.shape, biases.shape, weights.dtype) == ((3, 4, 6), (3, 4), torch.float32)
    z = standardised(x.double())
    for weight, bias, decay in zip(weights, biases, [0.5, 0.1, 1e-2], strict=True):
        expected = F.linear(z, *plain_fit(z, labels, 4, decay))
        torch.testing.assert_close(F.linear(x, weight, bias).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("count", "dim"), [(300, 6), (300, 60)])
def test_the_probe_has_converged_at_every_weight_decay(count, dim):
    x, labels = clusters(count, dim=dim, noise=3.0)
    z, decays = standardised(x), [1.0, 1e-1, 1e-3, 1e-5]
    for weight, bias, decay in zip(*fit_linear(z, labels, 4, decays), decays, strict=True):
        least = objective(z.double(), labels, *plain_fit(z.double(), labels, 4, decay), decay)
        assert 0 <= objective(z.double(), labels, weight.double(), bias.double(), decay) - least < 2e-3


def test_shift_and_scale_of_the_features_do_not_matter_to_the_probe():
    (x, labels), (queries, wanted) = clusters(300), clusters(200, seed=1)
    plain, _ = linear_probe(x, labels, queries, 4, seeded())
    moved, _ = linear_probe(100 * x - 40, labels, 100 * queries - 40, 4, seeded())
    assert accuracy(plain, moved) > 0.99
    assert accuracy(plain, wanted) > 0.7


def test_features_that_never_vary_in_training_get_no_weight():
    x, labels = clusters(300)
    x = torch.cat([x, x[:, :1] + x[:, 1:2], torch.full((300, 1), 3.0)], dim=1)  # one is a sum of others
    weight, _ = fit_linear(x, labels, 4, [1e-6])
    off = torch.zeros(8)
    off[[0, 1, 6, 7]] = torch.tensor([1, 1, -1, 0]) * x[:, [0, 1, 6, 7]].std(0)  # against the sum
    off[7] = 1
    assert (F.linear(off, weight[0])).abs().max() < 30
    assert weight[0, :, 7].abs().max() < 1e-3


def test_the_weight_decay_is_chosen_on_held_out_images(monkeypatch):
    x, labels = clusters(400, noise=0.3)
    _, weak = linear_probe(x, labels, x, 4, seeded())
    nothing = torch.randn(400, 100, generator=seeded())
    _, strong = linear_probe(nothing, labels, nothing, 4, seeded())
    assert weak <= 1e-4
    assert strong == 1.0
    fits = []

    def noting(x, labels, *rest):
        fits.append((len(x), rest[-1]))
        return fit_linear(x, labels, *rest)

    monkeypatch.setattr(features, "fit_linear", noting)
    linear_probe(x, labels, x, 4, seeded())
    monkeypatch.setattr(features, "MOST_HELD_OUT", 15)
    linear_probe(x, labels, x, 4, seeded())
    assert fits == [(360, features.WEIGHT_DECAYS), (400, [weak]), (385, features.WEIGHT_DECAYS), (400, [weak])]


# --- both ---


def test_each_test_image_is_judged_by_itself():
    (x, labels), (queries, _) = clusters(60), clusters(20, noise=3.0, seed=1)
    alone = [linear_probe(x, labels, query[None], 4, seeded())[0].item() for query in queries]
    assert linear_probe(x, labels, queries, 4, seeded())[0].tolist() == alone
    assert knn_predict(x, labels, queries, 4).tolist() == [knn_predict(x, labels, q[None], 4).item() for q in queries]


def test_features_that_name_the_class_give_all_right_and_random_labels_chance():
    labels = torch.randint(10, (1000,), generator=seeded())
    test_labels = torch.randint(10, (500,), generator=seeded(1))
    x, queries = F.one_hot(labels, 10).float(), F.one_hot(test_labels, 10).float()
    noise, noise_queries = torch.randn(1000, 10, generator=seeded(2)), torch.randn(500, 10, generator=seeded(3))
    for measure in (knn_predict, lambda *arguments: linear_probe(*arguments, seeded())[0]):
        assert accuracy(measure(x, labels, queries, 10), test_labels) == 1
        assert 0.05 < accuracy(measure(noise, labels, noise_queries, 10), test_labels) < 0.15


def test_the_same_seed_gives_the_same_bits():
    x, labels = clusters(300, noise=3.0)
    first, again = (fit_linear(x, labels, 4, features.WEIGHT_DECAYS) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    drawn = []
    for seed in (0, 0, 1):
        generator = seeded(seed)
        linear_probe(x, labels, x, 4, generator)
        drawn.append(torch.rand(1, generator=generator).item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_features_that_cannot_be_compared_are_named():
    x, labels = clusters(20)
    bad = x.clone()
    bad[3, 2] = math.nan
    for measure in (knn_predict, lambda *arguments: linear_probe(*arguments, seeded())):
        for arguments, message in [
            ((x, labels, x[:, :5]), r"features \(20, 6\), their labels \(20,\) and test features \(20, 5\) do not fit"),
            ((x, labels[:9], x), r"labels \(9,\)"),
            ((x, labels, x[:0]), "20 training images and 0 test images"),
            ((x[:0], labels[:0], x), "0 training images and 20 test"),
            ((bad, labels, x), "infinite or nan"),
            ((x, labels, bad), "infinite or nan"),
        ]:
            with pytest.raises(ValueError, match=message):
                measure(*arguments, 4)
    with pytest.raises(ValueError, match="2 or more training images"):
        linear_probe(x[:1], labels[:1], x, 4, seeded())
