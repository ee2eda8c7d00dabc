"""Is an answer right? Extraction, exact comparison, and math-verify in workers that can be killed."""
