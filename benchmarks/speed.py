"""How fast poisoning and training are: `python -m benchmarks.speed` (or `make bench-speed`).

Attack generation in images a second; the training loop beside the bare model's forward and backward pass, taken in turns in one
process; Neural Cleanse and MCLDef beside plain loops written from the papers; votes and energies of 50,000 embeddings beside the naive
computation on a part of them; an encoder's step with and without its loss and augmentation. The last line is one JSON object.
`--device cuda` measures all but the poisoning, which no GPU does, on one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import plain
from benchmarks.bench import Setting, data, machine, trained
from core import architectures, augment, catalog, encoders, evaluation, inversion, losses, neighbours, poisoning, training, weights
from core.allocator import keep_freed_memory
from core.attacks.badnets import BadNets
from core.classifier import Classifier
from core.images import ImageSet, as_floats
from core.run import Run, repeatable

COUNT = 10_000
AIM = {"wanet": 5_000, "sig": 5_000}
PATCH_AND_BLEND = ("badnets", "trojan", "blend", "chessboard", "l0_invisible", "l2_invisible", "low_frequency", "ssl_backbone")


def main() -> int:
    """Measure; return 0 when every aim is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--only", choices=["attacks", "training", "purification", "cleansing"], help="measure one part")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(os.cpu_count() or 1)
    # As the engine does.
    keep_freed_memory()
    repeatable()
    parts: dict[str, Callable[[], Any]] = {
        "attacks": lambda: attacks(options.rounds),
        "training": lambda: [step(device, batch, options.rounds) for batch in (64, 128)],
        "purification": lambda: [*inspection(device), purification(device)],
        "cleansing": lambda: {"comparing": comparing(device), "encoding": encoding(device, options.rounds)},
    }
    found: dict[str, Any] = {name: measure() for name, measure in parts.items() if options.only in (None, name)} | {"machine": machine()}
    reached = shown(found)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0 if reached else 1


def shown(found: dict[str, Any]) -> bool:
    """Print what was measured; return whether every aim was reached."""
    reached = True
    for name, one in found.get("attacks", {}).items():
        print(f"{name:24}{one['images_per_second']:>12,.0f} images/s, aim {one['aim'] or 'none'}")
        reached &= one["images_per_second"] >= (one["aim"] or 0)
    for one in found.get("training", ()):
        print(f"WRN-16-1, batch {one['batch']}: {one['fit']:,.0f} images/s in the loop, {one['bare']:,.0f} bare; overhead {one['overhead']:.1%}")
        reached &= one["overhead"] <= 0.15
    for one in found.get("purification", ()):
        print(f"{one['what']}: {one['ours']:.1f} s, as a plain loop {one['plain']:.1f} s, {one['plain'] / one['ours']:.2f} times faster")
        if "after" in one:
            print("  ends at " + ", ".join(f"{what} {value:.2%}" for what, value in one["after"].items()))
        for who, masks in one.get("masks", {}).items():
            print(f"  masks, {who}: " + " ".join(f"{norm:.1f}" for norm in masks["norms"]) + f"; flagged {masks['flagged']}")
        reached &= one["plain"] / one["ours"] >= one["aim"] and one["ours"] <= one.get("most", math.inf)
    if "cleansing" in found:
        near, step = found["cleansing"]["comparing"], found["cleansing"]["encoding"]
        print(
            f"votes and energies of {near['images']:,}: {near['seconds']:.1f} s, {near['peak_mb']:.0f} MB; naively {near['naive_seconds']:.0f} s (from {near['rows']} rows)"
        )
        print(
            f"encoder's step, {step['images']} images in two views: bare {step['bare']:.3f} s, loss {step['loss']:.4f} s, augmentation {step['augmentation']:.3f} s"
        )
        reached &= near["seconds"] < 60 and near["peak_mb"] < 2000 and near["largest_difference"] < 1e-5
        reached &= step["loss"] < 0.1 * step["bare"] and step["augmentation"] < step["bare"]
    return reached


def attacks(rounds: int) -> dict[str, Any]:
    """Return images a second of every attack that needs no training, on random CIFAR-sized images."""
    images = random_images(COUNT)
    found = {}
    for name, attack in catalog.attacks().items():
        if attack.fit is not None:
            continue
        params = attack.params(method=name, target=0)
        assert isinstance(params, poisoning.AttackParams)
        trigger = poisoning.declared(params, (3, 32, 32), 10)
        aim = AIM.get(name, 20_000 if name in PATCH_AND_BLEND else None)
        seconds = timed(lambda trigger=trigger: trigger.stamp(images), rounds)  # type: ignore[misc]
        found[name] = {"images_per_second": COUNT / seconds, "aim": aim}
    return found


