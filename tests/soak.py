"""A pretraining run that something happens to every half minute or so, beside its twin that nothing happens to.

    python tests/soak.py --data /path/to/cifar10 --out /path/to/scratch --minutes 30

The same command is given again until the run is done. In the end both must have the same losses in every step, the same
state and the same weights. One thread each, so that two cores carry both. Exit code 0 where they are equal.
"""

import argparse
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from runs import assert_same, command, environment, step_losses  # noqa: E402

from engine.checkpoint import NAME, load_newest_checkpoint, weights_path  # noqa: E402

CIFAR = shlex.split("""
--dataset folder --img_size 32 --size tiny --patch_size 4 --decoder_embed_dim 96 --decoder_depth 1
--decoder_num_heads 3 --device cpu --batch_size 64 --total_batch_size 64 --warmup_epochs 0.5 --lr 1e-3
--monitor_epochs 0 --tensorboard false --log_interval 1 --save_minutes 0.15 --save_epochs 1
""")
STEPS_PER_MINUTE = 200  # of the above, with the time that faults and starts take


def signalled(number: signal.Signals) -> Callable[[subprocess.Popen[bytes], Path, random.Random], None]:
    """A fault: the signal to the run, which must end by itself in time."""

    def act(process: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> None:
        process.send_signal(number)
        process.wait(timeout=120)

    return act


def newest(folder: Path) -> Path | None:
    """The newest checkpoint's file."""
    return max((path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.suffix == ".pth"), default=None)


def damaged(process: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> None:
    """A fault: SIGKILL, and the newest of several checkpoints loses its end, a bit, or its checksum."""
    signalled(signal.SIGKILL)(process, folder, chance)
    path = newest(folder)
    if path is None or len(list(folder.glob("checkpoint-*.pth"))) < 2:
        return
    content = bytearray(path.read_bytes())
    how = chance.choice(("end", "bit", "checksum"))
    if how == "checksum":
        path.with_name(path.name + ".sha256").unlink(missing_ok=True)
        return
    if how == "end":
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def worker_killed(process: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> None:
    """A fault: SIGKILL to a loader process; the run goes on by itself."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if children:
        os.kill(int(chance.choice(children)), signal.SIGKILL)


def frozen(process: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> None:
    """A fault: the run stands still for two seconds."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)


def disk_full(process: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> None:
    """A fault: no file can become as large as a checkpoint, until the run, which must notice, is started again."""
    path = newest(folder)
    if path is not None:
        limit = path.stat().st_size // 2
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert process.wait(timeout=300) == 2, "one clear line"


FAULTS = {
    "SIGKILL": signalled(signal.SIGKILL),
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGINT": signalled(signal.SIGINT),
    "SIGUSR1": signalled(signal.SIGUSR1),
    "SIGKILL, damaged checkpoint": damaged,
    "SIGKILL to a loader process": worker_killed,
    "stands still": frozen,
    "disk full": disk_full,
}


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """The run's command, its output in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.txt").open("ab") as output:
        return subprocess.Popen(
            command(*arguments, "--output_dir", str(folder)), env=environment(), stdout=output, stderr=output
        )


def last_step(folder: Path) -> int:
    """The step of the last whole line in the log."""
    path = folder / "log.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]  # what comes after the last end of a line is being written
    return int(json.loads(lines[-1])["step"]) if lines else 0


def harm(arguments: list[str], folder: Path, every: float, chance: random.Random) -> Counter[str]:
    """Runs to the end in spite of a fault about every so many seconds; returns how often each struck."""
    struck: Counter[str] = Counter()
    order: list[str] = []
    while True:
        started_from = last_step(folder)
        process = start([*arguments, "--num_workers", str(chance.randrange(3))], folder)
        while process.poll() is None and last_step(folder) == started_from:
            time.sleep(0.1)  # imports take seconds: a fault comes where the run is at work
        deadline = time.monotonic() + every * chance.uniform(0.5, 1.5)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None:
            if process.returncode == 0:
                return struck
            raise SystemExit(f"the run ended by itself with exit code {process.returncode}, see {folder}.txt")
        order = order or chance.sample(sorted(FAULTS), len(FAULTS))  # each before any comes again
        fault = order.pop()
        before = last_step(folder)
        FAULTS[fault](process, folder, chance)
        struck[fault] += 1
        print(f"{time.strftime('%H:%M:%S')} step {before}: {fault}, exit code {process.poll()}", flush=True)
        while process.poll() is None and last_step(folder) <= before:
            time.sleep(0.1)  # it goes on
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # and begins the next round with a start of its own
            process.wait(timeout=120)
        if process.returncode == 0:
            return struck


def soak(arguments: list[str], folder: Path, every: float, seed: int) -> Counter[str]:
    """Both runs, side by side; returns how often each fault struck. Raises: AssertionError where they differ."""
    twin = start([*arguments, "--num_workers", "0"], folder / "twin")
    try:
        struck = harm(arguments, folder / "harmed", every, random.Random(seed))
        if twin.wait() != 0:
            raise SystemExit(f"the twin ended with exit code {twin.returncode}, see {folder / 'twin.txt'}")
    finally:
        twin.kill()
    ours, theirs = load_newest_checkpoint(folder / "harmed"), load_newest_checkpoint(folder / "twin")
    assert ours is not None and theirs is not None
    losses = step_losses(folder / "twin")
    assert len(losses) == theirs["step"] and step_losses(folder / "harmed") == losses
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"config"}:  # which holds the folder's name
        assert_same(ours[name], theirs[name], name)
    assert weights_path(folder / "harmed").read_bytes() == weights_path(folder / "twin").read_bytes()
    return struck


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs, new")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=25, help="seconds between a start and a fault, on average")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    epochs = max(1, round(args.minutes * STEPS_PER_MINUTE / 781))
    started = time.monotonic()
    struck = soak([*CIFAR, "--data_path", args.data, "--epochs", str(epochs)], args.out, args.every, args.seed)
    for fault, times in sorted(struck.items()):
        print(f"{fault:30}{times:4}")
    minutes = (time.monotonic() - started) / 60
    print(
        f"{sum(struck.values())} faults in {minutes:.1f} minutes, {epochs} epochs: losses, state and weights are equal"
    )


if __name__ == "__main__":
    main()
