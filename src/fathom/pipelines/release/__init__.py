"""The release pipeline."""

from fathom.pipelines.release.pipeline import create_pipeline

__all__ = ["create_pipeline"]
