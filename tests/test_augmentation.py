import math

import pytest
import torch
from torchvision.transforms import functional

from engine.device import generator
from images import augmentation


@pytest.mark.parametrize("padding", [2, 3])
def test_flip_and_shift_only_moves_and_mirrors(padding):
    image = torch.arange(64).view(1, 1, 8, 8).expand(200, 3, -1, -1)  # each pixel tells where it was
    moved = augmentation.flip_and_shift(image, generator("cpu", 0), padding)
    mirrored = moved[:, 0, 4, 3] > moved[:, 0, 4, 4]
    assert 60 < mirrored.sum() < 140
    straight = torch.where(mirrored[:, None, None, None], moved.flip(3), moved)
    shift = straight[:, 0, 4, 4] - 36
    rows, columns = (shift + padding).div(8, rounding_mode="floor"), (shift + padding) % 8 - padding
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(-padding, padding + 1))
    inner = slice(padding, 8 - padding)
    unmoved = straight[:, 0, inner, inner] - 8 * rows[:, None, None] - columns[:, None, None]
    assert (unmoved == image[0, 0, inner, inner]).all()


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


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 24)])
@pytest.mark.parametrize("tries", [10, 1])  # with one, many images stay whole
def test_random_resized_crop_is_torchvisions_image_by_image(height, width, tries):
    images = torch.randint(256, (300, 3, height, width), dtype=torch.uint8, generator=generator("cpu", "pixels"))
    cropped = augmentation.random_resized_crop(images, generator("cpu", 0), tries=tries)
    assert cropped.dtype == torch.uint8
    off = (cropped - cropped_one_by_one(images, generator("cpu", 0), tries)).abs()
    assert off.max() <= 1  # where a value lies between two
    assert (off > 0).float().mean() < 1e-3
    whole = (cropped == images).flatten(1).all(1) | (cropped == images.flip(3)).flatten(1).all(1)
    assert (whole.float().mean() > 0.03) == (tries == 1)


def test_a_batch_is_cropped_in_parts_that_change_nothing(monkeypatch):
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator("cpu", "pixels"))
    whole = augmentation.random_resized_crop(images, generator("cpu", 0))
    monkeypatch.setattr(augmentation, "PART", 2)
    assert torch.equal(augmentation.random_resized_crop(images, generator("cpu", 0)), whole)
