"""Image sets as uint8 tensors that live on the training device, and what turns them into batches there.

A batch is an index, a cast and a normalisation: no worker processes, no PIL in the loop. CIFAR-10 takes 184 MB.
"""

import collections
import contextlib
import glob
import hashlib
import math
import os
import socket
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets
from tqdm import tqdm

from engine import processes
from engine.errors import UserError, as_user_error
from engine.files import locked

DECODER = 3  # part of a cache's key: raise it whenever the same file gives other pixels
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".webp", ".tif", ".tiff"}


class Download(NamedTuple):
    """A data set that torchvision downloads and checks."""

    kind: type  # of torchvision.datasets
    parts: tuple  # its arguments for the training images, and for the test images
    place: str  # in --data_dir
    archive: str = None  # what to put there by hand; default: the one that `kind` names
    unlabelled: dict = None  # its arguments for more images without labels, to pretrain on


TRAIN = {"train": True}, {"train": False}
SPLIT = {"split": "train"}, {"split": "test"}
DOWNLOADS = {
    "cifar10": Download(datasets.CIFAR10, TRAIN, "cifar-10-batches-py"),
    "cifar100": Download(datasets.CIFAR100, TRAIN, "cifar-100-python"),
    "fashion_mnist": Download(datasets.FashionMNIST, TRAIN, "FashionMNIST/raw", "FashionMNIST/raw/*.gz (only)"),
    "stl10": Download(datasets.STL10, SPLIT, "stl10_binary", unlabelled={"split": "unlabeled"}),
    "svhn": Download(datasets.SVHN, SPLIT, "*_32x32.mat", "train_32x32.mat and test_32x32.mat"),
}
DATASETS = (*DOWNLOADS, "folder", "npz", "shapes")


class ImageSet(NamedTuple):
    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: torch.Tensor  # (N,) int64
    classes: list  # names, by label; empty for unlabelled images, whose labels are all 0

    def digest(self):
        """16 hex digits that change with any pixel or label."""
        parts = (tensor.contiguous().numpy() for tensor in (self.images, self.labels))
        return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=8).hexdigest()

    def where(self, keep):
        return self._replace(images=self.images[keep], labels=self.labels[keep])

    def to(self, device):
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


def name_of(args):
    """The data set as part of a run's name; a folder or file goes by its own name."""
    path = Path(args.data_dir).resolve()
    name = {"folder": path.name, "npz": path.stem}.get(args.dataset, args.dataset)
    return name if args.train_images is None else f"{name}-{args.train_images}"


