"""A NumPy file of images, as MedMNIST ships them, as an image set."""

import numpy as np
import torch

from engine.errors import UserError
from images.pixels import ImageSet, to_images


def read_npz(path, img_size, labelled=True):
    """Read the arrays (train|test)_images and _labels of a file: (training ImageSet, test ImageSet or None).

    Images are uint8, (N, H, W) or (N, H, W, C) of up to 16 channels; labels are whole numbers, (N,) or (N, 1). Other
    arrays are not used. If `labelled` is False, test images may be missing; labels may be missing, of another form or
    new in the test set: then there are no classes.
    """
    names = [f"{part}_{kind}" for part in ("train", "test") for kind in ("images", "labels")]
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in names if name in stored}
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"Cannot read {path}: {error}. --data_dir must name an .npz file.") from error
    found = f"{path} has {', '.join(f'{name} {v.dtype} {v.shape}' for name, v in arrays.items()) or 'none of them'}"
    images = {part: arrays[f"{part}_images"] for part in ("train", "test") if f"{part}_images" in arrays}
    are_pixels = [v.dtype == np.uint8 and v.size and v.ndim in (3, 4) and v.shape[3:] <= (16,) for v in images.values()]
    if "train" not in images or not all(are_pixels):
        raise UserError(f"train_images and test_images must be uint8, (N, H, W) or (N, H, W, 1 to 16); {found}.")
    labels = {part: as_numbers(arrays.get(f"{part}_labels"), len(pixels)) for part, pixels in images.items()}
    by_class = all(numbers is not None for numbers in labels.values())
    if labelled and not (by_class and "test" in images):
        raise UserError(
            f"A classifier needs test_images, and train_labels and test_labels with one whole number for each image; "
            f"without them it serves pretraining only; {found}."
        )
    others = by_class and set(labels.get("test", labels["train"]).tolist()) - set(labels["train"].tolist())
    if labelled and others:
        raise UserError(f"{path}: test_labels has {', '.join(map(str, sorted(others)))}, which train_labels has not.")
    if others or not by_class:
        labels = {part: np.zeros(len(pixels), int) for part, pixels in images.items()}
    values, sets = np.unique(labels["train"]), {}
    classes = [str(value) for value in values] if by_class and not others else []
    for part, array in images.items():
        pixels, done = to_images(array, img_size)
        sets[part] = ImageSet(pixels, torch.from_numpy(np.searchsorted(values, labels[part])), classes, done)
    return sets["train"], sets.get("test")


def as_numbers(labels, count):
    """Labels as (count,) integers, else None; in an unsigned type, the largest number stands for -1."""
    if labels is None or labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        return None
    labels, largest = labels.reshape(-1), np.iinfo(labels.dtype).max
    is_minus_1 = (labels == largest) & (labels.dtype.kind == "u" and largest - 1 not in labels)
    return np.where(is_minus_1, -1, labels.astype(int)) if is_minus_1.any() else labels
