"""What every training shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.errors import Diverged
from core.images import ImageSet
from core.run import Run
from core.training import fit, mixed_precision, one_cycle, steps, two_drops, waves


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


def test_training_reports_divergence() -> None:
    data = ImageSet(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    network = nn.Linear(1, 1)
    with pytest.raises(Diverged, match="epoch 1"):
        fit(
            Run(), "bad", data=data, loss=lambda images, labels: network(torch.full((1, 1), float("nan"))).sum(), network=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=1.0), schedule=steps((0, 1.0)), epochs=1, batch_size=4,
        )  # fmt: skip


def test_schedules() -> None:
    rate = steps((0, 0.1), (1, 0.01), (10, 0.001))
    assert [rate(epoch) for epoch in (0, 0.9, 1, 9.5, 10, 19)] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    # MCLDef's on GTSRB; then one so short that it never drops twice.
    assert [two_drops(0.01, 20, first=2)(epoch) for epoch in (0, 1, 2, 9, 10, 19)] == pytest.approx([0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4])
    assert [two_drops(0.1, 2)(epoch) for epoch in (0, 1)] == pytest.approx([0.1, 0.01])
    # Ten steps an epoch: torch's cosine of 100 steps, stepped by each.
    parameter = nn.Parameter(torch.zeros(1))
    wave = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], lr=0.01), T_max=100)
    for step in range(250):
        assert waves(0.01, 10 / 100)(step / 10) == pytest.approx(wave.get_last_lr()[0], abs=1e-9)
        wave.optimizer.step()
        wave.step()
    cycle = one_cycle(10, 0.4)
    assert cycle(0) == 0 and cycle(2.5) == pytest.approx(0.4) and cycle(10) == pytest.approx(0)
