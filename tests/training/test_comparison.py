"""The verdict: wrong as seldom as it says, and silent where nothing can be said."""

import math

import numpy as np
import pytest

from tests.recorded_runs import recorded
from training.comparison import ERROR_RATE, group_runs, judge, t_quantile


def configuration(backend, losses, first_seed=1, **others):
    """One run a loss, seeds counted from `first_seed`."""
    return [
        recorded(f"{backend}-{seed}", seed, final=loss, settings={"attention.backend": backend}, **others)
        for seed, loss in enumerate(losses, first_seed)
    ]


def verdict(*configurations, baseline=None):
    return judge(group_runs([run for runs in configurations for run in runs]), baseline)


def shows_difference(judged):
    return "better than" in judged.headline


# Published tables of Student's t, two-sided.
@pytest.mark.parametrize(
    ("confidence", "degrees_of_freedom", "expected"),
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 10, 2.228),
        (0.95, 31, 2.040),
        (0.99, 2, 9.925),
        (0.99, 5, 4.032),
    ],
)
def test_t_quantile(confidence, degrees_of_freedom, expected):
    assert t_quantile(confidence, degrees_of_freedom) == pytest.approx(expected, abs=6e-4)


def test_two_configurations_by_hand():
    judged = verdict(configuration("triton", [3.00, 3.02]), configuration("sdpa", [3.20, 3.24]))
    # Variances 0.0002 and 0.0008, so that the pooled deviation is sqrt(0.0005) with 2 degrees of freedom, t 4.303, sqrt(1/2 + 1/2) = 1.
    assert judged.spread == pytest.approx(math.sqrt(0.0005)) and judged.degrees_of_freedom == 2
    (comparison,) = judged.comparisons
    assert comparison.pooled.difference == pytest.approx(0.21) and comparison.pooled.margin == pytest.approx(
        4.303 * math.sqrt(0.0005), abs=1e-5
    )
    assert judged.headline == "backend=triton is better than backend=sdpa by 0.2100 ± 0.0962." and judged.tokens == 40_000


def test_a_difference_within_the_spread_is_not_shown_and_the_smallest_that_could_have_been_is_named():
    judged = verdict(configuration("triton", [3.00, 3.02]), configuration("sdpa", [3.02, 3.06]))
    assert judged.headline == (
        "backend=sdpa and backend=triton: within the spread of seeds, no difference shown "
        "(+0.0300 ± 0.0962; less than 0.0962 could not have been shown)."
    )


@pytest.mark.parametrize(("seeds", "share_seeds"), [((2, 2), False), ((3, 3), True), ((3, 1), True), ((3, 3, 1), True)])
def test_a_true_difference_of_zero_is_called_one_as_seldom_as_stated(seeds, share_seeds):
    rng = np.random.default_rng(0)
    trials = 400
    wrong = 0
    for _ in range(trials):
        runs = [
            configuration(f"backend{number}", 3 + 0.01 * rng.standard_normal(count), first_seed=1 if share_seeds else 10 * number)
            for number, count in enumerate(seeds)
        ]
        judged = verdict(*runs)
        assert judged.comparisons
        wrong += any("better than" in comparison.sentence for comparison in judged.comparisons)
    # Within three standard deviations of the count; where two tests look at the same runs the rate is an upper bound.
    assert 0.01 * trials <= wrong <= trials * ERROR_RATE + 3 * math.sqrt(trials * ERROR_RATE * (1 - ERROR_RATE))


@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (3, 1)])
def test_a_large_difference_is_found_and_has_the_right_sign(seeds):
    rng = np.random.default_rng(1)
    for _ in range(50):
        losses = [3 + shift + 0.01 * rng.standard_normal(count) for shift, count in zip((0, -0.5), seeds, strict=True)]
        judged = verdict(configuration("triton", losses[0]), configuration("sdpa", losses[1]))
        assert judged.headline.startswith("backend=sdpa is better than backend=triton by 0.")


def test_what_the_seed_does_to_both_is_taken_out_seed_by_seed():
    noise = [0.0, 0.3, -0.3, 0.1]
    judged = verdict(
        configuration("triton", [3 + shift for shift in noise]),
        configuration("sdpa", [2.95 + shift + i / 1000 for i, shift in enumerate(noise)]),
    )
    (comparison,) = judged.comparisons
    assert abs(comparison.pooled.difference) < comparison.pooled.margin
    assert comparison.paired.difference == pytest.approx(-0.0485) and comparison.paired.degrees_of_freedom == 3
    assert (
        "backend=sdpa is better than backend=triton by 0.0485" in judged.headline and "seed by seed over 4 shared seeds" in judged.headline
    )
    apart = verdict(configuration("triton", [3.0, 3.3, 2.7]), configuration("sdpa", [2.95, 3.25, 2.65], first_seed=7))
    assert apart.comparisons[0].paired is None and not shows_difference(apart)


def test_one_run_is_judged_by_the_spread_of_the_others_and_that_is_said():
    judged = verdict(configuration("sdpa", [3.0]), configuration("triton", [3.00, 3.02, 3.01]), configuration("eager", [3.5]))
    assert judged.headline == "Against backend=triton - worse: backend=eager; no difference shown: backend=sdpa."
    assert "One seed alone, judged by the spread of the others: backend=sdpa | backend=eager." in judged.basis
    single = {comparison.group: comparison.pooled for comparison in judged.comparisons}["backend=eager"]
    assert single.margin == pytest.approx(t_quantile(0.975, 2) * 0.01 * math.sqrt(1 + 1 / 3))


