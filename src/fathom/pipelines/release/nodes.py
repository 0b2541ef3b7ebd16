"""Nodes of the release pipeline."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
from datetime import datetime, timedelta, timezone
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


log = logging.getLogger(__name__)


class ReleaseConfig(BaseModel):
    """What travels with a ranker, and how fast it must answer (``params:release``).

    Args:
        golden_rows: recorded test rows that every copy of the ranker must score alike.
        reference_rows: about so many rows, of whole requests, that drift is measured against.
        reference_days: they are of the first days after the training data, so many of them. Two
            windows of monitoring are the least from which thresholds can be calibrated.
        seed: of the recorded rows' sample.
        max_p99_ms: 99 in 100 golden requests must be answered within this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    golden_rows: int = Field(default=64, ge=1, le=10_000)
    reference_rows: int = Field(default=20_000, ge=100)
    reference_days: int = Field(default=28, ge=1)
    seed: int = Field(default=0, ge=0)
    max_p99_ms: float = Field(default=500.0, gt=0)


log = logging.getLogger(__name__)


def write_card(
    released: Ranker, metrics: dict[str, Any], slices: dict[str, Any], judgement: dict[str, Any]
) -> str:
    """The model card, in Markdown."""
    from fathom.report import model_card

    return model_card(released, metrics, slices, judgement)


def register(
    released: Ranker,
    training_state: dict[str, Any],
    candidate: Ranker,
    validation_frame: Table,
    test_frame: Table,
    metrics: dict[str, Any],
    model_card: str,
    config: ReleaseConfig,
    registry: str,
) -> dict[str, Any]:
    """Add a ranker to the registry, with its golden requests and its reference.

    What its training learnt is kept beside it, for the next one to start from.

    Args:
        released: what is registered: the candidate, or what it became when it had caught up.
        candidate: what was judged. It scores the reference, which it has not learnt from.

    Returns:
        The version, as a receipt for its files.
    """
    from fathom import drift
    from fathom.checkpoint import digest
    from fathom.feature_store import frame_of
    from fathom.ranker import rows_of_frame
    from fathom.registry import Registry

    spec = released.spec
    draw = np.random.default_rng(config.seed)
    golden = _sample(test_frame, config.golden_rows, draw)
    frame = frame_of(golden)
    requests = {
        "rows": rows_of_frame(frame, spec, range(len(golden))),
        "probabilities": released.score(frame).tolist(),
        "timestamp": test_frame[EVENT_TIMESTAMP].max().to_pyarrow().as_py().isoformat(),
    }
    held_out = validation_frame.union(test_frame)
    moment = held_out[EVENT_TIMESTAMP]
    begin = moment.min().to_pyarrow().as_py()
    held_out = held_out.filter(moment < begin + timedelta(days=config.reference_days))
    watched = held_out.select(*drift.watched_columns(spec))
    reference = drift.sampled(watched, spec, config.reference_rows).to_pyarrow()
    scores = candidate.score(frame_of(reference))
    versions = Registry(Path(registry))
    version = versions.register(
        lambda folder: released.save(
            folder,
            {
                "golden.json": json.dumps(requests),
                "reference.parquet": _parquet(reference.append_column("probability", [scores])),
                "metrics.json": json.dumps(metrics, indent=2),
                "model_card.md": model_card,
            },
        )
    )
    learnt = Path(training_state["folder"])
    if digest(learnt) == released.provenance.get("state"):
        versions.keep_state(version, learnt)
    else:
        log.warning("%s is of another training: nothing can start warm from %s", learnt, version)
    return {"version": version, "covers": [str(versions.path(version))]}


def package(registered: dict[str, Any], bentofile: str, registry: str) -> dict[str, Any]:
    """Build the version's Bento.

    Args:
        bentofile: what is packed; a change of it is a reason to pack again.

    Returns:
        The Bento's tag and the model's, as a receipt for BentoML's files.
    """
    from fathom import packaging
    from fathom.registry import Registry

    folder = Registry(Path(registry)).path(registered["version"])
    tag = packaging.import_ranker(folder, registered["version"])
    bento = packaging.build_bento(tag, Path.cwd())
    return {
        "tag": bento,
        "model": tag,
        "covers": [_stored("models", tag), _stored("bentos", bento)],
    }


def dry_run(registered: dict[str, Any], bento: dict[str, Any], registry: str) -> dict[str, Any]:
    """Run the Bento as a process, compare its answers with the golden ones and time them.

    Returns:
        `fathom.packaging.DryRun`; or a ``fault``, for which the verdict refuses the version, in a
        receipt that has expired, so that the next run tries again.
    """
    from fathom import packaging
    from fathom.registry import Registry

    folder = Registry(Path(registry)).path(registered["version"])
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    try:
        return dataclasses.asdict(packaging.dry_run(bento["tag"], golden))
    except packaging.DryRunError as error:
        log.error("the dry run failed: %s", error)
        fault = str(error).partition("\n")[0].rstrip(":")
        return {"fault": fault, "expires": datetime.now(timezone.utc).isoformat()}


def conclude(
    judgement: dict[str, Any], dry_run: dict[str, Any], config: ReleaseConfig
) -> tuple[dict[str, Any], str, str]:
    """Join what the gate and the dry run say, and write it down.

    Returns:
        The gate's verdict with the Bento's checks added; the same as Markdown and as a page.
    """
    from fathom import verdict

    bound = f"{config.max_p99_ms:g} ms"
    if fault := dry_run.get("fault"):
        checks = [f"fail: the built Bento failed its dry run: {fault}"]
    else:
        checks = ["pass: the built Bento answers as in training"]
        # A time that is in order is not told: it would be another one in every run.
        checks.append(
            f"pass: it answers 99 in 100 golden requests within {bound}"
            if dry_run["p99_ms"] <= config.max_p99_ms
            else f"fail: it answers 99 in 100 golden requests within {dry_run['p99_ms']:.1f} ms "
            f"only; release.max_p99_ms allows {bound}"
        )
    passed = judgement["promoted"] and all(check.startswith("pass") for check in checks)
    found = judgement | {
        "promoted": passed,
        "reasons": [*judgement["reasons"], *checks],
        "dry_run": dry_run,
        "max_p99_ms": config.max_p99_ms,
    }
    return found, verdict.text(found), verdict.page(found)


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
    version, judged = registered["version"], verdict["challenger"]
    if verdict["promoted"]:
        why = [] if version == judged else [f"caught up from {judged}, which was judged"]
        versions.promote(version, "; ".join([*why, *verdict["reasons"]]))
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
