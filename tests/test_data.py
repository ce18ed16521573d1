import contextlib
import errno
import functools
import hashlib
import os
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision import datasets

from engine import files
from engine.errors import UserError
from images import data


def test_shapes_are_balanced_and_follow_from_the_seed():
    first, again, other = data.shapes(40, 16, seed=3), data.shapes(40, 16, seed=3), data.shapes(40, 16, seed=4)
    assert first.images.shape == (40, 3, 16, 16)
    assert first.images.dtype == torch.uint8
    assert (first.labels.bincount() == 4).all()
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_shapes_data_set_has_5000_and_1000_images_that_differ():
    train, test = data.load_dataset("shapes", "data", 8)
    assert len(train.images) == 5000
    assert len(test.images) == 1000
    assert len(torch.cat([train.images, test.images]).flatten(1).unique(dim=0)) == 6000


def test_train_images_takes_the_first_ones_of_each_class():
    everything = data.shapes(100, 8, seed=0)
    some = data.first_of_each_class(everything, 30)
    assert (some.labels.bincount() == 3).all()
    for label in range(10):
        expected = everything.images[everything.labels == label][:3]
        assert torch.equal(some.images[some.labels == label], expected)


@pytest.mark.parametrize("count", [25, 1010, 5, 0, -10])
def test_train_images_that_do_not_fit_are_an_error_with_a_way_out(count):
    with pytest.raises(ValueError, match=f"--train_images {count} is not 10 classes times 1 to 10 images; try "):
        data.first_of_each_class(data.shapes(100, 8, seed=0), count)


def test_ranks_of_many_images_in_many_classes_need_no_table_of_images_times_classes():
    labels = torch.arange(10**6) % 999_998  # such a table would have 8 TB
    ranks = data.rank_in_class(labels)
    assert (ranks[:-2] == 1).all()
    assert ranks[-2:].tolist() == [2, 2]


@pytest.mark.parametrize("train_images", [None, 60, 70])
def test_held_out_images_are_the_last_ones_of_each_class_and_training_has_none_of_them(train_images):
    everything = data.shapes(100, 8, seed=0)
    train, val = data.hold_out(everything, 30, train_images)
    assert (val.labels.bincount() == 3).all()
    for label in range(10):
        expected = everything.images[everything.labels == label]
        assert torch.equal(train.images[train.labels == label], expected[: (train_images or 70) // 10])
        assert torch.equal(val.images[val.labels == label], expected[-3:])
    assert torch.equal(data.hold_out(everything, 30, 60)[0].images, data.first_of_each_class(everything, 60).images)


def test_all_the_rest_is_trained_on_where_classes_differ_in_size():
    everything = data.ImageSet(torch.arange(7), torch.tensor([0, 1, 0, 0, 1, 0, 0]), ["cat", "dog"])
    train, val = data.hold_out(everything, 2)
    assert train.images.tolist() == [0, 1, 2, 3, 5]
    assert val.images.tolist() == [4, 6]


@pytest.mark.parametrize(
    ("count", "train_images", "message"),
    [
        (25, None, "--val_images 25 is not 10 classes times 1 to 9 images; try 20"),
        (5, None, "--val_images 5 is not 10 classes times 1 to 9 images; try 10"),
        (100, None, "--val_images 100 is not 10 classes times 1 to 9 images; try 90"),
        (30, 80, "With --val_images 30, --train_images 80 is not 10 classes times 1 to 7 images; try 70"),
        (30, 45, "With --val_images 30, --train_images 45 is not 10 classes times 1 to 7 images; try 40"),
    ],
)
def test_held_out_images_that_do_not_fit_are_an_error_with_a_way_out(count, train_images, message):
    with pytest.raises(ValueError, match=message):
        data.hold_out(data.shapes(100, 8, seed=0), count, train_images)


def test_nothing_can_be_held_out_of_one_image_a_class():
    with pytest.raises(ValueError, match="--val_images 10 is not 10 classes times 1 to 0 images; leave it out"):
        data.hold_out(data.shapes(10, 8, seed=0), 10)


def test_normalize_spans_minus_1_to_1_and_comes_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = data.normalize(pixels)
    assert images[0] == -1
    assert images[255] == 1
    torch.testing.assert_close(images, (pixels / 255 - 0.5) / 0.5)
    assert torch.equal(data.to_pixels(images), pixels)


def test_predictions_beyond_the_range_become_black_and_white():
    assert data.to_pixels(torch.tensor([-3, -1.01, 1.01, 3])).tolist() == [0, 0, 255, 255]


def test_a_set_has_another_digest_as_soon_as_a_pixel_or_a_label_differs():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    whole = data.ImageSet(images, labels, ["cat", "dog"])
    brighter = images.clone()
    brighter[1, 2, 3, 3] = 1
    sets = whole, whole._replace(images=brighter), whole._replace(labels=labels.flip(0))
    digests = [some.digest() for some in sets]
    assert len(set(digests)) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)
    assert whole._replace(images=images.clone()).digest() == digests[0]


def test_a_set_moves_to_a_device_with_images_and_labels():
    moved = data.ImageSet(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), ["cat", "dog"]).to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.classes == ["cat", "dog"]


