import contextlib
import errno
import functools
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine import files
from engine.errors import UserError
from images import folder
from images.folder import decode
from images.load import load_dataset
from images.pixels import read_image


def test_folder_reads_classes_in_order_and_pixels_exactly(image_folder):
    train, test = load_dataset("folder", str(image_folder), 16)
    assert train.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.images[4, :, 0, 0].tolist() == [100, 40, 200]


def test_folder_is_decoded_once_and_again_when_it_changed(image_folder, monkeypatch):
    calls = []
    monkeypatch.setattr(folder, "decode", lambda *args: calls.append(1) or decode(*args))
    first = load_dataset("folder", str(image_folder), 16)
    assert len(calls) == 1
    again = load_dataset("folder", str(image_folder), 16, labelled=False)
    assert len(calls) == 1
    assert torch.equal(first[0].images, again[0].images)
    Image.new("RGB", (16, 16), "red").save(image_folder / "train" / "cat" / "0.png")
    changed, _ = load_dataset("folder", str(image_folder), 16)
    assert changed.images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert len(list(image_folder.glob(".cache*"))) == 1  # the stale one is gone
    assert len(calls) == 2
    os.utime(image_folder / "train" / "cat" / "0.png", (1, 1))  # another file, maybe, of the same size
    load_dataset("folder", str(image_folder), 16)
    assert len(calls) == 3
    monkeypatch.setattr(folder, "DECODER", folder.DECODER + 1)
    load_dataset("folder", str(image_folder), 16)
    assert len(calls) == 4


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:300] + bytes([b[300] ^ 1]) + b[301:]])
def test_a_damaged_cache_is_built_again(image_folder, damage):
    first, _ = load_dataset("folder", str(image_folder), 16)
    cache = next(image_folder.glob(".cache*"))
    cache.write_bytes(damage(cache.read_bytes()))
    again, _ = load_dataset("folder", str(image_folder), 16)
    assert torch.equal(first.images, again.images)


def test_other_sizes_are_resized_and_cropped_and_that_is_said_each_time(image_folder, capsys):
    Image.new("RGB", (40, 40), "red").save(image_folder / "train" / "cat" / "0.png")
    load = functools.partial(load_dataset, "folder", str(image_folder), 16)
    assert load()[0].images[0, :, 8, 8].tolist() == [255, 0, 0]
    said = capsys.readouterr().out
    assert f"{image_folder}, training images: Resized 1 of 6 images to 16 x 16." in said
    assert "cropped" not in said
    Image.new("RGB", (40, 20), "red").save(image_folder / "train" / "cat" / "1.png")
    for _ in range(2):  # the second time from the cache
        load()
        said = capsys.readouterr().out
        assert said.count("Resized") == said.count("Resized 2 of 6 images to 16 x 16, 1 of them centre-cropped.") == 1


def test_read_image_gives_the_pixels_of_the_folder(image_folder):
    path = image_folder / "train" / "cat" / "1.jpg"
    noise = Image.effect_noise((50, 37), 100).resize((500, 375)).convert("RGB")
    noise.save(path)
    train, _ = load_dataset("folder", str(image_folder), 16)
    assert torch.equal(read_image(path, 16), train.images[1])


def test_images_are_decoded_in_order_and_all_bad_ones_are_told_at_once(image_folder):
    paths = sorted((image_folder / "train").glob("*/*")) * 40
    pixels = decode({"train": paths[:100], "test": paths[100:]}, 16)
    pixels = np.concatenate([pixels["train"], pixels["test"]])
    assert pixels[:, :, 0, 0].tolist() == [[100 * k, 40 * i, 200] for k in range(2) for i in range(3)] * 40
    for k in 70, 90, 200:
        paths[k] = image_folder / f"nowhere{k}.png"
    others = ", ".join(str(image_folder / f"nowhere{k}.png") for k in (90, 200))
    with pytest.raises(UserError, match=rf"nowhere70\.png.* 2 more .*: {others}\.$"):
        decode({"train": paths[:100], "test": paths[100:]}, 16)
    with pytest.raises(UserError, match=r"99 more .*: ([^,]*, ){8}[^,]* \.\.\.\.$"):
        decode({"train": [image_folder / f"{k}.jpg" for k in range(100)]}, 16)


def test_files_that_are_not_read_are_counted_and_said_each_time(image_folder, capsys):
    cat = image_folder / "train" / "cat"
    for name in ("a.TGA", "b.tga", "notes.txt", ".DS_Store", "._0.png"):
        (cat / name).write_bytes(b"")
    os.mkfifo(cat / "pipe.png")
    (image_folder / "train" / ".ipynb_checkpoints").mkdir()
    (image_folder / "train" / ".ipynb_checkpoints" / "0.png").write_bytes(b"")
    Image.new("RGB", (16, 16)).save(image_folder / "train" / "loose.png")
    others = "2 x .tga (first: 'cat/a.TGA'), 1 x .txt (first: 'cat/notes.txt'), 1 x no regular file"
    for _ in range(2):
        train, _ = load_dataset("folder", str(image_folder), 16)
        assert len(train.images) == 6
        said = capsys.readouterr().out
        assert f"Not read: {others} (first: 'cat/pipe.png'), 1 x image in no class folder (first: 'loose.png')." in said


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes UTF-8 only")
def test_names_need_not_be_utf8(image_folder):
    os.rename(
        os.fsencode(image_folder / "train" / "cat" / "0.png"), os.fsencode(image_folder / "train/cat") + b"/\xe9.png"
    )
    train, _ = load_dataset("folder", str(image_folder), 16)
    assert train.images[2, :, 0, 0].tolist() == [0, 0, 200]


