"""``python -m lightning_lambdapo`` is the ``lambdapo`` command."""

from lightning_lambdapo.commands.main import main

if __name__ == "__main__":
    main()
