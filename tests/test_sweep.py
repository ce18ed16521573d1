"""Sweeps: what is planned, what is passed over, how jobs run at once and stop."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate_features
import mae_pretrain
import train_classifier
import utils
from engine.records import read_run
from masks import MASK_STRATEGIES
from scripts import sweep

ROOT = Path(__file__).parents[1]
SIZE = shlex.split("--patch_size 8 --embed_dim 12 --encoder_depth 1 --num_heads 2 --decoder_depth 1")
SMALL = [*shlex.split("--dataset shapes --total_epoch 7"), *SIZE]
MODULES = {f"{module.__name__}.py": module for module in (mae_pretrain, evaluate_features, train_classifier)}


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep.py"])


@pytest.fixture
def listed(capsys):
    """A function: the jobs that a sweep has left, each a list of commands, each a list of words."""

    def list_jobs(flags):
        sweep.main([*SMALL, *shlex.split(flags), "--list"])
        lines = capsys.readouterr().out.splitlines()
        return [[shlex.split(command)[1:] for command in line.split(" && ")] for line in lines]

    return list_jobs


def parsed(command):
    script, *flags = command
    return MODULES[script].parse_args(flags)


# --- the plan ---


def test_a_sweep_tries_every_combination_with_every_seed_seed_by_seed(listed):
    jobs = listed('--mask_ratio 0.5 0.9 --seed 1 2 --num_heads 1 2 --data_dir "a b" --log_dir here')
    maes = [parsed(job[0]) for job in jobs]
    tried = {(mae.mask_ratio, mae.num_heads, mae.seed): None for mae in maes}
    assert tried.keys() == set(itertools.product([0.5, 0.9], [1, 2], [1, 2]))
    assert [mae.seed for mae in maes] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert {(mae.dataset, mae.data_dir, mae.total_epoch, mae.embed_dim) for mae in maes} == {("shapes", "a b", 7, 12)}
    for mae, (pretrain, *rest) in zip(maes, jobs, strict=True):
        assert pretrain[0] == "mae_pretrain.py"
        features, classifier = map(parsed, rest)
        directory = f"here/pretrain/{mae_pretrain.run_name(mae)}"
        assert (features.model_path, features.data_dir, features.layers) == ([directory], "a b", "all")
        assert features.train_images is None
        assert (classifier.pretrained_model_path, classifier.dataset, classifier.data_dir) == (
            directory,
            "shapes",
            "a b",
        )
        assert (classifier.seed, classifier.log_dir) == (mae.seed, "here/classifier")
        assert classifier.total_epoch == train_classifier.parse_args([]).total_epoch


@pytest.mark.parametrize(
    "flag",
    ["base_learning_rate 1e-3 2e-3", "positions learned sincos", "weight_decay 0 0.1", "preset reference features"],
)
def test_runs_of_different_settings_have_directories_of_their_own(flag, listed):
    jobs = listed(f"--{flag}")
    assert len({job[1][2] for job in jobs}) == len(jobs) == 2


def test_switches_are_turned_on_and_off_and_the_last_of_equal_flags_counts(listed):
    jobs = listed("--norm_pix_loss on off --decoder_depth 4 8 --decoder_depth=2 --preset features --no-compile")
    maes = [parsed(job[0]) for job in jobs]
    assert [(mae.norm_pix_loss, mae.decoder_depth, mae.compile) for mae in maes] == [
        (True, 2, False),
        (False, 2, False),
    ]
    (job,) = listed("--norm_pix_loss")
    assert parsed(job[0]).norm_pix_loss


def test_all_strategies_are_those_of_the_model(listed):
    assert [parsed(job[0]).mask_strategy for job in listed("--mask_strategy all")] == list(MASK_STRATEGIES)


def test_settings_that_are_the_same_run_once(listed):
    jobs = listed("--mask_ratio 0.75 0.750 --seed 1 1 --scratch --finetune '--seed 5'")
    assert [job[0][0] for job in jobs] == ["train_classifier.py", "mae_pretrain.py"]


def test_fine_tuning_flags_vary_too_its_seeds_among_them(listed):
    (job,) = listed('--seed 3 --finetune "--layer_decay 0.65 0.75 --seed 8 9 --decay_matrices_only on"')
    classifiers = [parsed(command) for command in job[2:]]
    assert [(one.seed, one.layer_decay) for one in classifiers] == [(8, 0.65), (8, 0.75), (9, 0.65), (9, 0.75)]
    assert all(one.decay_matrices_only for one in classifiers)
    (job,) = listed("--finetune --decay_matrices_only")  # one word, which argparse would take for a flag
    assert parsed(job[-1]).decay_matrices_only
    ((*_, command),) = listed('--data_dir a --finetune "--dataset cifar10"')  # another data set, from its own place
    assert (parsed(command).dataset, parsed(command).data_dir) == ("cifar10", None)


def test_a_sweep_without_fine_tuning_only_pretrains_and_measures(listed):
    (job,) = listed("--finetune none --scratch")
    assert [command[0] for command in job] == ["mae_pretrain.py", "evaluate_features.py"]


def test_probes_and_classifiers_of_a_seed_have_the_same_few_labels(listed):
    jobs = listed("--seed 1 2 --labels 200")
    for seed, (*_, probe, classifier) in zip((1, 2), jobs, strict=True):
        assert [utils.label_seed(parsed(command)) for command in (probe, classifier)] == [seed, seed]


def test_label_fractions_start_from_one_mae_in_one_job(listed):
    flags = "--patch_size 4 8 --mask_ratio 0.5 0.6 --labels 200 500 --scratch --device cpu --precision float32"
    jobs = listed(f"{flags} --finetune '--train_images 9'")
    scratch = [job for job in jobs if job[0][0] == "train_classifier.py"]  # once each size
    assert [[(parsed(run).patch_size, parsed(run).train_images) for run in job] for job in scratch] == [
        [(4, 200), (4, 500)],
        [(8, 200), (8, 500)],
    ]
    maes = [job for job in jobs if job not in scratch]
    assert len(maes) == 4
    for pretrain, *rest in maes:
        assert pretrain[0] == "mae_pretrain.py"
        assert [command[0] for command in rest] == ["evaluate_features.py"] * 3 + ["train_classifier.py"] * 2
        assert [parsed(command).train_images for command in rest] == [None, 200, 500, 200, 500]
    for command in itertools.chain(*jobs):
        assert (parsed(command).device, parsed(command).precision) == ("cpu", "float32")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mask_ratio 0.5 75", "error: mask_ratio 75"),
        ("--mask_strategy random rnadom", "mae_pretrain.py: error: argument --mask_strategy: invalid choice: 'rnadom'"),
        ("--decoder_dept 2 4", "mae_pretrain.py: error: unrecognized arguments: --decoder_dept 2"),
        ("--seed", "mae_pretrain.py: error: argument --seed"),
        ("--patch_size 8 5", "patch_size 5"),
        ("word", "'?word"),
        ("--finetune '--bach_size 9'", "train_classifier.py: error: unrecognized arguments: --bach_size"),
        ("--finetune '--patch_size 8'", "sweep.py: error: --patch_size"),
        ("--labels 100", "train_classifier.py: error: --batch_size 128 is more than the 100 training images"),
        ("--labels few", "'few' is not a positive whole number"),
        ("--train_images 100 --batch_size 50 200", "mae_pretrain.py: error: --batch_size 200"),
        ("--overwrite", "sweep.py: error: --overwrite"),
        ("--output_model_path a.pt", "sweep.py: error: --output_model_path"),
        ("--precision float32 bf16", "sweep.py: error: --precision .* bf16"),
        ("--jobs 0", "sweep.py: error: argument --jobs"),
        ("--dataset folder --data_dir a/pets b/pets", "a/pets and b/pets would both be .*pets"),
    ],
)
def test_wrong_settings_end_a_sweep_before_it_starts(flags, said, capsys):
    with pytest.raises(SystemExit) as leaving:
        sweep.main(["--dataset", "shapes", *shlex.split(flags)] if "word" not in flags else [flags])
    assert leaving.value.code == 2
    done = capsys.readouterr()
    assert re.search(said, done.err)
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_the_sweeps_of_the_readme_can_be_planned(capsys):
    text = (ROOT / "README.md").read_text() + sweep.__doc__
    commands = re.findall(r"^ *python -m scripts.sweep (.*?[^\\\n])(?:>.*)?$", text, re.MULTILINE | re.DOTALL)
    assert len(commands) >= 2
    for command in commands:
        sweep.main([*shlex.split(command.replace("\\\n", " "), comments=True), "--list"])
        assert capsys.readouterr().out


# --- what is finished ---


@pytest.fixture
def job():
    """The steps of a small job: a MAE, two measurements, a classifier."""
    args = sweep.parse_args([*SMALL, "--labels", "200"])
    return sweep.jobs_of(args.settings[0], args)[1]


def write_run(step, time="2026-01-01T10:00:00+0000", finished=True, features=(), **settings):
    """A run as a step would make it."""
    kind = "mae" if step.words[0] == "mae_pretrain.py" else "classifier"
    config = {"kind": kind, "name": step.directory.name, "finished": finished, "parent": None}
    config |= {
        "settings": utils.settings_of(step.args) | settings,
        "facts": {"test_set": "a"},
        "starts": [{"time": time}],
    }
    step.directory.mkdir(parents=True, exist_ok=True)
    (step.directory / "config.json").write_text(json.dumps(config))
    for train_images, layers in features:
        asked = {"train_images": train_images, "layers": layers, "pool": ["cls", "mean"], "untrained": True, "seed": 42}
        path = step.directory / f"features{train_images or ''}.json"
        stored = {"name": step.directory.name, "settings": asked, "test_set": "a", "time": time, "rows": []}
        path.write_text(json.dumps(stored))


MEASURED = [(None, "all"), (200, "last")]


def left(job):
    """Numbers of the steps that are left, from 0."""
    words = [step.words for step in job]
    return [words.index(some) for some in sweep.unfinished(job)]


def test_finished_steps_are_passed_over(job):
    assert left(job) == [0, 1, 2, 3]
    write_run(job[0], finished=False)
    write_run(job[3])
    assert left(job) == [0, 1, 2, 3]
    write_run(job[0])
    assert left(job) == [1, 2]
    write_run(job[0], features=MEASURED)
    assert left(job) == []
    write_run(job[3], finished=False)
    assert left(job) == [3]


def test_what_is_older_than_its_mae_or_another_run_is_left_to_the_script(job):
    early, late = "2026-01-01T09:59:59+0000", "2026-01-01T10:00:01+0000"
    write_run(job[0], early, features=MEASURED)
    write_run(job[3])
    write_run(job[0], late)  # started again since
    assert left(job) == [1, 2, 3]
    write_run(job[0], features=[(None, "last"), (200, "all")])
    write_run(job[3], pool="mean")
    assert left(job) == [1, 2, 3]
    write_run(job[0], features=MEASURED, total_epoch=8)
    assert left(job) == [0, 1, 2, 3]
    write_run(job[0], features=MEASURED)
    table = job[0].directory / "features.json"
    table.write_text(table.read_text().replace('"test_set": "a"', '"test_set": "b"'))
    assert left(job) == [1, 3]


def test_a_finished_sweep_lists_nothing(job, capsys):
    write_run(job[0], features=MEASURED)
    write_run(job[3])
    sweep.main([*SMALL, "--labels", "200", "--list"])
    assert capsys.readouterr().out == ""


def test_a_damaged_config_is_named(job, capsys):
    write_run(job[0])
    (job[0].directory / "config.json").write_text("{")
    sys.argv[0] = "sweep.py"
    with pytest.raises(SystemExit) as leaving:
        sweep.main([*SMALL, "--labels", "200"])
    assert leaving.value.code == 2
    assert re.match(r"sweep.py: error: .*config.json", capsys.readouterr().err)


# --- jobs at once ---


def work_in(directory):
    """Make this process work there; what it prints goes to the files out and err."""
    os.chdir(directory)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)


def run_jobs(directory, count, device, environment):
    """Run five jobs of two commands each, first.py and second.py of the directory."""
    work_in(directory)
    os.environ.update(environment)
    sweep.ROOT = Path.cwd()
    jobs = [(f"{n}/5", [["first.py", str(n)], ["second.py", str(n)]]) for n in range(1, 6)]
    sweep.run(jobs, sweep.environments(count, device))


@pytest.fixture
def start(server, tmp_path):
    """A function that starts the jobs, with these texts as their commands; the process."""

    def start_jobs(first, second="", count=None, device="auto", **environment):
        Path("first.py").write_text(f"import os, pathlib, signal, sys, time\n{first}")
        Path("second.py").write_text(f"import os, sys\n{second}")
        arguments = (tmp_path, count, device, {"CUDA_VISIBLE_DEVICES": ""} | environment)
        process = server.Process(target=run_jobs, args=arguments)
        process.start()
        return process

    return start_jobs


def ended(process):
    """Its exit code, what it has printed, its messages."""
    process.join(120)
    return process.exitcode, Path("out").read_text(), Path("err").read_text()


SAY = "time.sleep(0.1)\nprint('first', sys.argv[1], os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"


@pytest.mark.slow
def test_the_commands_of_a_job_run_in_order_and_say_whose_lines_they_print(start):
    code, out, err = ended(start(SAY, "print('second', sys.argv[1])"))
    assert code == 0, err
    lines = ("python first.py {}", "first {}", "python second.py {}", "second {}")
    expected = [(f"[{n}/5] ", line.format(n)) for n in range(1, 6) for line in lines]
    for line, parts in zip(out.splitlines(), expected, strict=True):
        assert line.startswith("".join(parts))


def test_jobs_at_once_share_the_gpus_and_the_cores(start, monkeypatch):
    code, out, err = ended(start(SAY, count=2, OMP_NUM_THREADS="3", CUDA_VISIBLE_DEVICES="5"))
    assert code == 0, err
    assert sorted(re.findall(r"first (\d) 3 5$", out, re.MULTILINE)) == list("12345")  # the user's threads; one GPU

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    monkeypatch.setattr(sweep.torch, "get_num_threads", lambda: 9)
    shares = [(one["CUDA_VISIBLE_DEVICES"], one["OMP_NUM_THREADS"]) for one in sweep.environments(None, "auto")]
    assert shares == [("0", "4"), ("3", "4")]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in sweep.environments(3, "cuda")] == ["0", "3", "0"]
    (alone,) = sweep.environments(None, "cuda:1")
    assert alone["CUDA_VISIBLE_DEVICES"] == "0,3"  # cuda:1 is one of them all
    assert "OMP_NUM_THREADS" not in alone


@pytest.mark.parametrize("count", [1, 2])
def test_after_a_failure_nothing_more_is_started(count, start):
    code, out, err = ended(start("if sys.argv[1] == '2': sys.exit(7)", "print('second')", count=count))
    assert code == 1
    assert re.search("2/5.* 7", err)
    assert err.count("\n") == 1
    begun = set(re.findall(r"^\[(\d)/5\] python", out, re.MULTILINE))
    assert {"1", "2"} <= begun <= {"1", "2", "3"}
    assert "[2/5] second" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("count", [1, 2])
def test_a_stopped_sweep_ends_when_its_runs_have_saved(count, number, start, tmp_path):
    saves = """
