import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runs
from runs import Run, load_file, read_metrics, save_file, start_of

ARGUMENTS = {"dataset": "shapes", "data_dir": "data", "train_images": None, "seed": 1, "base_learning_rate": 0.1}


def toy():
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 40)
    return model, torch.optim.AdamW(model.parameters())


def opened(tmp_path, arguments=ARGUMENTS, **options):
    run = Run(tmp_path, "toy", arguments, **options)
    run.open({"parameters": 2040})
    return run


def train(run, epochs):
    """Log, save and step as a script does; the losses tell the epoch."""
    model, optimizer = toy()
    start = run.restore(model, optimizer)
    run.start_bar(10, 5, epochs, start)
    for epoch in range(start["epoch"], epochs):
        model(torch.full((1, 50), float(epoch))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.end_epoch(start_of(epoch + 1), {"train/loss": epoch / 3}, last=True)
    return model


def test_names_tell_what_sets_runs_apart():
    args = {"dataset": "cifar10", "data_dir": "data", "train_images": None, "img_size": 32, "patch_size": 2}
    args |= {"embed_dim": 192, "encoder_depth": 12, "num_heads": 3, "decoder_depth": 4, "mask_ratio": 0.75}
    args |= {"mask_strategy": "random", "total_epoch": 2000, "batch_size": 4096, "seed": 42, "augment": False}
    args |= {"val_images": None}
    name = runs.mae_run_name(args)
    assert name == "mae_cifar10_i32_p2_w192_e12_h3_d4_random_r0.75_ep2000_b4096_s42"
    changes = {
        "train_images": 100,
        "img_size": 64,
        "patch_size": 4,
        "embed_dim": 96,
        "encoder_depth": 6,
        "num_heads": 6,
    }
    changes |= {"decoder_depth": 8, "mask_ratio": 0.5, "mask_strategy": "grid", "total_epoch": 1, "batch_size": 8}
    changes |= {"seed": 1, "augment": True, "dataset": "shapes"}
    names = {runs.mae_run_name({**args, key: value}) for key, value in changes.items()}
    assert len(names | {name}) == len(changes) + 1
    assert "_pets_" in runs.mae_run_name({**args, "dataset": "folder", "data_dir": "some/pets"})
    assert runs.classifier_run_name(args, name) == f"cls_cifar10_ep2000_b4096_s42_from_{name}"
    assert runs.classifier_run_name(args, None) == "cls_cifar10_ep2000_b4096_s42_scratch_i32_p2_w192_e12_h3"
    name = runs.classifier_run_name({**args, "train_images": 500, "val_images": 100}, None)
    assert name == "cls_cifar10-500_val100_ep2000_b4096_s42_scratch_i32_p2_w192_e12_h3"


# --- files ---


def test_a_saved_file_comes_back_and_leaves_nothing_beside_it(tmp_path):
    save_file(tmp_path / "deep" / "a.pt", {"kind": "toy", "weights": torch.arange(5), "names": ["a"]})
    content = load_file(tmp_path / "deep" / "a.pt", "toy")
    assert content["weights"].tolist() == [0, 1, 2, 3, 4]
    assert os.listdir(tmp_path / "deep") == ["a.pt"]


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    save_file(tmp_path / "a.pt", {"kind": "toy", "value": 1})

    def fails_half_way(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fails_half_way)
    with pytest.raises(OSError, match="No space"):
        save_file(tmp_path / "a.pt", {"kind": "toy", "value": 2})
    monkeypatch.undo()
    assert load_file(tmp_path / "a.pt")["value"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "a.pt"
    save_file(path, {"kind": "toy", "weights": torch.randn(2000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep >= 1 else int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"Cannot read .*a\.pt"):
        load_file(path)


def test_files_that_are_not_what_is_needed_are_named(tmp_path):
    save_file(tmp_path / "a.pt", {"kind": "ViT_Classifier"})
    with pytest.raises(ValueError, match="holds ViT_Classifier; MAE_ViT is needed"):
        load_file(tmp_path / "a.pt", "MAE_ViT")
    torch.save(torch.ones(2), tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no model of this program"):
        load_file(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"No file .*c\.pt"):
        load_file(tmp_path / "c.pt")


def test_digest_changes_with_any_weight():
    state = toy()[0].state_dict()
    before = runs.digest(state)
    assert before == runs.digest({key: value.clone() for key, value in state.items()})
    state["bias"][3] += 1e-6
    assert runs.digest(state) != before


# --- runs ---


def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path):
    with opened(tmp_path / "whole") as run:
        whole = train(run, 4)
    with opened(tmp_path / "parts") as run:
        train(run, 2)
    with opened(tmp_path / "parts") as run:
        assert run.config["starts"][0]["python"]
        parts = train(run, 4)
    assert torch.equal(whole.weight, parts.weight)
    csv = [(tmp_path / name / "toy" / "metrics.csv").read_text() for name in ("whole", "parts")]
    assert csv[0] == csv[1]
    assert csv[0].count("epoch") == 1
    assert [row["train/loss"] for row in read_metrics(tmp_path / "parts" / "toy")] == [0, 1 / 3, 2 / 3, 1]
    assert len(json.loads((tmp_path / "parts" / "toy" / "config.json").read_text())["starts"]) == 2


@pytest.mark.parametrize("tail", ["3,0.9\n4,0.7\n", "3,0.", "3,0.9\n4,0"])
def test_metrics_later_than_the_checkpoint_and_torn_lines_are_dropped(tmp_path, tail):
    with opened(tmp_path) as run:
        train(run, 2)
    path = run.directory / "metrics.csv"
    path.write_text(path.read_text() + tail)
    with opened(tmp_path) as run:
        train(run, 3)
    assert [row["epoch"] for row in read_metrics(run.directory)] == [1, 2, 3]


def test_other_arguments_are_refused_by_name_and_places_may_change(tmp_path):
    with opened(tmp_path):
        pass
    with pytest.raises(ValueError, match=r"is a run with base_learning_rate 0\.1, and now base_learning_rate is 0\.2"):
        Run(tmp_path, "toy", {**ARGUMENTS, "base_learning_rate": 0.2})
    Run(tmp_path, "toy", {**ARGUMENTS, "data_dir": "elsewhere"})
    Run(tmp_path, "toy", {**ARGUMENTS, "val_images": None})  # stored before there was such an argument
    Run(tmp_path, "toy", {**ARGUMENTS, "base_learning_rate": 0.2}, overwrite=True)


def test_overwrite_starts_anew(tmp_path):
    with opened(tmp_path) as run:
        train(run, 2)
        run.finish({"kind": "toy"})
    assert Run(tmp_path, "toy", ARGUMENTS).finished
    with opened(tmp_path, overwrite=True) as run:
        assert not run.finished
        assert run.restore(*toy())["epoch"] == 0
    assert not (run.directory / "metrics.csv").exists()


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    with opened(tmp_path), pytest.raises(ValueError, match="Another process is at work on"):
        opened(tmp_path)
    with opened(tmp_path):
        pass


def test_only_the_writer_writes(tmp_path):
    with opened(tmp_path, writer=False) as run:
        train(run, 2)
        run.finish({"kind": "toy"})
    assert not list(tmp_path.iterdir())


def test_a_signal_saves_and_leaves_with_the_usual_code(tmp_path, capsys):
    with opened(tmp_path) as run:
        start = run.restore(*toy())
        run.start_bar(10, 5, 3, start)
        run.tick({**start, "step": 1, "loss_sum": 0.5})
        assert not (run.directory / "checkpoint.pt").exists()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as leaving:
            run.tick({**start, "step": 2, "loss_sum": 1.0})
    assert leaving.value.code == 128 + signal.SIGTERM
    assert load_file(run.directory / "checkpoint.pt")["progress"]["step"] == 2
    assert "same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path, loss):
    with opened(tmp_path) as run:
        train(run, 2)
        before = (run.directory / "checkpoint.pt").read_bytes()
        with pytest.raises(SystemExit, match=r"train/loss is (nan|inf) at epoch 3, by step 7 \(lr 1.00e-03\)"):
            run.save({"epoch": 2, "step": 7, "loss_sum": torch.tensor(loss), "seconds": 0.0})
        assert (run.directory / "checkpoint.pt").read_bytes() == before


def test_a_weight_that_is_no_number_is_never_saved(tmp_path):
    with opened(tmp_path) as run:
        model = train(run, 2)
        before = (run.directory / "checkpoint.pt").read_bytes()
        model.weight.data[3, 4] = float("nan")
        last = r"A weight is infinite or nan at epoch 3, by step 7 .*checkpoint has 2 epochs and 0 steps"
        with pytest.raises(SystemExit, match=last):
            run.save({**start_of(2), "step": 7, "loss_sum": 1.0})
        assert (run.directory / "checkpoint.pt").read_bytes() == before


def test_an_epochs_numbers_are_on_disk_before_its_checkpoint(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(runs.os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file)))
    with opened(tmp_path) as run:
        train(run, 1)
    csv, checkpoint = ((run.directory / name).stat().st_ino for name in ("metrics.csv", "checkpoint.pt"))
    assert synced.index(csv) < synced.index(checkpoint)


def test_saving_takes_at_most_a_fiftieth_of_the_time(tmp_path, monkeypatch):
    with opened(tmp_path) as run:
        train(run, 1)
        run.save_seconds = 3.0
        for passed, due in ((0, False), (149, False), (151, True)):
            monkeypatch.setattr(runs.time, "monotonic", lambda passed=passed: run.saved_at + passed)
            assert run.save_due() == due


def test_other_facts_are_refused_under_the_same_arguments(tmp_path):
    with opened(tmp_path):
        pass
    with pytest.raises(ValueError, match="is a run with parameters 2040, and now parameters is 7"):
        Run(tmp_path, "toy", ARGUMENTS).open({"parameters": 7})
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_overwriting_leaves_no_checkpoint_without_its_config(tmp_path, monkeypatch):
    with opened(tmp_path) as run:
        train(run, 1)

    def killed(path):
        left = {other.name for other in path.parent.iterdir()}
        assert "config.json" in left or not left & {"checkpoint.pt", "model.pt", "metrics.csv"}
        os.unlink(path)

    monkeypatch.setattr(runs.Path, "unlink", killed)
    with opened(tmp_path, overwrite=True):
        pass


def test_a_machine_without_git_runs_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = runs.environment()
    assert environment["commit"] is None
    assert environment["clean"] is None


def test_the_command_of_a_run_is_the_one_that_was_typed(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "tell.py").write_text("import runs; print(runs.environment()['command'])")
    typed = [sys.executable, "-m", "scripts.tell", "--output", "a b"]
    paths = {**os.environ, "PYTHONPATH": str(Path(runs.__file__).parent)}
    said = subprocess.check_output(typed, cwd=tmp_path, env=paths, text=True)
    assert said.strip().endswith(" -m scripts.tell --output 'a b'")


def test_a_finished_run_has_a_model_and_can_be_exported(tmp_path):
    with opened(tmp_path) as run:
        train(run, 1)
        run.finish({"kind": "toy", "model": {}})
        run.export(tmp_path / "out" / "mine.pt")
    assert load_file(tmp_path / "out" / "mine.pt")["run_name"] == "toy"
    assert load_file(run.directory)["kind"] == "toy"


def test_tensorboard_has_the_numbers_of_the_csv_but_nan(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with opened(tmp_path) as run:
        train(run, 3)
        run.log(4, {"train/loss": float("nan")})
    events = EventAccumulator(str(run.directory))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    written = [(row["epoch"], row["train/loss"]) for row in read_metrics(run.directory)[:3]]
    assert shown == [(epoch, pytest.approx(value)) for epoch, value in written]
