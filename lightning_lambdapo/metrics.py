"""torchmetrics for reinforcement learning on reasoning tasks, for any Lightning project."""

from lightning_lambdapo.evaluation.metrics import GroupDiagnostics, MajorityAtK, PassAtK, SemanticDensity

__all__ = ["GroupDiagnostics", "MajorityAtK", "PassAtK", "SemanticDensity"]
