"""Small real runs for tests: command lines at the debug size, in this process or in one of their
own."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import assert_same as assert_same  # others take these two from here
from compare import results_of as results_of
from PIL import Image
from torch.utils.data import DataLoader

import engine.loop
import main_pretrain
from data.images import PixelFormat
from data.known_sets import read_mnist5k
from data.loader import Sample, loader_maker
from data.scenes import compose
from data.sources import FolderSource
from data.transforms import PixelNormalizer
from engine.run.checkpoint import load_newest_checkpoint
from engine.run.records import read_log
from util.dist import Processes
from util.settings.base import DataConfig

ROOT = Path(__file__).resolve().parent.parent
# 4,000 real digits, 49 patches, about 40,000 parameters; fp32 so that numbers do not depend on the
# processor's bf16
DIGITS = shlex.split("""
--dataset mnist5k --img_size 28 --in_chans 1 --mean 0.1307 --std 0.3081 --hflip 0 --size debug
--patch_size 4 --decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --precision fp32
--device cpu --num_workers 0 --batch_size 64 --total_batch_size 64 --epochs 2
--warmup_epochs 0.5 --lr 1e-3 --tensorboard false --monitor_epochs 0
""")
STEPS_PER_EPOCH = 62  # 4000 // 64


def digits(output_dir: Path, *more: Any) -> list[str]:
    """The command line of a small run on the digits; later flags win."""
    return [*DIGITS, "--output_dir", str(output_dir), *map(str, more)]


def loading(num_workers: int, prefetch_factor: int = 2) -> partial[DataLoader[Sample]]:
    """Makes loaders on the CPU, in one process."""
    cfg = DataConfig(num_workers=num_workers, prefetch_factor=prefetch_factor)
    return loader_maker(cfg, Processes(0, 1, 0, 1, torch.device("cpu")))


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: one thread, as results should not depend on the machine's core
    count.

    Also, two processes whose threads together outnumber the cores run more than ten times slower.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **more}


def command(*arguments: str, script: str = "main_pretrain.py") -> list[str]:
    """An entry script without a launcher."""
    return [sys.executable, str(ROOT / script), *arguments]


def run(arguments: list[str], cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and returns what it printed."""
    return subprocess.run(
        arguments,
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        errors="surrogateescape",  # as a name on a line need not be UTF-8
        timeout=3000,
        check=False,
    )


def launch(
    arguments: list[str], processes: int, launcher: str = "run_pretrain.sh", **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher as a user would, on so many gloo processes."""
    return run(["sh", str(ROOT / launcher), *arguments], NGPU=str(processes), **env)


def driven(
    *arguments: str, processes: int = 1, restarts: int = 0, driver: str = "fault_driver.py"
) -> list[str]:
    """A command under a driver, and if there are several processes, under torch's launcher."""
    script = [str(ROOT / "tests" / driver), *arguments]
    if processes == 1:
        return [sys.executable, *script]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, "--max_restarts", str(restarts), *script]


def in_child(action: Callable[[], object]) -> int:
    """Exit status of `action` in a forked process: 0 if it returns, 3 if it raises."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001  (whatever it is must not reach the tests)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_at(step: int, signum: int, rank: int = 0) -> str:
    """The drivers' FAULTS for a signal to one process, between this finished step and the next."""
    return json.dumps([{"do": signum, "to": "self", "at": "step", "step": step, "rank": rank}])


class Cut(BaseException):
    """Ends a run as a kill would, without any of its own tidying up."""


def cut_after(monkeypatch, steps: int, module=engine.loop, name: str = "optimizer_step") -> None:
    """Makes a run end in place of its step `steps` + 1, which `module` takes by calling `name`."""
    original, taken = getattr(module, name), []

    def counted(*args, **kwargs):
        if len(taken) == steps:
            raise Cut
        taken.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def note_reads(monkeypatch) -> list[str]:
    """The calls that read a tensor's value or wait for a device, by name, as they come."""
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def noted(self, original=original, name=name):
            reads.append(name)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, noted)
    for device in (torch.cuda, torch.cpu, torch.mps):
        monkeypatch.setattr(device, "synchronize", lambda *_: reads.append("synchronize"))
    return reads


def changed_files(folder: Path, before: dict[str, tuple[int, bytes]]) -> set[str]:
    """The files, of those in `before` and those that are there now, that differ in time or
    content."""
    after = files_of(folder)
    return {name for name in before | after if before.get(name) != after.get(name)}


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Name -> when it was written, and what."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in files
    }


