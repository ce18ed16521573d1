import torch

import figures
from figures import plt


def test_an_image_is_shown_upright_and_grey_from_0_to_1():
    _, axes = plt.subplots(1, 2)
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    figures.show(axes[0], pixels)
    figures.show(axes[1], torch.full((4, 5), 0.5))
    assert (axes[0].images[0].get_array() == pixels.permute(1, 2, 0).numpy()).all()
    assert axes[1].images[0].get_clim() == (0, 1)
    plt.close()


def test_a_figure_is_saved_where_asked_and_closed(tmp_path):
    figure, _ = plt.subplots()
    figures.save(figure, tmp_path / "new" / "f.png")
    assert plt.imread(tmp_path / "new" / "f.png").shape[2] == 4
    assert not plt.fignum_exists(figure.number)
