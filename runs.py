"""One run on disk: its name, config, metrics, TensorBoard events and checkpoints; continuing it; reading it back.

A run is a directory `<log_dir>/<name>/` with config.json, metrics.csv, events.out.tfevents.*, checkpoint.pt and, at
the end, model.pt. The name says what sets the run apart, so the same command again finds its run and continues it.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

# May differ when a run is continued: where things are and how they are computed, not what. What --precision auto
# comes to is compared all the same, as one of the facts given to Run.open.
FREE_ARGUMENTS = {
    "compile",
    "data_dir",
    "device",
    "log_dir",
    "max_device_batch_size",
    "model_path",
    "output_model_path",
    "overwrite",
    "precision",
    "pretrained_model_path",
}
SAVE_INTERVAL = 50  # times as long as a save takes; so saving takes under 2 % of the time
STEPS_BETWEEN_AGREEMENTS = 10  # of processes with a GPU each on whether to save; each waits for the GPUs

# --- names ---


def dataset_name(args):
    """The data set as part of a run's name; a folder goes by its own name."""
    name = Path(args["data_dir"]).resolve().name if args["dataset"] == "folder" else args["dataset"]
    return name if args["train_images"] is None else f"{name}-{args['train_images']}"


def mae_run_name(args):
    """For example mae_cifar10_i32_p2_w192_e12_h3_d4_random_r0.75_ep2000_b4096_s42."""
    size = "i{img_size}_p{patch_size}_w{embed_dim}_e{encoder_depth}_h{num_heads}_d{decoder_depth}".format(**args)
    rest = "{mask_strategy}_r{mask_ratio}_ep{total_epoch}_b{batch_size}_s{seed}".format(**args)
    return f"mae_{dataset_name(args)}_{size}_{rest}" + ("_aug" if args["augment"] else "")


def classifier_run_name(args, encoder_name):
    """For example cls_cifar10_ep100_b128_s42_from_mae_..., or cls_cifar10_val5000_ep100_..._scratch_i32_p2_w192_e12_h3.

    Args:
        encoder_name: the run the encoder comes from; None: from scratch.
    """
    size = "scratch_i{img_size}_p{patch_size}_w{embed_dim}_e{encoder_depth}_h{num_heads}".format(**args)
    encoder = f"from_{encoder_name}" if encoder_name else size
    val = f"_val{args['val_images']}" if args["val_images"] else ""
    name = "cls_{}{}_ep{total_epoch}_b{batch_size}_s{seed}".format(dataset_name(args), val, **args)
    return f"{name}{'_aug' if args['augment'] else ''}_{encoder}"


# --- .pt files: dictionaries of tensors and plain values ---


