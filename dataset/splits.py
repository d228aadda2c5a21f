"""Splits that cannot leak: by case, near the intended share, nested fractions, domains; split
files.
"""

import math
from dataclasses import dataclass, field

import numpy as np

import common
from common import UserError
from dataset.annotations import KNOWN, NEAR, Annotations, by_image, near_any
from dataset.draws import generator, shuffled

TEST_SHARE = VAL_SHARE = 0.2
FORMAT = f"{common.NAME}-split"  # "format" of a split file; before version 1.0 "mitosis-split"
PARTS = ("train", "val", "test")
WAYS = ("case", "annotation", "official", "given")  # of --split
# What a column of the data's own split says → part.
GIVEN = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "held-out", "held out", "holdout", "hold-out"), "test"),
}


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
    # fold, frac, domain, seed, by, val_frac; folds and leave_out where they are given
    settings: dict = field(default_factory=dict)
    dataset: dict = field(default_factory=dict)  # name, fingerprint
    cases: dict = field(default_factory=dict)  # set → names of its cases

    def save(self, path):
        content = {
            "format": FORMAT,
            "version": 1,
            "dataset": self.dataset,
            "settings": self.settings,
            "pool": self.pool,
            "cases": self.cases,
            "ids": {"train": self.train, "val": self.val, "test": self.test},
            "others": self.others,
        }
        common.write_json(path, content)


# ---------------------------------------------------------------- making a split


def make_split(
    annotations: Annotations,
    fold: int = 0,
    frac: float = 1.0,
    domain: str | None = None,
    seed: int = 0,
    by: str = "case",
    val_frac: float = 1.0,
    folds: int | None = None,
    leave_out: str | None = None,
) -> Split:
    """The split of the protocol: 20% test, 20% of the rest validation, `frac` of what is then left
    for training.

    fold: repeat, 0 …; the test set is the same in all. frac in (0, 1]: nested fractions of the
    training pool, by annotation, both classes always present. domain: train on this one alone, the
    others are further test sets. by: "case"; "annotation", as the paper's published code draws
    (leaks); "official", the published test slides; "given", the split that the data state. val_frac
    shrinks validation. folds: cross-validation by case instead, `fold` says which of them is the
    test set. leave_out: a domain that is the test set instead. A pure function of the table and
    these. UserError: not possible with this dataset."""
    check_settings(fold, frac, by, val_frac, folds, leave_out, domain)
    fold = int(fold)
    # In the order of the ids, so that the order of the file does not matter.
    rows, others = annotations.order(), {}
    if leave_out is not None:
        leave_out = resolve_domain(annotations, leave_out, "--leave-out")
    if domain is not None:
        domain = resolve_domain(annotations, domain)
        others = _other_domains(annotations, domain)
        rows = rows[annotations.domain[rows] == domain]

    # 1. The test set, the same for all folds but those of a cross-validation.
    if leave_out is not None:
        in_test = _leave_domain_out(annotations, rows, leave_out)
    elif folds is not None:
        in_test = _case_folds(annotations, rows, folds, seed, domain) == fold
    else:
        in_test = _choose_test(annotations, rows, seed, domain, by)
    test, rest = rows[in_test], rows[~in_test]

    # 2. Of the rest, validation: the data's own, else drawn.
    way = by
    if folds is not None:
        way = f"{folds} folds"
    if leave_out is not None:
        way = f"without {leave_out}"
    rng = generator("val", seed, domain, way, fold)
    in_val = np.zeros(len(rest), bool)
    if by == "given" and annotations.split is not None:
        in_val = given_parts(annotations)[rest] == "val"
    if by == "annotation":
        in_val = _choose_annotations(len(rest), VAL_SHARE, rng)
    elif not in_val.any():
        in_val = _choose_cases(annotations, rest, VAL_SHARE, rng)
    val, pool = rest[in_val], rest[~in_val]

    # 3. Fractions of the training pool, and of validation.
    rng = generator("frac", seed, domain, way, fold)
    what = f"fraction {frac:g}, fold {fold}: the training pool"
    train = _fraction(annotations, pool, frac, rng, what)
    if val_frac < 1:
        rng = generator("val-frac", seed, domain, way, fold)
        val = _fraction(annotations, val, val_frac, rng, "validation")

    own = {"folds": folds, "leave_out": leave_out}
    names, case = annotations.codes("case")
    split = Split(
        annotations.id[train],
        annotations.id[val],
        annotations.id[test],
        others,
        pool=len(pool),
        settings={
            "fold": fold,
            "frac": float(frac),
            "domain": domain,
            "seed": seed,
            "by": by,
            "val_frac": float(val_frac),
            **{key: value for key, value in own.items() if value is not None},
        },
        dataset={"name": annotations.name, "fingerprint": annotations.fingerprint()},
        cases={
            name: names[np.unique(case[part])].tolist()
            for name, part in zip(PARTS, (train, val, test))
        },
    )
    check_split(annotations, split)
    return split


