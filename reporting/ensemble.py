"""The mean of the probabilities of several runs: of the folds of one model, or of several models.

The members must have been tested on the same patches. The threshold of the mean is chosen on
validation by the rule that a single run has: every validation patch gets the mean probability of
those members that held it out, and the rule looks at all of these patches together. So no member
judges a patch that it was trained on. Members with one validation set in common are judged as the
mean that they are; folds with different sets give more patches than any of them has alone, so the
threshold varies less than that of one fold, and a fold with few patches counts for few."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from reporting import bootstrap, metrics
from reporting.results import SUMMARY
from runs import PREDICTION_COLUMNS

SAME = ("id", "label", "case")  # what the members' rows of a test set must have in common


@dataclass
class Ensemble:
    """The mean of some runs, with the attributes of a run that tables read."""

    members: list  # of results.Finished
    label: str  # the members' label, or "mean of 3 models"
    columns: dict  # predictions, as runs.read_predictions gives them
    threshold: float
    sets: dict  # name → summary

    def rows(self, name):
        """(labels, probabilities, cases) of a set."""
        rows = self.columns["set"] == name
        return tuple(self.columns[key][rows] for key in ("label", "probability", "case"))


# ---------------------------------------------------------------- the mean


def average(members):
    """The mean of the members' probabilities → (columns, why sets are left out: {name: text}).

    members: results.Finished. columns: as runs.read_predictions gives them; the set "val" holds
    each validation patch once, with the mean of the members that held it out."""
    parts, reasons = [], {}
    for name in dict.fromkeys(name for run in members for name in run.tests()):
        reason = _why_not(members, name)
        if reason:
            reasons[name] = reason
        else:
            parts.append(_mean([_part(run, name) for run in members]))
    parts.append(_validation(members))
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return columns, reasons


def _part(run, name):
    """The columns of one set of a run, in the order of the ids."""
    rows = np.flatnonzero(run.columns["set"] == name)
    rows = rows[np.argsort(run.columns["id"][rows], kind="stable")]
    return {key: run.columns[key][rows] for key in PREDICTION_COLUMNS}


def _why_not(members, name):
    """Why the members have no mean on a test set; None if they have."""
    for run in members:
        if name not in run.sets:
            return f"{run.path} was not tested on it"
    first = _part(members[0], name)
    for run in members[1:]:
        part = _part(run, name)
        for key in SAME:
            if not np.array_equal(part[key], first[key]):
                return f"{run.path} has other {key}s of it than {members[0].path}"
    return None


def _mean(parts):
    probability = np.mean([part["probability"] for part in parts], axis=0)
    return {**parts[0], "probability": probability, "logit": metrics.logit(probability)}


def _validation(members):
    """The validation patches of all members, each once, with the mean of those that have it."""
    parts = [_part(run, "val") for run in members]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    # Two datasets may use the same ids.
    owner = np.repeat([run.fingerprint for run in members], [len(part["id"]) for part in parts])
    keys = np.char.add(np.char.add(owner, " "), columns["id"].astype(str))
    _, first, patch = np.unique(keys, return_index=True, return_inverse=True)
    sums = np.bincount(patch, columns["probability"], len(first))
    probability = sums / np.bincount(patch, minlength=len(first))
    columns = {key: values[first] for key, values in columns.items()}
    return columns | {"probability": probability, "logit": metrics.logit(probability)}


# ---------------------------------------------------------------- which runs belong together


def ensembles(finished):
    """([Ensemble], notes on what has no mean): of the folds of each model, and where several models
    were tested alike, of all of them.

    Runs of different datasets, splits, seeds, domains or shares of the training data never meet in
    one mean."""
    groups, notes = [], []
    by_model, together = defaultdict(list), defaultdict(list)
    for run in finished:
        by_model[run.group()].append(run)
        data, _, *split = run.group()
        together[data, *split].append(run)
    for runs in by_model.values():
        if len(runs) > 1:
            groups.append((runs[0].label, runs))
        else:
            notes.append(f"{place(runs[0])}: fold {runs[0].fold} is alone, so there is no mean")
    for runs in together.values():
        models = {run.label for run in runs}
        if len(models) > 1:
            groups.append((f"mean of {len(models)} models", runs))

    means = []
    for label, runs in groups:
        classes = Counter(run.classes for run in runs)
        if len(classes) > 1:
            names = " and ".join("/".join(names) for names in sorted(classes))
            notes.append(f"{place(runs[0], label)}: classes {names}, so there is no mean")
            continue
        columns, reasons = average(runs)
        for name, reason in reasons.items():
            notes.append(f"{place(runs[0], label)}: no mean on {name}: {reason}")
        rule = metrics.parse_threshold(runs[0].rule, rules=True)
        summary = metrics.of_predictions(columns, rule)
        means.append(Ensemble(runs, label, columns, summary["threshold"], summary["sets"]))
    return means, notes


def place(run, label=None):
    """A run's model, data and share in a note: "uni-probe on amibr, 10%, seed 1"."""
    data, own, by, seed, domain, frac = run.group()
    text = f"{label or own} on {data}"
    if domain:
        text += f" {domain}"
    if frac < 1:
        text += f", {100 * frac:g}%"
    if by != "case":
        text += f", by {by}"
    if seed:
        text += f", seed {seed}"
    return text


