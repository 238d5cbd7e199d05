"""What an entry script does before torch is imported, which takes seconds: it sets how torch's CPU
threads wait and how memory is kept, and answers `--help` and wrong settings.
"""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from util.errors import InputError, run_cli
from util.settings.base import Settings
from util.settings.evaluation import RANDOM_WEIGHTS

FILES = ("folder", "packed")  # the kinds of data set that are what lies at data_path
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# Numbers of glibc's <malloc.h>: 32 MiB is its largest threshold, and -1 returns nothing.
MALLOPT = {"MALLOC_MMAP_THRESHOLD_": (-3, 1 << 25), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}
SettingsT = TypeVar("SettingsT", bound=Settings)


def start(read: Callable[[], SettingsT]) -> SettingsT:
    """The settings that `read` takes from the command line, for a script that has not imported
    torch yet. `--help`, `--print_config` and refusals end the process."""
    set_cpu_defaults()
    return run_cli(lambda: check_paths(read()))


def set_cpu_defaults() -> None:
    """Sets what makes steps on a CPU fast, unless the environment says something else about it.

    Threads that wait for one another sleep: by default they spin, and take the cores from loader
    processes and other programs. Memory that a step frees stays with the process: by default each
    step asks the system for it again, page by page.
    """
    if not os.environ.keys() & WAITING:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    for variable, (parameter, value) in MALLOPT.items():
        if variable not in os.environ:
            with suppress(OSError, AttributeError):  # there is no mallopt but in glibc
                ctypes.CDLL(None).mallopt(parameter, value)


def check_paths(cfg: SettingsT) -> SettingsT:
    """The settings, if there is something at their paths. The processes of a job find that out
    later and together, as their machines may differ.

    Raises: InputError.
    """
    names = ["finetune", "load_path"]
    if getattr(cfg, "load_path", None) is None and getattr(cfg, "dataset", "") in FILES:
        names.append("data_path")
    paths = {name: getattr(cfg, name, None) for name in names if "RANK" not in os.environ}
    missing = {
        name: path
        for name, path in paths.items()
        if path not in (None, RANDOM_WEIGHTS) and not os.access(path, os.F_OK)
    }
    if missing:
        raise InputError(
            "; ".join(f"{name} {path} does not exist" for name, path in missing.items()),
            settings=tuple(missing),
        )
    return cfg
