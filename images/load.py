"""Image sets by name, and parts of a set.

A set is one tensor on the training device; a batch is an index, a cast and a normalisation there: no worker processes.
"""

import math
import re
import socket
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision import datasets

from engine import processes
from engine.device import generator
from engine.errors import UserError, as_user_error
from engine.files import locked
from images.folder import read_folder, read_test_folder, readable
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


def load_dataset(name, data_dir, img_size, *, labelled=True, in_chans=3):
    """The training and the test set of one of DATASETS, or of fake: images of img_size x img_size.

    Args:
        data_dir: where torchvision's files are or will be downloaded to; folder: the directory; npz: the file.
        in_chans: channels of the images, see `in_channels`.
        labelled: whether classes are needed; pretraining needs none. Then a folder may be any tree of images, and if
            there is no test set, some training images are held out as one.
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
    say_done(train, f"{place}, training images")
    say_done(test, f"{place}, test images")
    if test is None:
        train, test = split_off_test(train)
        if processes.is_first():
            held_out = f"{len(test.images)} of its {count} images, always the same ones, are not trained on"
            print(f"{place} has no test set: {held_out}.")
    say_copies(train, test, place, "test")
    return train, test


def load_test_set(name, data_dir, img_size, classes, whose, in_chans=3):
    """The test images of a set, for a classifier of `classes`: labels are positions in `classes`, matched by name.

    A folder needs no train/ here, and some classes may be missing.

    Raises:
        UserError: the set has a class that is not in `classes`; the message calls the classifier `whose`.
    """
    if name == "folder" and not Path(data_dir, "train").is_dir():
        with as_user_error(OSError):
            test = read_test_folder(data_dir, img_size)
        place = readable(str(data_dir))
        test = test._replace(images=in_channels(test.images, in_chans, place))
        say_done(test, f"{place}, test images")
    else:
        test = load_dataset(name, data_dir, img_size, in_chans=in_chans)[1]
    if others := [one for one in test.classes if one not in classes]:
        others, known = (textwrap.shorten(", ".join(names), 300) for names in (others, classes))
        raise UserError(f"{whose} tells {known} apart; {name} in {data_dir} has {others}. Give images of its classes.")
    places = torch.tensor([classes.index(one) for one in test.classes])
    return test._replace(labels=places[test.labels], classes=classes)


def say_done(images, what):
    """Print what was done to the pictures of a set, if there is one, and what was left out."""
    if processes.is_first() and images and (done := (*images.done, *flatness(images.images))):
        print(f"{what}: {' '.join(done)}")


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
    """The name of a data set: `dataset`, or the name of its folder or file."""
    path = Path(data_dir).resolve()
    return readable({"folder": path.name, "npz": path.stem}.get(dataset, dataset))


def split_off_test(images):
    """Hold out a tenth, at most 1,000, as a test set: (ImageSet to train on, ImageSet to test on)."""
    count = len(images.images)
    if count < 2:
        raise UserError(f"There is {count} image; 2 or more are needed, as one is held out for testing.")
    ranks = torch.randperm(count, generator=torch.Generator().manual_seed(0)).argsort()
    held_out = ranks < min(1000, math.ceil(count / 10))
    return images.where(~held_out), images.where(held_out)


def sample(images, count, generator):
    """A random choice of count images, without replacement; all of them where there are no more."""
    return images.where(torch.randperm(len(images.images), generator=generator)[:count])


def draw(images, train_images, seed, val_images=None):
    """Draw the images to train on and those to hold out: two ImageSets in file order, the second None without any.

    The seed draws one order of all images: the first of each class are trained on, the last are held out. So with one
    seed, a larger set contains a smaller one, and holding images out does not change the others.

    Args:
        train_images: how many to train on; None: all that are not held out.
        val_images: how many to hold out; at least one of each class is left to train on.
    """
    order, held_out, given = torch.randperm(len(images.labels), generator=generator("cpu", seed, "labels")), None, ""
    if val_images is not None:
        last = of_each_class(images, order.flip(0), val_images, "--val_images", leave=1)
        held_out, order = images.where(last.sort().values), order[~torch.isin(order, last)]
        given = f"With --val_images {val_images}, "
    if train_images is not None:
        order = of_each_class(images, order, train_images, f"{given}--train_images")
    train = images if len(order) == len(images.labels) else images.where(order.sort().values)
    if held_out:
        say_copies(train, held_out, f"--val_images {val_images}", "held-out")
    return train, held_out


def of_each_class(images, order, count, flag, leave=0):
    """The first `count` indices of `order`, (count,): the same number of each class, or its share if sizes differ.

    First comes one of each class. Each next image is of the class that is furthest behind its share (Webster's
    method), so a larger count contains a smaller one.

    Args:
        order: (M,) int64, indices of `images`; leave: how many of each class are not taken.

    Raises:
        UserError: the images are too few, or classes are even and the count is not the same number of each.
    """
    labels, classes = images.labels[order], max(len(images.classes), 1)
    sizes, there = (some.bincount(minlength=classes) for some in (images.labels, labels))
    even, free = sizes.min() == sizes.max(), (there - leave).clamp(min=0)
    step, most = classes if even else 1, int(free.sum())
    if count % step or not classes <= count <= most or not free.all():
        equally = f", equally many of {classes} classes" if step > 1 else ""
        way_out = f"try {min(max(count // step * step, classes), most)}" if free.all() else "leave it out"
        raise UserError(f"{flag} {count} is not {classes} to {most} images{equally}; {way_out}.")
    places = labels.argsort(stable=True).argsort()  # of each image, class by class, each in this order
    ranks = places - (there.cumsum(0) - there)[labels]  # within its class, from 0
    turns = (ranks + 0.5).double() / sizes[labels]
    turns[ranks == 0] = 0
    turns[ranks >= free[labels]] = math.inf
    return order[turns.argsort(stable=True)[:count]]
