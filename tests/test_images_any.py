"""Pictures, trees, names and labels of any kind: each is read right, or refused with what to do.

Covered: grey values of 8 to 32 bits and fractions; alpha in every mode that has it; large and foreign files; trees with
subfolders, links to files and folders, hard links, copies, empty and unreadable folders; names of any bytes and Unicode
forms; labels of any type and shape, and those that mean "no label".
"""

import contextlib
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.errors import UserError
from images import load
from images.load import data_name, draw, load_dataset
from images.pixels import ImageSet, read_image

quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def new_root(tmp_path):
    """A function that gives an empty directory at each call."""
    counter = iter(range(10**6))

    def make():
        root = tmp_path / str(next(counter))
        root.mkdir()
        return root

    return make


def noise(seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path)
    return path


def pets(root, classes=("cat", "dog"), count=3):
    """train/ and test/ of `count` different images a class."""
    for i, part in enumerate(("train", "test")):
        for k, name in enumerate(classes):
            for j in range(count):
                save(root / part / name / f"{j}.png", 100 * i + 10 * k + j)
    return root


# --- pixels ---

TOPS = st.sampled_from([1, 7, 255, 300, 1023, 4095, 4096, 16383, 20000, 65535]) | st.integers(1, 65535)


@quickly
@given(
    TOPS,
    st.floats(0, 0.9),
    st.sampled_from(["uint16 png", "uint16 tif", "int32 tif", "float32 tif"]),
    st.integers(0, 9),
)
def test_values_of_any_depth_are_spread_from_black_to_white_over_the_whole_set(new_root, high, start, kind, seed):
    root, (dtype, ending) = new_root(), kind.split()
    low, sign = int(start * high), -1 if dtype != "uint16" and seed % 2 else 1
    values = np.random.default_rng(seed).integers(low, high + 1, (4, 8, 8)).astype(dtype) * sign
    values[0, 0, :2] = low * sign, high * sign  # in one image only
    for i, (part, name) in enumerate((part, name) for part in ("train", "test") for name in ("a", "b")):
        path = root / part / name / f"0.{ending}"
        path.parent.mkdir(parents=True)
        Image.fromarray(values[i]).save(path)
    train, test = load_dataset("folder", str(root), 8)
    span = values.astype(float) - min(low * sign, high * sign)
    expected = torch.from_numpy((span * 255 // (high - low)).astype(np.uint8))
    assert torch.equal(torch.cat([train.images, test.images]), expected[:, None].expand(-1, 3, -1, -1))


def test_what_was_done_to_values_of_many_bits_is_said_and_only_to_them(tmp_path, capsys):
    root = pets(tmp_path)
    before, _ = load_dataset("folder", str(root), 8)
    assert "bits" not in capsys.readouterr().out
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 65).save(root / "train" / "cat" / "3.png")
    for _ in range(2):
        after, _ = load_dataset("folder", str(root), 8)
        assert "1 of 7 images have 16 bits or more: the values that the set uses, 0 to 4095," in capsys.readouterr().out
    assert torch.equal(after.images[:3], before.images[:3])


@quickly
@given(
    st.sampled_from(["RGBA", "LA", "PA", "P", "L", "RGB", "1"]), st.integers(0, 255), st.integers(0, 255), st.booleans()
)
def test_transparency_shows_white_in_every_mode(new_root, mode, colour, alpha, webp):
    path = new_root() / f"0.{'webp' if webp and mode == 'RGBA' else 'png'}"
    options = {"lossless": True, "exact": True} if path.suffix == ".webp" else {}
    image = Image.new("L", (8, 8), colour)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(alpha)
    elif mode == "1":
        colour, alpha, image = 255 * (colour > 127), 255, Image.new("1", (8, 8), colour > 127)
    elif mode in ("P", "PA"):
        image = image.convert("RGB").quantize(2)
        options, alpha = {"transparency": bytes([alpha]) * 2}, alpha
    else:
        image = image.convert(mode)
        options, alpha = (
            {"transparency": colour if mode == "L" else (colour,) * 3} if alpha < 128 else {},
            255 * (alpha > 127),
        )
    image.save(path, **options)
    expected = colour * alpha / 255 + 255 - alpha
    assert (read_image(path, 8).int() - expected).abs().max() <= 1


def test_images_of_one_colour_are_counted_and_said(new_root, capsys):
    root = pets(new_root())
    load_dataset("folder", str(root), 8)
    assert "one colour" not in capsys.readouterr().out
    for path in root.glob("train/cat/*"):
        Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(path)  # white on nothing
    load_dataset("folder", str(root), 8)
    assert "training images: 3 of 6 images are of one colour, or nearly." in capsys.readouterr().out
    dark = {
        f"{part}_images": np.random.default_rng(0).integers(0, 2, (6, 8, 8)).astype(np.uint8)
        for part in ("train", "test")
    }
    np.savez(root / "dark.npz", **dark, train_labels=np.arange(6) % 2, test_labels=np.arange(6) % 2)  # 0 and 1
    load_dataset("npz", str(root / "dark.npz"), 8)
    assert "6 of 6 images are of one colour" in capsys.readouterr().out


def with_text(size):
    def write(path):
        Image.new("RGB", (8, 8), "red").save(path)
        whole, text = path.read_bytes(), b"k\0\0" + zlib.compress(b"a" * size)
        chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
        path.write_bytes(whole[:33] + chunk + whole[33:])

    return write


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("text.png", with_text(3_000_000)),
        ("profile.png", lambda path: Image.new("RGB", (8, 8), "red").save(path, icc_profile=bytes(3_000_000))),
        ("large.jpg", lambda path: Image.new("RGB", (15000, 12000), "red").save(path, quality=1)),
        ("square.png", lambda path: Image.new("1", (14000, 14000), 1).save(path)),
        ("face.pgm", lambda path: Image.new("L", (8, 8), 200).save(path)),
        ("form.lab.tif", lambda path: Image.new("LAB", (8, 8), (200, 128, 128)).save(path)),
        ("square.jfif", lambda path: Image.new("L", (8, 8), 200).save(path, "JPEG")),
    ],
)
@pytest.mark.slow
def test_whole_images_are_read(tmp_path, name, write):
    write(tmp_path / name)
    assert read_image(tmp_path / name, 8).float().mean() > 80


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "HEIC.*pip install pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(200), "HEIC.*pip install pillow-heif"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), "JPEG XL; convert"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "web page.*download the image again"),
        (b"\n <svg/>", "SVG.*convert it to PNG"),
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "Repair"),
        (b"not a picture", "Repair"),
    ],
)
def test_what_is_not_read_is_called_by_its_kind_with_the_way_in(tmp_path, content, said):
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"0\.png as an image: .*{said}"):
        read_image(tmp_path / "0.png", 8)


