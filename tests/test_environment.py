"""The tests do not depend on the user's environment: what conftest.py takes out of it."""

import os

import conftest

HOSTILE = {
    "HF_HUB_OFFLINE": "1",
    "HF_TOKEN": "hf_somebody",
    "HF_ENDPOINT": "https://mirror.example",
    "HUGGING_FACE_HUB_TOKEN": "hf_somebody",
    "MITOSIS_DATA": "/somewhere",
    "MITOSIS_ROOT": "/somewhere",
    "MITOSIS_CACHE": "/somewhere",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "SLURM_ARRAY_TASK_ID": "3",
    "FOLDS": "9",
    "COLUMNS": "20",
}


def test_what_steers_the_commands_is_gone():
    kept = {"MITOSIS_REALDATA": "/real", "PATH": "/bin"}
    environment = {**HOSTILE, **kept, "OMP_NUM_THREADS": "64", "HF_HOME": "/home/user/cache"}
    with conftest.clear_environment(environment):
        assert not HOSTILE.keys() & environment.keys()
        assert kept.items() <= environment.items()
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["HF_HOME"] != "/home/user/cache"


def test_this_process_has_it_too():
    assert not {"HF_TOKEN", "HF_HUB_OFFLINE", "MITOSIS_DATA", "WORLD_SIZE"} & os.environ.keys()
    assert os.environ["HF_HOME"].startswith(conftest.cache.name)


def test_no_test_but_those_marked_gpu_sees_one():
    assert conftest.wants_gpu("gpu") and conftest.wants_gpu("(gpu and not slow)")
    for marks in ("", "not gpu", "not slow and not long", "slow and not (gpu)", "gpus"):
        assert not conftest.wants_gpu(marks), marks
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
