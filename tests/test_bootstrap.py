"""Intervals and paired tests: the arithmetic against loops and SciPy, the promises against
simulated studies.
"""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from bench import metrics as studies
from common import UserError
from reporting import bootstrap, metrics


def study(cases=12, patches=240, seed=0, digits=2):
    """(labels, probabilities, case of each patch): ties, and cases without one of the classes."""
    rng = np.random.default_rng(seed)
    case = np.concatenate([np.arange(cases), rng.integers(0, cases, patches - cases)])
    y = rng.random(patches) < 0.4
    y[case == 0], y[case == 1] = True, False
    return (
        y,
        np.round(
            np.clip(0.4 * rng.random(patches) + 0.3 * y + 0.2 * rng.random(cases)[case], 0, 1),
            digits,
        ),
        case,
    )


# ---------------------------------------------------------------- Student's t


def test_students_t_equals_scipy():
    for df in (1, 2, 3, 4, 5, 7, 10, 19, 50, 99, 500):
        for t in (0.0, 0.01, 0.5, 1.0, 1.96, 3.3, -2.0, 12.0):
            assert (
                abs(bootstrap.t_within(t, df) - (1 - 2 * scipy.stats.t.sf(abs(t), df))) < 1e-12
            ), (df, t)
        for share in (0.05, 0.5, 0.8, 0.95, 0.99, 0.999):
            wanted = scipy.stats.t.ppf((1 + share) / 2, df)
            assert abs(bootstrap.t_quantile(share, df) - wanted) < 1e-9 * max(1, wanted), (
                df,
                share,
            )


# ---------------------------------------------------------------- replicates


def test_draws_are_counts_of_as_many_cases_and_every_case_is_as_likely():
    counts = bootstrap.draws(10, 5000, seed=3)
    assert (
        counts.shape == (5000, 10)
        and (counts.sum(1) == 10).all()
        and (counts == counts.round()).all()
    )
    assert abs(counts.mean(0) - 1).max() < 0.06  # deviation 0.95 / sqrt(5000) = 0.013
    assert abs(counts.var(0) - 0.9).max() < 0.1  # of a binomial number of 10 draws
    assert np.array_equal(counts, bootstrap.draws(10, 5000, seed=3))
    assert np.array_equal(
        counts[:100], bootstrap.draws(10, 100, seed=3)
    )  # more replicates go on from the same
    assert not np.array_equal(counts, bootstrap.draws(10, 5000, seed=4))


@pytest.mark.parametrize("cases", [12, 320], ids=["by a matrix", "by weights"])
def test_auroc_of_each_draw_is_that_of_the_drawn_patches(cases):
    y, p, case = study(cases, 40 * cases if cases < 50 else 700)
    counts = np.concatenate([bootstrap.draws(cases, 60), bootstrap.leave_one_out(cases)[:10]])
    found = bootstrap.auroc_of_draws(counts, y, p, case)
    for k, drawn in enumerate(counts):
        assert abs(found[k] - metrics.auroc(y, p, drawn[case])) < 1e-12
    for k in range(10):  # and the patches themselves put together, as a loop would do it
        rows = np.concatenate(
            [np.flatnonzero(case == c) for c in range(cases) for _ in range(int(counts[k, c]))]
        )
        assert abs(found[k] - roc_auc_score(y[rows], p[rows])) < 1e-12


@pytest.mark.parametrize("cases", [3, 310])
def test_a_draw_without_one_of_the_classes_is_not_a_number(cases):
    case = np.arange(cases)
    y = case == 0
    counts = np.zeros((3, cases))
    counts[0, 0], counts[1, 1:], counts[2] = cases, 1, 1
    found = bootstrap.auroc_of_draws(counts, y, np.linspace(1, 0, cases), case)
    assert np.isnan(found[:2]).all() and found[2] == 1


def test_both_ways_of_computing_the_draws_agree():
    """Cases above 300 go by weights: the same study, with its cases numbered among 300 and among
    301.
    """
    y, p, case = study(30, 900)
    drawn = bootstrap.draws(30, 50)
    found = [
        bootstrap.auroc_of_draws(np.pad(drawn, ((0, 0), (0, n - 30))), y, p, case)
        for n in (300, 301)
    ]
    assert np.abs(found[0] - found[1]).max() < 1e-12


