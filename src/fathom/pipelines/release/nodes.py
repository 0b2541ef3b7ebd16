"""Nodes of the release pipeline."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fathom.feature_store import FeatureStoreConfig
from fathom.spec import EVENT_TIMESTAMP

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.ranker import Ranker
else:
    Table = Ranker = Any


class ReleaseConfig(BaseModel):
    """What travels with a ranker (``params:release``).

    Args:
        golden_rows: recorded test rows that every copy of the ranker must score alike.
        reference_rows: about so many validation rows, of whole requests, that drift is measured
            against.
        seed: of the recorded rows' sample.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    golden_rows: int = Field(default=64, ge=1, le=10_000)
    reference_rows: int = Field(default=20_000, ge=100)
    seed: int = Field(default=0, ge=0)


def write_card(
    candidate: Ranker, metrics: dict[str, Any], slices: dict[str, Any], verdict: dict[str, Any]
) -> str:
    """The model card, in Markdown."""
    from fathom.report import model_card

    return model_card(candidate, metrics, slices, verdict)


def register(
    candidate: Ranker,
    predictions: Table,
    validation_frame: Table,
    test_frame: Table,
    metrics: dict[str, Any],
    model_card: str,
    config: ReleaseConfig,
    registry: str,
) -> dict[str, Any]:
    """Add the candidate to the registry, with its golden requests and its reference.

    Returns:
        Its version, as a receipt for its files.
    """
    from fathom import drift
    from fathom.feature_store import frame_of
    from fathom.ranker import rows_of_frame
    from fathom.registry import Registry

    spec = candidate.spec
    draw = np.random.default_rng(config.seed)
    golden = _sample(test_frame, config.golden_rows, draw)
    frame = frame_of(golden)
    requests = {
        "rows": rows_of_frame(frame, spec, range(len(golden))),
        "probabilities": candidate.score(frame).tolist(),
        "timestamp": test_frame[EVENT_TIMESTAMP].max().to_pyarrow().as_py().isoformat(),
    }
    watched = validation_frame.select(*drift.watched_columns(spec))
    reference = drift.sampled(watched, spec, config.reference_rows).to_pyarrow()
    scores = candidate.score(frame_of(reference))
    versions = Registry(Path(registry))
    version = versions.register(
        lambda folder: candidate.save(
            folder,
            {
                "golden.json": json.dumps(requests),
                "reference.parquet": _parquet(reference.append_column("probability", [scores])),
                "metrics.json": json.dumps(metrics, indent=2),
                "model_card.md": model_card,
            },
        )
    )
    return {"version": version, "covers": [str(versions.path(version))]}


def package(registered: dict[str, Any], bentofile: str, registry: str) -> dict[str, Any]:
    """Build the version's Bento, run it as a process, and compare its answers.

    Args:
        bentofile: what is packed; a change of it is a reason to pack again.

    Returns:
        The Bento's tag and what the dry run found, as a receipt for BentoML's files.

    Raises:
        DryRunError: the built Bento does not start, or does not score as in training.
    """
    from fathom import packaging
    from fathom.registry import Registry

    folder = Registry(Path(registry)).path(registered["version"])
    tag = packaging.import_ranker(folder, registered["version"])
    bento = packaging.build_bento(tag, Path.cwd())
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    found = packaging.dry_run(bento, golden)
    return {
        "tag": bento,
        "model": tag,
        "dry_run": {"max_difference": found.max_difference},
        "covers": [_stored("models", tag), _stored("bentos", bento)],
    }


def promote(
    registered: dict[str, Any],
    verdict: dict[str, Any],
    bento: dict[str, Any],
    published_embeddings: dict[str, Any],
    registry: str,
) -> dict[str, Any]:
    """Make the version champion if the gate let it pass.

    Its embeddings are published by then, so the pointer switches both at once.

    Returns:
        The version, whether it is champion, why, and who is champion now, as a receipt for the
        champion's pointer.
    """
    from fathom.registry import Registry

    versions = Registry(Path(registry))
    if verdict["promoted"]:
        versions.promote(registered["version"], "; ".join(verdict["reasons"]))
    return {
        "version": registered["version"],
        "promoted": verdict["promoted"],
        "reasons": verdict["reasons"],
        "bento_tag": bento["tag"],
        "champion": versions.champion(),
        "covers": [str(Path(registry) / "champion.json")],
    }


def publish_embeddings(
    registered: dict[str, Any],
    verdict: dict[str, Any],
    bento: dict[str, Any],
    online_state: dict[str, Any],
    config: FeatureStoreConfig,
    registry: str,
) -> dict[str, Any]:
    """Publish a coming champion's user and item embeddings, beside those of earlier champions.

    Returns:
        Rows by view; none if the gate refused the candidate or it has no embeddings of the keys.
    """
    from fathom.feature_store import FeatureRepo
    from fathom.registry import Registry

    version = registered["version"]
    versions = Registry(Path(registry))
    tables = versions.load(version).published_embeddings() if verdict["promoted"] else {}
    if tables:
        repo = FeatureRepo(config, Path.cwd())
        repo.publish_embeddings(version, tables, keep=versions.champions())
    return {
        "version": version,
        "rows": {name: len(keys) for name, (_, keys, _) in tables.items()},
    }


def _stored(store: str, tag: str) -> str:
    """Where an item of one of BentoML's stores lies."""
    return os.path.relpath(Path(os.environ["BENTOML_HOME"], store, *tag.split(":")))


def _sample(table: Table, rows: int, draw: np.random.Generator) -> Any:
    """Rows at random, in the table's order; all if there are fewer."""
    read = table.to_pyarrow()
    chosen = draw.choice(len(read), size=min(rows, len(read)), replace=False)
    return read.take(np.sort(chosen))


def _parquet(table: Any) -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, coerce_timestamps="us", compression="zstd")
    return buffer.getvalue()