def step(device: torch.device, batch: int, rounds: int, steps: int = 40) -> dict[str, Any]:
    """Return images a second of the training loop and of the bare forward and backward pass, in turns; medians."""
    described = architectures.named("wrn-16-1", classes=10)
    model = Classifier(described.build(), described, weights.PREPROCESSINGS[0]).to(device).train()
    data = ImageSet(random_images(batch * steps), torch.arange(batch * steps) % 10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    floats, labels = as_floats(data.images[:batch]), torch.arange(batch, device=device) % 10

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return F.cross_entropy(model(images).float(), labels)

    def loop() -> None:
        training.fit(
            Run(device=str(device)), "speed", data=data, loss=loss, network=model, optimizer=optimizer, schedule=training.steps((0, 1e-3)),
            epochs=1, batch_size=batch, prepare=model.train,
        )  # fmt: skip

    def bare() -> None:
        for _ in range(steps):
            with training.mixed_precision(device):
                value = loss(floats, labels)
            model.zero_grad(set_to_none=True)
            value.backward()

    taken: dict[str, list[float]] = {"fit": [], "bare": []}
    for _ in range(rounds + 1):
        for name, act in (("fit", loop), ("bare", bare)):
            taken[name].append(timed(act, 1))
    # The first round warms up.
    fit, plain = (statistics.median(taken[name][1:]) for name in ("fit", "bare"))
    return {"batch": batch, "fit": batch * steps / fit, "bare": batch * steps / plain, "overhead": fit / plain - 1}


def inspection(device: torch.device, passes: int = 120, batches: int = 8, batch_size: int = 32) -> list[dict[str, Any]]:
    """Return the seconds of Neural Cleanse over ten labels, ours with its defaults and leaving early, and as a plain loop, with the masks of each."""
    model, clean = published(device)
    norms: dict[str, list[float]] = {}

    def ours(name: str, **rule: Any) -> None:
        how: dict[str, Any] = {"passes": passes, "batches_per_pass": batches, "batch_size": batch_size, **rule}
        norms[name] = inversion.invert_every_label(Run(device=str(device)), "speed", classifier=model, clean=clean, **how).norms

    whole, early = timed(lambda: ours("whole"), 1), timed(lambda: ours("early", tolerance=0.05, patience=20), 1)
    plainly, norms["plain"] = alone(plain_neural_cleanse, device, passes, batches, batch_size)
    what = f"Neural Cleanse, 10 labels, at most {passes} passes of {batches} batches of {batch_size}"
    masks = {name: {"norms": found, "flagged": inversion.flagged(found)} for name, found in norms.items()}
    return [
        {"what": what, "ours": whole, "plain": plainly, "aim": 3.0, "masks": masks},
        {"what": f"{what}, tolerance 0.05", "ours": early, "plain": plainly, "aim": 3.0},
    ]


def plain_neural_cleanse(device: torch.device, passes: int, batches: int, batch_size: int) -> tuple[float, list[float]]:
    """Return the seconds of the plain loop, and its masks' norms."""
    model, clean = published(device)
    norms: list[list[float]] = []
    seconds = timed(lambda: norms.append(plain.neural_cleanse(model, clean.images.cpu(), passes=passes, batches=batches, batch_size=batch_size)), 1)
    return seconds, norms[0]


def purification(device: torch.device, share: float = 0.2) -> dict[str, Any]:
    """Return the seconds of MCLDef's two stages on 2,500 images, ours whole with its defaults and the published schedule as a plain loop, and BA and ASR after ours.

    Args:
        share: of its epochs that the plain loop is timed for; its time goes with them, so the whole is reckoned from that.
    """
    model, clean = published(device)
    method = catalog.defenses()["mcldef"]
    purified: list[Classifier] = []

    def ours() -> None:
        outcome = method.run(Run(device=str(device)), catalog.Inputs(model=model, clean=clean), method.params(method="mcldef", target=5, rounds=1))
        assert outcome.model is not None
        purified.append(outcome.model)

    seconds = {"ours": timed(ours, 1), "plain": alone(plain_mcldef, device, share) / share}
    test = data("cifar10")[1]
    triggered = poisoning.triggered(test, poisoning.declared(BadNets(method="badnets", target=5), (3, 32, 32), 10), 10)
    after = evaluation.evaluate(purified[0], test, triggered)
    rates = {name: after[name]["value"] for name in ("ba", "ba_excluding_target", "asr")}
    aims = {"aim": 3.0} | ({"most": 30.0} if device.type == "cuda" else {})
    return {"what": f"MCLDef, 2,500 images (the plain loop: {share:.0%} of its epochs)", **seconds, **aims, "after": rates}


def plain_mcldef(device: torch.device, share: float) -> float:
    """Return the seconds of a share of the plain loop's epochs."""
    model, clean = published(device)
    return timed(lambda: plain.mcldef(model, clean.images.cpu(), target=5, inversion_epochs=round(share * 100), epochs=round(share * 20)), 1)


def alone(measure: Callable[..., Any], *given: Any) -> Any:
    """Return what `measure` finds in a process of its own: a plain loop is a script, and has the memory that Python gives one."""
    threads = (os.cpu_count() or 1,)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, threads) as pool:
        return pool.submit(measure, *given).result()


