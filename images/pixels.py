"""Image sets, and what their pixels are made from: files and arrays of any size. Pixels as the models see them."""

import contextlib
import hashlib
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from engine.errors import UserError

with contextlib.suppress(ImportError):  # reads the photos of iPhones, where it is installed
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = 2**29  # PIL refuses more than twice as many
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # bytes; of colour profiles, too
USUAL = 8192  # pixels along the edge of a square JPEG
FLAT = 16  # levels: an image with fewer in each channel is of one colour, or nearly


class ImageSet(NamedTuple):
    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,) int64
    classes: list  # names, by label; empty for unlabelled images, whose labels are all 0
    done: tuple = ()  # in words what was done to the pictures, and what was left out: a sentence each

    def digest(self):
        """16 hex digits that change with any pixel or label."""
        parts = (tensor.contiguous().numpy() for tensor in (self.images, self.labels))
        return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=8).hexdigest()

    def where(self, keep):
        return self._replace(images=self.images[keep], labels=self.labels[keep])

    def to(self, device):
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


KINDS = {  # {first bytes of files that PIL does not read, as a pattern: what they are; what to do}
    b".{4}ftyp(hei|hev|mif|msf|avi)": "HEIC or AVIF; convert it to JPEG, or pip install pillow-heif",
    b"\xff\x0a|\0\0\0\x0cJXL": "JPEG XL; convert it to PNG",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the image with git lfs pull",
    rb"(\xef\xbb\xbf)?\s*<": "text, SVG or a web page; convert it to PNG, or download the image again",
    b"$": "empty, 0 bytes; copy it again or delete it",
}


def open_image(path, img_size, limits=None):
    """Read (upright RGB image, its own limits), as `to_rgb` gives them; raises UserError if the file is unreadable.

    A JPEG whose shorter side has at least 4 x img_size is decoded at 1/2, 1/4 or 1/8 of its size, with at least
    2 x img_size left: twice as fast, and pixels differ little. A square one of up to USUAL pixels stays at full size.
    """
    try:
        with Image.open(path) as image:
            if image.width != image.height or image.width > USUAL:
                image.draft(None, (2 * img_size, 2 * img_size))
            return to_rgb(image, limits)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds on damaged files
        raise UserError(why_not_read(path, error)) from error


def why_not_read(path, error):
    """The message for a file that cannot be read as an image: what it is, and what to do."""
    short = {FileNotFoundError: f"No file {path}.", IsADirectoryError: f"{path} is a directory; name image files."}
    short[PermissionError] = f"{path} may not be read: permission denied. Give yourself the right (chmod u+r)."
    if type(error) in short:
        return short[type(error)]
    reason = f"{error}. Repair, convert or delete it"
    if isinstance(error, UnidentifiedImageError):
        with open(path, "rb") as file:
            start = file.read(100)
        reason = next((f"it is {kind}" for form, kind in KINDS.items() if re.match(form, start, re.DOTALL)), reason)
    return f"Cannot read {path} as an image: {reason}, then run again."


def to_rgb(image, limits=None):
    """A PIL image as RGB, and its (smallest, largest) value if its values are not of 8 bits, else None.

    It is turned as its EXIF says; transparency becomes white. Values of more than 8 bits, or with a fraction, are
    scaled to 0 to 255: `limits`, a set's (smallest, largest) value, become 0 and 255; None: the image's own limits.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF: then the image is taken as it lies
        image = ImageOps.exif_transpose(image)
    own = None
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        own = values.min().item(), values.max().item()
        if not np.isfinite(own).all():
            raise UserError("some of its pixels are infinite or no numbers; save it as 8 or 16 bits")
        low, high = limits or own
        if low == high:  # of one grey
            low, high = 0, 255 if high <= 255 else 65535
        image = Image.fromarray(((values - low) * 255 // (high - low)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB"), own


def square(image, img_size):
    """The middle square of an RGB image as uint8 pixels (3, img_size, img_size)."""
    return np.asarray(ImageOps.fit(image, (img_size, img_size), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def read_image(source, img_size):
    """A path or PIL image as (3, img_size, img_size) uint8: upright, RGB, the middle square, bilinear, antialiased.

    A path gives the same pixels as this file in a folder data set, except for values of more than 8 bits (see
    `to_rgb`). A file that cannot be read raises UserError.
    """
    image, _ = to_rgb(source) if isinstance(source, Image.Image) else open_image(source, img_size)
    return torch.from_numpy(square(image, img_size))


def to_images(pixels, img_size):
    """uint8 (N, H, W), (N, H, W, C) or (N, 3, H, W) as (N, C, img_size, img_size): middle squares, antialiased.

    Also returns in words what was done, as `resizing`.
    """
    images = torch.as_tensor(pixels)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] == 3 or images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    height, width = images.shape[2:]
    if (height, width) != (img_size, img_size):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images, size = images[..., top : top + side, left : left + side], (img_size, img_size)
        parts = (part.contiguous() for part in images.split(1000))  # another memory format would round other ways
        images = torch.cat([F.interpolate(part, size, mode="bilinear", antialias=True) for part in parts])
    return images.contiguous(), resizing([(width, height)] * len(images), img_size)


def in_channels(images, count, place):
    """uint8 images (N, C, H, W) with `count` channels: grey ones as that many equal ones, colour as grey (ITU-R 601).

    Raises:
        UserError: they have another number of channels; place: whose they are.
    """
    channels = images.shape[1]
    if channels == count:
        return images
    if channels == 1:
        return images.expand(-1, count, -1, -1).contiguous()
    if (channels, count) != (3, 1):
        raise UserError(
            f"{place} has images of {channels} channels, and the model takes {count}: --in_chans {channels}."
        )
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return torch.cat([(part * weights).sum(1, keepdim=True).round().byte() for part in images.split(1000)])


def resizing(sizes, img_size):
    """In words how many pictures of these (width, height) `square` or `to_images` changed: one sentence or none."""
    resized = sum(size != (img_size, img_size) for size in sizes)
    cropped = sum(width != height for width, height in sizes)
    crops = f", {cropped} of them centre-cropped" if cropped else ""
    return (f"Resized {resized} of {len(sizes)} images to {img_size} x {img_size}{crops}.",) if resized else ()


def flatness(images):
    """In words how many of the images (N, C, H, W) uint8 show next to nothing: one sentence or none."""
    parts = [part.flatten(2) for part in images.split(1000)]
    levels = torch.cat([(part.amax(2) - part.amin(2)).amax(1) for part in parts])  # uint8: amax >= amin
    flat = int((levels < FLAT).sum())
    return (f"{flat} of {len(images)} images are of one colour, or nearly.",) if flat else ()


def normalize(images):
    """uint8 pixels to the model's range: x / 255, then (x - 0.5) / 0.5, in [-1, 1] float32."""
    return images.float() / 127.5 - 1


def to_pixels(images):
    """The model's range back to uint8 pixels, clipped. The inverse of `normalize`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
