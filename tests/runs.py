"""Small real runs for tests: command lines at the debug size, in this process or in one of their own."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT

# 4,000 real digits, 49 patches, about 40,000 parameters; fp32 so that numbers do not depend on the processor's bf16
DIGITS = shlex.split("""
--dataset mnist5k --img_size 28 --in_chans 1 --mean 0.1307 --std 0.3081 --hflip 0 --size debug --patch_size 4
--decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --precision fp32 --device cpu --num_workers 0
--batch_size 64 --total_batch_size 64 --epochs 2 --warmup_epochs 0.5 --lr 1e-3 --tensorboard false
""")
STEPS_PER_EPOCH = 62  # 4000 // 64


def digits(output_dir: Path, *more: Any) -> list[str]:
    """The command line of a small run on the digits; later flags win."""
    return [*DIGITS, "--output_dir", str(output_dir), *map(str, more)]


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: one thread, as results should not depend on the machine's core count.

    Also, two processes whose threads together outnumber the cores run more than ten times slower.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **more}


def command(*arguments: str, script: str = "main_pretrain.py") -> list[str]:
    """An entry script without a launcher."""
    return [sys.executable, str(ROOT / script), *arguments]


def run(arguments: list[str], cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and returns what it printed."""
    return subprocess.run(
        arguments, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=3000, check=False
    )


def launch(arguments: list[str], processes: int, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher as a user would, on so many gloo processes."""
    return run(["sh", str(ROOT / "run_pretrain.sh"), *arguments], NGPU=str(processes), **env)


def log_lines(output_dir: Path) -> list[dict[str, Any]]:
    """All of a run's log.jsonl."""
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def step_losses(output_dir: Path) -> dict[int, str]:
    """Loss by step of a run with `--log_interval 1`, exactly (float.hex)."""
    return {line["step"]: line["loss"].hex() for line in log_lines(output_dir) if "loss" in line}
