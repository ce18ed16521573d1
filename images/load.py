"""Image sets by name, and parts of a set.

A set is one tensor on the training device; a batch is an index, a cast and a normalisation there: no worker processes.
"""

import math
import re
import socket
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision import datasets

from engine import processes
from engine.errors import UserError, as_user_error
from engine.files import locked
from images.folder import read_folder, readable
from images.npz import read_npz
from images.pixels import ImageSet, flatness, in_channels, to_images
from images.shapes import shapes


class Download(NamedTuple):
    """A data set that torchvision downloads and checks."""

    kind: type  # of torchvision.datasets
    parts: tuple  # its arguments for the training images, and for the test images
    place: str  # in data_dir
    archive: str = None  # what to put there by hand; default: the one that `kind` names
    unlabelled: dict = None  # its arguments for more images without labels, to pretrain on

    def __call__(self, data_dir, img_size, labelled):
        train = self.unlabelled if self.unlabelled and not labelled else self.parts[0]
        return self.read(train, data_dir, img_size), self.read(self.parts[1], data_dir, img_size)

    def read(self, part, data_dir, img_size):
        try:
            files = self.kind(data_dir, **part)
        except (RuntimeError, ValueError):  # missing, or damaged
            files = self.download(part, data_dir)
        images, done = to_images(files.data, img_size)
        if part is self.unlabelled:
            return ImageSet(images, torch.zeros(len(images), dtype=torch.int64), [], done)
        labels = torch.as_tensor(files.targets if hasattr(files, "targets") else files.labels).long()
        return ImageSet(images, labels, list(getattr(files, "classes", map(str, range(10)))), done)

    def download(self, part, data_dir):
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # seconds without a byte; urllib would wait for ever
        try:
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with locked(Path(data_dir)):
                return self.kind(data_dir, **part, download=True)  # torchvision looks again first
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"No {self.kind.__name__} in {data_dir}: {Path(data_dir) / self.place} is missing or damaged, and "
                f"{getattr(self.kind, 'url', 'it')} cannot be downloaded ({error}). Put "
                f"{self.archive or self.kind.filename} into {data_dir} and run again, point --data_dir at the folder "
                f"that holds {self.place}, or use --dataset shapes, which needs no files."
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)


TRAIN = {"train": True}, {"train": False}
SPLIT = {"split": "train"}, {"split": "test"}
DATASETS = {  # called with data_dir, img_size, labelled (see load_dataset): the training set, the test set or None
    "cifar10": Download(datasets.CIFAR10, TRAIN, "cifar-10-batches-py"),
    "cifar100": Download(datasets.CIFAR100, TRAIN, "cifar-100-python"),
    "fashion_mnist": Download(datasets.FashionMNIST, TRAIN, "FashionMNIST/raw", "FashionMNIST/raw/*.gz (only)"),
    "stl10": Download(datasets.STL10, SPLIT, "stl10_binary", unlabelled={"split": "unlabeled"}),
    "svhn": Download(datasets.SVHN, SPLIT, "*_32x32.mat", "train_32x32.mat and test_32x32.mat"),
    "folder": read_folder,
    "npz": read_npz,
    "shapes": lambda _, img_size, labelled: (shapes(5000, img_size, seed=0), shapes(1000, img_size, seed=1)),
}
NO_LABEL = re.compile(r"-\d+|nan|unlabell?ed", re.IGNORECASE)  # a class of this name is none
# A few images for dry runs, which the command line does not offer
FAKE = {"fake": lambda _, img_size, labelled: (shapes(1000, img_size, seed=0), shapes(20, img_size, seed=1))}


