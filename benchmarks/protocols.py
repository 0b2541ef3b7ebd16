"""Known protocols: our row beside the published ones, on data that you have put in place.

Each protocol is an environment of its own (``conf/<name>``) that runs through the pipelines up to
the scores of the test split. benchmarks/README.md says which files go where; nothing is downloaded.

    python benchmarks/protocols.py autoint_movielens
    python benchmarks/protocols.py frappe_x1 --model deepfm
    python benchmarks/protocols.py leave_one_out --params training.factors=128,source.passes=2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fathom.evaluation import Predictions, metrics
from fathom.hardware import hardware
from fathom.ranker import Ranker
from fathom.spec import FeatureSpec

#: What is needed of the pipelines; the second fills the feature store, which the first reads.
NODES = "score_splits,stamp_attributes"
DEPTH = 10
_CTR = ("auc", "logloss")
_RANKING = ("hr_at_10", "ndcg_at_10")


class ProtocolError(RuntimeError):
    """A protocol cannot be run or measured."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What others have published about a split.

    Args:
        metrics: names of the two that are reported.
        sizes: rows of each split; other rows are another experiment.
        published: model → its two figures.
        source: where they stand.
    """

    metrics: tuple[str, str]
    sizes: Mapping[str, int]
    published: Mapping[str, tuple[float, float]]
    source: str


_BARS = (
    "BARS (github.com/reczoo/BARS, ranking/ctr): mean of five runs; LR and FM: one run. Its "
    "leaderboard has the first of the five"
)
PROTOCOLS = {
    "autoint_movielens": Protocol(
        _CTR,
        {"train": 591_209, "validation": 73_901, "test": 73_902},
        {
            "LR": (0.7716, 0.4424),
            "FM": (0.8252, 0.3998),
            "Wide & Deep": (0.8300, 0.3976),
            "DeepFM": (0.8437, 0.3846),
            "Deep & Cross": (0.8446, 0.3809),
            "AutoInt+": (0.8488, 0.3753),
        },
        'Song et al. 2019, "AutoInt", tables 2 and 5: means of ten runs',
    ),
    "frappe_x1": Protocol(
        _CTR,
        {"train": 202_027, "validation": 57_722, "test": 28_860},
        {
            "LR": (0.935584, 0.307643),
            "FM": (0.967108, 0.206515),
            "DNN": (0.984045, 0.158370),
            "Wide & Deep": (0.983073, 0.153978),
            "DeepFM": (0.983947, 0.149462),
            "DCN": (0.983418, 0.150676),
            "DCN v2": (0.983824, 0.152036),
        },
        f"{_BARS} (Wide & Deep: .984124, .148974)",
    ),
    "criteo_x1": Protocol(
        _CTR,
        {"train": 33_003_326, "validation": 8_250_124, "test": 4_587_167},
        {
            "LR": (0.788625, 0.460914),
            "FM": (0.802157, 0.449063),
            "DNN": (0.813678, 0.438171),
            "Wide & Deep": (0.813822, 0.438046),
            "DeepFM": (0.813812, 0.438033),
            "DCN": (0.813767, 0.438075),
            "DCN v2": (0.813939, 0.438087),
        },
        f"{_BARS} (Wide & Deep: .813860, .438004)",
    ),
    "leave_one_out": Protocol(
        _RANKING,
        {"test": 604_000},
        {
            "popularity": (0.4535, 0.2543),
            "NeuMF": (0.7093, 0.4349),
            "iALS": (0.7111, 0.4383),
            "SLIM": (0.7162, 0.4468),
            "matrix factorisation": (0.7294, 0.4523),
        },
        'Rendle et al. 2020, "Neural collaborative filtering vs. matrix factorization revisited", '
        "table 1",
    ),
}


def run(name: str, params: str) -> None:
    """Run the pipelines of a protocol's environment, up to the scores of the test split.

    Raises:
        ProtocolError: the run failed; why stands on standard error.
    """
    command = [sys.executable, "-m", "kedro", "run", "--env", name, "--to-nodes", NODES]
    command += ["--params", params] if params else []
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise ProtocolError(f"'{' '.join(command[1:])}' failed; the reason stands above")


def measure(name: str, data: Path) -> dict[str, Any]:
    """Measure the test split's scores as a protocol does.

    Args:
        data: folder of the protocol's environment.

    Returns:
        The figures, ready for JSON.
    """
    protocol = PROTOCOLS[name]
    ranker = Ranker.load(data / "06_models/candidate")
    test = predictions(data / "07_model_output/predictions.parquet", ranker.spec)
    found: dict[str, float | None] = dict(metrics(test))
    if protocol.metrics == _RANKING:
        found |= dict(zip(_RANKING, leave_one_out(test), strict=True))
    sizes = {**ranker.provenance["rows"], "test": len(test.label)}
    return {
        "benchmark": "protocols",
        "protocol": name,
        "metrics": {metric: found[metric] for metric in protocol.metrics},
        "published": protocol.published,
        "source": protocol.source,
        "sizes": sizes,
        "as_published": all(sizes[split] == rows for split, rows in protocol.sizes.items()),
        "training": ranker.config.as_dict(),
        "best_epoch": ranker.provenance["best_epoch"],
        "parameters": ranker.provenance["parameters"],
        "seed": ranker.provenance["seed"],
        "spec_hash": ranker.spec.hash,
        "data_hash": ranker.provenance["data_hash"],
        "code_version": ranker.provenance["code_version"],
        "hardware": hardware(),
    }


def predictions(path: Path, spec: FeatureSpec) -> Predictions:
    """The test split's rows: labels, scores, users and requests."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    table = table.filter(pc.equal(table["split"], "test"))

    def codes(name: str) -> Any:
        encoded = table[name].combine_chunks().dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64)

    return Predictions(
        label=table[spec.label.name].to_numpy().astype(np.float64),
        probability=table["probability"].to_numpy(),
        user=codes(spec.entities.user),
        request=codes(spec.entities.request),
        task=spec.task,
    )