@contextlib.contextmanager
def one_at_a_time(directory):
    """Let one process at a time download into a directory or decode it. The others wait here, then find it done."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a read-only directory; files are written whole anyway
            stack.enter_context(locked(Path(directory)))
        yield


def load_dataset(name, data_dir, img_size, train_images=None, labelled=True):
    """The training and the test set, images of img_size x img_size.

    Args:
        name: one of DATASETS, or fake (a few images, for dry runs). Those of DOWNLOADS are downloaded into data_dir
            where missing.
        data_dir: for folder, the directory that holds train/<class>/* and test/<class>/*; for npz, the file.
        train_images: keep this many training images: the first ones of each class, the same number of each; of
            unlabelled images the first ones of a fixed random order; None: all.
        labelled: whether classes are needed, as for all but pretraining. Where not, a folder may be any tree of
            images, and where there is no test set, training images are held out for it.

    Raises:
        UserError: unknown name, missing or unreadable files, more images asked for than there are.
    """
    if name in DOWNLOADS:
        with as_user_error(OSError):
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            train, test = downloaded(name, data_dir, img_size, labelled)
    elif name == "folder":
        with as_user_error(OSError):
            train, test = folder(data_dir, img_size, labelled)
    elif name == "npz":
        train, test = npz(data_dir, img_size, labelled)
    elif name == "fake":
        train, test = shapes(1000, img_size, seed=0), shapes(20, img_size, seed=1)
    elif name == "shapes":
        train, test = shapes(5000, img_size, seed=0), shapes(1000, img_size, seed=1)
    else:
        raise UserError(f"--dataset {name!r} is unknown; choose from {', '.join(DATASETS)}.")
    if test is None:
        count = len(train.images)
        train, test = split_off_test(train)
        if processes.is_first():
            held_out = f"{len(test.images)} of its {count} images, always the same ones, are not trained on"
            print(f"{data_dir} has no test set: {held_out}.")
    if train_images is not None:
        train = first_of_each_class(train, train_images)
    return train, test


def split_off_test(images):
    """Split images that come without a test set in two: (to train on, to test on), a tenth, at most 1,000.

    Raises:
        UserError: there are less than 2 images.
    """
    count = len(images.images)
    if count < 2:
        raise UserError(f"There is {count} image; 2 or more are needed, as one is held out for testing.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[order[: min(1000, math.ceil(count / 10))]] = True
    return images.where(~held_out), images.where(held_out)


def first_of_each_class(images, count, flag="--train_images"):
    """The first count / classes images of each class, in file order, so that a larger set contains a smaller one.

    Unlabelled images are the first `count` of a fixed random order: file order would take one folder before another.
    """
    if not images.classes:
        if count > len(images.images):
            raise UserError(f"{flag} {count} is more than the {len(images.images)} training images.")
        return draw(images, count, torch.Generator().manual_seed(0))
    return images.where(rank_in_class(images.labels) <= count_per_class(images, count, flag))


def draw(images, count, generator):
    """A random choice of count images, without replacement; all of them where there are no more."""
    return images.where(torch.randperm(len(images.images), generator=generator)[:count])


def hold_out(images, count, train_images=None):
    """Split training images in two: (to train on, held out), the last count / classes images of each class held out.

    Args:
        train_images: as in `load_dataset`, and the same images as there; None: all the rest.

    Raises:
        UserError: count or train_images is no multiple of the number of classes, or leaves too few images.
    """
    rank_from_last = rank_in_class(images.labels.flip(0)).flip(0)
    held_out = rank_from_last <= count_per_class(images, count, "--val_images", spared=1)
    train = images.where(~held_out)
    if train_images is not None:
        train = first_of_each_class(train, train_images, f"With --val_images {count}, --train_images")
    return train, images.where(held_out)


def rank_in_class(labels):
    """Rank of each image within its class, (N,) int64, from 1."""
    order = labels.argsort(stable=True)  # class by class, each in file order
    counts = labels.bincount()
    ranks = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts) + 1
    return torch.empty_like(ranks).scatter_(0, order, ranks)


def count_per_class(images, count, flag, spared=0):
    """count / classes; raises UserError, naming the flag, unless each class has that many images and `spared` more."""
    classes = len(images.classes)
    per_class, rest = divmod(count, classes)
    most = int(images.labels.bincount(minlength=classes).min()) - spared
    if rest or not 0 < per_class <= most:
        way_out = f"try {classes * min(max(per_class, 1), most)}" if most else "leave it out"
        raise UserError(f"{flag} {count} is not {classes} classes times 1 to {most} images; {way_out}.")
    return per_class


# --- data sets of torchvision ---


def downloaded(name, data_dir, img_size, labelled=True):
    """The training and the test set of one of DOWNLOADS. Without `labelled`, its unlabelled images are trained on."""
    (train, test), unlabelled = DOWNLOADS[name].parts, DOWNLOADS[name].unlabelled
    try:
        test = part_of(name, data_dir, img_size, test)
        if labelled or not unlabelled:
            return part_of(name, data_dir, img_size, train), test
        train = part_of(name, data_dir, img_size, unlabelled)
    except ImportError as error:  # torchvision reads SVHN's .mat files with SciPy
        raise UserError(f"--dataset {name} needs SciPy: pip install scipy") from error
    return train._replace(labels=torch.zeros_like(train.labels), classes=[]), test


def part_of(name, data_dir, img_size, part):
    """The images of one of DOWNLOADS that these arguments choose, through torchvision; downloaded where missing."""
    kind, _, place, archive, _ = DOWNLOADS[name]
    try:
        files = kind(data_dir, **part)
    except (RuntimeError, ValueError):  # missing, or damaged
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # seconds without a byte; urllib would wait for ever
        try:
            with one_at_a_time(data_dir):
                files = kind(data_dir, **part, download=True)  # torchvision looks again first
        except (OSError, RuntimeError, ValueError) as error:
            url = getattr(kind, "url", "it")
            raise UserError(
                f"No {name} in {data_dir}: {Path(data_dir) / place} is missing or damaged, and {url} cannot be "
                f"downloaded ({error}). Put {archive or kind.filename} into {data_dir} and run again, point --data_dir "
                f"at the folder that holds {place}, or use --dataset shapes, which needs no files."
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    labels = files.targets if hasattr(files, "targets") else files.labels
    classes = getattr(files, "classes", map(str, range(10)))
    return ImageSet(to_images(files.data, img_size), torch.as_tensor(labels).long(), list(classes))


def to_images(pixels, img_size):
    """uint8 pixels (N, H, W), (N, H, W, 3) or (N, 3, H, W) as RGB images (N, 3, img_size, img_size)."""
    pixels = torch.as_tensor(pixels)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return resize(pixels, img_size).expand(-1, 3, -1, -1).contiguous()


def resize(images, img_size):
    """The middle square of uint8 images (N, C, H, W) as img_size x img_size, bilinear with antialiasing.

    Unchanged where they fit.
    """
    height, width = images.shape[-2:]
    if (height, width) == (img_size, img_size):
        return images
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[..., top : top + side, left : left + side]
    size = (img_size, img_size)
    # contiguous: another memory format would round other ways
    parts = (part.contiguous() for part in images.split(1000))
    return torch.cat([F.interpolate(part, size, mode="bilinear", antialias=True) for part in parts])


# --- folder ---


def folder(data_dir, img_size, labelled=True):
    """Any train/<class>/* and test/<class>/* tree of images, decoded once.

    The decoded pixels are kept in data_dir/.cache-<size>-<key>.npz, keyed by the path, size and modification time of
    every image; NumPy checks a cache's CRC-32 as it reads, and a damaged one is built again.

    Args:
        labelled: where False, any other tree will do, without classes then: all images in train/, or in data_dir
            where there is no train/, in subfolders or not.

    Returns:
        The training set and the test set, None where there is no test/.
    """
    root = Path(data_dir)
    places = {part: root / part for part in ("train", "test")}
    by_class = labelled or are_classes(*map(folders_of_images, places.values()))
    if not by_class:
        places = {part: place for part, place in places.items() if place.is_dir()}
        if len(places) == 2 and processes.is_first():
            print(f"{root}: no classes are read, as train/ and test/ do not have the same class folders.")
        if "train" not in places:
            refuse_sets_below(root)
            places = {"train": root}
    parts, not_read, names = {}, {}, {}
    for part, place in places.items():
        parts[part], not_read[part] = list_images(place, by_class)
        names[part] = [path.split(os.sep)[0] if by_class else "" for path in parts[part]]
    classes = sorted(set(names["train"]))
    if others := set(classes) ^ set(names.get("test", classes)):
        raise UserError(
            f"{root}: train and test do not have the same classes; only one has {', '.join(sorted(others))}."
        )
    cache = root / f".cache-{img_size}-{folder_key(places, parts, not_read)}.npz"
    arrays = read_cache(cache, parts)
    if arrays is None:
        with one_at_a_time(root):
            arrays = read_cache(cache, parts)  # another process may have written it meanwhile
            if arrays is None:
                for part, place in places.items():
                    if not_read[part]:
                        print(f"Not read in {place}: {not_read[part]}.")
                arrays = {part: decode(places[part], paths, img_size) for part, paths in parts.items()}
                store_cache(cache, arrays)
    index = {name: label for label, name in enumerate(classes)}
    labels = {part: torch.tensor([index[name] for name in names[part]]) for part in parts}
    classes = classes if by_class else []
    sets = {part: ImageSet(torch.from_numpy(arrays[part]), labels[part], classes) for part in parts}
    return sets["train"], sets.get("test")


def folders_of_images(directory):
    """The folders that hold a directory's images, relative to it; "" is the directory itself."""
    paths = glob.iglob("**/*", root_dir=directory, recursive=True)
    return {os.path.dirname(path) for path in paths if Path(path).suffix.lower() in IMAGE_SUFFIXES}


