"""How much a frozen encoder's features tell about the classes: features after each block, k-NN, a linear probe.

The two measures are pure functions of features and labels; nothing here trains the encoder.
Axes in the comments: N images, Q query images, D width, C classes, K candidates for the weight decay.
"""

import torch
import torch.nn.functional as F

from engine.errors import UserError

# (B, 1 + N, D) to (B, D)
POOLS = {"cls": lambda tokens: tokens[:, 0], "mean": lambda tokens: tokens[:, 1:].mean(dim=1)}
FROZEN_MEASURES = {"linear probe": "linear/acc", "k-NN": "knn/acc"}  # columns of features.csv, by name
WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # candidates of the linear probe, strongest first
ITERATIONS = 1000  # of `fit_linear`, at most: 70 do for 50,000 images at width 96, 250 for 1,000
CONVERGED = 1e-6  # `fit_linear` ends when a step is expected to lower the loss by less than this
ROWS = 2048  # images at once in `fit_linear`; bounds its memory, and changes no speed
MOST_HELD_OUT = 5000  # images

# --- features ---


@torch.no_grad()
def extract_features(encoder, images, prepare, layers, pools, batch_size):
    """Features of each image, all of its patches visible.

    After the last block, the encoder's final LayerNorm is applied as in training: before pooling, or after it in a
    classifier with pool="mean". After earlier blocks it is not applied: it was never trained on their tokens.

    Args:
        encoder: a MAE_Encoder or what is derived from it, in eval mode.
        images: (N, C, H, W) uint8.
        prepare: makes of (B, C, H, W) uint8 what the encoder takes, on its device.
        layers: blocks after which features are taken, from 1; later blocks are not computed.
        pools: keys of POOLS: the cls token, or the mean of the patches' tokens.

    Returns:
        {(layer, pool): (N, D) float32} on the encoder's device.
    """
    shape, device = (len(images), encoder.cls_token.shape[-1]), encoder.cls_token.device
    features = {(layer, pool): torch.empty(shape, device=device) for layer in layers for pool in pools}
    blocks = list(encoder.transformer)
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        tokens = encoder.embed(prepare(images[part]))  # (B, 1 + patches, D)
        for layer, block in enumerate(blocks[: max(layers)], start=1):
            tokens = block(tokens)
            if layer in layers:
                norm = encoder.layer_norm if layer == len(blocks) else torch.nn.Identity()
                first = getattr(encoder, "pool", "cls") == "mean"  # the pooling, then the LayerNorm
                for pool in pools:
                    features[layer, pool][part] = norm(POOLS[pool](tokens)) if first else POOLS[pool](norm(tokens))
    return features


def check_features(features, labels, queries):
    """Raises UserError where there are no images, or where the features are of two widths or not finite."""
    if not len(features) or not len(queries):
        raise UserError(f"There are {len(features)} training images and {len(queries)} test images; both are needed.")
    if len(features) != len(labels) or features.shape[1:] != queries.shape[1:]:
        raise UserError(
            f"Training features {tuple(features.shape)}, their labels {tuple(labels.shape)} and test features "
            f"{tuple(queries.shape)} do not fit; (N, D), (N,) and (Q, D) are needed."
        )
    if not (features.isfinite().all() and queries.isfinite().all()):
        raise UserError("The encoder's features are infinite or nan. Take an earlier model, or --precision float32.")


# --- k-NN ---


def knn_predict(features, labels, queries, num_classes, k=20, temperature=0.07, batch_size=256):
    """The class that the k most similar training images vote for, as in DINO (Caron et al. 2021, arXiv:2104.14294).

    Similarity is the cosine; a vote weighs exp(similarity / temperature). As there, features are not centred.

    Args:
        features: (N, D) float; labels: (N,) int64; queries: (Q, D) float.
        k: neighbours; all N where there are fewer.
        batch_size: queries at once; bounds the memory.

    Returns:
        (Q,) int64.

    Raises:
        UserError: as `check_features`.
    """
    check_features(features, labels, queries)
    features = F.normalize(features, dim=1)
    predicted = []
    for part in queries.split(batch_size):
        similarity, nearest = (F.normalize(part, dim=1) @ features.T).topk(min(k, len(features)), dim=1)  # (B, k)
        votes = torch.zeros(len(part), num_classes, device=part.device)  # (B, C)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


# --- linear probe ---


