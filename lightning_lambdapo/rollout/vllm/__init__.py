"""Rollouts by vLLM: inside the training process, or by servers."""
