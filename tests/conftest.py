import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def one_thread():
    """The tests' tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def image_folder(tmp_path):
    """A folder data set of 2 classes, 6 training and 4 test images of 16 x 16."""
    root = tmp_path / "pets"
    for part, count in (("train", 3), ("test", 2)):
        for k, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (100 * k, 40 * i, 200)).save(root / part / name / f"{i}.png")
    return root
