"""Adapter folders in and out."""
