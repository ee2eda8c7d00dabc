"""Evaluation: what validation and test measure, and how results are written."""
