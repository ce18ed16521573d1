"""What several test files share. tests/starting.py starts the training scripts for them."""

import multiprocessing
import os
import shutil
import tempfile
from multiprocessing import forkserver
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start; before torch reads it

import pytest
import starting
import torch
from matplotlib.figure import Figure
from PIL import Image

from images import load

ROOT = Path(__file__).parents[1]
# A cache of the tests' own: other programs share the default one, and a killed one can leave half a file there.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/mae-tests-inductor-{os.getuid()}-{torch.__version__}"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Stop where a signal from outside reached a run inside this process: it would else fail one test, and go on."""
    try:
        return (yield)
    except SystemExit as leaving:
        if leaving.code in (130, 143) and "PYTEST_XDIST_WORKER" not in os.environ:  # of SIGINT and SIGTERM
            pytest.exit(f"a signal came in {pyfuncitem.name}", leaving.code)
        raise


@pytest.fixture(autouse=True)
def one_thread():
    """The tests' tensors are too small for more, and pytest-xdist has a process for each core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_sync():
    """In this process, nothing waits for the disk (half of a small run's time, a minute where others write)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def server():
    """A context whose processes start with the project and these tests imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "scripts.benchmark"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()
    return context


@pytest.fixture
def empty_directory(monkeypatch, tmp_path):
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, and their files are empty: to draw them takes half of the time of a comparison."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())


@pytest.fixture
def few_shapes(monkeypatch):
    """Drawn sets of 50 images to train on and 100 to test on."""
    draw_few(monkeypatch)


def draw_few(patch):
    draw = load.shapes
    patch.setattr(load, "shapes", lambda count, size, seed: draw(min(count, 50 * (seed + 1)), size, seed))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A directory with logs/: a MAE of starting.pretrain() and a classifier of starting.classify(), both finished."""
    directory = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        draw_few(patch)
        starting.pretrain()
        starting.classify()
    return directory


@pytest.fixture
def mae(trained, empty_directory, few_shapes):
    """The run directory of a finished MAE of this test's own: where starting.pretrain() would put it."""
    return own_copy(trained, "pretrain")


@pytest.fixture
def classifier(trained, empty_directory, few_shapes):
    """The run directory of a finished classifier from scratch: where starting.classify() would put it."""
    return own_copy(trained, "classifier")


def own_copy(trained, kind):
    shutil.copytree(trained / "logs" / kind, Path("logs") / kind)
    return next(Path("logs", kind).iterdir())


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
