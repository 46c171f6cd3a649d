"""An untrusted dataset in, a model trained safely on it out."""
