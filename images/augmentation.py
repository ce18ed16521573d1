"""Random changes of a whole batch of images (B, C, H, W), on its device, drawn from a generator or seed passed in."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

from engine.errors import UserError

PART = 512  # images in floating point at once; bounds the memory
GREY = 128.0  # fills what a geometric operation of RandAugment uncovers
ERASED = (124.0, 58.0)  # mean and standard deviation of the noise in an erased rectangle


def flip_and_shift(images, generator, padding=4):
    """Mirror half of the images (B, C, H, W) and shift each by up to `padding` pixels, on their device, any dtype.

    The usual CIFAR augmentation (He et al. 2015, arXiv:1512.03385, 4.2), but the edge is repeated, not zeros.
    """
    batch_size, _, height, width = images.shape

    def steps(size):  # (B, size) source index of each row or column
        shift = torch.randint(-padding, padding + 1, (batch_size, 1), generator=generator, device=images.device)
        return (torch.arange(size, device=images.device) + shift).clamp(0, size - 1)

    rows, columns = steps(height), steps(width)
    mirror = torch.rand(batch_size, 1, generator=generator, device=images.device) < 0.5
    columns = torch.where(mirror, columns.flip(1), columns)
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))


def random_resized_crop(images, generator, scale=(0.2, 1), ratio=(3 / 4, 4 / 3), tries=10):
    """Cut a random part out of each image (B, C, H, W) uint8, enlarge it to H x W (bicubic), mirror half of them.

    The official MAE's augmentation (He et al. 2021, table 1e), torchvision's RandomResizedCrop and a flip, for a whole
    batch on its device: two matrix products an image resample its rows and columns. Each image draws `tries` parts and
    takes the first that fits into it, or the whole image if none fits.
    """
    batch_size, _, height, width = images.shape

    def uniform(low, high, count=1):  # (B, count)
        return low + (high - low) * torch.rand(batch_size, count, generator=generator, device=images.device)

    area, aspect = height * width * uniform(*scale, tries), uniform(*map(math.log, ratio), tries).exp()
    rows, columns = ((area * stretch).sqrt().round().clamp(min=1) for stretch in (1 / aspect, aspect))  # (B, tries)
    rows, columns = F.pad(rows, (0, 1), value=height), F.pad(columns, (0, 1), value=width)  # the last always fits
    chosen = ((rows <= height) & (columns <= width)).int().argmax(dim=1, keepdim=True)  # (B, 1)

    def resampling(length, size, mirror):  # (B, 1) each, int -> (B, size, size): a new pixel's weights of the old ones
        start = (uniform(0, 1) * (size - length + 1)).floor()
        middles = torch.arange(size, device=images.device) + 0.5  # of the new pixels
        places = start + middles * length / size - 0.5  # (B, size), of the new pixels among the old ones
        places = torch.where(mirror, places.flip(1), places)[..., None]
        around = places.floor() + torch.arange(-1, 3, device=images.device)  # (B, size, 4), old pixels
        inside = (around >= start[..., None]) & (around < (start + length)[..., None])
        weights = cubic((places - around).abs()) * inside
        weights /= weights.sum(dim=2, keepdim=True)
        matrix = torch.zeros(batch_size, size, size, device=images.device)
        return matrix.scatter_add_(2, around.long().clamp(0, size - 1), weights)  # what is clamped weighs 0

    mirror = uniform(0, 1) < 0.5
    down = resampling(rows.gather(1, chosen), height, torch.zeros_like(mirror))
    across = resampling(columns.gather(1, chosen), width, mirror)
    parts = zip(images.split(PART), down[:, None].split(PART), across.mT[:, None].split(PART), strict=True)
    return torch.cat([(a @ part.float() @ b).round_().clamp_(0, 255).byte() for part, a, b in parts])


def cubic(distance):
    """The kernel of PIL's bicubic filter (Keys 1981 with a = -0.5), for distances from 0 on in pixels."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far) * (distance < 2)


def solarize_add(images, level):
    """Brighten the pixels below 128, by up to 110."""
    return torch.where(images < 128, images + int(110 * abs(level)), images)  # uint8, at most 237


def affine(images, angle=0.0, shift=(0.0, 0.0), shear=(0.0, 0.0), center=None):
    """Turn by degrees, shift by pixels, shear by tangents; bilinear."""
    shear = [math.degrees(math.atan(value)) for value in shear]
    bilinear = tv.InterpolationMode.BILINEAR
    return tv.affine(images, angle, list(shift), 1.0, shear, bilinear, fill=[GREY] * images.shape[1], center=center)


# of RandAugment: images (n, 3, H, W) uint8, changed by a level from -1 to 1; the first six do not look at its sign
OPERATIONS = {
    "autocontrast": lambda images, level: tv.autocontrast(images),
    "equalize": lambda images, level: tv.equalize(images),
    "invert": lambda images, level: tv.invert(images),
    "posterize": lambda images, level: tv.posterize(images, 4 - int(4 * abs(level))),
    "solarize": lambda images, level: tv.solarize(images, 256 - int(256 * abs(level))),
    "solarize_add": solarize_add,
    "color": lambda images, level: tv.adjust_saturation(images, 1 + 0.9 * level),
    "contrast": lambda images, level: tv.adjust_contrast(images, 1 + 0.9 * level),
    "brightness": lambda images, level: tv.adjust_brightness(images, 1 + 0.9 * level),
    "sharpness": lambda images, level: tv.adjust_sharpness(images, 1 + 0.9 * level),
    "rotate": lambda images, level: affine(images, angle=-30 * level),
    "shear_x": lambda images, level: affine(images, shear=(0.3 * level, 0), center=[0, 0]),
    "shear_y": lambda images, level: affine(images, shear=(0, 0.3 * level), center=[0, 0]),
    "translate_x": lambda images, level: affine(images, shift=(-0.45 * level * images.shape[3], 0)),
    "translate_y": lambda images, level: affine(images, shift=(0, -0.45 * level * images.shape[2])),
}


