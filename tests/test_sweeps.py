"""The sweeps: their commands, failures and stops; Slurm; a sweep killed and restarted."""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import small
from small import HERE, call

import common
import data
import evaluate

SWEEPS = HERE.parent / "sweeps"
PAPER = [
    "resnet50",
    "vit-b",
    "vit-h",
    "phikon",
    "uni",
    "virchow",
    "virchow2",
    "prov-gigapath",
    "h-optimus-0",
]
CHOICES = (
    "RUNS",
    "FRACS",
    "FOLDS",
    "DOMAINS",
    "METHODS",
    "VAL_PATCHES",
    "PYTHON",
    "FLAGS",
    "MODEL_FLAGS",
    "MODEL",
    "EPOCHS",
    "EPOCH_SIZE",
    "QUICK",
    "DATA",
    "DATA_FLAGS",
    "TESTS",
    "REPORT",
)


def clean(**environment):
    """This process's environment without what steers a sweep, and with what is given."""
    return {key: value for key, value in os.environ.items() if key not in CHOICES} | environment


def listed(script, *args, **environment):
    """The commands of a sweep as lists of words; none of them is run."""
    done = subprocess.run(
        ["bash", SWEEPS / script, "--list", *map(str, args)],
        capture_output=True,
        text=True,
        env=clean(PYTHON="false", **environment),
        timeout=60,
    )
    assert done.returncode == 0 and not done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def parsed(command):
    """(script, {flag: values}) of a command, by the script's own parser: it takes every flag that a
    sweep gives.
    """
    script = command[1].removesuffix(".py")
    old, sys.argv = sys.argv, command[1:]
    try:
        return script, vars(__import__(script).arguments())
    finally:
        sys.argv = old


# ---------------------------------------------------------------- what a sweep consists of


def cells(commands):
    """(model, method, domain, fraction, fold) of every run, as the scripts' parsers see them."""
    for script, flags in map(parsed, commands):
        method = "full"
        if script == "probe":
            method = "probe"
        elif flags["lora"]:
            method = "lora"
        for domain in flags["domain"] or [None]:
            for frac in flags["frac"]:
                for fold in flags["fold"]:
                    yield flags["model"], method, domain, frac, fold


def test_scaling_is_the_papers_grid():
    commands = listed("scaling.sh", "midog2022")
    found = Counter(cells(commands))
    methods = {model: ("probe", "lora") for model in PAPER} | {
        "resnet50": ("full", "probe"),
        "vit-h": ("full", "probe"),
        "vit-b": ("full",),
    }
    wanted = {
        (model, method, None, frac, fold)
        for model in PAPER
        for method in methods[model]
        for frac in (0.001, 0.01, 0.1, 1.0)
        for fold in range(5)
    }
    assert set(found) == wanted and set(found.values()) == {1} and len(wanted) == 17 * 20
    assert {flags["data"] for _, flags in map(parsed, commands)} == {"midog2022"}
    assert all(flags["resume"] for _, flags in map(parsed, commands))


def test_scaling_validates_on_a_sample_and_as_the_protocol_says_if_asked():
    for environment, expected in (
        ({}, 2000),
        ({"VAL_PATCHES": "300"}, 300),
        ({"FLAGS": "--val-patches 40"}, 40),
        ({"VAL_PATCHES": "all"}, None),
    ):
        commands = listed("scaling.sh", "ccmct", "uni", "vit-b", **environment)
        found = [
            flags["val_patches"] for script, flags in map(parsed, commands) if script == "train"
        ]
        assert found == [expected] * 40
    for _, flags in map(parsed, listed("cross_domain.sh", "midog2022", "vit-b")):
        assert flags["val_patches"] is None


def test_cross_domain_is_every_domain_five_times():
    found = Counter(cells(listed("cross_domain.sh", "midog2022", "uni", "vit-b")))
    wanted = {
        (model, method, domain, 1.0, fold)
        for model, method in (("uni", "probe"), ("uni", "lora"), ("vit-b", "full"))
        for domain in "ABCDE"
        for fold in range(5)
    }
    assert set(found) == wanted and set(found.values()) == {1}


