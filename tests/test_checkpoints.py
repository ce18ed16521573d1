import argparse
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file as save_safetensors
from torch._subclasses import FakeTensorMode

from engine.checkpoints import digest, load_file, save_file
from model import MAE_ViT


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


def test_what_was_trained_on_a_gpu_loads_where_there_is_none(tmp_path, monkeypatch):
    """Saved from fake tensors, which have a device and no numbers: a model and an optimizer with its lists."""
    saved = []
    monkeypatch.setattr(torch, "save", lambda content, file: saved.append(content))
    with FakeTensorMode():
        with torch.device("cuda"):
            model = MAE_ViT(8, 4, 12, 1, 2, 1)
        optimizer = torch.optim.AdamW(model.parameters(), fused=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        progress = {"epoch": 1, "loss_sum": torch.zeros((), device="cuda"), "best": {"model": model.state_dict()}}
        save_file(tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **progress})
    assert repr(saved).count("FakeTensor(") > 4 * len(model.state_dict())
    assert "cuda" not in repr(saved)


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
    with pytest.raises(ValueError, match="holds a ViT_Classifier; needed here: MAE_ViT"):
        load_file(tmp_path / "a.pt", "MAE_ViT")
    torch.save(torch.ones(2), tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no model of this program"):
        load_file(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"No file .*c\.pt"):
        load_file(tmp_path / "c.pt")


def test_whole_files_of_other_programs_are_told_what_they_are_and_the_way_in(tmp_path):
    model = MAE_ViT(8, 4, 12, 1, 2, 1)
    torch.save(model, tmp_path / "module.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-3)}, tmp_path / "official.pth")
    save_safetensors(model.state_dict(), tmp_path / "model.safetensors")
    facts = {
        "module.pt": "model.MAE_ViT.* weights_only=False",
        "old.pt": "before 1.6.* weights_only=False",
        "official.pth": "no model of this program.*--init_from",
        "model.safetensors": "no model of this program.*--init_from",
    }
    for name, fact in facts.items():
        with pytest.raises(ValueError, match=rf"{name}.*{fact}") as refused:
            load_file(tmp_path if name == "model.safetensors" else tmp_path / name, "MAE_ViT")
        assert "Copy it again" not in str(refused.value)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(*arguments):
        raise PermissionError(13, "Permission denied")

    save_file(tmp_path / "a.pt", {"kind": "toy"})
    monkeypatch.setattr(zipfile, "ZipFile", forbidden)
    with pytest.raises(ValueError, match=r"Cannot read .*a\.pt: Permission denied\.$"):
        load_file(tmp_path / "a.pt")


def test_digest_changes_with_any_weight():
    state = torch.nn.Linear(50, 40).state_dict()
    before = digest(state)
    assert before == digest({key: value.clone() for key, value in state.items()})
    state["bias"][3] += 1e-6
    assert digest(state) != before
