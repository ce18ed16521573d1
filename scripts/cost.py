"""What a training step computes."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import utils
from model import MAE_ViT, ViT_Classifier


def gflop_per_image(arguments, pretraining):
    """Forward and backward pass of a MAE or a classifier: 1e9 multiplications and additions, counted one by one.

    Args:
        arguments: of a run or a model, by name.
    """
    constructor = MAE_ViT if pretraining else ViT_Classifier
    model = constructor(**{name: arguments[name] for name in utils.defaults(constructor) if name in arguments})
    images = torch.zeros(1, 3, arguments["img_size"], arguments["img_size"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        output = model(images)
        (output[0] if pretraining else output).sum().backward()
    return counter.get_total_flops() / 1e9
