"""A pretraining step on two processes of one thread each beside one process of two threads, of the
same total batch."""

import multiprocessing
import tempfile
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tools.benchmarks.models import SHAPES, Shape, build, step_of
from tools.benchmarks.timing import Variants, interleaved, rates, ratio

THREADS = 2  # in all, either way
STEPS = 2  # in a round
ONE, TWO = "1 process of 2 threads", "2 processes of 1 thread"


def benchmark_processes(name: str, rounds: int) -> dict[str, Any]:
    """Images per second of a step of SHAPES by one process and by two that average their gradients
    over gloo.

    The processes of both variants are there all the time, and those whose turn it is not sleep.
    """
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        variants: Variants = {
            ONE: partial(take_steps, start_processes(shape, 1, f"{folder}/one")),
            TWO: partial(take_steps, start_processes(shape, THREADS, f"{folder}/two")),
        }
        seconds = interleaved(variants, rounds)
    return {
        "images_per_s": rates(seconds, STEPS * shape.batch),
        "two_over_one": ratio(seconds, ONE, TWO),
    }


def start_processes(shape: Shape, count: int, meeting: str) -> list[Connection]:
    """Starts `count` processes that train one model, and wait; returns a pipe to each of them.

    They end when their pipe is closed, at the latest with this process.
    """
    context = multiprocessing.get_context("spawn")  # forked ones would share its thread pools
    pipes = []
    for rank in range(count):
        ours, theirs = context.Pipe()
        arguments = (shape, rank, count, meeting, theirs)
        context.Process(target=_train_when_told, args=arguments, daemon=True).start()
        theirs.close()  # so that the end of the process is noticed
        pipes.append(ours)
    return pipes


def take_steps(pipes: list[Connection]) -> None:
    """STEPS optimiser steps on all processes. Raises: EOFError where one has ended."""
    for pipe in pipes:
        pipe.send(STEPS)
    for pipe in pipes:
        pipe.recv()


def _train_when_told(shape: Shape, rank: int, count: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(THREADS // count)
    model = build(shape)
    wrapped = None
    if count > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=count)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    torch.manual_seed(rank)
    step = step_of(model, shape._replace(batch=shape.batch // count), torch.bfloat16, wrapped)
    try:
        while True:
            for _ in range(pipe.recv()):
                step()
            pipe.send("done")
    except EOFError:  # the pipe was closed
        return
