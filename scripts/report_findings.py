"""The findings that the report judges, each by every measure, and where the measures disagree."""

import statistics

from engine.run import read_metrics
from scripts.ablations import BASE, DEPTHS, MASKS, SCRATCH, accuracy_by_epoch
from scripts.results import MEASURES, Measure, difference


def verdict_of(claims):
    """What the data say of {claim: the difference that it expects above 0, None without runs}, in a word or two.

    Several claims hold together if each holds, and do not if one is reversed.
    """
    verdicts = {claim.verdict if claim else "no runs" for claim in claims.values()}
    if "lower" in verdicts:
        return "does not hold"
    if len(verdicts) > 1:
        return "not decided"
    return "holds" if verdicts == {"higher"} else verdicts.pop()


def judge(claims):
    """The verdict on some claims with the numbers behind it: a sentence's end."""
    words = {"higher": "holds", "lower": "reversed"}
    parts = []
    for claim, d in claims.items():
        numbers = f"({d.mean:+.2f}, {d.interval()}, n {d.n})" if d else ""
        said = [claim, words.get(d.verdict, d.verdict) if d else "no runs"] if len(claims) > 1 else []
        parts.append(" ".join(filter(None, [*said, numbers])))
    return f"**{verdict_of(claims)}**{':' if len(claims) > 1 else ''} {'; '.join(parts)}".rstrip()


def disagreement(verdicts):
    """Where measures do not say the same of a finding, {measure: verdict}: a sentence; where they do, nothing."""
    said = set(verdicts.values())
    if len(said) < 2:
        return ""
    start = "The measures disagree" if said >= {"holds", "does not hold"} else "Not all measures decide"
    return f"{start}: {', '.join(f'{measure} {verdict}' for measure, verdict in verdicts.items())}."


def judge_all(results, pairs):
    """Judge {claim: (setting that it expects higher, lower)} by each measure that has values, and where they differ."""
    claims = {
        name: {claim: difference(results, *pair, measure) for claim, pair in pairs.items()}
        for name, measure in MEASURES.items()
    }
    claims = {name: found for name, found in claims.items() if name == "fine-tuned" or any(found.values())}
    if len(claims) == 1:
        return f" {judge(claims['fine-tuned'])}."
    lines = [f"{name}: {judge(found)}." for name, found in claims.items()]
    lines += filter(None, [disagreement({name: verdict_of(found) for name, found in claims.items()})])
    return "".join(f"\n   - {line}" for line in lines)


def findings(results):
    """The course report's three findings and its explanation, each with what these runs say of it."""

    def early(result, metric):  # mean of the first fifth of the epochs
        values = [row[metric] for row in read_metrics(result.classifier)]
        return statistics.mean(values[: max(1, len(values) // 5)])

    watch = accuracy_by_epoch(results)
    ahead = difference(results, BASE, SCRATCH, Measure("classifier", lambda result: 100 * early(result, watch)))
    loss = difference(results, SCRATCH, BASE, Measure("classifier", lambda result: early(result, "train/loss")))

    def masks(*pairs):
        return judge_all(results, {f"{one} > {other}": (MASKS[one], MASKS[other]) for one, other in pairs})

    depths = {f"{one} > {other}": (DEPTHS[f"depth {one}"], DEPTHS[f"depth {other}"]) for one, other in ((8, 4), (4, 2))}
    return f"""\
1. Pretraining gives a higher final accuracy: {judge({"": difference(results, BASE, SCRATCH)})}. It is ahead over the \
first fifth of the epochs, in accuracy: {judge({"": ahead})}; in training loss, lower by: {judge({"": loss})}.
2. A deeper decoder gives a better encoder, 8 > 4 > 2:{judge_all(results, depths)}
3. block > grid > random:{masks(("block", "grid"), ("grid", "random"))}

The MAE paper finds random masks best. The course report explains its other order by its masks, which it says \
are not the paper's. Its grid, one of each 2 x 2, is the paper's; its block is not, but blockwise is near it:

- random > blockwise, as in the paper:{masks(("random", "blockwise"))}
- block > blockwise, the report's block against the paper's:{masks(("block", "blockwise"))}
- shifted_grid > grid, a lattice that trains all position embeddings against one that does not:\
{masks(("shifted_grid", "grid"))}

In brackets: difference in points of accuracy (of the loss: in its unit), 95 % interval, seeds. A difference holds \
where the interval lies above 0, is reversed where below, and is not decided where 0 is inside. Intervals are over \
seeds, not other test sets, and with no true difference, one in twenty still looks decided.
"""
