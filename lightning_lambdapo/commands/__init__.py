"""The commands of ``lambdapo``: LightningCLI's (`main`), and one module for each of the others."""
