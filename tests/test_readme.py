"""README.md and its pages: commands have flags that exist, links lead to files, the Python runs."""

import hashlib
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import torch
from PIL import Image

import mae_pretrain
from engine.checkpoints import digest, load_model
from model import MAE_ViT

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("logs/report/*.md")), ROOT / "pretrained" / "README.md"]
PAGES += [ROOT / "scripts" / "README.md"]
COMMAND = re.compile(r" *(scripts/setup.sh && )?(\.venv/bin/python|python|torchrun) ")


def test_commands_in_the_readme_its_pages_and_the_scripts_have_flags_that_exist(monkeypatch):
    monkeypatch.setattr(mae_pretrain, "inherited", lambda argv: {})  # there are no runs to read
    count = 0
    for path in [*PAGES, *ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            command = re.split(r"(?<=\S)  +", line)[0]  # without what is said beside it
            words = shlex.split(command, comments=True) if COMMAND.match(line) else []
            for i, word in enumerate(words):
                if re.fullmatch(r"\w+\.py|scripts\.\w+", word):
                    importlib.import_module(word.removesuffix(".py")).parse_args(words[i + 1 :])
                    count += 1
                    break
    assert count > 20


def test_links_in_the_readme_and_its_pages_lead_to_files():
    for page in PAGES:
        links = re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text())
        assert links
        for link in links:
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.is_file(), f"{page}: {link}"
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if heading else []
            slugs = ["", *(re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings)]
            assert heading in slugs, f"{page}: {link}"


def test_the_models_to_start_from_are_whole_and_load_in_float32():
    page = (ROOT / "pretrained" / "README.md").read_text()
    for directory in (ROOT / "pretrained", ROOT / "pretrained" / "width192"):
        assert hashlib.sha256((directory / "model.pt").read_bytes()).hexdigest() in page
        model, content = load_model(directory, MAE_ViT)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        features = json.loads((directory / "features.json").read_text())
        assert features["model_digest"] == digest(content["model"])
        assert features["name"] == content["name"] == json.loads((directory / "config.json").read_text())["name"]


def test_the_readmes_python_runs(empty_directory):
    (code,) = re.findall(r"```python\n(import torch.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copytree(ROOT / "pretrained", "pretrained")
    Image.new("RGB", (50, 40), "orange").save("photo.jpg")
    names = {}
    exec(code, names)
    assert names["features"].shape == (1, 65, 96)
    assert names["masked"].shape == names["reconstructed"].shape == (1, 3, 32, 32)
