"""A model and a few clean images in, a purified model out."""
