"""The feature store pipeline."""

from fathom.pipelines.feature_store.pipeline import create_pipeline

__all__ = ["create_pipeline"]
