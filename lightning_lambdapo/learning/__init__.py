"""Learning: from advantages to one optimizer update."""
