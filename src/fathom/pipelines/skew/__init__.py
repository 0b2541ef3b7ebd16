"""The skew pipeline."""

from fathom.pipelines.skew.pipeline import create_pipeline

__all__ = ["create_pipeline"]
