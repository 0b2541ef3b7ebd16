"""What a ranker answers: `/rank`, `/recommend`, `/predict` and `/model`, without HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fathom import api
from fathom.artifact import verify
from fathom.checking import (
    attribution_faults,
    bound_crosses,
    bound_terms,
    candidates_of,
    checked_frame,
)
from fathom.lookup import spread_frame
from fathom.metrics import metrics, took
from fathom.service_log import log
from fathom.serving import OnlineStore, ServingConfig
from fathom.spec import Column, FeatureSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fathom.encoding import Values
    from fathom.feature_log import FeatureLog
    from fathom.online import Known
    from fathom.ranker import Ranker
    from fathom.recommending import Pool
    from fathom.retrieval import Slots

_NO_TOWER = (
    "its spec has no deep column of user or of item, nothing was positive, or retrieval.factors "
    "was 0; /rank takes candidates"
)

Answer = dict[str, Any]
#: What a ranking's answers are for.
How = Literal["champion", "canary", "shadow"]


class RehearsalError(RuntimeError):
    """A ranking does not answer as it should."""


class Ranking:
    """One ranker and what it answers. Its methods run on the one scoring thread.

    Args:
        folder: the artifact.
        feature_store: see `OnlineStore`.
        others: rankings of the same service; they share a feature store if they can.
        how: what its answers are for. Those of a shadow are for nobody, and counted nowhere.

    Raises:
        ArtifactError: files of the artifact are missing or changed.
    """

    def __init__(
        self,
        folder: Path,
        feature_store: str | None,
        config: ServingConfig | None = None,
        others: Sequence[Ranking] = (),
        how: How = "champion",
    ) -> None:
        from fathom.fast import FastScorer
        from fathom.ranker import Ranker
        from fathom.recommending import Recommender

        config = config or ServingConfig()
        self.version, self.how = verify(folder), how
        self.ranker = Ranker.load(folder)
        self.scorer = FastScorer(self.ranker, precision=config.precision)
        self.recommender = Recommender(self.ranker, config.retrieval) if self.ranker.tower else None
        spec = self.ranker.spec
        shared = (other.store for other in others if other.ranker.spec.hash == spec.hash)
        self.store: OnlineStore = next(shared, None) or OnlineStore(
            feature_store, spec, config, self._load_attribution
        )
        self.log = self._feature_log(config)
        self._golden = api.golden(folder)
        self._examples = self._golden.rows[:5] or [api.example_row(self.ranker.spec)]
        log.info("ranker %s loaded from %s", self.version, folder)

    def close(self, *others: Ranking) -> None:
        """End the background work, but for what others share."""
        if all(other.store is not self.store for other in others):
            self.store.close()
        if self.log is not None:
            self.log.close()

    def rehearse(self, seconds: float = 60.0) -> None:
        """Answer the recorded requests, and wait for the feature store.

        Raises:
            RehearsalError: a probability is not the recorded one, or the feature store cannot be
                opened.
        """
        from fathom.ranker import TOLERANCE, frame_of_rows

        rows, recorded = self._golden.rows, np.array(self._golden.probabilities)
        if rows:
            frame = spread_frame(frame_of_rows(rows, self.ranker.spec), len(rows))
            reference, fast = self.ranker.score(frame), self.scorer.score(frame, len(rows))
            for found, bound in ((reference, TOLERANCE), (fast, self.scorer.tolerance)):
                wrong = int((~(np.abs(found - recorded) <= bound)).sum())  # NaN is wrong, too
                if wrong:
                    raise RehearsalError(
                        f"{wrong} of {len(rows)} golden probabilities of {self.version} differ by "
                        f"more than {bound:g}; register the version again"
                    )
        until = time.monotonic() + seconds
        while self.store.state == "opening" and time.monotonic() < until:
            time.sleep(0.05)
        if self.store.state in {"opening", "failed"}:
            raise RehearsalError(
                f"the feature store of {self.version} is {self.store.state}; run the "
                "feature_store pipeline with its spec"
            )

    def _load_attribution(self) -> None:
        """Import what ``/rank`` may be asked for; on the scoring thread it would hold all up."""
        if self.ranker.model.deep is not None:
            from fathom import attribution

            attribution.load()

    def _feature_log(self, config: ServingConfig) -> FeatureLog | None:
        if config.feature_log is None:
            return None
        from fathom.feature_log import FeatureLog

        return FeatureLog(
            Path(config.feature_log),
            self.ranker.spec,
            self.version,
            most_bytes=config.feature_log_mb << 20,
            segment_rows=config.segment_rows,
            segment_seconds=config.segment_seconds,
            dropped=lambda rows: metrics().unlogged_rows.inc(rows),
        )

    def predict(self, body: bytes, _: str) -> Answer:
        """Score rows of raw features."""
        rows = api.parse(api.PredictRequest, body).rows
        frame = checked_frame(rows, self.ranker.spec, "rows[{}]")
        bound_crosses(frame, self.ranker.spec, len(rows))
        return {"probabilities": self.ranker.score(frame).tolist()}

    def rank(self, body: bytes, request_id: str) -> Answer:
        """Look up the features of candidates, score and sort them."""
        spec, stage = self.ranker.spec, self._stage
        with stage("parse"):
            request = api.parse(api.RankRequest, body)
            faults: list[dict[str, str]] = []
            moment = api.moment_of(request.timestamp, faults)
            candidates = candidates_of(request.candidates, request.context, spec, faults)
            if request.attribute:
                faults += attribution_faults(len(candidates), self.ranker)
            if faults:
                raise api.refused(faults)
        count = len(candidates)
        with stage("features"):
            features = self.store.require()
            columns, known = features.compact(request.user, request.context, candidates, moment)
            bound_crosses(columns, spec, count)
            if request.explain:
                bound_terms(spread_frame(columns, count), self.ranker)
        with stage("score"):
            probabilities = self._scored(columns, count)
        order = np.argsort(-probabilities, kind="stable").tolist()
        scores = probabilities.tolist()
        key = spec.entities.item
        items: list[Answer] = [
            {"item": candidates[i][key], "probability": scores[i]} for i in order
        ]
        if request.explain or request.attribute:
            with stage("explain"):
                found = _accounts(
                    self.ranker, spread_frame(columns, count), request.explain, request.attribute
                )
            for item, i in zip(items, order, strict=True):
                item |= found[i]
        if self.log is not None:
            from fathom.feature_log import Served

            keys, user = [candidate[key] for candidate in candidates], request.user
            frame, slots = spread_frame(columns, count), np.argsort(order)
            served = Served(request_id, user, keys, moment, frame, known, probabilities)
            self.log.put(replace(served, how=self.how, seconds=took(), slots=slots))
        self._count(known)
        return {
            "user_known": known.user,
            "unknown_items": int((~known.items).sum()),
            "degraded": known.degraded,
            "expired": known.expired,
            "items": items,
        }

    def recommend(self, body: bytes, request_id: str) -> Answer:
        """Retrieve from the whole catalogue, rank that, and fill the slots."""
        spec, recommender = self.ranker.spec, self.recommender
        request = api.parse(api.RecommendRequest, body)
        if recommender is None:
            raise api.RefusedError(503, "this ranker has no tower to retrieve with; " + _NO_TOWER)
        faults: list[dict[str, str]] = []
        moment = api.moment_of(request.timestamp, faults)
        candidates_of([], request.context, spec, faults)
        features = self.store.require()
        faults += recommender.faults(request, features)
        if faults:
            raise api.refused(faults)
        read = features.read(request.user)
        pool = recommender.retrieve(request, features, read)
        candidates = [{spec.entities.item: item} for item in pool.items]
        count = len(candidates)
        columns, known = features.compact(request.user, request.context, candidates, moment, read)
        bound_crosses(columns, spec, count)
        probabilities = self._scored(columns, count)
        slots = recommender.fill(request, request_id, pool, probabilities)
        items = _slots(pool, slots, probabilities)
        if request.explain:
            frame = spread_frame(columns, count)
            shown = {name: values.take(slots.places) for name, values in frame.items()}
            bound_terms(shown, self.ranker)
            for item, found in zip(items, _accounts(self.ranker, shown, True, False), strict=True):
                item |= found
        if self.log is not None:
            from fathom.feature_log import Served

            keys, user, shares = pool.items, request.user, slots.propensity
            frame = spread_frame(columns, count)
            served = Served(request_id, user, keys, moment, frame, known, probabilities)
            served = replace(served, slots=slots.by_place, propensities=shares)
            self.log.put(replace(served, how=self.how, seconds=took()))
        self._count(known, pool.popular, int(slots.explored.sum()))
        return {
            "user_known": known.user,
            "popular": pool.popular,
            "degraded": known.degraded,
            "expired": known.expired,
            "ranked": len(pool.items),
            "items": items,
        }

    def _scored(self, columns: Mapping[str, Values], count: int) -> NDArray[np.float64]:
        """(N,) probabilities, all of them numbers."""
        found = self.scorer.score(columns, count)
        if not np.isfinite(found).all():
            wrong = int((~np.isfinite(found)).sum())
            raise FloatingPointError(f"{wrong} of {count} probabilities are no numbers")
        return found

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.how == "shadow" else metrics().stage(name)

    def _count(self, known: Known, popular: bool = False, explored: int = 0) -> None:
        if self.how == "shadow":
            return
        counters = metrics()
        counters.ranked_items.inc(len(known.items))
        counters.unknown_items.inc(int((~known.items).sum()))
        counters.unknown_users.inc(int(not known.user))
        counters.degraded_requests.inc(int(known.degraded))
        counters.expired_rows.inc(known.expired)
        counters.popular_recommendations.inc(int(popular))
        counters.explored_items.inc(explored)

    def model(self, _: bytes, __: str) -> Answer:
        """Say what is being served."""
        spec = self.ranker.spec
        return {
            "spec_hash": spec.hash,
            "task": spec.task,
            "entities": spec.entities.model_dump(),
            "columns": [_described(column, spec) for column in spec.columns],
            "crosses": [cross.name for cross in spec.crosses],
            "training": self.ranker.config.as_dict(),
            "provenance": self.ranker.provenance,
            **self.store.described(),
            "retrieval": self.recommender.described if self.recommender else None,
            "limits": {
                "body_bytes": api.MAX_BODY_BYTES,
                "candidates": api.MAX_CANDIDATES,
                "attributed": api.MAX_ATTRIBUTED,
                "terms": api.MAX_TERMS,
                "listed": api.MAX_LISTED,
                "recommended": api.MAX_RECOMMENDED,
                "rows": api.MAX_ROWS,
                "values": api.MAX_VALUES,
            },
        }

    @property
    def context_columns(self) -> str:
        """The columns that come with a request, as JSON for `fathom.try_page`."""
        spec = self.ranker.spec
        return json.dumps([_described(column, spec) for column in spec.raw_columns("context")])

    def openapi(self, _: bytes, __: str) -> Answer:
        """The OpenAPI document."""
        return api.openapi(self.ranker.spec, self.version, self._examples)


def _accounts(
    ranker: Ranker, frame: Mapping[str, Values], explain: bool, attribute: bool
) -> list[Answer]:
    """What a request asks to know of how each candidate came by its logit."""
    from fathom.attribution import BASELINE

    parts = {name: part.tolist() for name, part in ranker.explain(frame).items()}
    bias, deep = parts.pop("bias"), parts.pop("deep")
    found: list[Answer] = [{} for _ in deep]
    if explain:
        for i, terms in enumerate(ranker.terms(frame)):
            wide = {name: part[i] for name, part in parts.items()}
            found[i]["explanation"] = {
                "logit": bias[i] + deep[i] + sum(wide.values()),
                "bias": bias[i],
                "deep": deep[i],
                "wide": wide,
                "terms": [vars(term) for term in terms],
            }
    if attribute:
        shares = {name: share.tolist() for name, share in ranker.attribute(frame).items()}
        baseline = shares.pop(BASELINE)
        for i, account in enumerate(found):
            given = {name: share[i] for name, share in shares.items()}
            account["attribution"] = {"deep": deep[i], "baseline": baseline[i], "shares": given}
    return found


def _slots(pool: Pool, slots: Slots, probabilities: NDArray[np.float64]) -> list[Answer]:
    """The items of a recommendation, by slot."""
    source = "popular" if pool.popular else "retrieved"
    return [
        {
            "item": pool.items[place],
            "probability": float(probabilities[place]),
            "source": "explored" if explored else source,
            "propensity": float(slots.propensity[place]),
        }
        for place, explored in zip(slots.places, slots.explored, strict=True)
    ]


def _described(column: Column, spec: FeatureSpec) -> Answer:
    return {
        "name": column.name,
        "kind": column.kind,
        "owner": spec.owner(column.name),
        "source": "aggregate" if column.aggregate else "ratio" if column.ratio else "raw",
        "values": list(column.values) if column.values else None,
        "description": column.description,
    }