def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", forbidden)
    with pytest.raises(UserError, match=r"0\.png may not be read: permission denied.*chmod") as error:
        read_image(save(tmp_path / "0.png"), 8)
    assert "delete" not in str(error.value)


@quickly
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"P5 8 8 65535\n", b"II*\0", b"RIFF"]),
)
def test_any_bytes_are_an_image_or_a_message(new_root, content, start):
    path = new_root() / "0.png"
    path.write_bytes(start + content)
    with contextlib.suppress(UserError):
        assert read_image(path, 8).shape == (3, 8, 8)


# --- trees ---

PLACES = st.sampled_from(
    [f"{part}/{name}{below}" for part in ("train", "test") for name in "ab" for below in ("", "/x", "/x/y", "/z")]
)
WAYS = st.sampled_from(
    ["file", "file", "file", "copy", "link", "hard link", "link to folder", "link up", "empty folder"]
)


@quickly
@given(st.lists(st.tuples(WAYS, PLACES, PLACES), min_size=1, max_size=12))
@example([("link to folder", "train/b/x", "train/a"), ("link up", "train/a/x", "train/a")])
@example([("link to folder", "test/c", "train/a")])
def test_in_any_tree_each_file_counts_once_and_is_never_trained_and_tested_on(new_root, steps):
    root, seed = new_root(), 0
    for place in ("train/a", "train/b", "test/a", "test/b"):
        save(root / place / "first.png", seed := seed + 1)
    for way, place, other in steps:
        path, source, seed = root / place / f"{seed}.png", root / other / "first.png", seed + 1
        path.parent.mkdir(parents=True, exist_ok=True)
        if way == "file":
            save(path, seed)
        elif way == "empty folder":
            path.with_suffix("").mkdir()
        elif way in ("link to folder", "link up"):
            path.with_suffix("").symlink_to(root / other if way == "link to folder" else path.parent.parent)
        elif way == "copy" and source.exists():
            path.write_bytes(source.read_bytes())
        elif source.exists():
            path.symlink_to(source) if way == "link" else os.link(source, path)
    files = {part: {} for part in ("train", "test")}  # {what a file is by: classes}
    for part in files:
        seen = set()
        for folder, folders, names in os.walk(root / part, followlinks=True):
            top, inside = os.path.relpath(folder, root / part).split(os.sep)[0], Path(folder).resolve()
            around = inside, *inside.parents  # a link to one of them would go in a circle
            again = (top, inside) in seen or seen.add((top, inside))
            folders[:] = [name for name in folders if not again and Path(folder, name).resolve() not in around]
            for path in (Path(folder, name) for name in names if name.endswith(".png")):
                files[part].setdefault(path.stat().st_ino, set()).add(top)
    both_parts = files["train"].keys() & files["test"].keys()
    two_classes = any(len(classes) > 1 for part in files.values() for classes in part.values())
    for labelled in (True, False):
        if both_parts or (labelled and two_classes):
            with pytest.raises(UserError, match=r"one file|only one has|without images"):
                load_dataset("folder", str(root), 8, labelled=labelled)
            continue
        train, test = load_dataset("folder", str(root), 8, labelled=labelled)
        assert (len(train.images), len(test.images)) == (len(files["train"]), len(files["test"]))
        assert train.classes == test.classes
        assert train.classes == ["a", "b"] or two_classes