def test_decisions_of_each_draw_are_those_of_the_drawn_patches():
    y, p, case = study(9, 120)
    counts, pred = bootstrap.draws(9, 80), p >= 0.5
    found = bootstrap.decisions_of_draws(counts, y, pred, case)
    for k, drawn in enumerate(counts):
        weight = drawn[case]
        if len(np.unique(y[weight > 0])) < 2:
            continue
        assert (
            abs(
                found["balanced_accuracy"][k]
                - balanced_accuracy_score(y, pred, sample_weight=weight)
            )
            < 1e-12
        )
        wanted = f1_score(y, pred, sample_weight=weight, average="weighted", zero_division=0)
        assert abs(found["weighted_f1"][k] - wanted) < 1e-12
    only = bootstrap.decisions_of_draws(
        np.eye(9)[:1] * 9, y, pred, case
    )  # case 0 holds mitotic figures alone
    assert np.isnan(only["balanced_accuracy"]).all()


def test_replicates_are_of_the_mean_over_the_repeats_and_share_their_draws():
    y, p, case = study()
    other = study(seed=1)[1]
    names = np.array([f"case {c:02d}" for c in case])
    both, cases = bootstrap.replicate([(y, p, names), (y, other, names)], 200)
    one, two = (bootstrap.replicate([(y, own, names)], 200)[0] for own in (p, other))
    assert cases == 12 and set(both) == {"auroc", *bootstrap.DECISIONS}
    for key in both:
        assert both[key][0] == pytest.approx((one[key][0] + two[key][0]) / 2, abs=1e-12)
        for part in (1, 2):
            assert np.allclose(
                both[key][part], (one[key][part] + two[key][part]) / 2, rtol=0, atol=1e-12
            )
    assert (
        one["auroc"][0] == metrics.auroc(y, p)
        and len(one["auroc"][1]) == 200
        and len(one["auroc"][2]) == 12
    )
    with pytest.raises(UserError, match="different test sets"):
        bootstrap.replicate([(y, p, names), (y, other, names[::-1])], 200)


def test_the_order_and_the_names_of_the_cases_do_not_matter():
    y, p, case = study()
    order = np.random.default_rng(5).permutation(len(y))
    first = bootstrap.replicate([(y, p, case)], 150)[0]["auroc"]
    second = bootstrap.replicate(
        [(y[order], p[order], np.array([f"{c:02d}" for c in case])[order])], 150
    )[0]["auroc"]
    # "10" sorts before "2", so numbers as text have another order; two digits sort like numbers
    third = bootstrap.replicate([(y, p, np.array([f"{c:02d}" for c in case]))], 150)[0]["auroc"]
    assert np.allclose(second[1], third[1], rtol=0, atol=1e-12) and first[0] == third[0]


# ---------------------------------------------------------------- jackknife, intervals, tests


def test_the_jackknife_equals_a_loop_that_leaves_each_case_out():
    y, p, case = study()
    (_, _, left), cases = bootstrap.replicate([(y, p, case)], 100)[0]["auroc"], 12
    names = np.unique(case.astype(str))
    loop = np.array(
        [roc_auc_score(y[case.astype(str) != c], p[case.astype(str) != c]) for c in names]
    )
    assert np.allclose(left, loop, rtol=0, atol=1e-12)
    wanted = np.sqrt((cases - 1) / cases * sum((value - loop.mean()) ** 2 for value in loop))
    assert abs(bootstrap.standard_error(left, cases) - wanted) < 1e-12


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=40)
    left = (values.sum() - values) / 39
    assert abs(bootstrap.standard_error(left, 40) - values.std(ddof=1) / np.sqrt(40)) < 1e-12


def test_of_very_many_cases_2000_are_left_out_evenly_spread():
    counts = bootstrap.leave_one_out(5000)
    out = np.flatnonzero((counts == 0).any(0))
    assert counts.shape == (2000, 5000) and (counts.sum(1) == 4999).all()
    assert out[0] == 0 and out[-1] == 4999 and np.diff(out).max() <= 3