def leave_one_out(test: Predictions, depth: int = DEPTH) -> tuple[float, float]:
    """Hit rate and NDCG of lists with one positive each (He et al. 2017, section 4.1).

    A list whose positive has ``r`` candidates before it is a hit if ``r`` is below ``depth``, and
    its NDCG is then 1 / log2(r + 2), else 0. Candidates with the positive's score are before it.

    Raises:
        ProtocolError: a list does not have exactly one positive.
    """
    lists = int(test.request.max()) + 1
    positive = test.label == 1
    found = np.bincount(test.request[positive], minlength=lists)
    if np.any(found != 1):
        raise ProtocolError(
            f"{int(np.sum(found != 1))} of {lists} lists have not exactly one positive"
        )
    score = np.empty(lists)
    score[test.request[positive]] = test.probability[positive]
    before = ~positive & (test.probability >= score[test.request])
    rank: npt.NDArray[np.int64] = np.bincount(test.request[before], minlength=lists)
    hit = rank < depth
    return float(hit.mean()), float(np.where(hit, 1 / np.log2(rank + 2), 0).mean())


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text: the published rows, and ours."""
    names = list(figures["metrics"])
    own = f"fathom, {figures['training']['model']}"
    lines = ["".ljust(28) + "".join(name.rjust(12) for name in names)]
    rows = {**figures["published"], own: tuple(figures["metrics"].values())}
    for title, values in rows.items():
        lines.append(title.ljust(28) + "".join(f"{value:12.4f}" for value in values))
    sizes = ", ".join(f"{rows:,} {split}" for split, rows in figures["sizes"].items())
    lines += ["", f"published: {figures['source']}", f"rows: {sizes}"]
    if not figures["as_published"]:
        expected = PROTOCOLS[figures["protocol"]].sizes
        wanted = ", ".join(f"{rows:,} {split}" for split, rows in expected.items())
        lines.append(f"NOT the published split, which has {wanted}: do not compare the rows")
    lines += [
        f"best epoch {figures['best_epoch']}, {figures['parameters']:,} parameters, seed "
        f"{figures['seed']}, {figures['seconds']:.0f} s in all",
        f"spec {figures['spec_hash'][:12]}, data {figures['data_hash'][:12]}",
        f"hardware: {figures['hardware']}",
    ]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our row beside the published ones.")
    parser.add_argument("protocol", choices=sorted(PROTOCOLS))
    parser.add_argument("--model", help="any of training.model (that of the environment)")
    parser.add_argument(
        "--params", default="", help="more settings, as kedro run takes them: a.b=1,c.d=2"
    )
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    return parser.parse_args()


def main() -> None:
    """Run from the command line, in the project's folder."""
    given = _arguments()
    model = f"training.model={given.model}" if given.model else ""
    started = time.perf_counter()
    try:
        run(given.protocol, ",".join(filter(None, (model, given.params))))
        figures = measure(given.protocol, Path("data") / given.protocol)
    except ProtocolError as error:
        raise SystemExit(f"protocols: {error}") from None
    figures["seconds"] = round(time.perf_counter() - started, 1)
    print(table(figures))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
