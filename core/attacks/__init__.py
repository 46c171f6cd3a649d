"""Attacks: one file each; each declares its parameters and stamps its trigger."""
