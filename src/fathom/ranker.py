"""The ranker: an artifact that alone can score.

A folder of plain files; nothing in it is code, and nothing is unpickled:

=======================  =======================================================================
``spec.json``            the feature spec the model was trained with
``vocabularies.json``    known values, in the order of their ids
``encoder.safetensors``  quantiles and cross keys
``weights.safetensors``  the model; of the wide table only the weights other than 0
``retrieval.safetensors``  the tower that retrieves (`fathom.tower`), if there is one
``ranker.json``          model settings, provenance, metrics
``golden.json``          recorded requests and the probabilities they must return
``reference.parquet``    a sample of scored exposures that drift is measured against
``model_card.md``        the same for people
``manifest.json``        the version and the SHA-256 of every other file
=======================  =======================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom import files
from fathom.artifact import MANIFEST, ArtifactError, seal, verify
from fathom.batch import Batch, Ragged
from fathom.config import TrainingConfig
from fathom.encoding import FIRST_KNOWN, Encoder, Frame, Values, with_ratios
from fathom.models import Inputs, Model, build, score
from fathom.spec import FeatureSpec
from fathom.terms import Term, terms
from fathom.tower import FILE as TOWER
from fathom.tower import Tower, TowerError, vocabularies

#: How far a reloaded or served probability may be from the one at training time.
TOLERANCE = 1e-6
#: The wide table in a model's state dict, and what is kept of it.
_WIDE_TABLE, _WIDE_ROWS, _WIDE_VALUES = "wide.weight", "wide.rows", "wide.values"
_LARGEST = float(np.finfo(np.float32).max)

#: Key column, keys of length R, vectors (R, D) float32.
EmbeddingTable = tuple[str, list[str], NDArray[np.float32]]


class RowError(ValueError):
    """Rows of raw features do not fit the spec; ``faults`` lists all, by row and field."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        self.faults = faults
        shown = [f"row {f['row']}: {f['field']}: {f['fault']}" for f in faults[:20]]
        more = [f"and {len(faults) - 20:,} more"] if len(faults) > 20 else []
        super().__init__("; ".join(shown + more))


