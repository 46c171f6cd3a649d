"""Linear probe: a new last layer on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from core.classifier import Classifier
from core.images import ImageSet, as_floats
from core.run import Run
from core.training import batches


def probe(run: Run, name: str, model: Classifier, labelled: ImageSet, *, epochs: int = 200, rate: float = 1e-3, batch_size: int = 128) -> list[float]:
    """Train `model.head` anew on the features of labelled images, in place, as a resumable stage; return each epoch's mean loss.

    Features are computed once, in eval mode and without augmentation; multinomial logistic regression with Adam (CBD's linear probe).
    """
    assert labelled.labels is not None
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.features(as_floats(chunk)) for chunk in labelled.images.split(500)])
    generator = run.generator(name)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model.head.reset_parameters()
    model.head.requires_grad_(True)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=rate)
    history: dict[str, list[float]] = {"loss": []}
    for _ in run.stage(name, total=epochs, head=model.head, optimizer=optimizer, generator=generator, history=history):
        total = torch.zeros((), device=run.device)
        for chosen in batches(len(labelled), batch_size, generator):
            here = chosen.to(run.device)
            loss = F.cross_entropy(model.head(features[here]), labelled.labels[here])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
        history["loss"].append(float(total) / len(labelled))
    return history["loss"]
