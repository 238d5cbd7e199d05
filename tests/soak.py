"""A pretraining run that something happens to every half minute or so, beside its twin that nothing
happens to.

    python tests/soak.py --data /path/to/cifar10 --out /path/to/scratch --minutes 30

The same command is given again until the run is done. A fault counts where it was seen to strike.
In the end losses of all steps, state and weights must be equal; the exit code is then 0. One thread
each, so that two cores carry both.
"""

import argparse
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from compare import assert_same_checkpoint  # noqa: E402
from runs import command, environment, step_losses  # noqa: E402

from engine.run.checkpoint import load_newest_checkpoint, weights_path  # noqa: E402
from engine.run.interrupts import SIGNALS  # noqa: E402

CIFAR = shlex.split("""
--dataset folder --img_size 32 --size tiny --patch_size 4 --decoder_embed_dim 96 --decoder_depth 1
--decoder_num_heads 3 --device cpu --batch_size 64 --total_batch_size 64 --warmup_epochs 0.5 --lr 1e-3
--monitor_epochs 0 --tensorboard false --log_interval 1 --save_minutes 0.15 --save_epochs 1
""")
STEPS_PER_EPOCH, STEPS_PER_MINUTE = 781, 200  # the latter with the time that faults and starts take
NEAR_END = 60  # steps, of which the last may be done before a fault comes


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """The run's command, all of whose output is in a file beside its folder."""
    with folder.with_suffix(".txt").open("wb") as output:
        line = command(*arguments, "--output_dir", str(folder))
        return subprocess.Popen(line, env=environment(), stdout=output, stderr=output)


class Harmed:
    """The run that is harmed: the process of its latest start, what that says, and what the folder
    holds."""

    def __init__(self, arguments: Sequence[str], folder: Path, steps: int):
        self.arguments, self.folder, self.steps = arguments, folder, steps
        self.begin(num_workers=0)

    def begin(self, num_workers: int) -> None:
        self.began_at = self.sound()
        self.process = start([*self.arguments, "--num_workers", str(num_workers)], self.folder)

    def said(self) -> str:
        return self.folder.with_suffix(".txt").read_text()

    def step(self) -> int:
        """What this start has logged last, or where it began."""
        return max([self.began_at, *map(int, re.findall(r" step (\d+)/", self.said()))])

    def saved(self) -> int:
        """The newest checkpoint that this start has said to be complete, or where it began."""
        return max(
            [self.began_at, *map(int, re.findall(r" saved .*checkpoint-(\d+)\.pth\n", self.said()))]
        )

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*.pth"))

    def sound(self) -> int:
        """The step that the next start must go on from."""
        saved = load_newest_checkpoint(self.folder)
        return 0 if saved is None else saved.step

    def comes_to(self, step: int) -> bool:
        """Waits for that step of this start, which must have gone on from where it should; False if
        the run ended."""
        while self.process.poll() is None and (self.step() < step or step > self.steps - NEAR_END):
            time.sleep(0.05)
        assert (
            not self.began_at or f"resuming {self.folder} at step {self.began_at}\n" in self.said()
        ), self.said()
        return self.process.poll() is None


Fault = Callable[
    [Harmed, random.Random], bool
]  # whether it struck; else it has done nothing and comes again


def signalled(number: signal.Signals) -> Fault:
    """A signal: the run saves the step that it logged last, and its exit code tells which; SIGKILL
    loses no save."""

    def act(run: Harmed, _: random.Random) -> bool:
        run.process.send_signal(number)
        code = run.process.wait(timeout=300)
        if number == signal.SIGKILL:
            assert code == -number and run.saved() <= run.sound() <= run.step()
        else:
            assert code == 128 + number and run.sound() == run.step() == max(
                step_losses(run.folder)
            )
        return True

    return act


def damaged(run: Harmed, chance: random.Random) -> bool:
    """SIGKILL, and the newest checkpoint loses its end, a bit, or its checksum: the one before it
    counts."""
    if len(run.checkpoints()) < 2 or not signalled(signal.SIGKILL)(run, chance):
        return False
    *_, before, newest = run.checkpoints()
    content = bytearray(newest.read_bytes())
    place, how = chance.randrange(len(content)), chance.choice(("end", "bit", "checksum"))
    content[place] ^= 1 << chance.randrange(8)
    if how == "checksum":
        newest.with_name(newest.name + ".sha256").unlink()
    else:
        newest.write_bytes(content if how == "bit" else content[:place])
    assert run.sound() == int(before.stem.removeprefix("checkpoint-"))
    return True


