"""Compare finished runs of any sweeps: what they differ in, what each setting reaches, what the data decide.

python -m scripts.compare logs/ablation
python -m scripts.compare logs/pretrain logs/lr3e-4 --baseline mask_ratio=0.75

Runs of one setting differ in their seed alone; settings are compared by the differences of equal seeds. Written are
compare.md, compare.csv and pictures. Runs that are not finished are drawn by epoch and not compared.
"""

import collections
import functools
import statistics
from pathlib import Path

import utils
from engine.errors import UserError, as_user_error, exit_in_one_line
from engine.run import csv_text, read_config
from model import MAE_ViT
from scripts.compare_figures import draw_all_curves, draw_measures
from scripts.cost import gflop_per_image
from scripts.results import (
    MEASURES,
    Measure,
    Result,
    aligned,
    facts_of,
    find_results,
    is_finished,
    is_pretrained,
    last_value,
    markdown_table,
    minutes,
    paired_difference,
    percent,
    read_features,
    spread,
    values_of,
    written,
)

K_NN, PROBE = "k-NN", "k-NN while pretraining"
LOSSES = {
    "test loss": Measure("classifier", functools.partial(last_value, "classifier", "test/loss")),
    "MAE training loss": Measure("mae", functools.partial(last_value, "mae", "train/loss")),
}
COMPARED = {  # accuracies in %
    **MEASURES,
    PROBE: Measure("mae", lambda result: percent(last_value("mae", "knn/acc", result))),
    **LOSSES,
}
FOLLOWS = {  # a digest says something new only where all of these are the same
    "images": ("dataset", "img_size", "train_images", "val_images"),
    "test_set": ("dataset", "img_size"),
    "masks": ("mask_strategy", "mask_ratio", "img_size", "patch_size"),
}
OF_MODEL = {*utils.defaults(MAE_ViT), "masks"}  # a classifier has the same values of these as its MAE
TASK = {
    "mask_ratio",
    "mask_strategy",
    "masks",
    "norm_pix_loss",
    "patch_size",
    "img_size",
    "dataset",
}  # of the MAE's loss
SCRATCH = "from scratch"
MANY = 3  # where more arguments vary, a label has only those that differ from most settings
AS_MOST = "as most"  # a setting without any


def parse_args(argv=None):
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, help="runs, or directories with runs anywhere below")
    parser.add_argument(
        "--baseline",
        nargs="+",
        help="the setting that the others are compared with, as printed, or a part that only one setting has, such as "
        'decoder_depth=4, or "as most"; default: the first setting',
    )
    parser.add_argument("--output", type=Path, help="where to write; default: compare/ in the first directory")
    return parser.parse_args(argv)


# --- settings ---


def pretraining_of(result):
    """The config of a result's MAE, or what its classifier's says of it; without arguments: from scratch."""
    if result.mae:
        return read_config(result.mae)
    stored = read_config(result.classifier).get("pretraining", {})
    unknown = {"dataset"} if stored.get("dataset") in ("folder", "npz") else set()  # which one is not told
    return {"arguments": {name: value for name, value in stored.items() if name not in unknown}}


def labels_of(result):
    """On how many labels a result's classifier was trained, or its features were measured without one; None: all."""
    stored = read_config(result.classifier) if result.classifier else read_features(result.features)
    return stored["arguments"].get("train_images")


def arguments_of(result, by_labels):
    """{name: value} of a result's classifier and of its MAE, whose own are pretraining/name where both have a name.

    Args:
        by_labels: whether the number of labels of features without a classifier is one of them.
    """
    own = facts_of(read_config(result.classifier)) if result.classifier else {}
    if by_labels and result.features and not result.classifier:
        own["train_images"] = labels_of(result)
    pretraining = facts_of(pretraining_of(result)).items()
    return own | {name if name in OF_MODEL else f"pretraining/{name}": value for name, value in pretraining}


def without_twins(settings):
    """The settings, pretraining/name as name wherever no classifier has another value of it than its MAE."""
    pairs = {(name, name.partition("/")[2]) for setting in settings for name in setting if "/" in name}
    names = {
        twin: name
        for twin, name in pairs
        if all(setting.get(name) == setting.get(twin) for setting in settings if {name, twin} <= setting.keys())
    }
    return [{names.get(name, name): value for name, value in setting.items()} for setting in settings]