def check_settings(
    fold=0, frac=1.0, by="case", val_frac=1.0, folds=None, leave_out=None, domain=None
):
    """UserError if a flag's value means nothing for any dataset."""
    for flag, value in (("--frac", frac), ("--val-frac", val_frac)):
        if not (isinstance(value, (int, float)) and 0 < value <= 1):
            raise UserError(f"{flag} {value}: a fraction in (0, 1] is needed; 10% is 0.1")
    if by not in WAYS:
        raise UserError(f"--split {by}: {', '.join(WAYS[:-1])} or {WAYS[-1]}")
    if folds is not None and not 2 <= folds <= 100:
        raise UserError(f"--folds {folds}: a number from 2 to 100 is needed")
    if folds is not None and by != "case":
        raise UserError(f"--folds and --split {by} both say which the test set is: give one")
    if leave_out is not None and (folds is not None or by != "case" or domain is not None):
        raise UserError("--leave-out goes with none of --folds, --split and --domain")
    if not (isinstance(fold, (int, np.integer)) and 0 <= fold < 2**31):
        raise UserError(f"--fold {str(fold)[:20]}: a number from 0 to 2^31 is needed")
    if folds is not None and fold >= folds:
        raise UserError(f"--fold {fold}: --folds {folds} has the folds 0 to {folds - 1}")


def resolve_domain(annotations, domain, flag="--domain"):
    """A domain by its name or, for known datasets, its description; an exact name comes first.

    UserError lists the domains."""
    present = [str(name) for name in np.unique(annotations.domain)]
    if str(domain) in present:
        return str(domain)
    known = {}
    if annotations.known:
        known = KNOWN[annotations.known].domains
    lowered = str(domain).lower()
    matches = []
    for name in present:
        description = known[name][2] if name in known else name
        if lowered in (name.lower(), description.lower()):
            matches.append(name)
    if len(matches) == 1:
        return matches[0]
    problem = f"matches {' and '.join(matches)}" if matches else "is not in it"
    raise UserError(
        f"{flag} {domain}: {problem}; {annotations.name} has the domains {', '.join(present)}"
    )


def _other_domains(annotations, domain):
    """{other domain: its ids}, the further test sets of a training on one domain."""
    rows, others = annotations.order(), {}
    for name in np.unique(annotations.domain).tolist():
        if name != domain:
            others[name] = annotations.id[rows[annotations.domain[rows] == name]]
    reserved = set(PARTS) & set(others)
    if reserved:
        raise UserError(
            f"{annotations.name}: a domain is called {reserved.pop()}, like a part of the split; "
            "rename it"
        )
    if not others:
        raise UserError(f"--domain {domain}: {annotations.name} has no other domain to test on")
    return others


