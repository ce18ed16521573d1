"""See what a model does: a MAE's reconstructions, a classifier's predictions, attention, or the masks themselves.

python visualize_predictions.py --model_path logs/pretrain/<run>
python visualize_predictions.py --model_path logs/pretrain/<run> --mask_ratio 0.5 0.75 0.9 --mask_strategy random block
python visualize_predictions.py --model_path logs/classifier/<run>
python visualize_predictions.py --model_path logs/classifier/<run> --by_class --dataset folder --data_dir data/pets
python visualize_predictions.py --model_path logs/classifier/<run> --images cat.jpg holiday/*.png
python visualize_predictions.py --model_path logs/pretrain/<run> --attention --images cat.jpg
python visualize_predictions.py --masks
"""

import itertools
from pathlib import Path

import torch

import utils
from engine import figures
from engine.checkpoints import load_model
from engine.device import generator, pick_device, pick_precision
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.figures import draw_rows, draw_title, plt, save
from engine.files import check_writable
from engine.predictions import predict, read_predictions, table_by_class, write_predictions
from images.load import DATASETS, data_name, load_dataset, load_test_set
from images.pixels import in_channels, normalize, read_image, to_pixels
from masks import MASK_STRATEGIES
from model import MAE_ViT, PatchShuffle, ViT_Classifier, cls_qkv

DRAWS = 1000  # masks behind a strategy's visibility map
MOST_IMAGES = 100  # in a picture


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model_path", help="model.pt or run directory, of a MAE or a classifier")
    what.add_argument("--masks", action="store_true", help="draw a gallery of all mask strategies; needs no model")
    group = parser.add_argument_group("attention")
    group.add_argument("--attention", action="store_true", help="draw where the cls token looks, by head")
    group.add_argument("--block", type=utils.positive_int, help="in which block of the encoder; default: the last")
    group = parser.add_argument_group("masking")
    strategy = "one or several; default: the one the MAE was trained with; all for --masks"
    group.add_argument("--mask_strategy", nargs="+", choices=MASK_STRATEGIES, help=strategy)
    ratio = "one or several; default: as the MAE was trained; 0.75 for --masks"
    group.add_argument("--mask_ratio", nargs="+", type=float, help=ratio)
    group.add_argument("--grid_size", type=utils.positive_int, default=16, help="patches along an edge, for --masks")
    group = parser.add_argument_group("images")
    group.add_argument("--images", nargs="+", metavar="FILE", help="pictures of your own, in place of test images")
    count = f"at most {MOST_IMAGES}; default: 32 for a classifier's predictions, else 8"
    group.add_argument("--num_images", type=utils.positive_int, help=count)
    group.add_argument("--seed", type=utils.seed, default=42, help="which test images and masks are drawn")
    group.add_argument("--dataset", choices=DATASETS, help="default: the one the model was trained on")
    group.add_argument("--data_dir", help="default: as in the model's training")
    text = "of a classifier, also predict all test images, and print the accuracy of each class"
    group.add_argument("--by_class", action="store_true", help=text)
    text = "PNG, PDF or SVG to write; default: beside the model, or masks.png"
    parser.add_argument("--output", type=utils.picture_path, help=text)
    args = parser.parse_args(argv)
    if args.num_images and args.num_images > MOST_IMAGES:
        parser.error(f"--num_images {args.num_images} is more than the {MOST_IMAGES} that fit in a picture")
    if args.images and len(args.images) > MOST_IMAGES:
        parser.error(f"--images has {len(args.images)} files, more than the {MOST_IMAGES} that fit in a picture")
    if args.block and not args.attention:
        parser.error("--block goes with --attention")
    if args.attention and (args.masks or args.mask_strategy or args.mask_ratio):
        parser.error("--attention goes with --model_path, and without --mask_*: it shows the model all patches")
    if args.images and (args.masks or args.num_images or args.dataset or args.data_dir or args.by_class):
        parser.error("--images goes with --model_path, and without --num_images, --dataset, --data_dir and --by_class")
    if args.masks and len(args.mask_ratio or []) > 1:
        parser.error("--masks draws one --mask_ratio at a time")
    return args


def images_to_test_on(args, content, sizes):
    """The test set, an ImageSet, of --dataset and --data_dir; their defaults come from the model's file, `content`."""
    place = args.dataset or content["dataset"], args.data_dir or content["data_dir"], sizes["img_size"]
    if "classes" in content:
        return load_test_set(*place, content["classes"], args.model_path, sizes["in_chans"])
    return load_dataset(*place, labelled=False, in_chans=sizes["in_chans"])[1]


