"""What the tests share: golden files, and tiny models of the real classes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One golden file: `case` (its metadata), `state`, `inputs` and `outputs`."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            self.case = json.loads(file.metadata()["case"])
        self.state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
        self.inputs = {k.removeprefix("in/"): v for k, v in tensors.items() if k.startswith("in/")}
        self.outputs = {k.removeprefix("out/"): v for k, v in tensors.items() if k.startswith("out/")}
        self.tensors = tensors


@pytest.fixture
def golden():
    return Golden


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """The golden files' criterion: largest absolute error."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error < tolerance, f"max abs error {error:.2e}"
