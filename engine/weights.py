"""Weights to start from: a model of ours, or a file of the reference, the official MAE, timm or transformers as ours.

What comes from elsewhere is renamed, checked against our encoder by name and shape, and resampled to other sizes.
"""

import json
import math
import re
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from engine import processes
from engine.checkpoints import FIELDS, digest, file_of, load_model, read_file
from engine.errors import UserError

# names: ours to timm's (and the official MAE's), and timm's to transformers', which has q, k and v apart
TIMM = {"pos_embedding": "pos_embed", "patchify": "patch_embed.proj", "transformer": "blocks", "layer_norm": "norm"}
HF = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
STEM = {"encoder.cls_token": 3, "encoder.pos_embedding": 3, "encoder.patchify.weight": 4}  # axes
HF_QKV = ("query", "key", "value")
NOT_OF_AN_ENCODER = re.compile(r"(decoder|mask_token|head|fc_norm|pooler|classifier|pre_logits|embeddings\.mask_token)")
HEADS = {1280: 16, 1408: 16, 1664: 16}  # of ViT-H, -g and -G by width; all smaller ones have heads of width 64
RESAMPLED, SIZES = ("img_size", "patch_size", "in_chans"), ("embed_dim", "encoder_depth", "num_heads")


def read_weights(path, constructor, *others, sizes):
    """The content of the file of a MAE (or one of others) to start from, whoever wrote it.

    Args:
        path: a file, a run directory, or a directory of transformers or timm with model.safetensors.
        constructor, others: of the models that are taken; weights from elsewhere become the first's, a MAE_ViT's.
        sizes: {name: value or None for the file's own}. Weights are resampled to RESAMPLED; SIZES must be the file's,
            but for num_heads of a file that does not tell it.

    Returns:
        kind, name, model_args, model and settings as `load_model` gives them; model without decoder where the file
        has none that fits. Also path, layout (who wrote it), digest (of the weights as they were read), and said: in
        words what was left out, taken on trust or resampled.

    Raises:
        UserError: as `load_model`, or the file has no encoder that ours can compute, or one of other sizes.
    """
    path = file_of(Path(path))
    raw = read_file(path)
    if isinstance(raw, dict) and raw.get("kind") in ("checkpoint", *FIELDS):
        _, content = load_model(path, constructor, *others)
        content |= {"layout": "ours", "said": []}
    else:
        content = from_elsewhere(path, raw, constructor, sizes.get("num_heads"))
    for name in SIZES:
        stored, asked = content["model_args"][name], sizes.get(name)
        if asked not in (None, stored):
            raise UserError(
                f"{path} has {name}={stored} but --{name} is {asked}. Leave the flag out to use the stored value."
            )
    content |= {"path": str(path), "digest": digest(content["model"])}
    return resampled(content, constructor, {name: sizes[name] for name in RESAMPLED if sizes.get(name)})


def parent_of(content):
    """What config.json says of the model that a run starts from."""
    return {name: content[name] for name in ("name", "settings", "digest", "path", "layout")}


def not_flags(content):
    """Arguments of the model that weights bring and no flag gives."""
    return {name: content["model_args"][name] for name in ("qkv_bias", "norm_eps") if name in content["model_args"]}


def say(content, *more):
    """Print in one line what was left out, taken on trust or resampled, if anything."""
    if (said := [*more, *content["said"]]) and processes.is_first():
        print(f"{content['path']}: {' '.join(said)}")


def start_from(model, content):
    """Give a MAE_ViT the encoder that was read, and the decoder where all of it fits; says which in a line."""
    own = {name for name, _ in model.named_buffers()}  # fixed positions
    state = {name: v for name, v in content["model"].items() if name not in own}
    needed = {name: v for name, v in model.state_dict().items() if name not in own}
    others = {name: v for name, v in state.items() if name.startswith("decoder.")}
    if fits := shapes(state) == shapes(needed):
        others = {}
    model.load_state_dict({name: v for name, v in state.items() if name not in others}, strict=False)
    taken = "Its encoder and decoder are" if fits else "Its encoder is"
    more = [f"Not taken: {listed(others)}."] if others else []
    say(content, f"{taken} where this run starts, with a warm-up and schedule of its own.", *more)


def listed(tensors):
    """Names and shapes in one line; blocks are counted together: blocks.*.ls1.gamma (192,)."""
    return ", ".join(dict.fromkeys(f"{re.sub(r'[.][0-9]+[.]', '.*.', k)} {tuple(v.shape)}" for k, v in tensors.items()))


# --- files from elsewhere ---


