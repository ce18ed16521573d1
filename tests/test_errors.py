import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import UserError, as_user_error, exit_in_one_line

ROOT = Path(__file__).parents[1]


def test_what_a_user_can_mend_gets_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/where/script.py"])
    with pytest.raises(SystemExit) as leaving, exit_in_one_line():
        raise UserError("first\n  second")
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "script.py: error: first second\n"


@pytest.mark.parametrize("error", [ValueError("torch's"), OSError("a strategy's own file"), TypeError("our mistake")])
def test_everything_else_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)), exit_in_one_line():
        raise error


def test_an_error_of_files_that_the_user_named_is_the_users():
    with pytest.raises(UserError, match=r"No such file or directory: 'nowhere/a.txt'"), as_user_error(OSError):
        Path("nowhere/a.txt").read_text()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), " (2.00 GiB more were"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), ". Use a smaller"),
        (RuntimeError("std::bad_alloc"), ". Use a smaller"),
        (MemoryError(), ". Use a smaller"),
    ],
)
def test_too_little_memory_gets_one_line(error, line):
    with pytest.raises(SystemExit, match=re.escape(f"Out of memory{line}")), exit_in_one_line():
        raise error


def test_another_error_is_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="shape"), exit_in_one_line():
        raise RuntimeError("shape mismatch")


def test_output_that_nobody_reads_any_more_ends_a_program_quietly():
    """As in `python -m scripts.sweep ... --list | head -1`."""
    code = "from engine.errors import *\nwith exit_in_one_line(), as_user_error(OSError): print('a job', flush=True)"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as output:
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=output, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (1, b"")