def test_resizing_reaches_the_size_loses_no_line_and_leaves_what_fits_alone():
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images[..., ::4] = 200  # one column in four
    assert data.resize(images, 16) is images  # no second copy of a whole data set
    assert data.resize(images, 32).shape == (2, 3, 32, 32)
    assert data.resize(images[:, :, :8], 16).shape == (2, 3, 16, 16)
    small = data.resize(images, 4)
    assert small.dtype == torch.uint8
    assert (small[..., 1:3].int() - 50).abs().max() < 10  # plain bilinear sampling would miss the lines: 0


def test_arrays_of_pixels_become_rgb_images_of_their_middle_square():
    colour = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 20, 16), dtype=np.uint8))
    middle = colour[..., 2:18, :]
    for pixels, expected in [
        (colour, middle),
        (colour.permute(0, 2, 3, 1), middle),
        (colour.mT, middle.mT),
        (colour[:, 0], middle[:, :1].expand(-1, 3, -1, -1)),
    ]:
        images = data.to_images(pixels.numpy(), 16)
        assert torch.equal(images, expected)
        assert images.is_contiguous()


# --- data sets of torchvision ---


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
    train, test = data.load_dataset("cifar10", str(tmp_path), 32)
    pixels = torch.from_numpy(pixels).view(3, 3, 32, 32)
    assert torch.equal(train.images, pixels)
    assert torch.equal(test.images, 255 - pixels)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 1], [1, 0, 0])
    assert train.classes == ["plane", "car"]
    assert data.load_dataset("cifar10", str(tmp_path), 16)[0].images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("damaged", [False, True])
def test_cifar10_without_files_and_network_says_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch, damaged):
    if damaged:
        write_cifar10(tmp_path, monkeypatch)
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut short")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(ValueError, match="cannot be downloaded") as error:
        data.load_dataset("cifar10", str(tmp_path), 32)
    for part in (str(tmp_path / "cifar-10-batches-py"), "http://127.0.0.1:9", "--data_dir", "--dataset shapes"):
        assert part in str(error.value)


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
    parts = data.load_dataset(name, str(tmp_path), pixels.shape[-1])
    for part, expected in zip(parts, (pixels, 255 - pixels), strict=True):
        assert torch.equal(part.images, expected)
        assert part.labels.tolist() == [9, 0, 1]
        assert (part.classes[:2], len(part.classes)) == (classes, 10)
    assert data.load_dataset(name, str(tmp_path), 16)[0].images.shape == (3, 3, 16, 16)


def test_pretraining_on_stl10_takes_its_unlabelled_images(tmp_path, monkeypatch):
    pixels = write_stl10(tmp_path, monkeypatch)
    train, test = data.load_dataset("stl10", str(tmp_path), 96, labelled=False)
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
        data.load_dataset(name, str(tmp_path), 32)
    needed = {
        "fashion_mnist": "FashionMNIST/raw/*.gz (only)",
        "stl10": "stl10_binary.tar.gz",
        "svhn": "test_32x32.mat",
    }
    assert f"{needed[name]} into {tmp_path}" in str(error.value)


def test_svhn_without_scipy_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="--dataset svhn needs SciPy: pip install scipy"):
        data.load_dataset("svhn", str(tmp_path), 32)


# --- folder ---


