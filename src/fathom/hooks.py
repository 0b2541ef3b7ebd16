"""Kedro hooks: how long each stage took, and the closing table."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl

from fathom import files
from fathom.runner import ALWAYS


class RunSummary:
    """Adds times and memory to the figures of the reporting pipeline.

    A run without that pipeline (``kedro run --pipelines …``) writes no summary.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._start = 0.0

    @hook_impl
    def before_pipeline_run(self) -> None:
        self._seconds.clear()
        self._began.clear()
        self._start = time.perf_counter()

    @hook_impl
    def before_dataset_loaded(self, node: Any) -> None:
        """A node's time begins with its inputs (they are loaded before the node's own hook)."""
        self._began.setdefault(node.name, time.perf_counter())

    @hook_impl
    def before_node_run(self, node: Any) -> None:
        self._began.setdefault(node.name, time.perf_counter())

    @hook_impl
    def after_dataset_saved(self, node: Any) -> None:
        self._clock(node)

    @hook_impl
    def after_node_run(self, node: Any) -> None:
        self._clock(node)

    def _clock(self, node: Any) -> None:
        now = time.perf_counter()
        took = now - self._began.get(node.name, now)
        self._seconds[node.name] = self._seconds.get(node.name, 0.0) + took
        self._began[node.name] = now

    @hook_impl
    def after_pipeline_run(self, pipeline: Any, catalog: Any) -> None:
        if "run_figures" not in pipeline.outputs() | pipeline.all_outputs():
            return
        from fathom.hardware import peak_memory_mb
        from fathom.report import closing_table

        total = time.perf_counter() - self._start
        path = Path(catalog.load("params:run_summary"))
        summary: dict[str, Any] = {
            **catalog.load("run_figures"),
            "seconds": self._by_stage(pipeline) | {"total": round(total, 1)},
            "unchanged": self._unchanged(pipeline),
            "peak_memory_mb": peak_memory_mb(),
        }
        files.write_json(path, summary)
        pages = {"summary": str(path)} | catalog.load("params:pages")
        # On standard output, apart from the log: it is what the run answers.
        sys.stdout.write(closing_table(summary, pages))

    def _by_stage(self, pipeline: Any) -> dict[str, float]:
        seconds: dict[str, float] = defaultdict(float)
        for node in pipeline.nodes:
            seconds[_stage(node)] += self._seconds.get(node.name, 0.0)
        return {stage: round(taken, 1) for stage, taken in seconds.items()}

    def _unchanged(self, pipeline: Any) -> dict[str, list[str]]:
        """Nodes that the runner had no reason to run, and stages of which no node had to."""
        skipped = [node for node in pipeline.nodes if node.name not in self._seconds]
        ran = [node for node in pipeline.nodes if node.name in self._seconds]
        busy = {_stage(node) for node in ran if ALWAYS not in node.tags}
        return {
            "stages": sorted({_stage(node) for node in skipped} - busy),
            "nodes": sorted(node.name for node in skipped),
        }


def _stage(node: Any) -> str:
    """The pipeline that a node is tagged with."""
    return next(iter(sorted(node.tags - {ALWAYS})), str(node.name))
