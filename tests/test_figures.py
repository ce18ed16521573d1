import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import font_manager

from engine import figures
from engine.figures import STYLES, plt


def test_an_image_is_shown_upright_and_grey_from_0_to_1():
    _, axes = plt.subplots(1, 2)
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    figures.show(axes[0], pixels)
    figures.show(axes[1], torch.full((4, 5), 0.5))
    assert (axes[0].images[0].get_array() == pixels.permute(1, 2, 0).numpy()).all()
    assert axes[1].images[0].get_clim() == (0, 1)
    plt.close()


def test_rows_of_images_carry_a_label_each():
    _, axes = plt.subplots(2, 3)
    images = torch.rand(2, 3, 4, 4)
    figures.draw_rows(axes, {"above": images[0], "below": images[1]}, fontsize=7)
    assert [[place.get_ylabel() for place in row] for row in axes] == [["above", "", ""], ["below", "", ""]]
    assert axes[1, 0].yaxis.label.get_size() == 7
    for place, image in zip(axes.flat, images.flatten(0, 1), strict=True):
        assert (place.images[0].get_array() == image.numpy()).all()
    plt.close()


def test_predictions_right_and_wrong_differ_in_colour_sign_and_frame():
    images, labels, predicted = torch.zeros(9, 3, 4, 4, dtype=torch.uint8), torch.tensor([0] * 8 + [1]), torch.zeros(9)
    figure = figures.draw_predictions(
        images, ["cat", "dog"], labels, predicted.long(), torch.full((9,), 0.9), ", seed 1"
    )
    right, wrong = figure.axes[0], figure.axes[8]
    assert (right.get_title(), wrong.get_title()) == ("cat", "dog")
    assert (right.get_xlabel(), wrong.get_xlabel()) == ("✓ cat 90%", "✗ cat 90%")
    for part in (lambda axes: axes.xaxis.label.get_color(), lambda axes: axes.spines["top"].get_edgecolor()):
        assert part(right) != part(wrong)
    assert right.spines["top"].get_linewidth() < wrong.spines["top"].get_linewidth()
    assert [place.axison for place in figure.axes] == [True] * 9 + [False] * 7
    assert figure.get_suptitle().endswith(" 8 of 9 right, seed 1")
    plt.close(figure)


def test_the_most_likely_classes_stand_below_an_image_the_first_above():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    probabilities = torch.tensor([[0.05, 0.6, 0.3, 0.05]])
    figure = figures.draw_most_likely(images, ["$a$.png"], ["cat", "dog", "fox", "owl"], probabilities, count=2)
    assert figure.axes[0].get_title() == "$a$.png"
    assert figure.axes[0].get_xlabel() == "dog 60%\nfox 30%"
    few = figures.draw_most_likely(images, ["a" * 30 + ".png"], ["cat"], torch.ones(1, 1))
    assert few.axes[0].get_xlabel() == "cat 100%"
    assert few.axes[0].get_title() == "aaaaaaaaa…aaaaaa.png"
    plt.close("all")


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (13, 8), (2, 3)])
@pytest.mark.slow
def test_a_title_lies_within_the_figure_and_above_all_images(rows, columns):
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns + 1, 1.3 * rows + 0.6), squeeze=False)
    figures.draw_rows(axes, {str(i): torch.zeros(columns, 4, 4) for i in range(rows)})
    figures.draw_title(figure, "Trained with random masks, ratio 0.75. Error: mean square over hidden pixels. Seed 42")
    figure.draw_without_rendering()
    title, (width, height) = figure._suptitle.get_window_extent(), figure.canvas.get_width_height()
    assert 0 <= title.x0 < title.x1 <= width
    assert max(place.get_window_extent().y1 for place in axes[0]) < title.y0 < title.y1 <= height
    plt.close(figure)


def test_curves_are_means_over_seeds_with_their_range_as_a_band():
    _, axes = plt.subplots()
    curves = [("one", [1, 2], [[0.1, 0.2]]), ("three", [2, 3], [[0.2, 0.8], [0.4, 0.9], [0.9, 1.0]])]
    figures.draw_curves(axes, curves, "accuracy", percent=True)
    one, three = axes.lines
    assert (one.get_label(), list(one.get_xdata()), list(one.get_ydata())) == ("one", [1, 2], [0.1, 0.2])
    assert list(three.get_xdata()) == [2, 3]
    torch.testing.assert_close(list(three.get_ydata()), [0.5, 0.9])
    (band,) = axes.collections  # of the second alone
    assert band.get_datalim(axes.transData).extents.round(6).tolist() == [2, 0.2, 3, 1.0]
    assert [line.get_color() for line in axes.lines] == [colour for colour, _ in STYLES[:2]]
    assert axes.yaxis.get_major_formatter()(0.5) == "50%"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "accuracy")
    plt.close()


