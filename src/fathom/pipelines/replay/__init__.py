"""The replay pipeline."""

from fathom.pipelines.replay.pipeline import create_pipeline

__all__ = ["create_pipeline"]
