"""Which runs count: what is damaged, doubled or of another split is named and never averaged."""

import fcntl
import re
import shutil
import threading
import time

import numpy as np
import pytest
from run_folders import annotations, folder, half, make

import common
import runs
from common import UserError
from reporting import metrics, results


def collected(*roots):
    """({folder: run}, {folder: what is wrong}), folders by their path below the root."""
    found, problems = results.collect(roots)

    def short(path):
        return "/".join(path.parts[-3:])

    return {short(run.path): run for run in found}, {short(path): what for path, what in problems}


def test_finished_runs_count_and_are_read_with_all_their_digits(three_folds, tissue):
    found, problems = collected(three_folds)
    assert sorted(found) == [f"tissue/uni-lora/frac1-fold{k}" for k in range(3)] and not problems
    run = found["tissue/uni-lora/frac1-fold2"]
    assert (run.data, run.model, run.method, run.label, run.by, run.frac, run.fold, run.domain) == (
        "tissue",
        "uni",
        "lora",
        "uni-lora",
        "case",
        1.0,
        2,
        None,
    )
    stored = common.read_json(run.path / "metrics.json")
    assert run.sets == stored["sets"] and run.threshold == stored["threshold"] and run.seconds == 60
    ids, y, p, case, domain = run.rows("test")
    assert (ids == np.sort(common.read_json(run.path / "split.json")["ids"]["test"])).all()
    rows = tissue.rows(ids)
    for values, wanted in ((y, tissue.label), (case, tissue.case), (domain, tissue.domain)):
        assert (values == wanted[rows]).all()
    assert metrics.auroc(y, p) == pytest.approx(stored["sets"]["test"]["auroc"], abs=1e-15)


# ---------------------------------------------------------------- damaged folders


def rewrite(name, change):
    """A damage: the file read, changed and written."""

    def damage(path):
        if name.endswith(".json"):
            content = common.read_json(path / name)
            change(content)
            common.write_json(path / name, content)
        else:
            (path / name).write_text(change((path / name).read_text()))

    return damage


def lines(change):
    return rewrite("predictions.csv", lambda text: "".join(change(text.splitlines(keepends=True))))


def of_other_fold(name):
    return lambda path: shutil.copy(path.parent / "frac1-fold2" / name, path / name)


def leak(content):
    content["ids"]["train"].append(content["ids"]["test"][0])


def leak_case(content):
    content["cases"]["train"].append(content["cases"]["val"][0])


def flipped(text):
    first, *rest = text.splitlines(keepends=True)
    parts = rest[-1].split(",")
    return "".join([first, *rest[:-1], ",".join([*parts[:4], str(1 - int(parts[4])), *parts[5:]])])