def test_the_interval_of_a_mean_is_students():
    """Where the statistic is a mean and the replicates are normal, the expanded percentiles are the
    textbook's.
    """
    values = np.random.default_rng(1).normal(5, 2, 8)
    error = values.std(ddof=1) / np.sqrt(8)
    replicates = (
        scipy.stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000) * values.std() / np.sqrt(8)
        + values.mean()
    )
    found = bootstrap.interval(replicates, (values.sum() - values) / 7, 8)
    assert found == pytest.approx(scipy.stats.t.interval(0.95, 7, values.mean(), error), abs=2e-3)
    # The share is kept: a smaller one gives a narrower interval.
    narrow = bootstrap.interval(replicates, (values.sum() - values) / 7, 8, share=0.5)
    assert narrow == pytest.approx(scipy.stats.t.interval(0.5, 7, values.mean(), error), abs=2e-3)


def test_too_little_gives_no_interval():
    rng = np.random.default_rng(0)
    left = rng.random(10)
    assert bootstrap.interval(rng.random(99), left, 10) is None
    assert bootstrap.interval(np.r_[rng.random(50), np.full(900, np.nan)], left, 10) is None
    assert (
        bootstrap.interval(rng.random(500), np.r_[left[:9], np.nan], 10) is None
    )  # a case holds the whole class
    assert bootstrap.interval(rng.random(500), left[:2], 2) is None
    assert bootstrap.interval(rng.random(500), left, 10) is not None
    assert bootstrap.interval(np.ones(500), np.ones(10), 10) == (1.0, 1.0)


def test_equal_models_give_p_one_and_no_difference():
    y, p, case = study()
    found = bootstrap.replicate([(y, p, case)], 300)[0]
    for key in found:
        assert bootstrap.paired(found[key], found[key], 12) == (0.0, (0.0, 0.0), 1.0)


def test_the_paired_test_is_the_jackknife_t_test_of_the_difference():
    y, p, case = study(20, 600)
    worse = np.where(
        np.random.default_rng(2).random(600) < 0.3, np.random.default_rng(3).random(600), p
    )
    a, b = (bootstrap.replicate([(y, own, case)], 500)[0]["auroc"] for own in (p, worse))
    difference, (low, high), value = bootstrap.paired(a, b, 20)
    names = case.astype(str)
    left = np.array(
        [
            roc_auc_score(y[names != c], p[names != c])
            - roc_auc_score(y[names != c], worse[names != c])
            for c in np.unique(names)
        ]
    )
    error = np.sqrt(19 / 20 * ((left - left.mean()) ** 2).sum())
    assert difference == pytest.approx(roc_auc_score(y, p) - roc_auc_score(y, worse), abs=1e-12)
    assert value == pytest.approx(2 * scipy.stats.t.sf(abs(difference) / error, 19), rel=1e-9)
    assert low < difference < high and value < 0.05
    back = bootstrap.paired(b, a, 20)  # the other way round
    assert (
        back[0] == -difference
        and back[2] == value
        and back[1] == pytest.approx((-high, -low), abs=1e-3)
    )


def test_a_certain_difference_has_p_zero_and_two_cases_none():
    y = np.tile([0, 1], 20)
    case = np.repeat(np.arange(10), 4)
    right, wrong = (
        bootstrap.replicate([(y, p, case)], 200)[0]["auroc"] for p in (y.astype(float), 1.0 - y)
    )
    assert bootstrap.paired(right, wrong, 10) == (1.0, (1.0, 1.0), 0.0)
    two = [
        bootstrap.replicate([(y, p, case > 4)], 200)[0]["auroc"] for p in (y.astype(float), 1.0 - y)
    ]
    assert bootstrap.paired(*two, 2) == (1.0, None, None)


def test_holm_equals_its_definition():
    assert bootstrap.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert bootstrap.holm([0.5, None, 0.6, 0.02]) == pytest.approx([1.0, None, 1.0, 0.06])
    assert (
        bootstrap.holm([]) == []
        and bootstrap.holm([None]) == [None]
        and bootstrap.holm([0.2]) == [0.2]
    )
    rng = np.random.default_rng(0)
    for n in range(1, 9):
        p = np.round(rng.random(n), 2)
        # Holm rejects at level a the k smallest as long as p(i) <= a / (n - i + 1): the corrected p
        # is the smallest such a, found here by going through the candidates.
        corrected = bootstrap.holm(p.tolist())
        for level in [*corrected, *(c - 1e-9 for c in corrected), 0.01, 0.05, 0.3]:
            rejected, order = set(), np.argsort(p, kind="stable")
            for rank, i in enumerate(order):
                if min(1, p[i] * (n - rank)) > level:
                    break
                rejected.add(i)
            assert {i for i in range(n) if corrected[i] <= level} == rejected


