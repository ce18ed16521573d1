import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from engine.errors import UserError
from images.pixels import in_channels, normalize, open_image, read_image, to_images, to_pixels


def test_normalize_spans_minus_1_to_1_and_comes_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = normalize(pixels)
    assert images[0] == -1
    assert images[255] == 1
    torch.testing.assert_close(images, (pixels / 255 - 0.5) / 0.5)
    assert torch.equal(to_pixels(images), pixels)


def test_predictions_beyond_the_range_become_black_and_white():
    assert to_pixels(torch.tensor([-3, -1.01, 1.01, 3])).tolist() == [0, 0, 255, 255]


def test_images_get_the_channels_that_the_model_takes():
    colour = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = in_channels(colour, 1, "set")
    for image, other in zip(colour, grey, strict=True):
        pil = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"), int)
        assert abs(pil - other[0].numpy()).max() <= 1  # PIL rounds the weights, too
    assert torch.equal(in_channels(grey.expand(-1, 3, -1, -1), 1, "set"), grey)
    assert torch.equal(in_channels(grey, 5, "set"), grey.expand(-1, 5, -1, -1))
    assert in_channels(colour, 3, "set") is colour
    with pytest.raises(UserError, match="set has images of 3 channels, and the model takes 4: --in_chans 3"):
        in_channels(colour, 4, "set")


def test_resizing_reaches_the_size_loses_no_line_and_leaves_what_fits_alone():
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images[..., ::4] = 200  # one column in four
    assert to_images(images, 16)[0].data_ptr() == images.data_ptr()  # no second copy of a whole data set
    assert to_images(images, 32)[0].shape == (2, 3, 32, 32)
    assert to_images(images[:, :, :8], 16)[0].shape == (2, 3, 16, 16)
    assert to_images(images[:1].expand(1001, -1, -1, -1), 4)[0].shape == (1001, 3, 4, 4)
    small, _ = to_images(images, 4)
    assert small.dtype == torch.uint8
    assert (small[..., 1:3].int() - 50).abs().max() < 10  # plain bilinear sampling would miss the lines: 0


def test_arrays_of_pixels_become_images_of_their_middle_square():
    colour = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 20, 16), dtype=np.uint8))
    middle = colour[..., 2:18, :]
    for pixels, expected in [
        (colour, middle),
        (colour.permute(0, 2, 3, 1), middle),
        (colour.mT, middle.mT),
        (colour[:, 0], middle[:, :1]),
    ]:
        images, _ = to_images(pixels.numpy(), 16)
        assert torch.equal(images, expected)
        assert images.is_contiguous()
    small, _ = to_images(colour.permute(0, 2, 3, 1).numpy(), 12)
    assert torch.equal(small, to_images(colour, 12)[0])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 80, [80, 80, 80]),
        ("1", 1, [255, 255, 255]),
        ("I;16", 80 * 257, [80, 80, 80]),
        ("I;16", 80, [80, 80, 80]),
        ("I;16", 200 * 257 - 1, [199, 199, 199]),
        ("I", 80 * 257, [80, 80, 80]),
        ("I", 80, [80, 80, 80]),
        ("RGBA", (200, 100, 0, 255), [200, 100, 0]),
        ("RGBA", (200, 100, 0, 0), [255, 255, 255]),
        ("LA", (80, 255), [80, 80, 80]),
        ("P", 1, [10, 20, 30]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, expected):
    image = Image.new(mode, (16, 16), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    path = tmp_path / f"0.{'tif' if mode in ('CMYK', 'I') else 'png'}"  # no PNG has these
    image.save(path)
    assert read_image(path, 16)[:, 5, 5].tolist() == expected


@pytest.mark.parametrize("ending", ["gif", "tif"])
def test_of_several_frames_the_first_is_read(tmp_path, ending):
    red, green = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "lime")
    red.save(tmp_path / f"0.{ending}", save_all=True, append_images=[green])
    assert read_image(tmp_path / f"0.{ending}", 16)[:, 5, 5].tolist() == [255, 0, 0]


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
    pixels = read_image(photo(*size), 16)
    assert torch.equal(pixels, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_photo_of_a_turned_camera_is_upright(tmp_path, ending):
    upright, exif = photo(64, 96), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees clockwise to see it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"0.{ending}", exif=exif, quality=95)
    pixels = read_image(tmp_path / f"0.{ending}", 16).int()
    assert (pixels - read_image(upright, 16).int()).abs().max() < 16


def test_an_image_with_damaged_exif_is_taken_as_it_lies(tmp_path):
    photo(16, 16).save(tmp_path / "0.webp", exif=b"Exif\0\0not a TIFF header", lossless=True)
    assert torch.equal(read_image(tmp_path / "0.webp", 16), read_image(photo(16, 16), 16))


def test_a_directory_is_no_image(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is a directory; name image files"):
        read_image(tmp_path, 16)


@pytest.mark.parametrize(
    ("size", "decoded"), [((500, 375), (63, 47)), ((96, 64), (48, 32)), ((99, 63), (99, 63)), ((128, 128), (128, 128))]
)
def test_only_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path, size, decoded):
    photo(*size).save(tmp_path / "0.jpg", quality=95)
    assert open_image(tmp_path / "0.jpg", 16)[0].size == decoded
    with Image.open(tmp_path / "0.jpg") as whole:
        difference = read_image(tmp_path / "0.jpg", 16).int() - read_image(whole, 16).int()
    assert difference.abs().max() <= (0 if size == decoded else 12)
