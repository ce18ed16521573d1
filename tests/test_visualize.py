"""visualize_predictions.py as a user starts it, on tiny models of fresh weights."""

import hashlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import visualize_predictions
from engine.checkpoints import digest, load_model, save_file
from engine.device import generator
from engine.figures import plt
from engine.predictions import read_predictions, table_by_class, write_predictions
from engine.records import read_run
from images import load
from images.pixels import normalize, read_image
from masks import MASK_STRATEGIES
from model import MAE_Encoder, MAE_ViT, ViT_Classifier
from visualize_predictions import main

ROOT = Path(__file__).parents[1]
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "encoder_depth": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    """Work in an empty directory; drawn test sets of 100 images and training sets of 50."""
    draw = load.shapes
    monkeypatch.setattr(load, "shapes", lambda count, img_size, seed: draw(50 * (seed + 1), img_size, seed))
    monkeypatch.chdir(tmp_path)


def save_model(path, model, **trained_on):
    content = {"kind": type(model).__name__, "model": model.state_dict(), "name": "tiny", "settings": {}}
    save_file(path, {**content, "parent": None, "dataset": "shapes", "data_dir": "data", **trained_on})
    return path


@pytest.fixture
def mae(few_shapes):
    """A run directory of a MAE, weights drawn."""
    torch.manual_seed(0)
    sizes = SIZE | {"decoder_depth": 1}
    save_model("run/model.pt", MAE_ViT(**sizes), model_args=sizes)
    return "run"


@pytest.fixture
def classifier(few_shapes):
    torch.manual_seed(0)
    classes = load.load_dataset("shapes", "data", 32)[1].classes
    save_model("cls/model.pt", ViT_Classifier(**SIZE), model_args=SIZE, classes=classes)
    return "cls"


def drawn(monkeypatch, *arguments):
    """The figure that is drawn, not written."""
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(visualize_predictions, "save", lambda figure, path: figures.append(figure))
        main(["--model_path", *map(str, arguments)])
    plt.close("all")
    return figures[0]


def picture_size(path):
    return plt.imread(path).shape


def test_pictures_of_a_mae_and_of_another_mask(mae):
    main(["--model_path", mae, "--num_images", "3"])
    main(["--model_path", f"{mae}/model.pt", "--mask_strategy", "block", "--num_images", "3"])
    assert picture_size("run/reconstructions.png")[0] > 400
    assert Path("run/reconstructions.png").read_bytes() != Path("run/reconstructions_block.png").read_bytes()


def test_pictures_of_normalised_pixels_tell_the_models_own_loss_and_what_they_borrow(monkeypatch):
    sizes = SIZE | {"decoder_depth": 1, "norm_pix_loss": True}
    model = MAE_ViT(**sizes)
    figure = drawn(monkeypatch, save_model("mae.pt", model, model_args=sizes), "--num_images", 3)
    assert "true mean and variance" in figure._suptitle.get_text()
    shown = [place.images[0].get_array() for place in figure.axes[-3:]]
    images = normalize(torch.tensor(np.stack(shown)).permute(0, 3, 1, 2))
    own = model.loss(images, model.shuffle(3, generator("cpu", 42, "masks"))).item()
    assert own > 0.5  # of pixels as they are it would be lower
    assert f"error {own:.4f}" in figure.axes[3].get_ylabel()


def test_several_masks_are_drawn_below_each_other_and_the_original_below_them(mae, monkeypatch):
    masks = shlex.split("--mask_strategy random block --mask_ratio 0.5 0.75 --num_images 2")
    figure = drawn(monkeypatch, mae, *masks)
    rows = [figure.axes[i : i + 2] for i in range(0, len(figure.axes), 2)]
    pixels = [[place.images[0].get_array() for place in row] for row in rows]
    labels = [row[0].get_ylabel() for row in rows]
    settings = [f"{strategy}\n{share}% hidden" for strategy in ("random", "block") for share in (50, 75)]
    assert labels[0:8:2] == settings
    assert all(re.fullmatch(r"reconstruction\nerror \d\.\d{4}", label) for label in labels[1:8:2])
    assert labels[8:] == ["original"]
    for masked, hidden in zip(pixels[0:8:2], (0.5, 0.75) * 2, strict=True):
        assert (masked[0] == 128).all(-1).mean() == hidden
        assert (masked[0] == pixels[8][0]).all(-1).mean() == 1 - hidden


