"""`precision: auto` takes bfloat16 only where the hardware computes in it."""

from __future__ import annotations

import pytest
import torch

from hsft.config import Config
from hsft.trainer.fabric import choose_precision, compute_dtype


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"neon": True, "bf16": True}, "bf16-mixed"),
        ({}, "32-true"),
    ],
)
def test_on_the_cpu(
    features: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert choose_precision(Config(device="cpu")) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_on_a_gpu(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    assert choose_precision(Config(device="auto")) == expected


def test_a_named_precision_is_kept() -> None:
    config = Config(device="cpu", precision="bf16-true")
    assert choose_precision(config) == "bf16-true"
    assert compute_dtype(config) == torch.bfloat16
