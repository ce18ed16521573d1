import os

import pytest
import torch

from engine.checkpoints import digest, load_file, save_file


def test_a_saved_file_comes_back_and_leaves_nothing_beside_it(tmp_path):
    save_file(tmp_path / "deep" / "a.pt", {"kind": "toy", "weights": torch.arange(5), "names": ["a"]})
    content = load_file(tmp_path / "deep" / "a.pt", "toy")
    assert content["weights"].tolist() == [0, 1, 2, 3, 4]
    assert os.listdir(tmp_path / "deep") == ["a.pt"]


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    save_file(tmp_path / "a.pt", {"kind": "toy", "value": 1})

    def fails_half_way(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fails_half_way)
    with pytest.raises(OSError, match="No space"):
        save_file(tmp_path / "a.pt", {"kind": "toy", "value": 2})
    monkeypatch.undo()
    assert load_file(tmp_path / "a.pt")["value"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "a.pt"
    save_file(path, {"kind": "toy", "weights": torch.randn(2000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep >= 1 else int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"Cannot read .*a\.pt"):
        load_file(path)


def test_files_that_are_not_what_is_needed_are_named(tmp_path):
    save_file(tmp_path / "a.pt", {"kind": "ViT_Classifier"})
    with pytest.raises(ValueError, match="holds ViT_Classifier; MAE_ViT is needed"):
        load_file(tmp_path / "a.pt", "MAE_ViT")
    torch.save(torch.ones(2), tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no model of this program"):
        load_file(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"No file .*c\.pt"):
        load_file(tmp_path / "c.pt")


def test_digest_changes_with_any_weight():
    state = torch.nn.Linear(50, 40).state_dict()
    before = digest(state)
    assert before == digest({key: value.clone() for key, value in state.items()})
    state["bias"][3] += 1e-6
    assert digest(state) != before
