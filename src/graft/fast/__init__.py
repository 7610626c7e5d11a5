"""Paths that do only the needed work; each falls back by rule, and none changes a result."""
