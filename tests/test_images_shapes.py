import torch

from images.load import load_dataset
from images.shapes import shapes


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