def test_a_line_goes_on_over_epochs_without_a_value():
    _, axes = plt.subplots()
    figures.draw_curves(axes, [("", [1, 2, 3, 4], [[0.1, math.nan, 0.3, math.nan]])], "k-NN accuracy")
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.1], [3, 0.3]]
    plt.close()


def test_epochs_are_marked_where_the_line_alone_says_too_little():
    _, axes = plt.subplots()
    rising, nan = list(range(20)), [math.nan] * 19
    tables = [[rising], [rising[:19]], [[*nan, 1]], [rising[:19]] * 2, [[*nan, 1], [*nan, 2]], [[1.0]]]
    figures.draw_curves(axes, [("", range(len(values[0])), values) for values in tables], "loss")
    assert [line.get_marker() == "o" for line in axes.lines] == [False, True, True, False, True, True]
    assert axes.lines[5].get_color() == STYLES[0][0]  # the colours go round
    plt.close()


def test_one_epoch_is_a_whole_number_on_its_axis():
    _, axes = plt.subplots()
    figures.draw_curves(axes, [("", [1], [[0.5]])], "loss")
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    plt.close()


def test_25_lines_differ_in_colour_or_dashes_the_first_ones_in_both():
    _, axes = plt.subplots()
    figures.draw_curves(axes, [("", [1], [[1.0]])] * 25, "loss")
    looks = [(line.get_color(), line._unscaled_dash_pattern) for line in axes.lines]
    assert len(set(looks)) == 25
    assert [len(set(part)) for part in zip(*looks[:5], strict=True)] == [5, 5]
    plt.close()


def test_a_matrix_shows_its_numbers_readable_on_colours_that_do_not_stretch():
    figure = figures.draw_matrix(torch.tensor([[11.0, 5.0, 90.0], [12.0, 3.0, 4.0]]), "ab", "xyz", "to", "from")
    (axes,) = figure.axes
    cells = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert cells[0, 0] == ("11", "white")
    assert cells[2, 0] == ("90", "black")
    assert cells[0, 1] == ("12", "white")
    assert axes.images[0].get_clim() == (0, 100)  # 11 and 12 look alike
    assert [label.get_text() for label in axes.get_xticklabels()] == list("xyz")
    assert [label.get_text() for label in axes.get_yticklabels()] == list("ab")
    plt.close(figure)


def test_a_figure_is_saved_where_asked_and_closed(tmp_path):
    figure, _ = plt.subplots()
    figures.save(figure, tmp_path / "new" / "f.png")
    assert plt.imread(tmp_path / "new" / "f.png").shape[2] == 4
    assert not plt.fignum_exists(figure.number)


def test_a_notebooks_backend_that_is_not_installed_here_does_no_harm():
    """As under `!python ...` in Colab, Kaggle and Jupyter, which export MPLBACKEND."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_of_a_notebook"}
    root = Path(__file__).parents[1]
    code = "from engine.figures import plt; plt.subplots(); print(plt.get_backend())"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, env=environment, text=True) == "agg\n"
    importers = [path for path in root.glob("[!.t]*/*.py") if "from matplotlib" in path.read_text()]
    assert [path.name for path in [*importers, *root.glob("*.py")] if "matplotlib" in path.read_text()] == [
        "figures.py"
    ]


ONLY_IN_STIX = "\ue000\ue001"  # letters of a font that matplotlib brings, and of no other


@pytest.fixture
def own_fonts(monkeypatch):
    """Only the fonts that come with matplotlib; a family that is as it was after the test."""
    ours = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", ours)
    with plt.rc_context():
        yield


def predicted(classes):
    images, zeros = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    return figures.draw_predictions(images, classes, torch.tensor([0, 1]), zeros, torch.ones(2))


@pytest.mark.filterwarnings("error")
def test_class_names_that_no_font_has_are_drawn_as_numbers_with_one_line(own_fonts, tmp_path, capsys):
    figure = predicted(["猫", "狗"])
    assert [axes.get_title() for axes in figure.axes] == ["class 0", "class 1"]
    figure.axes[0].set_title("猫 cat")  # a file's name, say
    figures.save(figure, tmp_path / "a.png")
    assert figure.axes[0].get_title() == "? cat"
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("end", ["png", "pdf", "svg"])
def test_letters_that_another_font_has_are_drawn_with_it(end, own_fonts, tmp_path, capsys):
    figure = predicted([ONLY_IN_STIX[0], ONLY_IN_STIX[1]])
    figures.save(figure, tmp_path / f"a.{end}")
    assert [axes.get_title() for axes in figure.axes] == list(ONLY_IN_STIX)
    assert capsys.readouterr().out == ""
    assert len(plt.rcParams["font.family"]) > 1
