"""What a model computes, from its sizes alone."""

import functools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import utils
from model import MAE_ViT, ViT_Classifier


def gflop_per_image(settings, kind):
    """Forward and backward pass of a "mae" or a "classifier": 1e9 multiplications and additions of matrix products.

    Args:
        settings: of a run or a model, by name; what is no argument of the model is passed over.
    """
    constructor = MAE_ViT if kind == "mae" else ViT_Classifier
    wanted = utils.defaults(constructor).keys() - {"mask_strategy"}  # each hides as many patches
    return count_gflop(constructor, tuple((name, settings[name]) for name in sorted(wanted & settings.keys())))


@functools.cache
def count_gflop(constructor, model_args):
    """`gflop_per_image` by a model's arguments, computed once for each."""
    model = constructor(**dict(model_args))
    encoder = getattr(model, "encoder", model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        output = model(torch.zeros(1, encoder.in_chans, encoder.img_size, encoder.img_size))
        (output[0] if constructor is MAE_ViT else output).sum().backward()
    return counter.get_total_flops() / 1e9
