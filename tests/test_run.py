import errno
import json
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch

from engine import processes
from engine import run as runs
from engine.checkpoints import load_file
from engine.records import find_runs, read_metrics, read_run
from engine.run import Run, start_of

FACTS = {"parameters": 2040, "precision": "float32", "images": "aa", "masks": "bb"}
FACTS |= {"train_images": 10, "peak_learning_rate": 1e-3}
CONTENT = {"kind": "toy"}
START = {"device": "cpu", "processes": 1, "threads": 1}
SETTINGS = {"dataset": "shapes", "train_images": None, "seed": 1, "base_learning_rate": 0.1}
IDENTITY = {"kind": "mae", "name": "toy", "settings": SETTINGS, "parent": None}


def toy():
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 40)
    return model, torch.optim.AdamW(model.parameters())


def run_of(log_dir, identity=IDENTITY, **arguments):
    places = {"dataset": "shapes", "data_dir": "data", "log_dir": str(log_dir), "overwrite": False}
    return Run(identity, {**places, **arguments})


def run_with(log_dir, **settings):
    return run_of(log_dir, {**IDENTITY, "settings": {**SETTINGS, **settings}})


def opened(log_dir, facts=FACTS, start=START, **arguments):
    """A session of a run of a toy: four epochs of two steps of five images."""
    plan = SimpleNamespace(batch_size=5, steps_per_epoch=2, total_steps=8)
    return run_of(log_dir, **arguments).open(*toy(), plan, facts, start, CONTENT)


def train(session, epochs):
    """Step, log and save as a script does, up to so many epochs; the losses tell the epoch."""
    while (epoch := session.progress["epoch"]) < epochs:
        session.model(torch.full((1, 50), float(epoch))).sum().backward()
        session.optimizer.step()
        session.optimizer.zero_grad()
        session.end_epoch({"train/loss": epoch / 3})
        session.save()
    return session.model


def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path):
    with opened(tmp_path / "whole") as run:
        whole = train(run, 4)
    with opened(tmp_path / "parts") as run:
        train(run, 2)
    with opened(tmp_path / "parts") as run:
        parts = train(run, 4)
    assert torch.equal(whole.weight, parts.weight)
    csv = [(tmp_path / name / "toy" / "metrics.csv").read_text() for name in ("whole", "parts")]
    assert csv[0] == csv[1]
    assert csv[0].count("epoch") == 1
    assert [row["train/loss"] for row in read_metrics(tmp_path / "parts" / "toy")] == [0, 1 / 3, 2 / 3, 1]
    starts = read_run(tmp_path / "parts" / "toy").starts
    assert [START.items() <= start.items() for start in starts] == [True, True]
    assert starts[0]["arguments"]["log_dir"] == str(tmp_path / "parts")


@pytest.mark.parametrize("tail", ["3,0.9\n4,0.7\n", "3,0.", "3,0.9\n4,0"])
def test_metrics_later_than_the_checkpoint_and_torn_lines_are_dropped(tmp_path, tail):
    with opened(tmp_path) as run:
        train(run, 2)
    path = tmp_path / "toy" / "metrics.csv"
    path.write_text(path.read_text() + tail)
    with opened(tmp_path) as run:
        train(run, 3)
    assert [row["epoch"] for row in read_metrics(tmp_path / "toy")] == [1, 2, 3]


def test_other_settings_are_refused_by_name_and_places_may_change(tmp_path):
    with opened(tmp_path):
        pass
    with pytest.raises(ValueError, match=r"toy is a run with base_learning_rate 0\.1, .* is 0\.2.*--overwrite"):
        run_with(tmp_path, base_learning_rate=0.2)
    run_of(tmp_path, data_dir="elsewhere", output_model_path="mae.pt")
    run_of(tmp_path, {**IDENTITY, "settings": {**SETTINGS, "base_learning_rate": 0.2}}, overwrite=True)


def test_another_encoder_under_the_same_name_is_refused(tmp_path):
    def child(digest):
        parent = {"name": "mae", "digest": digest, "settings": SETTINGS}
        return run_of(tmp_path, {**IDENTITY, "kind": "classifier", "parent": parent})

    plan = SimpleNamespace(batch_size=5, steps_per_epoch=2, total_steps=8)
    with child("aa").open(*toy(), plan, FACTS, START, CONTENT):
        pass
    child("aa")
    with pytest.raises(ValueError, match="other weights of the pretrained encoder"):
        child("bb")


def test_overwrite_starts_anew(tmp_path):
    with opened(tmp_path) as run:
        train(run, 2)
        run.finish()
    assert run_of(tmp_path).is_finished(FACTS)
    with opened(tmp_path, overwrite=True) as run:
        assert run.progress == start_of(0)
    assert not run_of(tmp_path).is_finished(FACTS)
    assert not (tmp_path / "toy" / "metrics.csv").exists()


