"""A NumPy file of images, as MedMNIST ships them, as an image set."""

import numpy as np
import torch

from engine.errors import UserError
from images.pixels import ImageSet, to_images


def read_npz(path, img_size, labelled=True):
    """The arrays (train|test)_images and _labels of a file: the training and the test set, None without test images.

    Images are uint8, (N, H, W) or (N, H, W, 3); labels one whole number each, (N,) or (N, 1). No other array is used.
    Without `labelled`, test images may be missing, and labels too, or be several for an image: no classes then.
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
    are_pixels = [v.dtype == np.uint8 and v.size and (v.ndim == 3 or v.shape[3:] == (3,)) for v in images.values()]
    if "train" not in images or not all(are_pixels):
        raise UserError(f"train_images and test_images must be uint8, (N, H, W) or (N, H, W, 3); {found}.")
    labels = {part: arrays.get(f"{part}_labels", np.zeros(0)) for part in images}
    counts = {part: len(pixels) for part, pixels in images.items()}
    by_class = all(
        labels[part].dtype.kind in "iu" and labels[part].shape in ((n,), (n, 1)) for part, n in counts.items()
    )
    if labelled and not (by_class and "test" in images):
        raise UserError(
            f"A classifier needs test_images, and train_labels and test_labels with one whole number for each image; "
            f"without them it serves pretraining only; {found}."
        )
    if not by_class:
        labels = {part: np.zeros(n, int) for part, n in counts.items()}
    values = np.unique(labels["train"])
    if others := set(labels.get("test", values).flat) - set(values):
        raise UserError(f"{path}: test_labels has {', '.join(map(str, sorted(others)))}, which train_labels has not.")
    sets = {}
    for part, pixels in images.items():
        index = torch.from_numpy(np.searchsorted(values, labels[part].reshape(-1)))
        sets[part] = ImageSet(to_images(pixels, img_size), index, [str(value) for value in values if by_class])
    return sets["train"], sets.get("test")
