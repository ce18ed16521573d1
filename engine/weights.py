"""Weights to start from: a model of ours, or a file of the reference, the official MAE, timm or transformers as ours.

What comes from elsewhere is renamed, checked against our encoder by name and shape, and resampled to other sizes.
"""

import math
import re
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from engine import processes
from engine.checkpoints import FILES, digest, file_of, load_model, read_file
from engine.errors import UserError
from engine.records import read_json

# names: ours to timm's (and the official MAE's), and timm's to transformers', which has q, k and v apart
TIMM = {"pos_embedding": "pos_embed", "patchify": "patch_embed.proj", "transformer": "blocks", "layer_norm": "norm"}
HF = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings", "norm": "layernorm"}
HF |= {"patch_embed.proj": "embeddings.patch_embeddings.projection"}
HF_BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
HF_BLOCK |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
HF_QKV = ("query", "key", "value")
STEM = {"encoder.cls_token": 3, "encoder.pos_embedding": 3, "encoder.patchify.weight": 4}  # axes
NOT_OF_AN_ENCODER = re.compile(r"(decoder|mask_token|head|fc_norm|pooler|classifier|pre_logits|embeddings\.mask_token)")
HEADS = {1280: 16, 1408: 16, 1664: 16}  # of ViT-H, -g and -G by width; all smaller ones have heads of width 64
RESAMPLED, SIZES = ("img_size", "patch_size", "in_chans"), ("embed_dim", "encoder_depth", "num_heads")


def read_weights(path, constructor, *others, sizes):
    """Read the content of a model's file to start from, written by this program or by another.

    Args:
        path: a file, a run directory, or a directory of transformers or timm with model.safetensors.
        constructor, others: classes of accepted models; weights of other programs become the first, a MAE_ViT.
        sizes: {name: value, or None: as in the file}. Weights are resampled to the sizes in RESAMPLED. Those in SIZES
            must be as in the file; only num_heads is used if the file does not give it.

    Returns:
        kind, name, model_args, model and settings as `load_model` gives them; model without decoder where the file
        has none that fits. Also path, layout (who wrote it), digest (of the weights as they were read), and said: in
        words what was left out, taken on trust or resampled.

    Raises:
        UserError: as `load_model`, or the file has no encoder that ours can compute, or one of other sizes.
    """
    path = file_of(Path(path))
    raw = read_file(path)
    if isinstance(raw, dict) and raw.get("kind", "timm") != "timm":  # what scripts.export writes for timm
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
    """What config.json records of the model that a run starts from, {name: value}; None without one."""
    return content and {name: content[name] for name in ("name", "settings", "digest", "path", "layout")}


def not_flags(content):
    """Model arguments that no flag sets and that come with the weights: {name: value}; {} without weights."""
    found = content["model_args"] if content else {}
    return {name: found[name] for name in ("qkv_bias", "norm_eps") if name in found}


def say(content, *more):
    """Print in one line what was left out, taken on trust or resampled, if anything."""
    if (said := [*more, *content["said"]]) and processes.is_first():
        print(f"{content['path']}: {' '.join(said)}")


def start_from(model, content):
    """Load the encoder that was read into a MAE_ViT, and the decoder if all of it fits; print which were loaded."""
    fixed = {name: v for name, v in model.named_buffers() if not torch.equal(v, content["model"].get(name, v))}
    fits = shapes(content["model"]) == shapes(model.state_dict())
    others = fixed if fits else fixed | part_of(content["model"], "decoder.")
    model.load_state_dict({name: v for name, v in content["model"].items() if name not in others}, strict=False)
    taken = "Its encoder and decoder are" if fits else "Its encoder is"
    more = [f"Not taken: {listed(others)}."] if others else []
    say(content, f"{taken} where this run starts, with a warm-up and schedule of its own.", *more)


def listed(tensors):
    """Names and shapes in one line; blocks are counted together: blocks.*.ls1.gamma (192,)."""
    return ", ".join(dict.fromkeys(f"{re.sub(r'[.][0-9]+[.]', '.*.', k)} {tuple(v.shape)}" for k, v in tensors.items()))


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


def part_of(state, prefix):
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


# --- files from elsewhere ---


