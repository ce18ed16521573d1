import functools

import numpy as np
import pytest
import torch

from engine.errors import UserError
from images.load import load_dataset


def write_npz(path, **changes):
    """A file like MedMNIST's, 6 + 4 grey images of 28 x 28; changes: arrays that differ, None: missing."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    arrays = {"train_images": pixels[:6], "test_images": pixels[6:], "val_images": pixels[:2]}
    arrays |= {"train_labels": np.array([[3], [0], [1]] * 2, np.uint8), "test_labels": np.array([[0], [1], [3], [3]])}
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return str(path)


def test_npz_is_read_as_medmnist_stores_it(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    train, test = load_dataset("npz", path, 28)
    with np.load(path) as stored:
        assert torch.equal(train.images, torch.from_numpy(stored["train_images"])[:, None].expand(-1, 3, -1, -1))
    assert train.classes == test.classes == ["0", "1", "3"]
    assert (train.labels.tolist(), test.labels.tolist()) == ([2, 0, 1] * 2, [0, 1, 2, 2])
    _, test = load_dataset("npz", write_npz(tmp_path / "few.npz", test_labels=np.array([3, 0, 3, 3])), 28)
    assert test.labels.tolist() == [2, 0, 2, 2]
    colour = np.zeros((6, 40, 30, 3), np.uint8) + np.array([10, 20, 30], np.uint8)
    train, _ = load_dataset("npz", write_npz(tmp_path / "b.npz", train_images=colour), 16)
    assert train.images[:, :, 5, 5].tolist() == [[10, 20, 30]] * 6


def test_an_npz_may_have_up_to_16_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 16), dtype=np.uint8)
    path = write_npz(tmp_path / "a.npz", train_images=pixels[:6], test_images=pixels[6:])
    train, _ = load_dataset("npz", path, 28, in_chans=16)
    assert torch.equal(train.images, torch.from_numpy(pixels[:6]).permute(0, 3, 1, 2))
    with pytest.raises(UserError, match="16 channels, and the model takes 3: --in_chans 16"):
        load_dataset("npz", path, 28)
    for shape in ((10, 28, 28), (10, 28, 28, 1)):
        grey = write_npz(tmp_path / "b.npz", train_images=pixels[..., 0].reshape(shape), train_labels=None)
        train, test = load_dataset("npz", grey, 28, labelled=False, in_chans=1)
        assert (train.images.shape, test.images.shape) == ((10, 1, 28, 28), (4, 1, 28, 28))


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
    load = functools.partial(load_dataset, "npz", write_npz(tmp_path / "a.npz", **changes), 28)
    train, test = load(labelled=False)
    assert (len(train.images), len(test.images)) == counts
    assert train.classes == test.classes == classes
    if changes:
        with pytest.raises(UserError, match="it serves pretraining only"):
            load()


@pytest.mark.parametrize(
    ("size", "said"), [((28, 28), "."), ((224, 224), "."), ((60, 80), ", 6 of them centre-cropped.")]
)
def test_an_npz_of_another_size_says_what_is_done_to_it(tmp_path, capsys, size, said):
    images = np.random.default_rng(0).integers(0, 256, (6, *size, 1), dtype=np.uint8)
    load_dataset("npz", write_npz(tmp_path / "a.npz", train_images=images), 32)
    out = capsys.readouterr().out
    assert f"a.npz, training images: Resized 6 of 6 images to 32 x 32{said}" in out
    assert "a.npz, test images: Resized 4 of 4 images to 32 x 32." in out


def test_256_classes_are_classes(tmp_path):
    labels, images = (
        np.arange(256, dtype=np.uint8),
        np.arange(256, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2),
    )
    changes = {"train_images": images, "test_images": images, "train_labels": labels, "test_labels": labels}
    train, _ = load_dataset("npz", write_npz(tmp_path / "a.npz", **changes), 8)
    assert train.labels.tolist() == list(range(256))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, r"must be uint8.*a\.npz.*train_labels uint8 \(6, 1\)"),
        ({"train_images": np.zeros((6, 28, 28))}, r"train_images float64 \(6, 28, 28\)"),
        ({"test_images": np.zeros((4, 28, 28, 28), np.uint8)}, r"test_images uint8 \(4, 28, 28, 28\)"),
        ({"train_images": np.zeros((0, 28, 28), np.uint8)}, r"train_images uint8 \(0, 28, 28\)"),
        ({"train_images": np.array([{}])}, "Cannot read .*a.npz: Object arrays"),
        ({"test_labels": np.array([0, 1, 2, 7])}, r"a\.npz.*test_labels.* 2, 7"),
        ({"test_labels": np.array([0, 1, 3])}, r"one whole number for each image; .* test_labels int64 \(3,\)"),
    ],
)
def test_npz_with_other_arrays_is_refused_with_what_it_holds(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_dataset("npz", write_npz(tmp_path / "a.npz", **changes), 28)


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"Cannot read .*a\.npz.*--data_dir.*\.npz"):
        load_dataset("npz", str(tmp_path / "a.npz"), 28)
