"""Checkpoints: what they hold, and files that are written whole or not at all."""