DAMAGES = {
    "metrics cut": (half("metrics.json"), "metrics.json: not a readable JSON file"),
    "config cut": (half("config.json"), "config.json: not a readable JSON file"),
    "split cut": (half("split.json"), "split.json: not a readable JSON file"),
    "predictions cut": (half("predictions.csv"), "predictions.csv"),
    "metrics empty": (
        lambda path: (path / "metrics.json").write_bytes(b""),
        "not a readable JSON file",
    ),
    "predictions empty": (
        lambda path: (path / "predictions.csv").write_bytes(b""),
        "not a predictions file",
    ),
    "predictions without rows": (lines(lambda rows: rows[:1]), "predictions.csv is empty"),
    "metrics missing": (
        lambda path: (path / "metrics.json").unlink(),
        "not finished; the same command with --resume",
    ),
    "config missing": (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
    "split missing": (lambda path: (path / "split.json").unlink(), "split.json: no such file"),
    "predictions missing": (
        lambda path: (path / "predictions.csv").unlink(),
        "predictions.csv: no such file",
    ),
    "random bytes": (
        lambda path: (path / "predictions.csv").write_bytes(bytes(range(256)) * 50),
        "predictions.csv",
    ),
    "json of another kind": (
        lambda path: (path / "metrics.json").write_text("[1, 2]"),
        "the file is damaged",
    ),
    "config of another program": (
        lambda path: common.write_json(path / "config.json", {"hidden_size": 768}),
        "not a run's folder",
    ),
    "no such flags": (
        rewrite("config.json", lambda c: c["flags"].pop("model")),
        "the file is damaged",
    ),
    "a fraction that is none": (
        rewrite("config.json", lambda c: c["flags"].update(frac="all")),
        "the file is damaged",
    ),
    "last row lost": (lines(lambda rows: rows[:-1]), "do not agree on the set test"),
    "a row lost and half of one": (
        lambda path: (
            half("predictions.csv")(path)
            or rewrite("predictions.csv", lambda text: text[: text.rindex("\n") - 9])(path)
        ),
        "predictions.csv, line",
    ),
    "a row twice": (lines(lambda rows: [*rows, rows[-1]]), "do not agree on the set test"),
    "another row twice": (lines(lambda rows: [*rows[:-2], rows[-1], rows[-1]]), "test"),
    "no validation rows": (
        lines(lambda rows: [row for row in rows if not row.startswith("val")]),
        "do not agree on the set val",
    ),
    "a label flipped": (rewrite("predictions.csv", flipped), "do not agree on the set test"),
    "a label of 2": (
        lines(lambda rows: [*rows[:-1], rows[-1].replace(",0,", ",2,").replace(",1,", ",2,")]),
        "labels other than 0 and 1|not a row of predictions",
    ),
    "a probability of NaN": (
        lines(lambda rows: [*rows[:-1], rows[-1].rpartition(",")[0] + ",nan\n"]),
        "set test: 1 of .* are NaN",
    ),
    "logits for probabilities": (
        lines(
            lambda rows: (
                [rows[0]]
                + [row.rpartition(",")[0] + "," + row.split(",")[5] + "\n" for row in rows[1:]]
            )
        ),
        "are these logits",
    ),
    "metrics of another run": (of_other_fold("metrics.json"), "do not agree"),
    "predictions of another run": (of_other_fold("predictions.csv"), "do not agree"),
    "split of another run": (of_other_fold("split.json"), "split.json do not agree on fold"),
    "an id of the split renamed": (
        rewrite("split.json", lambda c: c["ids"]["test"].append("A0_new")),
        "are not those of the annotations that split.json lists",
    ),
    "split of another dataset": (
        rewrite("split.json", lambda c: c["dataset"].update(fingerprint="f" * 64)),
        "split.json is of another dataset",
    ),
    "a test patch in training": (
        rewrite("split.json", leak),
        "split.json leaks: .* is in train and in test",
    ),
    "a case on two sides": (
        rewrite("split.json", leak_case),
        "split.json leaks: .* is in train and in val",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_the_others_count(copied, damage):
    do, said = DAMAGES[damage]
    do(folder(copied))
    found, problems = collected(copied)
    assert sorted(found) == ["tissue/uni-lora/frac1-fold0", "tissue/uni-lora/frac1-fold2"]
    assert list(problems) == ["tissue/uni-lora/frac1-fold1"]
    assert re.search(said, problems["tissue/uni-lora/frac1-fold1"])
    assert "\n" not in problems["tissue/uni-lora/frac1-fold1"]


@pytest.mark.parametrize("name", ["config.json", "split.json", "predictions.csv", "metrics.json"])
def test_a_file_cut_anywhere_is_named_or_says_the_same(copied, name):
    """A file copied in part: no place to cut makes other numbers of it."""
    path = folder(copied)
    whole, before = (path / name).read_bytes(), results.read_run(path)
    places = np.unique(np.linspace(0, len(whole) - 1, 45).astype(int)).tolist() + [
        len(whole) - k for k in range(2, 12)
    ]
    named = 0
    for place in places:
        (path / name).write_bytes(whole[:place])
        try:
            after = results.read_run(path)
        except UserError as error:
            named += str(error).startswith(str(path)) or str(path) in str(error)
            continue
        assert (
            after.sets == before.sets
            and after.flags == before.flags
            and after.hashes == before.hashes
        )
    assert named > 45


def test_a_run_at_work_is_said_to_be_one(copied):
    path = folder(copied)
    (path / "metrics.json").unlink()
    with open(path / "lock", "w") as file:
        assert collected(copied)[1]["tissue/uni-lora/frac1-fold1"].startswith("not finished")
        fcntl.flock(file, fcntl.LOCK_EX)
        assert collected(copied)[1] == {"tissue/uni-lora/frac1-fold1": "a process works on it"}


def test_a_run_may_start_while_somebody_looks_whether_it_is_at_work(tmp_path, monkeypatch):
    """Looking holds the run's lock for an instant, here for a long one; who opens the run waits."""
    path, config = tmp_path / "run", {"flags": {}, "data": {}, "encoder": {}}
    runs.open_run(path, config).close()
    looking, taken, try_lock = threading.Event(), [], common.try_lock

    def slowly(*arguments, **options):
        lock = try_lock(*arguments, **options)
        if threading.current_thread() is looker:
            looking.set()
            time.sleep(0.3)
        return lock

    monkeypatch.setattr(common, "try_lock", slowly)
    looker = threading.Thread(target=lambda: taken.append(results.is_locked(path)))
    looker.start()
    looking.wait()
    with runs.open_run(path, config, resume=True):
        looker.join()
        assert taken == [False] and results.is_locked(path)
    assert not results.is_locked(path)


def test_a_folder_that_was_just_begun_is_none(copied):
    path = folder(copied, 7)
    path.mkdir()
    (path / "lock").touch()
    found, problems = collected(copied)
    assert len(found) == 3 and not problems


# ---------------------------------------------------------------- runs that do not belong together


def test_another_split_under_one_name_is_left_out(copied, tissue):
    """Two further models agree with two of the first one's splits; the third was drawn with another
    seed.
    """
    for model in ("phikon", "virchow"):
        for fold in range(2):
            make(copied, tissue, model, "lora", 1.0, fold)
    shutil.rmtree(folder(copied))
    make(copied, tissue, "uni", "lora", 1.0, 1, draw=5)
    found, problems = collected(copied)
    assert len(found) == 6 and list(problems) == ["tissue/uni-lora/frac1-fold1"]
    assert "another test set than 6 other runs have" in problems["tissue/uni-lora/frac1-fold1"]


def test_another_training_split_with_the_same_test_set_is_left_out(copied, tissue):
    for model in ("phikon", "virchow"):
        make(copied, tissue, model, "lora", 1.0, 1)
    path = folder(copied)
    content = common.read_json(path / "split.json")
    content["ids"][
        "train"
    ].pop()  # one annotation fewer to train on: the predictions say nothing of it
    common.write_json(path / "split.json", content)
    found, problems = collected(copied)
    assert (
        len(found) == 4
        and "another split than 2 other runs have" in problems["tissue/uni-lora/frac1-fold1"]
    )


def test_where_no_majority_tells_which_split_is_right_none_counts(copied, tissue):
    shutil.rmtree(folder(copied, 1)), shutil.rmtree(folder(copied, 2))
    make(copied, tissue, "phikon", "lora", 1.0, 0, draw=5)
    found, problems = collected(copied)
    assert not found and sorted(problems) == [
        "tissue/phikon-lora/frac1-fold0",
        "tissue/uni-lora/frac1-fold0",
    ]
    assert all("no telling which is right: neither counts" in what for what in problems.values())


def test_a_run_of_another_dataset_in_the_folder_is_left_out(copied, tmp_path):
    other = annotations("else", seed=9)
    path = make(tmp_path / "elsewhere", other, "uni", "lora", 1.0, 4)
    shutil.copytree(path, folder(copied, 4))
    found, problems = collected(copied)
    assert len(found) == 3 and list(problems) == ["tissue/uni-lora/frac1-fold4"]
    assert (
        "a run of the dataset else in the folder of tissue"
        in problems["tissue/uni-lora/frac1-fold4"]
    )


def test_other_annotations_under_the_datasets_name_are_left_out(copied):
    make(copied, annotations(seed=9), "uni", "lora", 1.0, 4)  # the labels of another version
    found, problems = collected(copied)
    assert (
        len(found) == 3
        and "another annotations of its dataset than 3" in problems["tissue/uni-lora/frac1-fold4"]
    )


def test_a_copy_counts_once_and_a_repeat_with_other_predictions_not_at_all(
    copied, tissue, tmp_path
):
    shutil.copytree(folder(copied), tmp_path / "backup/tissue/uni-lora/frac1-fold1")
    found, problems = results.collect([copied, tmp_path / "backup"])
    assert len(found) == 3 and [what for _, what in problems] in (
        [f"a copy of {folder(copied)}"],
        [f"a copy of {tmp_path}/backup/tissue/uni-lora/frac1-fold1"],
    )
    shutil.rmtree(tmp_path / "backup")
    make(tmp_path / "again", tissue, "uni", "lora", 1.0, 1, strength=0.3)
    found, problems = results.collect([copied, tmp_path / "again"])
    assert sorted(run.fold for run in found) == [0, 2] and len(problems) == 2
    assert all("none counts" in what for _, what in problems)


def test_a_root_given_twice_or_inside_another_is_read_once(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    found, problems = results.collect(["runs", "runs/tissue", "./runs", copied])
    assert len(found) == 3 and not problems


@pytest.mark.parametrize(
    "flag, value", [("epochs", 2), ("lr", 0.1), ("val_frac", 0.1), ("mpp", 0.25), ("tissue", True)]
)
def test_repeats_with_other_settings_are_not_averaged_with_the_rest(copied, tissue, flag, value):
    """Flags that are not part of a run's name: a short trial left over among the real repeats."""
    make(copied, tissue, "uni", "lora", 1.0, 3, **{flag: value})
    found, problems = collected(copied)
    assert len(found) == 3 and list(problems) == ["tissue/uni-lora/frac1-fold3"]
    assert f"--{flag.replace('_', '-')} {value}, not" in problems["tissue/uni-lora/frac1-fold3"]


def test_repeats_of_other_weights_are_not_averaged_but_those_of_another_machine_are(copied, tissue):
    make(copied, tissue, "uni", "lora", 1.0, 3, weights="/scratch/uni.bin", dtype="bf16")
    random = make(copied, tissue, "uni", "lora", 1.0, 4)
    content = common.read_json(random / "config.json")
    content["encoder"]["weights_hash"] = "random"
    common.write_json(random / "config.json", content)
    found, problems = collected(copied)
    assert len(found) == 4 and "other weights" in problems["tissue/uni-lora/frac1-fold4"]


def test_settings_may_differ_between_models_and_fractions(copied, tissue):
    make(copied, tissue, "uni", "lora", 0.1, 0, epochs=2)
    make(copied, tissue, "phikon", "lora", 1.0, 0, epochs=3)
    found, problems = collected(copied)
    assert len(found) == 5 and not problems


def test_further_test_sets_of_other_annotations_are_not_averaged(tissue, tmp_path):
    for fold in range(3):
        make(
            tmp_path,
            tissue,
            "uni",
            "lora",
            1.0,
            fold,
            tests=[annotations("extra", seed=5, size=16 if fold < 2 else 12)],
        )
    found, problems = collected(tmp_path)
    assert (
        len(found) == 2
        and "another test set extra than 2" in problems["tissue/uni-lora/frac1-fold2"]
    )


def test_runs_of_other_seeds_and_choices_are_kept_apart(copied, tissue):
    make(copied, tissue, "uni", "lora", 1.0, 0, suffixes=["r8"], rank=8)
    make(copied, tissue, "uni", "lora", 1.0, 0, by="annotation")
    make(copied.parent / "seed1", tissue, "uni", "lora", 1.0, 0, seed=1)
    found, problems = results.collect([copied, copied.parent / "seed1"])
    assert len(found) == 6 and not problems and len({run.group() for run in found}) == 4
