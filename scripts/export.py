"""Take an encoder or a classifier elsewhere, into timm or transformers.

python -m scripts.export logs/pretrain/<run> --to timm
python -m scripts.export logs/classifier/<run> --to hf

What is written computes what ours does: features after the final LayerNorm, and a classifier's logits.
"""

import json
from pathlib import Path

import torch

import utils
from engine.checkpoints import load_model, save_file
from engine.errors import UserError, as_user_error, exit_in_one_line
from model import MAE_ViT, ViT_Classifier

# names: ours to timm's, and timm's to transformers', which has q, k and v apart
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


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("path", help="model.pt or run directory, of a MAE or a classifier")
    target = "write a .pt file for timm or a directory for transformers"
    parser.add_argument("--to", choices=("timm", "hf"), required=True, help=target)
    parser.add_argument("--output", type=Path, help="what to write; default: beside the model, timm.pt or hf/")
    return parser.parse_args(argv)


# --- timm ---


def to_timm(model):
    """The encoder of a MAE_ViT or a ViT_Classifier for timm's VisionTransformer.

    Returns:
        model_args: plain arguments of timm.models.vision_transformer.VisionTransformer, beside qkv_bias=False and
        norm_layer=torch.nn.LayerNorm; state: what its load_state_dict takes.
    """
    encoder = model.encoder if isinstance(model, MAE_ViT) else model
    pools_mean, state = getattr(encoder, "pool", "cls") == "mean", {}
    names = TIMM | ({"layer_norm": "fc_norm"} if pools_mean else {})  # timm's name for a LayerNorm after the mean
    for name, tensor in encoder.state_dict().items():
        first, _, rest = name.partition(".")
        state[".".join(filter(None, (names.get(first, first), rest)))] = tensor
    position = state["pos_embed"].transpose(0, 1)  # (1, N, D)
    state["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)  # cls has none: (1, 1 + N, D)
    model_args = {
        "img_size": encoder.patch_size * round(position.shape[1] ** 0.5),
        "patch_size": encoder.patch_size,
        "num_classes": model.head.out_features if isinstance(model, ViT_Classifier) else 0,
        "embed_dim": position.shape[2],
        "depth": len(encoder.transformer),
        "num_heads": encoder.transformer[0].attn.num_heads,
    }
    return model_args | ({"global_pool": "avg"} if pools_mean else {}), state


# --- transformers ---


def to_hf(model, classes):
    """The encoder for transformers' ViTModel, or the classifier for its ViTForImageClassification.

    Args:
        classes: a classifier's class names, in order; None for a MAE.

    Returns:
        config: of config.json; state: of model.safetensors, under the names that files on the Hub have.

    Raises:
        UserError: a classifier of pool="mean", which ViTForImageClassification cannot be.
    """
    model_args, timm_state = to_timm(model)
    if "global_pool" in model_args:
        raise UserError("ViTForImageClassification of transformers cannot pool the mean of the patches; use --to timm.")
    prefix, state = "vit." if classes else "", {}
    for name, tensor in timm_state.items():
        module, _, kind = name.rpartition(".")  # weight or bias
        if module.startswith("blocks."):
            _, block, part = module.split(".", 2)
            layer = f"{prefix}encoder.layer.{block}"
            if part == "attn.qkv":
                for which, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    state[f"{layer}.attention.attention.{which}.{kind}"] = third.contiguous()
            else:
                state[f"{layer}.{HF_BLOCK[part]}.{kind}"] = tensor
        elif module == "head":
            state[f"classifier.{kind}"] = tensor
        else:
            state[prefix + (f"{HF[module]}.{kind}" if module else HF[name])] = tensor
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
        "image_size": model_args["img_size"],
        "patch_size": model_args["patch_size"],
        "hidden_size": model_args["embed_dim"],
        "intermediate_size": 4 * model_args["embed_dim"],
        "num_hidden_layers": model_args["depth"],
        "num_attention_heads": model_args["num_heads"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "qkv_bias": False,
        "id2label": dict(enumerate(classes or [])),
    }
    return config, state


def write_hf(config, state, directory):
    """A directory for from_pretrained: the model, and the processor that prepares pictures as we do."""
    from safetensors.torch import save_file as save_safetensors  # timm brings it

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    size = {"height": config["image_size"], "width": config["image_size"]}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 2, "rescale_factor": 1 / 255}
    processor |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    save_safetensors({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")


def main(argv=None):
    args = parse_args(argv)
    place = Path(args.path) if Path(args.path).is_dir() else Path(args.path).parent
    with exit_in_one_line(), as_user_error(OSError):
        model, content = load_model(args.path, MAE_ViT, ViT_Classifier)
        if args.to == "hf":
            output = args.output or place / "hf"
            config, state = to_hf(model, content.get("classes"))
            write_hf(config, state, output)
            (name,) = config["architectures"]
            without = ", add_pooling_layer=False" if name == "ViTModel" else ""  # its weights would be drawn
            print(f'transformers.{name}.from_pretrained("{output}"{without})')
        else:
            output = args.output or place / "timm.pt"
            model_args, state = to_timm(model)
            save_file(output, {**content, "kind": "timm", "model_args": model_args, "model": state})
            arguments = ", ".join(f"{name}={value!r}" for name, value in model_args.items())
            print(f"model = VisionTransformer({arguments}, qkv_bias=False, norm_layer=torch.nn.LayerNorm)")
            print(f'model.load_state_dict(torch.load("{output}")["model"])')
        print(output)


if __name__ == "__main__":
    main()