def test_domains_with_blanks_in_their_names(python):
    """MIDOG++ has such names; names given in DOMAINS end at ";", also a single one."""
    probe = {"METHODS": "probe", "FOLDS": "0"}

    def domains(**environment):
        commands = listed("cross_domain.sh", "midogpp", "uni", **probe, **environment)
        return [domain for _, _, domain, _, _ in cells(commands)]

    assert domains() == list(data.KNOWN["midogpp"].domains)
    assert domains(DOMAINS="human melanoma; canine lung cancer") == [
        "human melanoma",
        "canine lung cancer",
    ]
    assert domains(DOMAINS="human melanoma;") == ["human melanoma"]
    assert domains(DOMAINS="A B") == ["A", "B"]
    lora = {"METHODS": "lora", "FOLDS": "0"}
    run("cross_domain.sh", "midogpp", "uni", python=python, **lora, FAIL_ONCE="sarcoma")
    commands = started(python)
    assert len(commands) == 8
    assert "--domain canine soft tissue sarcoma --fold 0 " in commands[5]
    assert commands[-1] == commands[5]  # also the second time


def test_the_demo_and_the_quick_grid_share_no_folder(python, tmp_path):
    """Both have runs of the demo dataset with other settings under the same names."""
    assert {parsed(words)[1]["runs"] for words in listed("quick.sh")} == {"runs-quick"}
    assert {parsed(words)[1]["runs"] for words in listed("quick.sh", RUNS="mine")} == {"mine"}
    assert "/runs-quick/" in (HERE.parent / ".gitignore").read_text().splitlines()


def test_the_demo_keeps_to_its_own_files_wherever_the_callers_data_are(python, tmp_path):
    """Its steps, with a python that notes them; it runs in a copy, as other runs of LoRA may lie in
    runs/demo.
    """
    (tmp_path / "copy/sweeps").mkdir(parents=True)
    shutil.copy(SWEEPS / "demo.sh", tmp_path / "copy/sweeps")
    for name in ("demo-lora", "demo-lora-r8"):
        (tmp_path / f"copy/runs/demo/{name}/frac1-fold0").mkdir(parents=True)
        (tmp_path / f"copy/runs/demo/{name}/frac1-fold0/metrics.json").touch()
    python.write_text(python.read_text().replace('echo "$*"', 'echo "$MITOSIS_ROOT $*"'))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(python)
    done = subprocess.run(
        ["bash", tmp_path / "copy/sweeps/demo.sh"],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", MITOSIS_ROOT="/somewhere/else"),
    )
    assert done.returncode == 0, done.stderr
    commands = started(python)
    assert len(commands) == 9 and all(line.startswith("data ") for line in commands)
    assert "data export.py runs/demo/demo-lora/frac1-fold0 --out demo-out/model.onnx" in commands