@dataclass(frozen=True)
class Ranker:
    """Encoder and model, and where they come from.

    Args:
        provenance: seed, data hash, code version, hardware, the span of the training data.
        tower: retrieves from the whole catalogue what the model ranks; an empty one retrieves
            nothing. Its rows are the known values of the encoder's vocabularies.
    """

    encoder: Encoder
    model: Model
    config: TrainingConfig
    provenance: dict[str, Any] = field(default_factory=dict)
    tower: Tower = field(default_factory=Tower.empty)

    @cached_property
    def version(self) -> str:
        """The day the training data end, and 12 digits of the hash of encoder, weights and tower.

        The same training gives the same version, on any machine that computes the same weights.
        """
        digest = hashlib.sha256(self.encoder.fingerprint.encode())
        for name, weight in sorted(self.model.state_dict().items()):
            # Zeros of the wide part are not kept, and so neither is their sign.
            digest.update(name.encode() + (weight.detach().cpu() + 0.0).numpy().tobytes())
        if self.tower:
            digest.update(self.tower.fingerprint.encode())
        day = str(self.provenance.get("trained_until", "undated"))[:10].replace("-", "")
        return f"{day}-{digest.hexdigest()[:12]}"

    @property
    def spec(self) -> FeatureSpec:
        """The spec the model was trained with; serving and monitoring read this copy."""
        return self.encoder.spec

    def score(self, frame: Frame) -> NDArray[np.float64]:
        """Probabilities (for regression: predicted values) of N rows, shape (N,).

        Raises:
            FrameError: the frame does not fit the spec.
        """
        return self.score_batch(self.encoder.encode(frame))

    def score_batch(self, batch: Batch) -> NDArray[np.float64]:
        """`score` of examples that its encoder has encoded already."""
        logits = score(self.model, batch)
        return sigmoid(logits) if self.spec.task == "binary" else logits

    @torch.no_grad()
    def explain(self, frame: Frame) -> dict[str, NDArray[np.float64]]:
        """The exact parts of each logit.

        Returns:
            ``bias`` and ``deep``, shape (N,), and one entry for each wide slot by its name, shape
            (N,). They sum to the logit.
        """
        parts = self.model.contributions(Inputs.of(self.encoder.encode(frame)))
        wide = parts.wide.double().numpy()
        slots = self.encoder.wide_slots if wide.shape[1] else ()
        return {
            "bias": np.full(len(wide), parts.bias.item()),
            "deep": parts.deep.double().numpy(),
            **{name: wide[:, i] for i, name in enumerate(slots)},
        }

    def terms(self, frame: Frame) -> list[list[Term]]:
        """The wide part's exact terms by their values, the largest first, for each of N rows.

        With ``bias`` and ``deep`` of `explain` they sum to the logit. Terms of 0 are left out.
        """
        return terms(self.model, self.encoder, frame)

    def attribute(self, frame: Frame, steps: int = 64) -> dict[str, NDArray[np.float64]]:
        """What each column contributes to the deep part's logit (`fathom.attribution`).

        Returns:
            Column → (N,), and ``baseline``, (N,): the logit of an example of which nothing is
            known. They sum to ``deep`` of `explain`, up to the error of a sum over ``steps``.

        Raises:
            ValueError: the model has no deep part.
        """
        from fathom.attribution import attribute

        encoder = self.encoder
        return attribute(self.model, encoder.encode(frame), encoder.nothing, steps)

    def embeddings(self, column: str) -> tuple[list[str], NDArray[np.float32]]:
        """Learned vectors of a column's known values: R keys, (R, D) float32.

        Raises:
            KeyError: the deep part has no embedding of that column.
        """
        tables = self._embedded
        if column not in tables:
            raise KeyError(f"{column}: this ranker has no embedding of it; it has {list(tables)}")
        name = tables[column]
        weights = self.model.deep.embeddings.table(name).detach()  # type: ignore[union-attr,operator]
        return list(self.encoder.tables[name].values), weights[FIRST_KNOWN:].cpu().numpy().copy()

    @property
    def _embedded(self) -> dict[str, str]:
        """The columns whose values the deep part has learnt vectors of, and the table of each."""
        learnt = getattr(self.model.deep, "embeddings", None)
        held = () if learnt is None else learnt.places
        tables = self.spec.tables.items()
        return {c.name: name for name, (_, cs) in tables if name in held for c in cs}

    def published_embeddings(self) -> dict[str, EmbeddingTable]:
        """What retrieval reads of this ranker: view name → key column, keys, vectors.

        Empty if its deep part has no embedding of the keys, or none was learned.
        """
        found = {}
        for view, key in (
            ("user_embeddings", self.spec.entities.user),
            ("item_embeddings", self.spec.entities.item),
        ):
            if key in self._embedded:
                keys, vectors = self.embeddings(key)
                if keys:
                    found[view] = (key, keys, vectors)
        return found

    def save(self, folder: Path, extra: Mapping[str, bytes | str] | None = None) -> str:
        """Write the artifact; returns its version.

        Args:
            folder: a new or empty folder (see `fathom.registry` for atomic registration).
            extra: more files by name, such as ``golden.json``.
        """
        from safetensors.torch import save_file

        self.encoder.save(folder)
        weights = {n: w.detach().cpu().contiguous() for n, w in self.model.state_dict().items()}
        save_file(_without_zeros(weights), folder / "weights.safetensors")
        if self.tower:
            self.tower.save(folder)
        described = {
            "version": self.version,
            "training": self.config.as_dict(),
            "spec_hash": self.spec.hash,
            "provenance": self.provenance,
        }
        files.write_json(folder / "ranker.json", described)
        for name, content in (extra or {}).items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(data)
        seal(folder, self.version)
        return self.version

    @classmethod
    def load(cls, folder: Path) -> Ranker:
        """Read an artifact after checking every file against the manifest.

        Raises:
            ArtifactError: files are missing or changed; names all of them.
        """
        from safetensors.torch import load_file

        verify(folder)
        described = json.loads((folder / "ranker.json").read_text(encoding="utf-8"))
        encoder = Encoder.load(folder)
        config = TrainingConfig(**described["training"])
        model = build(encoder.layout, config)
        model.load_state_dict(_with_zeros(load_file(folder / "weights.safetensors"), encoder))
        model.eval()
        return cls(encoder, model, config, described["provenance"], _tower(folder, encoder))