def worker_killed(run: Harmed, chance: random.Random) -> bool:
    """SIGKILL to a loader process: the run says so and goes on."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    if not children:
        return False
    words = "a loader process has ended, all are started again"
    seen = run.said().count(words)
    os.kill(int(chance.choice(children)), signal.SIGKILL)
    while run.said().count(words) == seen:  # with the next batch of that process, at the latest
        assert run.process.poll() is None, run.said()
        time.sleep(0.05)
    return True


def frozen(run: Harmed, _: random.Random) -> bool:
    """The run stands still for two seconds, and goes on."""
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    step = run.step()
    time.sleep(2)
    assert run.step() == step
    run.process.send_signal(signal.SIGCONT)
    return True


def disk_full(run: Harmed, _: random.Random) -> bool:
    """No file can become as large as a checkpoint: the next save ends the run with one line, older
    ones stay."""
    if not run.checkpoints():
        return False
    limit = run.checkpoints()[-1].stat().st_size * 3 // 4
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert run.process.wait(timeout=300) == 2
    assert re.match(
        r"error: the checkpoint of step \d+ cannot be saved", run.said().splitlines()[-1]
    )
    assert run.saved() <= run.sound()
    return True


FAULTS: dict[str, Fault] = {
    **{number.name: signalled(number) for number in (*SIGNALS, signal.SIGKILL)},
    "SIGKILL, damaged checkpoint": damaged,
    "SIGKILL to a loader process": worker_killed,
    "stands still": frozen,
    "disk full": disk_full,
}


def harm(run: Harmed, every: int, chance: random.Random) -> Counter[str]:
    """Brings the run to its end in spite of a fault about every so many steps; returns how often
    each struck."""
    struck, order = Counter[str](), list[str]()
    while True:
        order = order or chance.sample(sorted(FAULTS), len(FAULTS))  # each before any comes again
        if run.process.poll() is not None:
            run.begin(
                num_workers=chance.randrange(1 if FAULTS[order[0]] is worker_killed else 0, 3)
            )
        if not run.comes_to(run.step() + round(every * chance.uniform(0.5, 1.5))):
            assert run.process.returncode == 0, run.said()
            return struck
        time.sleep(chance.uniform(0, 0.2))  # anywhere within a step
        fault = next((fault for fault in order if FAULTS[fault](run, chance)), None)
        if fault is not None:
            order.remove(fault)
            struck[fault] += 1
            print(
                f"{time.strftime('%H:%M:%S')} step {run.step()}: {fault}, saved {run.sound()}",
                flush=True,
            )


def soak(arguments: Sequence[str], folder: Path, steps: int, every: int, seed: int) -> Counter[str]:
    """Both runs, side by side; returns how often each fault struck. Raises: AssertionError where
    they differ."""
    if (
        signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    ):  # under nohup, which the run would inherit
        signal.signal(signal.SIGHUP, lambda *_: None)
    folder.mkdir(parents=True, exist_ok=True)
    twin = start([*arguments, "--num_workers", "0"], folder / "twin")
    run = Harmed(arguments, folder / "harmed", steps)
    try:
        struck = harm(run, every, random.Random(seed))
        assert twin.wait() == 0, f"see {folder / 'twin.txt'}"
    finally:
        twin.kill()
        run.process.kill()
    losses = step_losses(folder / "twin")
    assert len(losses) == steps and step_losses(folder / "harmed") == losses
    assert_same_checkpoint(*(load_newest_checkpoint(folder / name) for name in ("harmed", "twin")))
    assert (
        weights_path(folder / "harmed").read_bytes() == weights_path(folder / "twin").read_bytes()
    )
    return struck


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs, new")
    parser.add_argument("--minutes", type=float, default=30, help="how long it takes, about")
    parser.add_argument(
        "--every", type=int, default=75, help="steps between two faults, on average"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    epochs = max(1, round(args.minutes * STEPS_PER_MINUTE / STEPS_PER_EPOCH))
    arguments = [*CIFAR, "--data_path", args.data, "--epochs", str(epochs)]
    struck = soak(arguments, args.out, epochs * STEPS_PER_EPOCH, args.every, args.seed)
    print("\n".join(f"{fault:30}{times:4}" for fault, times in sorted(struck.items())))
    minutes = (time.monotonic() - started) / 60
    print(
        f"{struck.total()} faults in {minutes:.1f} minutes, {epochs} epochs: losses, state and weights are equal"
    )


if __name__ == "__main__":
    main()