def test_the_demo_repeats_nothing_that_is_finished(python, tmp_path):
    """Its files exist, the later ones newer: what starts skips by itself or takes a second."""
    (tmp_path / "copy/sweeps").mkdir(parents=True)
    shutil.copy(SWEEPS / "demo.sh", tmp_path / "copy/sweeps")
    runs = [f"runs/demo/demo-{method}/frac1-fold0/metrics.json" for method in ("probe", "lora")]
    for age, name in enumerate([*runs, "demo-out/model.onnx", "demo-out/scored.json"]):
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 + age, 1e9 + age))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(python)
    demo = ["bash", tmp_path / "copy/sweeps/demo.sh"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert subprocess.run(demo, env=clean(PATH=path), timeout=60).returncode == 0
    first = {line.split()[0].removesuffix(".py") for line in started(python)}
    assert first == {"-m", "-c", "probe", "train", "evaluate"}
    os.utime(tmp_path / "copy" / runs[1], (2e9, 2e9))  # LoRA trained again
    assert subprocess.run(demo, env=clean(PATH=path), timeout=60).returncode == 0
    assert "export.py" in {line.split()[0] for line in started(python)}


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_demo_says_what_it_downloads_and_can_do_without_cuda(tmp_path):
    def lines(*choices):
        command = ["make", "-n", "-C", HERE.parent, "demo", f"VENV={tmp_path}", *choices]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        text = done.stdout.splitlines()
        return [line for line in text if line.startswith(("echo", "sed")) or " install " in line]

    said, *others = lines()
    assert "gigabytes" in said and "CPU=1" in others[0] and "-r requirements.txt" in others[-1]
    said, *others = lines("CPU=1")
    assert "without CUDA" in said and "download.pytorch.org/whl/cpu" in others[0]
    edit = next(line for line in others if line.startswith("sed"))
    subprocess.run(edit, shell=True, cwd=HERE.parent, check=True)
    (written,) = tmp_path.glob("*.txt")
    packages = [line for line in written.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in packages if "gpu" in line or "cuda" in line]
    assert [line for line in packages if line.startswith("onnxruntime>=")]


def test_the_quick_grid_has_five_repeats_and_everything_that_the_report_shows():
    commands = listed("quick.sh")
    leaking = [words for words in commands if "annotation" in words]
    found = Counter(cells([words for words in commands if words not in leaking]))
    assert set(found.values()) == {1} and {model for model, *_ in found} == {"demo"}
    assert Counter(cells(leaking)) == {
        ("demo", method, None, 1.0, fold): 1 for method in ("probe", "lora") for fold in range(5)
    }
    for method in ("probe", "lora", "full"):
        runs = {(domain, frac, fold) for _, m, domain, frac, fold in found if m == method}
        assert {fold for *_, fold in runs} == set(range(5))
        assert len({frac for domain, frac, _ in runs if domain is None}) >= 3  # a curve
        domains = {domain for domain, *_ in runs} - {None}
        assert len(domains) >= 3 or method == "full" and not domains  # a matrix


def of_amibr(**environment):
    """{(method, --pool): flags of its plain command}, [(method, {what a technique changes})]."""
    plain, techniques = {}, []
    for script, flags in map(parsed, listed("amibr.sh", "uni", **environment)):
        method = "probe"
        if script == "train":
            method = "lora" if flags["lora"] else "full"
        before = plain.setdefault((method, flags["pool"]), flags)
        if before is not flags:
            changed = {key: value for key, value in flags.items() if value != before[key]}
            techniques.append((method, changed))
    return plain, techniques


def test_amibr_turns_each_technique_on_alone():
    plain, techniques = of_amibr()
    pools = [("probe", "cls"), ("lora", "cls"), ("probe", "patch-center")]
    assert list(plain) == [*pools, ("lora", "patch-center"), ("full", "cls")]
    shared = {"data": "amibr", "model": "uni", "split": "given", "runs": "runs-amibr"}
    shared |= {"test": ["atnorm-br"], "fold": [0, 1, 2, 3, 4], "frac": [1.0], "resume": True}
    for flags in plain.values():
        assert {key: flags[key] for key in shared} == shared
    assert techniques == [
        ("probe", {"class_weight": "balanced"}),
        ("lora", {"crop": 64}),
        ("lora", {"loss": "focal"}),
        ("lora", {"class_weight": "balanced"}),
        ("lora", {"balance": "domain", "name": "domains"}),
        ("lora", {"weight_decay": 0.05, "name": "decay"}),
        ("lora", {"augment": "heavy"}),
        ("lora", {"soft_labels": True}),
    ]


def test_amibr_for_two_cores_reads_the_middle_at_a_quarter_of_the_cost():
    plain, techniques = of_amibr(QUICK="1")
    for flags in plain.values():
        assert (flags["crop"], flags["size"], flags["fold"]) == (64, 112, [0, 1])
    assert len(plain) == 5 and len(techniques) == 7
    assert not any("crop" in changed for _, changed in techniques)
    plain, _ = of_amibr(QUICK="1", FOLDS="3")
    assert plain["lora", "cls"]["fold"] == [3]


def test_models_data_and_the_environment_choose():
    commands = listed(
        "scaling.sh",
        "a folder/my data.csv",
        "uni",
        FRACS="0.5",
        FOLDS="3",
        RUNS="my runs",
        METHODS="lora",
        FLAGS="--epochs 3",
        MODEL_FLAGS="--weights /models/uni --device cuda:1",
    )
    assert len(commands) == 1
    script, flags = parsed(commands[0])
    expected = {
        "data": "a folder/my data.csv",
        "model": "uni",
        "frac": [0.5],
        "fold": [3],
        "runs": "my runs",
        "epochs": 3,
        "weights": "/models/uni",
        "device": "cuda:1",
    }
    assert script == "train"
    assert {name: flags[name] for name in expected} == expected
    found = list(cells(listed("cross_domain.sh", "midog2022", "uni", DOMAINS="A C", FOLDS="0 1")))
    assert {domain for _, _, domain, _, _ in found} == {"A", "C"} and len(found) == 8


def test_a_sweep_without_a_dataset_says_how_it_is_called():
    for script in ("scaling.sh", "cross_domain.sh"):
        done = subprocess.run(
            ["bash", SWEEPS / script], capture_output=True, text=True, env=clean(), timeout=60
        )
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith(f"usage: sweeps/{script} ")


# ---------------------------------------------------------------- running: failures and stops


@pytest.fixture
def python(tmp_path):
    """A python that notes each command; words of FAIL, FAIL_ONCE and HANG make it do that."""
    path, log = tmp_path / "python", tmp_path / "log"
    path.write_text(f"""#!/usr/bin/env bash
echo "$*" >> {log}
for word in $HANG; do case " $* " in *" $word "*)
    echo $$ > {tmp_path}/hanging; exec sleep 600;; esac; done
for word in $FAIL; do case " $* " in *" $word "*) exit 2;; esac; done
for word in $FAIL_ONCE; do case " $* " in *" $word "*)
    [ $(grep -c -- " $word " {log}) -eq 1 ] && exit 1;; esac; done
exit 0
""")
    path.chmod(0o755)
    log.touch()
    return path


def started(python):
    return (python.parent / "log").read_text().splitlines()


def run(script, *args, python, **environment):
    return subprocess.run(
        ["bash", SWEEPS / script, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean(PYTHON=str(python), **environment),
    )


def test_all_are_run_in_the_order_of_the_list(python):
    done = run("scaling.sh", "d", "uni", "vit-b", python=python, FOLDS="0 1", FRACS="0.1 1")
    assert done.returncode == 0 and not done.stderr
    assert started(python) == [
        " ".join(words[1:])
        for words in listed("scaling.sh", "d", "uni", "vit-b", FOLDS="0 1", FRACS="0.1 1")
    ]


def test_what_fails_stops_nothing_is_tried_again_and_named(python):
    done = run(
        "scaling.sh",
        "my data",
        "uni",
        python=python,
        METHODS="lora",
        FOLDS="0 1",
        FRACS="0.1 0.2 0.3",
        FAIL="0.2",
        FAIL_ONCE="0.3",
    )
    seen = [
        tuple(words[words.index(flag) + 1] for flag in ("--frac", "--fold"))
        for words in map(str.split, started(python))
    ]
    assert seen[:6] == [(frac, fold) for frac in ("0.1", "0.2", "0.3") for fold in "01"]
    assert seen[6:] == [("0.2", "0"), ("0.2", "1"), ("0.3", "0")]  # 0.3 with fold 1 went through
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"failed: python train.py --data my\\ data --model uni --lora --frac 0.2 --fold {fold} "
        "--runs runs --resume --val-patches 2000 "
        for fold in "01"
    ]
    assert all("--data my data --model" in line for line in started(python))  # also the second time


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_stopped_sweep_takes_its_run_along_and_starts_no_other(python, name):
    sweep = subprocess.Popen(
        ["bash", SWEEPS / "scaling.sh", "d", "uni"],
        start_new_session=True,
        env=clean(PYTHON=str(python), METHODS="lora", FRACS="0.1 0.2 0.3", FOLDS="0", HANG="0.2"),
    )
    hanging = python.parent / "hanging"
    while not hanging.exists() or not hanging.read_text().strip():
        time.sleep(0.02)
    child = int(hanging.read_text())
    if name == "INT":  # as the terminal sends it: to all
        os.killpg(sweep.pid, signal.SIGINT)
    else:
        sweep.send_signal(getattr(signal, f"SIG{name}"))
    assert sweep.wait(timeout=60) == 143
    with pytest.raises(ProcessLookupError):
        for _ in range(3000):  # the run that it had started is gone, too
            os.kill(child, 0)
            time.sleep(0.02)
    assert len(started(python)) == 2


def test_the_quick_grid_makes_the_report_also_where_a_run_failed(python, tmp_path):
    done = run("quick.sh", tmp_path / "report", python=python, FAIL="annotation")
    commands = started(python)
    assert commands[0] == "-m demo.synthetic"
    assert commands[-1] == f"evaluate.py runs-quick --out {tmp_path / 'report'}"
    assert len(commands) == 1 + 7 + 2 + 1
    assert done.returncode == 1 and done.stderr.count("failed: ") == 2
    (tmp_path / "log").write_text("")
    # without the dataset nothing can be run
    done = run("quick.sh", python=python, FAIL="demo.synthetic")
    assert done.returncode == 2 and started(python) == ["-m demo.synthetic"]


def test_amibr_fetches_what_is_missing_and_reports_also_where_a_run_failed(python, tmp_path):
    sweep = {"python": python, "MITOSIS_ROOT": str(tmp_path / "data"), "RUNS": str(tmp_path / "r")}
    done = run("amibr.sh", "uni", FAIL="--soft-labels", **sweep)
    commands = started(python)
    assert commands[0] == "data.py --download amibr" and done.returncode == 1
    report = "--ensemble --threshold-rule balanced --out report-amibr"
    assert commands[-1] == f"evaluate.py {tmp_path / 'r'} {report}"
    assert len(commands) == 1 + 13 + 1 + 1 and done.stderr.count("failed: ") == 1
    (tmp_path / "log").write_text("")
    done = run("amibr.sh", "uni", FAIL="--download", **sweep)
    assert done.returncode == 2 and started(python) == ["data.py --download amibr"]
    # With the patches in place nothing is fetched, nor with data of one's own.
    (tmp_path / "log").write_text("")
    for folder, count in (("AMi-Br", 3720), ("AtNorM-Br/Normal", 746)):
        (tmp_path / "data/amibr" / folder).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "data/amibr" / folder / f"{i}.png").touch()
    (tmp_path / "data/amibr/AMI-BR.csv").touch()
    assert run("amibr.sh", "uni", **sweep).returncode == 0
    assert run("amibr.sh", "uni", DATA="my.csv", **sweep).returncode == 0
    assert not [line for line in started(python) if "--download" in line]


