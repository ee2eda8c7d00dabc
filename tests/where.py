"""The device that tests run on: ``LAMBDAPO_TEST_DEVICE`` (``cpu`` without it, or ``cuda``)."""

import os

import torch

DEVICE = torch.device(os.environ.get("LAMBDAPO_TEST_DEVICE", "cpu"))


def accelerator() -> str:
    """Lightning's name for ``DEVICE``. Several ranks are gloo processes on the CPU."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return "cpu" if several or DEVICE.type == "cpu" else "gpu"
