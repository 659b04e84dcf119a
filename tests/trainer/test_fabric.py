"""Devices other than the CPU, as far as they show without one: choice, refusals, Fabric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.accelerators import MPSAccelerator

from hsft.config import Config
from hsft.model.backbone import check_quantization
from hsft.trainer.checkpoint import restore_torch_rng, torch_rng_state
from hsft.trainer.fabric import (
    available_devices,
    check_device,
    choose_device,
    choose_precision,
    make_fabric,
)
from hsft.utils.errors import InputError


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kinds of devices that torch says it finds, beside the CPU."""
    names: set[str] = set()
    for name, module in {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}.items():
        monkeypatch.setattr(module, "is_available", lambda name=name: name in names)
    return names


def test_auto_takes_cuda_or_the_cpu(there: set[str]) -> None:
    assert (choose_device(Config()), available_devices()) == ("cpu", ["cpu"])
    there |= {"xpu", "mps"}
    assert choose_device(Config()) == "cpu"
    assert choose_device(Config(device="xpu")) == "xpu"
    assert available_devices() == ["xpu", "mps", "cpu"]
    there.add("cuda")
    assert choose_device(Config()) == "cuda"


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_a_device_that_is_not_there_is_refused(there: set[str], device: Any) -> None:
    there |= {"cuda", "xpu", "mps"} - {device}
    with pytest.raises(InputError, match=f"device: {device} .* finds no {device.upper()} device"):
        choose_device(Config(device=device))


@pytest.mark.parametrize(
    ("device", "settings", "words"),
    [
        ("xpu", {"precision": "16-mixed"}, "16-mixed needs CUDA; use bf16-mixed or 32-true on xpu"),
        ("mps", {"strategy": "deepspeed"}, "deepspeed runs on CUDA and on the CPU, not on mps"),
        ("xpu", {}, "device: xpu runs in a single process"),
    ],
)
def test_what_runs_on_cuda_only(
    there: set[str],
    monkeypatch: pytest.MonkeyPatch,
    device: Any,
    settings: dict[str, Any],
    words: str,
) -> None:
    there.add(device)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda **_: True)
    if not settings:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=words):
        check_device(Config(device=device, **settings))


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_on_other_gpus(
    there: set[str], monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    there |= {"xpu", "mps"}
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda **_: native)
    assert choose_precision(Config(device="xpu")) == expected
    assert choose_precision(Config(device="mps")) == "32-true"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_fabric_of_other_gpus(
    there: set[str], monkeypatch: pytest.MonkeyPatch, device: Any, precision: Any
) -> None:
    there.add(device)
    used: list[torch.device] = []
    monkeypatch.setattr(torch.xpu, "set_device", used.append)
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: device == "mps"))
    fabric = make_fabric(Config(device=device, precision=precision))
    assert fabric.device == torch.device(device, 0)
    assert used == ([fabric.device] if device == "xpu" else [])
    mixed = fabric.strategy.precision
    assert mixed.precision == precision
    if precision == "bf16-mixed":
        assert mixed.device == device


def test_quantisation_where_bitsandbytes_has_kernels() -> None:
    for device in ("cpu", "cuda", "xpu", "mps"):
        check_quantization("nf4", device)
    with pytest.raises(InputError, match="int8 needs kernels for device vulkan") as refusal:
        check_quantization("int8", "vulkan")
    assert "set --qlora_quant_type none" in str(refusal.value)
    check_quantization("none", "vulkan")
    check_quantization("auto", "vulkan")


class FakeGenerator:
    """A GPU's generator, in the place of torch's module for its kind."""

    def __init__(self, size: int) -> None:
        self.state = torch.arange(size, dtype=torch.uint8)

    def get_rng_state(self, *where: torch.device) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor, *where: torch.device) -> None:
        self.state = state


def test_the_generators_of_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {"xpu": FakeGenerator(16), "mps": FakeGenerator(44)}
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpus[device.type])
    xpu, mps, cpu = torch.device("xpu", 0), torch.device("mps"), torch.device("cpu")
    saved = torch_rng_state(xpu)
    assert [len(state) for state in saved[1:]] == [16]
    gpus["xpu"].state = torch.zeros(16, dtype=torch.uint8)
    restore_torch_rng(saved, xpu)
    assert gpus["xpu"].state.tolist() == list(range(16))
    # Another kind of GPU, or none, keeps its own.
    for device in (mps, cpu):
        restore_torch_rng(saved, device)
        restore_torch_rng(saved[:1], device)
    assert gpus["mps"].state.tolist() == list(range(44))
