import hashlib
import pickle
import re
import socket
import sys

import numpy as np
import pytest
import torch
from torchvision import datasets

from engine import files
from engine.errors import UserError
from images import load
from images.load import ImageSet, data_name, draw, load_dataset, sample, split_off_test
from images.shapes import shapes

# --- parts of a set ---


def test_a_set_has_another_digest_as_soon_as_a_pixel_or_a_label_differs():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    whole = ImageSet(images, labels, ["cat", "dog"])
    brighter = images.clone()
    brighter[1, 2, 3, 3] = 1
    sets = whole, whole._replace(images=brighter), whole._replace(labels=labels.flip(0))
    digests = [some.digest() for some in sets]
    assert len(set(digests)) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)
    assert whole._replace(images=images.clone()).digest() == digests[0]


def test_a_set_moves_to_a_device_with_images_and_labels():
    moved = ImageSet(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), ["cat", "dog"]).to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.classes == ["cat", "dog"]


def numbered(*sizes):
    """Images that are their own place in the file, of classes of these sizes, in mixed order."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    return ImageSet(torch.arange(len(labels)), labels, [f"class{i}" for i in range(len(sizes))])


def drawn(images, *args, **more):
    return [part and part.images.tolist() for part in draw(images, *args, **more)]


def test_train_images_are_drawn_by_the_seed_equally_many_of_each_class_in_file_order():
    everything = numbered(*[10] * 10)
    some, _ = draw(everything, 30, seed=1)
    assert (some.labels.bincount() == 3).all()
    assert torch.equal(some.labels, everything.labels[some.images])
    (one, _), (again, _), (other, _) = (drawn(everything, 30, seed) for seed in (1, 1, 2))
    assert one == again == sorted(one) == some.images.tolist()
    assert len({*one} & {*other}) < 20
    assert drawn(everything, None, 1) == [list(range(100)), None]


def test_over_many_seeds_every_image_is_drawn_equally_often():
    everything = numbered(5, 5)
    often = torch.zeros(10)
    for seed in range(500):
        often[draw(everything, 4, seed)[0].images] += 1
    assert (often - 200).abs().max() < 45  # 4 standard deviations of 11


@pytest.mark.parametrize("sizes", [[10] * 10, [100, 40, 9, 2, 1]])
def test_of_one_seed_fewer_images_are_some_of_more(sizes):
    everything, last = numbered(*sizes), set()
    for count in range(len(sizes), sum(sizes) + 1, 10 if sizes[0] == 10 else 1):
        (some, _), last = drawn(everything, count, 3), set() if count == len(sizes) else last
        assert len(some) == count
        assert last <= {*some}
        last = {*some}


@pytest.mark.parametrize(
    ("count", "expected"), [(5, [1] * 5), (15, [9, 3, 1, 1, 1]), (76, [50, 20, 4, 1, 1]), (152, [100, 40, 9, 2, 1])]
)
def test_uneven_classes_keep_their_shares_and_none_is_left_out(count, expected):
    assert draw(numbered(100, 40, 9, 2, 1), count, 0)[0].labels.bincount().tolist() == expected


@pytest.mark.parametrize(("count", "way_out"), [(25, 20), (1010, 100), (5, 10), (0, 10), (-10, 10)])
def test_train_images_that_do_not_fit_are_an_error_with_a_way_out(count, way_out):
    with pytest.raises(UserError, match=f"--train_images {count} .* 10 classes; try {way_out}"):
        draw(numbered(*[10] * 10), count, 0)
    assert len(draw(numbered(*[10] * 10), way_out, 0)[0].images) == way_out


@pytest.mark.parametrize(("count", "way_out"), [(2, 3), (17, 16)])
def test_of_uneven_classes_only_too_few_or_too_many_are_an_error(count, way_out):
    with pytest.raises(UserError, match=f"--train_images {count} is not 3 to 16 images; try {way_out}"):
        draw(numbered(10, 5, 1), count, 0)


def test_many_images_of_many_classes_need_no_table_of_images_times_classes():
    labels = torch.arange(10**6) % 999_998  # such a table would have 8 TB
    everything = ImageSet(torch.arange(10**6), labels, range(999_998))
    assert len(draw(everything, 999_998, 0)[0].labels.unique()) == 999_998


def test_a_sample_has_no_image_twice_and_follows_from_the_generator():
    everything = ImageSet(torch.arange(100), torch.arange(100), [])
    first, again, other, too_many = (
        sample(everything, count, torch.Generator().manual_seed(seed))
        for count, seed in ((30, 0), (30, 0), (30, 1), (101, 0))
    )
    assert len(first.images.unique()) == 30
    assert torch.equal(first.images, first.labels)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(too_many.images.sort().values, everything.images)


def test_unlabelled_images_are_drawn_from_all_over_the_set():
    images = torch.arange(100)
    everything = ImageSet(images, torch.zeros_like(images), [])
    (few, _), (more, _) = (drawn(everything, count, 0) for count in (30, 60))
    assert (len(few), len(more)) == (30, 60)
    assert set(few) < set(more)
    assert max(few) > 60
    with pytest.raises(UserError, match=r"--train_images 101 is not 1 to 100 images; try 100"):
        draw(everything, 101, 0)


@pytest.mark.parametrize(("sizes", "held"), [([10] * 10, [3] * 10), ([100, 40, 9, 2], [19, 8, 2, 1])])
def test_held_out_images_are_of_all_classes_and_the_others_are_drawn_as_without_them(sizes, held):
    everything = numbered(*sizes)
    train, val = draw(everything, None, 1, sum(held))
    assert val.labels.bincount().tolist() == held
    assert torch.cat([train.images, val.images]).sort().values.tolist() == list(range(sum(sizes)))
    assert drawn(everything, 60, 1, sum(held)) == [drawn(everything, 60, 1)[0], val.images.tolist()]
    assert drawn(everything, None, 2, sum(held))[1] != val.images.tolist()


def test_some_of_each_class_is_left_to_train_on():
    train, _ = draw(numbered(9, 2, 2), None, 0, 10)
    assert train.labels.bincount().tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="--val_images 11 is not 3 to 10 images; try 10"):
        draw(numbered(9, 2, 2), None, 0, 11)


@pytest.mark.parametrize(
    ("count", "train_images", "message"),
    [
        (25, None, "--val_images 25 .* try 20"),
        (5, None, "--val_images 5 .* try 10"),
        (100, None, "--val_images 100 .* try 90"),
        (30, 80, "--val_images 30, --train_images 80 .* try 70"),
        (30, 45, "--val_images 30, --train_images 45 .* try 40"),
    ],
)
def test_held_out_images_that_do_not_fit_are_an_error_with_a_way_out(count, train_images, message):
    with pytest.raises(UserError, match=message):
        draw(shapes(100, 8, seed=0), train_images, 0, count)


@pytest.mark.parametrize("sizes", [[1] * 10, [5, 1]])
def test_nothing_can_be_held_out_of_one_image_a_class(sizes):
    with pytest.raises(UserError, match=r"--val_images 10 .* leave it out"):
        draw(numbered(*sizes), None, 0, 10)


def test_held_out_images_are_a_tenth_at_most_1000_and_spread_over_all():
    images = torch.arange(20_000)
    everything = ImageSet(images, torch.zeros_like(images), [])
    for count, expected in (2, 1), (10, 1), (11, 2), (5000, 500), (20_000, 1000):
        train, test = split_off_test(everything.where(images < count))
        assert len(test.images) == expected
        assert torch.equal(torch.cat([train.images, test.images]).sort().values, images[:count])
    assert 9000 < test.images.double().mean() < 11_000
    with pytest.raises(UserError, match="1 image; 2 or more"):
        split_off_test(everything.where(images < 1))


# --- sets by name ---


def test_a_folder_or_file_goes_by_its_own_name_and_all_else_by_the_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_name("folder", "data/pets/") == data_name("npz", "other/pets.npz") == "pets"
    assert data_name("folder", ".") == tmp_path.name
    assert data_name("cifar10", "data/pets") == "cifar10"


def test_an_unknown_data_set_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=f"'mnist'.*{', '.join(load.DATASETS)}"):
        load_dataset("mnist", "data", 16)


def test_a_data_set_is_added_by_one_line(monkeypatch):
    sets = shapes(100, 16, seed=5), shapes(50, 16, seed=6)
    monkeypatch.setitem(load.DATASETS, "mine", lambda data_dir, img_size, labelled: sets)
    train, test = load_dataset("mine", "data", 16)
    assert torch.equal(train.images, sets[0].images)
    assert torch.equal(test.images, sets[1].images)


def write_cifar10(root, monkeypatch):
    """Six images in the official archive's format, with torchvision's checksums to match."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    pixels = np.arange(3 * 3072, dtype=np.uint32).reshape(3, 3072).astype(np.uint8)
    train, test = {"data": pixels, "labels": [0, 1, 1]}, {"data": 255 - pixels, "labels": [1, 0, 0]}
    batches = [write("data_batch_1", train), write("test_batch", test)]
    names = write("batches.meta", {"label_names": ["plane", "car"]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches[:1])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", batches[1:])
    meta = {"filename": names[0], "md5": names[1], "key": "label_names"}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return pixels


def test_cifar10_is_read_as_torchvision_stores_it(tmp_path, monkeypatch):
    pixels = write_cifar10(tmp_path, monkeypatch)
    train, test = load_dataset("cifar10", str(tmp_path), 32)
    pixels = torch.from_numpy(pixels).view(3, 3, 32, 32)
    assert torch.equal(train.images, pixels)
    assert torch.equal(test.images, 255 - pixels)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 1], [1, 0, 0])
    assert train.classes == ["plane", "car"]
    assert load_dataset("cifar10", str(tmp_path), 16)[0].images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("damaged", [False, True])
