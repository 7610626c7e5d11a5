"""Measurements of a task: how many dimensions it needs."""
