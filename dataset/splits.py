"""Splits that cannot leak: by case, near the wanted share, nested fractions, domains; split files.
No torch.
"""

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np

import common
from common import UserError
from dataset.annotations import KNOWN, NEAR, by_image, near_pairs

TEST_SHARE = VAL_SHARE = 0.2
FORMAT = f"{common.NAME}-split"  # "format" of a split file; before version 1.0 "mitosis-split"


@dataclass
class Split:
    """Ids (str arrays) of train, val and test; `others`: name of a further test set → ids (the
    other domains).
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    others: dict = field(default_factory=dict)
    pool: int = 0  # size of the training pool that the fraction was taken from
    settings: dict = field(default_factory=dict)  # fold, frac, domain, seed, by, val_frac
    dataset: dict = field(default_factory=dict)  # name, fingerprint
    cases: dict = field(default_factory=dict)  # set → names of its cases

    def save(self, path):
        common.write_json(
            path,
            {
                "format": FORMAT,
                "version": 1,
                "dataset": self.dataset,
                "settings": self.settings,
                "pool": self.pool,
                "cases": self.cases,
                "ids": {"train": self.train, "val": self.val, "test": self.test},
                "others": self.others,
            },
        )


def generator(*key):
    """A generator of its own for each (seed, what it is for, …): the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def shuffled(rng, items):
    # By sorting random numbers: the stream of .random() is stable between NumPy's versions,
    # .permutation() need not be.
    return items[np.argsort(rng.random(len(items)), kind="stable")]


def _choose_cases(annotations, rows, share, rng, leave=1):
    """Cases out of `rows` that hold about `share` of its annotations in each domain; at least
    `leave` are left per domain. Returns a mask over rows.

    Cases are taken in random order wherever that brings the sum nearer to the target. Such draws
    are repeated until one comes within 0.5 points, with a tenth of the cases at least (one case of
    21% is no test set) and both classes on both sides; else the best of 200 is taken."""
    # Codes are in the order of the names, so numbers do for drawing.
    names, case = np.unique(annotations.codes("case")[1][rows], return_inverse=True)
    label = annotations.label[rows]
    domains, domain = np.unique(annotations.codes("domain")[1][rows], return_inverse=True)
    table = np.zeros((len(names), len(domains)), np.int64)
    np.add.at(table, (case, domain), 1)
    home = table.argmax(1)  # a case that spans domains counts for the one where it has most
    size, positive = table.sum(1), np.bincount(case, weights=label, minlength=len(names))
    few = [d for d in range(len(domains)) if (home == d).sum() < 5]
    groups = [np.flatnonzero(home == d) for d in range(len(domains)) if d not in few]
    groups += [np.flatnonzero(np.isin(home, few))] if few else []
    chosen = np.zeros(len(names), bool)
    for group in groups:
        if len(group) < leave + 1:
            continue
        total, mitotic = size[group].sum(), positive[group].sum()
        target, least, best = share * total, math.ceil(0.1 * len(group)), None
        for _ in range(200):
            taken, n, m = [], 0, 0
            for c in shuffled(rng, group):
                if abs(n + size[c] - target) < abs(n - target) and len(taken) < len(group) - leave:
                    taken.append(c)
                    n, m = n + size[c], m + positive[c]
            one_class = sum(k <= 0 for k in (m, n - m, mitotic - m, (total - mitotic) - (n - m)))
            score = (one_class, max(0, least - len(taken)), abs(n - target))
            if best is None or score < best[0]:
                best = score, taken
            if score[:2] == (0, 0) and score[2] <= 0.005 * total:
                break
        chosen[best[1]] = True
    if (
        not chosen.any() and len(names) > leave
    ):  # few large cases: half of the annotations is more than no set at all
        chosen[np.argmin(size)] = True
    return chosen[case]


