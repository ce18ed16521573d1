"""Weights to start from: others' files compute their own features here, sizes and channels change as timm's do."""

import argparse
import json
import os
import re
import shlex
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors
from starting import SET, classify, pretrain, same_weights, weights
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer

import evaluate_features
import mae_pretrain
from engine.checkpoints import load_file, load_model, save_file
from engine.errors import UserError
from engine.records import read_config, read_metrics, read_run
from engine.run import Session
from engine.weights import read_weights, start_from
from model import MAE_ViT, ViT_Classifier, patchify, sincos_table
from scripts import export
from scripts.results import table

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "encoder_depth": 2, "num_heads": 3}
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)

pytestmark = pytest.mark.usefixtures("empty_directory", "few_shapes")


def drawn(model, std=0.2):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def images(channels=3, size=16):
    return torch.rand(5, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def timm_vit(**changes):
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return drawn(VisionTransformer(**sizes | changes))


def read(path, **sizes):
    """What is read of a file, and the MAE that it fills."""
    content = read_weights(path, MAE_ViT, sizes=sizes)
    mae = MAE_ViT(**{"decoder_depth": 1} | content["model_args"])
    start_from(mae, content)
    return content, mae.eval()


# --- files from elsewhere compute what they did there ---


@torch.no_grad()
def test_the_references_state_dict_brings_encoder_and_decoder():
    """Of its own code's keys (state_dict_keys.txt) and numbers (parity_small.npz): predictions of both parts."""
    with np.load(Path(__file__).parent / "parity_small.npz") as stored:
        parity = {name: torch.from_numpy(stored[name]) for name in stored.files}
    torch.save({name[4:]: v for name, v in parity.items() if name.startswith("mae/")}, "reference.pt")
    content, mae = read("reference.pt", num_heads=3)
    told = "The file does not tell, so taken to have: 3 heads (--num_heads)."
    assert (content["layout"], content["said"]) == ("reference", [told])
    close(mae.loss(parity["image"], parity["forward_indexes"].T), parity["loss"])
    torch.save({name[11:]: v for name, v in parity.items() if name.startswith("classifier/")}, "classifier.pt")
    content, _ = read("classifier.pt", num_heads=3)
    assert re.fullmatch(r"Not taken: head.weight \(10, 48\), head.bias \(10,\)\.", content["said"][0])
    classifier = ViT_Classifier(8, 2, 48, 2, 3)
    classifier.load_encoder(content["model"])
    pooled = classifier.pooled(parity["image"])
    close(pooled @ parity["classifier/head.weight"].T + parity["classifier/head.bias"], parity["logits"])


@torch.no_grad()
def test_timm_and_the_official_mae_keep_their_features(capsys):
    vit = timm_vit()
    torch.save(vit.state_dict(), "timm.pt")
    decoder = {"mask_token": torch.zeros(1, 1, 16), "decoder_blocks.0.norm1.bias": torch.ones(16)}
    decoder["decoder_blocks.1.norm1.bias"] = torch.ones(16)
    Path("there").mkdir()
    torch.save({"model": vit.state_dict() | decoder, "args": argparse.Namespace(lr=1e-3)}, "there/official.pth")
    save_safetensors({f"module.{name}": v.half() for name, v in vit.state_dict().items()}, "half.safetensors")
    for path, tolerance in (("timm.pt", 1e-5), ("there/official.pth", 1e-5), ("half.safetensors", 1e-2)):
        content, mae = read(path, num_heads=3)
        torch.testing.assert_close(mae.encoder(images()), vit.forward_features(images()), rtol=0, atol=tolerance)
        assert content["layout"] == "official or timm"
        (line,) = capsys.readouterr().out.splitlines()
        assert "head.weight (5, 24)" in line
        assert "does not tell, so taken to have: 3 heads (--num_heads), images in [-1, 1]." in line
    assert read("there/official.pth", num_heads=3)[0]["name"] == "official"
    assert "mask_token (1, 1, 16), decoder_blocks.*.norm1.bias (16,)." in capsys.readouterr().out


def write_vit_mae(directory, qkv_bias=True):
    """A directory as transformers' ViTMAEForPreTraining.save_pretrained writes it, and timm's model of the same."""
    vit, state = timm_vit(num_classes=0, qkv_bias=qkv_bias, norm_layer=partial(torch.nn.LayerNorm, eps=1e-12)), {}
    parts = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    parts |= {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    for i in range(2):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        parts |= {f"{ours}.norm1": f"{theirs}.layernorm_before", f"{ours}.norm2": f"{theirs}.layernorm_after"}
        parts |= {f"{ours}.attn.proj": f"{theirs}.attention.output.dense"}
        parts |= {f"{ours}.mlp.fc1": f"{theirs}.intermediate.dense", f"{ours}.mlp.fc2": f"{theirs}.output.dense"}
    for name, tensor in vit.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module.endswith("qkv"):
            layer = f"vit.encoder.layer.{module.split('.')[1]}.attention.attention"
            for which, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[f"{layer}.{which}.{kind}"] = third.contiguous()
        else:
            state[f"vit.{parts[name]}" if name in parts else f"vit.{parts[module]}.{kind}"] = tensor
    state["decoder.decoder_encoder.layer.0.attention.attention.query.weight"] = torch.zeros(16, 16)
    directory.mkdir()
    save_safetensors(state, directory / "model.safetensors")
    config = {"model_type": "vit_mae", "num_attention_heads": 3, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    (directory / "config.json").write_text(json.dumps(config))
    return vit


@torch.no_grad()
def test_a_directory_of_transformers_brings_heads_eps_and_the_mean_and_std_of_its_images():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    directory = Path("vit-mae")
    vit = write_vit_mae(directory)
    content, mae = read(directory)
    assert (content["name"], content["model_args"]["num_heads"]) == ("vit-mae", 3)
    assert "decoder.decoder_encoder.layer.*.attention.attention.query.weight (16, 16)" in content["said"][0]
    close(mae.encoder(images()), vit.forward_features(images()))
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    content, mae = read(directory)
    assert "mean" not in " ".join(content["said"])
    theirs = (images() / 2 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(mae.encoder(images()), vit.forward_features(theirs), rtol=0, atol=3e-5)
    torch.save(load_safetensors(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert read(directory)[0]["digest"] == content["digest"]
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean[:2], "image_std": std[:2]}))
    with pytest.raises(UserError, match="3 channels, and mean and std of 2"):
        read(directory)


@pytest.mark.slow
@torch.no_grad()
def test_what_transformers_writes_is_read():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    sizes |= {"image_size": 16, "patch_size": 4}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**sizes, **decoder, decoder_intermediate_size=64, mask_ratio=0.0)
    theirs = drawn(transformers.ViTMAEForPreTraining(config))
    theirs.save_pretrained("vit-mae")
    in_order = torch.arange(16.0).expand(5, -1)
    close(read("vit-mae")[1].encoder(images()), theirs.vit(images(), noise=in_order).last_hidden_state)
    theirs = drawn(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)))
    theirs.save_pretrained("vit")
    close(read("vit")[1].encoder(images()), theirs.vit(images()).last_hidden_state)


