"""The pipelines of a run: thin nodes at the border between Kedro and the modules.

Modules that are slow to import are imported inside the nodes, so that listing pipelines is fast.
"""