def what_varies(settings):
    """The names of which some settings have different values, in order; digests only where they tell something new."""

    def varies(name):
        prefix, _, last = name.rpartition("/")
        groups = {}
        for setting in settings:
            if name in setting:
                others = (setting.get(f"{prefix}/{other}", setting.get(other)) for other in FOLLOWS.get(last, ()))
                groups.setdefault(tuple(others), set()).add(setting[name])
        return any(len(values) > 1 for values in groups.values())

    return list(filter(varies, dict.fromkeys(name for setting in settings for name in setting)))


def in_order(setting, varied):
    """A sort key: by numbers, then by words, then what is None or not there."""
    values = [setting.get(name) for name in varied]
    return [(0, v, "") if isinstance(v, (int, float)) else (1 + (v is None), 0, str(v)) for v in values]


def label_all(results):
    """What sets results apart, in the order of its values, from scratch last.

    Returns:
        {label: [Result, ...]}; {label: {name: value} of the arguments that vary}; the values that labels leave out.
    """
    classifiers = [r for r in results if r.classifier and is_finished(r.classifier)]
    labels = set(map(labels_of, classifiers or (r for r in results if r.features)))  # as find_results tells them apart
    settings = without_twins([arguments_of(result, by_labels=len(labels) > 1) for result in results])
    varied, pretrained = what_varies(settings), [is_pretrained(result) for result in results]
    settings = [{name: setting[name] for name in varied if name in setting} for setting in settings]
    usual = most_common(settings) if len(varied) > MANY else {}
    told = [{name: v for name, v in setting.items() if not usual or v != usual[name]} for setting in settings]
    order = [(not pretrained[i], bool(usual) and len(told[i]), in_order(told[i], varied)) for i in range(len(results))]
    both, groups, values = len(set(pretrained)) > 1, {}, {}
    for i in sorted(range(len(results)), key=order.__getitem__):
        words = [SCRATCH if both and not pretrained[i] else "", written(told[i])]
        unnamed = AS_MOST if usual else "pretrained" if both else "all runs"
        label = " ".join(filter(None, words)) or unnamed
        groups.setdefault(label, []).append(results[i])
        values[label] = settings[i]
    return groups, values, usual


def most_common(settings):
    """{name: value} that most of the settings have that have the name, each setting counted once."""
    different = {written(setting): setting for setting in settings}.values()
    counts = {}
    for setting in different:
        for name, value in setting.items():
            counts.setdefault(name, collections.Counter())[value] += 1
    return {name: values.most_common(1)[0][0] for name, values in counts.items()}


def tell_seeds(groups):
    """One result a seed in each setting, and {run: why it is not among them}.

    Seeds are the classifiers', or the MAEs' where a setting has classifiers of one seed from MAEs of several. Of those
    with one seed, a classifier from a MAE of that seed comes first, so that the MAEs differ, too.
    """

    def seed_of_mae(result):
        return pretraining_of(result)["arguments"].get("seed", result.seed)

    by_mae = any(
        len({result.seed for result in found}) < len({seed_of_mae(result) for result in found})
        for found in groups.values()
    )
    left_out, told = {}, {}
    for label, found in groups.items():
        seeds = {}
        for result in sorted(found, key=lambda result: seed_of_mae(result) != result.seed):
            seed = seed_of_mae(result) if by_mae else result.seed
            first = seeds.setdefault(seed, result._replace(seed=seed))
            if run_of(first) != run_of(result):
                left_out[run_of(result)] = f"same setting and seed as {run_of(first)}"
        told[label] = [seeds[seed] for seed in sorted(seeds)]
    return told, left_out


def run_of(result):
    return result.classifier or result.mae


