"""Curves of runs, from runs written by hand."""

from pathlib import Path

import pytest
from made_runs import make_classifier, make_mae

from engine.figures import plt
from scripts import plot_curves

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(plot_curves, "save", lambda figure, path: figures.append(figure))
    return figures


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_runs_are_named_by_the_settings_and_seeds_in_which_they_differ(drawn):
    one, other = make_mae(1, decoder_depth=2), make_mae(2, mask_strategy="grid")
    plot_curves.main([str(one), str(other)])
    assert legend(drawn[-1]) == [
        "decoder_depth=2 mask_strategy=random seed=1",
        "decoder_depth=4 mask_strategy=grid seed=2",
    ]
    runs = [make_classifier(1, one, end="a"), make_classifier(1, one, end="b", pool="mean"), make_classifier(1)]
    plot_curves.main(list(map(str, [one, *runs])))
    tuned = ["pretrained finetune/pool=cls", "finetune/pool=mean"]
    assert legend(drawn[-1])[0].startswith("MAE ")
    assert legend(drawn[-1])[1:] == ["finetune/pool=cls", tuned[1], "from scratch finetune/pool=cls"]
    plot_curves.main([str(one)])
    assert legend(drawn[-1]) == ["all runs"]


def test_the_legend_says_the_number_of_labels_where_it_differs(drawn):
    few, all_labels = make_classifier(1, make_mae(1), train_images=500), make_classifier(1)
    plot_curves.main([str(few), str(all_labels)])
    assert legend(drawn[-1]) == ["finetune/train_images=500", "from scratch finetune/train_images=all"]


def test_runs_that_differ_in_nothing_are_named_by_their_paths(drawn):
    one, other = make_mae(1, root="one"), make_mae(1, root="other")
    plot_curves.main([str(one), str(other)])
    assert [label.replace("\n", "") for label in legend(drawn[-1])] == [str(one), str(other)]
    plot_curves.main([str(one), str(other), "--label", "a", "b"])
    assert legend(drawn[-1]) == ["a", "b"]
    with pytest.raises(SystemExit):
        plot_curves.main([str(one), str(other), "--label", "a"])


def test_the_accuracy_is_that_of_all_runs_or_the_k_nn_accuracy_of_those_that_have_it(capsys):
    mae, run = make_mae(1), make_classifier(1)
    plot_curves.main([str(run)])
    assert "epoch 2: training loss 1.0000, test accuracy 0.5000\n" in capsys.readouterr().out
    plot_curves.main([str(mae), str(run), "--output", "deep/c.png"])
    said = capsys.readouterr().out
    assert "epoch 3: training loss 1.0000, k-NN accuracy 0.1200\n" in said
    assert "epoch 2: training loss 1.0000\n" in said
    assert plt.imread("deep/c.png").shape[1] > 400
    plot_curves.main([str(run), "--metric", "test/acc_mean_of_batches"])
    assert "test/acc_mean_of_batches 0.5010" in capsys.readouterr().out
    for arguments, message in (
        ([str(mae), "--metric", "test/acc"], f"{mae} has no test/acc; it has epoch, "),
        (["x"], "x"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            plot_curves.main(arguments)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


def test_a_run_without_a_complete_epoch_is_named(capsys):
    run = make_mae(1)
    (run / "metrics.csv").write_text("epoch,train/loss\n")
    with pytest.raises(SystemExit):
        plot_curves.main([str(run)])
    assert f"{run} has no metrics.csv with a complete epoch" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 24])
def test_the_legend_of_long_names_lies_below_the_plots_and_leaves_them_their_size(count, drawn):
    names = [f"cls_cifar10-jpeg_n10000_ep8_b100_s{i}_from_mae_cifar10-jpeg_p4_w64_e4_h4_d4_s{i}" for i in range(count)]
    plot_curves.main([*(str(make_classifier(i)) for i in range(count)), "--label", *names])
    (figure,) = drawn
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert len(legend(figure)) == count
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    for axes in figure.axes:
        assert axes.get_window_extent().y0 > box.y1
        assert (axes.get_window_extent().size / figure.dpi > (4, 3)).all()
