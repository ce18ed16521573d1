"""Ten kinds of shapes drawn from a seed: images for quick trials and tests, which need no files."""

import math

import torch

from images.pixels import ImageSet


def box(x, y, half_width, half_height):
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def star(x, y, n, angle):
    """Points' distances from the middle along the normal of their side, which is `angle` from the nearest of n tips."""
    from_spoke = (torch.atan2(x, y).remainder(2 * math.pi / n) - math.pi / n).abs()  # the nearest of n; one points up
    return torch.hypot(x, y) * (angle - from_spoke).cos()


SHAPES = {  # how far points lie outside a shape of about unit radius; negative inside, about a distance near its edge
    "bar": lambda x, y: box(x, y, 1.0, 0.3),
    "circle": lambda x, y: torch.hypot(x, y) - 0.85,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, 0.8 - torch.hypot(x - 0.5, y)),
    "cross": lambda x, y: torch.minimum(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95)),
    "ell": lambda x, y: torch.minimum(box(x + 0.5, y, 0.25, 0.9), box(x, y - 0.65, 0.75, 0.25)),
    "half disc": lambda x, y: torch.maximum(torch.hypot(x, y) - 1.0, y - 0.1),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.68).abs() - 0.24,
    "square": lambda x, y: box(x, y, 0.75, 0.75),
    "star": lambda x, y: star(x, y, 5, 2 * math.pi / 5) - math.cos(2 * math.pi / 5),
    "triangle": lambda x, y: star(x, y, 3, math.pi / 3) - 0.5,
}


def shapes(count, img_size, seed):
    """SHAPES in any colours, places and sizes, with noise and clutter over them; equally many of each, shuffled.

    Colour and place tell nothing, so that from few labels a vision transformer learns little unless it was pretrained.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    labels = (torch.arange(count) % len(SHAPES))[torch.randperm(count, generator=generator)]
    grid = (torch.arange(img_size) + 0.5) / img_size * 2 - 1

    def place(scale, reach, turn):  # image coordinates to an object's
        angle = uniform(-turn, turn, count, 1, 1)
        dx, dy = grid - uniform(-reach, reach, count, 1, 1), grid[:, None] - uniform(-reach, reach, count, 1, 1)
        return (angle.cos() * dx + angle.sin() * dy) / scale, (angle.cos() * dy - angle.sin() * dx) / scale

    def paint(canvas, distance, scale, colour):  # over the canvas, its edge one pixel wide
        cover = (0.5 - distance * scale * img_size / 2).clamp(0, 1)[:, None]
        return canvas * (1 - cover) + colour * cover

    ground, colour = uniform(0.1, 0.9, count, 3, 1, 1), uniform(0.1, 0.9, count, 3, 1, 1)
    u, _ = place(1.0, 0.0, math.pi)
    canvas = ground + uniform(-0.2, 0.2, count, 3, 1, 1) * u[:, None]  # shaded from one side to the other
    away = (colour - ground).sign() * (0.3 - (colour - ground).abs().mean(1, keepdim=True)).clamp(min=0)
    scale = uniform(0.45, 0.75, count, 1, 1)
    u, v = place(scale, 0.25, 0.4)
    distance = torch.empty_like(u)
    for label, distance_to in enumerate(SHAPES.values()):
        distance[labels == label] = distance_to(u[labels == label], v[labels == label])
    canvas = paint(canvas, distance, scale, colour + away)
    for _ in range(2):  # clutter, partly over the shape
        scale = uniform(0.06, 0.16, count, 1, 1)
        u, v = place(scale, 1.0, 0.0)
        canvas = paint(canvas, torch.hypot(u, v) - 1, scale, uniform(0, 1, count, 3, 1, 1))
    canvas = canvas + 0.04 * torch.randn(canvas.shape, generator=generator)
    return ImageSet((canvas.clamp(0, 1) * 255).round().byte(), labels, list(SHAPES))