def rand_augment(images, generator):
    """Apply two random operations to each of images (B, C, H, W) uint8; each is left out half of the time.

    RandAugment (Cubuk et al. 2020, arXiv:1909.13719) as in the official MAE's fine-tuning, timm's
    "rand-m9-mstd0.5-inc1": magnitude 9 of 10, standard deviation 0.5. torchvision's functions take one magnitude for
    all images, so images with the same operation and sign share it. NumPy draws them, so the sizes of these
    groups are known without waiting for the device.
    """
    random, images = np.random.default_rng(generator.initial_seed()), images.clone()
    for _ in range(2):
        chosen = random.integers(2 * len(OPERATIONS), size=len(images))  # operation and sign
        chosen[random.random(len(images)) < 0.5] = -1  # left out
        order = torch.from_numpy(chosen.argsort(kind="stable")).to(images.device)
        groups = order.split(np.bincount(chosen + 1, minlength=2 * len(OPERATIONS) + 1).tolist())[1:]
        for ids, (change, sign) in zip(groups, itertools.product(OPERATIONS.values(), (-1, 1)), strict=True):
            level = sign * min(random.normal(0.9, 0.05), 1)
            if len(ids):
                images[ids] = change(images[ids], level)
    return images


def random_erasing(images, generator, chance=0.25, area=(0.02, 1 / 3), aspect=0.3):
    """Fill a rectangle with noise in some of images (B, C, H, W) uint8 (Zhong et al. 2017, arXiv:1708.04896).

    `chance`: probability for each image; `area`: range of the rectangle's share of the image's area. Its height / width
    is from `aspect` to 1 / aspect; a side that is longer than the image is cut.
    """
    (batch_size, _, height, width), device = images.shape, images.device
    share, ratio, down, right, drawn = torch.rand(5, batch_size, 1, generator=generator, device=device)
    pixels = height * width * (area[0] + (area[1] - area[0]) * share)
    ratio = ((2 * ratio - 1) * math.log(aspect)).exp()

    def span(size, length, place):  # (B, size) bool
        length = length.sqrt().round().clamp(1, size)
        start, line = (place * (size - length + 1)).floor(), torch.arange(size, device=device)
        return (line >= start) & (line < start + length)

    rows, columns = span(height, pixels * ratio, down), span(width, pixels / ratio, right) & (drawn < chance)
    mean, std = ERASED
    noise = mean + std * torch.randn(images.shape, generator=generator, device=device)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], noise.round().clamp(0, 255).byte(), images)


def official(images, generator):
    """The official MAE's fine-tuning: a crop of at least 8 % of each image, RandAugment, random erasing."""
    images = random_resized_crop(images, generator, scale=(0.08, 1))
    return random_erasing(rand_augment(images, generator), generator)


def mix(images, labels, num_classes, mixup, cutmix, seed):
    """Mix each image (B, C, H, W) with another, and labels (B,) by the same shares: (B, num_classes), rows add up to 1.

    Mixup (Zhang et al. 2017, arXiv:1710.09412) averages pixels, as float; CutMix (Yun et al. 2019, arXiv:1905.04899)
    pastes a rectangle of the other image. `mixup` and `cutmix` are their alphas, 0: never; if both are above 0, each
    has a chance of 1/2. The whole batch has one share, from Beta(alpha, alpha), and one rectangle. NumPy draws them
    from the seed, because torch's Beta takes no generator.
    """
    random = np.random.default_rng(seed)
    cut = cutmix and (not mixup or random.random() < 0.5)
    share = random.beta(cutmix, cutmix) if cut else random.beta(mixup, mixup)
    others = torch.from_numpy(random.permutation(len(images))).to(images.device)

    def span(size):  # of the rectangle, around a uniform middle, clipped
        length = int(size * math.sqrt(1 - share))
        start = int(random.integers(size)) - length // 2
        return slice(max(start, 0), min(start + length, size))

    if cut:
        rows, columns = span(images.shape[2]), span(images.shape[3])
        other, images = images[others], images.clone()
        images[:, :, rows, columns] = other[:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / images[0, 0].numel()
    else:
        images = share * images + (1 - share) * images[others]
    targets = torch.eye(num_classes, device=images.device)[labels]
    return images, share * targets + (1 - share) * targets[others]


AUGMENTATIONS = {
    "none": lambda images, generator: images,
    "shift": flip_and_shift,
    "crop": random_resized_crop,
    "official": official,
}


def check_channels(augment, in_chans):
    """Raises UserError where an augmentation is not for images of so many channels."""
    if augment == "official" and in_chans not in (1, 3):
        raise UserError(f"--augment official is for 1 or 3 channels, not {in_chans}; use another --augment.")
