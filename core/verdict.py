"""What to call the result of a purification: it must not have made the model worse, and no known trigger may still work."""

from __future__ import annotations

from typing import Any

# A method may cost this much accuracy; a class may too, before the report warns.
LOSS = 0.05
# How much more often a trigger may still lead to the target than the same images do without it.
LEFT = 0.1
# Share of images that a recovered trigger may still send to its class, with those that go there anyway.
LEFT_OF_RECOVERED = 0.2
# Share of unlabelled clean images on which the purified model must still agree with the suspect one.
AGREEMENT = 0.85
# Fewer new errors than this are chance, however few images were kept aside.
LEAST_ERRORS = 3

LESS = (
    "Lower the learning rate or the epochs, give more clean images, leave mirrored images out where they mean something else "
    "(`mirror`, where the method has it), or try ft_sam."
)
# A trigger on fewer images than this shows nothing, whatever comes of it.
LEAST_TRIED = 30
# A rate that was not measured.
NOTHING: dict[str, Any] = {"value": None}

UNTRIED = "accuracy was kept; no trigger was given or recovered, so whether a backdoor is left was not measured"
ADVICE = {
    "untried": "Inspect the result with combined, declare the attack if you know it, with test images enough to measure it, or purify with mcldef, which recovers a trigger "
    "and tries it afterwards.",
    "accuracy": LESS,
    "agreement": LESS,
    "recovered_trigger": "Train for more epochs, or try ft_sam with `learning_rate` 0.1, nad or ibau, which do not depend on one recovered trigger.",
    "asr": "A mask may express the trigger in part or not at all: try more `rounds` of mcldef with more `growth`, or ft_sam with `learning_rate` 0.1, ibau or sau.",
}


def judge(before: dict[str, Any] | None, after: dict[str, Any] | None, aside: dict[str, Any] | None, recovered: dict[str, Any] | None) -> dict[str, Any]:
    """Return `{verdict, reasons, advice}` of a purification: `purified`, `not_purified` or `not_measured`.

    Accuracy alone does not make a model purified: a trigger must have been tried, a given or a recovered one, that worked before, on images enough.

    Args:
        before, after: `evaluation.evaluate` of the test set, if there is one.
        aside: rates `before` and `after` on clean images that the method did not see, with `what` they are of: "accuracy" or "agreement".
        recovered: by label, rates `before` and `after` of the recovered triggers.
    """
    found: list[tuple[str, str]] = []
    measured = False
    if before is not None and after is not None:
        measured = True
        found += _accuracy(before["ba"], after["ba"], "the test set")
    if after is not None and after.get("asr", NOTHING)["value"] is not None:
        measured = True
        now, was = after["asr"]["value"], (before or {}).get("asr", NOTHING)["value"]
        anyway = after.get("asr_without_trigger", NOTHING)["value"] or 0.0
        if now - anyway > LEFT:
            found.append(("asr", f"the attack still succeeds on {now:.1%} of the triggered images, against {anyway:.1%} of them without the trigger"))
        elif was is not None and now > was + 0.02:
            found.append(("asr", f"the attack succeeds more often than before, {now:.1%} after {was:.1%}"))
    if aside is not None:
        measured = True
        if aside["what"] == "accuracy":
            found += _accuracy(aside["before"], aside["after"], "the clean images kept aside")
        elif aside["after"]["value"] < AGREEMENT and aside["after"]["n"] - aside["after"]["hits"] >= LEAST_ERRORS:
            found.append(("agreement", f"the model agrees with the suspect one on only {aside['after']['value']:.1%} of the clean images kept aside"))
    for label, rates in (recovered or {}).items():
        measured = True
        if rates["after"]["value"] is not None and rates["after"]["value"] > LEFT_OF_RECOVERED:
            found.append(("recovered_trigger", f"the recovered trigger still sends {rates['after']['value']:.1%} of the images to class {label}"))
    if found:
        advice = " ".join(dict.fromkeys(ADVICE[kind] for kind, _ in found))
        return {"verdict": "not_purified", "reasons": [reason for _, reason in found], "advice": advice}
    if not measured:
        return {"verdict": "not_measured", "reasons": ["there was nothing to measure the result with"], "advice": "Give clean images or a test set."}
    shown, doubtful = _tried(before, after, recovered)
    if not shown:
        return {"verdict": "not_measured", "reasons": doubtful or [UNTRIED], "advice": ADVICE["untried"]}
    return {"verdict": "purified", "reasons": shown + doubtful, "advice": ""}


def _tried(before: dict[str, Any] | None, after: dict[str, Any] | None, recovered: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """Return a sentence for each trigger that was tried on the result, and one for each of which that shows nothing.

    A model is purified of the triggers that were tried, and of no other that is known: not of one that did nothing before.
    """
    attack = {when: (of or {}).get("asr", NOTHING) for when, of in (("before", before), ("after", after))}
    anyway = (before or {}).get("asr_without_trigger", NOTHING)["value"] or 0.0
    tried = [
        *((f"the recovered trigger sends {{}} of the images to class {label}", rates, LEFT_OF_RECOVERED) for label, rates in (recovered or {}).items()),
        ("the attack succeeds on {} of the triggered images", attack, anyway + LEFT),
    ]
    shown, doubtful = [], []
    for sentence, rates, idle in tried:
        now, was = rates["after"]["value"], rates["before"]["value"]
        if now is None:
            continue
        said = sentence.format(f"{now:.1%}") + (f", {was:.1%} before" if was is not None else "")
        if was is not None and was <= idle:
            doubtful.append(f"{said}: a trigger that did nothing before does not show whether a backdoor is left")
        elif rates["after"]["n"] < LEAST_TRIED:
            doubtful.append(f"{said}: {rates['after']['n']} images are too few to show whether a backdoor is left")
        else:
            shown.append(said)
    return shown, doubtful


def _accuracy(before: dict[str, Any], after: dict[str, Any], where: str) -> list[tuple[str, str]]:
    lost = before["value"] - after["value"]
    if lost <= LOSS or before["hits"] - after["hits"] < LEAST_ERRORS:
        return []
    return [("accuracy", f"accuracy on {where} fell from {before['value']:.1%} to {after['value']:.1%}")]


def losers(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the classes that lost more than five points of accuracy, `{class, before, after}` each, the worst first."""
    pairs = enumerate(zip(before["per_class"], after["per_class"], strict=True))
    lost = [
        {"class": label, "before": was, "after": now}
        for label, (was, now) in pairs
        if was["n"] and was["value"] - now["value"] > LOSS and was["hits"] - now["hits"] >= LEAST_ERRORS
    ]
    return sorted(lost, key=lambda one: float(one["after"]["value"] - one["before"]["value"]))
