"""A tree of image files as an image set, decoded once and cached beside itself."""

import contextlib
import glob
import hashlib
import os
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine import processes
from engine.errors import UserError
from engine.files import locked, replacing
from images.pixels import ImageSet, open_image, square

DECODER = 3  # part of a cache's key: raise it whenever the same file gives other pixels
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".webp", ".tif", ".tiff"}


def read_folder(data_dir, img_size, labelled=True):
    """Any train/<class>/* and test/<class>/* tree of images: the training set and the test set, None without test/.

    Decoded pixels are kept in data_dir/.cache-<size>-<key>.npz, keyed by the path, size and modification time of every
    image; NumPy checks a cache's CRC-32 as it reads, and a damaged one is built again.

    Without `labelled`, any other tree will do, without classes then: all images in train/, or in data_dir where there
    is no train/, in subfolders or not.
    """
    root = Path(data_dir)
    places, by_class = find_parts(root, labelled)
    parts = {part: list_images(place, by_class) for part, place in places.items()}
    folders = {part: [path.split(os.sep)[0] for path in paths] for part, (_, paths, _) in parts.items()}
    classes = sorted(set(folders["train"])) if by_class else []
    if by_class and (others := set(classes) ^ set(folders["test"])):
        raise UserError(f"{root}: only train or test has {', '.join(sorted(others))}; both need the same classes.")
    pixels = decoded_once(root / f".cache-{img_size}-{folder_key(parts)}.npz", parts, img_size)
    index, sets = {name: label for label, name in enumerate(classes)}, {}
    for part in parts:
        labels = torch.tensor([index.get(folder, 0) for folder in folders[part]])
        sets[part] = ImageSet(torch.from_numpy(pixels[part]), labels, classes)
    return sets["train"], sets.get("test")


def find_parts(root, labelled):
    """{"train": directory, "test": directory or left out}, and whether their images lie in <class>/<image>."""
    places = {part: root / part for part in ("train", "test")}
    if labelled:
        return places, True
    places = {part: place for part, place in places.items() if place.is_dir()}
    if "train" not in places:
        for train in sorted(root.glob("**/train")):  # the test images beside it would be trained on, too
            if (train.parent / "test").is_dir() or (train.parent / "val").is_dir():
                raise UserError(f"{train.parent} holds a data set; to train on it, give --data_dir {train.parent}.")
        return {"train": root}, False
    train, *test = ({os.path.dirname(path) for path in list_images(place, False)[1]} for place in places.values())
    by_class = test == [train] and all(folder and os.sep not in folder for folder in train)
    if test and not by_class and processes.is_first():
        print(f"{root}: no classes are read, as train/ and test/ do not have the same class folders.")
    return places, by_class


def list_images(directory, by_class):
    """(directory, its images, sorted: by_class in <class>/<image>, else at any depth; in words what else it holds)."""
    images, others = [], {}
    found = glob.glob("*/*" if by_class else "**/*", root_dir=directory, recursive=True)  # hidden files are left alone
    for path in sorted(found, key=lambda path: path.split(os.sep)):
        ending = Path(path).suffix.lower()
        if ending in IMAGE_SUFFIXES:
            images.append(path)
        elif not (is_folder := (directory / path).is_dir()) or by_class:
            others.setdefault("subfolder" if is_folder else ending or "without ending", []).append(path)
    not_read = ", ".join(f"{len(paths)} x {kind} (first: {paths[0]!r})" for kind, paths in others.items())
    if not images:
        state = "holds no images" if directory.is_dir() else "is no directory" if directory.exists() else "is missing"
        raise UserError(
            f"{directory} {state}. --data_dir must hold images ending in {' '.join(sorted(IMAGE_SUFFIXES))}, in "
            f"train/<class>/* and test/<class>/*. A folder without classes or test/ serves pretraining only."
            + (f" Not read: {not_read}." if not_read else "")
        )
    return directory, images, not_read


def folder_key(parts):
    """16 hex digits that change with the path, size or modification time of any image, and with what is not read."""
    all_not_read = {part: not_read for part, (_, _, not_read) in parts.items()}
    digest = hashlib.blake2b(f"{DECODER}{all_not_read}".encode(), digest_size=8)
    for part, (directory, paths, _) in parts.items():
        for path in paths:
            stat = os.stat(os.path.join(directory, path))
            digest.update(os.fsencode(f"{part}/{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))  # not only UTF-8
    return digest.hexdigest()


def decoded_once(cache, parts, img_size):
    """The pixels of each part: from the cache, else decoded by one process while others wait, and cached."""
    if pixels := read_cache(cache, parts):
        return pixels
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a read-only directory; the cache is written whole anyway
            stack.enter_context(locked(cache.parent))
        if pixels := read_cache(cache, parts):  # another process has written it meanwhile
            return pixels
        for directory, _, not_read in parts.values():
            if not_read:
                print(f"Not read in {directory}: {not_read}.")
        pixels = {part: decode(directory, paths, img_size) for part, (directory, paths, _) in parts.items()}
        store_cache(cache, pixels)
    return pixels


def decode(directory, paths, img_size):
    """Images as one uint8 array (N, 3, H, W), each as by `read_image`. Prints how many were resized."""
    pixels, errors = np.empty((len(paths), 3, img_size, img_size), np.uint8), {}

    def decode_one(i):  # its size
        try:
            image = open_image(directory / paths[i], img_size)
            pixels[i] = square(image, img_size)
            return image.size
        except UserError as error:
            errors[i] = str(error)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPool(cores) as pool:  # PIL lets other threads run while it decodes
        sizes = pool.imap(decode_one, range(len(paths)), chunksize=16)
        sizes = list(tqdm(sizes, "decoding", len(paths), unit=" images", disable=None, delay=3))
    if errors:
        first, *more = sorted(errors)
        told = ", ".join(str(directory / paths[i]) for i in more[:9]) + (" ..." if more[9:] else "")
        raise UserError(errors[first] + (f" Nor can {len(more)} more be read: {told}." if more else ""))
    if resized := sum(size != (img_size, img_size) for size in sizes):
        cropped = sum(width != height for width, height in sizes)
        crops = f", {cropped} of them centre-cropped" if cropped else ""
        print(f"Resized {resized} of {len(paths)} images in {directory} to {img_size} x {img_size}{crops}.")
    return pixels


def read_cache(path, parts):
    """The arrays of these parts in a cache; None where it is missing or damaged."""
    with contextlib.suppress(Exception), np.load(path) as stored:  # damage raises many kinds; a new cache mends it
        return {part: stored[part] for part in parts}


def store_cache(path, arrays):
    """Write the cache whole or not at all, in place of older ones; a folder that cannot be written goes without."""
    older, of_killed_processes = f"{path.name.rsplit('-', 1)[0]}-*.npz", ".cache-*.tmp"
    try:
        for old in (*path.parent.glob(older), *path.parent.glob(of_killed_processes)):
            old.unlink(missing_ok=True)
        with replacing(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        warnings.warn(f"No cache in {path.parent} ({error}): its images are decoded again each time.", stacklevel=2)