def are_classes(train, test):
    """Whether train and test have the same class folders, and no images outside them or in folders inside them."""
    return train == test != set() and all(folder and os.sep not in folder for folder in train)


def refuse_sets_below(root):
    """Refuse a tree in which a data set lies deeper: its test images would be trained on, too."""
    for train in sorted(root.glob("**/train")):
        if (train.parent / "test").is_dir() or (train.parent / "val").is_dir():
            raise UserError(f"{train.parent} holds a data set; to train on it, give --data_dir {train.parent}.")


def list_images(directory, by_class=True):
    """Every image in a directory, sorted, and in words what else is there; hidden files are left alone.

    Args:
        by_class: those in <class>/<image>; else at any depth.
    """
    images, others = [], {}
    pattern = "*/*" if by_class else "**/*"
    for path in sorted(glob.glob(pattern, root_dir=directory, recursive=True), key=lambda path: path.split(os.sep)):
        ending = Path(path).suffix.lower()
        if ending in IMAGE_SUFFIXES:
            images.append(path)
        elif by_class or not (directory / path).is_dir():
            kind = "subfolder" if (directory / path).is_dir() else ending or "without ending"
            others.setdefault(kind, []).append(path)
    not_read = ", ".join(f"{len(paths)} x {kind} (first: {paths[0]!r})" for kind, paths in others.items())
    if not images:
        state = "holds no images" if directory.is_dir() else "is no directory" if directory.exists() else "is missing"
        tree = "train/<class>/* and test/<class>/*, images" if by_class else "images, in folders or not,"
        found = f" Not read: {not_read}." if not_read else ""
        only = " A folder without classes or test/ serves pretraining only." if by_class else ""
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{directory} {state}. --data_dir must hold {tree} ending in {endings}.{only}{found}")
    return images, not_read