def load_dataset(name, data_dir, img_size, train_images=None, labelled=True, in_chans=3):
    """The training and the test set of one of DATASETS, or of fake: images of img_size x img_size.

    Args:
        data_dir: where torchvision's are, or are downloaded to; of folder the directory, of npz the file.
        train_images: keep this many training images, as in `first_of_each_class`; None: all.
        in_chans: channels of the images, see `in_channels`.
        labelled: whether classes are needed, as for all but pretraining. Where not, a folder may be any tree of
            images, and where there is no test set, training images are held out for it.
    """
    load = (DATASETS | FAKE).get(name)
    if load is None:
        raise UserError(f"--dataset {name!r} is unknown; choose from {', '.join(DATASETS)}.")
    with as_user_error(OSError, ImportError):  # torchvision reads SVHN with SciPy
        train, test = load(data_dir, img_size, labelled)
    place, count = readable(str(data_dir)) if name in ("folder", "npz") else name, len(train.images)

    def fitted(images):  # those of a dry run have any number of channels
        return images[:, torch.arange(in_chans) % 3] if name == "fake" else in_channels(images, in_chans, place)

    train, test = (part and part._replace(images=fitted(part.images)) for part in (train, test))
    if nameless := [name for name in train.classes if NO_LABEL.fullmatch(name)]:
        if labelled:
            raise UserError(f"{place}: {', '.join(nameless)} is no class but the lack of a label; remove its images.")
        train, test = (part and part._replace(labels=part.labels * 0, classes=[]) for part in (train, test))
    if labelled and len(train.labels.unique()) < 2:
        raise UserError(f"{place} has 1 class, nothing to tell apart; is train/<class>/ right?")
    if processes.is_first():
        for part, images in ("training images", train), ("test images", test):
            if images and (done := (*images.done, *flatness(images.images))):
                print(f"{place}, {part}: {' '.join(done)}")
    if test is None:
        train, test = split_off_test(train)
        if processes.is_first():
            held_out = f"{len(test.images)} of its {count} images, always the same ones, are not trained on"
            print(f"{place} has no test set: {held_out}.")
    train = train if train_images is None else first_of_each_class(train, train_images)
    say_copies(train, test, place, "test")
    return train, test


def say_copies(train, other, place, other_name):
    """Print how many training images are there twice, and how many of another set are training images, if any."""
    if not processes.is_first():
        return
    known = {hash(image.tobytes()) for image in train.images.numpy()}
    if again := len(train.images) - len(known):
        print(f"{place}: {again} of {len(train.images)} training images are copies of others, pixel for pixel.")
    if both := sum(hash(image.tobytes()) in known for image in other.images.numpy()):
        print(f"{place}: {both} of {len(other.images)} {other_name} images are training images, too, pixel for pixel.")


def data_name(dataset, data_dir):
    """What to call a data set; a folder or file goes by its own name."""
    path = Path(data_dir).resolve()
    return readable({"folder": path.name, "npz": path.stem}.get(dataset, dataset))


def split_off_test(images):
    """Split images that come without a test set in two: (to train on, to test on), a tenth, at most 1,000."""
    count = len(images.images)
    if count < 2:
        raise UserError(f"There is {count} image; 2 or more are needed, as one is held out for testing.")
    ranks = torch.randperm(count, generator=torch.Generator().manual_seed(0)).argsort()
    held_out = ranks < min(1000, math.ceil(count / 10))
    return images.where(~held_out), images.where(held_out)


def sample(images, count, generator):
    """A random choice of count images, without replacement; all of them where there are no more."""
    return images.where(torch.randperm(len(images.images), generator=generator)[:count])


def first_of_each_class(images, count, flag="--train_images"):
    """The first count / classes images of each class, in file order, so that a larger set contains a smaller one.

    Unlabelled images are the first `count` of a fixed random order: file order would take one folder before another.
    """
    if images.classes:
        return images.where(of_each_class(images, count, flag))
    if count > len(images.images):
        raise UserError(f"{flag} {count} is more than the {len(images.images)} training images.")
    return sample(images, count, torch.Generator().manual_seed(0))


def hold_out(images, count, train_images=None):
    """Hold out the last count / classes images of each class: (training images, held out).

    Training images are the same `train_images` as in `load_dataset`, or all the rest.
    """
    held_out = of_each_class(images, count, "--val_images", last=True)
    train = images.where(~held_out)
    if train_images is not None:
        train = first_of_each_class(train, train_images, f"With --val_images {count}, --train_images")
    val = images.where(held_out)
    say_copies(train, val, f"--val_images {count}", "held-out")
    return train, val


def of_each_class(images, count, flag, last=False):
    """(N,) bool: the first count / classes images of each class, or the last ones, which must leave some of each."""
    sizes = images.labels.bincount(minlength=len(images.classes))
    per_class, rest = divmod(count, len(sizes))
    most = int(sizes.min()) - last
    if rest or not 0 < per_class <= most:
        way_out = f"try {len(sizes) * min(max(per_class, 1), most)}" if most else "leave it out"
        raise UserError(f"{flag} {count} is not {len(sizes)} classes times 1 to {most} images; {way_out}.")
    places = images.labels.argsort(stable=True).argsort()  # of each image, class by class, each in file order
    ranks = places - (sizes.cumsum(0) - sizes)[images.labels]  # within its class, from 0
    return ranks >= (sizes - per_class)[images.labels] if last else ranks < per_class
