"""torchmetrics of reasoning reinforcement learning, for any Lightning project."""

from lightning_lambdapo.evaluation.metrics import GroupDiagnostics, MajorityAtK, PassAtK, SemanticDensity

__all__ = ["GroupDiagnostics", "MajorityAtK", "PassAtK", "SemanticDensity"]
