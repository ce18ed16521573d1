import pytest
import torch

from engine.errors import UserError
from engine.predictions import accuracies_of, read_predictions, table_by_class, write_predictions

CLASSES = ["cat", "dog, big", "émeu"]
LABELS, PREDICTED = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 2, 1, 0, 0, 2])


def test_what_is_written_is_read_by_name(tmp_path):
    write_predictions(tmp_path / "predictions.csv", CLASSES, LABELS, PREDICTED)
    names = [(CLASSES[a], CLASSES[b]) for a, b in zip(LABELS, PREDICTED, strict=True)]
    assert read_predictions(tmp_path / "predictions.csv") == names
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name in ("other.csv", "none.csv"):
        with pytest.raises(UserError, match=f"Cannot read .*{name}"):
            read_predictions(tmp_path / name)


def test_a_table_by_class_has_the_lowest_accuracy_first_and_what_a_class_is_taken_for():
    lines = table_by_class([(CLASSES[a], CLASSES[b]) for a, b in zip(LABELS, PREDICTED, strict=True)])
    assert [line.split() for line in lines] == [
        ["class", "images", "accuracy", "most", "often", "taken", "for"],
        ["dog,", "big", "3", "33.33%", "cat", "(66.7%)"],
        ["cat", "5", "60.00%", "dog,", "big", "(20.0%)"],
        ["émeu", "1", "100.00%"],
        ["all", "9", "55.56%", "±", "16.56%", "(standard", "error)"],
        ["balanced", "64.44%"],
    ]


def test_balanced_accuracy_is_the_classes_mean_whatever_their_sizes_and_left_out_where_they_are_even():
    found = accuracies_of(LABELS, PREDICTED)
    assert found["test/acc"] == pytest.approx(5 / 9)
    assert found["test/balanced_acc"] == pytest.approx((3 / 5 + 1 / 3 + 1) / 3)
    some = torch.tensor([0, 1, 5, 6, 8])  # two of a class, none of the class 3 that is predicted
    found = accuracies_of(LABELS[some], torch.tensor([0, 3, 1, 1, 2]))
    assert found["test/balanced_acc"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    even = torch.tensor([0, 0, 1, 1])
    assert accuracies_of(even, even.flip(0)).keys() == {"test/acc", "test/acc_mean_of_batches"}
