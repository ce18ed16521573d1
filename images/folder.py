"""A tree of image files as an image set, decoded once and cached beside itself."""

import contextlib
import functools
import hashlib
import os
import re
import stat
import unicodedata
import warnings
from collections import defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine.errors import UserError
from engine.files import locked, replacing
from images.pixels import ImageSet, open_image, resizing, square

DECODER = 4  # part of a cache's key: raise it whenever the same file gives other pixels
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
IMAGE_SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm"} | ({".heic", ".heif", ".avif"} & set(Image.registered_extensions()))


class Tree(NamedTuple):
    """The images below a directory, in order."""

    directory: Path
    files: dict  # {a file's identity, the same for all links to it: its path in the directory}
    not_read: dict  # {kind: paths}
    key: str  # changes with the path, size or modification time of any image

    def __str__(self):
        """In words what is not read: a sentence, or nothing."""
        kinds = (f"{len(paths)} x {kind} (first: '{readable(paths[0])}')" for kind, paths in self.not_read.items())
        return f"Not read: {', '.join(kinds)}." if self.not_read else ""


def read_folder(data_dir, img_size, labelled=True):
    """Read train/<class>/** and test/<class>/**: (training ImageSet, test ImageSet); the second is None without test/.

    Decoded pixels are kept in data_dir/.cache-<size>-<key>.npz, keyed by the path, size and modification time of every
    image; NumPy checks a cache's CRC-32 as it reads, and a damaged one is built again.

    If `labelled` is False, any other tree is accepted, too, and has no classes: all images in train/, or in data_dir
    if there is no train/.
    """
    sets = read_trees(Path(data_dir), find_trees(Path(data_dir), labelled), img_size, labelled)
    return sets["train"], sets.get("test")


def read_test_folder(data_dir, img_size):
    """Read a test set alone, an ImageSet: test/<class>/** or, if there is no test/, <class>/**."""
    root = Path(data_dir)
    tree = list_images(root / "test" if (root / "test").is_dir() else root, labelled=True)
    return read_trees(root, {"test": tree}, img_size, labelled=True)["test"]


def read_trees(root, trees, img_size, labelled):
    """{part: ImageSet} of {part: Tree}, cached in `root`."""
    folders = {part: [class_of(path) for path in tree.files.values()] for part, tree in trees.items()}
    classes = find_classes(trees, folders, labelled)
    key = hashlib.blake2b(f"{DECODER}{[(part, tree.key) for part, tree in trees.items()]}".encode(), digest_size=8)
    decoded = decoded_once(root / f".cache-{img_size}-{key.hexdigest()}.npz", trees, img_size)
    index, sets = {name: label for label, name in enumerate(classes)}, {}
    for part, tree in trees.items():
        done = [*decoded[f"{part}_done"].tolist(), *filter(None, [str(tree)])]
        if len(trees) == 2 and part == "train" and not classes:
            done.append("No classes are read, as train/ and test/ do not have the same class folders.")
        labels = torch.tensor([index.get(folder, 0) for folder in folders[part]])
        sets[part] = ImageSet(torch.from_numpy(decoded[part]), labels, classes, tuple(done))
        if labelled and "" in folders[part]:
            sets[part] = sets[part].where(torch.tensor([folder != "" for folder in folders[part]]))
    return sets


def find_trees(root, labelled):
    """{"train": Tree, "test": Tree or left out}, which share no file."""
    parts = [part for part in ("train", "test") if labelled or (root / part).is_dir()]
    trees = {part: list_images(root / part, labelled) for part in parts}
    if both := trees["train"].files.keys() & trees["test"].files.keys() if len(trees) == 2 else ():
        pair = " and ".join(str(tree.directory / tree.files[min(both, key=str)]) for tree in trees.values())
        raise UserError(f"{len(both)} files are trained on and tested on: {pair} are one file. Keep one of them.")
    if "train" in trees:
        return trees
    tree = list_images(root, labelled)

    def above(names):  # the folders that hold one of such a name
        return {found[1] for path in tree.files.values() if (found := re.match(rf"(?i)(.*/)?(?:{names})/", path))}

    for place in above("train|training") & above("test|testing|val|valid|validation"):  # they would be trained on, too
        place = root / (place or "")
        raise UserError(f"{place} holds a data set; to train on it, give --data_dir {place}, with train/ and test/.")
    return {"train": tree}