def _choose_test(annotations, rows, seed, domain, by):
    """Mask over rows: the test set."""
    if by == "given" and annotations.split is not None:
        return _given_test(annotations, rows)
    if by in ("official", "given"):
        return _official_test(annotations, rows, by)
    rng = generator("test", seed, domain, by)
    if by == "annotation":
        return _choose_annotations(len(rows), TEST_SHARE, rng)
    if len(np.unique(annotations.codes("case")[1][rows])) < 3:
        where = f" in domain {domain}" if domain else ""
        raise UserError(
            f"{annotations.name}: a split by case needs at least 3 cases (train, validation, "
            f"test){where}; --split annotation ignores cases and leaks"
        )
    return _choose_cases(annotations, rows, TEST_SHARE, rng, leave=2)


def _official_test(annotations, rows, by):
    """Mask over rows: the published test cases of a known dataset."""
    official = ()
    if annotations.known:
        official = KNOWN[annotations.known].official_test
    if not official:
        having = ", ".join(name for name, known in KNOWN.items() if known.official_test)
        wanted = "published test cases"
        if by == "given":
            wanted = "column split (train, val, test) and no published test cases"
        raise UserError(f"--split {by}: {annotations.name} has no {wanted}; {having} have them")
    in_test = np.isin(annotations.case[rows], official)
    if not in_test.any() or in_test.all():
        raise UserError(
            f"--split {by}: the published test cases, or all others, are not among the images"
        )
    return in_test


def given_parts(annotations):
    """The part, train, val or test, that the column split says of each row; UserError for another
    word or none.
    """
    words, word = annotations.codes("split")
    unknown = [str(name) for name in words if str(name).strip().casefold() not in GIVEN]
    if unknown:
        what = f"{unknown[0]!r}" if unknown[0] else "blank"
        raise UserError(
            f"--split given: {annotations.name}: the column split is {what} in "
            f"{np.isin(annotations.split, unknown).sum():,} rows; it must be train, val or test"
        )
    return np.array([GIVEN[str(name).strip().casefold()] for name in words])[word]


def _given_test(annotations, rows):
    """Mask over rows: what the data call test."""
    in_test = given_parts(annotations)[rows] == "test"
    if not in_test.any() or in_test.all():
        part = "nothing" if not in_test.any() else "everything"
        raise UserError(f"--split given: {annotations.name}: its column split calls {part} test")
    return in_test


def _leave_domain_out(annotations, rows, left):
    """Mask over rows: the domain that is left out, whole."""
    in_test = annotations.domain[rows] == left
    if in_test.all():
        raise UserError(f"--leave-out {left}: {annotations.name} has no other domain to train on")
    shared = np.intersect1d(annotations.case[rows][in_test], annotations.case[rows][~in_test])
    if len(shared):
        raise UserError(
            f"--leave-out {left}: case {shared[0]} is in this domain and in another one; its other "
            "part would be trained on"
        )
    return in_test


def _case_folds(annotations, rows, folds, seed, domain):
    """The fold of each row, 0 … folds - 1: every case in exactly one, so that each fold holds about
    an equal share of every domain's annotations of either class.

    Cases are dealt out from the largest to the smallest (about: the seed shuffles cases of similar
    size), each to the fold that lacks most of what the case holds."""
    names, case = np.unique(annotations.codes("case")[1][rows], return_inverse=True)
    if len(names) < max(3, folds):
        raise UserError(
            f"--folds {folds}: {annotations.name} has {len(names)} cases; at least "
            f"{max(3, folds)} are needed"
        )
    domains, domain_of = np.unique(annotations.codes("domain")[1][rows], return_inverse=True)
    cell = 2 * domain_of + annotations.label[rows]
    held = np.zeros((len(names), 2 * len(domains)))  # annotations of a case by domain and class
    np.add.at(held, (case, cell), 1)
    held = held[:, held.any(0)] / held.sum(0)[held.any(0)]  # as shares of each cell

    rng = generator("folds", seed, domain, folds)
    order = np.argsort(-held.sum(1) * (0.75 + 0.25 * rng.random(len(names))), kind="stable")
    fold_of, filled = np.zeros(len(names), int), np.zeros((folds, held.shape[1]))
    cases_in = np.zeros(folds, int)
    for c in order:
        # The sum of squares over the folds grows least where the case's cells are emptiest.
        cost = 2 * filled @ held[c]
        best = min(range(folds), key=lambda k: (round(cost[k], 12), cases_in[k], k))
        fold_of[c] = best
        filled[best] += held[c]
        cases_in[best] += 1
    return fold_of[case]