def make_split(annotations, fold=0, frac=1.0, domain=None, seed=0, by="case", val_frac=1.0):
    """The split of the protocol: 20% test, 20% of the rest validation, `frac` of what is then left
    for training.

    fold: repeat, 0 …; the test set is the same in all. frac in (0, 1]: nested fractions of the
    training pool, by annotation, both classes always present. domain: train on this one alone, the
    others are further test sets. by: "case"; "annotation", as the paper's published code draws
    (leaks); "official", the published test slides. val_frac shrinks validation. A pure function of
    the table and these. UserError: not possible with this dataset."""
    check_settings(fold, frac, by, val_frac)
    # In the order of the ids, so that the order of the file does not matter.
    rows, others = annotations.order(), {}
    if domain is not None:
        domain = resolve_domain(annotations, domain)
        inside = annotations.domain[rows] == domain
        for other in np.unique(annotations.domain):
            if other != domain:
                others[str(other)] = annotations.id[rows[annotations.domain[rows] == other]]
        taken = {"train", "val", "test"} & set(others)
        if taken:
            raise UserError(
                f"{annotations.name}: a domain is called {taken.pop()}, like a part of the split; "
                "give it "
                "another name"
            )
        if not others:
            raise UserError(f"--domain {domain}: {annotations.name} has no other domain to test on")
        rows = rows[inside]
    if by == "official":
        official = KNOWN[annotations.known].official_test if annotations.known else ()
        if not official:
            raise UserError(
                f"--split official: {annotations.name} has no published test slides (ccmct has)"
            )
        in_test = np.isin(annotations.case[rows], official)
        if not in_test.any() or in_test.all():
            raise UserError(
                "--split official: the published test slides, or all others, are not among the "
                "images"
            )
    elif by == "case":
        if len(np.unique(annotations.codes("case")[1][rows])) < 3:
            raise UserError(
                f"{annotations.name}: a split by case needs 3 cases at least (train, validation, "
                "test)"
                f"{f' in domain {domain}' if domain else ''}; --split annotation ignores cases "
                "and leaks"
            )
        in_test = _choose_cases(
            annotations, rows, TEST_SHARE, generator("test", seed, domain, by), leave=2
        )
    else:
        in_test = np.zeros(len(rows), bool)
        drawn = shuffled(generator("test", seed, domain, by), np.arange(len(rows)))[
            : round(TEST_SHARE * len(rows))
        ]
        in_test[drawn] = True
    test, rest = rows[in_test], rows[~in_test]
    rng = generator("val", seed, domain, by, int(fold))
    if by == "annotation":
        in_val = np.zeros(len(rest), bool)
        in_val[shuffled(rng, np.arange(len(rest)))[: round(VAL_SHARE * len(rest))]] = True
    else:
        in_val = _choose_cases(annotations, rest, VAL_SHARE, rng)
    val, pool = rest[in_val], rest[~in_val]
    train = _fraction(
        annotations,
        pool,
        frac,
        generator("frac", seed, domain, by, int(fold)),
        f"fraction {frac:g}, fold {fold}: the training pool",
    )
    if val_frac < 1:
        val = _fraction(
            annotations,
            val,
            val_frac,
            generator("val-frac", seed, domain, by, int(fold)),
            "validation",
        )
    split = Split(
        annotations.id[train],
        annotations.id[val],
        annotations.id[test],
        others,
        len(pool),
        {
            "fold": int(fold),
            "frac": float(frac),
            "domain": domain,
            "seed": seed,
            "by": by,
            "val_frac": float(val_frac),
        },
        {"name": annotations.name, "fingerprint": annotations.fingerprint()},
    )
    names, case = annotations.codes("case")
    split.cases = {
        name: names[np.unique(case[part])].tolist()
        for name, part in (("train", train), ("val", val), ("test", test))
    }
    check_split(annotations, split)
    return split


def check_settings(fold=0, frac=1.0, by="case", val_frac=1.0):
    """UserError where a flag's value means nothing for any dataset."""
    for flag, value in (("--frac", frac), ("--val-frac", val_frac)):
        if not (isinstance(value, (int, float)) and 0 < value <= 1):
            raise UserError(f"{flag} {value}: a fraction in (0, 1] is needed; 10% is 0.1")
    if by not in ("case", "annotation", "official"):
        raise UserError(f"--split {by}: case, annotation or official")
    if not (isinstance(fold, (int, np.integer)) and fold >= 0):
        raise UserError(f"--fold {fold}: a number from 0 is needed")


def _fraction(annotations, rows, frac, rng, what):
    """The first `frac` of a fixed random order of rows that starts with one of each class: so
    fractions are nested.
    """
    order = shuffled(rng, rows)
    label = annotations.label[order]
    if len(order) == 0 or label.all() or not label.any():
        held = "one class only" if len(order) else "no annotation"
        raise UserError(
            f"{annotations.name}, {what} holds {held} ({label.sum()} mitotic figures, "
            f"{(label == 0).sum()} "
            "look-alikes); the dataset is too small for this split"
        )
    first = np.sort([np.argmax(label == 1), np.argmax(label == 0)])
    order = np.concatenate([order[first], np.delete(order, first)])
    return order[: max(2, round(frac * len(order)))]


