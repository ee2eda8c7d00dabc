"""Reading what a run has left behind, and writing its exports."""
