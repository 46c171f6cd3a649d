"""An untrusted dataset in, a cleansed one out."""
