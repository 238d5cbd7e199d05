"""What an entry script does before torch is imported, which takes seconds: it sets how torch's CPU
threads wait and how memory is kept, and answers `--help` and wrong settings.
"""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from models.build import classifier_config_problems, mae_config_problems
from util.errors import InputError, run_cli
from util.files import pretrained
from util.settings.base import Settings
from util.settings.evaluation import (
    RANDOM_WEIGHTS,
    STAGE_CONFIGS,
    FinetuneConfig,
    KnnConfig,
    LinclsConfig,
)
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

# Of GNU's OpenMP, which PyTorch's packages for Linux use: some tens of microseconds.
SPIN_COUNT = "10000"
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"}
# Numbers of glibc's <malloc.h>: 32 MiB is its largest threshold, and -1 returns nothing.
MALLOPT = {"MALLOC_MMAP_THRESHOLD_": (-3, 1 << 25), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}
SettingsT = TypeVar("SettingsT", bound=Settings)

# A stage's settings from a command line, by default from that of this process.
read_pretrain = partial(
    load_config, PretrainConfig, "pretrain", checks=[mae_config_problems], siblings=STAGE_CONFIGS
)
read_finetune = partial(
    load_config,
    FinetuneConfig,
    "finetune",
    checks=[classifier_config_problems],
    siblings=STAGE_CONFIGS,
)
read_lincls = partial(
    load_config, LinclsConfig, "lincls", checks=[classifier_config_problems], siblings=STAGE_CONFIGS
)
read_knn = partial(
    load_config, KnnConfig, "knn", checks=[classifier_config_problems], siblings=STAGE_CONFIGS
)


def start(read: Callable[[], SettingsT]) -> SettingsT:
    """The settings that `read` takes from the command line of a script that has not imported torch
    yet. `--help`, `--print_config` and refusals end the process."""
    set_cpu_defaults()
    return run_cli(lambda: with_paths(read()))


def set_cpu_defaults() -> None:
    """Sets what makes steps on a CPU fast, unless the environment says something else about it.

    Threads that wait for one another spin for a moment, then sleep. By default they spin for long,
    and take the cores from loader processes and other programs; if they slept at once, the short
    operations of small models would not gain from a second thread. Memory that a step frees stays
    with the process: by default each step asks the system for it again, page by page.
    """
    if not os.environ.keys() & WAITING:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    for variable, (parameter, value) in MALLOPT.items():
        if not os.environ.keys() & {variable, "GLIBC_TUNABLES"}:
            with suppress(OSError, AttributeError):  # other C libraries have no mallopt
                ctypes.CDLL(None).mallopt(parameter, value)


def with_paths(cfg: SettingsT) -> SettingsT:
    """The settings, if there is something at the paths that they read. The processes of a job find
    that out later and together, as their machines may differ.

    Raises: InputError.
    """
    values = {} if "RANK" in os.environ else dict(cfg)
    if values.get("load_path") or values.get("dataset") not in ("folder", "packed", "parquet"):
        values["data_path"] = None
    for name in ("finetune", "load_path", "data_path", "labels"):
        path = values.get(name)
        is_name = path in (RANDOM_WEIGHTS, *pretrained())
        if path is not None and not is_name and not os.access(path, os.F_OK):
            raise InputError(f"{name} {path} does not exist", settings=(name,))
    return cfg
