"""The short form of `tests/soak.py`: a run that every kind of fault strikes, beside its twin."""

import pytest
from runs import STEPS_PER_EPOCH, digits
from soak import FAULTS, soak


@pytest.mark.long
def test_a_run_that_is_harmed_again_and_again_equals_its_twin(tmp_path, record_property):
    epochs = 12
    arguments = digits(tmp_path, "--epochs", epochs, "--log_interval", 1, "--save_minutes", 0.005)
    struck = soak(arguments, tmp_path, epochs * STEPS_PER_EPOCH, every=50, seed=1)
    assert struck.keys() == FAULTS.keys()
    record_property("tries", struck.total())
