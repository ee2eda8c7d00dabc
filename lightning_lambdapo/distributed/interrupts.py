"""SIGTERM with several ranks: all stop after the same training step, whichever rank received it."""

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lambdapo.distributed.lightning_internals import sigterm_handler
from lightning_lambdapo.distributed.parallel import gather_objects, world_size


class Interrupts:
    """Replaces Lightning's SIGTERM handler when several ranks train.

    Lightning's handler makes a collective inside the signal handler, at any point of the step. If another rank received
    no signal or is at another point, ranks wait for the process group's timeout. This handler only records the request.
    Ranks exchange their requests at the end of each training step.
    """

    def __init__(self) -> None:
        self.requested = False

    def install(self, trainer: Trainer) -> None:
        """Replace Lightning's handler until Lightning's teardown. Other handlers of SIGTERM stay."""
        self.requested = False
        if world_size() < 2 or threading.current_thread() is not threading.main_thread():
            return
        theirs = sigterm_handler(trainer)
        handlers: list[Any] = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])

        def note(signum: int, frame: FrameType | None) -> None:
            if not self.requested and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signum)  # pass it on to the ranks that this one started
            self.requested = True

        handlers[:] = [note if handler == theirs else handler for handler in handlers]

    def stop_together(self) -> None:
        """Stop on all ranks if any received SIGTERM. A collective, at the end of a training step.

        Raises:
            SIGTERMException: a rank received SIGTERM. Callbacks then save what they save on exceptions.
        """
        if world_size() > 1 and any(gather_objects(self.requested)):
            raise SIGTERMException