def test_a_mae_of_unlabelled_images_is_shown_on_the_held_out_ones(image_folder, monkeypatch):
    sizes, place = SIZE | {"img_size": 16, "decoder_depth": 1}, str(image_folder / "train" / "cat")
    path = save_model("mae.pt", MAE_ViT(**sizes), model_args=sizes, dataset="folder", data_dir=place)
    original = drawn(monkeypatch, path).axes[-1].images[0].get_array()
    held_out = load.load_dataset("folder", place, 16, labelled=False)[1].images
    assert (original == held_out[0].permute(1, 2, 0).numpy()).all()


def turned_photo(path):
    """A JPEG of 96 x 64, green above red, stored as a turned camera stores it."""
    upright = Image.new("RGB", (96, 64), "green")
    upright.paste("red", (0, 32, 96, 64))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    return path


def test_own_images_are_reconstructed_upright_and_cropped_as_a_folder_is(mae, monkeypatch):
    Image.new("L", (20, 20), 100).save("grey.png")
    figure = drawn(monkeypatch, mae, "--images", turned_photo("photo.jpg"), "grey.png")
    assert [place.get_title() for place in figure.axes] == ["photo.jpg", "grey.png", *[""] * 4]
    photo, grey = (place.images[0].get_array() for place in figure.axes[4:])
    assert (photo == read_image("photo.jpg", 32).permute(1, 2, 0).numpy()).all()
    assert (photo[4, 16, 1] > 100) & (photo[28, 16, 0] > 200)  # green above, red below
    assert (grey == 100).all()


def test_a_classifier_names_three_classes_for_own_images_and_asks_for_no_data_set(classifier, monkeypatch):
    monkeypatch.setattr(visualize_predictions, "load_dataset", None)
    figure = drawn(monkeypatch, classifier, "--images", turned_photo("photo.jpg"))
    model, content = load_model(classifier, ViT_Classifier)
    with torch.no_grad():
        shares = model(normalize(read_image("photo.jpg", 32))[None])[0].softmax(dim=0)
    best = sorted(zip(shares.tolist(), content["classes"], strict=True), reverse=True)[:3]
    assert figure.axes[0].get_title() == "photo.jpg"
    assert figure.axes[0].get_xlabel() == "\n".join(f"{name} {share:.0%}" for share, name in best)


def test_a_classifiers_predictions_stand_below_the_test_images_and_their_classes_above(classifier, monkeypatch):
    figure = drawn(monkeypatch, classifier, "--num_images", 5)
    _, test = load.load_dataset("shapes", "data", 32)
    chosen = torch.randperm(100, generator=generator("cpu", 42, "images"))[:5]
    with torch.no_grad():
        confidence, predicted = (
            load_model(classifier, ViT_Classifier)[0](normalize(test.images[chosen])).softmax(dim=1).max(dim=1)
        )
    for place, image, guess, sure in zip(figure.axes[:5], chosen, predicted, confidence, strict=True):
        assert (place.images[0].get_array() == test.images[image].permute(1, 2, 0).numpy()).all()
        assert place.get_title() == test.classes[test.labels[image]]
        assert place.get_xlabel().split(" ", 1)[1] == f"{test.classes[guess]} {sure:.0%}"


def test_a_picture_of_a_classifier_goes_where_it_is_asked_for(classifier):
    main(["--model_path", classifier, "--num_images", "10", "--output", "deep/p.png"])
    assert picture_size("deep/p.png")[1] > 400
    assert not list(Path(classifier).glob("*.png"))