def resolve_domain(annotations, domain):
    """A domain by its name or, for known datasets, its description; UserError lists what there is."""
    present = [str(d) for d in np.unique(annotations.domain)]
    known = KNOWN[annotations.known].domains if annotations.known else {}
    for name in present:
        if str(domain).lower() in (name.lower(), known[name][2].lower() if name in known else None):
            return name
    raise UserError(f"--domain {domain}: {annotations.name} has the domains {', '.join(present)}")


def check_split(annotations, split):
    """Assert that no annotation and (unless drawn by annotation) no case is on two sides; UserError
    if one is.
    """
    sets = {"train": split.train, "val": split.val, "test": split.test} | {
        f"domain {name}": ids for name, ids in split.others.items()
    }
    names, case = annotations.codes("case")
    side = np.full(len(annotations), -1)
    sides = np.zeros((len(names), len(sets)), bool)  # case × set
    for number, (name, ids) in enumerate(sets.items()):
        rows = annotations.rows(ids)
        taken = rows[side[rows] >= 0]
        if len(taken):
            raise UserError(
                f"the split leaks: annotation {annotations.id[taken[0]]} is in "
                f"{list(sets)[side[taken[0]]]} and in {name}"
            )
        side[rows] = number
        if (side == number).sum() < len(rows):
            raise UserError(f"the split is not valid: an annotation stands twice in {name}")
        sides[case[rows], number] = True
    # Two test sets may share a case; training or validation and anything else may not.
    leaking = np.flatnonzero((sides.sum(1) > 1) & sides[:, :2].any(1))
    if len(leaking) and split.settings.get("by") != "annotation":
        first, second = np.array(list(sets))[sides[leaking[0]]][:2].tolist()
        raise UserError(f"the split leaks: case {names[leaking[0]]} is in {first} and in {second}")


def load_split(path, annotations):
    """A split file for these annotations; UserError: another dataset, damaged, or a case on two
    sides.
    """
    content = common.read_json(path)
    try:
        if content["format"] not in (FORMAT, "mitosis-split") or content["version"] != 1:
            raise UserError(f"{path}: not a split file of this version")

        def ids(values):
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise TypeError
            return np.array(values, dtype=str)

        parts = {name: ids(content["ids"][name]) for name in ("train", "val", "test")}
        others = {str(name): ids(values) for name, values in content["others"].items()}
        settings, dataset = dict(content["settings"]), dict(content["dataset"])
        split = Split(
            **parts,
            others=others,
            pool=int(content["pool"]),
            settings=settings,
            dataset=dataset,
            cases={str(name): ids(values).tolist() for name, values in content["cases"].items()},
        )
        if settings["by"] not in ("case", "annotation", "official"):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path}: not a whole split file; make the split anew") from None
    if dataset.get("fingerprint") != annotations.fingerprint():
        raise UserError(
            f"{path}: was made for {dataset.get('name')!r} with other annotations than "
            f"{annotations.name} "
            "has now; the ids would not mean the same"
        )
    check_split(annotations, split)
    for name, part in parts.items():
        if sorted(set(annotations.case[annotations.rows(part)].tolist())) != split.cases.get(name):
            raise UserError(
                f"{path}: the cases listed for {name} are not those of its annotations; it was "
                "changed"
            )
    return split


def overlap(annotations, split, distance=NEAR):
    """How much of the test set the training set gives away: dict of cases shared, and of shares of
    test annotations on trained cases, and within `distance` px of a training annotation (Euclidean,
    and by the larger of |dx|, |dy|)."""
    train, test = annotations.rows(split.train), annotations.rows(split.test)
    trained = np.unique(annotations.case[train])
    shared = np.intersect1d(trained, annotations.case[test])
    found = {
        "cases": len(shared),
        "on_trained_cases": float(np.isin(annotations.case[test], trained).mean()),
    }
    for key, chebyshev in (("near", False), ("near_chebyshev", True)):
        near = 0
        if annotations.kind == "points":
            trained_on = by_image(annotations, train)
            for image, rows in by_image(annotations, test).items():
                other = trained_on.get(image, np.zeros(0, np.int64))
                i, _ = near_pairs(
                    annotations.x[rows],
                    annotations.y[rows],
                    annotations.x[other],
                    annotations.y[other],
                    distance,
                    chebyshev,
                )
                near += len(np.unique(i))
        found[key] = near / max(1, len(test))
    return found