def test_folder_reads_classes_in_order_and_pixels_exactly(image_folder):
    train, test = data.load_dataset("folder", str(image_folder), 16)
    assert train.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.images[4, :, 0, 0].tolist() == [100, 40, 200]


def test_folder_is_decoded_once_and_again_when_it_changed(image_folder, monkeypatch):
    calls = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda *args: calls.append(1) or decode(*args))
    first = data.load_dataset("folder", str(image_folder), 16)
    assert len(calls) == 2
    again = data.load_dataset("folder", str(image_folder), 16)
    assert len(calls) == 2
    assert torch.equal(first[0].images, again[0].images)
    Image.new("RGB", (16, 16), "red").save(image_folder / "train" / "cat" / "0.png")
    changed, _ = data.load_dataset("folder", str(image_folder), 16)
    assert changed.images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert len(list(image_folder.glob(".cache*"))) == 1  # the stale one is gone
    assert len(calls) == 4
    os.utime(image_folder / "train" / "cat" / "0.png", (1, 1))  # another file, maybe, of the same size
    data.load_dataset("folder", str(image_folder), 16)
    assert len(calls) == 6
    monkeypatch.setattr(data, "DECODER", data.DECODER + 1)
    data.load_dataset("folder", str(image_folder), 16)
    assert len(calls) == 8


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:300] + bytes([b[300] ^ 1]) + b[301:]])
def test_a_damaged_cache_is_built_again(image_folder, damage):
    first, _ = data.load_dataset("folder", str(image_folder), 16)
    cache = next(image_folder.glob(".cache*"))
    cache.write_bytes(damage(cache.read_bytes()))
    again, _ = data.load_dataset("folder", str(image_folder), 16)
    assert torch.equal(first.images, again.images)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 80, [80, 80, 80]),
        ("1", 1, [255, 255, 255]),
        ("I;16", 80 * 257, [80, 80, 80]),
        ("I;16", 80, [0, 0, 0]),
        ("I", 80 * 257, [80, 80, 80]),
        ("I", 80, [80, 80, 80]),
        ("RGBA", (200, 100, 0, 255), [200, 100, 0]),
        ("RGBA", (200, 100, 0, 0), [0, 0, 0]),
        ("LA", (80, 255), [80, 80, 80]),
        ("P", 1, [10, 20, 30]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ],
)
def test_every_kind_of_image_becomes_rgb(image_folder, mode, colour, expected):
    image = Image.new(mode, (16, 16), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    (image_folder / "train" / "cat" / "0.png").unlink()
    image.save(image_folder / "train" / "cat" / f"0.{'tif' if mode in ('CMYK', 'I') else 'png'}")  # no PNG has these
    train, _ = data.load_dataset("folder", str(image_folder), 16)
    assert train.images[0, :, 5, 5].tolist() == expected


@pytest.mark.parametrize("ending", ["gif", "tif"])
def test_of_several_frames_the_first_is_read(tmp_path, ending):
    red, green = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "lime")
    red.save(tmp_path / f"0.{ending}", save_all=True, append_images=[green])
    assert data.read_image(tmp_path / f"0.{ending}", 16)[:, 5, 5].tolist() == [255, 0, 0]


def test_other_sizes_are_resized_and_cropped_and_said_once(image_folder, capsys):
    Image.new("RGB", (40, 40), "red").save(image_folder / "train" / "cat" / "0.png")
    load = functools.partial(data.load_dataset, "folder", str(image_folder), 16)
    assert load()[0].images[0, :, 8, 8].tolist() == [255, 0, 0]
    assert capsys.readouterr().out == f"Resized 1 of 6 images in {image_folder}/train to 16 x 16.\n"
    Image.new("RGB", (40, 20), "red").save(image_folder / "train" / "cat" / "1.png")
    load()
    said = f"Resized 2 of 6 images in {image_folder}/train to 16 x 16, 1 of them centre-cropped.\n"
    assert capsys.readouterr().out == said
    load()
    assert capsys.readouterr().out == ""


