"""The monitoring pipeline."""

from fathom.pipelines.monitoring.pipeline import create_pipeline

__all__ = ["create_pipeline"]