# ---------------------------------------------------------------- what it is worth


def report(finished, replicates):
    """{dataset: (rows of `results`, notes)} of the means that the runs have."""
    of_data = {}
    for data in sorted({run.data for run in finished}):
        means, notes = ensembles([run for run in finished if run.data == data])
        of_data[data] = results(means, replicates), notes
    return of_data


def results(means, replicates):
    """Rows (dicts) of ensembles.csv: one per mean and test set.

    Intervals are by case; gain: the mean of the probabilities against the mean of the members' own
    values, on the same draws of cases, each decided at its own threshold."""
    rows = []
    for mean in means:
        data, _, by, seed, domain, frac = mean.members[0].group()
        for name in mean.sets:
            if name == "val":
                continue
            values = mean.sets[name]
            row = {
                "data": data,
                "split": by,
                "seed": seed,
                "frac": frac,
                "domain": domain,
                "label": mean.label,
                "members": len(mean.members),
                "folds": " ".join(str(fold) for fold in sorted({r.fold for r in mean.members})),
                "set": name,
                **{key: values[key] for key in ("n", "positives", "cases")},
                "threshold": mean.threshold,
                "threshold_rule": mean.members[0].rule,
                **{key: values[key] for key in SUMMARY[2:]},
            }
            for part in ("at_0.5", "at_threshold"):
                for key in ("accuracy", "kappa", "sensitivity", "specificity"):
                    row[f"{key}_{part}"] = values[part][key]
            rows.append(row | _trust(mean, name, replicates))
    return rows


def _trust(mean, name, replicates):
    """Intervals and gains of a mean on a test set, for `results`."""
    y, p, case = mean.rows(name)
    singles = [run.rows(name)[1:4] for run in mean.members]
    chosen = [run.threshold for run in mean.members]
    row = {}
    for end, own, others in (
        ("", 0.5, None),
        ("_at_threshold", mean.threshold, chosen),
    ):
        keys = ["balanced_accuracy"]
        if not end:
            keys.append("auroc")  # which no threshold changes
        ranking = "auroc" in keys
        parts, cases = bootstrap.replicate([(y, p, case)], replicates, 0, [own], ranking)
        members, _ = bootstrap.replicate(singles, replicates, 0, others, ranking)
        for key in keys:
            known = mean.sets[name]["auroc"] is not None  # both classes are there
            observed, *draws = parts[key]
            gain, bounds, p_value = bootstrap.paired(parts[key], members[key], cases)
            low, high = bootstrap.interval(*draws, cases) or (None, None)
            gain_low, gain_high = bounds or (None, None)
            values = {
                f"{key}{end}": observed,
                f"{key}{end}_low": low,
                f"{key}{end}_high": high,
                f"{key}{end}_gain": gain,
                f"{key}{end}_gain_low": gain_low,
                f"{key}{end}_gain_high": gain_high,
                f"{key}{end}_gain_p": p_value,
            }
            if not known:
                values = dict.fromkeys(values)
            row |= values
    return row