# ---------------------------------------------------------------- Slurm


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A folder with a sbatch that notes how it is called."""
    path = tmp_path / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/submitted\n')
    path.chmod(0o755)
    return f"{path.parent}:{os.environ['PATH']}"


def slurm(*args, **environment):
    return subprocess.run(
        ["bash", SWEEPS / "slurm.sh", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean(**environment),
        cwd=HERE.parent,
    )


def test_slurm_gets_one_task_per_command_and_each_task_runs_its_own(sbatch, python, tmp_path):
    grid = (SWEEPS / "scaling.sh", "my data", "uni")
    commands = listed("scaling.sh", *grid[1:])
    assert slurm(*grid, PATH=sbatch).returncode == 0
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert submitted == [
        f"--array=0-{len(commands) - 1}%8",
        str(SWEEPS / "slurm.sh"),
        *map(str, grid),
    ]
    assert slurm(*grid, PATH=sbatch, AT_ONCE="3").returncode == 0
    assert (tmp_path / "submitted").read_text().startswith(f"--array=0-{len(commands) - 1}%3\n")

    def task(number, **environment):
        """What sbatch starts again, with the task's number."""
        number = str(number)
        done = slurm(
            *grid, PATH=sbatch, PYTHON=str(python), SLURM_ARRAY_TASK_ID=number, **environment
        )
        return done.returncode

    for number in (0, 1, len(commands) - 1):
        assert task(number) == 0
        assert started(python)[-1] == " ".join(commands[number][1:])
    assert len(started(python)) == 3
    assert task(0, FAIL="data") == 2


