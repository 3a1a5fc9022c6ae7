"""Settings of the whole suite."""

import os
import sys
from pathlib import Path

# Tests start processes that import torch and transformers: 11 s each with compiled modules, 28 s where a machine
# forbids to keep them and uv has installed without.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402
import torch  # noqa: E402

# The models of the tests are tiny: a second thread costs more than it gains, most of all on a busy machine.
# Run `pytest -n 2` to use two cores.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # peft 0.21 itself reads the name that transformers 5.23 has deprecated.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Hours of small differences between relatives, and servers of inference engines: only when they are asked for.
    for mark in ("nightly", "serving"):
        if mark not in config.option.markexpr:
            others = [item for item in items if item.get_closest_marker(mark) is not None]
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if item not in set(others)]


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the weights of an untrained nano host, for demos that need no good answers."""
    from safetensors.torch import save_file

    from sfa_adapters.recipes.nano.models import build_nano

    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    model = build_nano("llava_onevision").model
    save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, path)
    return path