def photo(width, height):
    """Smooth noise, so that a resized pixel tells where it comes from."""
    small = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "scaled", "middle"),
    [
        ((16, 16), (16, 16), (0, 0, 16, 16)),
        ((50, 50), (16, 16), (0, 0, 16, 16)),
        ((16, 40), (16, 40), (0, 12, 16, 28)),
        ((96, 64), (24, 16), (4, 0, 20, 16)),
    ],
)
def test_the_shorter_side_is_scaled_and_the_middle_cut_out(size, scaled, middle):
    expected = photo(*size).resize(scaled, Image.Resampling.BILINEAR).crop(middle)
    pixels = data.read_image(photo(*size), 16)
    assert torch.equal(pixels, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_photo_of_a_turned_camera_is_upright(tmp_path, ending):
    upright, exif = photo(64, 96), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees clockwise to see it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"0.{ending}", exif=exif, quality=95)
    pixels = data.read_image(tmp_path / f"0.{ending}", 16).int()
    assert (pixels - data.read_image(upright, 16).int()).abs().max() < 16


def test_an_image_with_damaged_exif_is_taken_as_it_lies(tmp_path):
    photo(16, 16).save(tmp_path / "0.webp", exif=b"Exif\0\0not a TIFF header", lossless=True)
    assert torch.equal(data.read_image(tmp_path / "0.webp", 16), data.read_image(photo(16, 16), 16))


def test_a_directory_is_no_image(image_folder):
    with pytest.raises(UserError, match=f"{image_folder} is a directory; name image files"):
        data.read_image(image_folder, 16)


def test_read_image_gives_the_pixels_of_the_folder(image_folder):
    path = image_folder / "train" / "cat" / "1.jpg"
    photo(500, 375).save(path)
    train, _ = data.load_dataset("folder", str(image_folder), 16)
    assert torch.equal(data.read_image(path, 16), train.images[1])


@pytest.mark.parametrize(
    ("size", "decoded"), [((500, 375), (63, 47)), ((96, 64), (48, 32)), ((99, 63), (99, 63)), ((128, 128), (128, 128))]
)
def test_only_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path, size, decoded):
    photo(*size).save(tmp_path / "0.jpg", quality=95)
    assert data.open_image(tmp_path / "0.jpg", 16).size == decoded
    with Image.open(tmp_path / "0.jpg") as whole:
        difference = data.read_image(tmp_path / "0.jpg", 16).int() - data.read_image(whole, 16).int()
    assert difference.abs().max() <= (0 if size == decoded else 12)


def test_images_are_decoded_in_order_and_all_bad_ones_are_told_at_once(image_folder):
    paths = sorted((image_folder / "train").glob("*/*")) * 40
    pixels = data.decode(image_folder, paths, 16)
    assert pixels[:, :, 0, 0].tolist() == [[100 * k, 40 * i, 200] for k in range(2) for i in range(3)] * 40
    for k in 70, 90, 200:
        paths[k] = image_folder / f"nowhere{k}.png"
    others = ", ".join(str(image_folder / f"nowhere{k}.png") for k in (90, 200))
    with pytest.raises(UserError, match=rf"No file .*nowhere70\.png\. Nor can 2 more be read: {others}\.$"):
        data.decode(image_folder, paths, 16)
    with pytest.raises(UserError, match=r"Nor can 99 more be read: ([^,]*, ){8}[^,]* \.\.\.\.$"):
        data.decode(image_folder, [image_folder / f"{k}.jpg" for k in range(100)], 16)


def test_files_that_are_not_read_are_counted_and_said_once(image_folder, capsys):
    cat = image_folder / "train" / "cat"
    for name in ("a.HEIC", "b.heic", "notes.txt", ".DS_Store", "._0.png"):
        (cat / name).write_bytes(b"")
    (cat / "old").mkdir()
    (image_folder / "train" / ".ipynb_checkpoints").mkdir()
    (image_folder / "train" / ".ipynb_checkpoints" / "0.png").write_bytes(b"")
    train, _ = data.load_dataset("folder", str(image_folder), 16)
    assert len(train.images) == 6
    others = "2 x .heic (first: 'cat/a.HEIC'), 1 x .txt (first: 'cat/notes.txt'), 1 x subfolder (first: 'cat/old')"
    assert capsys.readouterr().out == f"Not read in {image_folder}/train: {others}.\n"
    data.load_dataset("folder", str(image_folder), 16)
    assert capsys.readouterr().out == ""
    (cat / "c.heic").write_bytes(b"")
    data.load_dataset("folder", str(image_folder), 16)
    assert "3 x .heic" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes UTF-8 only")
