"""What every test may use."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def shared() -> Path:
    """The folder of models and data beside the checkout, which the product never needs."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED} with models and data")
    return SHARED
