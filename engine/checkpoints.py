"""The .pt files: dictionaries of tensors and plain values, written whole or not at all, read without unpickling."""

import argparse
import hashlib
import io
import pickle
import re
import zipfile
from pathlib import Path

import torch

from engine import processes
from engine.errors import UserError, as_user_error, counted
from engine.files import replacing

DIRECTORY = 0x10  # of the attributes of a zip archive's records
FIELDS = {"MAE_ViT": {"name", "settings", "dataset", "data_dir"}}  # of a finished model's file, beside the model
FIELDS["ViT_Classifier"] = FIELDS["MAE_ViT"] | {"classes"}
PLAINLY = (
    "If you trust it, save its weights: torch.save(torch.load(FILE, weights_only=False)['model'], 'plain.pt'); of "
    "a module .state_dict() in place of ['model']."
)
ELSEWHERE = "mae_pretrain.py --init_from and train_classifier.py --pretrained_model_path take others' weights."
FILES = ("model.pt", "checkpoint.pt", "model.safetensors", "pytorch_model.bin")  # of a run, of transformers or timm
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"


def save_file(path, content):
    """Write a .pt file whole or not at all: temporary name, sync, rename. Its tensors are the CPU's, wherever made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(on_cpu(content), buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def on_cpu(value):
    """Move tensors in dictionaries and lists to the CPU: without a GPU, plain torch.load refuses a GPU's tensors."""
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    if isinstance(value, list):
        return [on_cpu(part) for part in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def read_file(path):
    """Read a .pt or .safetensors file of any program onto the CPU without unpickling objects.

    torch.load checks no checksum, so a flipped bit would load as a wrong weight; the zip archive that torch.save
    writes has a CRC-32 for each of its records, which zipfile checks. argparse.Namespace, in which the official MAE
    keeps its flags, is no more than a dictionary.

    Raises:
        UserError: it is damaged, or needs unpickling.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors  # timm brings it

            return load_safetensors(path)
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
            if any(record.external_attr & DIRECTORY for record in archive.infolist()):
                raise zipfile.BadZipFile("a tensor is marked as a directory")  # torch would leave its memory unfilled
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in many ways, and all of them mean the same
        raise UserError(f"Cannot read {path}: {reason_of(path, error)}") from error


def load_file(path, *kinds):
    """The content of a .pt file of ours.

    Args:
        path: the file, or a run directory, as `file_of` takes it.
        kinds: allowed values of content["kind"], or of content["of"] in a checkpoint; none given: any kind.

    Raises:
        UserError: no such file, damaged, or not the kind asked for.
    """
    path = file_of(Path(path))
    content = read_file(path)
    found = content.get("kind") if isinstance(content, dict) else None
    needed = f"needed here: {' or '.join(kinds) or 'one'}"
    if found is None:
        raise UserError(f"{path} is whole, but no model of this program; {needed}. {ELSEWHERE}")
    if kinds and not {found, found == "checkpoint" and content.get("of")} & {*kinds}:
        raise UserError(f"{path} holds a {content.get('of') or found}; {needed}.")
    return content


def file_of(path):
    """The file that a path stands for: of a directory the first of FILES that it has."""
    with as_user_error(OSError):  # a name too long, say
        if path.is_dir():
            path = path / next((name for name in FILES if (path / name).exists()), FILES[0])
        found, is_run = path.exists(), path.with_name("config.json").exists()
    if not found and path.name in FILES and path.parent.is_dir() and not is_run:
        raise UserError(f"{path.parent} holds no model ({', '.join(FILES)}). Name a run in it, or a file.")
    if not found:
        again = " Give its run's command again, with --overwrite where the run is finished." if is_run else ""
        raise UserError(f"No file {path}.{again}")
    return path


def reason_of(path, error):
    """Why a file cannot be read and what to do, in words."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}."
    if isinstance(error, pickle.UnpicklingError):
        names = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({names[1]})" if names else ""
        return f"it holds a pickled Python object{named}, which could run any code. {PLAINLY}"
    start = path.open("rb").read(9)
    if start.startswith(OLD_FORMAT):
        return f"it is in the format of PyTorch before 1.6. {PLAINLY}"
    if start.startswith(b"\x80"):
        return f"it is a pickled Python object, which could run any code. {PLAINLY}"
    of_a_run = ", or make it again (--overwrite)" if path.with_name("config.json").exists() else ""
    return f"{error}. It is no .pt file, or not whole: copy it again{of_a_run}."


def load_model(path, *constructors):
    """Rebuild the model that a model.pt or a checkpoint.pt holds: (model, the whole content).

    A checkpoint says its epoch, also in content["name"]; content["kind"] is the model's.

    Raises:
        UserError: as `load_file`, or the weights do not fit any of the constructors.
    """
    content = load_file(path, *(constructor.__name__ for constructor in constructors))
    try:
        if content["kind"] == "checkpoint":
            epoch = content["progress"]["epoch"]
            content |= {"kind": content["of"], "name": f"{content['name']}_epoch{epoch}"}
            if processes.is_first():
                print(f"{path}: a checkpoint, the model after {counted(epoch, 'epoch')}")
        constructor = next(constructor for constructor in constructors if constructor.__name__ == content["kind"])
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
