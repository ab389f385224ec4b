"""A verdict on runs: is the difference between configurations larger than the spread of seeds?

Runs whose configs differ in the seed alone are one configuration. Configurations are compared by their mean validation loss at one
number of tokens, with Student's t intervals whose standard deviation is pooled over all configurations that have several seeds: it is
assumed that the seed moves each of them alike, without which one to three seeds would say next to nothing. Where a configuration shares
seeds (which give the same order of the data) with the baseline, the differences seed by seed are a second test, free of what the seed
does to both. All tests of a verdict together are wrong about a true difference of zero at most `ERROR_RATE` of the time: each is made at
that rate divided by their number (Bonferroni).
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from training.runs import SEED, Run, differing

ERROR_RATE = 0.05
# With two pairs Student's t is at least 12.7: they show nothing, and the test would cost the others of their rate.
FEWEST_PAIRS = 3
# Labels made of more than this many characters of settings say less than the name of a run.
LONGEST_LABEL = 60
# What the validation loss is measured on, and why losses do not compare where it differs.
MEASURED_ON = {
    "corpus": "the hash stands for text and tokenizer, and does not tell which of them differs",
    "eval.sequences": "the losses are of other parts of the validation text",
    "model.sequence_length": "the losses are of other parts of the validation text, read with another context",
}


@dataclass
class Group:
    """Runs of one configuration. losses: seed -> validation loss at the tokens of the comparison, the mean of the runs of that seed."""

    label: str
    runs: list[Run]
    losses: dict[int | None, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def count(self) -> str:
        return f"{len(self.losses)} seed{'s' * (len(self.losses) > 1)}"


@dataclass(frozen=True)
class Interval:
    """difference: group's loss minus the baseline's, nats per token. margin: half the width of its confidence interval."""

    difference: float
    margin: float
    degrees_of_freedom: int

    def __str__(self) -> str:
        return f"{self.difference:+.4f} ± {self.margin:.4f}"


@dataclass(frozen=True)
class Comparison:
    """One configuration against the baseline. paired: over the seeds that both have, when they share at least `FEWEST_PAIRS`."""

    group: str
    baseline: str
    pooled: Interval
    paired: Interval | None
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """headline: the verdict in a sentence. basis: what it rests on. findings: what the headline leaves out. A sentence each.

    tokens: where the losses were compared. spread: pooled standard deviation of the validation loss between seeds.
    """

    headline: str
    basis: list[str]
    tokens: int | None = None
    spread: float | None = None
    degrees_of_freedom: int = 0
    findings: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


def group_runs(runs: list[Run], by: Sequence[str] = ()) -> list[Group]:
    """Runs of one configuration together, in the order in which they come, labelled by what tells the configurations apart.

    by: facts outside the config that tell configurations apart as well, such as git_sha.

    Raises ValueError when no run has such a fact.
    """
    known = {key for run in runs for key in run.facts()}
    for key in by:
        if key not in known:
            raise ValueError(f"--by {key}: no such key; one of {', '.join(sorted(known))}")
    in_config = {f"{section}.{key}" for run in runs for section, keys in run.info["config"].items() for key in keys}
    keys = [key for key in differing(runs) if key in by or (key in in_config and key != SEED)]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        facts = run.facts()
        groups.setdefault(json.dumps([facts.get(key) for key in keys]), []).append(run)
    return [Group(_label(keys, members), members) for members in groups.values()]


def _label(keys: list[str], members: list[Run]) -> str:
    facts = members[0].facts()
    label = ", ".join(f"{short_key(key, keys)}={show(facts.get(key))}" for key in keys)
    if label and len(label) <= LONGEST_LABEL:
        return label
    return members[0].name + (f" and {len(members) - 1} more" if len(members) > 1 else "")


def short_key(key: str, among: Sequence[str]) -> str:
    """The key without its section where that is clear among the others."""
    last = key.split(".")[-1]
    return key if key.startswith("packages.") or [other.split(".")[-1] for other in among].count(last) > 1 else last


def show(value: Any) -> str:
    """A setting as it stands in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def judge(groups: list[Group], baseline: str | None = None) -> Verdict:
    """baseline: the label of a group or the name of one of its runs; None: the group with the most seeds, the first of them.

    Fills in each group's `losses`. Raises ValueError when no group has the baseline's name.
    """
    named = _find(groups, baseline) if baseline else None
    basis = [f"{run.name}: not evaluated yet, left out." for group in groups for run in group.runs if not run.evaluations]
    groups = [group for group in groups if any(run.evaluations for run in group.runs)]
    runs = [run for group in groups for run in group.runs if run.evaluations]
    if len(runs) < 2:
        return Verdict(f"No verdict: there is {'one run' if runs else 'no run'} with a validation loss.", basis)
    if reasons := _not_comparable(runs):
        return Verdict("No verdict: the validation losses are not comparable.", reasons + basis)
    tokens = max(set.intersection(*({row["tokens"] for row in run.evaluations} for run in runs)), default=None)
    if tokens is None:
        return Verdict("No verdict: there is no number of tokens at which all runs were evaluated.", basis)
    basis = [_where_compared(runs, tokens), *_measure(groups, tokens), *basis]
    for group in groups:
        if not math.isfinite(group.mean):
            basis.append(f"{group.label}: a validation loss is not finite, so that there is no difference to compute.")
    return _judge_measured(groups, named, tokens, basis)


