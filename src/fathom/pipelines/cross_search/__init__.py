"""The cross search pipeline."""

from fathom.pipelines.cross_search.pipeline import create_pipeline

__all__ = ["create_pipeline"]
