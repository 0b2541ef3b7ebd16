"""How fast is the network alone: one user's candidates on the shape of the paper's deep part.

1,200 inputs and layers of 1,024, 512 and 256 (Cheng et al. 2016, section 4), 500 candidates of one
user on one thread, by torch as it is trained, by ONNX Runtime and by the fast path; then the
paper's table 2, which divides 200 candidates over threads.

    python benchmarks/scoring.py
    pip install --no-deps --target build/peers -r benchmarks/requirements-scoring.txt
    PYTHONPATH=build/peers python benchmarks/scoring.py --json      # ONNX Runtime beside it
    python benchmarks/scoring.py --quick
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom.config import TrainingConfig
from fathom.encoding import Frame, Values, fit_encoder
from fathom.fast import FastScorer
from fathom.hardware import hardware
from fathom.lookup import spread_frame
from fathom.models import Inputs, build
from fathom.ranker import Ranker
from fathom.spec import FeatureSpec

#: Of the paper's network: columns of 32 that users, items and contexts have, and numbers.
OWNERS, WIDTH, NUMBERS = {"user": 12, "item": 18, "context": 6}, 32, 24
HIDDEN = (1024, 512, 256)
VALUES, CANDIDATES = 5_000, 500
#: The paper's table 2: how 200 candidates are divided.
DIVIDED = ((200, 1), (100, 2), (50, 4))
BEST = 10
BASE = "torch, encoded already"

Act = Callable[[], object]


# -- what is scored ------------------------------------------------------------------------------


def paper_spec() -> FeatureSpec:
    """36 columns of width 32 and 24 numbers (two inputs each): 1,200 inputs."""
    columns: list[dict[str, Any]] = [
        {"name": f"{owner}{i}", "kind": "categorical", "owner": owner, "embedding": WIDTH}
        for owner, count in OWNERS.items()
        for i in range(count)
    ]
    columns += [
        {"name": f"number{i}", "kind": "numeric", "owner": "item" if i % 2 else "user"}
        for i in range(NUMBERS)
    ]
    entities = {"user": "user0", "item": "item0", "request": "request"}
    label = {"name": "clicked", "values": [0, 1]}
    return FeatureSpec.model_validate({"entities": entities, "label": label, "columns": columns})


def drawn(spec: FeatureSpec, rows: int, seed: int = 0) -> dict[str, Values]:
    """Random rows of the columns."""
    draw = np.random.default_rng(seed)
    frame: dict[str, Values] = {}
    for column in spec.columns:
        if column.is_numeric:
            frame[column.name] = draw.random(rows).astype(np.float32)
        else:
            values = np.empty(rows, object)
            values[:] = [f"v{i}" for i in draw.integers(0, VALUES, rows)]
            frame[column.name] = values
    return frame


def of_one_user(frame: Frame, spec: FeatureSpec, rows: slice) -> dict[str, Values]:
    """Some rows as candidates of one user: what is not the item's is the first row's for all."""
    return {
        name: values[rows] if spec.owner(name) == "item" else values[:1]  # type: ignore[index]
        for name, values in frame.items()
    }


def paper_ranker() -> Ranker:
    """A ranker of the paper's shape. Random weights take as long as trained ones."""
    spec = paper_spec()
    encoder = fit_encoder(drawn(spec, 20 * VALUES), spec)
    assert encoder.layout.deep_width == 1200
    config = TrainingConfig(model="deep", hidden=HIDDEN)
    torch.manual_seed(0)
    return Ranker(encoder, build(encoder.layout, config).eval(), config)


# -- the peers -----------------------------------------------------------------------------------


