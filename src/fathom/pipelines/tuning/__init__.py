"""The tuning pipeline."""

from fathom.pipelines.tuning.pipeline import create_pipeline

__all__ = ["create_pipeline"]
