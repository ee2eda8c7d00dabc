"""Is an answer right? Extraction, exact comparison, and math-verify in workers that can be killed."""

from lightning_lambdapo.rewards.verifier.pool import MathVerifier, Verdict

__all__ = ["MathVerifier", "Verdict"]
