"""Nodes of the reporting pipeline."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.ranker import Ranker
else:
    Table = Ranker = Any


def summarise_run(
    validation_report: list[dict[str, Any]],
    candidate: Ranker,
    predictions: Table,
    metrics: dict[str, Any],
    release: dict[str, Any],
    decision: dict[str, Any],
    published_embeddings: dict[str, Any],
    data_hash: str,
) -> dict[str, Any]:
    """Gather a run's figures under the keys of ``run_summary.json``."""
    rows: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for table in validation_report:
        counts = table["rows"]
        rows.update({n: counts[n] for n in ("in", "clean", "quarantined", "duplicates")})
        reasons.update({f"{table['table']}: {r}": n for r, n in counts["reasons"].items()})
    splits = predictions.group_by("split").agg(rows=predictions.count()).to_pyarrow().to_pylist()
    sizes = {"train": candidate.provenance["rows"]["train"]}
    sizes |= {split["split"]: split["rows"] for split in splits}
    return {
        "rows": {**rows, "reasons": dict(reasons)},
        "sizes": {name: sizes.get(name, 0) for name in ("train", "validation", "test")},
        "metrics": metrics,
        "gate": {"promoted": release["promoted"], "reasons": release["reasons"]},
        "version": release["version"],
        "champion": release["champion"],
        "bento_tag": release["bento_tag"],
        "embeddings": published_embeddings["rows"],
        "drift": {name: decision[name] for name in ("retrain", "reasons", "alerts")},
        "seed": candidate.config.seed,
        "model": candidate.config.model,
        "parameters": candidate.provenance["parameters"],
        "data_hash": data_hash,
        "spec_hash": candidate.spec.hash,
        "hardware": candidate.provenance["hardware"],
    }
