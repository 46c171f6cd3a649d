"""What every training shares."""

from __future__ import annotations

import pytest
import torch

from core.training import mixed_precision


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx2": True, "avx512_f": False}, False),
        # Ice Lake: oneDNN takes bf16 there and imitates it.
        ({"avx2": True, "avx512_f": True, "avx512_bw": True, "avx512_vl": True, "avx512_dq": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_bf16_is_for_processors_that_multiply_it(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with mixed_precision(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is native
    with mixed_precision(torch.device("cpu"), enabled=False):
        assert not torch.is_autocast_enabled("cpu")