def test_a_file_system_without_locks_is_used_without_them(image_folder, monkeypatch):
    def no_locks(file, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    train, _ = load_dataset("folder", str(image_folder), 16)
    assert len(train.images) == 6


def test_a_folder_that_is_cached_is_read_without_waiting_for_the_lock(image_folder, monkeypatch):
    first, _ = load_dataset("folder", str(image_folder), 16)
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: pytest.fail("waited"))
    again, _ = load_dataset("folder", str(image_folder), 16)
    assert torch.equal(first.images, again.images)


def test_a_folder_is_not_decoded_again_by_a_process_that_waited_for_the_lock(image_folder, monkeypatch):
    @contextlib.contextmanager
    def waited(directory):
        monkeypatch.setattr(folder, "locked", contextlib.nullcontext)
        load_dataset("folder", str(image_folder), 16)  # by the process that had the lock
        monkeypatch.setattr(folder, "decode", None)
        yield

    monkeypatch.setattr(folder, "locked", waited)
    train, _ = load_dataset("folder", str(image_folder), 16)
    assert len(train.images) == 6


def test_an_interrupted_cache_leaves_nothing_and_a_killed_one_goes_with_the_next(image_folder, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_dataset("folder", str(image_folder), 16)
    assert not list(image_folder.glob(".cache*"))
    (image_folder / ".cache-16-0123456789abcdef.1234.tmp").write_bytes(b"half, its process killed")
    load_dataset("folder", str(image_folder), 16)
    assert [path.suffix for path in image_folder.glob(".cache*")] == [".npz"]


def test_a_folder_that_cannot_be_written_goes_without_a_cache(image_folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left"):
        train, _ = load_dataset("folder", str(image_folder), 16)
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


def other_classes_in_test(root):
    (root / "test" / "cat").rename(root / "test" / "unknown")


def one_outside_a_class(root):
    path = next(root.glob("train/cat/*"))
    path.rename(root / "train" / path.name)


def one_outside_a_class_in_each_part(root):
    one_outside_a_class(root)
    path = next(root.glob("test/cat/*"))
    path.rename(root / "test" / path.name)


@pytest.mark.parametrize(
    ("change", "counts", "said"),
    [
        (flat, (9, 1), "1 of its 10 images"),
        (without_test, (5, 1), "1 of its 6 images"),
        *(
            (change, (6, 4), "")
            for change in (
                without_classes,
                other_classes_in_test,
                one_outside_a_class,
                one_outside_a_class_in_each_part,
            )
        ),
    ],
)
def test_pretraining_takes_folders_without_classes_or_without_a_test_part(image_folder, capsys, change, counts, said):
    change(image_folder)
    load = functools.partial(load_dataset, "folder", str(image_folder), 16)
    train, test = load(labelled=False)
    out = capsys.readouterr().out
    assert (f"{image_folder} has no test set: {said}" if said else "No classes are read") in out
    assert (len(train.images), len(test.images)) == counts
    assert len(torch.cat([train.images, test.images]).flatten(1).unique(dim=0)) == 6  # no image twice, none lost
    assert train.classes == test.classes == []
    assert train.labels.tolist() == [0] * counts[0]
    assert [part.digest() for part in load(labelled=False)] == [train.digest(), test.digest()]  # from the cache
    if change in (flat, without_test, without_classes):
        with pytest.raises(UserError, match="without classes or test/ serves pretraining only"):
            load()


@pytest.mark.parametrize("change", [without_test, without_classes])
def test_of_several_processes_only_the_first_says_how_a_folder_is_read(image_folder, capsys, monkeypatch, change):
    change(image_folder)
    monkeypatch.setenv("RANK", "1")
    load_dataset("folder", str(image_folder), 16, labelled=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("other", ["test", "val"])
def test_a_folder_one_level_too_high_is_refused_as_it_holds_test_images(image_folder, other):
    (image_folder / "pets").mkdir()
    (image_folder / "train").rename(image_folder / "pets" / "train")
    (image_folder / "test").rename(image_folder / "pets" / other)
    with pytest.raises(UserError, match=f"--data_dir {image_folder}/pets"):
        load_dataset("folder", str(image_folder), 16, labelled=False)


def test_pretraining_reads_a_folder_with_classes_as_ever(image_folder):
    one, other = (load_dataset("folder", str(image_folder), 16, labelled=labelled) for labelled in (True, False))
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


def damage_no_numbers(root):
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(root / "test" / "dog" / "0.tif")
    return root, r"0\.tif.*infinite or no numbers"


def damage_only_phone_photos(root):
    for path in (root / "test").glob("*/*"):
        path.rename(path.with_suffix(".HEIC"))
    return root, r"test holds no images.*4 x \.heic"


def damage_dangling_link(root):
    (root / "test" / "dog" / "0.png").unlink()
    (root / "test" / "dog" / "0.png").symlink_to(root / "moved" / "0.png")
    return root, "No file .*dog/0.png"


def damage_link_loop(root):
    (root / "test" / "dog" / "loop.png").symlink_to(root / "test" / "dog" / "loop.png")
    return root, "symbolic links.*dog/loop"


def damage_classes(root):
    (root / "test" / "dog").rename(root / "test" / "wolf")
    return root, "only one has 'dog', 'wolf'"


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_empty,
        damage_text,
        damage_cut,
        damage_header,
        damage_empty_file,
        damage_no_numbers,
        damage_only_phone_photos,
        damage_dangling_link,
        damage_link_loop,
        damage_classes,
    ],
)
def test_a_bad_folder_is_named(image_folder, damage):
    root, message = damage(image_folder)
    with pytest.raises(UserError, match=message):
        load_dataset("folder", str(root), 16)