def test_overwrite_drops_what_was_measured_of_the_run_before(tmp_path):
    with opened(tmp_path) as run:
        train(run, 1)
    made = ["features.json", "features_1000.csv", "features.png", "predictions.csv", "predictions_pets.csv"]
    made += ["reconstructions.png", "attention.png", "hf/config.json"]
    (tmp_path / "toy" / "hf").mkdir()
    for name in [*made, "notes.txt"]:
        (tmp_path / "toy" / name).write_text("of the run before")
    with opened(tmp_path, overwrite=True):
        assert not [name for name in made if (tmp_path / "toy" / name).exists()]
        assert (tmp_path / "toy" / "notes.txt").exists()  # the user's own


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"epoch,train/loss\n1,x\n", b"a,b\n1,2\n"])
def test_a_damaged_metrics_csv_is_named(tmp_path, damage):
    with opened(tmp_path) as run:
        train(run, 1)
    (tmp_path / "toy" / "metrics.csv").write_bytes(damage + b"\n")
    with pytest.raises(ValueError, match=r"Cannot read .*toy/metrics\.csv.*--overwrite"), opened(tmp_path):
        pass


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    refused = pytest.raises(ValueError, match="Another process is at work on")
    with opened(tmp_path), refused, opened(tmp_path):
        pass
    with opened(tmp_path):
        pass


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with opened(tmp_path) as run:
        train(run, 2)
        run.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_the_usual_code(number, tmp_path, capsys):
    handler = signal.getsignal(number)
    with opened(tmp_path) as run:
        run.progress |= {"step": 1, "loss_sum": 0.5}
        run.tick()
        assert not (tmp_path / "toy" / "checkpoint.pt").exists()
        os.kill(os.getpid(), number)
        run.progress |= {"step": 2, "loss_sum": 1.0}
        with pytest.raises(SystemExit) as leaving:
            run.tick()
    assert leaving.value.code == 128 + number
    assert load_file(tmp_path / "toy" / "checkpoint.pt")["progress"]["step"] == 2
    assert "same command continues" in capsys.readouterr().err
    assert signal.getsignal(number) is handler


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path, monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with opened(tmp_path) as run:
            os.kill(os.getpid(), signal.SIGHUP)
            train(run, 4)
            assert run.is_done()
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_signal_that_comes_after_the_last_save_ends_the_program_when_the_run_is_finished(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as leaving, opened(tmp_path) as run:  # noqa: PT012
        train(run, 4)
        os.kill(os.getpid(), signal.SIGINT)
        run.finish()
    assert leaving.value.code == 128 + signal.SIGINT
    assert run_of(tmp_path).is_finished(FACTS)
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_first_error_is_not_hidden_by_one_of_closing(tmp_path, monkeypatch):
    def full(self):
        raise OSError("No space left on device")

    with pytest.raises(IndexError, match="a student's mistake"), opened(tmp_path) as run:  # noqa: PT012
        monkeypatch.setattr(type(run.board), "close", full)
        raise IndexError("a student's mistake")
    with pytest.raises(SystemExit, match="Cannot write: No space left"), opened(tmp_path):
        pass


def test_processes_with_gpus_agree_on_saving_every_tenth_step(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.processes, "group_device", lambda: "cuda")
    monkeypatch.setattr(runs, "SAVE_INTERVAL", 0)
    monkeypatch.setattr(runs, "LEAST_SAVE_INTERVAL", 0)
    with opened(tmp_path) as run:
        saves = []
        monkeypatch.setattr(run, "save", lambda: saves.append(run.progress["step"]))
        for step in range(1, 26):
            run.progress["step"] = step
            run.tick()
    assert saves == [10, 20]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path, loss):
    with opened(tmp_path) as run:
        train(run, 2)
        before = (tmp_path / "toy" / "checkpoint.pt").read_bytes()
        run.progress |= {"step": 7, "loss_sum": torch.tensor(loss)}
        with pytest.raises(SystemExit, match=r"train/loss is (nan|inf) at epoch 3, by step 7 \(lr 1.00e-03\)"):
            run.save()
        assert (tmp_path / "toy" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("step", [0, 7])
def test_a_weight_that_is_no_number_is_never_saved(tmp_path, step):
    with opened(tmp_path) as run:
        model = train(run, 2)
        before = (tmp_path / "toy" / "checkpoint.pt").read_bytes()
        model.weight.data[3, 4] = float("nan")
        run.progress |= {"step": step, "loss_sum": 1.0}
        last = r"A weight is infinite or nan at epoch 3, by step \d .*checkpoint has 2 epochs and 0 steps"
        with pytest.raises(SystemExit, match=last):
            run.save()
        assert (tmp_path / "toy" / "checkpoint.pt").read_bytes() == before


def test_an_epochs_numbers_are_on_disk_before_its_checkpoint(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file)))
    with opened(tmp_path) as run:
        train(run, 1)
    csv, checkpoint = ((tmp_path / "toy" / name).stat().st_ino for name in ("metrics.csv", "checkpoint.pt"))
    assert synced.index(csv) < synced.index(checkpoint)


