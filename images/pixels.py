"""Image sets, and what their pixels are made from: files and arrays of any size. Pixels as the models see them."""

import contextlib
import hashlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from engine.errors import UserError


class ImageSet(NamedTuple):
    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: torch.Tensor  # (N,) int64
    classes: list  # names, by label; empty for unlabelled images, whose labels are all 0

    def digest(self):
        """16 hex digits that change with any pixel or label."""
        parts = (tensor.contiguous().numpy() for tensor in (self.images, self.labels))
        return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=8).hexdigest()

    def where(self, keep):
        return self._replace(images=self.images[keep], labels=self.labels[keep])

    def to(self, device):
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


def open_image(path, img_size):
    """An upright RGB image from a file; a UserError names what cannot be read, and why.

    A JPEG whose shorter side has at least 4 x img_size is decoded at 1/2, 1/4 or 1/8 of its size, with 2 x img_size
    left: twice as fast, for pixels that differ by little. A square one is always decoded at full size.
    """
    try:
        with Image.open(path) as image:
            if image.width != image.height:
                image.draft(None, (2 * img_size, 2 * img_size))
            return to_rgb(image)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"No file {path}.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory; name image files.") from error
    except Exception as error:  # PIL raises many kinds on damaged files
        raise UserError(f"Cannot read {path} as an image: {error}. Repair or delete it, then run again.") from error


def to_rgb(image):
    """A PIL image as RGB: turned as its EXIF says, 16-bit greyscale scaled to 8, transparency laid over black.

    Whole numbers of 32 bits are taken as 8 bits where they fit, else as 16.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF: then the image is taken as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UserError("its pixels are not 8 or 16 bits, so black and white are unknown; save it as 8 bits")
        is_8_bit = image.mode == "I" and values.max() <= 255
        image = Image.fromarray((values if is_8_bit else values // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")
    return image.convert("RGB")


def square(image, img_size):
    """The middle square of an RGB image as uint8 pixels (3, img_size, img_size)."""
    return np.asarray(ImageOps.fit(image, (img_size, img_size), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def read_image(source, img_size):
    """A path or PIL image as (3, img_size, img_size) uint8: upright, RGB, the middle square, bilinear, antialiased.

    A path gives the pixels that a folder data set has of this file, and a UserError where it cannot be read.
    """
    image = to_rgb(source) if isinstance(source, Image.Image) else open_image(source, img_size)
    return torch.from_numpy(square(image, img_size))


def to_images(pixels, img_size):
    """uint8 (N, H, W), (N, H, W, 3) or (N, 3, H, W) as RGB (N, 3, img_size, img_size): middle squares, antialiased."""
    images = torch.as_tensor(pixels)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    height, width = images.shape[2:]
    if (height, width) != (img_size, img_size):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images, size = images[..., top : top + side, left : left + side], (img_size, img_size)
        parts = (part.contiguous() for part in images.split(1000))  # another memory format would round other ways
        images = torch.cat([F.interpolate(part, size, mode="bilinear", antialias=True) for part in parts])
    return images.expand(-1, 3, -1, -1).contiguous()


def normalize(images):
    """uint8 pixels to the model's range: x / 255, then (x - 0.5) / 0.5, in [-1, 1] float32."""
    return images.float() / 127.5 - 1


def to_pixels(images):
    """The model's range back to uint8 pixels, clipped. The inverse of `normalize`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
