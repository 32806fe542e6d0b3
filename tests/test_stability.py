# SPDX-License-Identifier: Apache-2.0
import pytest

from keylayers.training.options import StabilityOptions

CURVES = {  # losses -> whether they are stable, with windows of 2 steps and 0.1 nats
    (1.0, 1.0, 1.0): False,  # the second window is not full
    (1.0, 1.0, 1.0, 1.0): True,
    (3.0, 2.0, 1.0, 1.0): False,
    (3.0, 2.0, 1.0, 1.0, 1.0, 1.0): True,
    (1.0, 3.0, 2.0, 2.0): True,  # noise inside a window averages out
    (1.0, 1.0, 2.0, 2.0): False,  # a rise is no stability either
    (1.0, 1.0, 0.9, 0.9): False,  # a change of exactly epsilon is not below it
}
BAD = [
    ({"window": 0}, "`window` must be at least 1, got 0"),
    ({"epsilon": -1.0}, "`epsilon` must be 0 or more nats, got -1.0"),
    ({"max_steps": 0}, "`max_steps` must be at least 1, got 0"),
]


@pytest.mark.parametrize("losses", CURVES)
def test_a_loss_is_stable_when_two_windows_agree(losses):
    assert StabilityOptions(window=2, epsilon=0.1 - 1e-12).is_stable(losses) is CURVES[losses]
    assert not StabilityOptions(window=2, epsilon=0.0).is_stable(losses)


@pytest.mark.parametrize(("values", "message"), BAD)
def test_rules_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StabilityOptions(**values)