def save_file(path, content):
    """Write a .pt file whole or not at all: temporary name, sync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_file(path, *kinds):
    """Read a .pt file onto the CPU without unpickling objects.

    torch.load checks no checksum, so a flipped bit would load as a wrong weight; the zip archive that torch.save
    writes has a CRC-32 for each of its records, which zipfile checks.

    Args:
        path: the file, or a run directory, which stands for its model.pt.
        kinds: what content["kind"] may be; none: any of ours.

    Raises:
        ValueError: no such file, damaged, or not the kind asked for.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.pt"
    if not path.exists():
        hint = " The run is not finished; give its command again." if (path.parent / "config.json").exists() else ""
        raise ValueError(f"No file {path}.{hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in many ways, and all of them mean the same
        reason = "it holds pickled objects" if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(
            f"Cannot read {path}: {reason}. Copy the file anew, or make it again (--overwrite)."
        ) from error
    found = content.get("kind") if isinstance(content, dict) else None
    if found is None or (kinds and found not in kinds):
        needed = " or ".join(kinds) or "a model"
        raise ValueError(f"{path} holds {found or 'no model of this program'}; {needed} is needed here.")
    return content


def load_model(path, *constructors):
    """Rebuild the model that a model.pt holds: (model, the whole content).

    Raises:
        ValueError: as `load_file`, or the weights do not fit any of the constructors.
    """
    content = load_file(path, *(constructor.__name__ for constructor in constructors))
    constructor = next(constructor for constructor in constructors if constructor.__name__ == content["kind"])
    try:
        model = constructor(**content["model_args"])
        model.load_state_dict(content["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no {content['kind']} of this version of the program: {error}") from error
    return model, content


def start_of(epoch):
    """Progress: so many complete epochs, no step of the next."""
    return {"epoch": epoch, "step": 0, "loss_sum": 0.0, "seconds": 0.0}


def digest(state_dict):
    """16 hex digits that change with any weight."""
    result = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state_dict.items()):
        result.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return result.hexdigest()


@contextlib.contextmanager
def replacing(path):
    """Open a file for writing bytes; path has the new content after the block, or is as it was if anything fails."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the new name, too
    os.close(directory)


# --- reading back ---


def read_config(directory):
    """config.json of a run directory: a dictionary with name, arguments, results of planning, and starts."""
    return json.loads((Path(directory) / "config.json").read_text())


def read_metrics(directory):
    """metrics.csv of a run directory: a list of one dictionary of floats an epoch; epoch is an int, from 1.

    A last line that a crash has torn is left out.
    """
    path = Path(directory) / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [{key: int(v) if key == "epoch" else float(v) for key, v in row.items()} for row in csv.DictReader(lines)]


# --- the run itself ---


def group_device():
    """Where the process group, if there is one, wants tensors that it sends."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


class Run:
    """A run's directory while its script is at work.

    Args:
        log_dir, name: the run lives in log_dir/name.
        arguments: the run's settings, plain values by name.
        overwrite: start anew, dropping what an earlier run of this name left.
        writer: False on all processes but one; they read what it wrote and write nothing.

    Raises:
        ValueError: the directory holds a run with other arguments.
    """

    def __init__(self, log_dir, name, arguments, overwrite=False, writer=True):
        self.directory = Path(log_dir) / name
        self.name, self.arguments, self.overwrite, self.writer = name, arguments, overwrite, writer
        self.config = self._stored_config()
        if self.config:
            self._check_same(self.config["arguments"], arguments, skip=FREE_ARGUMENTS)
        self.finished = self.config is not None and (self.directory / "model.pt").exists()
        self.stop_signal = 0  # what this process has got
        self.stopping = 0  # what all processes will stop for, at the same step
        self.saved_at, self.save_seconds, self.saved = time.monotonic(), 0.2, None
        self.lock = self.board = self.bar = None
        self.handlers = {}

    def _stored_config(self):
        if self.overwrite or not (self.directory / "config.json").exists():
            return None
        return read_config(self.directory)

    def _check_same(self, stored, now, skip=frozenset()):
        for key in sorted(stored.keys() & now.keys() - skip):
            if stored[key] != now[key]:
                raise ValueError(
                    f"{self.directory} is a run with {key} {stored[key]}, and now {key} is {now[key]}. Give the stored "
                    f"value to continue it, --overwrite to start it anew, or another --log_dir."
                )

    def open(self, facts, **start):
        """Take the directory for this process and write config.json.

        Args:
            facts: what follows from the arguments and the data; must be as it was when the run began.
            start: what may differ each time the run is continued.

        Raises:
            ValueError: another process is at work on this run, or the facts differ.
        """
        if self.writer:
            self.directory.mkdir(parents=True, exist_ok=True)
            # the kernel drops the lock when the process ends, however it ends
            self.lock = open(self.directory / ".lock", "w")  # noqa: SIM115
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"Another process is at work on {self.directory}; wait for it or stop it.") from None
        self.config = self._stored_config()  # as it is now that no other process can change it
        if self.config:
            self._check_same(self.config["arguments"], self.arguments, skip=FREE_ARGUMENTS)
            self._check_same(self.config, facts)
        self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.writer:
            if self.overwrite:
                for pattern in ("*.pt", "metrics.csv", "events.out.tfevents.*", "config.json"):
                    for path in self.directory.glob(pattern):
                        path.unlink()
            starts = [*(self.config["starts"] if self.config else []), {**environment(), **start}]
            config = {"name": self.name, "arguments": self.arguments, **facts, "starts": starts}
            with replacing(self.directory / "config.json") as file:
                file.write(json.dumps(config, indent=1).encode())

    def _on_signal(self, number, frame):
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving.\n".encode())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for resource in (self.bar, self.board, self.lock):
            try:
                if resource is not None:
                    resource.close()
            except OSError as failure:  # what it still had to write
                error = error or failure
        if isinstance(error, OSError):
            sys.exit(f"Cannot write: {error}. {self._last_save()} With that mended, {self._again()}.")

    def _again(self):
        return f"the same command{' without --overwrite' if self.overwrite else ''} continues {self.directory}"

    def _last_save(self):
        if self.saved is None:
            return "There is no checkpoint yet."
        return "The last good checkpoint has {epoch} epochs and {step} steps.".format(**self.saved)

    def restore(self, model, optimizer):
        """Load what was saved last into model and optimizer, which from now on are what is saved.

        Metrics of later epochs are dropped: they will come again.

        Returns:
            progress: epoch (complete ones), step (complete ones of the epoch under way), loss_sum (over them) and
            seconds (spent on them); all 0 for a new run.

        Raises:
            ValueError: the checkpoint is damaged or another run's, or not all processes see it.
        """
        self.model, self.optimizer = model, optimizer
        path = self.directory / "checkpoint.pt"
        progress = start_of(0)
        if path.exists():
            state = load_file(path, "checkpoint")
            try:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                progress = state["progress"]
            except (KeyError, RuntimeError, ValueError) as error:
                raise ValueError(f"{path} is of another run; start anew with --overwrite. {error}") from error
            self.saved = dict(progress)
        self._check_same_start(progress)
        self.first_epoch = progress["epoch"]
        if self.writer and (self.directory / "metrics.csv").exists():
            rows = [row for row in read_metrics(self.directory) if row["epoch"] <= self.first_epoch]
            with replacing(self.directory / "metrics.csv") as file:
                file.write(csv_text(rows, header=True).encode())
        return progress

    def _check_same_start(self, progress):
        if not dist.is_initialized():
            return
        mine = torch.tensor([progress["epoch"], progress["step"]], device=group_device())
        first = mine.clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, mine):
            raise ValueError(
                f"Process {dist.get_rank()} does not see process 0's checkpoint in {self.directory}; --log_dir must be "
                f"on a file system that all machines share."
            )

    def start_bar(self, images_per_epoch, batch_size, total_epochs, progress):
        """Show loss, images/s and the time left of the whole run, on a terminal."""
        self.batch_size = batch_size
        self.bar = tqdm(
            total=images_per_epoch * total_epochs,
            initial=images_per_epoch * progress["epoch"] + batch_size * progress["step"],
            desc=self.name.split("_")[0],
            unit="img",
            unit_scale=True,
            disable=None if self.writer else True,
        )

    def tick(self, progress):
        """One step is done: move the bar, and where a save is due, save; leave if a signal asked for it."""
        self.bar.update(self.batch_size)
        if group_device() == "cuda" and progress["step"] % STEPS_BETWEEN_AGREEMENTS:
            return
        if self.save_due():
            self.save(progress)
            self.exit_if_stopped()

    def end_epoch(self, progress, metrics, last=False):
        """Log an epoch's metrics; save where due or where it was the last; leave if a signal asked for it."""
        self.bar.set_postfix_str(f"epoch {progress['epoch']}, loss {metrics['train/loss']:.4f}")
        self.log(progress["epoch"], metrics)
        if self.save_due() or last:
            self.save(progress)
        self.exit_if_stopped()

    def save_due(self):
        """Whether to save now, because the interval has passed or a signal came; the same on all processes."""
        due = self.writer and time.monotonic() - self.saved_at >= SAVE_INTERVAL * self.save_seconds
        wanted = self.stop_signal or int(due)  # SIGINT and SIGTERM are numbers from 2 on
        if dist.is_initialized():
            largest = torch.tensor(wanted, device=group_device())
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            wanted = largest.item()
        self.stopping = wanted if wanted > 1 else 0
        return wanted > 0

    def save(self, progress):
        """Write checkpoint.pt with the model, the optimizer and progress.

        Raises:
            SystemExit: the loss or a weight is not finite; the checkpoint there stays.
        """
        if progress["step"]:
            loss = float(progress["loss_sum"]) / progress["step"]
            self.check_finite(loss, progress["epoch"], progress["step"])
            self.bar.set_postfix_str(f"epoch {progress['epoch'] + 1}, loss {loss:.4f}")
        if self.writer:
            started = time.monotonic()
            content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "progress": progress}
            save_file(self.directory / "checkpoint.pt", {"kind": "checkpoint", **content})
            self.saved_at = time.monotonic()
            self.save_seconds = self.saved_at - started
        self.saved = dict(progress)

    def check_finite(self, loss, epoch, step):
        """Leave where the mean loss so far or a weight is no number, with the checkpoint as it was."""
        if not math.isfinite(loss):
            what = f"train/loss is {loss}"
        elif not math.isfinite(torch.nn.utils.get_total_norm(self.model.parameters())):
            what = "A weight is infinite or nan"
        else:
            return
        lr = self.optimizer.param_groups[0]["lr"]
        sys.exit(
            f"{what} at epoch {epoch + 1}, by step {step} (lr {lr:.2e}). {self._last_save()} A lower "
            f"--base_learning_rate or --precision float32 may help; the directory is {self.directory}"
        )

    def exit_if_stopped(self):
        """Leave with the shell's code for the signal that asked for it (130 for Ctrl-C), if one did."""
        if self.stopping:
            print(f"Stopped; {self._again()}", file=sys.stderr)
            sys.exit(128 + self.stopping)

    def log(self, epoch, metrics):
        """Append one epoch's numbers (epoch from 1) to metrics.csv and, where they are not nan, to TensorBoard."""
        if not self.writer:
            return
        path = self.directory / "metrics.csv"
        text = csv_text([{"epoch": epoch, **metrics}], header=not path.exists() or not path.stat().st_size)
        with open(path, "a", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before a checkpoint says that the epoch is done
        for key, value in metrics.items():
            if not math.isnan(value):
                self._board().add_scalar(key, value, epoch)

    def log_image(self, epoch, tag, image):
        """Show an image (3, H, W) uint8 in TensorBoard."""
        if self.writer:
            self._board().add_image(tag, image, epoch)

    def finish(self, content):
        """Write model.pt, the mark of a finished run, and its settings and last metrics as hyper-parameters."""
        if not self.writer:
            return
        plain = {key: value for key, value in self.arguments.items() if isinstance(value, (bool, int, float, str))}
        last = {f"final/{key}": value for key, value in read_metrics(self.directory)[-1].items() if key != "epoch"}
        self._board().add_hparams(plain, last, run_name=".")
        save_file(self.directory / "model.pt", {"run_name": self.name, **content})
        self.finished = True

    def export(self, path):
        """Copy the finished model.pt to a path of the user's, if one was given."""
        if path and self.writer:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write((self.directory / "model.pt").read_bytes())

    def _board(self):
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed to read runs

            self.board = SummaryWriter(self.directory, purge_step=self.first_epoch + 1)
        return self.board


def csv_text(rows, header):
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def environment():
    """Where and from what a run was started: command, time, commit, versions, machine."""
    source = Path(__file__).parent

    def git(*command):
        try:
            return subprocess.check_output(
                ["git", "-C", source, *command], stderr=subprocess.DEVNULL, text=True
            ).strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    commit = git("rev-parse", "HEAD")
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit,
        "clean": git("status", "--porcelain") == "" if commit else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "cuda": torch.version.cuda if cuda else None,
        "processor": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