@pytest.mark.parametrize(("seconds", "first"), [(3.0, 151), (0.01, 61)])
def test_saving_takes_at_most_a_fiftieth_of_the_time_and_comes_at_most_once_a_minute(
    tmp_path, monkeypatch, seconds, first
):
    with opened(tmp_path) as run:
        train(run, 1)
        run.save_seconds, saved_at, saves = seconds, run.saved_at, []
        monkeypatch.setattr(run, "save", lambda: saves.append(passed))
        for passed in (0, first - 2, first):
            monkeypatch.setattr(runs.time, "monotonic", lambda passed=passed: saved_at + passed)
            run.tick()
    assert saves == [first]


def test_a_file_system_that_cannot_sync_directories_or_anything_will_do_and_a_bad_disk_will_not(tmp_path, monkeypatch):
    def fails(number):
        def fsync(file):
            raise OSError(number, os.strerror(number))

        return fsync

    for number in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # VirtualBox, CIFS, FUSE
        monkeypatch.setattr(os, "fsync", fails(number))
        with opened(tmp_path) as run:
            train(run, 1)
        assert (tmp_path / "toy" / "checkpoint.pt").exists()
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(ValueError, match="Input/output error"), opened(tmp_path):
        pass


def test_other_facts_are_refused_under_the_same_arguments(tmp_path):
    with opened(tmp_path):
        pass
    refused = pytest.raises(ValueError, match="is a run with parameters 2040, and now parameters is 7")
    with refused, opened(tmp_path, {**FACTS, "parameters": 7}):
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("key", "what"), [("images", "training images"), ("masks", "masks")])
def test_a_finished_run_does_not_answer_for_other_images_or_masks(tmp_path, key, what):
    with opened(tmp_path) as run:
        train(run, 1)
        run.finish()
    run = run_of(tmp_path)
    assert run.is_finished(FACTS)
    with pytest.raises(ValueError, match=f"toy is a run with other {what}.*--overwrite starts it again"):
        run.is_finished({**FACTS, key: "cc"})


def test_the_time_left_is_without_the_first_step_which_compiles(tmp_path, capsys, monkeypatch):
    """Of a start: 43 s for the first step, 100 s for each other; a start that ends with its first says nothing."""
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])

    def step(session, seconds):
        now[0] += seconds
        session.progress["step"] += 1
        return session.tick()

    with opened(tmp_path) as run:
        assert [step(run, 43), step(run, 100)] == [True, False]
        run.end_epoch({"train/loss": 0.5})
        assert not step(run, 100)
        run.save()
    with opened(tmp_path) as run:
        assert step(run, 43)
        run.end_epoch({"train/loss": 0.5})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert lines == ["epoch 1 of 4: train/loss 0.5000, 10:00 left", "epoch 2 of 4: train/loss 0.5000"]


def test_a_run_says_where_it_is_and_how_each_epoch_went(tmp_path, capsys):
    with opened(tmp_path) as run:
        run.end_epoch({"train/loss": 0.5, "lr": 0.1, "test/acc": 0.25, "probe/knn_acc": math.nan})
        run.save()
    with opened(tmp_path) as run:
        pass
    lines = capsys.readouterr().out.splitlines()
    rate = "peak learning rate 0.001"
    assert lines[0] == f"{tmp_path / 'toy'}: 4 epochs of 2 steps, 10 images, {rate}, 2,040 parameters, float32 on cpu"
    assert re.fullmatch(r"epoch 1 of 4: train/loss 0\.5000, test/acc 0\.2500, 00:\d\d left", lines[1])
    assert lines[2:] == [lines[0], "Continued: 1 epoch and 0 steps are done"]
    with opened(tmp_path, start={**START, "compile_mode": "default"}):
        assert capsys.readouterr().out.startswith(f"{lines[0]}; the first step compiles, about a minute\n")
    for source, commit, clean in (("1", "abc", True), ("2", "abc", False), ("3", "abc", False), ("3", "abd", True)):
        with opened(tmp_path, start={**START, "source": source, "commit": commit, "clean": clean}):
            pass
    said = [line for line in capsys.readouterr().out.splitlines() if "changed" in line]
    assert said == [
        "The program has changed since the last start (commit None with changes, now abc).",
        "The program has changed since the last start (commit abc, now abc with changes).",
        "The program has changed since the last start (commit abc with changes, now abc with changes).",
    ]


