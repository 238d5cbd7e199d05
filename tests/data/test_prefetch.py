"""Batches on the device: their order, when they are taken, and what an error of the loader does."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from runs import log_lines, pretraining
from torch._subclasses.fake_tensor import FakeTensorMode

import main_pretrain
from data.loader import BadSample, Batch
from data.sampler import SampleKey
from data.sources import FolderSource
from engine.parallel import on_device


def batch(number: int) -> Batch:
    images, ids = torch.full((2, 3, 4, 4), number, dtype=torch.uint8), torch.full((2, 5), number)
    bad = [BadSample(f"{number}.png", "torn")]
    return Batch(images, ids, [SampleKey(number, 0, number, 0)], bad, False)


def taken(batches: list[Batch], log: list[str], error_at: int | None = None) -> Iterator[Batch]:
    for number, each in enumerate(batches):
        if number == error_at:
            raise RuntimeError(f"batch {number} is lost")
        log.append(f"take {number}")
        yield each


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_cuda_batches_pass_as_they_are_and_none_is_taken_before_it_is_asked_for(device):
    batches, log = [batch(number) for number in range(3)], []
    iterator = on_device(taken(batches, log), torch.device(device))
    assert log == []
    for number in range(3):
        assert next(iterator) is batches[number]
        assert log == [f"take {n}" for n in range(number + 1)]
    assert next(iterator, "the end") == "the end"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_error_of_the_loader_comes_in_its_step(device, streams):
    log: list[str] = []
    with FakeTensorMode():
        iterator = on_device(
            taken([batch(number) for number in range(3)], log, error_at=2), torch.device(device)
        )
        assert [int(next(iterator).keys[0].image) for _ in range(2)] == [0, 1]
        with pytest.raises(RuntimeError, match="batch 2 is lost"):
            next(iterator)
        assert next(iterator, "the end") == "the end"


def test_an_error_of_the_loader_ends_a_run_after_the_steps_before(tmp_path, data, monkeypatch):
    reads: list[int] = []

    def fails(source, index, read=FolderSource.read):
        reads.append(index)
        if len(reads) == 3 * 12 + 5:  # in the fourth step
            raise RuntimeError("the cable is out")
        return read(source, index)

    monkeypatch.setattr(FolderSource, "read", fails)
    with pytest.raises(RuntimeError, match="the cable is out"):
        main_pretrain.main(pretraining(data, tmp_path / "run"))
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3]


# --- CUDA's way, without a GPU: tensors without content, and streams that write down what is asked
# of them ------------


class Stream:
    """A stream that knows its name and notes who waits for whom."""

    def __init__(self, name: str, log: list[str]):
        self.name = name
        self.log = log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def streams(monkeypatch) -> list[str]:
    """What happens on which stream, in order."""
    log: list[str] = []
    current = [Stream("computing", log)]

    @contextmanager
    def inside(stream: Stream):
        current.append(stream)
        yield
        current.pop()

    def to(self, device, non_blocking):
        log.append(f"copy on {current[-1].name}, non_blocking {non_blocking}")
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", log))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}")
    )
    return log


def test_on_cuda_a_batch_is_copied_beside_the_computation_which_waits_for_it_alone(streams):
    with FakeTensorMode():
        batches = [batch(0), batch(1), batch(2)]
        iterator = on_device(taken(batches, streams), torch.device("cuda"))
        for number, original in enumerate(batches):
            streams.clear()
            found = next(iterator)
            assert streams == [
                f"take {number}",
                *["copy on copies, non_blocking True"] * 2,
                "computing waits for copies",
                *["kept for computing"] * 2,
            ]
            assert found.images.device.type == found.targets.device.type == "cuda"
            assert (found.images.shape, found.images.dtype) == ((2, 3, 4, 4), torch.uint8)
            assert found[2:] == original[2:]
            assert original.images.device.type == "cpu"
        assert next(iterator, "the end") == "the end"