def test_names_need_not_be_utf8(image_folder):
    os.rename(
        os.fsencode(image_folder / "train" / "cat" / "0.png"), os.fsencode(image_folder / "train/cat") + b"/\xe9.png"
    )
    train, _ = data.load_dataset("folder", str(image_folder), 16)
    assert train.images[2, :, 0, 0].tolist() == [0, 0, 200]


def test_a_file_system_without_locks_is_used_without_them(image_folder, monkeypatch):
    def no_locks(file, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    train, _ = data.load_dataset("folder", str(image_folder), 16)
    assert len(train.images) == 6


@pytest.mark.parametrize("name", ["folder", "cifar10"])
def test_data_that_is_there_is_read_without_waiting_for_the_lock(image_folder, monkeypatch, name):
    write_cifar10(image_folder, monkeypatch)
    first, _ = data.load_dataset(name, str(image_folder), 16)
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: pytest.fail("waited"))
    again, _ = data.load_dataset(name, str(image_folder), 16)
    assert torch.equal(first.images, again.images)


def test_a_folder_is_not_decoded_again_by_a_process_that_waited_for_the_lock(image_folder, monkeypatch):
    @contextlib.contextmanager
    def waited(directory):
        monkeypatch.setattr(data, "one_at_a_time", contextlib.nullcontext)
        data.load_dataset("folder", str(image_folder), 16)  # by the process that had the lock
        monkeypatch.setattr(data, "decode", None)
        yield

    monkeypatch.setattr(data, "one_at_a_time", waited)
    train, _ = data.load_dataset("folder", str(image_folder), 16)
    assert len(train.images) == 6