def _choose_annotations(n, share, rng):
    """A mask over n annotations, `share` of them drawn without a look at their cases."""
    chosen = np.zeros(n, bool)
    chosen[shuffled(rng, np.arange(n))[: round(share * n)]] = True
    return chosen


def _choose_cases(annotations, rows, share, rng, leave=1):
    """Cases out of `rows` that hold about `share` of its annotations in each domain; at least
    `leave` are left per domain. Returns a mask over rows.

    Cases are added in random order as long as that brings the sum nearer to the target. Such draws
    are repeated until one comes within 0.5 points, with a tenth of the cases at least (one case of
    21% is no test set) and both classes on both sides; else the best of 200 counts."""
    # Codes are in the order of the names, so numbers do for drawing.
    names, case = np.unique(annotations.codes("case")[1][rows], return_inverse=True)
    label = annotations.label[rows]
    domains, domain = np.unique(annotations.codes("domain")[1][rows], return_inverse=True)

    # 1. Annotations per case and domain; a case that spans domains counts for the one where it has
    # most.
    table = np.zeros((len(names), len(domains)), np.int64)
    np.add.at(table, (case, domain), 1)
    home = table.argmax(1)
    size, positive = table.sum(1), np.bincount(case, weights=label, minlength=len(names))

    # 2. One group of cases per domain; domains of less than five cases form one group.
    few = [d for d in range(len(domains)) if (home == d).sum() < 5]
    groups = [np.flatnonzero(home == d) for d in range(len(domains)) if d not in few]
    if few:
        groups.append(np.flatnonzero(np.isin(home, few)))

    # 3. The best draw of each group.
    chosen = np.zeros(len(names), bool)
    for group in groups:
        if len(group) < leave + 1:
            continue
        total, mitotic = size[group].sum(), positive[group].sum()
        target, least, best = share * total, math.ceil(0.1 * len(group)), None
        for _ in range(200):
            drawn, n, m = [], 0, 0  # cases, their annotations, their mitotic figures
            for c in shuffled(rng, group):
                nearer = abs(n + size[c] - target) < abs(n - target)
                if nearer and len(drawn) < len(group) - leave:
                    drawn.append(c)
                    n += size[c]
                    m += positive[c]
            # Mitotic figures and others, on this side and on the other.
            counts = (m, n - m, mitotic - m, (total - mitotic) - (n - m))
            absent = sum(count <= 0 for count in counts)
            score = (absent, max(0, least - len(drawn)), abs(n - target))
            if best is None or score < best[0]:
                best = score, drawn
            if score[:2] == (0, 0) and score[2] <= 0.005 * total:
                break
        chosen[best[1]] = True

    # 4. Few large cases: half of the annotations is more than no set at all.
    if not chosen.any() and len(names) > leave:
        chosen[np.argmin(size)] = True
    return chosen[case]


def _fraction(annotations, rows, frac, rng, what):
    """The first `frac` of a fixed random order of rows that starts with one of each class: so
    fractions are nested.
    """
    order = shuffled(rng, rows)
    label = annotations.label[order]
    if len(order) == 0 or label.all() or not label.any():
        held = "one class only" if len(order) else "no annotation"
        raise UserError(
            f"{annotations.name}, {what} holds {held} ({annotations.classes[1]}: {label.sum()}, "
            f"{annotations.classes[0]}: {(label == 0).sum()}); the dataset is too small for this "
            "split"
        )
    first = np.sort([np.argmax(label == 1), np.argmax(label == 0)])
    order = np.concatenate([order[first], np.delete(order, first)])
    return order[: max(2, round(frac * len(order)))]


# ---------------------------------------------------------------- checking and loading a split


