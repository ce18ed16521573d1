"""One run on disk: its config, metrics, TensorBoard events and checkpoints; continuing it; reading it back.

A run is a directory `<log_dir>/<name>/` with config.json, metrics.csv, events.out.tfevents.*, checkpoint.pt and, at
the end, model.pt. The name says what sets the run apart, so the same command again finds its run and continues it.
"""

import contextlib
import csv
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from engine import processes
from engine.checkpoints import load_file, save_file
from engine.errors import UserError, as_user_error
from engine.files import locked, replacing

# May differ when a run is continued: where things are and how they are computed, not what. What --precision auto
# comes to is compared all the same, as one of the facts given to Run.open.
FREE_ARGUMENTS = {"compile", "data_dir", "device", "log_dir", "max_device_batch_size", "overwrite", "precision"}
FREE_ARGUMENTS |= {"model_path", "output_model_path", "pretrained_model_path", "probe_every"}
FREE_ARGUMENTS |= {"preset"}  # it only sets other arguments
# What else must be as it was, as digests: of a finished run, too
DIGESTS = {"images": "training images", "test_set": "test images", "masks": "masks from the strategy of this name"}
DIGESTS |= {"encoder_digest": "weights of the pretrained encoder"}
SAVE_INTERVAL = 50  # times as long as a save takes; so saving takes under 2 % of the time
LEAST_SAVE_INTERVAL = 60  # seconds: files of 100 MB would else wear the disk
SHOWN = ("train/loss", "test/loss", "val/acc", "test/acc", "knn/acc")  # after each epoch
REPEAT_SECONDS = 3  # torchrun sends a signal that its processes may have got already
STEPS_BETWEEN_AGREEMENTS = 10  # of processes with a GPU each on whether to save; each waits for the GPUs

# --- reading back ---


class Record(NamedTuple):
    """A run as it lies on disk, read once."""

    directory: Path
    kind: str  # "mae" or "classifier"
    name: str
    settings: dict  # what is computed: {flag: value}
    parent: dict | None  # of the MAE that a classifier's encoder comes from: name, digest, settings
    facts: dict  # what follows from the settings and the images
    starts: list  # one for each time that it was started or continued
    finished: bool
    metrics: list  # of {column: number}, an epoch each
    features: list  # what evaluate_features.py wrote in the run's directory, a file each


def find_runs(*directories):
    """[Record, ...] of all runs in and below some directories, each once, sorted by path.

    Raises:
        UserError: one of the directories is not there, or a file of a run cannot be read.
    """
    found = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise UserError(f"No directory {directory}.")
        for path in directory.rglob("config.json"):
            found.setdefault(path.parent.resolve(), path.parent)
    records = (record_of(directory, read_config(directory)) for directory in sorted(found.values()))
    return [record for record in records if record]


def read_run(directory):
    """The Record of a run directory.

    Raises:
        UserError: there is none, or one of its files cannot be read.
    """
    if (record := record_of(Path(directory), read_config(directory))) is None:
        raise UserError(f"{Path(directory) / 'config.json'} is not a run's; name a run's directory.")
    return record


def record_of(directory, config):
    """The Record of a directory with this config.json; None where it is not a run's, but an exported model's, say."""
    if not isinstance(config, dict) or not {"kind", "name", "finished", "settings"} <= config.keys():
        return None
    fields = {name: config.get(name) for name in ("kind", "name", "settings", "parent", "facts", "starts", "finished")}
    features = [stored for path in sorted(directory.glob("*features*.json")) if "rows" in (stored := read_json(path))]
    return Record(directory, **fields, metrics=read_metrics(directory), features=features)


def read_config(directory):
    """config.json of a run directory: kind, name, finished, settings, parent, facts and starts."""
    return read_json(Path(directory) / "config.json")


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Copy the file again, or make it again (--overwrite).") from error