def _find(groups: list[Group], name: str) -> Group:
    for group in groups:
        if name == group.label or name in [run.name for run in group.runs]:
            return group
    raise ValueError(f"--baseline {name}: neither a run nor a configuration; one of {'; '.join(group.label for group in groups)}")


def _not_comparable(runs: list[Run]) -> list[str]:
    reasons = []
    for key, reason in MEASURED_ON.items():
        values = list(dict.fromkeys(show(run.facts().get(key)) for run in runs))
        if len(values) > 1:
            reasons.append(f"{key} differs ({', '.join(values)}): {reason}.")
    return reasons


def _where_compared(runs: list[Run], tokens: int) -> str:
    sentence = f"Compared: validation loss at {tokens:,} tokens"
    if all(run.evaluations[-1]["tokens"] == tokens for run in runs):
        return sentence + ", each run's last."
    return (
        f"{sentence}, the most at which all runs were evaluated. Not every run ends there, and where a schedule of the learning rate "
        "goes on, the loss has yet to fall by what its end brings."
    )


def _measure(groups: list[Group], tokens: int) -> list[str]:
    """Fill in the losses of each group; what to know about them."""
    sentences = []
    for group in groups:
        by_seed: dict[int | None, list[float]] = {}
        for run in group.runs:
            for row in run.evaluations:
                if row["tokens"] == tokens:
                    by_seed.setdefault(run.seed, []).append(row["val_loss"])
        group.losses = {seed: statistics.fmean(losses) for seed, losses in by_seed.items()}
        sentences += [
            f"{group.label}: {len(losses)} runs of seed {seed} count as one, by their mean."
            for seed, losses in by_seed.items()
            if len(losses) > 1
        ]
        mixed = [key for key in differing(group.runs) if key != SEED]
        if mixed:
            sentences.append(f"{group.label}: its runs are not alike in {', '.join(mixed)}.")
    return sentences


def _judge_measured(groups: list[Group], named: Group | None, tokens: int, basis: list[str]) -> Verdict:
    """The verdict on groups whose losses are known."""
    finite = [group for group in groups if math.isfinite(group.mean)]
    replicated = [group for group in finite if len(group.losses) > 1]
    degrees = sum(len(group.losses) - 1 for group in replicated)
    spread = None
    if degrees:
        spread = math.sqrt(sum(statistics.variance(group.losses.values()) * (len(group.losses) - 1) for group in replicated) / degrees)
        of = f"pooled over {len(replicated)} configurations" if len(replicated) > 1 else f"from {replicated[0].label}"
        basis.append(f"Spread of seeds: standard deviation {spread:.4f} with {degrees} degree{'s' * (degrees > 1)} of freedom, {of}.")
    known = {"basis": basis, "tokens": tokens, "spread": spread, "degrees_of_freedom": degrees}
    if len(groups) == 1:
        return Verdict(f"No verdict: there is one configuration ({groups[0].count}).", **known)
    baseline = named or max(finite, key=lambda group: len(group.losses), default=None)
    others = [group for group in finite if group is not baseline]
    if baseline not in finite or not others:
        return Verdict("No verdict: only one configuration, or not the baseline, has finite validation losses.", **known)
    if spread is None:
        return Verdict("No verdict: no configuration was run with more than one seed; run at least two seeds of one of them.", **known)
    comparisons = _compare(baseline, others, spread, degrees)
    basis += _how_judged([baseline, *others])
    return Verdict(_headline(baseline, comparisons), findings=_findings(comparisons), comparisons=comparisons, **known)


