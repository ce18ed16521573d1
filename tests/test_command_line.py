"""The command line: names of runs, presets, bad input, dry runs, help; one test over all flags of both parsers."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from starting import SET, SIZE, SWITCHES, classify, pretrain

import mae_pretrain
import train_classifier
import utils
from engine.checkpoints import load_model
from engine.records import read_run
from masks import MASK_STRATEGIES
from model import MAE_ViT, PatchShuffle

ROOT = Path(__file__).parents[1]
MAE, CLS = mae_pretrain, train_classifier
SCRIPTS = [  # all that have a command line
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")])
    if "def parse_args(" in path.read_text()
]

pytestmark = pytest.mark.usefixtures("empty_directory", "few_shapes")


def parsed(script, flags=""):
    """The arguments of a command, complete as for a run from scratch."""
    args = script.parse_args(shlex.split(flags))
    if script is MAE:
        return args
    args.pretrained_model_path = None
    return CLS.load_pretrained(args)[1]


def named(script, flags="", *parent):
    return script.run_name(parsed(script, flags), *parent)


# --- what identifies a run ---


def flags_of(script, monkeypatch):
    """The flags of a script's parser, as argparse keeps them."""
    with monkeypatch.context() as patch:
        patch.setattr(utils.Parser, "parse_args", lambda self, *_: self)
        actions = script.parse_args([])._actions
    return {action.dest: action for action in actions if action.dest != "help"}


def changed(action):
    """Words that give a flag a value other than its default."""
    flag, default = action.option_strings[0], action.default
    if action.nargs == 0:  # a switch
        return action.option_strings[1] if default else flag
    if action.choices:
        return f"{flag} {[choice for choice in action.choices if choice != default][-1]}"
    if action.type is None or action.type is utils.file_path:
        return f"{flag} elsewhere"
    other = default + 1 if isinstance(default, int) else default / 2 or 0.25 if default is not None else 7
    return f"{flag} {other}"


@pytest.mark.parametrize("script", [MAE, CLS])
def test_every_flag_is_in_the_name_of_a_run_or_in_the_list_of_free_ones(script, monkeypatch):
    monkeypatch.setattr(MAE, "inherited", lambda argv: {})  # there is no model to read
    words = set(script.NAME_WORDS) | set(getattr(script, "SIZE_WORDS", ()))
    flags = flags_of(script, monkeypatch)
    assert set(flags) == words | (utils.FREE & set(flags))
    assert not words & utils.FREE
    plain = parsed(script)
    for flag, action in flags.items():
        if flag == "preset":  # is but its flags
            continue
        args = parsed(script, changed(action))
        told = flag in words
        assert (script.run_name(args) != script.run_name(plain)) == told, flag
        assert (utils.settings_of(args) != utils.settings_of(plain)) == told, flag


def test_the_list_of_free_flags_has_no_other_names(monkeypatch):
    assert flags_of(MAE, monkeypatch).keys() | flags_of(CLS, monkeypatch).keys() >= utils.FREE


def test_names_tell_what_sets_runs_apart():
    assert named(MAE) == "mae_cifar10_d4_random_r0.75_ep2000_s42"
    assert named(MAE, SWITCHES) == "mae_cifar10_d4_dw24_sincos_blockwise_r0.75_normpix_ep2000_muon_s42"
    assert named(MAE, "--augment crop --seed -1") == "mae_cifar10_d4_random_r0.75_augcrop_ep2000_s-1"
    assert named(CLS) == "cls_cifar10_ep100_s42_scratch"
    assert named(CLS, "--patch_size 4 --embed_dim 96") == "cls_cifar10_ep100_s42_scratch_p4_w96"
    assert named(CLS, "", "mae_cifar10") == "cls_cifar10_ep100_s42_from_mae_cifar10"
    assert named(CLS, "", "mae_cifar10", {"img_size": 32}) == "cls_cifar10_ep100_s42_from_mae_cifar10"
    name = named(CLS, "--img_size 48 --in_chans 1", "mae_cifar10", {"img_size": 32})  # what differs from the MAE's
    assert name == "cls_cifar10_ep100_s42_i48_c1_from_mae_cifar10"
    flags = "--train_images 500 --val_images 100 --augment shift --pool mean --decay_matrices_only --layer_decay 0.75"
    flags += " --clip_grad 1 --drop_path 0.1 --label_smoothing 0.1 --mixup 0.8 --cutmix 1"
    name = "cls_cifar10_n500_val100_augshift_ep100_poolmean_matrices_ld0.75_clip1_dp0.1_ls0.1_mixup0.8_cutmix1_s42"
    assert named(CLS, flags) == f"{name}_scratch"
    assert named(CLS, "--train_images 500 --label_seed 0") == "cls_cifar10_n500_draw0_ep100_s42_scratch"