def pick_baseline(asked, labels, values):
    """The label that is asked for, or the only setting with all of these words; nothing asked: the first.

    Args:
        values: {label: {name: value}} of what varies, also of what labels leave out.

    Raises:
        UserError: there is none, or there are several.
    """
    words = set(" ".join(asked or []).split())
    fitting = [label for label in labels if words <= {*label.split(), *written(values[label]).split()}]
    exact = [label for label in fitting if label == AS_MOST or words >= set(label.split())]
    if asked and len(exact or fitting) != 1:
        found = f"{len(fitting)} settings" if fitting else "no setting"
        raise UserError(f"--baseline {' '.join(asked)} fits {found}; there are: {', '.join(labels)}.")
    return (exact or fitting)[0]


# --- what the data say ---


def measure_all(results):
    """{measure: {label: {seed: value}}} of what was measured; k-NN while pretraining only where there is no other."""
    measured = {
        name: {label: values_of(found, measure) for label, found in results.items()}
        for name, measure in COMPARED.items()
    }
    measured = {name: {k: v for k, v in labels.items() if v} for name, labels in measured.items()}
    if measured[PROBE].keys() <= measured[K_NN].keys():
        del measured[PROBE]
    return {name: labels for name, labels in measured.items() if labels}


def tested_on(result, measure):
    """What is known of the images that a measure was taken on."""
    facts = facts_of(read_config(result.classifier) if measure.kind == "classifier" else pretraining_of(result))
    return {name: facts[name] for name in ("dataset", "img_size", "test_set") if name in facts}


def compare(results, measured, name, label, baseline):
    """(Difference of a setting to the baseline in the measure of this name or None, what the data say)."""
    numbers, measure = measured[name], COMPARED[name]
    if label == baseline or baseline not in numbers:
        return None, "baseline" if label == baseline else "baseline not measured"
    one, other = (
        tested_on(next(result for result in results[setting] if measure.value(result) is not None), measure)
        for setting in (label, baseline)
    )
    if any(one[name] != other[name] for name in one.keys() & other.keys()):
        return None, "other images"
    difference = paired_difference(numbers[label], numbers[baseline])
    return difference, difference.verdict if difference else "no common seed"


def rows_of(results, values, measured, baseline):
    """compare.csv: a row a measure and setting; and {(measure, label): the cell of the table of differences}."""
    varied = dict.fromkeys(name for setting in values.values() for name in setting)
    rows, cells = [], {}
    for measure, labels in measured.items():
        for label, numbers in labels.items():
            difference, verdict = compare(results, measured, measure, label, baseline)
            mean, low, high, pairs = difference or ("", "", "", 0)
            row = {"setting": label, **dict.fromkeys(varied, ""), **values[label], "measure": measure}
            row |= {"n": len(numbers), "mean": statistics.mean(numbers.values())}
            row |= {"sd": statistics.stdev(numbers.values()) if len(numbers) > 1 else ""}
            rows.append(row | {"difference": mean, "low": low, "high": high, "pairs": pairs, "verdict": verdict})
            cells[measure, label] = f"{difference.text(digits_of(measure))}: {verdict}" if difference else verdict
    return rows, cells


def digits_of(measure):
    return 4 if measure in LOSSES else 2


def notes_of(results, values, usual, measured, left_out, cells):
    """What a reader must know beside the numbers, a line each."""
    lines = [f"Unless a setting says otherwise: {written(usual)}."] if usual else []
    lines += [f"Not compared: {run}: {reason}." for run, reason in left_out.items()]
    for measure, labels in measured.items():
        fewer = {label: len(numbers) for label, numbers in labels.items() if len(numbers) < len(results[label])}
        lines += [f"{label}: {measure} of {n} of {len(results[label])} seeds." for label, n in fewer.items()]
    if "other images" in cells.values():
        lines.append(
            "No difference is given between results on different images; name a baseline among the others to compare "
            "them (--baseline)."
        )
    if TASK & {name.rpartition("/")[2] for setting in values.values() for name in setting}:
        lines.append("MAE training losses cannot be compared where masks, patches, images or norm_pix_loss differ.")
    return lines


# --- tables ---


def mean_table(results, measured):
    """Header and rows: mean ± standard deviation over n seeds of each measure."""
    header = ["", *(name if name in LOSSES else f"{name}, %" for name in measured)]
    rows = [
        [label, *(spread([*numbers.get(label, {}).values()], digits_of(name)) for name, numbers in measured.items())]
        for label in results
    ]
    return header, rows