def from_elsewhere(path, raw, constructor, num_heads):
    """Turn another program's file `raw` into the content of a MAE's file; num_heads is used if the file has none."""
    raw = raw if isinstance(raw, dict) else {}
    tensors = next((raw[name] for name in ("model", "state_dict") if isinstance(raw.get(name), dict)), raw)
    tensors = {str(name).removeprefix("module."): v for name, v in tensors.items() if isinstance(v, torch.Tensor)}
    layout, found, left = in_our_names({name: tensor.float() for name, tensor in tensors.items()})
    if any(name not in found or found[name].ndim != count for name, count in STEM.items()):
        known = "as the reference, the official MAE, timm or transformers have it"
        raise UserError(f"{path} is whole, but has no encoder with cls token, positions and patch embedding {known}.")
    sizes, (heads, norm_eps, mean_and_std) = sizes_of(found), facts_beside(path, layout, raw)
    is_told = bool(heads)
    if not (heads := heads or num_heads or HEADS.get(sizes["embed_dim"], sizes["embed_dim"] // 64)):
        raise UserError(f"{path} does not tell its number of heads: give --num_heads.")
    model_args = sizes | {"num_heads": heads, "norm_eps": norm_eps}
    with torch.device("meta"):
        needed = constructor(**model_args).state_dict()
    decoder = part_of(found, "decoder.")
    if shapes(decoder) != shapes(part_of(needed, "decoder.")):
        left, found = left | decoder, part_of(found, "encoder.")
        model_args = {name: v for name, v in model_args.items() if not name.startswith("decoder")}
    wrong = {name: v for name, v in found.items() if name not in needed or v.shape != needed[name].shape}
    wrong |= {name: v for name, v in left.items() if name not in decoder and not NOT_OF_AN_ENCODER.match(name)}
    missing = part_of({name: v for name, v in needed.items() if name not in found}, "encoder.")
    if wrong or missing:
        reason = f"has what ours has not, {listed(wrong)}" if wrong else f"lacks {listed(missing)}"
        raise UserError(f"{path}: its encoder ({layout}) {reason}.")
    said = [f"Not taken: {listed(left)}."] if left else []
    untold = ([] if is_told else [f"{heads} heads (--num_heads)"]) + ([] if mean_and_std else ["images in [-1, 1]"])
    said += [f"The file does not tell, so taken to have: {', '.join(untold)}."] if untold else []
    if mean_and_std:
        if len(mean_and_std[0]) not in (1, sizes["in_chans"]):
            raise UserError(f"{path} has {sizes['in_chans']} channels, and mean and std of {len(mean_and_std[0])}.")
        fold_in(found, *mean_and_std)
    name = path.parent.name if path.name in FILES else path.stem
    about = {"kind": constructor.__name__, "name": name, "settings": model_args, "layout": layout, "said": said}
    return about | {"model_args": model_args, "model": found}


def renamed(name, table):
    """The name with its old prefix replaced by the new one, from a table {new: old}; unchanged if none fits."""
    new = (new + name[len(old) :] for new, old in table.items() if f"{name}.".startswith(f"{old}."))
    return next(new, name)


def in_our_names(state):
    """Rename a state dict: (its layout, {name in a MAE_ViT: tensor}, {name: tensor} without a name there).

    If the cls token has a position embedding, that is added to the token.
    """
    if "encoder.patchify.weight" in state:
        found = part_of(state, ("encoder.", "decoder."))
        return "reference", found, {name: v for name, v in state.items() if name not in found}
    layout = "reference" if "patchify.weight" in state else "official or timm"  # the reference's classifier
    if any(name.endswith("embeddings.cls_token") for name in state):
        layout, state = "transformers", in_timms_names(state)
    norm = {"layer_norm": "norm" if "norm.weight" in state else "fc_norm"}  # of one that pools the mean
    found = state if layout == "reference" else {renamed(name, TIMM | norm): v for name, v in state.items()}
    left = {name: v for name, v in found.items() if name.split(".")[0] not in ("cls_token", *TIMM)}
    found = {f"encoder.{name}": v for name, v in found.items() if name not in left}
    if layout != "reference" and STEM.keys() <= found.keys() and found["encoder.pos_embedding"].ndim == 3:
        position = found["encoder.pos_embedding"].transpose(0, 1)  # (1 + N, 1, D)
        found["encoder.pos_embedding"] = position[1:]
        found["encoder.cls_token"] = found["encoder.cls_token"] + position[:1]
    return layout, found, left


def in_timms_names(state):
    """Rename a ViTModel's, ViTMAE's or ViTForImageClassification's state dict to timm's names; join q, k and v."""
    state, found = {name.removeprefix("vit."): tensor for name, tensor in state.items()}, {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if not layer:
            found[renamed(name, HF)] = tensor
        elif ".query." in name:
            thirds = [state[other] for which in HF_QKV if (other := name.replace("query", which)) in state]
            found[f"blocks.{layer[1]}.attn.qkv.{name.rpartition('.')[2]}"] = torch.cat(thirds)
        elif not re.search(r"\.(key|value)\.", name):
            found[f"blocks.{layer[1]}.{renamed(layer[2], HF_BLOCK)}"] = tensor
    return found


def sizes_of(found):
    """MAE_ViT arguments that follow from a state dict in our names, {name: value}: no num_heads, no norm_eps."""
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
    """What no state dict contains: (number of heads or None, eps of the LayerNorms, (mean, std) of the images or None).

    An export of ours contains it, and for the reference it is fixed. For other files, config.json and
    preprocessor_config.json in their directory may have it.
    """
    if layout == "reference" or raw.get("kind") == "timm":
        return raw.get("model_args", {}).get("num_heads"), raw.get("norm_eps", 1e-5), ([0.5], [0.5])
    beside = [path.with_name(name) for name in ("config.json", "preprocessor_config.json")]
    told = {}
    for file in beside if path.name in FILES else ():
        told |= read_json(file) if file.exists() else {}
    told |= told.get("pretrained_cfg", {})  # timm's
    if told.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has the activation {told['hidden_act']}, and ours is gelu.")
    mean, std = (told.get(f"image_{name}", told.get(name)) for name in ("mean", "std"))
    known = (mean, std) if mean and std and told.get("do_normalize", True) else None
    eps = told.get("layer_norm_eps", 1e-12) if layout == "transformers" else 1e-6
    return told.get("num_attention_heads"), eps, known


def fold_in(found, mean, std):
    """Change the patch embedding, in place, to take images x in [-1, 1] instead of (x / 2 + 1 / 2 - mean) / std."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    kernel = found["encoder.patchify.weight"] / std
    found["encoder.patchify.weight"] = kernel / 2
    found["encoder.patchify.bias"] = found["encoder.patchify.bias"] + ((0.5 - mean) * kernel).sum((1, 2, 3))


# --- other sizes ---


def resampled(content, constructor, sizes):
    """The content, resampled to another image size, patch size or number of channels; unchanged if none differs.

    Positions and patch embedding are resampled as in timm, bicubic; fixed positions are computed again. With another
    patch size, the decoder is left out.
    """
    old = {"in_chans": 3, "positions": "learned"} | content["model_args"]
    changes = [f"{name} {old[name]} to {size}" for name, size in sizes.items() if size != old[name]]
    if not changes:
        return content
    img_size, patch_size, in_chans = ((old | sizes)[name] for name in RESAMPLED)
    if img_size % patch_size:
        raise UserError(f"patch_size {patch_size} does not divide img_size {img_size}.")
    fresh = constructor(**content["model_args"] | sizes).state_dict() if old["positions"] == "sincos" else {}
    state = content["model"] if patch_size == old["patch_size"] else part_of(content["model"], "encoder.")
    for name, tensor in state.items():
        if name.endswith("pos_embedding"):
            position, of_cls = tensor.transpose(0, 1), int(name.startswith("decoder."))  # (1, N, D), a decoder's 1 + N
            position = resample_abs_pos_embed(position, [img_size // patch_size] * 2, num_prefix_tokens=of_cls)
            tensor = fresh.get(name, position.transpose(0, 1))
        elif name.endswith("patchify.weight"):
            tensor = resample_patch_embed(in_channels(tensor, in_chans), [patch_size] * 2)
        elif name.startswith("decoder.head.") and in_chans != old["in_chans"]:
            mean = tensor.unflatten(0, (old["in_chans"], -1)).mean(0)  # (p * p, ...), of the channels
            tensor = mean.expand(in_chans, *mean.shape).flatten(0, 1)
        state = state | {name: tensor}
    said = [*content["said"], f"Resampled: {', '.join(changes)}."]
    return {**content, "model": state, "model_args": content["model_args"] | sizes, "said": said}


def in_channels(kernels, count):
    """Kernels (D, C, p, p) for `count` channels. For 1 they are summed: a grey image then gives the same as C
    equal channels. For more they are repeated in turn and scaled by C / count (timm's way).
    """
    channels = kernels.shape[1]
    if count == 1:
        return kernels.sum(1, keepdim=True)
    return kernels[:, torch.arange(count) % channels] * (channels / count)