def test_cifar10_without_files_and_network_says_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch, damaged):
    if damaged:
        write_cifar10(tmp_path, monkeypatch)
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut short")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="cannot be downloaded") as error:
        load_dataset("cifar10", str(tmp_path), 32)
    for part in (str(tmp_path / "cifar-10-batches-py"), "http://127.0.0.1:9", "--data_dir", "--dataset shapes"):
        assert part in str(error.value)
    assert socket.getdefaulttimeout() is None  # as before


def test_a_directory_that_cannot_be_written_is_named_where_files_are_missing(tmp_path, monkeypatch):
    def read_only(directory):
        raise PermissionError(13, "Permission denied", str(directory / ".lock"))

    monkeypatch.setattr(load, "locked", read_only)
    with pytest.raises(UserError, match=f"cifar-10-batches-py is missing.*Permission denied: '{tmp_path}"):
        load_dataset("cifar10", str(tmp_path), 32)


def test_cifar10_that_is_there_is_read_without_waiting_for_the_lock(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: pytest.fail("waited"))
    assert len(load_dataset("cifar10", str(tmp_path), 16)[0].images) == 3


def write_fashion_mnist(root, monkeypatch):
    """Three images a part of 28 x 28 in the files that torchvision unpacks; the test images are the inverse."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 784, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)
    for part, shown in (("train", pixels), ("t10k", 255 - pixels)):
        sizes = np.array([3, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + sizes + shown.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 9, 0, 1]))
    return torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1)


def write_stl10(root, monkeypatch):
    """Three images a part, column by column as in the official archive, with torchvision's checksums to match."""
    base = root / "stl10_binary"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    contents = {"train_X.bin": pixels, "test_X.bin": 255 - pixels, "unlabeled_X.bin": pixels // 2}
    contents = {name: content.transpose(0, 1, 3, 2).tobytes() for name, content in contents.items()}
    contents |= {"train_y.bin": bytes([10, 1, 2]), "test_y.bin": bytes([10, 1, 2])}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    for name, content in contents.items():
        (base / name).write_bytes(content)
    (base / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    for part in ("train_list", "test_list"):
        files = [[name, sums[name]] for name, _ in getattr(datasets.STL10, part)]
        monkeypatch.setattr(datasets.STL10, part, files)
    return torch.from_numpy(pixels)


def write_svhn(root, monkeypatch):
    """Three images a part as MATLAB files, with torchvision's checksums to match."""
    savemat = pytest.importorskip("scipy.io").savemat
    pixels = np.arange(3 * 3072, dtype=np.uint32).reshape(3, 3, 32, 32).astype(np.uint8)
    files = {}
    for part, shown in (("train", pixels), ("test", 255 - pixels)):
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": shown.transpose(2, 3, 1, 0), "y": np.array([[9], [10], [1]], np.uint8)})
        files[part] = ["http://127.0.0.1:9", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", files)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize(
    ("write", "classes"),
    [(write_fashion_mnist, ["T-shirt/top", "Trouser"]), (write_stl10, ["class0", "class1"]), (write_svhn, ["0", "1"])],
)
def test_other_sets_are_read_as_torchvision_stores_them(tmp_path, monkeypatch, write, classes):
    pixels, name = write(tmp_path, monkeypatch), write.__name__.removeprefix("write_")
    parts = load_dataset(name, str(tmp_path), pixels.shape[-1])
    for part, expected in zip(parts, (pixels, 255 - pixels), strict=True):
        assert torch.equal(part.images, expected)
        assert part.labels.tolist() == [9, 0, 1]
        assert (part.classes[:2], len(part.classes)) == (classes, 10)
    assert load_dataset(name, str(tmp_path), 16)[0].images.shape == (3, 3, 16, 16)


def test_pretraining_on_stl10_takes_its_unlabelled_images(tmp_path, monkeypatch):
    pixels = write_stl10(tmp_path, monkeypatch)
    train, test = load_dataset("stl10", str(tmp_path), 96, labelled=False)
    assert torch.equal(train.images, pixels // 2)
    assert (train.labels.tolist(), train.classes) == ([0, 0, 0], [])
    assert torch.equal(test.images, 255 - pixels)
    assert len(test.classes) == 10


@pytest.mark.parametrize("name", ["fashion_mnist", "stl10", "svhn"])
def test_without_files_and_network_each_set_says_what_to_put_where(tmp_path, monkeypatch, name):
    nowhere = "http://127.0.0.1:9/"
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setattr(datasets.STL10, "url", nowhere)
    splits = {part: [nowhere, file, md5] for part, (_, file, md5) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    with pytest.raises(UserError, match="cannot be downloaded") as error:
        load_dataset(name, str(tmp_path), 32)
    needed = {
        "fashion_mnist": "FashionMNIST/raw/*.gz (only)",
        "stl10": "stl10_binary.tar.gz",
        "svhn": "test_32x32.mat",
    }
    assert f"{needed[name]} into {tmp_path}" in str(error.value)


def test_svhn_without_scipy_is_refused_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="scipy"):
        load_dataset("svhn", str(tmp_path), 32)