def test_images_below_a_class_folder_are_its_images_in_one_cache(tmp_path, capsys):
    root = pets(tmp_path)
    for i, place in enumerate(("train/cat/outdoor/day", "train/cat/outdoor", "test/dog/indoor")):
        save(root / place / "0.png", 1000 + i)
    caches = set()
    for labelled in (False, True, False):
        train, test = load_dataset("folder", str(root), 8, labelled=labelled)
        assert (train.labels.tolist(), test.labels.tolist()) == ([0] * 5 + [1] * 3, [0] * 3 + [1] * 4)
        caches |= set(root.glob(".cache*"))
    assert len(caches) == 1
    assert capsys.readouterr().out == ""


def test_damaged_files_of_both_parts_are_named_at_once(tmp_path):
    root = pets(tmp_path)
    places = "train/cat/0.png", "train/dog/deep/7.png", "test/cat/1.png"
    for place in places:
        save(root / place).write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        load_dataset("folder", str(root), 8)
    assert all(place in str(error.value) for place in places)


@pytest.mark.parametrize("content", [None, "notes.txt", "a.xcf"])
def test_a_class_without_images_is_refused_but_not_for_pretraining(tmp_path, capsys, content):
    root = pets(tmp_path)
    for part in ("train", "test"):
        (root / part / "owl").mkdir()
        if content:
            (root / part / "owl" / content).write_bytes(b"")
    with pytest.raises(UserError, match=f"{root}/train has a class without images.*'owl'"):
        load_dataset("folder", str(root), 8)
    train, _ = load_dataset("folder", str(root), 8, labelled=False)
    assert train.classes == ["cat", "dog"]
    assert "1 x folder without images (first: 'owl')" in capsys.readouterr().out


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_that_may_not_be_read_is_an_error_with_its_name(tmp_path, monkeypatch, labelled):
    root, scandir = pets(tmp_path, ("cat", "dog", "owl")), os.scandir

    def forbidding(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(UserError, match=r"Permission denied.*train/dog"):
        load_dataset("folder", str(root), 8, labelled=labelled)


def test_one_class_is_refused_but_not_for_pretraining(tmp_path):
    root = pets(tmp_path, ("images",))
    with pytest.raises(UserError, match="1 class, nothing to tell apart"):
        load_dataset("folder", str(root), 8)
    assert len(load_dataset("folder", str(root), 8, labelled=False)[0].images) == 3


@pytest.mark.parametrize("place", ["Train", "data/training"])
def test_a_test_set_below_is_not_pretrained_on_however_it_is_spelled(tmp_path, place):
    save(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "root" / place).parent.mkdir(parents=True)
    (tmp_path / "root" / place).symlink_to(tmp_path / "elsewhere")
    save((tmp_path / "root" / place).parent / "Val" / "a" / "0.png", 1)
    with pytest.raises(UserError, match="holds a data set"):
        load_dataset("folder", str(tmp_path / "root"), 8, labelled=False)


def test_copies_of_training_images_among_those_to_test_on_are_counted_and_said(tmp_path, capsys):
    root = pets(tmp_path)
    load_dataset("folder", str(root), 8)
    assert capsys.readouterr().out == ""
    (root / "test" / "cat" / "copy.png").write_bytes((root / "train" / "dog" / "0.png").read_bytes())
    train, _ = load_dataset("folder", str(root), 8)
    assert f"{root}: 1 of 7 test images are training images, too, pixel for pixel." in capsys.readouterr().out
    double = ImageSet(train.images[[0, 0, 3, 4]], torch.tensor([0, 0, 1, 1]), ["cat", "dog"])
    draw(double, None, 0, 2)
    assert "1 of 2 held-out images are training images, too" in capsys.readouterr().out
    (root / "train" / "dog" / "copy.png").write_bytes((root / "train" / "dog" / "0.png").read_bytes())
    load_dataset("folder", str(root), 8)
    assert f"{root}: 1 of 7 training images are copies of others" in capsys.readouterr().out


# --- names ---

ANY_BYTES = st.binary(min_size=1, max_size=60) | st.text(max_size=15).map(lambda text: text.encode(errors="ignore"))
NAMES = ANY_BYTES.map(lambda name: name.translate(bytes.maketrans(b"/\0", b"--")).lstrip(b".") or b"-").map(os.fsdecode)


@quickly
@given(st.lists(NAMES, min_size=2, max_size=4), NAMES)
@example([os.fsdecode("皮肤镜".encode("gbk")), "皮肤镜"], os.fsdecode("café".encode("latin-1")))
@example(["two\nlines", "\x1b[31mred"], os.fsdecode(b"\xff\xfe"))
def test_names_of_any_bytes_are_read_and_can_be_printed(new_root, names, top):
    root, readable = new_root() / top, {unicodedata.normalize("NFC", name) for name in names}
    for name in names:
        for i, part in enumerate(("train", "test")):
            save(root / part / name / f"{top}.png", i)
    assume(len(readable) > 1 and not any(load.NO_LABEL.fullmatch(name) for name in readable))
    train, _ = load_dataset("folder", str(root), 8)
    assert len(train.classes) == len(readable)
    for name in (*train.classes, data_name("folder", str(root))):
        assert name.encode()
        assert len(name.splitlines()) == 1
        assert "\x1b" not in name


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for part, name in (("train", composed), ("test", decomposed)):
        save(tmp_path / part / name / "0.png", len(part))
        save(tmp_path / part / "thé" / "0.png", 2 + len(part))
    train, test = load_dataset("folder", str(tmp_path), 8)
    assert train.classes == test.classes == ["café", "thé"]
    assert train.labels.tolist() == test.labels.tolist() == [0, 1]
    assert data_name("folder", f"data/{composed}") == data_name("folder", f"data/{decomposed}")


# --- labels ---

TYPES = st.sampled_from(["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8", "?", "U3", "S3", "c8"])
SHAPES = st.sampled_from([(6,), (6, 1), (1, 6), (6, 2), (5,), (), (6, 1, 1)])


@quickly
@given(TYPES, SHAPES, st.lists(st.integers(-2, 3) | st.just(255), min_size=6, max_size=6))
@example("u1", (6,), [0, 1, 255, 0, 1, 255])
@example("i8", (6, 1), [-1, 1, 2, 2, 1, -1])
def test_labels_of_any_type_are_whole_numbers_that_mean_a_class_or_refused(new_root, dtype, shape, values):
    with np.errstate(all="ignore"):
        labels = np.resize(np.array(values).astype(dtype), shape)
    path, images = new_root() / "a.npz", np.stack([noise(i) for i in range(12)])
    np.savez(
        path,
        train_images=images[:6],
        test_images=images[6:],
        train_labels=labels,
        test_labels=labels,
    )
    train, _ = load_dataset("npz", str(path), 8, labelled=False)
    assert len(train.images) == 6  # pretraining takes them all
    try:
        train, _ = load_dataset("npz", str(path), 8)
    except UserError:
        return
    assert labels.dtype.kind in "iu"
    assert min(labels.flat) >= 0
    assert [int(train.classes[label]) for label in train.labels] == labels.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("labels", "meant"),
    [
        (np.array([0, 1, 255, 0, 1, 255], np.uint8), "-1"),
        (np.array([0, 1, -1, 0, 1, -1]), "-1"),
        (np.array([0, 1, -100, 0, 1, 2]), "-100"),
        (np.array([[0, 1, 2**64 - 1, 0, 1, 2]], np.uint64).T, "-1"),
    ],
)
def test_a_number_that_means_no_label_is_no_class(tmp_path, labels, meant):
    images = np.stack([noise(i) for i in range(12)])
    np.savez(
        tmp_path / "a.npz", train_images=images[:6], test_images=images[6:], train_labels=labels, test_labels=labels
    )
    with pytest.raises(UserError, match=rf"a\.npz: {meant} is no class but the lack of a label"):
        load_dataset("npz", str(tmp_path / "a.npz"), 8)
    train, test = load_dataset("npz", str(tmp_path / "a.npz"), 8, labelled=False)
    assert train.classes == test.classes == []
    assert train.labels.tolist() == test.labels.tolist() == [0] * 6


@pytest.mark.parametrize("name", ["unlabeled", "Unlabelled", "nan", "-1"])
def test_a_folder_of_images_without_labels_is_no_class(tmp_path, name):
    root = pets(tmp_path, ("cat", "dog", name))
    with pytest.raises(UserError, match=f"{name} is no class but the lack of a label"):
        load_dataset("folder", str(root), 8)
    train, _ = load_dataset("folder", str(root), 8, labelled=False)
    assert (len(train.images), train.classes) == (9, [])
