"""The comparison pipeline."""

from fathom.pipelines.comparison.pipeline import create_pipeline

__all__ = ["create_pipeline"]
