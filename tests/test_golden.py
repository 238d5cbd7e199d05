"""Row R24: the losses of the first steps, so that a change of the mathematics cannot come
unnoticed."""

import pytest
import torch
from runs import digits, step_losses

import main_pretrain

GOLDEN = [  # of steps 1 to 20, fp32; the learning rate rises from 0 over 31 steps
    1.154701,
    1.157825,
    1.156171,
    1.177370,
    1.152974,
    1.175975,
    1.165751,
    1.139648,
    1.125410,
    1.150191,
    1.105623,
    1.122522,
    1.098192,
    1.079898,
    1.073173,
    1.067368,
    1.042025,
    1.053218,
    1.019900,
    1.006566,
]


@pytest.mark.fault("R24")
def test_losses_of_twenty_steps(tmp_path):
    """`test_pretrain.py` repeats a run and compares all of its steps, bit for bit."""
    main_pretrain.main(digits(tmp_path, "--log_interval", 1, "--epochs", 1))
    losses = step_losses(tmp_path)
    found = [float.fromhex(losses[step]) for step in range(1, 21)]
    torch.testing.assert_close(found, GOLDEN, rtol=0, atol=1e-4)
