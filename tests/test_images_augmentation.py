import numpy as np
import pytest
import torch
from PIL import Image
from reference import cropped_one_by_one
from timm.data import auto_augment

from engine.device import generator
from images import augmentation
from images.augmentation import (
    AUGMENTATIONS,
    OPERATIONS,
    flip_and_shift,
    rand_augment,
    random_erasing,
    random_resized_crop,
)


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


PIL_STYLE = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR}
TIMM = {  # timm's operation on one PIL image, at a level from -1 to 1
    "autocontrast": lambda image, level: auto_augment.auto_contrast(image),
    "equalize": lambda image, level: auto_augment.equalize(image),
    "invert": lambda image, level: auto_augment.invert(image),
    "posterize": lambda image, level: auto_augment.posterize(image, 4 - int(4 * abs(level))),
    "solarize": lambda image, level: auto_augment.solarize(image, 256 - int(256 * abs(level))),
    "solarize_add": lambda image, level: auto_augment.solarize_add(image, int(110 * abs(level))),
    "color": lambda image, level: auto_augment.color(image, 1 + 0.9 * level),
    "contrast": lambda image, level: auto_augment.contrast(image, 1 + 0.9 * level),
    "brightness": lambda image, level: auto_augment.brightness(image, 1 + 0.9 * level),
    "sharpness": lambda image, level: auto_augment.sharpness(image, 1 + 0.9 * level),
    "rotate": lambda image, level: auto_augment.rotate(image, 30 * level, **PIL_STYLE),
    "shear_x": lambda image, level: auto_augment.shear_x(image, 0.3 * level, **PIL_STYLE),
    "shear_y": lambda image, level: auto_augment.shear_y(image, 0.3 * level, **PIL_STYLE),
    "translate_x": lambda image, level: auto_augment.translate_x_rel(image, 0.45 * level, **PIL_STYLE),
    "translate_y": lambda image, level: auto_augment.translate_y_rel(image, 0.45 * level, **PIL_STYLE),
}


def smooth_images(count, size=32):
    coarse = torch.randint(256, (count, 3, 5, 5), generator=generator("cpu", "pixels")).float()
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255).byte()


@pytest.mark.parametrize("level", [0.9, -0.7])
@pytest.mark.parametrize("name", OPERATIONS)
def test_rand_augments_operations_are_timms(name, level):
    images = smooth_images(8)
    one_by_one = [TIMM[name](Image.fromarray(image.permute(1, 2, 0).numpy()), level) for image in images]
    wanted = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in one_by_one])
    changed = OPERATIONS[name](images, level)
    assert changed.dtype == torch.uint8
    off = (changed.int() - wanted.int()).abs().float()
    assert off.mean() < 2  # torchvision blends the border with the fill, PIL does not
    assert off.median() <= 1


def test_rand_augment_leaves_a_quarter_of_the_images_and_draws_all_operations():
    images, done = smooth_images(1).expand(2000, -1, -1, -1), set()

    def noted(name, change):
        return lambda images, level: (done.add((name, level > 0, 0.7 < abs(level) <= 1)), change(images, level))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name, change in OPERATIONS.items():
            patch.setitem(OPERATIONS, name, noted(name, change))
        changed = rand_augment(images, generator("cpu", 0))
    assert done == {(name, up, True) for name in OPERATIONS for up in (True, False)}
    assert (changed == images).flatten(1).all(1).float().mean() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(changed, rand_augment(images, generator("cpu", 0)))
    assert not torch.equal(changed, rand_augment(images, generator("cpu", 1)))


def test_random_erasing_puts_noise_in_a_rectangle_of_a_quarter_of_the_images():
    images = torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    changed = random_erasing(images, generator("cpu", 0))
    erased = (changed > 0).any(1)  # (B, 32, 32); noise is 0 in all three channels once in 10^5
    some = erased.any(2).any(1)
    assert some.float().mean() == pytest.approx(0.25, abs=0.035)
    rows, columns = erased[some].any(2).sum(1), erased[some].any(1).sum(1)
    assert (erased[some].sum((1, 2)) / (rows * columns)).min() > 0.98  # full rectangles
    share = rows * columns / 32**2
    assert share.min() > 0.01
    assert share.max() < 0.37
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert (rows / columns).log().mean() == pytest.approx(0, abs=0.12)
    noise = changed[some][erased[some][:, None].expand(-1, 3, -1, -1)].float()
    assert noise.mean() == pytest.approx(124, abs=2)
    assert noise.std() == pytest.approx(58, abs=3)


def test_the_official_augmentation_crops_then_changes_then_erases():
    images = smooth_images(50)
    draw = generator("cpu", 0)
    changed = random_erasing(rand_augment(random_resized_crop(images, draw, scale=(0.08, 1)), draw), draw)
    assert torch.equal(AUGMENTATIONS["official"](images, generator("cpu", 0)), changed)
