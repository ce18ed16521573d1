"""Files that are written whole or not at all, and directories that one process has at a time."""

import contextlib
import errno
import os
import sys
import tempfile

from engine.errors import UserError

try:
    import fcntl
except ImportError:
    sys.exit("This program needs Linux or macOS. On Windows, run it in WSL: https://learn.microsoft.com/windows/wsl")

NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # of some network file systems
NO_SYNC = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of directories in VirtualBox or CIFS, say


def sync(file):
    """Wait until a file, or a directory's new names, are on the disk; skipped on file systems without fsync."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def check_writable(directory, flag):
    """Make a directory where it is missing; raises UserError where no file can be written in it.

    Args:
        flag: which takes another directory.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(f"Cannot write in {directory}: {error.strerror}. {flag} takes another directory.") from error


@contextlib.contextmanager
def replacing(path):
    """Open a file for writing bytes; path has the new content after the block, or is as it was if anything fails."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    sync(directory)  # the new name, too
    os.close(directory)


@contextlib.contextmanager
def locked(directory, wait=True):
    """Let no other process into the same block for this directory; the kernel drops the lock when the process ends.

    On a file system without locks, this warns and goes on without one.

    Raises:
        BlockingIOError: another process is in the block and `wait` is False.
        OSError: there is no such directory, or it cannot be written.
    """
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"No locks in {directory} ({error.strerror}): do not start a run twice there.", file=sys.stderr)
        yield