def images_to_draw(args, sizes, test, count):
    """(images (B, C, H, W) uint8, a title for each, labels (B,)); labels are None for the user's own --images.

    Args:
        test: the ImageSet to draw from without --images; count: how many, without --num_images.
    """
    if args.images:
        images = torch.stack([read_image(path, sizes["img_size"]) for path in args.images])
        return in_channels(images, sizes["in_chans"], args.images[0]), [Path(path).name for path in args.images], None
    chosen = torch.randperm(len(test.images), generator=generator("cpu", args.seed, "images"))
    chosen = chosen[: args.num_images or count]
    return test.images[chosen], [""] * len(chosen), test.labels[chosen]


@torch.no_grad()
def draw_reconstructions(model, images, names, args):
    """Masked input and reconstruction under each mask strategy and ratio, a row each, and the original below them.

    Args:
        images: (B, C, H, W) uint8; names: a title for each.
    """
    pixels, images, trained = images, normalize(images), model.shuffle
    strategies, ratios = args.mask_strategy or [trained.mask_strategy], args.mask_ratio or [trained.mask_ratio]
    settings = list(itertools.product(strategies, ratios))
    rows = 2 * len(settings) + 1
    figure, axes = figures.rows_of(rows, len(images))
    for i, (strategy, ratio) in enumerate(settings):
        model.shuffle = PatchShuffle(trained.grid_size, ratio, strategy)
        ids_shuffle = model.shuffle(len(images), generator("cpu", args.seed, "masks"))
        masked, reconstructed = model.reconstruct(images, ids_shuffle)
        hidden = 1 - model.shuffle.num_visible / trained.grid_size**2
        shown = {
            f"{strategy}\n{hidden:.0%} hidden": to_pixels(masked),
            f"reconstruction\nerror {model.loss(images, ids_shuffle):.4f}": to_pixels(reconstructed),
        }
        draw_rows(axes[2 * i : 2 * i + 2], shown, names if i == 0 else (), fontsize=10)
    draw_rows(axes[-1:], {"original": pixels}, fontsize=10)
    borrowed = ", normalised (hidden patches shown with their true mean and variance)" if model.norm_pix_loss else ""
    text = f"Trained with {trained.mask_strategy} masks, ratio {trained.mask_ratio}. "
    draw_title(figure, f"{text}Error: mean square over hidden pixels{borrowed}. Seed {args.seed}")
    return figure


@torch.no_grad()
def cls_attention(encoder, images, block):
    """The cls token's attention to patches in a block (from 1): (B, heads, g, g); with that to itself, it sums to 1."""
    tokens = encoder.embed(images)  # (B, 1 + N, D)
    for before in encoder.transformer[: block - 1]:
        tokens = before(tokens)
    last, grid_size = encoder.transformer[block - 1], encoder.img_size // encoder.patch_size
    q, k, _ = cls_qkv(last.attn, last.norm1(tokens))  # (B, heads, 1, d), (B, heads, 1 + N, d)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
    return weights[:, :, 0, 1:].unflatten(2, (grid_size, grid_size))


def draw_attention(model, images, names, args):
    """A figure, a column for each image (C, H, W) uint8: the image, the cls token's mean attention, and each head's."""
    encoder = getattr(model, "encoder", model)
    depth = len(encoder.transformer)
    block = args.block or depth
    if block > depth:
        raise UserError(f"{args.model_path} has no block {block}: --block takes 1 to {depth}.")
    maps = cls_attention(encoder, normalize(images), block)
    maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1)
    maps = maps / maps.amax((2, 3), keepdim=True)  # so that show draws each from black to white
    labels = ["mean of heads", *(f"head {i + 1}" for i in range(maps.shape[1] - 1))]
    rows = {"image": images} | dict(zip(labels, maps.unbind(1), strict=True))
    figure, axes = figures.rows_of(len(rows), len(images))
    draw_rows(axes, rows, names, fontsize=10)
    untrained = ", which this classifier does not use" if getattr(model, "pool", "") == "mean" else ""
    draw_title(figure, f"Where the cls token{untrained} looks in block {block} of {depth}; white: most")
    return figure