def test_an_interrupted_cache_leaves_nothing_and_a_killed_one_goes_with_the_next(image_folder, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.load_dataset("folder", str(image_folder), 16)
    assert not list(image_folder.glob(".cache*"))
    (image_folder / ".cache-16-0123456789abcdef.1234.tmp").write_bytes(b"half, its process killed")
    data.load_dataset("folder", str(image_folder), 16)
    assert [path.suffix for path in image_folder.glob(".cache*")] == [".npz"]


def test_a_folder_that_cannot_be_written_goes_without_a_cache(image_folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left"):
        train, _ = data.load_dataset("folder", str(image_folder), 16)
    assert len(train.images) == 6
    assert not list(image_folder.glob(".cache*"))


def flat(root):
    """The images of both parts of a folder in one directory, then without parts and classes."""
    for path in sorted(root.glob("*/*/*")):
        path.rename(root / f"{path.parent.parent.name}-{path.parent.name}-{path.name}")
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "test")


def without_test(root):
    shutil.rmtree(root / "test")


def without_classes(root):
    for path in list(root.glob("*/*/*")):
        path.rename(path.parent.parent / f"{path.parent.name}{path.name}")


def deeper(root):
    for path in list(root.glob("*/*/*")):
        (path.parent / "deeper").mkdir(exist_ok=True)
        path.rename(path.parent / "deeper" / path.name)


def other_classes_in_test(root):
    (root / "test" / "cat").rename(root / "test" / "unknown")


def one_outside_a_class(root):
    path = next(root.glob("train/cat/*"))
    path.rename(root / "train" / path.name)


def one_class_deeper(root):
    for path in list(root.glob("train/dog/*")):
        (path.parent / "deeper").mkdir(exist_ok=True)
        path.rename(path.parent / "deeper" / path.name)


@pytest.mark.parametrize(
    ("change", "counts", "said"),
    [
        (flat, (9, 1), "1 of its 10 images"),
        (without_test, (5, 1), "1 of its 6 images"),
        *(
            (change, (6, 4), "")
            for change in (without_classes, deeper, other_classes_in_test, one_outside_a_class, one_class_deeper)
        ),
    ],
)
def test_pretraining_takes_folders_without_classes_or_without_a_test_part(image_folder, capsys, change, counts, said):
    change(image_folder)
    load = functools.partial(data.load_dataset, "folder", str(image_folder), 16)
    train, test = load(labelled=False)
    unlike = f"{image_folder}: no classes are read, as train/ and test/ do not have the same class folders.\n"
    alone = f"{image_folder} has no test set: {said}, always the same ones, are not trained on.\n"
    assert capsys.readouterr().out == (alone if said else unlike)
    assert (len(train.images), len(test.images)) == counts
    assert len(torch.cat([train.images, test.images]).flatten(1).unique(dim=0)) == 6  # no image twice, none lost
    assert train.classes == test.classes == []
    assert train.labels.tolist() == [0] * counts[0]
    assert [part.digest() for part in load(labelled=False)] == [train.digest(), test.digest()]  # from the cache
    if change in (flat, without_test, without_classes, deeper):
        with pytest.raises(UserError, match="A folder without classes or test/ serves pretraining only"):
            load()


@pytest.mark.parametrize("other", ["test", "val"])
def test_a_folder_one_level_too_high_is_refused_as_it_holds_test_images(image_folder, other):
    (image_folder / "pets").mkdir()
    (image_folder / "train").rename(image_folder / "pets" / "train")
    (image_folder / "test").rename(image_folder / "pets" / other)
    with pytest.raises(UserError, match=f"/pets holds a data set; .* give --data_dir {image_folder}/pets"):
        data.load_dataset("folder", str(image_folder), 16, labelled=False)


def test_held_out_images_are_a_tenth_at_most_1000_and_spread_over_all():
    images = torch.arange(20_000)
    everything = data.ImageSet(images, torch.zeros_like(images), [])
    for count, expected in (2, 1), (10, 1), (11, 2), (5000, 500), (20_000, 1000):
        train, test = data.split_off_test(everything.where(images < count))
        assert len(test.images) == expected
        assert torch.equal(torch.cat([train.images, test.images]).sort().values, images[:count])
    assert 9000 < test.images.double().mean() < 11_000
    with pytest.raises(UserError, match="There is 1 image; 2 or more are needed"):
        data.split_off_test(everything.where(images < 1))


def test_fewer_unlabelled_images_are_some_of_more():
    images = torch.arange(100)
    everything = data.ImageSet(images, torch.zeros_like(images), [])
    few, more = (data.first_of_each_class(everything, count).images.tolist() for count in (30, 60))
    assert (len(few), len(more)) == (30, 60)
    assert set(few) < set(more)
    assert max(few) > 60
    with pytest.raises(UserError, match="--train_images 101 is more than the 100 training images"):
        data.first_of_each_class(everything, 101)


def test_pretraining_reads_a_folder_with_classes_as_ever(image_folder):
    one, other = (data.load_dataset("folder", str(image_folder), 16, labelled=labelled) for labelled in (True, False))
    assert [part.digest() for part in one] == [part.digest() for part in other]
    assert one[0].classes == other[0].classes == ["cat", "dog"]


def damage_missing(root):
    return root / "nowhere", "train is missing"


def damage_empty(root):
    (root / "empty" / "train").mkdir(parents=True)
    return root / "empty", "holds no images"


def damage_text(root):
    (root / "test" / "dog" / "0.png").write_text("not a picture")
    return root, "0.png as an image"


def damage_cut(root):
    path = root / "test" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    return root, "0.png as an image"


def damage_header(root):
    (root / "test" / "dog" / "0.ppm").write_bytes(b"P6 2m 4 255\n" + bytes(99))  # ValueError in PIL
    return root, "0.ppm as an image"


def damage_empty_file(root):
    (root / "test" / "dog" / "0.png").write_bytes(b"")
    return root, "0.png as an image"


def damage_float(root):
    Image.fromarray(np.eye(16, dtype=np.float32)).save(root / "test" / "dog" / "0.tif")  # all black in PIL
    return root, "0.tif as an image: its pixels are not 8 or 16 bits"


def damage_32_bits(root):
    Image.fromarray(np.eye(16, dtype=np.int32) * 10**6).save(root / "test" / "dog" / "0.tif")
    return root, "0.tif as an image: its pixels are not 8 or 16 bits"


def damage_only_phone_photos(root):
    for path in (root / "test").glob("*/*"):
        path.rename(path.with_suffix(".HEIC"))
    return root, r"holds no images\. .* Not read: 4 x \.heic"


def damage_dangling_link(root):
    (root / "test" / "dog" / "0.png").unlink()
    (root / "test" / "dog" / "0.png").symlink_to(root / "moved" / "0.png")
    return root, "No such file.*dog/0.png"


def damage_link_loop(root):
    (root / "test" / "dog" / "loop.png").symlink_to(root / "test" / "dog" / "loop.png")
    return root, "symbolic links.*dog/loop"


def damage_classes(root):
    (root / "test" / "dog").rename(root / "test" / "wolf")
    return root, "dog, wolf"


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_empty,
        damage_text,
        damage_cut,
        damage_header,
        damage_empty_file,
        damage_float,
        damage_32_bits,
        damage_only_phone_photos,
        damage_dangling_link,
        damage_link_loop,
        damage_classes,
    ],
)
def test_a_bad_folder_is_named(image_folder, damage):
    root, message = damage(image_folder)
    with pytest.raises(UserError, match=message):
        data.load_dataset("folder", str(root), 16)


