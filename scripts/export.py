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
from engine.weights import HF, HF_BLOCK, HF_QKV, TIMM, renamed
from model import MAE_ViT, ViT_Classifier


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
        model_args: plain arguments of timm.models.vision_transformer.VisionTransformer, beside norm_layer, a LayerNorm
        of the encoder's eps; state: what its load_state_dict takes.
    """
    encoder = model.encoder if isinstance(model, MAE_ViT) else model
    pools_mean = getattr(encoder, "pool", "cls") == "mean"
    names = TIMM | ({"layer_norm": "fc_norm"} if pools_mean else {})  # timm's name for a LayerNorm after the mean
    names = {timm: ours for ours, timm in names.items()}
    state = {renamed(name, names): tensor for name, tensor in encoder.state_dict().items()}
    position = state["pos_embed"].transpose(0, 1)  # (1, N, D)
    state["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)  # cls has none: (1, 1 + N, D)
    model_args = {
        "img_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "num_classes": model.head.out_features if isinstance(model, ViT_Classifier) else 0,
        "embed_dim": position.shape[2],
        "depth": len(encoder.transformer),
        "num_heads": encoder.transformer[0].attn.num_heads,
        "qkv_bias": encoder.transformer[0].attn.qkv.bias is not None,
    }
    return model_args | ({"global_pool": "avg"} if pools_mean else {}), state


# --- transformers ---


def in_hf_names(timm_state, prefix):
    """A state dict of timm under transformers' names, q, k and v apart."""
    state = {}
    for name, tensor in timm_state.items():
        module, _, kind = name.rpartition(".")  # weight or bias
        if module.startswith("blocks."):
            _, block, part = module.split(".", 2)
            layer = f"{prefix}encoder.layer.{block}"
            if part == "attn.qkv":
                for which, third in zip(HF_QKV, tensor.chunk(3), strict=True):
                    state[f"{layer}.attention.attention.{which}.{kind}"] = third.contiguous()
            else:
                state[f"{layer}.{HF_BLOCK[part]}.{kind}"] = tensor
        elif module == "head":
            state[f"classifier.{kind}"] = tensor
        else:
            state[prefix + (f"{HF[module]}.{kind}" if module else HF[name])] = tensor
    return state


def to_hf(model, classes, norm_eps):
    """The encoder for transformers' ViTModel, or the classifier for its ViTForImageClassification.

    Args:
        classes: a classifier's class names, in order; None for a MAE.
        norm_eps: of the encoder's LayerNorms.

    Returns:
        config: of config.json; state: of model.safetensors, under the names that files on the Hub have.

    Raises:
        UserError: a classifier of pool="mean", which ViTForImageClassification cannot be.
    """
    model_args, timm_state = to_timm(model)
    if "global_pool" in model_args:
        raise UserError("ViTForImageClassification of transformers cannot pool the mean of the patches; use --to timm.")
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
        "num_channels": model_args["in_chans"],
        "layer_norm_eps": norm_eps,
        "qkv_bias": model_args["qkv_bias"],
        "id2label": dict(enumerate(classes or [])),
    }
    return config, in_hf_names(timm_state, "vit." if classes else "")


def write_hf(config, state, directory):
    """A directory for from_pretrained: the model, and the processor that prepares pictures as we do."""
    from safetensors.torch import save_file as save_safetensors  # timm brings it

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    size = {"height": config["image_size"], "width": config["image_size"]}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 2, "rescale_factor": 1 / 255}
    processor |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    processor |= dict.fromkeys(("image_mean", "image_std"), [0.5] * config["num_channels"])
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    save_safetensors({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")


def main(argv=None):
    args = parse_args(argv)
    place = Path(args.path) if Path(args.path).is_dir() else Path(args.path).parent
    with exit_in_one_line(), as_user_error(OSError):
        model, content = load_model(args.path, MAE_ViT, ViT_Classifier)
        norm_eps = getattr(model, "encoder", model).layer_norm.eps
        if args.to == "hf":
            output = args.output or place / "hf"
            config, state = to_hf(model, content.get("classes"), norm_eps)
            write_hf(config, state, output)
            (name,) = config["architectures"]
            without = ", add_pooling_layer=False" if name == "ViTModel" else ""  # its weights would be drawn
            print(f'transformers.{name}.from_pretrained("{output}"{without})')
        else:
            output = args.output or place / "timm.pt"
            model_args, state = to_timm(model)
            content |= {"kind": "timm", "norm_eps": norm_eps, "model_args": model_args, "model": state}
            save_file(output, content)
            arguments = ", ".join(f"{name}={value!r}" for name, value in model_args.items())
            print(f"norm_layer = functools.partial(torch.nn.LayerNorm, eps={norm_eps})")
            print(f"model = VisionTransformer({arguments}, norm_layer=norm_layer)")
            print(f'model.load_state_dict(torch.load("{output}")["model"])')
        print(output)


if __name__ == "__main__":
    main()
