"""The shell scripts, with a Python that only notes what it is asked."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

import evaluate_features
import mae_pretrain
import train_classifier
import visualize_predictions
from masks import MASK_STRATEGIES
from scripts import plot_curves, sweep

ROOT = Path(__file__).parents[1]
SCRIPTS = (mae_pretrain, evaluate_features, train_classifier, visualize_predictions)
MODULES = {f"{module.__name__}.py": module for module in SCRIPTS}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A directory with the shell scripts, and a Python that notes in `calls` what it is asked."""
    files = {f"scripts/{path.name}": path.read_text() for path in (ROOT / "scripts").glob("*.sh")}
    files |= {
        "scripts/setup.sh": "#!/bin/sh\n",
        ".venv/bin/python": '#!/bin/bash\nprintf "%q " "$@" >>calls; echo >>calls\n',
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls_of(script, checkout, *flags, **environment):
    """The words of each call of Python."""
    (checkout / "calls").unlink(missing_ok=True)
    environment = {"PATH": os.environ["PATH"], **environment}
    command = ["bash", f"scripts/{script}", *flags]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in (checkout / "calls").read_text().splitlines()]


RATIOS = [f"0.{digits}" for digits in (1, 2, 3, 4, 5, 6, 7, 75, 8, 9)]


@pytest.mark.parametrize(
    ("script", "flag", "values"),
    [
        ("ablate_decoder_depth.sh", "--decoder_depth", ["2", "4", "8"]),
        ("ablate_mask_strategy.sh", "--mask_strategy", list(MASK_STRATEGIES)),
        ("ablate_mask_ratio.sh", "--mask_ratio", RATIOS),
    ],
)
def test_an_ablation_is_a_sweep_that_takes_more_flags(script, flag, values, checkout):
    expected = [{"--seed": seed, flag: value} for seed in ("42", "43", "44") for value in values]
    shorter = [{"--seed": "1", flag: value, "--total_epoch": "9"} for value in values]
    for more, settings in (("", expected), ("--seed 1 --total_epoch 9 --list", shorter)):
        (call,) = calls_of(script, checkout, *more.split())
        args = sweep.parse_args(call[2:])
        assert (call[:2], args.log_dir, args.list) == (["-m", "scripts.sweep"], "logs/ablation", bool(more))
        assert args.settings == settings


@pytest.mark.parametrize("environment", [{}, {"QUICK": "1"}, {"LOGS": "there", "REPORT": "page"}])
def test_the_report_is_of_both_ablations_and_the_classifiers_from_scratch(environment, checkout, capsys):
    *sweeps, report = calls_of("reproduce_report.sh", checkout, **environment)
    logs, page = environment.get("LOGS"), environment.get("REPORT")
    quick = "quick_" if "QUICK" in environment else ""
    assert report[:2] == ["-m", "scripts.report"]
    assert report[2:] == [logs or f"logs/{quick}ablation", "--output", page or f"logs/{quick}report"]
    tried = []
    for call in sweeps:
        sweep.main([*call[2:], "--list"])  # flags that exist
        args = sweep.parse_args(call[2:])
        assert args.log_dir == report[2]
        tried += [
            (one["--decoder_depth"], one["--mask_strategy"], one["--seed"], args.scratch) for one in args.settings
        ]
    seeds = ("1", "2") if quick else ("42", "43", "44")
    deeper = [(depth, name) for depth in ("2", "8") for name in ("random", "cells")]
    expected = [("4", name, seed, True) for seed in seeds for name in MASK_STRATEGIES]
    assert tried == expected + [(*what, seed, False) for seed in seeds for what in deeper]
    assert len(calls_of("reproduce_report.sh", checkout, "--list", **environment)) == 2
    assert len(set(capsys.readouterr().out.splitlines())) == len(seeds) * (1 + len(MASK_STRATEGIES) + len(deeper))


def test_the_quickstart_asks_for_flags_that_exist(checkout):
    calls = calls_of("quickstart.sh", checkout)
    for script, *flags in calls[:-1]:
        MODULES[script].parse_args(flags)
    plot_curves.parse_args(calls[-1][2:])
    assert len(calls) == 8