@torch.no_grad()
def test_what_we_export_comes_back(mae):
    ours, _ = load_model(mae, MAE_ViT)
    for to, path in (("timm", mae / "timm.pt"), ("hf", mae / "hf")):
        export.main([str(mae), "--to", to])
        content, back = read(path)
        assert content["said"] == []
        close(back.encoder(images(size=32)), ours.encoder(images(size=32)))


# --- what cannot be taken ---


def bad_weights():
    vit = timm_vit()
    state = vit.state_dict()
    torch.save({name: v for name, v in state.items() if "cls" not in name}, "no_cls.pt")
    torch.save(state | {"blocks.0.ls1.gamma": torch.ones(24)}, "scaled.pt")
    torch.save(state | {"norm_pre.weight": torch.ones(24)}, "pre.pt")
    torch.save({name: v for name, v in state.items() if "mlp.fc2.bias" not in name}, "missing.pt")
    torch.save(timm_vit(mlp_ratio=2).state_dict(), "narrow.pt")
    torch.save(vit, "module.pt")
    torch.save({"anything": torch.ones(2)}, "other.pt")
    torch.save([state], "list.pt")
    torch.save(state | {"patch_embed.proj.weight": torch.zeros(24, 48)}, "linear.pt")
    torch.save(state | {"pos_embed": torch.zeros(1, 14, 24)}, "oblong.pt")
    save_safetensors(state, "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-100])
    torch.save(state, "timm.pt")


def test_weights_that_cannot_be_taken_get_one_line_and_nothing_is_written(capsys):
    bad_weights()
    before = set(Path().iterdir())
    for flags, facts in {
        "no_cls.pt": ["no_cls.pt", "cls token"],
        "scaled.pt --num_heads 3": ["encoder (official or timm) has what ours has not", "ls1.gamma (24,)"],
        "pre.pt --num_heads 3": ["has what ours has not, norm_pre.weight (24,)"],
        "missing.pt --num_heads 3": ["lacks encoder.transformer.*.mlp.fc2.bias (24,)"],
        "narrow.pt --num_heads 3": ["encoder (official or timm) has what ours has not", "mlp.fc1.weight (48, 24)"],
        "module.pt": ["pickled", "torch.save("],
        "other.pt": ["other.pt is whole, but"],
        "linear.pt": ["linear.pt is whole, but"],
        "oblong.pt --num_heads 3": ["encoder.pos_embedding (13, 1, 24)"],
        "list.pt": ["list.pt is whole, but"],
        "cut.safetensors": ["Cannot read cut.safetensors"],
        "timm.pt": ["number of heads: give --num_heads"],
        "timm.pt --num_heads 5": ["num_heads 5 does not divide embed_dim 24"],
        "timm.pt --num_heads 3 --embed_dim 48": ["embed_dim=24", "--embed_dim is 48"],
        "timm.pt --num_heads 3 --img_size 18": ["patch_size 4 does not divide img_size 18"],
        "timm.pt --num_heads 3 --img_size 2": ["patch_size 4 does not divide img_size 2"],
        "nowhere": ["nowhere"],
    }.items():
        with pytest.raises(SystemExit) as leaving:
            mae_pretrain.main([*SET, "--device", "cpu", "--init_from", *flags.split()])
        error = capsys.readouterr().err
        assert (leaving.value.code, error.count("\n")) == (2, 1), error
        assert all(fact in error for fact in facts), error
    assert set(Path().iterdir()) == before


# --- other sizes ---


@torch.no_grad()
def test_sizes_change_as_timm_changes_them(capsys):
    vit = timm_vit()
    torch.save(vit.state_dict(), "timm.pt")
    content, mae = read("timm.pt", num_heads=3, img_size=24, patch_size=3)
    assert content["said"][-1] == "Resampled: img_size 16 to 24, patch_size 4 to 3."
    position = resample_abs_pos_embed(vit.pos_embed, [8, 8])[:, 1:]
    close(mae.encoder.pos_embedding.transpose(0, 1), position)
    close(mae.encoder.patchify.weight, resample_patch_embed(vit.patch_embed.proj.weight, [3, 3]))
    vit.set_input_size((24, 24), (3, 3))
    close(mae.encoder(images(size=24)), vit.forward_features(images(size=24)))


def test_fixed_positions_are_computed_anew_and_the_decoder_keeps_its_own(mae, capsys):
    (content, own), state = read(mae), weights(mae)
    own_args = content["model_args"]
    _, larger = read(mae, img_size=48)
    assert torch.equal(own.decoder.head.weight, state["decoder.head.weight"])
    assert torch.equal(larger.decoder.head.weight, state["decoder.head.weight"])
    position = resample_abs_pos_embed(state["decoder.pos_embedding"].transpose(0, 1), [6, 6])
    close(larger.decoder.pos_embedding.transpose(0, 1), position)
    start_from(MAE_ViT(**own_args | {"positions": "sincos"}), content)
    assert "Not taken: encoder.pos_embedding (16, 1, 12), decoder.pos_embedding (17, 1, 12)." in capsys.readouterr().out
    fixed = pretrain("--positions", "sincos")
    _, larger = read(fixed, img_size=48)
    assert torch.equal(larger.encoder.pos_embedding, sincos_table(6, 12))
    run = classify("--pretrained_model_path", fixed, "--img_size", "48", "--base_learning_rate", "1e-9")
    close(weights(run)["pos_embedding"], sincos_table(6, 12))


@torch.no_grad()
def test_a_grey_image_means_what_its_three_equal_channels_meant(mae):
    grey = images(1, 32)
    _, colour_mae = read(mae)
    _, grey_mae = read(mae, in_chans=1)
    close(grey_mae.encoder(grey), colour_mae.encoder(grey.expand(-1, 3, -1, -1)))
    ids_shuffle = colour_mae.shuffle(5)
    pred, _ = colour_mae(grey.expand(-1, 3, -1, -1), ids_shuffle)
    close(grey_mae(grey, ids_shuffle)[0], pred.unflatten(2, (3, 64)).mean(2))  # of its channels
    for count in (1, 3):
        torch.save(grey_mae.state_dict(), "grey.pt")
        _, back = read("grey.pt", in_chans=count, num_heads=2)
        close(back.loss(grey.expand(-1, count, -1, -1), ids_shuffle), grey_mae.loss(grey, ids_shuffle))
    assert patchify(grey, 8).shape == (5, 16, 64)


# --- the scripts ---


def test_a_finished_run_gets_more_epochs_from_the_loss_it_had(capsys):
    first = pretrain(
        "--mask_strategy", "block", "--decoder_depth", "2", "--probe_every", "1", "--base_learning_rate", "1"
    )
    flags = ["--init_from", str(first), "--total_epoch", "2", "--warmup_epoch", "1", "--device", "cpu"]
    mae_pretrain.main([*flags, "--base_learning_rate", "1e-9", "--probe_every", "1"])
    (run,) = (path for path in first.parent.iterdir() if path != first)
    assert run.name.endswith(f"_block_r0.75_ep2_wu1_b16_lr1e-09_s42_from_{first.name}")
    assert read_metrics(run)[0]["test/loss"] == pytest.approx(read_metrics(first)[-1]["test/loss"], rel=1e-5)
    assert f"{first}/model.pt: Its encoder and decoder are where this run starts" in capsys.readouterr().out
    parent = read_run(run).parent
    assert {name: parent[name] for name in ("name", "layout", "path")} == {
        "name": first.name,
        "layout": "ours",
        "path": f"{first}/model.pt",
    }
    assert read_config(run)["settings"]["init_from"] == first.name
    mae_pretrain.main([*flags, "--base_learning_rate", "1e-9"])
    assert "Finished already" in capsys.readouterr().out
    runs = table("logs/pretrain")
    assert runs.init_from.to_dict() == {str(run): first.name, str(first): "none"}
    assert runs.mae.tolist() == [None, None]


def test_a_run_may_start_from_the_encoder_alone_under_other_masks_and_images(mae, capsys):
    flags = "--decoder_depth 2 --mask_strategy grid --patch_size 4 --in_chans 1 --img_size 24"
    run = pretrain("--init_from", mae, *shlex.split(flags), "--base_learning_rate", "1e-9")
    said = capsys.readouterr().out
    assert "Its encoder are where" not in said
    assert "Its encoder is where this run starts" in said
    assert "Resampled: img_size 32 to 24, patch_size 8 to 4, in_chans 3 to 1." in said
    name = "encoder.transformer.0.attn.qkv.weight"
    assert (weights(run)[name] - weights(mae)[name]).abs().max() < 1e-5
    assert weights(run)["encoder.patchify.weight"].shape == (12, 1, 4, 4)


def test_a_run_from_other_weights_continues_with_the_same_bits_and_knows_its_parent(mae, monkeypatch, capsys):
    def start(*flags):
        return pretrain("--init_from", mae, "--seed", "1", *flags)

    whole, tick = start("--log_dir", "whole"), Session.tick

    def stop_at_first(self):
        os.kill(os.getpid(), signal.SIGINT)
        tick(self)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "tick", stop_at_first)
        with pytest.raises(SystemExit):
            start("--log_dir", "parts")
    assert same_weights(whole, start("--log_dir", "parts"))
    content = load_file(mae / "model.pt")
    content["model"]["encoder.cls_token"] += 1
    save_file(mae / "model.pt", content)
    with pytest.raises(SystemExit):
        start("--log_dir", "parts")
    assert "other weights of the pretrained encoder" in capsys.readouterr().err


