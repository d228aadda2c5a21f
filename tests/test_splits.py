"""Splits that cannot leak, and the sampler of pseudo-epochs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from common import UserError

REAL = Path(os.environ.get("MITOSIS_REALDATA") or "/nowhere") / "annotations"
real = pytest.mark.skipif(not REAL.is_dir(), reason="MITOSIS_REALDATA is not set")
FRACTIONS = (0.001, 0.01, 0.1, 1.0)


def made(sizes, domains=("all",), seed=0, kind="points", positive=0.4, name="made"):
    """Annotations with len(sizes) cases, one image of 3,000 px each; domains in turn."""
    rng = np.random.default_rng(seed)
    case = np.repeat([f"c{i:03d}" for i in range(len(sizes))], sizes)
    number = np.repeat(np.arange(len(sizes)), sizes)
    image = np.char.add(case, ".png")
    n = len(case)
    x, y = rng.uniform(0, 3000, (2, n)) if kind == "points" else np.full((2, n), np.nan)
    if kind == "patches":
        image = np.array([f"{i}.png" for i in range(n)])
    return data.Annotations(
        np.array([f"a{i}" for i in rng.permutation(n)]),
        image,
        case,
        np.array(domains)[number % len(domains)],
        x,
        y,
        (rng.random(n) < positive).astype(np.int8),
        name,
        Path("/nowhere"),
        kind=kind,
        sizes={name: (3000, 3000) for name in np.unique(image)},
        all_images=np.unique(image).tolist(),
    )


@pytest.fixture(scope="module")
def ccmct():
    return data.load_dataset(REAL / "ccmct/MITOS_WSI_CCMCT_ODAEL_binary_labels.csv")


@pytest.fixture(scope="module")
def midog2022():
    return data.load_dataset(REAL / "midog2022/MIDOG2022_training_tiff.csv")


def check(a, seed, fold, within, least_cases=1, domain=None):
    """One seed's splits at all fractions: no leak, shares, nested, both classes. Returns the test
    share.
    """
    inside = np.ones(len(a), bool) if domain is None else a.domain == domain
    split = data.make_split(a, fold, 1.0, domain, seed)
    rows = {name: a.rows(getattr(split, name)) for name in ("train", "val", "test")}
    cases = {name: set(np.unique(a.case[r]).tolist()) for name, r in rows.items()}
    assert not (
        cases["train"] & cases["val"]
        or cases["train"] & cases["test"]
        or cases["val"] & cases["test"]
    )
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.flatnonzero(inside))
    share, rest = len(split.test) / inside.sum(), inside.sum() - len(split.test)
    assert abs(share - 0.2) <= within and len(cases["test"]) >= least_cases, (seed, share)
    assert abs(len(split.val) / rest - 0.2) <= within, (seed, len(split.val))
    assert all(0 < a.label[r].mean() < 1 for r in rows.values()), seed
    for frac in FRACTIONS[::-1][1:]:  # each within the next larger
        part = data.make_split(a, fold, frac, domain, seed)
        assert np.array_equal(part.test, split.test) and np.array_equal(part.val, split.val)
        own = a.rows(part.train)
        assert len(np.unique(own)) == len(own) == max(2, round(frac * split.pool))
        assert np.isin(own, rows["train"]).all() and 0 < a.label[own].mean() < 1
        rows["train"] = own
    return share


def check_seeds(a, seeds, within, least_cases):
    shares = [check(a, seed, seed % 5, within, least_cases) for seed in seeds]
    print(f"{a.name}: test share {min(shares):.4f} to {max(shares):.4f} over {len(shares)} seeds")


@real
def test_real_ccmct_10_seeds(ccmct):
    check_seeds(ccmct, range(10), 0.03, 4)


@real
def test_real_midog2022_20_seeds(midog2022):
    check_seeds(midog2022, range(20), 0.01, 20)


@real
@pytest.mark.long
def test_real_ccmct_1000_seeds(ccmct):
    check_seeds(ccmct, range(1000), 0.03, 4)


@real
@pytest.mark.slow
def test_real_midog2022_1000_seeds(midog2022):
    check_seeds(midog2022, range(1000), 0.01, 20)


@real
def test_real_test_set_is_fixed_and_validation_is_not(midog2022):
    splits = [data.make_split(midog2022, fold) for fold in range(5)]
    assert len({tuple(split.test) for split in splits}) == 1
    assert len({tuple(sorted(split.val)) for split in splits}) == 5
    assert tuple(data.make_split(midog2022, seed=1).test) != tuple(splits[0].test)
    for domain in "ABCDE":  # the share holds in each domain
        here = midog2022.domain == domain
        share = np.isin(midog2022.id[here], splits[0].test).mean()
        assert abs(share - 0.2) < 0.02, (domain, share)


@real
@pytest.mark.parametrize("domain", "ABCDE")
def test_real_cross_domain(midog2022, domain):
    check(midog2022, 0, 3, 0.02, 4, domain)
    splits = [data.make_split(midog2022, fold, domain=domain) for fold in range(5)]
    assert len({tuple(split.test) for split in splits}) == 1
    assert sorted(splits[0].others) == sorted(set("ABCDE") - {domain})
    for other, ids in splits[0].others.items():
        assert sorted(ids) == sorted(midog2022.id[midog2022.domain == other])
    text = data.KNOWN["midog2022"].domains[domain][2]
    assert data.make_split(midog2022, domain=text).train.tolist() == splits[0].train.tolist()


@real
@pytest.mark.parametrize("name, low, high", [("ccmct", 0.06, 0.08), ("midog2022", 0.08, 0.10)])
def test_real_split_by_annotation_leaks(name, low, high, request):
    a = request.getfixturevalue(name)
    found = [data.overlap(a, data.make_split(a, seed=seed, by="annotation")) for seed in range(3)]
    assert all(f["on_trained_cases"] > 0.999 for f in found)
    mean = np.mean([f["near"] for f in found])
    assert low < mean < high and all(f["near_chebyshev"] > f["near"] for f in found)
    by_case = data.overlap(a, data.make_split(a))
    assert by_case == {"cases": 0, "on_trained_cases": 0, "near": 0, "near_chebyshev": 0}


@real
def test_real_official_split(ccmct, midog2022):
    split = data.make_split(ccmct, by="official")
    rows = ccmct.rows(split.test)
    assert set(ccmct.case[rows]) == set(data.KNOWN["ccmct"].official_test)
    assert (ccmct.label[rows] == 1).sum() == 22476 and (ccmct.label[rows] == 0).sum() == 13625
    with pytest.raises(UserError, match="no published test cases"):
        data.make_split(midog2022, by="official")


# ---------------------------------------------------------------- made-up tables


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 60), min_size=3, max_size=40),
    domains=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    fold=st.integers(0, 4),
    frac=st.floats(1e-4, 1),
)
def test_no_table_leaks(sizes, domains, seed, fold, frac):
    a = made(sizes, [f"d{i}" for i in range(domains)], seed % 7)
    try:
        split = data.make_split(a, fold, frac, None, seed)
    except UserError as error:  # too small for the split: one class only, or nothing left
        assert "too small" in str(error)
        return
    parts = [set(a.case[a.rows(ids)].tolist()) for ids in (split.train, split.val, split.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert set(a.label[a.rows(split.train)].tolist()) == {0, 1}
    assert len(split.train) == max(2, round(frac * split.pool))


def test_a_case_with_a_fifth_of_everything_is_no_test_set():
    a = made([1000, *[130] * 30])
    found = set()
    for seed in range(40):
        split = data.make_split(a, seed=seed)
        assert abs(len(split.test) / len(a) - 0.2) < 0.03 and len(split.cases["test"]) >= 4
        found.add(tuple(split.cases["test"]))
    assert len(found) == 40


def test_a_case_is_left_for_validation_and_one_for_training():
    a = made([100, 8, 8], positive=0.5)
    for seed in range(20):  # the two small cases together come nearer to 20% than one does
        split = data.make_split(a, seed=seed)
        assert [len(split.cases[name]) for name in ("train", "val", "test")] == [1, 1, 1], seed


def test_few_equal_cases_still_give_three_sets():
    a = made([40] * 3, positive=0.5)
    for seed in range(10):
        split = data.make_split(a, seed % 3, seed=seed)
        assert [len(split.cases[name]) for name in ("train", "val", "test")] == [1, 1, 1], seed


def test_a_domain_like_a_part_of_the_split_is_refused():
    with pytest.raises(UserError, match="a domain is called test"):
        data.make_split(made([30] * 12, ["train2", "test"]), domain="train2")


def test_random_patches_keep_away_from_other_cases_of_an_image():
    """Several cases on one image (a microarray): no window touches a patch of a case that is not
    trained on.
    """
    a = made([60] * 12, positive=0.2)
    a.image[:] = np.array(["one.png", "two.png"])[np.arange(len(a)) % 2]
    a.sizes = {"one.png": (9000, 9000), "two.png": (9000, 9000)}
    a.x[:], a.y[:] = np.random.default_rng(0).uniform(200, 8800, (2, len(a)))
    split = data.make_split(a)
    sample = data.Sampler(a, split.train).epoch(0)
    names, trained = np.unique(a.image), set(split.cases["train"])
    random = sample[sample["row"] < 0]
    assert len(random) == 320
    for patch in random:
        foreign = (a.image == names[patch["image"]]) & ~np.isin(a.case, list(trained))
        assert (
            foreign.any()
            and np.maximum(abs(a.x - patch["x"]), abs(a.y - patch["y"]))[foreign].min() > 224
        )


def test_the_order_of_the_file_does_not_matter():
    a = made([30] * 12, ["x", "y"])
    b = a.take(np.random.default_rng(5).permutation(len(a)))
    one, two = data.make_split(a, 2, 0.1), data.make_split(b, 2, 0.1)
    for name in ("train", "val", "test"):
        assert getattr(one, name).tolist() == getattr(two, name).tolist()


def test_the_split_of_a_seed_stays_what_it_is():
    # Whoever changes this changes every published result: the ids are those of the first version.
    a = made([30] * 12, ["x", "y"])
    split = data.make_split(a, 1, 0.02, seed=3)
    assert (split.cases["test"], split.cases["val"], sorted(split.train.tolist())) == FIRST_VERSION


FIRST_VERSION = (["c001", "c010"], ["c000", "c009"], ["a181", "a228", "a243", "a54", "a58"])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"frac": 0}, "fraction"),
        ({"frac": 1.5}, "fraction"),
        ({"frac": float("nan")}, "fraction"),
        ({"frac": 10}, "10% is 0.1"),
        ({"val_frac": 0}, "fraction"),
        ({"fold": -1}, "fold"),
        ({"by": "slide"}, "--split"),
        ({"domain": "z"}, "has the domains x, y"),
        ({"by": "official"}, "no published"),
    ],
)
def test_what_cannot_be_split(options, says):
    with pytest.raises(UserError, match=says):
        data.make_split(made([30] * 12, ["x", "y"]), **options)


def test_too_few_cases_or_classes():
    with pytest.raises(UserError, match="3 cases"):
        data.make_split(made([30, 30]))
    with pytest.raises(UserError, match="one class only"):
        data.make_split(made([30] * 9, positive=0))
    with pytest.raises(UserError, match="no other domain"):
        data.make_split(made([30] * 9), domain="all")


def test_validation_can_be_shrunk():
    a = made([50] * 20)
    whole, part = data.make_split(a), data.make_split(a, val_frac=0.1)
    assert set(part.val) < set(whole.val) and len(part.val) == round(0.1 * len(whole.val))
    assert part.train.tolist() == whole.train.tolist() and set(a.label[a.rows(part.val)]) == {0, 1}


@pytest.mark.parametrize(
    "options", [{}, {"frac": 0.1, "fold": 2}, {"domain": "x"}, {"by": "annotation"}]
)
def test_a_split_file_gives_the_same_split(tmp_path, options):
    a = made([30] * 12, ["x", "y"])
    split = data.make_split(a, **options)
    split.save(tmp_path / "split.json")
    again = data.load_split(tmp_path / "split.json", a)
    for name in ("train", "val", "test"):
        assert getattr(split, name).tolist() == getattr(again, name).tolist()
    assert {k: v.tolist() for k, v in split.others.items()} == {
        k: v.tolist() for k, v in again.others.items()
    }
    assert (
        again.settings == split.settings and again.pool == split.pool and again.cases == split.cases
    )
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "split.json").read_bytes()


def test_a_leak_in_a_split_file_is_refused(tmp_path):
    a = made([30] * 12, ["x", "y"])
    path = tmp_path / "split.json"
    data.make_split(a, domain="x").save(path)
    good = json.loads(path.read_text())

    def refused(says, edit):
        content = json.loads(json.dumps(good))
        edit(content)
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=says):
            data.load_split(path, a)

    ids = good["ids"]
    refused("is in train and in val", lambda c: c["ids"]["val"].append(ids["train"][0]))
    refused(
        "case c.* is in train and in test",
        lambda c: c["ids"]["test"].append(c["ids"]["train"].pop()),
    )
    refused(
        "case c.* is in train and in domain y",
        lambda c: c["others"]["y"].append(c["ids"]["train"].pop()),
    )
    refused("stands twice", lambda c: c["ids"]["test"].append(ids["test"][0]))
    refused("no annotation 'zz'", lambda c: c["ids"]["test"].append("zz"))
    refused("the file was changed", lambda c: c["cases"]["val"].pop())
    refused("not a complete", lambda c: c["ids"].pop("val"))
    refused("not a complete", lambda c: c["ids"].update(val=[3]))
    refused("not a complete", lambda c: c.update(others=[]))
    refused("not a complete", lambda c: c["settings"].update(by=["annotation"]))
    refused("of this version", lambda c: c.update(version=2))
    refused("other annotations", lambda c: c["dataset"].update(fingerprint="0"))
    path.write_text(json.dumps(good))
    a.label[0] ^= 1
    with pytest.raises(UserError, match="other annotations"):
        data.load_split(path, a)


# ---------------------------------------------------------------- the sampler


def same(one, two):
    return all(np.array_equal(one[name], two[name]) for name in one.dtype.names)


def test_an_epoch_is_half_mitotic_figures_a_quarter_hard_negatives_a_quarter_random():
    a = made([60] * 10)
    train = data.make_split(a).train
    sampler = data.Sampler(a, train)
    names = np.unique(a.image)
    for k in range(3):
        s = sampler.epoch(k)
        random = s["row"] < 0
        assert len(s) == 1280 and random.sum() == 320 and (s["label"] == 1).sum() == 640
        rows = s["row"][~random]
        assert set(a.id[rows]) <= set(train) and (a.label[rows] == s["label"][~random]).all()
        assert (a.x[rows] == s["x"][~random]).all() and (
            names[s["image"][~random]] == a.image[rows]
        ).all()
        assert (s["label"][random] == 0).all() and set(names[s["image"]]) <= set(
            a.image[a.rows(train)]
        )
        assert s["x"][random].min() >= 112 and s["x"][random].max() <= 3000 - 112
        assert not random[:320].all() and random[:320].any()  # shuffled
    # Uniform within the class: each training annotation is drawn about equally often.
    rows = np.concatenate([sampler.epoch(k)["row"] for k in range(100)])
    for label in (0, 1):
        own = a.rows(train)[a.label[a.rows(train)] == label]
        count = np.bincount(rows[rows >= 0], minlength=len(a))[own]
        assert count.min() > 0.6 * count.mean() and count.max() < 1.4 * count.mean()


def test_random_patches_hold_no_mitotic_figure_of_the_whole_image():
    a = made([400] * 8, positive=0.5)  # crowded: most windows hold one
    split = data.make_split(a, frac=0.01)
    s = data.Sampler(a, split.train, window=60).epoch(0)
    names = np.unique(a.image)
    for patch in s[s["row"] < 0]:
        own = (a.image == names[patch["image"]]) & (a.label == 1)
        # in the window however it is rotated: within half its diagonal
        assert np.hypot(a.x[own] - patch["x"], a.y[own] - patch["y"]).min() > 30 * np.sqrt(2)
    drawn = set(a.image[a.rows(split.train)])
    assert set(names[s["image"]]) == drawn and len(drawn) < len(split.cases["train"]) + 1


def test_no_place_for_random_patches_is_said():
    a = made([60] * 4, positive=0.5)
    with pytest.raises(UserError, match="no place for random patches"):
        data.Sampler(a, data.make_split(a).train, epoch_size=8, window=2900).epoch(0)


def test_epochs_are_a_function_of_seed_fold_and_epoch():
    a = made([60] * 10)
    train = data.make_split(a).train
    s = data.Sampler(a, train, seed=1, fold=2).epoch(5)
    other = data.Sampler(
        a, train[::-1].copy(), seed=1, fold=2
    )  # another order, other epochs before: no matter
    other.epoch(0)
    assert same(other.epoch(5), s)
    for options, k in (
        ({"seed": 0, "fold": 2}, 5),
        ({"seed": 1, "fold": 1}, 5),
        ({"seed": 1, "fold": 2}, 4),
    ):
        found = data.Sampler(a, train, **options).epoch(k)
        for random in (False, True):  # both are drawn anew
            one, two = (
                sorted(sample[(sample["row"] < 0) == random].tolist()) for sample in (s, found)
            )
            assert len(one) == len(two) and one != two, (options, random)


def test_balance_by_slide():
    a = made([500] + [20] * 11)
    train = a.id
    count = {}
    for balance in ("annotation", "slide"):
        s = data.Sampler(a, train, balance=balance, random_share=0).epoch(0)
        count[balance] = (a.image[s["row"]] == "c000.png").mean()
        assert (s["label"] == 1).sum() == 640 and (s["row"] >= 0).all()
    assert abs(count["annotation"] - 500 / 720) < 0.05 and abs(count["slide"] - 1 / 12) < 0.03
    with pytest.raises(UserError, match="--balance"):
        data.Sampler(a, train, balance="case")


def test_balance_by_domain():
    a = made([400, 20, 20, 20])
    a.label[:] = np.arange(len(a)) % 2
    a.domain = np.where(a.image == "c000.png", "large", "small")
    s = data.Sampler(a, a.id, balance="domain", random_share=0).epoch(0)
    assert (s["label"] == 1).sum() == 640
    for label in (0, 1):  # the domain first, then any of its annotations
        rows = s["row"][s["label"] == label]
        assert abs((a.domain[rows] == "large").mean() - 1 / 2) < 0.06
        images, counts = np.unique(a.image[rows[a.domain[rows] == "small"]], return_counts=True)
        assert len(images) == 3 and counts.max() < 1.5 * counts.min()


@pytest.mark.parametrize("balance", ["annotation", "slide", "domain"])
def test_annotations_drawn_as_they_come_have_weights_that_make_halves(balance):
    a = made([400, 60, 60])
    a.domain = np.where(a.image == "c000.png", "large", "small")
    a.label[:] = np.arange(len(a)) % 10 == 0
    a.label[a.image == "c001.png"] = 1
    sampler = data.Sampler(a, a.id, 20_000, balance=balance, halves=False, random_share=0.25)
    s = sampler.epoch(0)
    assert (s["row"] < 0).sum() == 5000
    weights = sampler.class_weights()
    drawn = np.array([(s["label"] == 0).sum(), (s["label"] == 1).sum()])
    np.testing.assert_allclose(weights * drawn, 10_000, rtol=0.03)
    if balance == "annotation":  # scikit-learn's, but for the random patches
        positives = 0.75 * a.label.mean()
        np.testing.assert_allclose(weights, [0.5 / (1 - positives), 0.5 / positives])
    assert (data.Sampler(a, a.id, 20).class_weights() == 1).all()


def test_patches_have_no_random_ones(capsys):
    a = made([30] * 10, kind="patches")
    s = data.Sampler(a, data.make_split(a).train, epoch_size=100).epoch(0)
    assert (s["label"] == 1).sum() == 50 and (s["row"] >= 0).all()
    assert capsys.readouterr().out.count("no random ones") == 1


def test_random_patches_come_from_a_pool_and_none_twice_before_all_have_come():
    a = made([40] * 10)
    names, number = np.unique(a.image), data.pool_size(a)
    assert number == np.ceil(4 * 3000**2 / 224**2)  # the images are small; else 64,000 in all
    sampler = data.Sampler(a, data.make_split(a).train, seed=2)
    drawn = []
    for k in range(12):
        s = sampler.epoch(k)
        drawn.append(s[s["row"] < 0])
    drawn = np.concatenate(drawn)
    for patch in drawn[:50]:
        x, y = data.random_pool(a, names[patch["image"]], number)
        assert (patch["x"], patch["y"]) == (x[patch["pool"]], y[patch["pool"]])
    allowed = len(sampler._pool()[0])
    assert 1000 < allowed < 3840  # so that the 12 epochs go through all of them, and begin again
    keys = drawn["image"] * number + drawn["pool"]
    whole = allowed // 320 * 320  # an epoch is shuffled
    assert len(np.unique(keys[:whole])) == whole and len(np.unique(keys)) == allowed
    image = np.bincount(drawn["image"])
    assert image[image > 0].min() > 0.8 * image.max()
    # The pool is the same whoever asks, and its beginning does not depend on how much of it is
    # asked for.
    x, y = data.random_pool(a, "c003.png", 50)
    assert data.random_pool(a, "c003.png", 9)[0].tolist() == x[:9].tolist()
    assert (
        x.min() >= 112
        and y.max() <= 3000 - 112
        and abs(data.random_pool(a, "c003.png", 5000)[0].mean() - 1500) < 50
    )


def test_a_large_dataset_has_a_pool_of_64000():
    a = made([10] * 354)
    a.sizes = {image: (7000, 5000) for image in a.sizes}
    assert data.pool_size(a) == 181


def test_a_domain_is_its_exact_name_before_any_other_spelling():
    a = made([30] * 12)
    a.domain = np.where(np.arange(len(a)) % 2, "A", "a").astype(str)
    a.case = np.char.add(a.case, a.domain)
    for name, other in (("a", "A"), ("A", "a")):
        split = data.make_split(a, domain=name)
        assert split.settings["domain"] == name and list(split.others) == [other]
        assert set(a.domain[a.rows(split.train)]) == {name}
    a.domain = np.where(a.domain == "A", "Breast", "breast").astype(str)
    with pytest.raises(UserError, match="--domain BREAST: matches Breast and breast"):
        data.make_split(a, domain="BREAST")
    a.domain = np.where(a.domain == "Breast", "Breast", "lung").astype(str)
    assert data.make_split(a, domain="breast").settings["domain"] == "Breast"


def test_jitter_and_accept():
    a = made([40] * 10)
    train = data.make_split(a).train
    s = data.Sampler(a, train, jitter=0.1, accept=lambda sample: sample["x"] < 1000).epoch(0)
    random = s["row"] < 0
    moved = np.abs(s["x"][~random] - a.x[s["row"][~random]])
    assert 0 < moved.mean() and moved.max() <= 22.4 and s["x"][random].max() < 1000


def test_one_class_cannot_be_sampled():
    a = made([40] * 10)
    with pytest.raises(UserError, match="needs both classes"):
        data.Sampler(a, a.id[a.label == 1])
    with pytest.raises(UserError, match="no annotation 'zz'"):
        data.Sampler(a, ["zz"])


# ---------------------------------------------------------------- splits of the field


def unequal(cases=30, domains=("x", "y", "z")):
    """Cases of very different sizes and shares of the positive class."""
    rng = np.random.default_rng(3)
    a = made(rng.integers(4, 90, cases).tolist(), domains)
    share = rng.uniform(0.05, 0.6, cases)
    a.label = (rng.random(len(a)) < share[a.codes("case")[1]]).astype(np.int8)
    return a


def test_every_case_is_in_one_fold_of_a_cross_validation():
    a = unequal(90)
    splits = [data.make_split(a, fold, folds=5) for fold in range(5)]
    tested = [case for split in splits for case in split.cases["test"]]
    assert sorted(tested) == sorted(set(a.case))
    for split in splits:
        rows = a.rows(split.test)
        for domain in "xyz":
            for label in (0, 1):
                whole = (a.domain == domain) & (a.label == label)
                assert 0.15 < whole[rows].sum() / whole.sum() < 0.25
        assert split.settings["folds"] == 5 and not data.overlap(a, split)["cases"]
        sizes = len(split.train) + len(split.val) + len(split.test)
        assert sizes == len(a) and 0.14 < len(split.val) / sizes < 0.18
    order = np.random.default_rng(0).permutation(len(a))
    again = data.make_split(a.take(order), 2, folds=5)
    assert again.test.tolist() == splits[2].test.tolist()
    assert data.make_split(a, 2, folds=5, seed=1).test.tolist() != again.test.tolist()
    assert splits[1].test.tolist() != data.make_split(a, 1).test.tolist()


def test_folds_within_a_domain():
    a = unequal()
    split = data.make_split(a, 1, folds=3, domain="y")
    assert set(a.domain[a.rows(split.test)]) == {"y"} and set(split.others) == {"x", "z"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"folds": 5, "fold": 5}, "--folds 5 has the folds 0 to 4"),
        ({"folds": 1}, "--folds 1: a number from 2"),
        ({"folds": 5, "by": "annotation"}, "--folds and --split annotation"),
        ({"folds": 40}, "has 30 cases; at least 40"),
        ({"leave_out": "q"}, "--leave-out q: is not in it"),
        ({"leave_out": "x", "folds": 5}, "--leave-out goes with none of"),
        ({"leave_out": "x", "domain": "y"}, "--leave-out goes with none of"),
        ({"by": "given"}, "has no column split .* ccmct, midogpp, amibr have them"),
    ],
)
def test_splits_that_are_not_possible(options, words):
    with pytest.raises(UserError, match=words):
        data.make_split(unequal(), **options)


def test_leaving_a_domain_out():
    a = unequal()
    splits = [data.make_split(a, fold, leave_out="y") for fold in (0, 1)]
    for split in splits:
        assert sorted(split.test) == sorted(a.id[a.domain == "y"]) and not split.others
        assert set(a.domain[a.rows(split.train)]) == {"x", "z"}
        assert set(a.domain[a.rows(split.val)]) == {"x", "z"}
    assert splits[0].val.tolist() != splits[1].val.tolist()
    with pytest.raises(UserError, match="no other domain"):
        data.make_split(made([30] * 6), leave_out="all")
    a.domain[np.flatnonzero(a.case == "c000")[0]] = "y"
    with pytest.raises(UserError, match="case c000 is in this domain and in another"):
        data.make_split(a, leave_out="y")


def test_the_split_that_the_data_give(tmp_path):
    a = unequal()
    number = a.codes("case")[1]
    a.split = np.array(["Train", "train ", "Test"])[number % 3]
    split = data.make_split(a, by="given")
    assert sorted(split.test) == sorted(a.id[number % 3 == 2])
    assert data.make_split(a, 1, by="given").test.tolist() == split.test.tolist()
    assert data.make_split(a, 1, by="given").val.tolist() != split.val.tolist()
    split.save(tmp_path / "split.json")
    assert data.load_split(tmp_path / "split.json", a).settings["by"] == "given"

    a.split = np.array(["train", "valid", "held-out", "train"])[number % 4]
    for fold in (0, 1):  # validation is given too
        assert sorted(data.make_split(a, fold, by="given").val) == sorted(a.id[number % 4 == 1])
    a.split = np.where(np.arange(len(a)) == 0, "test2", a.split)
    with pytest.raises(UserError, match="'test2' in 1 rows; it must be train, val or test"):
        data.make_split(a, by="given")
    a.split = np.full(len(a), "train")
    with pytest.raises(UserError, match="calls nothing test"):
        data.make_split(a, by="given")
    a.split = np.where(np.arange(len(a)) % 2, "train", "test")
    with pytest.raises(UserError, match="the split leaks: case"):
        data.make_split(a, by="given")


def test_a_column_split_is_read_from_the_table(tmp_path):
    rows = [
        "path,label,case,split",
        *(f"{k}.png,{k % 2},c{k // 4},{'train' if k < 16 else 'test'}" for k in range(20)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    a = data.load_dataset(tmp_path / "t.csv")
    assert data.make_split(a, by="given").cases["test"] == ["c4"]
    assert small.call(data, tmp_path / "t.csv", "--split", "given", "--fold", 0) == 0


def test_the_report_on_a_cross_validation(tmp_path, capsys):
    a = unequal(domains=("x", "y"))
    rows = ["path,label,case,domain"]
    rows += [f"{i}.png,{y},{c},{d}" for i, y, c, d in zip(a.id, a.label, a.case, a.domain)]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    assert small.call(data, tmp_path / "t.csv", "--folds", 3) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if " 1 " in line[:14]] == ["0", "1", "2"]
    assert "no case is on two sides" in out
    assert small.call(data, tmp_path / "t.csv", "--leave-out", "x", "y") == 0
    out = capsys.readouterr().out
    assert "train on all domains but x, test on it" in out and "domains but y" in out
    assert small.call(data, tmp_path / "t.csv", "--folds", 3, "--fold", 3) == 2
