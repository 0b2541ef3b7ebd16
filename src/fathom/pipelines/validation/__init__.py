"""The validation pipeline."""

from fathom.pipelines.validation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