def save(number, frame):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1] + ".started").touch()
time.sleep(60)
"""
    process = start(saves, count=count)
    while process.is_alive() and len(list(tmp_path.glob("*.started"))) < count:
        time.sleep(0.01)
    os.kill(process.pid, number)
    code, out, err = ended(process)
    assert code == 128 + number
    assert signal.Signals(number).name in err
    assert len(list(tmp_path.glob("*.saved"))) == count
    assert "second" not in out


def test_the_list_of_a_sweeps_jobs_runs_under_xargs_two_at_once(capsys):
    sweep.main([*SMALL, *shlex.split("--seed 1 2 --mask_ratio 0.5 0.9 --scratch --list --data_dir 'a b'")])
    Path("jobs.txt").write_text(capsys.readouterr().out)
    jobs = [line.split(" && ") for line in Path("jobs.txt").read_text().splitlines()]
    assert [len(job) for job in jobs] == [1, 3, 3] * 2
    for script in ("mae_pretrain.py", "evaluate_features.py", "train_classifier.py"):
        Path(script).write_text(
            "import shlex, sys\nwith open('calls', 'a') as f:\n    print(shlex.join(sys.argv), file=f)"
        )
    subprocess.run(["bash", "-c", r"tr '\n' '\0' <jobs.txt | xargs -0 -n 1 -P 2 bash -c"], check=True)
    done = [shlex.split(line) for line in Path("calls").read_text().splitlines()]
    assert len(done) == sum(map(len, jobs))
    for job in jobs:
        order = [done.index(shlex.split(command)[1:]) for command in job]
        assert order == sorted(order)


def run_sweep(directory, flags):
    work_in(directory)
    sweep.main(flags)


@pytest.mark.slow
def test_a_sweep_that_was_interrupted_goes_on_to_the_end_and_then_starts_nothing(server, tmp_path):
    flags = [*SMALL, *shlex.split("--device cpu --batch_size 50 --total_epoch 40 --train_images 500")]
    flags += ["--finetune", "--total_epoch 1 --train_images 500"]
    start, out = lambda: server.Process(target=run_sweep, args=(tmp_path, flags)), Path("out")
    process = start()
    process.start()
    while process.is_alive() and not (out.exists() and "epoch 2 of 40" in out.read_text()):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    code, printed, _ = ended(process)
    assert code == 130
    assert printed.count("python") == 1
    (mae,) = Path("logs/sweep/pretrain").iterdir()
    assert not read_run(mae).finished

    process = start()
    process.start()
    code, printed, _ = ended(process)
    assert code == 0, printed
    assert "[1/1] Continued" in printed
    runs = [read_run(path) for path in Path("logs/sweep").glob("*/*")]
    assert sorted((run.kind, run.finished, len(run.features)) for run in runs) == [
        ("classifier", True, 0),
        ("mae", True, 1),
    ]

    process = start()
    process.start()
    code, printed, _ = ended(process)
    assert code == 0
    assert printed == "Compare: python -m scripts.compare logs/sweep\n"
