"""Settings of the whole suite."""

import pytest
import torch

# The models of the tests are tiny: a second thread costs them more than it brings, most of all on a busy machine.
# Run `pytest -n 2` to use two cores.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # peft 0.21 itself reads the name that transformers 5.23 has deprecated.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