def folder_key(places, parts, not_read):
    """16 hex digits that change with the path, size or modification time of any image, and with what is not read."""
    digest = hashlib.blake2b(f"{DECODER}{not_read}".encode(), digest_size=8)
    for part, path in ((part, path) for part, paths in parts.items() for path in paths):
        stat = os.stat(os.path.join(places[part], path))
        digest.update(os.fsencode(f"{part}/{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))  # not only UTF-8
    return digest.hexdigest()


def decode(directory, paths, img_size):
    """Images as one uint8 array (N, 3, H, W), each read as by `read_image`; prints how many were resized.

    Raises:
        UserError: names the first images that cannot be read, and says how many there are.
    """
    pixels, errors = np.empty((len(paths), 3, img_size, img_size), np.uint8), {}

    def decode_one(i):
        try:
            image = open_image(directory / paths[i], img_size)
        except UserError as error:
            errors[i] = str(error)
            return None
        pixels[i] = square(image, img_size)
        return image.size

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPool(cores) as pool:  # PIL lets other threads run while it decodes
        done = pool.imap(decode_one, range(len(paths)), chunksize=16)
        sizes = collections.Counter(tqdm(done, "decoding", len(paths), unit=" images", disable=None, delay=3))
    if errors:
        first, *more = sorted(errors)
        told = ", ".join(str(directory / paths[i]) for i in more[:9]) + (" ..." if more[9:] else "")
        raise UserError(errors[first] + (f" Nor can {len(more)} more be read: {told}." if more else ""))
    if resized := len(paths) - sizes[img_size, img_size]:
        cropped = sum(count for (width, height), count in sizes.items() if width != height)
        place = f"{len(paths)} images in {directory} to {img_size} x {img_size}"
        print(f"Resized {resized} of {place}{f', {cropped} of them centre-cropped' if cropped else ''}.")
    return pixels


def read_image(source, img_size):
    """A path or PIL image as (3, img_size, img_size) uint8: upright, RGB, the middle square, bilinear, antialiased.

    A path gives the pixels that a folder data set has of this file, and a UserError where it cannot be read.
    """
    image = to_rgb(source) if isinstance(source, Image.Image) else open_image(source, img_size)
    return torch.from_numpy(square(image, img_size))


def open_image(path, img_size):
    """An upright RGB image from a file.

    A JPEG whose shorter side has at least 4 x img_size is decoded at 1/2, 1/4 or 1/8 of its size, with 2 x img_size
    left: twice as fast, for pixels that differ by little. A square one is always decoded at full size.
    """
    try:
        with Image.open(path) as image:
            if image.width != image.height:
                image.draft(None, (2 * img_size, 2 * img_size))
            return to_rgb(image)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory; name image files.") from error
    except Exception as error:  # PIL raises many kinds on damaged files
        raise UserError(f"Cannot read {path} as an image: {error}. Repair or delete it, then run again.") from error


def square(image, img_size):
    """The middle square of an RGB image as uint8 pixels (3, img_size, img_size)."""
    return np.asarray(ImageOps.fit(image, (img_size, img_size), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def to_rgb(image):
    """A PIL image as RGB: turned as its EXIF says, 16-bit greyscale scaled to 8, transparency laid over black.

    Whole numbers of 32 bits are taken as 8 bits where they fit, else as 16.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF: then the image is taken as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UserError("its pixels are not 8 or 16 bits, so black and white are unknown; save it as 8 bits")
        is_8_bit = image.mode == "I" and values.max() <= 255
        image = Image.fromarray((values if is_8_bit else values // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")
    return image.convert("RGB")


def read_cache(path, parts):
    """The arrays of these parts in a cache; None where it is missing or damaged."""
    try:
        with np.load(path) as stored:
            return {part: stored[part] for part in parts}
    except Exception:  # a damaged file raises many kinds; building it again mends them all
        return None


def store_cache(path, arrays):
    """Write the cache whole or not at all, in place of older ones; a folder that cannot be written goes without."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    older, of_killed_processes = path.name.rsplit("-", 1)[0] + "-*.npz", ".cache-*.tmp"
    try:
        for old in (*path.parent.glob(older), *path.parent.glob(of_killed_processes)):
            old.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        message = f"No cache of decoded images in {path.parent} ({error}): they are decoded again each time."
        warnings.warn(message, stacklevel=2)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# --- npz ---


def npz(path, img_size, labelled=True):
    """A NumPy file with the arrays that MedMNIST ships: (train|test)_images and (train|test)_labels; no other is used.

    Images are uint8, (N, H, W) or (N, H, W, 3); labels one whole number each, (N,) or (N, 1).

    Args:
        labelled: where False, labels may be missing or several for an image, without classes then; and so may the
            test images.

    Returns:
        The training set and the test set, None where there are no test images.
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
    if "train" not in images or not all(map(are_pixels, images.values())):
        raise UserError(f"train_images and test_images must be uint8, (N, H, W) or (N, H, W, 3); {found}.")
    labels = {part: arrays.get(f"{part}_labels", np.zeros(0)) for part in images}
    by_class = all(are_labels(labels[part], len(images[part])) for part in images)
    if labelled and not (by_class and "test" in images):
        raise UserError(
            f"A classifier needs test_images, and train_labels and test_labels with one whole number for each image; "
            f"without them it serves pretraining only; {found}."
        )
    if not by_class:
        labels = {part: np.zeros(len(pixels), int) for part, pixels in images.items()}
    values = np.unique(labels["train"])
    if others := set(labels.get("test", values).flat) - set(values):
        raise UserError(f"{path}: test_labels has {', '.join(map(str, sorted(others)))}, which train_labels has not.")
    classes = [str(value) for value in values] if by_class else []
    sets = {}
    for part, pixels in images.items():
        index = torch.from_numpy(np.searchsorted(values, labels[part].reshape(-1)))
        sets[part] = ImageSet(to_images(pixels, img_size), index, classes)
    return sets["train"], sets.get("test")


def are_pixels(array):
    shape_fits = array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3)
    return array.dtype == np.uint8 and array.size > 0 and shape_fits


def are_labels(array, count):
    return array.dtype.kind in "iu" and array.shape in ((count,), (count, 1))


# --- shapes ---

SHAPES = ("bar", "circle", "crescent", "cross", "ell", "half disc", "ring", "square", "star", "triangle")


def shapes(count, img_size, seed):
    """Ten shapes drawn from a seed, any colours, places and sizes, a little turned, with noise and clutter over them.

    Colour and place tell nothing, so that from few labels a vision transformer learns little unless it was pretrained.

    Returns:
        ImageSet of count images (count, 3, img_size, img_size), equally many of each class, shuffled.
    """
    draw = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=draw)

    labels = (torch.arange(count) % len(SHAPES))[torch.randperm(count, generator=draw)]
    grid = (torch.arange(img_size) + 0.5) / img_size * 2 - 1
    x, y = grid.expand(count, img_size, img_size), grid[:, None].expand(count, img_size, img_size)

    def place(scale, reach, turn):  # image coordinates to an object's
        angle = uniform(-turn, turn, count, 1, 1)
        dx, dy = x - uniform(-reach, reach, count, 1, 1), y - uniform(-reach, reach, count, 1, 1)
        return (angle.cos() * dx + angle.sin() * dy) / scale, (angle.cos() * dy - angle.sin() * dx) / scale

    def paint(canvas, distance, scale, colour):  # over the canvas, its edge one pixel wide
        cover = (0.5 - distance * scale * img_size / 2).clamp(0, 1)[:, None]
        return canvas * (1 - cover) + colour * cover

    ground, colour = uniform(0.1, 0.9, count, 3, 1, 1), uniform(0.1, 0.9, count, 3, 1, 1)
    u, _ = place(1.0, 0.0, math.pi)
    canvas = ground + uniform(-0.2, 0.2, count, 3, 1, 1) * u[:, None]  # shaded from one side to the other
    away = (colour - ground).sign() * (0.3 - (colour - ground).abs().mean(1, keepdim=True)).clamp(min=0)
    scale = uniform(0.45, 0.75, count, 1, 1)
    u, v = place(scale, 0.25, 0.4)
    distance = torch.empty_like(u)
    for label, name in enumerate(SHAPES):
        distance[labels == label] = distance_to(name, u[labels == label], v[labels == label])
    canvas = paint(canvas, distance, scale, colour + away)
    for _ in range(2):  # clutter, partly over the shape
        scale = uniform(0.06, 0.16, count, 1, 1)
        u, v = place(scale, 1.0, 0.0)
        canvas = paint(canvas, torch.hypot(u, v) - 1, scale, uniform(0, 1, count, 3, 1, 1))
    canvas = canvas + 0.04 * torch.randn(canvas.shape, generator=draw)
    return ImageSet((canvas.clamp(0, 1) * 255).round().byte(), labels, list(SHAPES))


def distance_to(name, x, y):
    """How far points lie outside a shape of about unit radius; negative inside, near enough to a distance for edges."""
    radius, angle = torch.hypot(x, y), torch.atan2(x, y)

    def box(half_width, half_height, cx=0.0, cy=0.0):
        return torch.maximum((x - cx).abs() - half_width, (y - cy).abs() - half_height)

    def spokes(n):  # angle to the nearest of n spokes, 0 to pi / n; one points up
        return (angle.remainder(2 * math.pi / n) - math.pi / n).abs()

    match name:
        case "bar":
            return box(1.0, 0.3)
        case "circle":
            return radius - 0.85
        case "crescent":
            return torch.maximum(radius - 0.95, 0.8 - torch.hypot(x - 0.5, y))
        case "cross":
            return torch.minimum(box(0.95, 0.28), box(0.28, 0.95))
        case "ell":
            return torch.minimum(box(0.25, 0.9, cx=-0.5), box(0.75, 0.25, cy=0.65))
        case "half disc":
            return torch.maximum(radius - 1.0, y - 0.1)
        case "ring":
            return (radius - 0.68).abs() - 0.24
        case "square":
            return box(0.75, 0.75)
        case "star":
            return radius * (2 * math.pi / 5 - spokes(5)).cos() - math.cos(2 * math.pi / 5)
        case "triangle":
            return radius * (math.pi / 3 - spokes(3)).cos() - 0.5


# --- batches ---


def normalize(images):
    """uint8 pixels to the model's range: x / 255, then (x - 0.5) / 0.5, in [-1, 1] float32."""
    return images.float() / 127.5 - 1


def to_pixels(images):
    """The model's range back to uint8 pixels, clipped. The inverse of `normalize`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
