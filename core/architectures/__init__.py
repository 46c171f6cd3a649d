"""The architectures the engine can rebuild from a checkpoint: one file a family, found by walking this folder."""

from core.architectures.recognise import Architecture, named, names, recognise

__all__ = ["Architecture", "named", "names", "recognise"]
