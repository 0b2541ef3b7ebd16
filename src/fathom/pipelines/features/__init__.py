"""The features pipeline."""

from fathom.pipelines.features.pipeline import create_pipeline

__all__ = ["create_pipeline"]