@pytest.mark.parametrize("script", [MAE, CLS])
def test_a_folder_or_file_of_images_goes_by_its_own_name(script):
    assert "_pets_" in named(script, "--dataset folder --data_dir some/pets")
    assert "_pets_" in named(script, "--dataset npz --data_dir some/pets.npz")
    versions = {named(script, f"--dataset folder --data_dir pets{version}") for version in ("1", "1.0", "1.00")}
    assert len(versions) == 3


def test_two_learning_rates_live_side_by_side_in_one_log_dir(mae):
    runs = [mae, pretrain("--base_learning_rate", "0.02")]
    assert sorted(Path("logs/pretrain").iterdir()) == sorted(runs)
    assert [read_run(run).settings["base_learning_rate"] for run in runs] == [0.01, 0.02]
    for lr in ("0.01", "0.02"):
        for run in runs:
            classify("--pretrained_model_path", run, "--base_learning_rate", lr)
    assert len(list(Path("logs/classifier").iterdir())) == 4


def test_a_name_that_is_too_long_for_a_file_system_ends_in_a_digest_and_pretrains_and_fine_tunes(image_folder):
    data_dir = Path(f"x{'é' * 120}")  # two bytes each
    shutil.copytree(image_folder, data_dir)
    flags = ["--dataset", "folder", "--data_dir", data_dir, "--img_size", "16", "--batch_size", "2"]
    flags += ["--train_images", "4", "--total_epoch", "1"]
    maes = [pretrain(*flags, "--seed", seed) for seed in "12"]
    classifiers = [classify(*flags, "--pretrained_model_path", run, "--seed", seed) for run in maes for seed in "12"]
    assert len(set(classifiers)) == 4
    for run in maes + classifiers:
        assert len(os.fsencode(run.name)) <= 255
        assert re.search("_[0-9a-f]{16}$", run.name)
        assert read_run(run).name == run.name
        assert read_run(run).settings["dataset"] == data_dir.name
    assert [read_run(run).parent["name"] for run in classifiers] == [run.name for run in maes for _ in "12"]
    assert pretrain(*flags, "--seed", "2") == maes[1]