def flip_bit(path: Path) -> None:
    """Damages a file in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def saved_step(output_dir: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    saved = load_newest_checkpoint(output_dir)
    return 0 if saved is None else saved.step


def log_lines(output_dir: Path) -> list[dict[str, Any]]:
    """All of a run's log.jsonl."""
    return read_log(output_dir / "log.jsonl")


def step_losses(output_dir: Path) -> dict[int, str]:
    """Loss by step of a run with `--log_interval 1`, exactly (float.hex)."""
    return {line["step"]: line["loss"].hex() for line in log_lines(output_dir) if "loss" in line}


# the evaluations, on 120 + 60 real digits of 3 classes in PNG files: a run takes about a second

PICTURES = shlex.split("""
--dataset folder --img_size 28 --in_chans 1 --mean 0.1307 --std 0.3081 --size debug --patch_size 4
--precision fp32 --device cpu --num_workers 0
""")
TRAINING = shlex.split("""
--batch_size 12 --epochs 3 --warmup_epochs 0.5 --hflip 0 --crop_min 0.5 --log_interval 1
--tensorboard false
""")
ATTENTIVE = shlex.split("--probe attentive --probe_queries 4")
CLASSES = ("nought", "one", "seven")
PLAIN = (("train", "images/train", "masks/train"), ("val", "images/val", "masks/val"))
PICTURE_STEPS = 10  # per epoch: 120 // 12


@cache
def _digits_by_class() -> dict[int, np.ndarray]:
    images, labels = read_mnist5k(train=True)
    return {label: images[labels == label, 0] for label in range(10)}


def make_pictures(
    root: Path,
    digits: tuple[int, ...] = (0, 1, 7),
    train: int = 40,
    val: int = 20,
    names: tuple[str, ...] = CLASSES,
) -> Path:
    """Writes `train/<class>/*.png` and `val/<class>/*.png` with so many of each digit; returns
    `root`."""
    for digit, name in zip(digits, names, strict=True):
        for split, numbers in (("train", range(train)), ("val", range(train, train + val))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in numbers:
                Image.fromarray(_digits_by_class()[digit][number]).save(
                    folder / f"{number:03d}.png"
                )
    return root


def make_scenes(
    root: Path, train: int = 24, val: int = 9, folders: tuple[tuple[str, str, str], ...] = PLAIN
) -> Path:
    """Writes scenes of digits as images and masks, of which the first two rows do not count; every
    third scene is lower than the others. Returns `root`.

    Args:
        folders: of each split its name, and those of its images and of its masks.
    """
    for split, *names in folders:
        for index in range(train if split == "train" else val):
            scene = compose(split == "train", index)
            mask = ((scene.labels + 1)[:, None, None] * scene.masks).sum(axis=0).astype(np.uint8)
            mask[:2] = 255
            rows = slice(0, 48 if index % 3 == 0 else 64)
            for name, values in zip(names, (scene.image, mask), strict=True):
                (root / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values[rows]).save(root / name / f"{index:02d}.png")
    return root


def normalised(folder: Path) -> torch.Tensor:
    """The grey digits of a folder in order, as models take them, `(n, 1, 28, 28)`."""
    source = FolderSource(folder, PixelFormat(1), prefer_train=False)
    images = torch.stack([source.read(index) for index in range(len(source))])
    return PixelNormalizer((0.1307,), (0.3081,), torch.device("cpu"))(images)


def pictures(data: Path, output_dir: Path, *more: Any, training: bool = True) -> list[str]:
    """The command line of a small evaluation; k-NN has no `training`."""
    flags = PICTURES + (TRAINING if training else [])
    return [*flags, "--data_path", str(data), "--output_dir", str(output_dir), *map(str, more)]


def pretraining(data: Path, output_dir: Path, *more: Any) -> list[str]:
    """The command line of two epochs of pretraining on such a folder, with a checkpoint after
    each."""
    decoder = ["--decoder_embed_dim", 16, "--decoder_depth", 1, "--decoder_num_heads", 2]
    schedule = ["--lr", 1e-2, "--epochs", 2, "--save_epochs", 1, "--monitor_epochs", 0]
    return pictures(data, output_dir, *decoder, *schedule, *more)


def pretrain_pictures(data: Path, output_dir: Path, *more: Any) -> Path:
    """Runs that; returns `output_dir`."""
    main_pretrain.main(pretraining(data, output_dir, *more))
    return output_dir