def test_slurm_without_a_sweep_or_with_an_empty_one_submits_nothing(sbatch, tmp_path):
    done = slurm(SWEEPS / "scaling.sh", PATH=sbatch)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
    assert slurm(tmp_path / "no.sh", "midog2022", PATH=sbatch).returncode == 2
    done = slurm(SWEEPS / "scaling.sh", "midog2022", "uni", PATH=sbatch, METHODS=" ")
    assert done.returncode == 2 and "lists no commands" in done.stderr
    assert not (tmp_path / "submitted").exists()


# ---------------------------------------------------------------- real runs, killed and restarted


@pytest.fixture
def tiny_python(tmp_path):
    """python that knows the tiny encoder."""
    path = tmp_path / "tiny_python"
    path.write_text(
        f"""#!/usr/bin/env bash
exec {sys.executable} -c '
import sys, runpy
sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE)!r}]
sys.argv = sys.argv[1:]
import small
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
""".replace("'/", '"/')
        .replace("',", '",')
        .replace("']", '"]')
    )
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_a_sweep_killed_twice_and_restarted_gives_the_report_of_an_uninterrupted_one(
    tmp_path, tiny_python
):
    data = small.dataset(tmp_path / "data", cases=20)

    def sweep(root, **more):
        root.mkdir(exist_ok=True)
        return subprocess.Popen(
            ["bash", SWEEPS / "scaling.sh", data, "tiny"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=clean(
                PYTHON=str(tiny_python),
                RUNS=str(root / "runs"),
                FOLDS="0 1",
                FRACS="0.3 1",
                FLAGS="--epochs 3 --epoch-size 32",
                MODEL_FLAGS="--weights random",
                OMP_NUM_THREADS="1",
            ),
        )

    def report(root):
        old = os.getcwd()
        os.chdir(root)
        try:
            assert call(evaluate, "runs", "--no-gallery", "--replicates", 100) == 0
        finally:
            os.chdir(old)
        return {path.name: path.read_bytes() for path in (root / "report").iterdir()}

    assert sweep(tmp_path / "whole").wait(timeout=1800) == 0
    runs_of = tmp_path / "killed" / "runs"
    for moment in (
        "*/tiny-probe/*/config.json",
        "*/tiny-lora-val2000/frac0.3-fold1/checkpoint.safetensors",
    ):
        process = sweep(tmp_path / "killed")
        while not list(runs_of.glob(moment)):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    begun = {path.parent for path in runs_of.glob("*/*/*/config.json")}
    done = {path.parent for path in runs_of.glob("*/*/*/metrics.json")}
    assert begun - done  # it was in the middle of something
    assert sweep(tmp_path / "killed").wait(timeout=1800) == 0
    whole, killed = report(tmp_path / "whole"), report(tmp_path / "killed")
    assert whole.keys() == killed.keys() and len(whole) > 8
    for name in whole:
        assert whole[name] == killed[name], name
    with open(tmp_path / "whole/report/results.csv") as file:
        assert len(list(csv.DictReader(file))) == 8
    assert common.read_json(next(runs_of.glob("*/*/*/metrics.json")))["sets"]
