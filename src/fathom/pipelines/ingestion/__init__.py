"""The ingestion pipeline."""

from fathom.pipelines.ingestion.pipeline import create_pipeline

__all__ = ["create_pipeline"]
