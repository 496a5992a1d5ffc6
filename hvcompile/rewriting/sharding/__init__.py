"""Splitting the sequence of a trunk over ranks."""