# --- npz ---


def write_npz(path, **changes):
    """A file like MedMNIST's, 6 + 4 grey images of 28 x 28; changes: arrays that differ, None: missing."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    arrays = {"train_images": pixels[:6], "test_images": pixels[6:], "val_images": pixels[:2]}
    arrays |= {"train_labels": np.array([[3], [0], [1]] * 2, np.uint8), "test_labels": np.array([[0], [1], [3], [3]])}
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return str(path)


def test_npz_is_read_as_medmnist_stores_it(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    train, test = data.load_dataset("npz", path, 28)
    with np.load(path) as stored:
        assert torch.equal(train.images, torch.from_numpy(stored["train_images"])[:, None].expand(-1, 3, -1, -1))
    assert train.classes == test.classes == ["0", "1", "3"]
    assert (train.labels.tolist(), test.labels.tolist()) == ([2, 0, 1] * 2, [0, 1, 2, 2])
    _, test = data.load_dataset("npz", write_npz(tmp_path / "few.npz", test_labels=np.array([3, 0, 3, 3])), 28)
    assert test.labels.tolist() == [2, 0, 2, 2]
    colour = np.zeros((6, 40, 30, 3), np.uint8) + np.array([10, 20, 30], np.uint8)
    train, _ = data.load_dataset("npz", write_npz(tmp_path / "b.npz", train_images=colour), 16, train_images=3)
    assert train.images[:, :, 5, 5].tolist() == [[10, 20, 30]] * 3


@pytest.mark.parametrize(
    ("changes", "counts", "classes"),
    [
        ({}, (6, 4), ["0", "1", "3"]),
        ({"train_labels": None}, (6, 4), []),
        ({"train_labels": np.zeros((6, 14), int)}, (6, 4), []),  # several findings for an image
        ({"test_images": None, "test_labels": None}, (5, 1), ["0", "1", "3"]),
    ],
)
def test_pretraining_takes_npz_without_labels_or_test_images(tmp_path, changes, counts, classes):
    load = functools.partial(data.load_dataset, "npz", write_npz(tmp_path / "a.npz", **changes), 28)
    train, test = load(labelled=False)
    assert (len(train.images), len(test.images)) == counts
    assert train.classes == test.classes == classes
    if changes:
        with pytest.raises(UserError, match="it serves pretraining only"):
            load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, r"must be uint8.*; .*a\.npz has train_labels uint8 \(6, 1\), test_images uint8"),
        ({"train_images": np.zeros((6, 28, 28))}, r"train_images float64 \(6, 28, 28\)"),
        ({"test_images": np.zeros((4, 28, 28, 28), np.uint8)}, r"test_images uint8 \(4, 28, 28, 28\)"),
        ({"train_images": np.zeros((0, 28, 28), np.uint8)}, r"train_images uint8 \(0, 28, 28\)"),
        ({"train_images": np.array([{}])}, "Cannot read .*a.npz: Object arrays"),
        ({"test_labels": np.array([0, 1, 2, 7])}, "test_labels has 2, 7, which train_labels has not"),
        ({"test_labels": np.array([0, 1, 3])}, r"one whole number for each image; .* test_labels int64 \(3,\)"),
    ],
)
def test_npz_with_other_arrays_is_refused_with_what_it_holds(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        data.load_dataset("npz", write_npz(tmp_path / "a.npz", **changes), 28)


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"Cannot read .*a\.npz: .* --data_dir must name an .npz file"):
        data.load_dataset("npz", str(tmp_path / "a.npz"), 28)
