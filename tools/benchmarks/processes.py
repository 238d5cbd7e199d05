"""A pretraining step on two processes of one thread each beside one process of two threads, of the
same total batch."""

import multiprocessing
import statistics
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from engine.parallel import wrap_model
from engine.optim import build_adamw, optimizer_step, param_groups, set_lr
from tools.benchmarks.models import SHAPES, Shape, build
from tools.benchmarks.timing import Variants, interleaved, ratio

THREADS = 2  # in all, either way
STEPS = 2  # in a turn
PATIENCE = 10  # seconds for a process to end
ONE, TWO = "1 process of 2 threads", "2 processes of 1 thread"


def benchmark_processes(name: str, rounds: int) -> dict[str, Any]:
    """Images per second of a step of SHAPES by one process and by two that average their gradients
    over gloo.

    The processes of both variants are there all the time, and those whose turn it is not sleep.
    """
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        teams = {
            team: Team(shape, count, Path(folder) / str(count))
            for team, count in ((ONE, 1), (TWO, THREADS))
        }
        try:
            variants: Variants = {team: members.work for team, members in teams.items()}
            seconds = interleaved(variants, rounds)
        finally:
            for members in teams.values():
                members.end()
    return {
        "images_per_s": {
            team: STEPS * shape.batch / statistics.median(s) for team, s in seconds.items()
        },
        "two_over_one": ratio(seconds, ONE, TWO),
    }


class Team:
    """So many processes that train one model, THREADS threads in all; they wait until they are told
    to work."""

    def __init__(self, shape: Shape, count: int, meeting: Path):
        context = multiprocessing.get_context(
            "spawn"
        )  # forked ones would have this process's thread pools
        self.pipes = []
        self.members = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            member = context.Process(
                target=_member, args=(shape, rank, count, str(meeting), theirs), daemon=True
            )
            member.start()
            theirs.close()  # so that a member that dies is noticed
            self.pipes.append(ours)
            self.members.append(member)
        self._wait()

    def work(self) -> None:
        """STEPS optimiser steps on all members. Raises: EOFError where one has died."""
        for pipe in self.pipes:
            pipe.send(STEPS)
        self._wait()

    def end(self) -> None:
        """Sends the members home."""
        for pipe in self.pipes:
            pipe.close()
        for member in self.members:
            member.join(PATIENCE)
            if member.is_alive():  # waiting for one that has died
                member.terminate()
                member.join()

    def _wait(self) -> None:
        for pipe in self.pipes:
            pipe.recv()


def _member(shape: Shape, rank: int, count: int, meeting: str, orders: Connection) -> None:
    """Trains on its share of each batch when told to."""
    torch.set_num_threads(THREADS // count)
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count
        )
    model = build(shape)
    optimizer = build_adamw(param_groups(model, 0.05), 0.9, 0.95)
    set_lr(optimizer, 1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    wrapped = wrap_model(model, torch.device("cpu"), accum_iter=1, world_size=count)
    torch.manual_seed(rank)
    images = torch.randn(shape.batch // count, 3, shape.img_size, shape.img_size)
    ids = torch.rand(len(images), model.num_patches).argsort(dim=1)
    orders.send("ready")
    try:
        while True:
            for _ in range(orders.recv()):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = wrapped(images, ids)
                loss.backward()
                optimizer_step(optimizer, scaler, clip_grad=None)
            orders.send("done")
    except EOFError:  # sent home
        if count > 1:
            dist.destroy_process_group()
