"""Fathom: a production recommender on jointly trained Wide & Deep models."""

__version__ = "0.1.0"