def fit_linear(features, labels, num_classes, weight_decays):
    """Softmax regression on standardised features, for several weight decays at once.

    Features are standardised as by the affine-free batch norm of the official MAE's linear probe (eps 1e-6). For each
    weight decay, this minimises the mean cross-entropy + weight_decay / 2 x the sum of squared weights (not the bias)
    until all have converged. The problem is convex, so no seed and no learning rate matter. The curvature of the
    softmax loss is at most half of the features' covariance (Boehning 1992, "Multinomial logistic regression
    algorithm"). So each eigenvector of the covariance gets its own step size; momentum is Nesterov's.

    Args:
        features: (N, D) float; labels: (N,) int64; weight_decays: K numbers above 0.

    Returns:
        weight: (K, C, D), bias: (K, C), float32, for features as they were given.
    """
    device = features.device
    if device.type == "mps":  # has no float64
        features, labels = features.cpu(), labels.cpu()
    x = features.double()  # in float32, rounding would give a weight to directions without variance
    mean, scale = x.mean(0), (x.var(0, correction=0) + 1e-6).sqrt()
    x = (x - mean) / scale
    variance, basis = torch.linalg.eigh(x.T @ x / len(x))  # (D,), (D, D)
    x = torch.cat([x @ basis, torch.ones_like(x[:, :1])], dim=1).float()  # (N, D + 1), the last for the bias
    curvature = torch.cat([variance.clamp(min=0), variance.new_ones(1)]).float()[:, None, None] / 2
    decay = curvature.new_tensor(weight_decays)[:, None].repeat(len(curvature), 1, 1)  # (D + 1, K, 1)
    decay[-1] = 0
    targets = F.one_hot(labels, num_classes).float()
    w = last = x.new_zeros(len(curvature), len(weight_decays), num_classes)  # (D + 1, K, C)
    for i in range(ITERATIONS):
        ahead, last = w + i / (i + 3) * (w - last), w
        slope = gradient(x, targets, ahead) + decay * ahead
        step = slope / (curvature + decay)
        w = ahead - step
        if i % 10 == 9 and (slope * step).sum((0, 2)).max() < CONVERGED:  # waits for the device
            break
    weight = torch.einsum("de,ekc->kcd", basis, w[:-1].double()) / scale
    return weight.float().to(device), (w[-1] - weight @ mean).float().to(device)


def gradient(x, targets, w):
    """Gradient of the mean cross-entropy by w (D, K, C); x (N, D), one-hot targets (N, C)."""
    total = torch.zeros_like(w)
    for inputs, wanted in zip(x.split(ROWS), targets.split(ROWS), strict=True):
        error = (inputs @ w.flatten(1)).view(len(inputs), *w.shape[1:]).softmax(dim=-1) - wanted[:, None]  # (B, K, C)
        total += (inputs.T @ error.flatten(1)).view_as(w)
    return total / len(x)


def linear_probe(features, labels, queries, num_classes, generator):
    """Train a linear layer on frozen features with `fit_linear`, and predict the classes of queries.

    The generator draws the images to hold out: a tenth, at most MOST_HELD_OUT. After training on the others, the one of
    WEIGHT_DECAYS with the lowest cross-entropy on these is chosen. Then the layer is trained on all training images.

    Args:
        features: (N, D) float; labels: (N,) int64; queries: (Q, D) float.
        generator: a CPU generator.

    Returns:
        predicted: (Q,) int64; the chosen weight decay.

    Raises:
        UserError: as `check_features`, or there are less than 2 training images.
    """
    check_features(features, labels, queries)
    if len(features) < 2:
        raise UserError("The linear probe needs 2 or more training images, because one is held out.")
    order = torch.randperm(len(features), generator=generator).to(features.device)
    held_out, rest = order.tensor_split([min(MOST_HELD_OUT, -(-len(features) // 10))])
    layers = zip(*fit_linear(features[rest], labels[rest], num_classes, WEIGHT_DECAYS), strict=True)
    losses = [F.cross_entropy(F.linear(features[held_out], *layer), labels[held_out]).item() for layer in layers]
    weight_decay = WEIGHT_DECAYS[losses.index(min(losses))]
    weight, bias = fit_linear(features, labels, num_classes, [weight_decay])
    return F.linear(queries, weight[0], bias[0]).argmax(dim=1), weight_decay
