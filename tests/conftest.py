import multiprocessing
import os
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
# A cache of the tests' own: other programs share the default one, and a killed one can leave half a file there.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/mae-tests-inductor-{os.getuid()}-{torch.__version__}"


@pytest.fixture(scope="session")
def server():
    """A context whose processes start with the project and these tests imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "scripts.benchmark"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


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
