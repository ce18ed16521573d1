"""The .pt files: dictionaries of tensors and plain values, written whole or not at all, read without unpickling."""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import torch

from engine.errors import UserError, as_user_error
from engine.files import replacing

DIRECTORY = 0x10  # of the attributes of a zip archive's records
FIELDS = {"MAE_ViT": {"name", "settings", "dataset", "data_dir"}}  # of a finished model's file, beside the model
FIELDS["ViT_Classifier"] = FIELDS["MAE_ViT"] | {"classes"}


def save_file(path, content):
    """Write a .pt file whole or not at all: temporary name, sync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_file(path, *kinds):
    """Read a .pt file onto the CPU without unpickling objects.

    torch.load checks no checksum, so a flipped bit would load as a wrong weight; the zip archive that torch.save
    writes has a CRC-32 for each of its records, which zipfile checks.

    Args:
        path: the file, or a run directory, which stands for its model.pt.
        kinds: what content["kind"] may be; none: any of ours.

    Raises:
        UserError: no such file, damaged, or not the kind asked for.
    """
    path = Path(path)
    with as_user_error(OSError):  # a name too long, say
        if path.is_dir():
            path = path / "model.pt"
        found = path.exists()
    if not found:
        again = " Give its run's command again, with --overwrite where the run is finished."
        hint = again if (path.parent / "config.json").exists() else ""
        raise UserError(f"No file {path}.{hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
            if any(record.external_attr & DIRECTORY for record in archive.infolist()):
                raise zipfile.BadZipFile("a tensor is marked as a directory")  # torch would leave its memory unfilled
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in many ways, and all of them mean the same
        reason = "it holds pickled objects" if isinstance(error, pickle.UnpicklingError) else error
        raise UserError(f"Cannot read {path}: {reason}. Copy it again, or make it again (--overwrite).") from error
    found = content.get("kind") if isinstance(content, dict) else None
    if found is None or (kinds and found not in kinds):
        needed = " or ".join(kinds) or "a model"
        raise UserError(f"{path} holds {found or 'no model of this program'}; {needed} is needed here.")
    return content


def load_model(path, *constructors):
    """Rebuild the model that a model.pt holds: (model, the whole content).

    Raises:
        UserError: as `load_file`, or the weights do not fit any of the constructors.
    """
    content = load_file(path, *(constructor.__name__ for constructor in constructors))
    constructor = next(constructor for constructor in constructors if constructor.__name__ == content["kind"])
    try:
        if absent := FIELDS[content["kind"]] - content.keys():
            raise ValueError(f"it has no {', '.join(sorted(absent))}")
        model = constructor(**content["model_args"])
        model.load_state_dict(content["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no {content['kind']} of this version of the program: {error}") from error
    return model, content


def digest(state_dict):
    """16 hex digits that change with any weight."""
    result = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state_dict.items()):
        result.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return result.hexdigest()
