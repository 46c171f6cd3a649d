"""What can go wrong in the engine that a user can do something about."""

from __future__ import annotations


class EngineError(Exception):
    """An outcome the engine reports instead of a result; the job ends as `failed` and is not retried."""

    code = "internal"

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def as_dict(self) -> dict[str, str]:
        """Return `{code, message, advice}` for the event stream."""
        return {"code": self.code, "message": self.message, "advice": self.advice}


class BadJob(EngineError):
    """The job description cannot be carried out as written."""

    code = "invalid_job"


class ArchitectureUnknown(EngineError):
    """No architecture of the catalogue has these keys and shapes."""

    code = "architecture_unknown"


class ArchitectureMismatch(EngineError):
    """The tensors contradict the architecture that their names announce."""

    code = "architecture_mismatch"


class BadWeights(EngineError):
    """The weights cannot be used: NaN or infinite values."""

    code = "weights_not_finite"


class BadDataset(EngineError):
    """The images or labels do not fit the model or the method."""

    code = "dataset_invalid"


class BadRecipe(EngineError):
    """An attack cannot be carried out on these images as it is written."""

    code = "attack_invalid"


class NotEnoughCleanData(EngineError):
    """The method needs more clean images than were given."""

    code = "not_enough_clean_data"


class LabelsMissing(EngineError):
    """The method needs the clean images' labels and there are none."""

    code = "labels_missing"


class ClassMissing(EngineError):
    """The method needs labelled images of every class."""

    code = "class_missing"


class OneClassOnly(EngineError):
    """The training set has images of one class only."""

    code = "one_class_only"


class ClassTooSmall(EngineError):
    """A class of the training set has too few images to be judged."""

    code = "class_too_small"


class LayerMissing(EngineError):
    """The architecture lacks the layers that the method works on."""

    code = "layer_missing"


class TargetInvalid(EngineError):
    """The given target is not one of the model's classes."""

    code = "target_invalid"


class TriggerNotFound(EngineError):
    """The inversion ended without a trigger that works."""

    code = "trigger_not_found"


class NothingLeft(EngineError):
    """Pruning would leave a layer without channels."""

    code = "nothing_left"


class SplitEmpty(EngineError):
    """A split has no image in a part that a training needs."""

    code = "split_empty"


class OutputsNotFinite(EngineError):
    """A model answers images with NaN or infinite numbers."""

    code = "outputs_not_finite"


class OutOfMemory(EngineError):
    """The job needs more memory than its worker has."""

    code = "out_of_memory"


class Diverged(EngineError):
    """A loss or a weight became NaN or infinite while training."""

    code = "diverged"


class TargetNotFound(EngineError):
    """No target class was given and none stood out."""

    code = "target_not_found"


class Cancelled(Exception):
    """The job was asked to stop; what was reached is in the last checkpoint."""
