import math

import pytest
import torch

from images.load import load_dataset
from images.shapes import SHAPES, shapes


def test_shapes_are_balanced_and_follow_from_the_seed():
    first, again, other = shapes(40, 16, seed=3), shapes(40, 16, seed=3), shapes(40, 16, seed=4)
    assert first.images.shape == (40, 3, 16, 16)
    assert first.images.dtype == torch.uint8
    assert (first.labels.bincount() == 4).all()
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_shapes_data_set_has_5000_and_1000_images_that_differ():
    train, test = load_dataset("shapes", "data", 8)
    assert len(train.images) == 5000
    assert len(test.images) == 1000
    assert len(torch.cat([train.images, test.images]).flatten(1).unique(dim=0)) == 6000
    assert torch.equal(train.images, shapes(5000, 8, seed=0).images)
    assert torch.equal(test.images, shapes(1000, 8, seed=1).images)


AREAS = {"bar": 1.2, "circle": math.pi * 0.85**2, "cross": 2 * 1.9 * 0.56 - 0.56**2, "ell": 0.9 + 0.75 - 0.25}
AREAS |= {"half disc": math.pi / 2 + 0.2, "ring": math.pi * (0.92**2 - 0.44**2), "square": 1.5**2, "star": 1.123}
AREAS |= {"triangle": 3**1.5 / 4, "crescent": 1.316}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_its_area_and_ends_within_the_picture(name):
    grid = torch.linspace(-1.25, 1.25, 501)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    inside = SHAPES[name](x, y) < 0
    assert not (inside & (torch.hypot(x, y) > 1.25)).any()
    assert inside.float().mean() * 2.5**2 == pytest.approx(AREAS[name], rel=0.02)
