"""The look of every figure: drawn without a display, in colours and lines for all kinds of colour vision."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# of Okabe and Ito's palette, each with a line of its own
STYLES = [("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", "-."), ("#cc79a7", ":"), ("#000000", (0, (5, 1)))]


def show(axes, image):
    """Draw one image, pixels (3, H, W) uint8 or grey (H, W) in [0, 1], without axes."""
    if image.ndim == 3:
        image = image.permute(1, 2, 0)
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def save(figure, path):
    """Write a figure, its directory made where missing, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
