"""What a classifier predicts for the images of a set: counted, kept as a file of names, and read from it."""

import csv
from collections import Counter

import torch
import torch.nn.functional as F

from engine import processes
from engine.device import autocast
from engine.errors import UserError
from engine.files import replacing
from engine.records import csv_text

EVAL_BATCH = 500  # images whose losses are summed at once
REPORT_BATCH = 128  # the course report averages the accuracies of batches of so many
UNEVEN = 1.1  # classes are uneven if the largest has more than this times the mean number of images


@torch.no_grad()
def predict(model, images, prepare, precision, at_once):
    """The classes that a classifier predicts for images, (N,) int64 on the CPU, and its mean cross-entropy.

    Each image counts once, whatever the batches and processes. At most at_once images pass the model together, as in
    training, so that evaluating needs no more memory.

    Args:
        images: an ImageSet on the model's device; prepare: makes of its uint8 pixels what the model takes.
    """
    pixels, labels = images.images, images.labels
    loss, predicted = torch.zeros((), device=labels.device), torch.zeros_like(labels)
    for part in processes.shared_out(len(labels), EVAL_BATCH):
        with autocast(precision, labels.device):
            pooled = torch.cat([model.pooled(prepare(some)) for some in pixels[part].split(at_once)])
        logits = model.head(pooled.float())  # in float32: bf16 cannot tell near logits apart
        predicted[part] = logits.argmax(dim=1)
        loss += F.cross_entropy(logits, labels[part], reduction="sum")
    return processes.sum_over_ranks(predicted).cpu(), processes.sum_over_ranks(loss).item() / len(labels)


def is_uneven(labels):
    """Whether the largest class among labels (N,) has many more images than the mean one."""
    counts = labels.unique(return_counts=True)[1]
    return bool(counts.max() > UNEVEN * len(labels) / len(counts))


def accuracies_of(labels, predicted):
    """{column of metrics.csv: number} of labels and predicted classes (N,), on the CPU.

    test/balanced_acc, the mean of the classes' accuracies, is there where classes are uneven. test/acc_mean_of_batches
    is the course report's figure: the mean of the accuracies of batches of 128, in which a short last batch counts as
    much as a full one. For comparison with it only.
    """
    right = (predicted == labels).double()
    batches = torch.stack([part.mean() for part in right.split(REPORT_BATCH)])
    found = {"test/acc": right.mean().item(), "test/acc_mean_of_batches": batches.mean().item()}
    if is_uneven(labels):
        counts = labels.bincount()
        found["test/balanced_acc"] = (labels.bincount(right) / counts)[counts > 0].mean().item()
    return found


def write_predictions(path, classes, labels, predicted):
    """Write a CSV file with a row for each image: its index, its class and the predicted class.

    Args:
        classes: names, by label; labels, predicted: (N,) int64.
    """
    pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
    rows = [{"image": i, "label": classes[a], "prediction": classes[b]} for i, (a, b) in enumerate(pairs)]
    with replacing(path) as file:
        file.write(csv_text(rows).encode())


def read_predictions(path):
    """What `write_predictions` wrote: [(class, predicted class), ...], an image each."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [(row["label"], row["prediction"]) for row in csv.DictReader(file)]
    except (KeyError, OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error!r}. Copy the file again, or delete it.") from error


def table_by_class(pairs):
    """Lines of a table: each class, lowest accuracy first, with its images, accuracy and most frequent wrong class.

    Args:
        pairs: as `read_predictions` gives them.
    """
    sizes, right = Counter(label for label, _ in pairs), Counter(label for label, guess in pairs if label == guess)
    accuracy = {name: right[name] / size for name, size in sizes.items()}
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1]).most_common()[::-1]
    taken_for = {label: f"{guess} ({count / sizes[label]:.1%})" for (label, guess), count in wrong}  # the last counts
    width = max(8, *map(len, sizes))
    lines = [f"{'class':{width}} {'images':>7} {'accuracy':>9}  most often taken for"]
    for name in sorted(accuracy, key=accuracy.get):
        lines.append(f"{name:{width}} {sizes[name]:7,} {accuracy[name]:9.2%}  {taken_for.get(name, '')}".rstrip())
    share = right.total() / len(pairs)
    error = (share * (1 - share) / len(pairs)) ** 0.5  # binomial: of other test images
    lines.append(f"{'all':{width}} {len(pairs):7,} {share:9.2%}  ± {error:.2%} (standard error)")
    lines.append(f"{'balanced':{width}} {'':7} {sum(accuracy.values()) / len(sizes):9.2%}")
    return lines