def find_classes(trees, folders, labelled):
    """The names of the class folders, which train/ and test/ share; [] where there are none and none are needed."""
    train, test = (set(folders.get(part, ())) for part in ("train", "test"))
    if not labelled:
        return sorted(train) if train == test and "" not in train else []
    if len(trees) == 2 and (others := (train ^ test) - {""}):
        told = ", ".join(f"'{name}'" for name in sorted(others))
        raise UserError(f"{trees['train'].directory}, ../test: only one has {told}; both need the same classes.")
    return sorted((train | test) - {""})


def list_images(directory, labelled):
    """The Tree of all images below a directory, each file once; if `labelled`, no class is empty, no file in two."""
    files, not_read, key, linked = {}, defaultdict(list), hashlib.blake2b(digest_size=8), "link to a file that is read"
    for path, real in sorted(walk(directory), key=lambda found: (in_one_form(found[0]).split(os.sep), found)):
        ending, identity, info = os.path.splitext(path)[1].lower(), real, None
        if ending not in IMAGE_SUFFIXES:
            not_read[readable(ending) or "without ending"].append(path)
            continue
        with contextlib.suppress(OSError):  # decoding it says why
            info = os.stat(real)
            if info.st_nlink > 1 or os.path.islink(real):
                identity = (info.st_dev, info.st_ino) if info.st_nlink > 1 else os.path.realpath(real)
        if info and not stat.S_ISREG(info.st_mode):
            not_read["no regular file"].append(path)
        elif identity not in files:
            files[identity] = path
            if labelled and not class_of(path):
                not_read["image in no class folder"].append(path)
            key.update(os.fsencode(f"{path}\0{info and (info.st_size, info.st_mtime_ns)}\0"))  # not only UTF-8
        elif labelled and class_of(path) != class_of(files[identity]):
            raise UserError(f"{directory}: {files[identity]} and {path} are one file in two classes. Keep one of them.")
        else:
            not_read[linked].append(path)
    tops = {entry.name for entry in os.scandir(directory) if entry.is_dir()} if directory.is_dir() else set()
    tops -= {path.split(os.sep)[0] for path in (*files.values(), *not_read[linked])}
    not_read["folder without images"] = sorted(top for top in tops if not top.startswith("."))
    tree = Tree(directory, files, {kind: paths for kind, paths in not_read.items() if paths}, key.hexdigest())
    if not files or (labelled and "folder without images" in tree.not_read):
        state = "has a class without images" if files else "holds no images"
        state = state if directory.is_dir() else "is no directory" if directory.exists() else "is missing"
        raise UserError(
            f"{directory} {state}. --data_dir must hold images ending in {' '.join(sorted(IMAGE_SUFFIXES))}, in "
            f"train/<class>/* and test/<class>/*. A folder without classes or test/ serves pretraining only. {tree}"
        )
    return tree


def walk(directory):
    """Yield (path in the directory, path with folder links resolved) of each file; hidden names are left out.

    Within a class, each folder is entered once; a link to a folder that contains the link is not entered.
    """

    def stop(error):
        raise error

    seen = set()
    for folder, subfolders, names in os.walk(directory, onerror=stop if directory.is_dir() else None, followlinks=True):
        inside, real = os.path.relpath(folder, directory), os.path.realpath(folder)
        place = inside.split(os.sep)[0], real
        if place in seen or f"{os.path.realpath(os.path.dirname(folder))}{os.sep}".startswith(f"{real}{os.sep}"):
            names, subfolders[:] = [], []
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                yield os.path.normpath(os.path.join(inside, name)), os.path.join(real, name)