def test_a_strategy_that_is_added_as_the_readme_says_is_one_like_any_other(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(def row_scores.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {"torch": torch}
    exec(code, names)
    others = {named(MAE, f"--mask_strategy {strategy}") for strategy in MASK_STRATEGIES}
    monkeypatch.setitem(MASK_STRATEGIES, "rows", names["row_scores"])
    assert named(MAE, "--mask_strategy rows") not in others
    assert {named(MAE, f"--mask_strategy {strategy}") for strategy in MASK_STRATEGIES} > others
    for mask_ratio in (0.3, 0.75):
        shuffle = PatchShuffle(8, mask_ratio, "rows")
        assert shuffle(16).sort(dim=1).values.equal(torch.arange(64).expand(16, -1))
        assert shuffle.num_visible == PatchShuffle(8, mask_ratio, "random").num_visible
    run = pretrain("--mask_strategy", "rows")
    assert "_rows_" in run.name
    load_model(run, MAE_ViT)
    assert classify("--pretrained_model_path", run).name.endswith(run.name)
    with pytest.raises(SystemExit):
        mae_pretrain.parse_args(["--help"])
    assert ",rows}" in capsys.readouterr().out


# --- presets and defaults ---


def test_the_defaults_are_the_references_recipe():
    args = vars(MAE.parse_args([]))
    expected = {"img_size": 32, "patch_size": 2, "embed_dim": 192, "encoder_depth": 12, "num_heads": 3}
    expected |= {"decoder_depth": 4, "mask_ratio": 0.75, "mask_strategy": "random", "total_epoch": 2000}
    expected |= {"batch_size": 4096, "seed": 42, "base_learning_rate": 1.5e-4, "weight_decay": 0.05}
    expected |= {"dataset": "cifar10", "augment": "none", "norm_pix_loss": False}
    assert {key: args[key] for key in expected} == expected
    assert MAE.DEVICE_BATCH_SIZE["cuda"] == 512
    args = vars(CLS.parse_args([]))
    expected = {"total_epoch": 100, "batch_size": 128, "base_learning_rate": 1e-3, "augment": "none", "pool": "cls"}
    assert {key: args[key] for key in expected} == expected
    assert CLS.DEVICE_BATCH_SIZE["cuda"] == 256


PRESETS = [(script, preset) for script in (MAE, CLS) for preset in script.PRESETS if preset != "reference"]


@pytest.mark.parametrize(("script", "preset"), PRESETS)
def test_a_preset_is_its_flags_given_by_hand_and_a_flag_of_ones_own_wins(script, preset):
    def given(flags):
        return vars(script.parse_args(shlex.split(flags)))

    values = script.PRESETS[preset]
    by_hand = given(utils.as_flags(values))
    assert given(f"--preset {preset}") == {**by_hand, "preset": preset}
    assert {name: by_hand[name] for name in values} == values != {}
    assert given("") == given("--preset reference")
    own = {name: given("")[name] for name in values}
    assert given(f"--preset={preset} {utils.as_flags(own)}") == {**by_hand, **own, "preset": preset}
    assert given(f"{utils.as_flags(own)} --preset {preset}") == {**by_hand, **own, "preset": preset}
    assert named(script, f"--preset {preset}") == named(script, utils.as_flags(values)) != named(script)
    assert named(script, f"--preset {preset} {utils.as_flags(own)}") == named(script)


@pytest.mark.parametrize(("script", "preset"), PRESETS)
def test_the_help_of_a_preset_shows_its_values(script, preset, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--preset", preset, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in script.PRESETS.keys() - {"reference"}:
        assert f"{name}: {utils.as_flags(script.PRESETS[name])}" in text
    for name, value in {**script.PRESETS["reference"], **script.PRESETS[preset]}.items():
        if value not in (None, False):
            assert re.search(rf"--{name}\b[^:]*?[^-]* \(default: {value}\)", text), name


def test_a_mae_of_a_preset_is_the_run_of_its_flags():
    preset = pretrain("--preset", "features")
    assert pretrain(*shlex.split(utils.as_flags(MAE.PRESETS["features"]))) == preset
    assert [start["arguments"]["preset"] for start in read_run(preset).starts] == ["features"]


# --- bad input ---


@pytest.fixture
def bad_files():
    Path("text.pt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, "foreign.pt")
    Path("nothing/train").mkdir(parents=True)
    for part in ("train", "test"):
        Path(f"text/{part}/a").mkdir(parents=True)
        Path(f"text/{part}/a/0.png").write_text("not an image")


BAD = [  # what is given, and what the answer must have in it: flag or file, value, way out
    (MAE, "--batch_size 64 --max_device_batch_size 8 --train_images 40", "--batch_size 64 40"),
    (MAE, "--patch_size 5", "patch_size 5 img_size 32"),
    (MAE, "--mask_ratio 0", "mask_ratio 0.0 16"),
    (MAE, "--mask_ratio 0.99", "mask_ratio 0.99 16"),
    (MAE, "--mask_ratio 1", "mask_ratio 1.0 16"),
    (MAE, "--mask_ratio most", "--mask_ratio 'most'"),
    (MAE, "--mask_ratio nan", "mask_ratio nan"),
    (MAE, "--mask_ratio -0.5", "mask_ratio -0.5"),
    (MAE, "--mask_strategy spiral", "--mask_strategy 'spiral' random blockwise"),
    (MAE, "--dataset mnist", "--dataset 'mnist' cifar10 folder"),
    (MAE, "--dataset folder --data_dir nowhere", "nowhere --data_dir"),
    (MAE, "--dataset folder --data_dir nothing", "nothing/train"),
    (MAE, "--dataset folder --data_dir text", "text/train/a/0.png"),
    (MAE, "--dataset folder --data_dir text.pt", "text.pt --data_dir"),
    (MAE, "--num_heads 5", "num_heads 5 embed_dim 12 1, 2, 3"),
    (MAE, "--num_heads 0", "--num_heads '0'"),
    (MAE, "--img_size 0", "--img_size '0'"),
    (MAE, "--embed_dim 1.5", "--embed_dim '1.5'"),
    (MAE, "--encoder_depth 0", "--encoder_depth '0'"),
    (MAE, "--decoder_depth deep", "--decoder_depth 'deep'"),
    (MAE, "--decoder_embed_dim 0", "--decoder_embed_dim '0'"),
    (MAE, "--decoder_embed_dim 5", "decoder_embed_dim 5 6"),
    (MAE, "--positions sincos --embed_dim 14", "sincos 14 4"),
    (MAE, "--total_epoch 0", "--total_epoch '0'"),
    (MAE, "--total_epoch -3", "--total_epoch '-3'"),
    (MAE, "--warmup_epoch -1", "--warmup_epoch '-1'"),
    (MAE, "--warmup_epoch soon", "--warmup_epoch 'soon'"),
    (MAE, "--total_epoch 2 --warmup_epoch 3", "--warmup_epoch 3 --total_epoch 2"),
    (MAE, "--base_learning_rate nan", "--base_learning_rate 'nan'"),
    (MAE, "--base_learning_rate inf", "--base_learning_rate 'inf'"),
    (MAE, "--weight_decay -1", "--weight_decay '-1'"),
    (MAE, "--batch_size 0", "--batch_size '0'"),
    (MAE, "--batch_size", "--batch_size"),
    (MAE, "--max_device_batch_size 0", "--max_device_batch_size '0'"),
    (MAE, "--train_images 41", "--train_images 41 40"),
    (MAE, "--train_images 0", "--train_images '0'"),
    (MAE, "--in_chans 17", "in_chans 17 16"),
    (MAE, "--in_chans 4", "shapes 3 4 --in_chans"),
    (MAE, "--in_chans 4 --augment official", "--augment official 1 3 4"),
    (MAE, "--seed x", "--seed 'x'"),
    (MAE, "--seed 9223372036854775808", "--seed '9223372036854775808' 63"),
    (MAE, "--probe_every -1", "--probe_every '-1'"),
    (MAE, "--augment zoom", "--augment 'zoom' shift crop"),
    (MAE, "--preset strong", "--preset 'strong' reference features"),
    (MAE, "--device cuda:7", "--device cuda:7 cpu"),
    (MAE, "--device gpu", "--device gpu cpu"),
    (MAE, "--device cpu:1", "--device cpu:1 cpu"),
    (MAE, "--precision fp8", "--precision 'fp8' bf16"),
    (MAE, "--decoder_dept 3", "--decoder_dept 3 --decoder_depth?"),
    (MAE, "--epochs 5 --lr 1e-3", "--epochs --total_epoch? --lr --base_learning_rate?"),
    (MAE, "--batch-size=8 --wd 0", "--batch-size --batch_size? --wd --weight_decay?"),
    (MAE, "--batch_size 4096 --train_images 40", "--batch_size 4096 40 less"),
    (MAE, "--log_dir text.pt", "text.pt"),
    (MAE, "--output_model_path text", "--output_model_path 'text' text/model.pt"),
    (MAE, "extra", "extra"),
    (CLS, "--augment zoom", "--augment 'zoom' shift crop"),
    (CLS, "--num_heads 5", "num_heads 5 embed_dim 12"),
    (CLS, "--patch_size 5", "patch_size 5 img_size 32"),
    (CLS, "--total_epoch 0", "--total_epoch '0'"),
    (CLS, "--in_chans 4 --augment official", "--augment official 1 3 4"),
    (CLS, "--end_rate 0.1", "--end_rate 0.1 peak"),
    (CLS, "--warmup_epoch 9", "--warmup_epoch 9 --total_epoch 3"),
    (CLS, "--pretrained_model_path nowhere.pt", "nowhere.pt"),
    (CLS, "--pretrained_model_path text.pt", "text.pt"),
    (CLS, "--pretrained_model_path foreign.pt", "foreign.pt encoder timm"),
    (CLS, "--pretrained_model_path nothing", "nothing model.pt run"),
    (CLS, "--decoder_depth 2", "--decoder_depth 2"),
    (CLS, "--epoch=5 --learning_rate 1", "--total_epoch? --base_learning_rate?"),
    (CLS, "--val_images 0", "--val_images '0'"),
    (CLS, "--val_images 15", "--val_images 15 10"),
    (CLS, "--val_images 50", "--val_images 50 40"),
    (CLS, "--val_images 20", "--val_images 20 --train_images 40 30"),
    (CLS, "--preset weak", "--preset 'weak' reference augmented official"),
    (CLS, "--preset", "--preset"),
    (CLS, "--pool max", "--pool 'max' cls mean"),
    (CLS, "--drop_path 1.5", "--drop_path '1.5'"),
    (CLS, "--layer_decay nan", "--layer_decay 'nan'"),
    (CLS, "--mixup -1", "--mixup '-1'"),
]


@pytest.mark.parametrize(("script", "flags", "facts"), BAD)
def test_bad_input_gets_one_line_exit_code_2_and_no_run_directory(script, flags, facts, bad_files, capsys, monkeypatch):
    size = [] if "--pretrained_model_path" in flags else SIZE
    before = [*size, *(["--decoder_depth", "1"] if script is MAE else []), *SET]
    told(script, [*before, *shlex.split(flags)], facts.split(), capsys, monkeypatch)
    assert not Path("logs").exists()


def told(script, arguments, facts, capsys, monkeypatch):
    """The script must end with exit code 2 and one line that has these facts in it."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    with pytest.raises(SystemExit) as leaving:
        script.main([str(argument) for argument in arguments])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith(f"{script.__name__}.py: error: ")
    for fact in facts:
        assert fact in error


def test_pretrained_models_that_do_not_fit_are_named(mae, classifier, capsys, monkeypatch):
    (mae / "cut.pt").write_bytes((mae / "model.pt").read_bytes()[:-2000])
    for path, flags, facts in [
        (classifier, "", ["ViT_Classifier", "MAE_ViT"]),
        (mae, "--embed_dim 24", ["embed_dim=12", "--embed_dim", "24"]),
        (mae / "cut.pt", "", ["cut.pt"]),
    ]:
        told(CLS, ["--pretrained_model_path", path, *flags.split()], [str(path), *facts], capsys, monkeypatch)


def test_a_mae_with_a_strategy_that_is_gone_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(MASK_STRATEGIES, "mine", MASK_STRATEGIES["random"])
    mae = pretrain("--mask_strategy", "mine")
    monkeypatch.delitem(MASK_STRATEGIES, "mine")
    told(CLS, ["--pretrained_model_path", mae], ["mine", "random", "blockwise"], capsys, monkeypatch)


# --- dry runs and help ---


@pytest.mark.parametrize(
    ("script", "more"),
    [
        (MAE, ["--in_chans", "5"]),
        (MAE, ["--compile", "--norm_pix_loss"]),
        (CLS, []),
        (CLS, ["--compile", "--val_images", "5000"]),
    ],
)
def test_dry_run_goes_through_every_line_and_leaves_nothing(script, more, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)  # slow; tests/test_model.py really compiles
    script.main(["--dry_run", *SIZE, "--output_model_path", "mine.pt", *more])
    said = capsys.readouterr().out
    assert "saved and reloaded" in said
    assert ("the first step compiles" in said) == ("--compile" in more)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag_with_a_text(name, capsys, monkeypatch):
    added, add_argument = {}, argparse._ActionsContainer.add_argument

    def noted(self, *names, **options):
        added[names[0]] = options.get("help")
        return add_argument(self, *names, **options)

    script = importlib.import_module(name)
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", noted)
    with pytest.raises(SystemExit) as leaving:
        script.parse_args(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert len(added) >= 3
    for flag, text in added.items():
        assert re.search(rf"^  (-h, )?{flag}\b", shown, re.MULTILINE), flag
        assert text, f"{flag} has no text"
    assert "(default: None)" not in shown
    assert ":\n\noptions:" not in shown  # the description before them is a whole sentence