def test_a_classifier_is_tested_by_class_on_another_test_set_by_name(classifier, capsys):
    for name, place in (("ring", "other/ring"), ("bar", "other/bar")):  # no train/, and other classes' places
        Path(place).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{place}/{name}{i}.png")
    Path("other/bar/notes.txt").touch()
    main(["--model_path", classifier, "--by_class", "--dataset", "folder", "--data_dir", "other"])
    model, content = load_model(classifier, ViT_Classifier)
    images = torch.stack([read_image(f"other/{name}/{name}{i}.png", 32) for name in ("bar", "ring") for i in range(3)])
    with torch.no_grad():
        guesses = [content["classes"][i] for i in model(normalize(images)).argmax(1)]
    expected = list(zip(["bar"] * 3 + ["ring"] * 3, guesses, strict=True))
    assert read_predictions("cls/predictions_other.csv") == expected
    said = capsys.readouterr().out
    assert "\n".join(table_by_class(expected)) in said
    assert "other, test images: Not read: 1 x .txt" in said
    assert Path("cls/predictions.png").exists()


def test_what_a_run_has_kept_is_shown_by_class_without_predicting_again(classifier, capsys, monkeypatch):
    write_predictions(Path("cls/predictions.csv"), ["cat", "dog"], torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    monkeypatch.setattr(visualize_predictions, "predict", lambda *_: pytest.fail("predicted"))
    main(["--model_path", classifier, "--by_class", "--num_images", "1"])
    assert "cat (50.0%)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["mae", "classifier"])
def test_a_picture_of_one_image_has_its_whole_title(kind, request, monkeypatch):
    figure = drawn(monkeypatch, request.getfixturevalue(kind), "--num_images", 1)
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 > -2
    assert title.x1 < figure.bbox.width + 2
    assert title.y0 > max(axes.get_window_extent().y1 for axes in figure.axes)


def test_gallery_of_masks_needs_no_model():
    main(["--masks", "--mask_strategy", "grid", "--grid_size", "4"])
    assert picture_size("masks.png")[1] > 400
    gallery = visualize_predictions.draw_gallery(visualize_predictions.parse_args(["--masks", "--grid_size", "4"]))
    shares = dict(zip(MASK_STRATEGIES, gallery.axes[6::7], strict=False))
    assert [place.get_ylabel() for place in gallery.axes[0 : 7 * len(MASK_STRATEGIES) : 7]] == [*MASK_STRATEGIES]
    share = shares["grid"].images[0].get_array()
    assert (share.sum(), share[0, 0]) == (4, 1)
    plt.close(gallery)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--model_path --masks"),
        ("--model_path a.pt --num_images 101", "--num_images 101.*100"),
        ("--masks --mask_ratio 0.5 0.75", "--mask_ratio"),
        ("--masks --mask_ratio 0.999", "0.999.*0.004 to 0.996"),
        ("--masks --images a.png", "--images.*--model_path"),
        ("--masks --output .png", r"'\.png'.*\.png"),
        ("--model_path a.pt --images a.png --num_images 2", "--images.*--num_images"),
        (f"--model_path a.pt --images {'a.png ' * 101}", "--images.*101.*100"),
        ("--masks --num_images -1", "--num_images: '-1'"),
        ("--masks --mask_strategy spiral", "'spiral'.*random"),
        ("--masks --mask_strategy grid --output run/model.pt/a.png", "model.pt"),
        ("--model_path nowhere", "nowhere"),
        ("--model_path run/cut.pt", "run/cut.pt"),
        ("--model_path checkpoint.pt", "checkpoint.pt.*MAE_ViT or ViT_Classifier"),
        ("--model_path cls --mask_ratio 0.5", "cls.*leave out --mask"),
        ("--model_path cls --dataset folder --data_dir pets", "cls.*circle.*folder.*cat"),
        ("--model_path run --by_class", "--by_class.*classifier"),
        ("--model_path cls --by_class --images a.png", "--images.*--by_class"),
        ("--model_path run --images nowhere.png", "nowhere.png"),
        ("--model_path run --images text.png", "text.png"),
    ],
)
def test_bad_input_gets_one_line_and_draws_nothing(
    arguments, message, mae, classifier, image_folder, capsys, monkeypatch
):
    Path("run/cut.pt").write_bytes(Path("run/model.pt").read_bytes()[:-2000])
    save_file("checkpoint.pt", {"kind": "checkpoint"})
    Path("text.png").write_text("not an image")
    monkeypatch.setattr(sys, "argv", ["visualize_predictions.py"])
    with pytest.raises(SystemExit) as leaving:
        main(shlex.split(arguments))
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("visualize_predictions.py: error: ")
    assert re.search(message, error), error
    assert not list(Path().rglob("reconstructions*"))
    assert not list(Path().rglob("predictions*"))


