"""Batches on the device: when they are taken and copied, and what an error of the loader does."""

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


class Stream:
    """A stream that knows its name and notes who waits for whom."""

    def __init__(self, name: str, log: list[str]):
        self.name = name
        self.log = log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_cuda_a_batch_is_copied_beside_the_computation_which_waits_for_it_alone(
    device, monkeypatch
):
    """Without a GPU: tensors without content, and streams that write down what is asked of them."""
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

    def taken():
        for number in range(3):
            log.append("take")
            images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
            keys, bad = [SampleKey(number, 0, number, 0)], [BadSample(f"{number}.png", "torn")]
            yield Batch(images, torch.zeros(2, 5, dtype=torch.int64), keys, bad, False)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", log))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}")
    )
    expected = ["take"]
    if device == "cuda":
        expected += ["copy on copies, non_blocking True"] * 2
        expected += ["computing waits for copies"] + ["kept for computing"] * 2
    with FakeTensorMode():
        for number, found in enumerate(on_device(taken(), torch.device(device))):
            assert log == expected
            log.clear()
            assert {found.images.device.type, found.targets.device.type} == {device}
            assert (found.images.shape, found.images.dtype) == ((2, 3, 4, 4), torch.uint8)
            assert (found.keys[0].image, found.bad[0].path) == (number, f"{number}.png")
        assert number == 2
