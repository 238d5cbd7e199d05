"""The short form of `tests/soak.py`: a run of seconds that every kind of fault may strike, beside its twin."""

import pytest
from runs import digits
from soak import soak


@pytest.mark.long
def test_a_run_that_is_harmed_again_and_again_equals_its_twin(tmp_path):
    arguments = digits(tmp_path, "--epochs", 14, "--log_interval", 1, "--save_minutes", 0.02)
    struck = soak(arguments, tmp_path, every=3, seed=1)
    assert sum(struck.values()) >= 4 and len(struck) >= 4