def check_split(annotations, split):
    """UserError if an annotation or (unless drawn by annotation) a case is on two sides."""
    sets = {"train": split.train, "val": split.val, "test": split.test}
    sets |= {f"domain {name}": ids for name, ids in split.others.items()}
    set_names = list(sets)
    names, case = annotations.codes("case")
    side = np.full(len(annotations), -1)
    sides = np.zeros((len(names), len(sets)), bool)  # case × set
    for number, (name, ids) in enumerate(sets.items()):
        rows = annotations.rows(ids)
        twice = rows[side[rows] >= 0]
        if len(twice):
            raise UserError(
                f"the split leaks: annotation {annotations.id[twice[0]]} is in "
                f"{set_names[side[twice[0]]]} and in {name}"
            )
        side[rows] = number
        if (side == number).sum() < len(rows):
            raise UserError(f"the split is not valid: an annotation stands twice in {name}")
        sides[case[rows], number] = True
    # Two test sets may share a case; training or validation and anything else may not.
    leaking = np.flatnonzero((sides.sum(1) > 1) & sides[:, :2].any(1))
    if len(leaking) and split.settings.get("by") != "annotation":
        first, second = np.array(set_names)[sides[leaking[0]]][:2].tolist()
        raise UserError(f"the split leaks: case {names[leaking[0]]} is in {first} and in {second}")


def load_split(path, annotations: Annotations) -> Split:
    """A split file for these annotations; UserError: another dataset, damaged, or a case on two
    sides.
    """
    content = common.read_json(path)
    try:
        if content["format"] not in (FORMAT, "mitosis-split") or content["version"] != 1:
            raise UserError(f"{path}: not a split file of this version")
        parts = {name: _ids(content["ids"][name]) for name in PARTS}
        split = Split(
            **parts,
            others={str(name): _ids(values) for name, values in content["others"].items()},
            pool=int(content["pool"]),
            settings=dict(content["settings"]),
            dataset=dict(content["dataset"]),
            cases={str(name): _ids(values).tolist() for name, values in content["cases"].items()},
        )
        if split.settings["by"] not in WAYS:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path}: not a complete split file; make the split again") from None
    if split.dataset.get("fingerprint") != annotations.fingerprint():
        raise UserError(
            f"{path}: was made for {split.dataset.get('name')!r} with other annotations than "
            f"{annotations.name} has now; the ids would not mean the same"
        )
    check_split(annotations, split)
    for name, ids in parts.items():
        cases = np.unique(annotations.case[annotations.rows(ids)]).tolist()
        if cases != split.cases.get(name):
            raise UserError(
                f"{path}: the cases listed for {name} are not those of its annotations; the file "
                "was changed"
            )
    return split


def _ids(values):
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError
    return np.array(values, dtype=str)


def overlap(annotations, split, distance=NEAR):
    """How much of the test set the training set gives away: dict of cases shared, and of shares of
    test annotations on trained cases, and within `distance` px of a training annotation (Euclidean,
    and by the larger of |dx|, |dy|)."""
    train, test = annotations.rows(split.train), annotations.rows(split.test)
    trained = np.unique(annotations.case[train])
    shares = {
        "cases": len(np.intersect1d(trained, annotations.case[test])),
        "on_trained_cases": float(np.isin(annotations.case[test], trained).mean()),
        "near": 0.0,
        "near_chebyshev": 0.0,
    }
    if annotations.kind == "points":
        for key, chebyshev in (("near", False), ("near_chebyshev", True)):
            near = _near_training(annotations, train, test, distance, chebyshev)
            shares[key] = near / max(1, len(test))
    return shares


def _near_training(annotations, train, test, distance, chebyshev):
    """Number of test rows within `distance` px of a training row."""
    trained_on, near = by_image(annotations, train), 0
    x, y = annotations.x, annotations.y
    for image, rows in by_image(annotations, test).items():
        other = trained_on.get(image)
        if other is not None:
            close = near_any(x[rows], y[rows], x[other], y[other], distance, chebyshev)
            near += int(close.sum())
    return near