def test_others_weights_are_fine_tuned_and_measured(capsys):
    torch.save(timm_vit().state_dict(), "vit.pt")
    flags = ["--num_heads", "3", "--img_size", "24", "--in_chans", "1", "--base_learning_rate", "1e-9"]
    run = classify("--pretrained_model_path", "vit.pt", *flags, "--pool", "mean")
    assert run.name.endswith("_i24_c1_from_vit")
    model, content = load_model(run, ViT_Classifier)
    assert (content["model_args"]["qkv_bias"], content["model_args"]["norm_eps"]) == (True, 1e-6)
    assert torch.allclose(model.transformer[1].attn.qkv.bias, timm_vit().blocks[1].attn.qkv.bias, atol=1e-5)
    assert read_run(run).parent["layout"] == "official or timm"
    write_vit_mae(Path("vit-mae"))
    evaluate_features.main(shlex.split("--model_path vit-mae --dataset shapes --img_size 24 --pool mean --untrained"))
    assert Path("vit-mae/features_shapes_i24.csv").exists()
    assert "Resampled: img_size 16 to 24." in capsys.readouterr().out


def test_features_at_another_size_are_no_features_of_the_run(mae):
    evaluate_features.main(["--model_path", str(mae), "--img_size", "48"])
    assert (mae / "features_i48.csv").exists()
    assert read_run(mae).features == []
    with pytest.raises(UserError, match="patch_size 8 does not divide img_size 20"):
        read(mae, img_size=20)
