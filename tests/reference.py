"""Slow and plain versions that several test files compare with."""

import math

import torch
from torchvision.transforms import functional


def cropped_one_by_one(images, draw, tries=10):
    """Random resized crops and mirroring as torchvision defines them, of float images, by the documented draws."""
    count, _, height, width = images.shape
    areas = height * width * (0.2 + 0.8 * torch.rand(count, tries, generator=draw))
    ratios = ((torch.rand(count, tries, generator=draw) * 2 - 1) * math.log(4 / 3)).exp()  # width / height
    mirrored, top, left = (torch.rand(count, 1, generator=draw) for _ in range(3))
    cropped = []
    for i in range(count):
        size = height, width
        for area, ratio in zip(areas[i].tolist(), ratios[i].tolist(), strict=True):
            tried = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if tried[0] <= height and tried[1] <= width:
                size = tried
                break
        corner = int(top[i] * (height - size[0] + 1)), int(left[i] * (width - size[1] + 1))
        mode = functional.InterpolationMode.BICUBIC
        image = functional.resized_crop(images[i].float(), *corner, *size, (height, width), mode, antialias=True)
        cropped.append(image.flip(2) if mirrored[i] < 0.5 else image)
    return torch.stack(cropped).round().clamp(0, 255)