def test_few_cases_are_said_with_the_coverage_that_was_measured():
    assert (
        bootstrap.coverage_note(6)
        == "6 cases: such 95% intervals held the truth in 92% of simulations"
    )
    for cases in range(1, 20):
        note = bootstrap.coverage_note(cases)
        nearest = max((n for n in bootstrap.COVERAGE if n <= cases), default=4)
        assert note.startswith(f"{cases} cases") and f"{bootstrap.COVERAGE[nearest]:.0%}" in note
    assert bootstrap.coverage_note(20) == bootstrap.coverage_note(500) == ""


# ---------------------------------------------------------------- simulated studies


def test_simulated_studies_are_clustered_and_have_the_true_auroc():
    rng = np.random.default_rng(0)
    y, (a, b), case = studies.simulate(rng, 3000, models=2)
    size = np.bincount(case)
    assert len(size) == 3000 and size.min() >= 5 and size.max() == 200
    for score in (a, b):
        assert abs(metrics.auroc(y, score) - studies.TRUE_AUROC) < 0.006
    # What the names promise: the scores of two patches of a case go together, those of two models
    # too.
    own = np.array([a[(case == c) & ~y].mean() for c in range(200) if ((case == c) & ~y).sum() > 3])
    assert own.std() > 0.6
    assert 0.3 < np.corrcoef(a[~y], b[~y])[0, 1] < 0.7


def test_few_simulated_studies_are_in_the_right_region():
    """A guard against gross mistakes, in seconds; the slow tests below are the promise."""
    assert 0.90 <= studies.measured_coverage(50, 300, replicates=300) <= 0.985
    assert 0.02 <= studies.measured_false_positives(50, 300, replicates=200) <= 0.085


@pytest.mark.slow
@pytest.mark.parametrize("cases", [50, 80, 150])
def test_intervals_hold_the_truth_in_92_to_98_percent(cases):
    assert 0.92 <= studies.measured_coverage(cases, 1200) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("cases", [50, 80, 150])
def test_paired_tests_find_a_difference_between_equal_models_in_3_to_7_percent(cases):
    assert 0.03 <= studies.measured_false_positives(cases, 1200) <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("cases", [6, 12])
def test_the_coverage_that_is_printed_for_few_cases_is_the_measured_one(cases):
    measured = studies.measured_coverage(
        cases, 1200, seed=7
    )  # other studies than those of the table
    assert abs(measured - bootstrap.COVERAGE[cases]) < 3.5 * np.sqrt(0.08 * 0.92 / 1200)


@pytest.mark.slow
@pytest.mark.parametrize("noise, share", [(1.2, 0.6), (2.0, 0.95)])
def test_a_paired_test_finds_a_difference_that_is_there(noise, share):
    """Nearly as often as somebody who knows how much the difference varies from study to study."""
    rng, differences, errors, found = np.random.default_rng(0), [], [], 0
    for k in range(100):
        y, (a, b), case = studies.simulate(rng, 60, models=2)
        counts = np.concatenate([bootstrap.draws(60, 300, k), bootstrap.leave_one_out(60)])
        worse = b + rng.normal(0, noise, len(b))
        first, second = (
            (metrics.auroc(y, s), values[:300], values[300:])
            for s, values in ((s, bootstrap.auroc_of_draws(counts, y, s, case)) for s in (a, worse))
        )
        differences.append(first[0] - second[0])
        errors.append(bootstrap.standard_error(first[2] - second[2], 60))
        found += bootstrap.paired(first, second, 60)[2] < 0.05
    true = np.std(differences, ddof=1)
    assert 0.85 < np.mean(errors) / true < 1.25
    assert found >= share * 100 and found >= np.sum(np.abs(differences) > 1.96 * true) - 15
