"""The report as one HTML page that stands alone: no script, nothing loaded, every value escaped by the template."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from core.catalog import Inputs, Outcome
from core.classifier import Classifier
from core.images import ImageSet, as_floats
from core.poisoning import Triggered
from core.run import Run

RATES = (
    ("ba", "Benign accuracy"),
    ("ba_excluding_target", "… without the target class"),
    ("asr", "Attack success rate"),
    ("asr_without_trigger", "… of the same images without the trigger"),
    ("pa", "Patched accuracy"),
)
WIDTH, HEIGHT = 320, 180
POINTS, POISONED = 240, 60
# Images of a training set in the figure of its embedding, and the most suspicious ones that are shown.
EMBEDDED, SHOWN = 1500, 60
# Of t-SNE's descent.
ROUNDS = 1000
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#76b7b2", "#edc948", "#ff9da7", "#bab0ac")


def write(run: Run, report: dict[str, Any], pictures: dict[str, Path], features: list[dict[str, Any]], gallery: dict[str, Any] | None = None) -> None:
    """Write report.html from the report, the pictures drawn so far (name: file), the 2-D features, and what `gallery` made of a training set."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("core", "pages"), autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = lambda rate: "—" if rate is None or rate["value"] is None else f"{100 * rate['value']:.2f} %"
    environment.filters["interval"] = lambda rate: f"{100 * rate['low']:.2f} – {100 * rate['high']:.2f}, {rate['hits']} of {rate['n']}" if rate["n"] else ""
    rendered = environment.get_template("report.html").render(
        report=report,
        rates=RATES,
        curves=[(name, curve(values)) for name, values in _histories(report["findings"])],
        pictures=[(name, base64.b64encode(path.read_bytes()).decode()) for name, path in pictures.items()],
        features=features,
        gallery=gallery,
        bars=bars(report["cleansing"]["histogram"]) if report["cleansing"] else [],
        colours=COLOURS,
        width=WIDTH,
        height=HEIGHT,
    )
    path = run.artifact("report.html", kind="report_html", media_type="text/html; charset=utf-8")
    path.write_text(rendered, encoding="utf-8")


def curve(values: list[float]) -> str:
    """Return the points of a polyline that shows `values` in the page's small frame."""
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    step = WIDTH / max(len(values) - 1, 1)
    return " ".join(f"{index * step:.1f},{HEIGHT - (value - low) / spread * HEIGHT:.1f}" for index, value in enumerate(values))


def _histories(findings: dict[str, Any]) -> list[tuple[str, list[float]]]:
    return [
        (name, value)
        for name, value in findings.items()
        if isinstance(value, list) and "loss" in name and len(value) > 1 and all(isinstance(one, float) for one in value)
    ]


def plane(run: Run, models: dict[str, Classifier], test: ImageSet, triggered: Triggered | None) -> list[dict[str, Any]]:
    """Return the penultimate features of test images in 2-D for each model (t-SNE, perplexity 30), as points of the page's frame.

    The same images each time: `{title, points: [{x, y, colour}]}`. Triggered images are black.
    """
    assert test.labels is not None
    clean = test.sample(POINTS, run.generator("figure"))
    assert clean.labels is not None
    images, colours = clean.images, [COLOURS[label % len(COLOURS)] for label in clean.labels.tolist()]
    if triggered is not None and len(triggered.images):
        extra = triggered.sample(POISONED, run.generator("figure", "triggered")).images
        images, colours = torch.cat([images.cpu(), extra.cpu()]), colours + ["#000"] * len(extra)
    found = []
    for title, model in models.items():
        device = next(model.parameters()).device
        with torch.no_grad():
            vectors = torch.cat([model.eval().features(as_floats(chunk.to(device))) for chunk in images.split(100)]).float().cpu().numpy()
        points = flattened(vectors, colours)
        if points:
            found.append({"title": title, "points": points})
    return found


def flattened(vectors: np.ndarray, colours: list[str]) -> list[dict[str, Any]]:
    """Return features (n, d) as points `{x, y, colour}` of the page's frame (t-SNE, perplexity 30); none where there is nothing to tell apart."""
    from sklearn.manifold import TSNE

    if len(vectors) < 10 or not np.ptp(vectors, axis=0).any():
        return []
    placed = TSNE(2, perplexity=min(30, len(vectors) // 4), max_iter=ROUNDS, init="pca", random_state=0).fit_transform(vectors)
    low, spread = placed.min(0), np.maximum(np.ptp(placed, axis=0), 1e-9)
    scaled = (placed - low) / spread * (WIDTH - 8, HEIGHT - 8) + 4
    return [{"x": round(float(x), 1), "y": round(float(y), 1), "colour": colour} for (x, y), colour in zip(scaled, colours, strict=True)]


def bars(histogram: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a histogram of scores as stacked bars `{x, y, width, height, colour}` of the page's frame; heights are square roots of counts."""
    counts = histogram["counts"]
    if not counts:
        return []
    total = np.sqrt(np.sum(list(counts.values()), axis=0))
    tall = max(float(total.max()), 1.0)
    width = WIDTH / len(total)
    found = []
    foot = np.zeros(len(total))
    for colour, values in zip(("#4e79a7", "#f28e2b", "#b3261e"), counts.values(), strict=True):
        # A bar's parts share its height as their counts share its count.
        share = np.divide(values, total**2, out=np.zeros(len(total)), where=total > 0) * total / tall * HEIGHT
        for index, height in enumerate(share):
            if height:
                found.append({"x": index * width, "y": HEIGHT - foot[index] - height, "width": width - 1, "height": height, "colour": colour})
        foot += share
    return found


def gallery(run: Run, outcome: Outcome, inputs: Inputs) -> dict[str, Any]:
    """Return what the page shows of a training set: `points` of its embedding, suspects black, and `images`, the most suspicious ones first."""
    split, data = outcome.split, inputs.suspect
    assert split is not None and data is not None and data.labels is not None
    points: list[dict[str, Any]] = []
    given = data.labels.cpu()
    if outcome.embedding is not None:
        chosen = torch.randperm(len(data), generator=run.generator("figure"))[:EMBEDDED]
        colours = ["#000" if bad else COLOURS[label % len(COLOURS)] for bad, label in zip(split.suspect.cpu()[chosen], given[chosen].tolist(), strict=True)]
        points = flattened(outcome.embedding.cpu()[chosen].float().numpy(), colours)
    suspects = split.suspect.cpu().nonzero()[:, 0]
    order = suspects[split.scores.cpu()[suspects].argsort(descending=True, stable=True)][:SHOWN]
    labels = split.labels.cpu()

    def named(label: int) -> str:
        return data.class_names[label] if data.class_names else str(label)

    images = [
        {
            "picture": base64.b64encode(thumbnail(data.images[index])).decode(),
            "name": data.names[index] if data.names else str(index),
            "given": named(int(given[index])),
            "label": named(int(labels[index])),
            "score": float(split.scores[index]),
        }
        for index in order.tolist()
    ]
    return {"points": points, "images": images}


def thumbnail(image: torch.Tensor) -> bytes:
    """Return a uint8 image (C, H, W) as a PNG of at most 96 pixels a side."""
    pixels = image.cpu().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3])
    picture.thumbnail((96, 96))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
