"""Segmentation and detection on two gloo processes: sharded as with DDP, also where images have no
objects."""

import pytest
import torch
from runs import driven, run

pytestmark = pytest.mark.long


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_sharded_steps_are_those_of_ddp(tmp_path, task):
    """Two steps, with windows and checkpointing. AdamW's step is the gradient's sign where that is
    tiny, so parameters are compared by their share of the learning rate, 1e-3."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        path = tmp_path / parallel
        result = run(driven(task, parallel, str(path), processes=2, driver="dense_driver.py"))
        assert result.returncode == 0, result.stderr
        found[parallel] = torch.load(path, weights_only=True)
    ours, theirs = found["fsdp"], found["ddp"]
    for (loss, norm, gradients), (other, other_norm, expected) in zip(
        ours["steps"], theirs["steps"], strict=True
    ):
        assert loss == pytest.approx(other, abs=1e-6)
        assert norm == pytest.approx(other_norm, rel=1e-5)
        for one, two in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=1e-5)