def from_elsewhere(path, raw, constructor, num_heads):
    """The content of a MAE's file, of a state dict that another program wrote."""
    inner = next((raw[name] for name in ("model", "state_dict") if name in raw), raw) if isinstance(raw, dict) else {}
    tensors = {str(name): v for name, v in dict(inner).items() if isinstance(v, torch.Tensor)}
    layout, found, left = in_our_names({name.removeprefix("module."): v.float() for name, v in tensors.items()})
    if any(name not in found or found[name].ndim != count for name, count in STEM.items()):
        known = "as the reference, the official MAE, timm or transformers have it"
        raise UserError(f"{path} is whole, but has no encoder with cls token, positions and patch embedding {known}.")
    facts, sizes = facts_beside(path, layout, raw), sizes_of(found)
    heads = facts["num_heads"] or num_heads or HEADS.get(sizes["embed_dim"], sizes["embed_dim"] // 64)
    if not heads:
        raise UserError(f"{path} does not tell its number of heads: give --num_heads.")
    model_args = sizes | {"num_heads": heads, "norm_eps": facts["norm_eps"]}
    with torch.device("meta"):
        needed = shapes(constructor(**model_args).state_dict())
    said = (
        [] if facts["num_heads"] or num_heads else [f"Taken to have {heads} heads; --num_heads tells another number."]
    )
    if "encoder.layer_norm.weight" not in found:  # where it pools first
        width = sizes["embed_dim"]
        found |= {"encoder.layer_norm.weight": torch.ones(width), "encoder.layer_norm.bias": torch.zeros(width)}
        said.append("It has no LayerNorm of single tokens; a new one takes its place.")
    decoder = {name: v for name, v in found.items() if name.startswith("decoder.")}
    if shapes(decoder) != {name: shape for name, shape in needed.items() if name.startswith("decoder.")}:
        left, found = left | decoder, {name: v for name, v in found.items() if name not in decoder}
        model_args = {name: v for name, v in model_args.items() if not name.startswith("decoder")}
    check_encoder(path, layout, found, {name: v for name, v in left.items() if name not in decoder}, needed)
    said += [f"Not taken: {listed(left)}."] if left else []
    said += normalized_as_ours(found, facts["normalisation"])
    name = path.parent.name if path.name == "model.safetensors" else path.stem
    about = {"kind": constructor.__name__, "name": name, "settings": model_args, "layout": layout, "said": said}
    return about | {"model_args": model_args, "model": found}


def check_encoder(path, layout, found, left, needed):
    """Raises UserError where a file's encoder and ours have not the same parts of the same shapes."""
    wrong = {name: v for name, v in found.items() if v.shape != needed.get(name)}
    wrong |= {name: v for name, v in left.items() if not NOT_OF_AN_ENCODER.match(name)}
    if wrong:
        raise UserError(f"{path} ({layout}) has what our encoder has not: {listed(wrong)}.")
    if missing := [name for name in needed if name.startswith("encoder.") and name not in found]:
        raise UserError(f"{path} ({layout}) lacks {', '.join(missing)}.")


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


def in_our_names(state):
    """A state dict's layout, the tensors that a MAE_ViT has a name for by that name, and the others.

    Where the cls token has a position of its own, that is added to it.
    """
    if "encoder.patchify.weight" in state:
        found = {name: v for name, v in state.items() if name.startswith(("encoder.", "decoder."))}
        return "reference", found, {name: v for name, v in state.items() if name not in found}
    layout, names = "official or timm", {theirs: ours for ours, theirs in TIMM.items()} | {"cls_token": "cls_token"}
    if "patchify.weight" in state:  # the reference's classifier
        layout, names = "reference", {ours: ours for ours in ("cls_token", *TIMM)}
    elif any(name.endswith("embeddings.cls_token") for name in state):
        layout, state = "transformers", in_timms_names(state)
    found, left = {}, {}
    for name, tensor in state.items():
        theirs = next((theirs for theirs in names if name == theirs or name.startswith(f"{theirs}.")), None)
        if theirs is None:
            left[name] = tensor
        else:
            found[f"encoder.{names[theirs]}{name[len(theirs) :]}"] = tensor
    if layout != "reference" and STEM.keys() <= found.keys() and found["encoder.pos_embedding"].ndim == 3:
        position = found["encoder.pos_embedding"].transpose(0, 1)  # (1 + N, 1, D)
        found["encoder.pos_embedding"] = position[1:]
        found["encoder.cls_token"] = found["encoder.cls_token"] + position[:1]
    return layout, found, left


def in_timms_names(state):
    """A ViTModel's, ViTMAE's or ViTForImageClassification's state dict in timm's names, q, k and v joined."""
    names = {theirs: ours for ours, theirs in HF.items()}
    blocks = {theirs: ours for ours, theirs in HF_BLOCK.items()}
    state, found = {name.removeprefix("vit."): tensor for name, tensor in state.items()}, {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")  # weight or bias
        layer, part = re.fullmatch(r"(?:encoder\.layer\.(\d+)\.)?(.*)", module).groups()
        if part == "attention.attention.query":
            thirds = [state[name.replace("query", which)] for which in HF_QKV]
            found[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(thirds)
        elif layer and part in blocks:
            found[f"blocks.{layer}.{blocks[part]}.{kind}"] = tensor
        elif part not in ("attention.attention.key", "attention.attention.value"):
            found[names.get(name) or (f"{names[module]}.{kind}" if module in names else name)] = tensor
    return found


def sizes_of(found):
    """Arguments of a MAE_ViT, but for num_heads and norm_eps, that a state dict in our names tells."""
    kernel, count = found["encoder.patchify.weight"], found["encoder.pos_embedding"].shape[0]
    width, channels, patch_size = kernel.shape[:3]
    sizes = {"img_size": math.isqrt(count) * patch_size, "patch_size": patch_size, "embed_dim": width}
    sizes |= {"in_chans": channels, "qkv_bias": "encoder.transformer.0.attn.qkv.bias" in found}
    for part in ("encoder", "decoder"):
        blocks = {name.split(".")[2] for name in found if name.startswith(f"{part}.transformer.")}
        sizes |= {f"{part}_depth": len(blocks)} if blocks else {}
    if "decoder.mask_token" in found and found["decoder.mask_token"].shape[-1] != width:
        sizes |= {"decoder_embed_dim": found["decoder.mask_token"].shape[-1]}
    return sizes


def facts_beside(path, layout, raw):
    """What no state dict tells: num_heads (None: unknown), norm_eps, and the images' mean and std (None: unknown).

    The config.json and preprocessor_config.json beside a file tell it, or an exported file of ours.
    """

    def read(name):
        beside = path.with_name(name)
        told = path.name in ("model.safetensors", "pytorch_model.bin") and beside.exists()
        return json.loads(beside.read_text()) if told else {}

    config, processor = read("config.json"), read("preprocessor_config.json")
    config, own = config.get("pretrained_cfg", config), isinstance(raw, dict) and raw.get("kind") == "timm"
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"its activation is {config['hidden_act']}, and ours is gelu.")
    mean, std = (processor.get(f"image_{name}", config.get(name)) for name in ("mean", "std"))
    known = mean is not None and std is not None and processor.get("do_normalize", True)
    ours = own or layout == "reference"
    eps = (
        raw.get("norm_eps", 1e-5) if ours else config.get("layer_norm_eps", 1e-12) if layout == "transformers" else 1e-6
    )
    heads = raw["model_args"]["num_heads"] if own else config.get("num_attention_heads")
    return {"num_heads": heads, "norm_eps": eps, "normalisation": "ours" if ours else (mean, std) if known else None}


def normalized_as_ours(found, normalisation):
    """Fold the images' mean and std into the patch embedding, so that it takes images in [-1, 1]; a sentence or none.

    (x / 2 + 1 / 2 - mean) / std, of x in [-1, 1], is what the other program feeds it.
    """
    if normalisation is None:
        return ["Taken to see images in [-1, 1], as ours: the file does not tell the mean and std of its images."]
    if normalisation != "ours":
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalisation)
        kernel = found["encoder.patchify.weight"] / std
        found["encoder.patchify.weight"] = kernel / 2
        found["encoder.patchify.bias"] = found["encoder.patchify.bias"] + ((0.5 - mean) * kernel).sum((1, 2, 3))
    return []


# --- other sizes ---


def resampled(content, constructor, sizes):
    """The content for images, patches or channels of other sizes; as it is where they are the same.

    Positions and patch embedding as timm does, bicubic; fixed positions are computed anew. Another patch size leaves
    no decoder.
    """
    old = content["model_args"]
    new = {"in_chans": 3, "positions": "learned"} | old | sizes
    changes = [f"{name} {old.get(name, 3)} to {new[name]}" for name in sizes if old.get(name, 3) != new[name]]
    if not changes:
        return content
    fresh = constructor(**{**old, **sizes}).state_dict() if new["positions"] == "sincos" else {}
    grid, state = [new["img_size"] // new["patch_size"]] * 2, {}
    for name, tensor in content["model"].items():
        of_decoder = name.startswith("decoder.")
        if of_decoder and new["patch_size"] != old["patch_size"]:
            continue
        if name.endswith("pos_embedding"):
            position = tensor.transpose(0, 1)  # (1, N, D); a decoder's with the cls token's first
            tensor = resample_abs_pos_embed(position, grid, num_prefix_tokens=int(of_decoder)).transpose(0, 1)
            tensor = fresh.get(name, tensor)
        elif name.endswith("patchify.weight"):
            tensor = resample_patch_embed(in_channels(tensor, 1, new["in_chans"]), [new["patch_size"]] * 2)
        elif name.startswith("decoder.head.") and new["in_chans"] != old.get("in_chans", 3):
            each = tensor.unflatten(0, (old.get("in_chans", 3), -1))  # (C, p * p, ...)
            tensor = each.mean(0) if new["in_chans"] == 1 else in_channels(each, 0, new["in_chans"], 1).flatten(0, 1)
        state[name] = tensor
    said = f"Resampled: {', '.join(changes)}."
    return {**content, "model": state, "model_args": old | sizes, "said": [*content["said"], said]}


def in_channels(weight, dim, count, scale=None):
    """A weight for another number of channels along dim; for one their sum, so that a grey image gives what its three
    equal channels gave; for more repeated in turn, scaled as much down (timm's way), or by scale.
    """
    channels = weight.shape[dim]
    if count == channels:
        return weight
    if count == 1:
        return weight.sum(dim, keepdim=True)
    return weight.index_select(dim, torch.arange(count) % channels) * (channels / count if scale is None else scale)
