"""Reading a run's files, and writing its exports."""