def test_without_a_second_seed_there_is_no_verdict():
    judged = verdict(configuration("triton", [3.0]), configuration("sdpa", [2.0]))
    assert judged.headline == "No verdict: no configuration was run with more than one seed; run at least two seeds of one of them."


def test_one_configuration_gives_its_spread():
    judged = verdict(configuration("triton", [3.0, 3.02]))
    assert judged.headline == "No verdict: there is one configuration (2 seeds)." and judged.spread == pytest.approx(0.02 / math.sqrt(2))


def test_the_baseline_is_the_one_with_most_seeds_or_the_one_asked_for():
    runs = [*configuration("sdpa", [3.0]), *configuration("triton", [3.0, 3.01]), *configuration("eager", [3.0, 3.01])]
    assert judge(group_runs(runs)).comparisons[0].baseline == "backend=triton"
    assert judge(group_runs(runs), "eager-2").comparisons[0].baseline == "backend=eager"
    assert judge(group_runs(runs), "backend=sdpa").comparisons[0].baseline == "backend=sdpa"
    with pytest.raises(ValueError, match="--baseline flash: neither a run nor a configuration; one of backend=sdpa; "):
        judge(group_runs(runs), "flash")


def test_two_runs_of_one_seed_are_no_spread_of_seeds():
    judged = verdict(configuration("triton", [3.0]), configuration("triton", [3.1]), configuration("sdpa", [3.0]))
    assert "no configuration was run with more than one seed" in judged.headline
    assert "backend=triton: 2 runs of seed 1 count as one, by their mean." in judged.basis


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"corpus_sha256": "def"}, "corpus differs (abc, def): the hash stands for text and tokenizer"),
        ({"settings": {"eval.sequences": 8}}, "eval.sequences differs (64, 8)"),
    ],
)
def test_losses_on_different_text_get_no_verdict(others, reason):
    judged = verdict(configuration("triton", [3.0, 3.01]), [recorded("other", 1, final=2.0, **others)])
    assert (
        judged.headline == "No verdict: the validation losses are not comparable."
        and judged.basis[0].startswith(reason)
        and not judged.comparisons
    )


def test_different_budgets_are_compared_where_all_were_evaluated():
    # The longer runs pass 3.0 + 0.1 * 10 and 3.02 + 0.1 * 10 at 30,000 tokens, where the shorter one ends.
    judged = verdict(configuration("triton", [3.0, 3.02]), configuration("sdpa", [4.01], steps=30))
    assert judged.tokens == 30_000 and judged.comparisons[0].pooled.difference == pytest.approx(0.0, abs=1e-9)
    assert "the most at which all runs were evaluated. Not every run ends there" in judged.basis[0]
    none_shared = configuration("eager", [3.0])
    for row in none_shared[0].rows:
        row["tokens"] += 1
    assert "no number of tokens at which all runs were evaluated" in verdict(configuration("triton", [3.0, 3.02]), none_shared).headline


def test_runs_not_evaluated_yet_are_left_out():
    judged = verdict(configuration("triton", [3.0, 3.02]), configuration("sdpa", [3.5]), configuration("eager", [3.0], steps=5))
    assert "eager-1: not evaluated yet, left out." in judged.basis and shows_difference(judged)
    assert judge(group_runs(configuration("triton", [3.0], steps=5))).headline == "No verdict: there is no run with a validation loss."


def test_a_diverged_run_is_said_and_compared_with_none():
    diverged = configuration("sdpa", [3.0, 3.0])
    diverged[1].rows[-1]["val_loss"] = math.nan
    judged = verdict(configuration("triton", [3.0, 3.02]), diverged, configuration("eager", [3.5]))
    assert [comparison.group for comparison in judged.comparisons] == ["backend=eager"]
    assert any(sentence.startswith("backend=sdpa: a validation loss is not finite") for sentence in judged.basis)
    assert "only one configuration, or not the baseline, has finite" in verdict(configuration("triton", [3.0, 3.02]), diverged).headline


def test_names_make_no_configuration_and_by_makes_one():
    runs = [
        recorded("a", 1, settings={"run.output_dir": "here", "tracking.tags": ["x"], "checkpoint.every": 5}),
        recorded("b", 2),
        recorded("c", 1),
        recorded("d", 2),
    ]
    for run in runs[2:]:
        run.info["environment"] = {"git_sha": "decaf"}
    (group,) = group_runs(runs)
    assert any("not alike in git_sha" in sentence for sentence in judge([group]).basis)
    assert [group.label for group in group_runs(runs, ["git_sha"])] == ["git_sha=c0ffee", "git_sha=decaf"]
    with pytest.raises(ValueError, match="--by commit: no such key; one of .*git_sha"):
        group_runs(runs, ["commit"])


def test_configurations_that_differ_in_much_are_named_after_a_run():
    many = {f"model.some_long_name_{number}": number for number in range(9)}
    groups = group_runs([recorded("small"), recorded("large-1", 1, settings=many), recorded("large-2", 2, settings=many)])
    assert [group.label for group in groups] == ["small", "large-1 and 1 more"]