def test_a_repeated_signal_is_one_and_a_later_one_ends_the_process_at_once(monkeypatch):
    ended, clock = [], [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    with processes.noted_signals() as noted:
        signal.raise_signal(signal.SIGTERM)
        clock[0] += 1  # the same signal, which torchrun passes on
        signal.raise_signal(signal.SIGTERM)
        assert noted == [signal.SIGTERM]
        clock[0] += 10
        monkeypatch.setattr(processes.os, "kill", lambda pid, number: ended.append(number))
        signal.raise_signal(signal.SIGTERM)
        assert ended == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        noted.clear()


def test_a_failed_start_gives_the_run_back(tmp_path):
    with opened(tmp_path) as run:
        train(run, 1)
    (tmp_path / "toy" / "checkpoint.pt").write_bytes(b"damaged")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(2):  # the second time, too, it is the damage and not the lock
        with pytest.raises(ValueError, match="Cannot read"), opened(tmp_path):
            pass
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_overwriting_leaves_no_checkpoint_without_its_config(tmp_path, monkeypatch):
    with opened(tmp_path) as run:
        train(run, 1)

    deleted, unlink = [], runs.Path.unlink

    def killed(path, **options):
        left = {other.name for other in path.parent.iterdir()}
        assert "config.json" in left or not left & {"checkpoint.pt", "model.pt", "metrics.csv"}
        deleted.append(path.name)
        unlink(path, **options)

    monkeypatch.setattr(runs.Path, "unlink", killed)
    with opened(tmp_path, overwrite=True):
        assert {"checkpoint.pt", "metrics.csv", "config.json"} <= {*deleted}
        assert not {"checkpoint.pt", "metrics.csv"} & {path.name for path in (tmp_path / "toy").iterdir()}


def test_a_finished_run_has_a_model_and_can_be_exported(tmp_path):
    with opened(tmp_path) as run:
        train(run, 1)
        assert not read_run(tmp_path / "toy").finished
        run.finish()
    stored = load_file(tmp_path / "toy")
    known = {
        "kind": "toy",
        "name": "toy",
        "settings": SETTINGS,
        "parent": None,
        "dataset": "shapes",
        "data_dir": "data",
    }
    assert stored.keys() - {"model"} == known.keys()
    assert {name: stored[name] for name in known} == known
    run_of(tmp_path, output_model_path=str(tmp_path / "out" / "mine.pt")).export()
    assert load_file(tmp_path / "out" / "mine.pt")["name"] == "toy"


def test_a_run_is_read_as_a_record_also_where_it_was_moved(tmp_path):
    with opened(tmp_path / "logs") as run:
        train(run, 4)
        run.finish()
    features = {"name": "toy", "settings": {}, "rows": [{"knn/acc": 0.5}]}
    (tmp_path / "logs" / "toy" / "features.json").write_text(json.dumps(features))
    (tmp_path / "logs" / "toy" / "features_of_another.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "logs" / "toy" / "hf").mkdir()
    (tmp_path / "logs" / "toy" / "hf" / "config.json").write_text('{"model_type": "vit"}')  # an exported model's
    (tmp_path / "logs" / "toy").rename(tmp_path / "logs" / "renamed")
    (record,) = find_runs(tmp_path, tmp_path / "logs")
    assert record.directory == tmp_path / "logs" / "renamed"
    assert (record.kind, record.name, record.settings, record.parent) == ("mae", "toy", SETTINGS, None)
    assert record.finished
    assert record.facts == FACTS
    assert [row["epoch"] for row in record.metrics] == [1, 2, 3, 4]
    assert record.features == [features]
    with pytest.raises(ValueError, match="is not a run's"):
        read_run(tmp_path / "logs" / "renamed" / "hf")


def test_tensorboard_has_the_numbers_of_the_csv_but_nan(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with opened(tmp_path) as run:
        train(run, 2)
    with opened(tmp_path) as run:  # goes on with the third epoch, whose numbers it had not saved
        run.log(3, {"train/loss": 9.0})
    with opened(tmp_path) as run:
        run.log_image("picture", torch.zeros(3, 4, 4, dtype=torch.uint8))
        train(run, 3)
        run.log(4, {"train/loss": float("nan")})
    events = EventAccumulator(str(tmp_path / "toy"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    written = [(row["epoch"], row["train/loss"]) for row in read_metrics(tmp_path / "toy")[:3]]
    assert shown == [(epoch, pytest.approx(value)) for epoch, value in written]
    assert [event.step for event in events.Images("picture")] == [3]