in_one_form = functools.partial(unicodedata.normalize, "NFC")  # macOS and Linux spell an accent differently


def class_of(path):
    """The name of the class folder that an image lies in, "" in none."""
    folder, *inside = path.split(os.sep)
    return readable(folder) if inside else ""


def readable(name):
    """A name of any bytes as it can be printed, in one Unicode form."""
    strange = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"  # the last: bytes that are no UTF-8
    return re.sub(strange, lambda found: found[0].encode("unicode_escape").decode(), in_one_form(name))


def decoded_once(cache, trees, img_size):
    """What `decode` gives: from the cache, else decoded by one process while others wait, and cached."""
    if arrays := read_cache(cache, trees):
        return arrays
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a read-only directory; the cache is written whole anyway
            stack.enter_context(locked(cache.parent))
        if arrays := read_cache(cache, trees):  # another process has written it meanwhile
            return arrays
        paths = {part: [tree.directory / path for path in tree.files.values()] for part, tree in trees.items()}
        arrays = decode(paths, img_size)
        store_cache(cache, arrays)
    return arrays


def decode(parts, img_size):
    """Decode {part: paths} as `read_image` does: {part: images (N, 3, H, W) uint8, <part>_done: sentences on them}."""
    paths = [path for some in parts.values() for path in some]
    pixels, errors = np.empty((len(paths), 3, img_size, img_size), np.uint8), {}

    def decode_one(i, limits=None):  # its size and own limits
        try:
            image, own = open_image(paths[i], img_size, limits)
            pixels[i] = square(image, img_size)
            return image.size, own
        except UserError as error:
            errors[i] = str(error)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPool(cores) as pool:  # PIL lets other threads run while it decodes
        facts = pool.imap(decode_one, range(len(paths)), chunksize=16)
        facts = list(tqdm(facts, "decoding", len(paths), unit=" images", disable=None, delay=3))
        deep = [fact[1] for fact in facts if fact and fact[1]]  # of more than 8 bits: all from black to white alike
        if deep and not errors:
            limits = min(low for low, _ in deep), max(high for _, high in deep)
            pool.map(lambda i: facts[i][1] not in (None, limits) and decode_one(i, limits), range(len(paths)))
    if errors:
        first, *more = sorted(errors)
        told = ", ".join(str(paths[i]) for i in more[:9]) + (" ..." if more[9:] else "")
        raise UserError(errors[first] + (f" Nor can {len(more)} more be read: {told}." if more else ""))
    arrays, end = {}, 0
    for part, some in parts.items():
        start, end = end, end + len(some)
        sizes, own = zip(*facts[start:end], strict=True)
        done = [*resizing(sizes, img_size)]
        if count := len(own) - own.count(None):
            spread = f"the values that the set uses, {limits[0]:g} to {limits[1]:g}, became 0 to 255"
            done.append(f"{count} of {len(some)} images have 16 bits or more: {spread}.")
        arrays |= {part: pixels[start:end], f"{part}_done": np.array(done, str)}
    return arrays


def read_cache(path, parts):
    """The arrays of these parts in a cache; None where it is missing or damaged."""
    with contextlib.suppress(Exception), np.load(path) as stored:  # damage raises many kinds; a new cache mends it
        return {name: stored[name] for part in parts for name in (part, f"{part}_done")}


def store_cache(path, arrays):
    """Write the cache whole or not at all, and delete older ones; if the folder cannot be written, only warn."""
    older, of_killed_processes = f"{path.name.rsplit('-', 1)[0]}-*.npz", ".cache-*.tmp"
    try:
        for old in (*path.parent.glob(older), *path.parent.glob(of_killed_processes)):
            old.unlink(missing_ok=True)
        with replacing(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        warnings.warn(f"No cache in {path.parent} ({error}): its images are decoded again each time.", stacklevel=2)
