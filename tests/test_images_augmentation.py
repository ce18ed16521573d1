import pytest
import torch
from reference import cropped_one_by_one

from engine.device import generator
from images import augmentation
from images.augmentation import AUGMENTATIONS, flip_and_shift, random_resized_crop


@pytest.mark.parametrize("padding", [2, 3])
def test_flip_and_shift_only_moves_and_mirrors(padding):
    image = torch.arange(64).view(1, 1, 8, 8).expand(200, 3, -1, -1)  # each pixel tells where it was
    moved = flip_and_shift(image, generator("cpu", 0), padding)
    mirrored = moved[:, 0, 4, 3] > moved[:, 0, 4, 4]
    assert 60 < mirrored.sum() < 140
    straight = torch.where(mirrored[:, None, None, None], moved.flip(3), moved)
    shift = straight[:, 0, 4, 4] - 36
    rows, columns = (shift + padding).div(8, rounding_mode="floor"), (shift + padding) % 8 - padding
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(-padding, padding + 1))
    inner = slice(padding, 8 - padding)
    unmoved = straight[:, 0, inner, inner] - 8 * rows[:, None, None] - columns[:, None, None]
    assert (unmoved == image[0, 0, inner, inner]).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 24)])
@pytest.mark.parametrize("tries", [10, 1])  # with one, many images stay whole
def test_random_resized_crop_is_torchvisions_image_by_image(height, width, tries):
    images = torch.randint(256, (300, 3, height, width), dtype=torch.uint8, generator=generator("cpu", "pixels"))
    cropped = random_resized_crop(images, generator("cpu", 0), tries=tries)
    assert cropped.dtype == torch.uint8
    off = (cropped - cropped_one_by_one(images, generator("cpu", 0), tries)).abs()
    assert off.max() <= 1  # where a value lies between two
    assert (off > 0).float().mean() < 1e-3
    whole = (cropped == images).flatten(1).all(1) | (cropped == images.flip(3)).flatten(1).all(1)
    assert (whole.float().mean() > 0.03) == (tries == 1)


def test_a_batch_is_cropped_in_parts_that_change_nothing(monkeypatch):
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator("cpu", "pixels"))
    whole = random_resized_crop(images, generator("cpu", 0))
    monkeypatch.setattr(augmentation, "PART", 2)
    assert torch.equal(random_resized_crop(images, generator("cpu", 0)), whole)


def test_no_augmentation_leaves_the_batch_as_it_is():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert AUGMENTATIONS["none"](images, generator("cpu", 0)) is images
