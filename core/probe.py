"""A last layer fitted to frozen features, anew (linear probe) or from where it is; and an encoder's backbone as a classifier that can be probed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from core.activations import collect
from core.architectures import named
from core.architectures.supcontrast import SupContrast
from core.classifier import Classifier
from core.images import ImageSet
from core.run import Run
from core.training import batches


def probe(run: Run, name: str, model: Classifier, labelled: ImageSet) -> list[float]:
    """Train `model.head` anew on the features of labelled images, in place, as a resumable stage; return each epoch's mean loss. See `fit_head`."""
    assert labelled.labels is not None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model.head.reset_parameters()
    return fit_head(run, name, model, labelled, labelled.labels)


def adapt(run: Run, name: str, model: Classifier, images: ImageSet, original: Classifier) -> list[float]:
    """Train `model.head` on, in place, until it predicts on `images` what `original` (left in eval mode) does; no label is used. See `fit_head`."""
    return fit_head(run, name, model, images, collect(run, original.eval(), images).softmax(1))


def fit_head(
    run: Run, name: str, model: Classifier, data: ImageSet, wanted: torch.Tensor, *, epochs: int = 200, rate: float = 1e-3, batch_size: int = 128
) -> list[float]:
    """Fit `model.head` from where it is, in place: multinomial logistic regression with Adam (CBD's linear probe).

    Features are computed once, in eval mode and without augmentation. Raises `OutputsNotFinite`.

    Args:
        wanted: labels (N,) int64, or probabilities (N, classes).
    """
    model.eval()
    features = collect(run, model.features, data)
    generator = run.generator(name)
    model.head.requires_grad_(True)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=rate)
    history: dict[str, list[float]] = {"loss": []}
    for _ in run.stage(name, total=epochs, head=model.head, optimizer=optimizer, generator=generator, history=history):
        total = torch.zeros((), device=run.device)
        for chosen in batches(len(data), batch_size, generator):
            here = chosen.to(run.device)
            loss = F.cross_entropy(model.head(features[here]), wanted[here])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
        history["loss"].append(float(total) / len(data))
    return history["loss"]


def backbone_of(encoder: Classifier, classes: int) -> Classifier:
    """Return an encoder's backbone as a classifier with an untrained head: the projection is left out, its features are the pooled maps."""
    inner = _inner(encoder)
    described = named(f"resnet{encoder.architecture.options['depth']}-cifar", classes=classes, channels=encoder.architecture.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = described.build()
    network.load_state_dict({**network.state_dict(), **inner.state_dict()})
    return Classifier(network, described, encoder.preprocessing).to(encoder.mean.device).eval()


def with_backbone(encoder: Classifier, changed: Classifier) -> Classifier:
    """Return the encoder, projection and all, with the backbone of a classifier that `backbone_of` made."""
    result = encoder.frozen_copy()
    state = {name: value for name, value in changed.network.state_dict().items() if not name.startswith(f"{changed.network.head_name}.")}
    _inner(result).load_state_dict(state)
    return result


def _inner(encoder: Classifier) -> torch.nn.Module:
    assert isinstance(encoder.network, SupContrast)
    return encoder.network.encoder