def read_metrics(directory):
    """metrics.csv of a run directory: a list of one dictionary of floats an epoch; epoch is an int, from 1.

    A last line that a crash has torn is left out.
    """
    path = Path(directory) / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    rows = csv.DictReader(lines)
    try:
        return [{key: int(v) if key == "epoch" else float(v) for key, v in row.items()} for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Copy the file again, or start again (--overwrite).") from error


# --- the run itself ---


class Run:
    """A run's directory: what it holds, and whether that is the run of these arguments.

    Args:
        log_dir, name: the run lives in log_dir/name.
        arguments: the run's settings, plain values by name.
        overwrite: start again, dropping what an earlier run of this name left.
        writer: False on all processes but one; they read what it wrote and write nothing.
        defaults: values by name that a run had whose config.json lacks them, as it was made before they were there.

    Raises:
        UserError: the name is no name of a directory, or the directory holds a run with other arguments.
    """

    def __init__(self, log_dir, name, arguments, overwrite=False, writer=True, defaults=None):
        if name in ("", ".", "..") or set(name) & {"/", "\0"}:  # it may come from a file, and files are deleted in it
            raise UserError(f"{name!r} cannot be the name of a run's directory.")
        self.directory = Path(log_dir) / name
        self.name, self.arguments, self.overwrite, self.writer = name, arguments, overwrite, writer
        self.defaults = defaults or {}
        self._checked_config({})

    def settings(self):
        """The arguments that say what is computed, not where and how."""
        return {name: value for name, value in self.arguments.items() if name not in FREE_ARGUMENTS}

    def is_finished(self, facts):
        """Whether this process finds the run finished.

        Raises:
            UserError: it was a run with other facts.
        """
        return self._checked_config(facts) is not None and (self.directory / "model.pt").exists()

    def _checked_config(self, facts):
        """The stored config, None for a new run; other arguments or facts than these are refused."""
        with as_user_error(OSError):  # a name too long, say
            if self.overwrite or not (self.directory / "config.json").exists():
                return None
        config = read_config(self.directory)
        self._check_same(self.defaults | config["arguments"], self.arguments, skip=FREE_ARGUMENTS)
        self._check_same(config, facts)
        return config

    def _check_same(self, stored, now, skip=frozenset()):
        for key in sorted(stored.keys() & now.keys() - skip):
            if stored[key] == now[key]:
                continue
            if key in DIGESTS:
                raise UserError(
                    f"{self.directory} is a run with other {DIGESTS[key]} (digest {stored[key]}, now {now[key]}). "
                    f"--overwrite starts it again; another --log_dir keeps both."
                )
            raise UserError(
                f"{self.directory} is a run with {key} {stored[key]}, and now {key} is {now[key]}. Give the stored "
                f"value to continue it, --overwrite to start it again, or another --log_dir."
            )

    @contextlib.contextmanager
    def open(self, model, optimizer, plan, facts, start):
        """Lock the directory, restore the last checkpoint and note signals, until the block ends.

        Args:
            model, optimizer: filled with what was saved last; from now on what is saved.
            plan: with batch_size, steps_per_epoch and total_steps.
            facts: what follows from the arguments and the data; must be as it was when the run began.
            start: what may differ each time the run is continued.

        Yields:
            The Session, on which the run is logged, saved and finished.

        Raises:
            UserError: another process is at work on this run, the facts differ, the checkpoint is damaged or another
                run's, or not all processes see it.
        """
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(noted_signals())
            with processes.together():  # nobody reads what is still to be cleared
                if self.writer:
                    self._lock(stack)
                config = self._checked_config(facts)
                if self.writer:
                    with as_user_error(OSError):
                        self._write_config(facts, [*(config["starts"] if config else []), start])
            with processes.together():
                session = Session(self, model, optimizer, plan, facts, signals)
            with processes.together():
                session.check_same_start()
            if self.writer:
                session.announce(start, config["starts"][-1] if config else start)
            try:
                yield session
            except BaseException:
                with contextlib.suppress(OSError):  # which would hide the first error
                    session.close()
                raise
            with session.writing():
                session.close()

    def _lock(self, stack):
        with as_user_error(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(self.directory, wait=False))
            except BlockingIOError:
                raise UserError(f"Another process is at work on {self.directory}; wait for it or stop it.") from None

    def _write_config(self, facts, starts):
        if self.overwrite:
            for pattern in ("*.pt", "metrics.csv", "events.out.tfevents.*", "config.json"):
                for path in self.directory.glob(pattern):
                    path.unlink()
        config = {"name": self.name, "arguments": self.arguments, **facts, "starts": starts}
        with replacing(self.directory / "config.json") as file:
            file.write(json.dumps(config, indent=1).encode())

    def pass_over(self, path):
        """Say that the run is finished, and export it; its directory."""
        if self.writer:
            print(f"Finished already: {self.directory}")
        self.export(path)
        return self.directory

    def export(self, path):
        """Copy the finished model.pt to a path of the user's, if one was given."""
        if path and self.writer:
            path = Path(path)
            with as_user_error(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as file:
                    file.write((self.directory / "model.pt").read_bytes())


@contextlib.contextmanager
def noted_signals():
    """SIGINT and SIGTERM are only noted in the list that this yields; a later second one ends the process at once.

    Repeats within a moment are one signal. One that came too late for the block to act on ends the program after it.
    """
    noted, noted_at = [], {}

    def note(number, frame):
        if number not in noted_at:
            noted.append(number)
            noted_at[number] = time.monotonic()
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving.\n".encode())
        elif time.monotonic() - noted_at[number] > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if noted:
        sys.exit(128 + max(noted))


def start_of(epoch):
    """Progress: so many complete epochs, no step of the next."""
    return {"epoch": epoch, "step": 0, "loss_sum": 0.0, "seconds": 0.0}


class Session:
    """Work on a run between a start and a stop, on one process: its progress, what it logs and saves.

    Made by `Run.open`. progress holds epoch (complete ones), step (complete ones of the current epoch), loss_sum (over
    them), seconds (spent on them), and whatever a script adds to it.
    """

    def __init__(self, run, model, optimizer, plan, facts, signals):
        self.run, self.model, self.optimizer, self.plan = run, model, optimizer, plan
        self.facts, self.signals = facts, signals
        self.epochs = plan.total_steps // plan.steps_per_epoch
        self.columns = None  # of metrics.csv, None while it has no row
        self.saved = None  # epoch and step of the last save
        self.saved_at, self.save_seconds = time.monotonic(), 0.2
        self.progress = self._restore()
        self.started_at, self.steps_before = time.monotonic(), self._steps()
        self.board = self._board() if run.writer else None
        self.bar = tqdm(  # loss, images/s and the time left of the whole run, on a terminal
            total=plan.total_steps * plan.batch_size,
            initial=self.steps_before * plan.batch_size,
            desc=run.name.split("_")[0],
            unit="img",
            unit_scale=True,
            disable=None if run.writer else True,
        )

    def _restore(self):
        """Load what was saved last; metrics of later epochs are dropped, as they will come again."""
        path, progress = self.run.directory / "checkpoint.pt", start_of(0)
        if path.exists():
            state = load_file(path, "checkpoint")
            try:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                progress = state["progress"]
            except (KeyError, RuntimeError, ValueError) as error:
                raise UserError(f"{path} is of another run; start again with --overwrite. {error}") from error
            self.saved = {name: progress[name] for name in ("epoch", "step")}
        if self.run.writer and (self.run.directory / "metrics.csv").exists():
            rows = [row for row in read_metrics(self.run.directory) if row["epoch"] <= progress["epoch"]]
            with self.writing():
                self._rewrite_metrics(rows)
        return progress

    def _steps(self):
        return self.progress["epoch"] * self.plan.steps_per_epoch + self.progress["step"]

    def _rewrite_metrics(self, rows):
        with replacing(self.run.directory / "metrics.csv") as file:
            file.write(csv_text(rows, header=True).encode())
        self.columns = rows[0].keys() if rows else None

    def check_same_start(self):
        """Raises UserError where this process found another checkpoint than the first, or none."""
        mine = [self.progress["epoch"], self.progress["step"]]
        if processes.broadcast(mine) != mine:
            raise UserError(
                f"Process {processes.rank()} does not see process 0's checkpoint in {self.run.directory}; --log_dir "
                f"must be on a file system that all machines share."
            )

    def _board(self):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed to read runs

        with self.writing():
            return SummaryWriter(self.run.directory, purge_step=self.progress["epoch"] + 1)

    def close(self):
        """Close the bar and TensorBoard; raises OSError where its last numbers cannot be written."""
        self.bar.close()
        if self.board:
            self.board.close()

    @contextlib.contextmanager
    def writing(self):
        """Exit with one line where a file cannot be written, for example on a full disk."""
        try:
            yield
        except OSError as error:
            sys.exit(f"Cannot write: {error}. {self._last_save()} When that is fixed, {self._again()}.")

    def _again(self):
        without = " without --overwrite" if self.run.overwrite else ""
        return f"the same command{without} continues {self.run.directory}"

    def _last_save(self):
        if self.saved is None:
            return "There is no checkpoint yet."
        return "The last good checkpoint has {epoch} epochs and {step} steps.".format(**self.saved)

    def tick(self):
        """One step is done: move the bar; save where that is due; leave where a signal asked for it."""
        self.bar.update(self.plan.batch_size)
        if processes.group_device() == "cpu" or self.progress["step"] % STEPS_BETWEEN_AGREEMENTS == 0:
            self._save_or_stop()

    def end_epoch(self, metrics):
        """The current epoch is done: log its metrics and go on to the next; save and leave as `tick` does."""
        self.progress |= start_of(self.progress["epoch"] + 1)
        epoch = self.progress["epoch"]
        self.log(epoch, metrics)
        self._print_epoch(epoch, metrics)
        self._save_or_stop(last=self._steps() == self.plan.total_steps)

    def announce(self, start, last):
        """Print where the run is, what it computes and on what; if it is continued, how far it is, and by other code.

        Args:
            start, last: what is known of this start and of the one before.
        """
        what = f"{self.facts['parameters']:,} parameters, {self.facts['precision']} on {start['device']}"
        self._print(f"{self.run.directory}: {self.epochs} epochs of {self.plan.steps_per_epoch} steps, {what}")
        if self.steps_before:
            self._print("Continued: {epoch} epochs and {step} steps are done".format(**self.progress))
            before, now = (f"{s.get('commit')}{'' if s.get('clean') else ' with changes'}" for s in (last, start))
            if before != now:
                self._print(f"The code may be another: it was commit {before}, now it is {now}")

    def _print_epoch(self, epoch, metrics):
        shown = [f"{name} {metrics[name]:.4f}" for name in SHOWN if not math.isnan(metrics.get(name, math.nan))]
        seconds_a_step = (time.monotonic() - self.started_at) / max(self._steps() - self.steps_before, 1)
        left = tqdm.format_interval(seconds_a_step * (self.plan.total_steps - self._steps()))
        self._print(f"epoch {epoch} of {self.epochs}: {', '.join(shown)}, {left} left")

    def _print(self, line):
        if self.run.writer:
            tqdm.write(line)  # above the bar
            sys.stdout.flush()  # also where it goes to a file

    def _save_or_stop(self, last=False):
        """Save at the end, where the interval has passed or a signal came; all processes decide alike."""
        interval = max(SAVE_INTERVAL * self.save_seconds, LEAST_SAVE_INTERVAL)
        due = last or (self.run.writer and time.monotonic() - self.saved_at >= interval)
        due, stop_signal = processes.max_over_ranks(int(due), max(self.signals, default=0))
        if due or stop_signal:
            self.save()
        if stop_signal:
            self.signals.clear()
            print(f"Stopped; {self._again()}", file=sys.stderr)
            sys.exit(128 + stop_signal)  # the shell's code, 130 for Ctrl-C

    def save(self):
        """Write checkpoint.pt with the model, the optimizer and progress.

        Raises:
            SystemExit: the loss or a weight is not finite, or the file cannot be written; the checkpoint there stays.
        """
        step = self.progress["step"]
        loss = float(self.progress["loss_sum"]) / max(step, 1)
        self.check_finite(loss)
        if step:
            self.bar.set_postfix_str(f"epoch {self.progress['epoch'] + 1}, loss {loss:.4f}")
        if self.run.writer:
            started = time.monotonic()
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            with self.writing():
                path = self.run.directory / "checkpoint.pt"
                save_file(path, {"kind": "checkpoint", **state, "progress": self.progress})
            self.saved_at = time.monotonic()
            self.save_seconds = self.saved_at - started
        self.saved = {name: self.progress[name] for name in ("epoch", "step")}

    def check_finite(self, loss):
        """Leave where the mean loss so far or a weight is not finite, with the checkpoint as it was."""
        if not math.isfinite(loss):
            what = f"train/loss is {loss}"
        elif not math.isfinite(torch.nn.utils.get_total_norm(self.model.parameters())):
            what = "A weight is infinite or nan"
        else:
            return
        epoch, step = self.progress["epoch"] + 1, self.progress["step"]
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        sys.exit(
            f"{what} at epoch {epoch}, by step {step} (lr {lr:.2e}). {self._last_save()} A lower --base_learning_rate "
            f"or --precision float32 may help; the directory is {self.run.directory}"
        )

    def log(self, epoch, metrics):
        """Append one epoch's numbers (epoch from 1) to metrics.csv and, where they are not nan, to TensorBoard."""
        if not self.run.writer:
            return
        path, row = self.run.directory / "metrics.csv", {"epoch": epoch, **metrics}
        with self.writing():
            if self.columns and not row.keys() <= self.columns:  # begun by an older version of the program
                missing = dict.fromkeys(row, math.nan)
                self._rewrite_metrics([missing | old for old in read_metrics(self.run.directory)])
            row = {name: row.get(name, math.nan) for name in self.columns or row}
            with open(path, "a", newline="") as file:
                file.write(csv_text([row], header=not self.columns))
                file.flush()
                os.fsync(file.fileno())  # before a checkpoint says that the epoch is done
            self.columns = row.keys()
            for key, value in metrics.items():
                if not math.isnan(value):
                    self.board.add_scalar(key, value, epoch)

    def log_image(self, tag, image):
        """Show an image (3, H, W) uint8 of the current epoch in TensorBoard."""
        if self.run.writer:
            with self.writing():
                self.board.add_image(tag, image, self.progress["epoch"] + 1)

    def finish(self, content):
        """Write model.pt, the mark of a finished run, and its settings and last metrics as hyper-parameters."""
        if not self.run.writer:
            return
        settings = self.run.settings()
        pretraining = {f"pretraining/{key}": value for key, value in self.facts.get("pretraining", {}).items()}
        plain = {k: v for k, v in {**settings, **pretraining}.items() if isinstance(v, (bool, int, float, str))}
        last = {f"final/{key}": v for key, v in read_metrics(self.run.directory)[-1].items() if key != "epoch"}
        with self.writing():
            self.board.add_hparams(plain, last, run_name=".")
            save_file(self.run.directory / "model.pt", {"run_name": self.run.name, "arguments": settings, **content})


def csv_text(rows, header):
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
