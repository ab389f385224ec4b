import pytest

from training.zero3_step import _replace


def test_what_deepspeed_no_longer_has_is_not_replaced_without_a_word():
    with pytest.raises(RuntimeError, match="DeepSpeed .*: its object has no step_of_old, on which .* install the version in the constraints file"):
        _replace(object(), step_of_old=lambda: None)
