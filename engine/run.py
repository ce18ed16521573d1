"""One run on disk: its config, metrics, TensorBoard events and checkpoints; continuing it.

A run is a directory `<log_dir>/<name>/` with config.json, metrics.csv, events.out.tfevents.*, checkpoint.pt and, at
the end, model.pt and a classifier's predictions.csv. The name says what sets the run apart, so the same command again
finds its run and continues it.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine import processes
from engine.checkpoints import load_file, save_file
from engine.errors import UserError, as_user_error, counted
from engine.files import check_writable, locked, replacing
from engine.predictions import write_predictions
from engine.records import csv_text, read_config, read_metrics, read_run

# Digests that must not change, even if the run is finished, and their words in the error message
DIGESTS = {"images": "training images", "test_set": "test images", "parent": "weights of the pretrained encoder"}
DIGESTS |= {"masks": "masks, because the code of the strategy has changed"}
# What --overwrite drops: files of the training, then what other scripts wrote beside them
OF_A_RUN = ("*.pt", "metrics.csv", "events.out.tfevents.*", "config.json")
OF_A_RUN += ("*features*", "predictions*", "reconstructions*", "attention*")
SAVE_INTERVAL = 50  # times as long as a save takes; so saving takes under 2 % of the time
LEAST_SAVE_INTERVAL = 60  # seconds: files of 100 MB would else wear the disk
SHOWN = ("train/loss", "test/loss", "val/acc", "test/acc", "test/balanced_acc", "probe/knn_acc")  # after each epoch
STEPS_BETWEEN_AGREEMENTS = 10  # processes on GPUs agree whether to save; each time, all wait for the GPUs


class Run:
    """A run's directory. A run that it already holds must have the same settings, unless `overwrite` deletes it.

    Every process makes a Run; only the first process writes.

    Args:
        identity: the part of config.json that never changes: kind ("mae" or "classifier"), name, settings (what is
            computed, by flag), parent (None, or name, digest and settings of the model whose weights it starts from).
        arguments: the other flags, {name: value}: where and how it computes. log_dir: where its directory is made;
            overwrite: delete an earlier run of this name and start again; output_model_path: where a copy of the
            finished model goes.

    Raises:
        UserError: the directory holds a run with other settings.
    """

    def __init__(self, identity, arguments):
        self.identity, self.name, self.arguments = identity, identity["name"], arguments
        self.directory, self.overwrite = Path(arguments["log_dir"]) / self.name, arguments["overwrite"]
        self._checked_record({})

    def is_finished(self, facts):
        """Whether this process finds the run finished.

        Raises:
            UserError: it was a run with other facts.
        """
        stored = self._checked_record(facts)
        return stored is not None and stored.finished

    def _checked_record(self, facts):
        """The run's Record; None without config.json or with overwrite. UserError: settings, parent or facts differ."""
        checkpoint = self.directory / "checkpoint.pt"
        with as_user_error(OSError):
            known, saved = (self.directory / "config.json").exists(), checkpoint.exists()
        if self.overwrite or not (known or saved):
            return None
        stored = read_run(self.directory) if known else None
        told = stored._asdict() if known else load_file(checkpoint, "checkpoint")  # which says the same
        if "settings" not in told:
            raise UserError(f"{self.directory} has lost its config.json: copy it back, or give --overwrite.")
        self._check_same(told["settings"], self.identity["settings"])
        parents = told["parent"], self.identity["parent"]
        self._check_same(*({"parent": parent and parent["digest"]} for parent in parents))
        self._check_same(told["facts"], facts)
        return stored

    def _check_same(self, stored, now):
        for key in sorted(stored.keys() & now.keys()):
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
    def open(self, model, optimizer, plan, facts, start, content):
        """Lock the directory, restore the last checkpoint and note signals, until the block ends.

        Args:
            model, optimizer: the last checkpoint is loaded into them; later checkpoints save them.
            plan: with batch_size, steps_per_epoch and total_steps.
            facts: what follows from the settings and the data; must be the same as when the run began.
            start: what may differ each time the run is continued.
            content: goes into the model's files, beside what the run adds: kind, model_args and a classifier's classes.

        Yields:
            The Session, which logs, saves and finishes the run.

        Raises:
            UserError: another process is at work on this run, the facts differ, the checkpoint is damaged or another
                run's, or not all processes see it.
        """
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(processes.noted_signals())
            with processes.together():  # nobody reads what is still to be cleared
                if processes.is_first():
                    self._lock(stack)
                stored = self._checked_record(facts)
                if processes.is_first():
                    with as_user_error(OSError):
                        self._begin(facts, [*(stored.starts if stored else []), {**start, "arguments": self.arguments}])
            with processes.together():
                session = Session(self, model, optimizer, plan, signals, content, facts)
            with processes.together():
                session.check_same_start()
            if processes.is_first():
                session.announce(facts, start, stored.starts[-1] if stored else start)
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

    def _begin(self, facts, starts):
        if path := self.arguments.get("output_model_path"):
            check_writable(Path(path).parent, "--output_model_path")
        if self.overwrite:
            shutil.rmtree(self.directory / "hf", ignore_errors=True)  # an export
            for pattern in OF_A_RUN:
                for path in self.directory.glob(pattern):
                    path.unlink()
        self.write_config({**self.identity, "finished": False, "facts": facts, "starts": starts})

    def write_config(self, config):
        with replacing(self.directory / "config.json") as file:
            file.write(json.dumps(config, indent=1).encode())

    def pass_over(self):
        """Print that the run is finished, export its model, and return its directory."""
        if processes.is_first():
            print(f"Finished already: {self.directory}")
        self.export()
        return self.directory

    def export(self):
        """Copy the finished model.pt to a path of the user's, if one was given."""
        if (path := self.arguments.get("output_model_path")) and processes.is_first():
            path = Path(path)
            with as_user_error(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as file:
                    file.write((self.directory / "model.pt").read_bytes())


def start_of(epoch):
    """The progress after `epoch` complete epochs, before the next step."""
    return {"epoch": epoch, "step": 0, "loss_sum": 0.0, "seconds": 0.0}


def done(progress):
    """1 epoch and 3 steps."""
    return f"{counted(progress['epoch'], 'epoch')} and {counted(progress['step'], 'step')}"


class Session:
    """The work of one process on a run, from a start to a stop: it keeps the progress, logs and saves.

    `Run.open` makes it. progress is a dictionary: epoch (complete epochs), step (complete steps of the current epoch),
    loss_sum and seconds (of these steps), and anything that a script adds.
    """

    def __init__(self, run, model, optimizer, plan, signals, content, facts):
        self.run, self.model, self.optimizer, self.plan, self.signals = run, model, optimizer, plan, signals
        self.content, self.facts = content, facts
        self.epochs = plan.total_steps // plan.steps_per_epoch
        self.saved = None  # epoch and step of the last save
        self.saved_at, self.save_seconds = time.monotonic(), 0.2
        self.progress = self._restore()
        self.steps_before = self._steps()
        self.timed_from, self.timed_step = time.monotonic(), self.steps_before  # for the time left
        self.board = self._board() if processes.is_first() else None
        self.bar = tqdm(  # loss, images/s and the time left of the whole run, on a terminal
            total=plan.total_steps * plan.batch_size,
            initial=self.steps_before * plan.batch_size,
            desc=run.name.split("_")[0],
            unit="img",
            unit_scale=True,
            disable=None if processes.is_first() else True,
        )

    def _restore(self):
        """Load the last checkpoint, if any, and return its progress; drop later epochs from metrics.csv."""
        path, progress = self.run.directory / "checkpoint.pt", start_of(0)
        if path.exists():
            state = load_file(path, "checkpoint")
            made_by, now = state.get("optimizer_class"), type(self.optimizer).__name__
            if made_by not in (None, now):
                raise UserError(
                    f"{path} holds the state of the optimizer {made_by}, and by the code it is now {now}. Undo that "
                    f"change to continue the run, or start it again with --overwrite."
                )
            try:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                progress = state["progress"]
            except (KeyError, RuntimeError, ValueError) as error:
                raise UserError(f"{path} is of another run; start again with --overwrite. {error}") from error
            self.saved = {name: progress[name] for name in ("epoch", "step")}
        self.rows = [row for row in read_metrics(self.run.directory) if row["epoch"] <= progress["epoch"]]
        return progress

    def _steps(self):
        return self.progress["epoch"] * self.plan.steps_per_epoch + self.progress["step"]

    def check_same_start(self):
        """Raises UserError where this process found another checkpoint than the first, or none."""
        mine = [self.progress["epoch"], self.progress["step"]]
        if processes.broadcast(mine) != mine:
            raise UserError(
                f"Process {processes.rank()} does not see process 0's checkpoint in {self.run.directory}; --log_dir "
                f"must be on a file system that all machines share."
            )

    def _board(self):
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
        return f"The last good checkpoint has {done(self.saved)}."

    @property
    def epoch(self):
        """The current epoch, from 1."""
        return self.progress["epoch"] + 1

    def is_done(self):
        """Whether all epochs are complete."""
        return self.progress["epoch"] == self.epochs

    def tick(self):
        """Called after each step: move the bar, save if that is due, save and exit if a signal came.

        Returns:
            Whether it was the first step since this start, which takes longer than the others.
        """
        first = self._steps() == self.steps_before + 1
        if first:
            self.timed_from, self.timed_step = time.monotonic(), self._steps()
            self.bar.unpause()
        self.bar.update(self.plan.batch_size)
        if processes.group_device() == "cpu" or self.progress["step"] % STEPS_BETWEEN_AGREEMENTS == 0:
            self._save_or_stop()
        return first

    def end_epoch(self, metrics):
        """Called after each epoch: log its metrics, begin the next; save and exit as in `tick`, save after the last."""
        self.progress |= start_of(self.progress["epoch"] + 1)
        epoch = self.progress["epoch"]
        self.log(epoch, metrics)
        self._print_epoch(epoch, metrics)
        self._save_or_stop(last=self._steps() == self.plan.total_steps)

    def announce(self, facts, start, last):
        """Print the run's directory, what it computes and where; if continued, its progress and if the code changed.

        Args:
            facts: of the run; start, last: what config.json records of this start and of the one before.
        """
        epochs, steps = counted(self.epochs, "epoch"), counted(self.plan.steps_per_epoch, "step")
        images = counted(facts["train_images"], "label" if self.run.identity["kind"] == "classifier" else "image")
        rate = f"peak learning rate {facts['peak_learning_rate']:.2g}"
        what = f"{facts['parameters']:,} parameters, {facts['precision']} on {start['device']}"
        compiling = "; the first step compiles, about a minute" if start.get("compile_mode") else ""
        self._print(f"{self.run.directory}: {epochs} of {steps}, {images}, {rate}, {what}{compiling}")
        if self.steps_before:
            self._print(f"Continued: {done(self.progress)} are done")
            if last.get("source") != start.get("source"):
                before, now = (f"{s.get('commit')}{'' if s.get('clean') else ' with changes'}" for s in (last, start))
                self._print(f"The program has changed since the last start (commit {before}, now {now}).")

    def _print_epoch(self, epoch, metrics):
        shown = [f"{name} {metrics[name]:.4f}" for name in SHOWN if not math.isnan(metrics.get(name, math.nan))]
        if timed := self._steps() - self.timed_step:
            seconds = (time.monotonic() - self.timed_from) / timed * (self.plan.total_steps - self._steps())
            shown.append(f"{tqdm.format_interval(seconds)} left")
        self._print(f"epoch {epoch} of {self.epochs}: {', '.join(shown)}")

    def _print(self, line):
        if processes.is_first():
            tqdm.write(line)  # above the bar
            sys.stdout.flush()  # also where it goes to a file

    def _save_or_stop(self, last=False):
        """Save after the last step or the interval; on a signal, save and exit. All processes decide alike."""
        interval = max(SAVE_INTERVAL * self.save_seconds, LEAST_SAVE_INTERVAL)
        due = last or (processes.is_first() and time.monotonic() - self.saved_at >= interval)
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
        if processes.is_first():
            started = time.monotonic()
            state = {"optimizer": self.optimizer.state_dict(), "optimizer_class": type(self.optimizer).__name__}
            state |= {"kind": "checkpoint", "of": self.content["kind"], "facts": self.facts, "progress": self.progress}
            with self.writing():
                save_file(self.run.directory / "checkpoint.pt", {**self._file(), **state})
            self.saved_at = time.monotonic()
            self.save_seconds = self.saved_at - started
        self.saved = {name: self.progress[name] for name in ("epoch", "step")}

    def check_finite(self, loss):
        """Exit if the mean loss so far or a weight is not finite; the last checkpoint stays as it was."""
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
        """Add one epoch's numbers (epoch from 1) to metrics.csv and, where they are not nan, to TensorBoard."""
        if not processes.is_first():
            return
        self.rows.append({"epoch": epoch, **metrics})
        with self.writing():
            with replacing(self.run.directory / "metrics.csv") as file:  # before a checkpoint says the epoch is done
                file.write(csv_text(self.rows).encode())
            for key, value in metrics.items():
                if not math.isnan(value):
                    self.board.add_scalar(key, value, epoch)

    def log_image(self, tag, image):
        """Show an image (3, H, W) uint8 of the current epoch in TensorBoard."""
        if processes.is_first():
            with self.writing():
                self.board.add_image(tag, image, self.progress["epoch"] + 1)

    def _file(self):
        """The content of a model's file: with the weights, the images' place and what config.json says of the run."""
        images = {flag: self.run.arguments[flag] for flag in ("dataset", "data_dir")}
        own = {name: self.run.identity[name] for name in ("name", "settings", "parent")}
        return {**self.content, **images, **own, "model": self.model.state_dict()}

    def finish(self):
        """Write the settings to TensorBoard, then model.pt, then predictions.csv if progress has predictions (2, N:
        labels, predicted); last, mark the run as finished in config.json.
        """
        if not processes.is_first():
            return
        known = self.run.identity
        parent = known["parent"]["settings"] if known["parent"] else {}
        told = {**known["settings"], **{f"parent/{name}": value for name, value in parent.items()}}
        with self.writing():
            self.board.add_hparams({name: v for name, v in told.items() if v is not None}, {}, run_name=".")
            save_file(self.run.directory / "model.pt", self._file())
            if "predictions" in self.progress:
                path = self.run.directory / "predictions.csv"
                write_predictions(path, self.content["classes"], *self.progress["predictions"])
            self.run.write_config(read_config(self.run.directory) | {"finished": True})