def _compare(baseline: Group, others: list[Group], spread: float, degrees: int) -> list[Comparison]:
    shared = {group.label: [seed for seed in baseline.losses if seed in group.losses] for group in others}
    tests = len(others) + sum(len(seeds) >= FEWEST_PAIRS for seeds in shared.values())
    confidence = 1 - ERROR_RATE / tests
    comparisons = []
    for group in others:
        standard_error = spread * math.sqrt(1 / len(group.losses) + 1 / len(baseline.losses))
        pooled = Interval(group.mean - baseline.mean, t_quantile(confidence, degrees) * standard_error, degrees)
        paired = None
        if len(seeds := shared[group.label]) >= FEWEST_PAIRS:
            differences = [group.losses[seed] - baseline.losses[seed] for seed in seeds]
            standard_error = statistics.stdev(differences) / math.sqrt(len(seeds))
            paired = Interval(statistics.fmean(differences), t_quantile(confidence, len(seeds) - 1) * standard_error, len(seeds) - 1)
        comparisons.append(Comparison(group.label, baseline.label, pooled, paired, _sentence(group, baseline, pooled, paired)))
    return comparisons


def _sentence(group: Group, baseline: Group, pooled: Interval, paired: Interval | None) -> str:
    shown = _shown(pooled, paired)
    if shown is None:
        smallest = min(interval.margin for interval in (pooled, paired) if interval)
        return (
            f"{group.label} and {baseline.label}: within the spread of seeds, no difference shown ({pooled}; "
            f"less than {smallest:.4f} could not have been shown)."
        )
    better, worse = (group, baseline) if shown.difference < 0 else (baseline, group)
    how = "" if shown is pooled else f", seed by seed over {shown.degrees_of_freedom + 1} shared seeds"
    return f"{better.label} is better than {worse.label} by {abs(shown.difference):.4f} ± {shown.margin:.4f}{how}."


def _shown(pooled: Interval, paired: Interval | None) -> Interval | None:
    """The test that shows a difference, if one does."""
    return next((interval for interval in (pooled, paired) if interval and abs(interval.difference) > interval.margin), None)


def _headline(baseline: Group, comparisons: list[Comparison]) -> str:
    if len(comparisons) == 1:
        return comparisons[0].sentence
    found: dict[str, list[str]] = {"better": [], "worse": [], "no difference shown": []}
    for comparison in comparisons:
        shown = _shown(comparison.pooled, comparison.paired)
        found["no difference shown" if shown is None else "better" if shown.difference < 0 else "worse"].append(comparison.group)
    return f"Against {baseline.label} - " + "; ".join(f"{what}: {' | '.join(labels)}" for what, labels in found.items() if labels) + "."


def _findings(comparisons: list[Comparison]) -> list[str]:
    """What the headline leaves out."""
    sentences = [comparison.sentence for comparison in comparisons] if len(comparisons) > 1 else []
    for comparison in comparisons:
        if comparison.paired:
            pairs = comparison.paired.degrees_of_freedom + 1
            sentences.append(f"{comparison.group} less {comparison.baseline}, seed by seed: {comparison.paired} over {pairs} shared seeds.")
    return sentences


def _how_judged(groups: list[Group]) -> list[str]:
    single = [group.label for group in groups if len(group.losses) == 1]
    sentences = [f"One seed alone, judged by the spread of the others: {' | '.join(single)}."] if single else []
    return [
        *sentences,
        f"Student's t intervals, wrong about a difference of zero at most {ERROR_RATE:.0%} of the time for all tests together.",
    ]


def t_quantile(confidence: float, degrees_of_freedom: int) -> float:
    """The t below which |T| lies with this probability, for Student's T; by bisection in atan(t / sqrt(degrees of freedom))."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, degrees_of_freedom) < confidence else (low, middle)
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _t_probability(theta: float, degrees_of_freedom: int) -> float:
    """P(|T| < sqrt(n) tan(theta)) for a whole number n of degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = degrees_of_freedom % 2
    total, term = 0.0, math.cos(theta) ** odd
    for exponent in range(odd, degrees_of_freedom - 1, 2):
        total += term
        term *= (exponent + 1) / (exponent + 2) * math.cos(theta) ** 2
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