def cost_table(results, measured):
    """Header and rows: what a setting costs beside its first measure, of the classifier alone from scratch."""
    measure, rows = next(iter(measured)), []
    for label, found in results.items():
        mae = pretraining_of(found[0])["arguments"]
        gflop = gflop_per_image(mae or read_config(found[0].classifier)["arguments"], bool(mae))
        parts = [[result for result in found if getattr(result, kind)] for kind in ("mae", "classifier")]
        times = [f"{minutes(p, kind):.1f}" if p else "" for p, kind in zip(parts, ("mae", "classifier"), strict=True)]
        numbers = measured[measure].get(label, {})
        rows.append([label, spread([*numbers.values()], digits_of(measure)), f"{gflop:.3f}", *times])
    return ["", measure, "GFLOP per image", "minutes of pretraining", "of training a classifier"], rows


def markdown(directories, results, measured, cells, baseline, notes, captions):
    """The content of compare.md."""
    differences = [[label, *(cells.get((name, label), "") for name in measured)] for label in results]
    listed = "".join(f"- {line}\n" for line in notes)
    figures = "\n".join(f"![{caption}]({name}.png)\n\n{caption}\n" for name, caption in captions.items())
    return f"""# {", ".join(map(str, directories))}

{markdown_table(*mean_table(results, measured))}
Mean ± standard deviation over n seeds. Linear probe and k-NN are of the frozen encoder: on train_images labels where \
that is in the table, else on all.

## Differences to {baseline}

{markdown_table(["", *measured], differences)}
Mean over n equal seeds, with its 95 % interval (Student's t). Higher and lower are decided: 0 lies outside the \
interval. With no true difference, one comparison in twenty still looks decided.

## Cost

{markdown_table(*cost_table(results, measured))}
GFLOP are of pretraining; in rows from scratch, of the classifier. Minutes are spent in training steps, mean over seeds.
{f"{chr(10)}## Notes{chr(10)}{chr(10)}{listed}" if notes else ""}
## Figures

{figures}"""


def started(directories):
    """Results of runs that are not finished, one each."""
    configs = {directory: read_config(directory) for directory in directories}
    return [
        Result(config["arguments"]["seed"], *((None, run) if config["name"].startswith("mae_") else (run, None)))
        for run, config in configs.items()
    ]


@exit_in_one_line()
@as_user_error(OSError)
def main(argv=None):
    args = parse_args(argv)
    found, left_out = find_results(*args.directories, equal_labels=True)
    if not found:
        raise UserError(f"No finished run in {', '.join(map(str, args.directories))}.")
    unfinished = started(run for run in left_out if not is_finished(run))
    groups, values, usual = label_all([*found, *unfinished])
    running = {label: [r for r in results if r in unfinished] for label, results in groups.items()}
    finished = {label: [r for r in results if r not in unfinished] for label, results in groups.items()}
    results, twice = tell_seeds({label: some for label, some in finished.items() if some})

    measured = measure_all(results)
    first = next(iter(measured))
    baseline = pick_baseline(args.baseline, results if args.baseline else measured[first], values)
    rows, cells = rows_of(results, values, measured, baseline)
    notes = notes_of(results, values, usual, measured, left_out | twice, cells)
    output = args.output or args.directories[0] / "compare"
    settings = {label: values[label] for label in results}
    captions = draw_measures(measured, settings, baseline, SCRATCH, LOSSES, output / "measures.png")
    captions |= draw_all_curves(results, running, output)
    (output / "compare.csv").write_text(csv_text(rows, header=True))
    text = markdown(args.directories, results, measured, cells, baseline, notes, captions)
    (output / "compare.md").write_text(text)
    print(aligned(*mean_table(results, measured)), end="\n\n")
    differences = [[label, cells[first, label]] for label in results if (first, label) in cells]
    print(aligned(["", f"{first}: difference to {baseline}"], differences), end="\n\n")
    print(*notes, *(output / name for name in ("compare.md", "compare.csv", "*.png")), sep="\n")


if __name__ == "__main__":
    main()
