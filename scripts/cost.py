"""What the model of a run is and computes, from config.json alone."""

import functools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import utils
from engine.device import count_parameters
from model import MAE_ViT, ViT_Classifier


def num_classes(config):
    """Number of classes of a classifier, computed from its number of parameters."""
    arguments = config["arguments"]
    sizes = {name: arguments[name] for name in utils.defaults(ViT_Classifier) if name in arguments}
    with torch.device("meta"):  # sizes, no weights
        one_class = count_parameters(ViT_Classifier(**sizes, num_classes=1))
    return 1 + (config["parameters"] - one_class) // (arguments["embed_dim"] + 1)  # a weight each and a bias


def gflop_per_image(arguments, pretraining):
    """Forward and backward pass of a MAE or a classifier: 1e9 multiplications and additions of matrix products.

    Args:
        arguments: of a run or a model, by name.
    """
    constructor = MAE_ViT if pretraining else ViT_Classifier
    wanted = utils.defaults(constructor).keys() - {"mask_strategy"}  # each hides as many patches
    return count_gflop(constructor, tuple((name, arguments[name]) for name in sorted(wanted & arguments.keys())))


@functools.cache
def count_gflop(constructor, model_args):
    """As above; the same sizes are counted once."""
    model = constructor(**dict(model_args))
    img_size = dict(model_args)["img_size"]
    images = torch.zeros(1, 3, img_size, img_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        output = model(images)
        (output[0] if constructor is MAE_ViT else output).sum().backward()
    return counter.get_total_flops() / 1e9