def by_onnx(ranker: Ranker, inputs: Inputs) -> tuple[Act, NDArray[np.float32]] | None:
    """The whole network by ONNX Runtime on looked-up rows, and its logits; None without it."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    deep: Any = ranker.model.deep
    with torch.inference_mode():
        embedded: Tensor = deep.embeddings(inputs)
    plain: list[torch.nn.Module] = []
    for layer in (part for part in deep.layers if isinstance(part, torch.nn.Linear)):
        copy = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        copy.load_state_dict(layer.state_dict())
        plain += [copy, torch.nn.ReLU()]
    network = torch.nn.Sequential(*plain[:-1]).eval()
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one
        torch.onnx.export(network, (embedded.clone(),), written, dynamo=False, input_names=["x"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        written.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    given = {"x": embedded.numpy()}
    return lambda: session.run(None, given), session.run(None, given)[0][:, 0]


# -- measuring -----------------------------------------------------------------------------------


def one_thread(ranker: Ranker, rounds: int) -> dict[str, Any]:
    """Milliseconds for 500 candidates, and how far scores are from the reference's."""
    spec = ranker.spec
    columns = of_one_user(drawn(spec, CANDIDATES, 1), spec, slice(None))
    frame = spread_frame(columns, CANDIDATES)
    inputs = Inputs.of(ranker.encoder.encode(frame))
    fast, half = FastScorer(ranker), FastScorer(ranker, precision="bfloat16")
    expected = ranker.score(frame)

    def eager() -> None:
        with torch.inference_mode():
            ranker.model(inputs)

    acts: dict[str, Act] = {
        BASE: eager,
        "torch, with encoding": lambda: ranker.score(frame),
        "fast path, with encoding": lambda: fast.score(columns, CANDIDATES),
        "fast path, bfloat16": lambda: half.score(columns, CANDIDATES),
    }
    scores = {
        "fast path, with encoding": fast.score(columns, CANDIDATES),
        "fast path, bfloat16": half.score(columns, CANDIDATES),
    }
    onnx = by_onnx(ranker, inputs)
    if onnx is not None:
        acts["ONNX Runtime, embedded already"], logits = onnx
        bias = float(ranker.model.bias.detach())
        scores["ONNX Runtime, embedded already"] = 1 / (1 + np.exp(-(logits + bias)))
    return {
        "candidates": CANDIDATES,
        "ms": interleaved(acts, rounds),
        "scores": {name: agreement(found, expected) for name, found in scores.items()},
    }


def table_2(ranker: Ranker, rounds: int) -> dict[str, Any]:
    """Milliseconds for 200 candidates in batches on so many threads; the fast path on one."""
    spec = ranker.spec
    frame = drawn(spec, 200, 2)
    fast = FastScorer(ranker)
    acts: dict[str, Act] = {}
    with ThreadPoolExecutor(4) as pool:
        for size, threads in DIVIDED:
            parts = [
                spread_frame(of_one_user(frame, spec, slice(start, start + size)), size)
                for start in range(0, 200, size)
            ]
            acts[f"torch, {size} on {threads}"] = lambda parts=parts: list(
                pool.map(ranker.score, parts)
            )
        whole = of_one_user(frame, spec, slice(None))
        acts["fast path, 200 on 1"] = lambda: fast.score(whole, 200)
        return {"cores": len(os.sched_getaffinity(0)), "ms": interleaved(acts, rounds)}


def interleaved(acts: Mapping[str, Act], rounds: int) -> dict[str, dict[str, float]]:
    """Middle and 99th percentile of the milliseconds of each, after three rounds to warm up."""
    found: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(rounds + 3):
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            if turn >= 3:
                found[name].append(time.perf_counter() - started)
    return {name: quantiles(seconds) for name, seconds in found.items()}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Their middle and 99th percentile, in milliseconds."""
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def agreement(found: NDArray[Any], expected: NDArray[np.float64]) -> dict[str, float]:
    """How far probabilities are apart, and what both rank alike."""
    best, theirs = (np.argsort(-scores, kind="stable")[:BEST] for scores in (found, expected))
    more = expected[:, None] > expected[None, :]
    return {
        "largest_difference": float(np.abs(found - expected).max()),
        "pairs_in_order": float((found[:, None] > found[None, :])[more].mean()),
        f"of_best_{BEST}": len(set(best.tolist()) & set(theirs.tolist())) / BEST,
    }


# -- the command ---------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    one, divided = figures["one_thread"], figures["table_2"]
    base = one["ms"][BASE]["p50_ms"]
    lines = [f"{one['candidates']} candidates, 1,200 inputs, layers {HIDDEN}, one thread"]
    for name, found in one["ms"].items():
        lines.append(
            f"  {name:32}{found['p50_ms']:8.2f} ms  p99 {found['p99_ms']:7.2f}"
            f"{base / found['p50_ms']:7.2f}x"
        )
    lines += ["", f"against the reference{'':11}largest difference     pairs  of best {BEST}"]
    for name, found in one["scores"].items():
        lines.append(
            f"  {name:32}{found['largest_difference']:20.1e}{found['pairs_in_order']:10.2%}"
            f"{found[f'of_best_{BEST}']:12.0%}"
        )
    lines += ["", f"200 candidates, batch on threads, {divided['cores']} core(s)"]
    for name, found in divided["ms"].items():
        lines.append(f"  {name:32}{found['p50_ms']:8.2f} ms  p99 {found['p99_ms']:7.2f}")
    return "\n".join([*lines, f"hardware: {figures['hardware']}"])


def main(given: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="How fast the network alone is.")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    ranker, rounds = paper_ranker(), 3 if options.quick else 50
    figures = {
        "benchmark": "scoring",
        "one_thread": one_thread(ranker, rounds),
        "table_2": table_2(ranker, rounds),
        "hardware": hardware(),
    }
    print(table(figures))
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