@torch.no_grad()
def draw_classified(model, classes, images, names, labels, args):
    """Each image with ground truth, prediction and confidence; without labels, with the most likely classes."""
    probabilities = model(normalize(images)).softmax(dim=1)
    if labels is None:
        return figures.draw_most_likely(images, names, classes, probabilities)
    confidence, predicted = probabilities.max(dim=1)
    return figures.draw_predictions(images, classes, labels, predicted, confidence, f", seed {args.seed}")


def print_by_class(model, content, test, args):
    """Print each class's accuracy, from the run's predictions.csv or from new predictions, written beside the model."""
    place = Path(args.model_path)
    path, ours = place / "predictions.csv", not (args.dataset or args.data_dir)
    if not (ours and path.exists()):
        device = pick_device("auto")
        name = data_name(args.dataset or content["dataset"], args.data_dir or content["data_dir"])
        precision = pick_precision("auto", device, content["model_args"]["embed_dim"])
        predicted, _ = predict(model.to(device), test.to(device), normalize, precision, at_once=100)
        path = (place if place.is_dir() else place.parent) / f"predictions_{name}.csv"
        write_predictions(path, content["classes"], test.labels, predicted)
    print(path, *table_by_class(read_predictions(path)), sep="\n")


def draw_model(args):
    """Draw the output of --model_path for some images: (figure, its default path, beside the model)."""
    model, content = load_model(args.model_path, MAE_ViT, ViT_Classifier)
    is_mae, place = isinstance(model, MAE_ViT), Path(args.model_path)
    place = place if place.is_dir() else place.parent
    check_writable(args.output.parent if args.output else place, "--output")
    if not is_mae and (args.mask_strategy or args.mask_ratio):
        raise UserError(f"{args.model_path} is a classifier, which masks nothing: leave out --mask_*.")
    if args.by_class and (is_mae or args.attention):
        raise UserError("--by_class is for a classifier, and without --attention.")
    sizes, count = {"in_chans": 3} | content["model_args"], 8 if is_mae or args.attention else 32
    test = None if args.images else images_to_test_on(args, content, sizes)
    images, names, labels = images_to_draw(args, sizes, test, count)
    if args.attention:
        figure, words = draw_attention(model, images, names, args), ["attention"]
        words += [f"block{args.block}"] if args.block else []
    elif is_mae:
        figure = draw_reconstructions(model, images, names, args)
        words = ["reconstructions", *(args.mask_strategy or []), *(f"r{ratio}" for ratio in args.mask_ratio or [])]
    else:
        figure, words = draw_classified(model, content["classes"], images, names, labels, args), ["predictions"]
    words += ["images"] if args.images else []
    if args.by_class:
        print_by_class(model, content, test, args)
    return figure, place / f"{'_'.join(words)}.png"


def draw_gallery(args, columns=6):
    """A figure, a row for each mask strategy: some masks, and how often each patch is visible in DRAWS masks."""
    (ratio,) = args.mask_ratio or [0.75]
    strategies = args.mask_strategy or list(MASK_STRATEGIES)
    figure, axes = plt.subplots(
        len(strategies), columns + 1, figsize=(1.5 * columns + 2.2, 1.55 * len(strategies) + 0.8), squeeze=False
    )
    visible = {}  # (DRAWS, g, g) float of each strategy, 1 where visible
    for strategy in strategies:
        shuffle = PatchShuffle(args.grid_size, ratio, strategy)
        seen = shuffle(DRAWS, generator("cpu", args.seed, strategy)).argsort(1) < shuffle.num_visible
        visible[strategy] = seen.view(DRAWS, args.grid_size, args.grid_size).float()
    draw_rows(axes[:, :-1], {strategy: maps[:columns] for strategy, maps in visible.items()})
    for place, maps in zip(axes[:, -1], visible.values(), strict=True):
        share = place.imshow(maps.mean(0).numpy(), cmap="viridis", vmin=0, vmax=1)
        place.set_xticks([])
        place.set_yticks([])
        figure.colorbar(share, ax=place, fraction=0.046)
    axes[0, -1].set_title(f"visible, share of {DRAWS:,}", fontsize=9)
    text = f"White: the {shuffle.num_visible} of {args.grid_size**2} patches left visible at mask ratio {ratio}; "
    draw_title(figure, f"{text}seed {args.seed}")
    return figure


def main(argv=None):
    args = parse_args(argv)
    with exit_in_one_line(), as_user_error(OSError):
        figure, output = (draw_gallery(args), Path("masks.png")) if args.masks else draw_model(args)
        output = args.output or output
        save(figure, output)
    print(output)


if __name__ == "__main__":
    main()
