"""What came of a job: report.json, trigger pictures, and the numbers a reviewer files."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from core.images import ImageSet, as_floats
from core.inversion import stamp
from core.run import Run


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return what computed the numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "platform": f"{sys.platform}-{platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def write(run: Run, report: dict[str, Any]) -> None:
    """Write report.json."""
    path = run.artifact("report.json", kind="report_json", media_type="application/json")
    path.write_text(json.dumps(report, indent=1, allow_nan=False))


def draw_triggers(run: Run, triggers: dict[int, tuple[torch.Tensor, torch.Tensor]], clean: ImageSet) -> dict[str, Path]:
    """Draw each recovered trigger (mask, mask times pattern, and three stamped images) as a PNG; return the files by what they show."""
    drawn = {}
    for label, (mask, pattern) in triggers.items():
        stamped = stamp(as_floats(clean.images[:3]), mask, pattern)
        tiles = [mask.expand_as(pattern), mask * pattern, *stamped]
        path = run.artifact(f"trigger-class-{label}.png", kind="trigger", media_type="image/png")
        _picture(tiles).save(path)
        drawn[f"class {label}"] = path
    return drawn


def draw_perturbations(run: Run, perturbations: dict[int, torch.Tensor], clean: ImageSet) -> dict[str, Path]:
    """Draw each perturbation (stretched around grey, and on three images) as a PNG; return the files by what they show."""
    drawn = {}
    for label, perturbation in perturbations.items():
        perturbed = as_floats(clean.images[:3]) + perturbation
        tiles = [0.5 + perturbation / (2 * perturbation.abs().max().clamp(min=1e-9)), *perturbed]
        path = run.artifact(f"perturbation-class-{label}.png", kind="trigger", media_type="image/png")
        _picture(tiles).save(path)
        drawn[f"class {label}, perturbation"] = path
    return drawn


def _picture(tiles: list[torch.Tensor], scale: int = 4) -> Image.Image:
    """Lay (C, H, W) tiles in [0, 1] side by side, enlarged without smoothing, two pixels apart."""
    rows = []
    for tile in tiles:
        array = (tile.detach().float().nan_to_num().clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)
        rgb = np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array[:3]
        big = rgb.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
        rows += [big, np.full((big.shape[0], 2, 3), 255, dtype=np.uint8)]
    return Image.fromarray(np.concatenate(rows[:-1], axis=1))
