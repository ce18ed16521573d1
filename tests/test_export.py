"""Encoders and classifiers taken to timm and transformers compute what they did here."""

import functools
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from engine.checkpoints import load_file, load_model, save_file
from images.pixels import normalize
from model import MAE_ViT, ViT_Classifier
from scripts import export

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "encoder_depth": 2, "num_heads": 3}
OTHER = {"num_classes": 3, "in_chans": 1, "qkv_bias": True, "norm_eps": 1e-6}  # as from weights from elsewhere
NAMES = ["cat", "dog", "eel"]
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def models(monkeypatch, tmp_path):
    """A MAE, a classifier and one that pools the mean, all weights drawn: mae.pt, classifier.pt and mean.pt."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sincos = {"decoder_depth": 1, "positions": "sincos"}
    for name, model, more in (
        ("mae", MAE_ViT(**SIZES, decoder_depth=1), {"decoder_depth": 1}),
        ("sincos", MAE_ViT(**SIZES, **sincos), sincos),
        ("classifier", ViT_Classifier(**SIZES, num_classes=3), {"num_classes": 3}),
        ("mean", ViT_Classifier(**SIZES, num_classes=3, pool="mean"), {"num_classes": 3, "pool": "mean"}),
        ("grey", ViT_Classifier(**SIZES, **OTHER), OTHER),
    ):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        content = {"kind": type(model).__name__, "model_args": SIZES | more, "model": model.state_dict(), "name": name}
        content |= {"settings": {}, "parent": None, "dataset": "shapes", "data_dir": "data"}
        save_file(f"{name}.pt", content | ({"classes": NAMES} if isinstance(model, ViT_Classifier) else {}))


def images():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def in_timm(path):
    content = load_file(path, "timm")
    model = VisionTransformer(**content["model_args"], norm_layer=partial(torch.nn.LayerNorm, eps=content["norm_eps"]))
    model.load_state_dict(content["model"])
    return model.eval()


@torch.no_grad()
def test_a_mae_and_a_classifier_compute_the_same_in_timm(capsys):
    for name in ("mae.pt", "sincos.pt"):
        export.main([name, "--to", "timm"])
        mae, _ = load_model(name, MAE_ViT)
        assert not load_file("timm.pt")["model"]["pos_embed"][:, 0].any()  # of cls, which has none
        close(in_timm("timm.pt").forward_features(images()), mae.encoder(images()))
    export.main(["classifier.pt", "--to", "timm", "--output", "there/c.pt"])
    classifier, _ = load_model("classifier.pt", ViT_Classifier)
    close(in_timm("there/c.pt")(images()), classifier(images()))
    said = capsys.readouterr().out
    assert (
        "VisionTransformer(img_size=16, patch_size=4, in_chans=3, num_classes=3, embed_dim=24, depth=2, num_heads=3, "
        in said
    )
    names = {"functools": functools, "torch": torch, "VisionTransformer": VisionTransformer}
    exec("\n".join(said.splitlines()[-4:-1]), names)
    close(names["model"](images()), classifier(images()))


@torch.no_grad()
def test_a_classifier_that_pools_the_mean_computes_the_same_in_timm(capsys):
    export.main(["mean.pt", "--to", "timm"])
    close(in_timm("timm.pt")(images()), load_model("mean.pt", ViT_Classifier)[0](images()))
    assert "global_pool='avg'" in capsys.readouterr().out


@torch.no_grad()
def test_one_channel_biases_and_eps_go_with_an_encoder():
    export.main(["grey.pt", "--to", "timm"])
    grey, classifier = images()[:, :1], load_model("grey.pt", ViT_Classifier)[0]
    close(in_timm("timm.pt")(grey), classifier(grey))
    export.main(["grey.pt", "--to", "hf"])
    config = json.loads(Path("hf/config.json").read_text())
    assert [config[name] for name in ("num_channels", "layer_norm_eps", "qkv_bias")] == [1, 1e-6, True]
    assert json.loads(Path("hf/preprocessor_config.json").read_text())["image_mean"] == [0.5]


@pytest.mark.slow
@torch.no_grad()
def test_transformers_loads_what_is_written_for_it_and_computes_the_same(capsys):
    transformers = pytest.importorskip("transformers")
    export.main(["mae.pt", "--to", "hf"])
    model, report = transformers.ViTModel.from_pretrained("hf", add_pooling_layer=False, output_loading_info=True)
    assert not any(report.values())
    mae, _ = load_model("mae.pt", MAE_ViT)
    close(model.eval()(images()).last_hidden_state, mae.encoder(images()))
    assert 'transformers.ViTModel.from_pretrained("hf", add_pooling_layer=False)' in capsys.readouterr().out
    export.main(["classifier.pt", "--to", "hf", "--output", "there"])
    assert 'transformers.ViTForImageClassification.from_pretrained("there")' in capsys.readouterr().out
    model, report = transformers.ViTForImageClassification.from_pretrained("there", output_loading_info=True)
    assert not any(report.values())
    classifier, _ = load_model("classifier.pt", ViT_Classifier)
    close(model.eval()(images()).logits, classifier(images()))
    assert model.config.id2label[2] == "eel"
    assert json.loads(Path("there/config.json").read_text())["qkv_bias"] is False


@pytest.mark.slow
@torch.no_grad()
def test_transformers_prepares_pictures_as_we_do(capsys):
    transformers = pytest.importorskip("transformers")
    export.main(["classifier.pt", "--to", "hf"])
    pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    processor = transformers.AutoImageProcessor.from_pretrained("hf")
    prepared = processor(Image.fromarray(pixels.numpy()), return_tensors="pt")["pixel_values"]
    close(prepared, normalize(pixels.permute(2, 0, 1)[None]))
    assert processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
    classifier, _ = load_model("classifier.pt", ViT_Classifier)
    (best, *_) = transformers.pipeline("image-classification", model="hf")(Image.fromarray(pixels.numpy()))
    assert best["label"] == NAMES[classifier(prepared).argmax()]


def test_a_processor_is_written_beside_an_exported_model():
    export.main(["mae.pt", "--to", "hf"])
    processor = json.loads(Path("hf/preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 16, "width": 16}
    assert (processor["image_mean"], processor["image_std"], processor["resample"]) == ([0.5] * 3, [0.5] * 3, 2)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_an_exported_program_takes_any_number_of_images():
    for model in (load_model("classifier.pt", ViT_Classifier)[0], load_model("mae.pt", MAE_ViT)[0].encoder):
        sizes = ({0: torch.export.Dim("count", min=1, max=64)},)
        program = torch.export.export(model.eval(), (images(),), dynamic_shapes=sizes).module()
        traced = torch.jit.trace(model, images()[:1])
        for count in (1, 3, 5):
            for exported in (program, traced):
                close(exported(images()[:count]), model(images()[:count]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_onnx_takes_any_number_of_images():
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    model, _ = load_model("classifier.pt", ViT_Classifier)
    sizes = ({0: torch.export.Dim("count", min=1, max=64)},)
    torch.onnx.export(model.eval(), (images(),), "classifier.onnx", dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession("classifier.onnx")
    for count in (1, 3, 5):
        given = {session.get_inputs()[0].name: images()[:count].numpy()}
        close(torch.from_numpy(session.run(None, given)[0]), model(images()[:count]))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("mae.pt", "--to"),
        ("timm.pt --to timm", "timm.pt.*MAE_ViT or ViT_Classifier"),
        ("nowhere.pt --to hf", "nowhere.pt"),
        ("classifier.pt --to hf --output mae.pt", "mae.pt"),
        ("mean.pt --to hf", "cannot pool the mean.*--to timm"),
    ],
)
def test_what_cannot_be_exported_gets_one_line(command, message, capsys):
    export.main(["mae.pt", "--to", "timm"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        export.main(command.split())
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
