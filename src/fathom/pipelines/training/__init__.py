"""The training pipeline."""

from fathom.pipelines.training.pipeline import create_pipeline

__all__ = ["create_pipeline"]
