"""Checkpoints: what they contain, and files that are written whole or not at all."""
