"""The defense engine: PyTorch in, PyTorch out. Knows no HTTP, no SQL, no queue and no settings."""
