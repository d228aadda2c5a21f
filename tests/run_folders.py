"""Finished run folders without training: real splits of a small invented dataset, scores drawn from
a distribution.
"""

import shutil
from pathlib import Path

import numpy as np

import common
import data
import evaluate
import runs


def annotations(name="tissue", domains=("A", "B", "C"), cases=8, size=16, seed=0, root="."):
    """A table of domains × cases × size annotations on images that are not there."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"{d}{c}_{k}", f"{d}{c}.tif", f"{d}{c}", d)
        for d in domains
        for c in range(cases)
        for k in range(size)
    ]
    ids, image, case, domain = (np.array(column) for column in zip(*rows))
    x, y = rng.uniform(200, 4000, (2, len(rows)))
    return data.Annotations(
        ids,
        image,
        case,
        domain,
        x,
        y,
        (rng.random(len(rows)) < 0.45).astype(np.int8),
        name,
        Path(root),
    )


def make(
    root,
    table,
    model="uni",
    method="probe",
    frac=1.0,
    fold=0,
    domain=None,
    by="case",
    strength=1.5,
    seed=0,
    suffixes=(),
    tests=(),
    seconds=60.0,
    draw=None,
    folds=None,
    leave_out=None,
    **flags,
):
    """Write a finished run and return its path; strength: how far apart the two classes' scores
    are; draw: seed that the split is really drawn with, while flags and split say `seed`; flags:
    more of them."""
    drawn = seed if draw is None else draw
    split = data.make_split(table, fold, frac, domain, drawn, by, 1.0, folds, leave_out)
    path = runs.run_path(
        root,
        table.name,
        model,
        method,
        frac,
        fold,
        domain,
        [*suffixes, *([f"by{by}"] if by != "case" else []), *([f"{folds}folds"] if folds else [])],
        leave_out=leave_out,
    )
    flags |= {key: split.settings[key] for key in ("folds", "leave_out") if key in split.settings}
    flags = (
        {
            "data": table.name,
            "model": model,
            "method": method,
            "frac": frac,
            "fold": fold,
            "domain": domain,
            "seed": seed,
            "by": by,
            "val_frac": 1.0,
            "fit": "resize",
            "mpp": None,
        }
        | ({"probe": "uni"} if method == "probe" else {"rank": 16} if method == "lora" else {})
        | flags
    )
    config = {
        "flags": flags,
        "data": {
            "name": table.name,
            "fingerprint": table.fingerprint(),
            "classes": list(table.classes),
        },
        "encoder": {"name": model},
        "environment": {},
    }
    rng = np.random.default_rng(
        [seed, fold, int(1000 * frac), *map(ord, f"{model}{method}{domain}")]
    )
    # What makes a patch difficult is the same for all models, so that paired tests have something
    # to pair.
    hard = np.random.default_rng(1).normal(size=len(table))
    sets = [("val", table, split.val), ("test", table, split.test)]
    sets += [(name, table, ids) for name, ids in split.others.items()]
    sets += [(other.name, other, other.id) for other in tests]
    columns = {key: [] for key in runs.PREDICTION_COLUMNS}
    if table.scanner is not None:
        columns["scanner"] = []
    for name, own, ids in sets:
        rows = own.rows(ids)
        shared = hard[rows] if own is table else rng.normal(size=len(rows))
        logit = strength * (2 * own.label[rows] - 1) + shared + 0.5 * rng.normal(size=len(rows))
        if name not in ("val", "test"):
            logit -= 0.5
        for key, values in (
            ("set", [name] * len(rows)),
            ("id", own.id[rows]),
            ("case", own.case[rows]),
            ("domain", own.domain[rows]),
            ("label", own.label[rows]),
            ("logit", logit),
            ("probability", 1 / (1 + np.exp(-logit))),
        ):
            columns[key].extend(values)
        if table.scanner is not None:
            columns["scanner"].extend(
                [""] * len(rows) if own.scanner is None else own.scanner[rows]
            )
    path.mkdir(parents=True)
    common.write_json(path / "config.json", config)
    split.settings |= {"seed": seed, "val_frac": flags["val_frac"]}
    split.save(path / "split.json")
    runs.write_predictions(path / "predictions.csv", columns)
    common.write_json(
        path / "metrics.json", evaluate.of_predictions(columns) | {"seconds": seconds}
    )
    return path


def study(root, table, models=("uni", "virchow2"), folds=2, fractions=(0.1, 1.0), domains=True):
    """A small grid of everything: fractions, domains, by annotation."""
    strengths = {"probe": 0.9, "lora": 1.4, "full": 1.1}
    for m, model in enumerate(models):
        for method, strength in strengths.items():
            for fold in range(folds):
                for frac in fractions:
                    make(
                        root,
                        table,
                        model,
                        method,
                        frac,
                        fold,
                        strength=(strength + 0.15 * m) * (0.6 + 0.4 * frac),
                    )
                if domains:
                    for domain in np.unique(table.domain):
                        make(root, table, model, method, 1.0, fold, str(domain), strength=strength)
                make(
                    root, table, model, method, 1.0, fold, by="annotation", strength=strength + 0.3
                )


# What the tests of the report look at: two models, two methods.
STRENGTH = {
    ("uni", "probe"): 0.5,
    ("uni", "lora"): 1.2,
    ("virchow2", "probe"): 0.8,
    ("virchow2", "lora"): 1.0,
}
DOMAINS = "ABC"


def report_study(root):
    """Two models, two methods, three repeats: two fractions, three domains, by annotation, a
    further dataset.
    """
    tissue, extra = (
        annotations("midog2022", cases=8, size=12),
        annotations("ccmct", domains="T", cases=6, seed=4),
    )
    for (model, method), strength in STRENGTH.items():
        for fold in range(3):
            make(root, tissue, model, method, 0.1, fold, strength=0.6 * strength)
            make(root, tissue, model, method, 1.0, fold, strength=strength, tests=[extra])
            make(root, tissue, model, method, 1.0, fold, by="annotation", strength=strength + 0.5)
            for domain in DOMAINS:
                make(root, tissue, model, method, 1.0, fold, domain, strength=strength)
    make(
        root, tissue, "uni", "lora", 1.0, 0, strength=1.1, suffixes=["r8"], rank=8
    )  # one repeat of three
    shutil.rmtree(root / "midog2022/uni-lora/frac0.1-fold2")
    shutil.rmtree(root / "midog2022/virchow2-probe/domainB-fold1")


def folder(root, fold=1, name="uni-lora", data="tissue"):
    return root / data / name / f"frac1-fold{fold}"


def half(name):
    return lambda path: (path / name).write_bytes(
        (path / name).read_bytes()[: (path / name).stat().st_size // 2]
    )