def comparing(device: torch.device, images: int = 50_000, width: int = 128, k: int = 2_500, rows: int = 20) -> dict[str, Any]:
    """Return seconds and peak memory of `core.neighbours`, and of the naive computation from a few rows, with the largest difference of the two."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (images,), generator=generator)
    features = F.normalize(torch.randn(images, width, generator=generator) + torch.randn(10, width, generator=generator)[labels], dim=1)
    found: list[neighbours.Neighbourhood] = []
    seconds = timed(lambda: found.append(neighbours.neighbourhood(Run(device=str(device)), "speed", features.to(device), labels.to(device), 10, k=k)), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    largest = 0.0
    started = time.perf_counter()
    for row in range(rows):
        near = features @ features[row]
        others = torch.arange(images) != row
        nearest = labels[others][near[others].argsort(descending=True)[:k]]
        pull = (near[others].double() / 0.5).exp()
        energies = torch.stack([pull[labels[others] == label].mean() for label in range(10)]).log() - pull.sum().log()
        difference = max(
            float((found[0].energies[row].cpu() - energies).abs().max()), float((found[0].votes[row].cpu() - nearest.bincount(minlength=10)).abs().max())
        )
        largest = max(largest, difference)
    naive = (time.perf_counter() - started) / rows * images
    return {"images": images, "k": k, "seconds": seconds, "peak_mb": peak, "naive_seconds": naive, "rows": rows, "largest_difference": largest}


def encoding(device: torch.device, rounds: int, images: int = 512) -> dict[str, Any]:
    """Return the median seconds of an encoder's bare forward and backward pass over two views, of SimCLR's loss, and of the augmentation."""
    pixels = as_floats(random_images(images).to(device))
    described = architectures.named("wrn-16-1", classes=10)
    encoder = encoders.Encoder(Classifier(described.build(), described, weights.PREPROCESSINGS[0]), "linear", 128).to(device).train()
    view, generator = augment.simclr(), torch.Generator().manual_seed(0)
    views, alike = torch.cat([pixels, pixels]), torch.eye(images, dtype=torch.bool, device=device)
    embedded = torch.randn(2 * images, 128, device=device).requires_grad_(True)

    def bare() -> None:
        with training.mixed_precision(device):
            value = encoder(views).float().square().mean()
        value.backward()

    def loss() -> None:
        losses.supervised_contrastive(embedded[:images], embedded[images:], alike, temperature=0.5).backward()

    taken: dict[str, list[float]] = {"bare": [], "loss": [], "augmentation": []}
    for _ in range(rounds + 1):
        for name, act in (("bare", bare), ("loss", loss), ("augmentation", lambda: (view(pixels, generator), view(pixels, generator)))):
            taken[name].append(timed(act, 1))
    return {"images": images, **{name: statistics.median(values[1:]) for name, values in taken.items()}}


def published(device: torch.device) -> tuple[Classifier, ImageSet]:
    """Return the victim that MCLDef's authors published and 2,500 clean images, on `device`."""
    checkpoint = "cases/mcldef-wrn16-1-badnets/WRN-16-1-badnet.pth.tar"
    setting = Setting(dataset="cifar10", model=checkpoint, recipe="mcldef", preprocessing="cifar10", clean_fraction=0.05, device=str(device))
    model, _ = trained(setting, {"method": "badnets", "target": 5}, 0)
    return model.to(device), data("cifar10")[0].sample(2500, Run(seed=0).generator("clean images")).to(device)


def timed(act: Callable[[], object], rounds: int) -> float:
    """Return the median of the seconds that `act` takes."""
    seconds = []
    for _ in range(rounds):
        _wait()
        started = time.perf_counter()
        act()
        _wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _wait() -> None:
    """Let a GPU end what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def random_images(count: int) -> torch.Tensor:
    """Return (count, 3, 32, 32) uint8 noise in channels-last memory."""
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


if __name__ == "__main__":
    sys.exit(main())