def test_a_mae_with_a_strategy_that_is_gone_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(MASK_STRATEGIES, "mine", MASK_STRATEGIES["random"])
    sizes = SIZE | {"decoder_depth": 1, "mask_strategy": "mine"}
    path = save_model("mae.pt", MAE_ViT(**sizes), model_args=sizes)
    monkeypatch.delitem(MASK_STRATEGIES, "mine")
    with pytest.raises(SystemExit):
        main(["--model_path", path])
    assert re.search("mae.pt.*'mine'.*random.*\n$", capsys.readouterr().err)


@pytest.mark.slow
def test_the_shipped_model_is_what_its_page_tells_of_and_fills_in_a_photo(tmp_path):
    shipped = tmp_path / "pretrained"
    shutil.copytree(ROOT / "pretrained", shipped)
    file = (shipped / "model.pt").read_bytes()
    assert hashlib.sha256(file).hexdigest() in (shipped / "README.md").read_text()
    record, (_, content) = read_run(shipped), load_model(shipped, MAE_ViT)
    assert content["settings"] == record.settings
    assert [table["model_digest"] for table in record.features] == [digest(content["model"])]
    main(["--model_path", str(shipped), "--images", turned_photo("photo.jpg")])
    assert picture_size(shipped / "reconstructions_images.png")[0] > 200


@pytest.mark.parametrize("kind", [MAE_ViT, ViT_Classifier])
def test_attention_is_the_models_own_in_each_block(kind, monkeypatch):
    sizes = SIZE | {"encoder_depth": 2}
    path = save_model("two.pt", kind(**sizes), model_args=sizes, classes=list(load.shapes(10, 8, 0).classes))
    model, _ = load_model(path, kind)
    encoder, seen = getattr(model, "encoder", model), []
    for block in encoder.transformer:
        block.attn.fused_attn = False  # so that its weights pass the dropout
        block.attn.attn_drop.register_forward_hook(lambda module, given, result: seen.append(result))
    MAE_Encoder.forward(encoder, normalize(read_image(turned_photo("photo.jpg"), 32)[None]))
    for block in (1, 2):
        figure = drawn(monkeypatch, path, "--attention", "--images", "photo.jpg", "--block", block)
        shown = [place.images[0].get_array() for place in figure.axes]
        heads = seen[block - 1][0, :, 0, 1:].unflatten(1, (4, 4)).detach()  # of the cls token
        for drawn_map, weights in zip(shown[1:], [heads.mean(0), *heads], strict=True):
            torch.testing.assert_close(torch.tensor(drawn_map), weights / weights.max(), rtol=0, atol=1e-5)
        assert [place.get_ylabel() for place in figure.axes] == ["image", "mean of heads", "head 1", "head 2"]
        assert f"block {block} of 2" in figure._suptitle.get_text()
    main(["--model_path", path, "--attention", "--num_images", "2"])
    assert picture_size("attention.png")[0] > 400


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--block 1", "--block goes with --attention"),
        ("--attention --mask_ratio 0.5", "without --mask_"),
        ("--attention --block 2", "--block takes 1 to 1"),
    ],
)
def test_attention_that_cannot_be_drawn_gets_one_line(flags, message, mae, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--model_path", mae, *flags.split()])
    error = capsys.readouterr().err
    assert (leaving.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not list(Path(mae).glob("*.png"))
