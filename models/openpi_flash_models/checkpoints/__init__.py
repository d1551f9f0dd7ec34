"""Checkpoints: where they come from, how they are laid out on disk, how one layout becomes another."""
