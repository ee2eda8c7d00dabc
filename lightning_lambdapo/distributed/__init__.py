"""Several processes: strategies, sums over ranks, randomness that does not depend on the rank."""
