"""The outcomes pipeline."""

from fathom.pipelines.outcomes.pipeline import create_pipeline

__all__ = ["create_pipeline"]
