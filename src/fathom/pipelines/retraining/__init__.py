"""The retraining pipeline."""

from fathom.pipelines.retraining.pipeline import create_pipeline

__all__ = ["create_pipeline"]