def _tower(folder: Path, encoder: Encoder) -> Tower:
    """The tower of an artifact that is verified; an empty one if its manifest names none."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if TOWER not in manifest["files"]:
        return Tower.empty()
    try:
        tower = Tower.load(folder)
    except TowerError as error:
        raise ArtifactError(folder, [str(error)]) from error
    rows = len(tower.users), len(tower.items)
    known = vocabularies(encoder)
    expected = tuple(len(vocabulary.values) for vocabulary in known) if known else (0, 0)
    if rows != expected:
        raise ArtifactError(
            folder, [f"{TOWER} has {rows} users and items, and the encoder {expected}"]
        )
    return tower


def _without_zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, of the wide table only those other than 0 and where they are."""
    kept = {name: weight for name, weight in weights.items() if name != _WIDE_TABLE}
    if _WIDE_TABLE in weights:
        table = weights[_WIDE_TABLE][:, 0]
        rows = table.nonzero()[:, 0]
        kept |= {_WIDE_ROWS: rows.to(torch.int32), _WIDE_VALUES: table[rows]}
    return kept


def _with_zeros(kept: Mapping[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """What `_without_zeros` was given."""
    weights = {n: weight for n, weight in kept.items() if n not in (_WIDE_ROWS, _WIDE_VALUES)}
    if _WIDE_ROWS in kept:
        table = torch.zeros(encoder.layout.wide_rows, 1)
        table[kept[_WIDE_ROWS].long(), 0] = kept[_WIDE_VALUES]
        weights[_WIDE_TABLE] = table
    return weights


def sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-logit)), without overflow.

    >>> sigmoid(np.array([0.0, -1000.0])).tolist()
    [0.5, 0.0]
    """
    small = np.exp(-np.abs(logit))
    return np.where(logit >= 0, 1.0, small) / (1.0 + small)


def frame_of_rows(rows: Sequence[Mapping[str, Any]], spec: FeatureSpec) -> dict[str, Values]:
    """Rows of raw features, as a request carries them, to a frame.

    Every column of the spec must be there, but for ratios, which are computed. ``None`` is a
    missing value. Numbers must be finite.

    Raises:
        RowError: lists every fault by row and field.
    """
    faults: list[dict[str, Any]] = []
    frame: dict[str, Values] = {}
    known = {column.name for column in spec.columns}
    for i, row in enumerate(rows):
        for name in sorted(set(row) - known):
            faults.append({"row": i, "field": name, "fault": "is no column of this model's spec"})
    for column in spec.columns:
        if column.ratio is not None:
            continue
        values = []
        for i, row in enumerate(rows):
            value, fault = _checked(column.kind, row, column.name)
            values.append(value)
            allowed = column.values or (value,)
            if fault is None and isinstance(value, str) and value not in allowed:
                fault = f"is {_shown(value)}; it must be one of {list(allowed)}"
            if fault:
                faults.append({"row": i, "field": column.name, "fault": fault})
        if not faults:
            frame[column.name] = _array(column.kind, values)
    if faults:
        raise RowError(faults)
    return with_ratios(frame, spec)


def rows_of_frame(frame: Frame, spec: FeatureSpec, index: Sequence[int]) -> list[dict[str, Any]]:
    """Chosen rows of a frame as `frame_of_rows` takes them; values survive JSON unchanged."""
    rows: list[dict[str, Any]] = []
    for i in index:
        row: dict[str, Any] = {}
        for column in spec.columns:
            if column.ratio is None:
                row[column.name] = _plain(frame[column.name], i)
        rows.append(row)
    return rows


def _plain(values: Values, i: int) -> Any:
    if isinstance(values, Ragged):
        return values.values[values.offsets[i] : values.offsets[i + 1]].tolist()
    value = values[i]
    if isinstance(value, np.floating | np.integer):
        return None if np.isnan(value) else float(value)
    return value


def _checked(kind: str, row: Mapping[str, Any], name: str) -> tuple[Any, str | None]:
    if name not in row:
        return None, "is missing; give null if it is not known"
    value = row[name]
    if kind in {"multi", "sequence"}:
        if value is None:
            return [], None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            return [], f"is {_shown(value)}; it must be a list of strings"
        return value, None
    if value is None:
        return None, None
    if kind == "categorical":
        if not isinstance(value, str):
            return None, f"is {_shown(value)}; it must be a string"
        return value, None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, f"is {_shown(value)}; it must be a number"
    if not -_LARGEST <= value <= _LARGEST:  # false for NaN too, and exact for huge integers
        return None, f"is {_shown(value)}; it must be a finite number below 3.4e38"
    return value, None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _array(kind: str, values: list[Any]) -> Values:
    if kind in {"multi", "sequence"}:
        return Ragged.of(values)
    if kind == "numeric":
        return np.array([np.nan if v is None else v for v in values], np.float32)
    texts = np.empty(len(values), object)
    texts[:] = values
    return texts
