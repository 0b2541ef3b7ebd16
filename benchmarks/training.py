"""Training: this project beside plain torch and the libraries that train Wide & Deep.

Examples per second in steady state, peak memory, and the quality after one epoch, on a log shaped
as Criteo's. Every measurement runs in a process of its own; contestants take turns, round by round.

    python benchmarks/training.py --install                  # the peers' environments, once
    python benchmarks/training.py --rounds 3 --profile --json
    python benchmarks/training.py --contestants fathom fathom-bf16 --data data
    python benchmarks/training.py --quick                    # few rows, no peers
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fathom
from fathom.hardware import hardware

HERE = Path(__file__).parent / "training"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Contestant:
    """A script in ``benchmarks/training``, and the environment it runs in: this one if empty."""

    script: str
    environment: str = ""
    precision: str = "float32"
    variant: str = ""


CONTESTANTS = {
    "fathom": Contestant("with_fathom.py"),
    "fathom-bf16": Contestant("with_fathom.py", precision="bfloat16"),
    "torch": Contestant("with_torch.py"),
    "torch-bf16": Contestant("with_torch.py", precision="bfloat16"),
    "torchrec": Contestant("with_torchrec.py", "torchrec"),
    "torchrec-fused": Contestant("with_torchrec.py", "torchrec", variant="fused"),
    "torchrec-fused-bf16": Contestant("with_torchrec.py", "torchrec", "bfloat16", "fused"),
    "fuxictr": Contestant("with_fuxictr.py", "fuxictr"),
    "deepctr-torch": Contestant("with_deepctr_torch.py", "deepctr-torch"),
    "pytorch-widedeep": Contestant("with_pytorch_widedeep.py", "pytorch-widedeep"),
    "torch-rechub": Contestant("with_torch_rechub.py", "torch-rechub"),
}
OURS = ("fathom", "fathom-bf16")
#: The libraries that the factor is about. Plain torch is none; torchrec's fused tables are a part
#: to build a trainer from, and stand in a line of their own.
PEERS = ("torchrec", "fuxictr", "deepctr-torch", "pytorch-widedeep", "torch-rechub")
SHAPE = {"train": 1_000_000, "test": 200_000, "scale": 1.0, "seed": 11}
MODEL = {"batch_size": 4096, "embedding": 16, "hidden": [400, 400, 400]}
QUICK_SHAPE = {"train": 40_000, "test": 10_000, "scale": 0.02, "seed": 11}
QUICK_MODEL = {"batch_size": 512, "embedding": 8, "hidden": [32, 32]}
QUICK = ("fathom", "fathom-bf16", "torch")


class BenchmarkError(RuntimeError):
    """A process failed, or an environment could not be made."""


# -- environments and processes ------------------------------------------------------------------


def python_of(environments: Path, name: str) -> Path:
    """The interpreter of a peer's environment, or this one."""
    if not name:
        return Path(sys.executable)
    below = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return environments.joinpath(name, *below)


def install(environments: Path, names: Iterable[str]) -> None:
    """Make the environments of these peers, each from its requirements file."""
    environments.mkdir(parents=True, exist_ok=True)
    (environments / ".gitignore").write_text("*\n", encoding="utf-8")
    for name in names:
        python = python_of(environments, name)
        if not python.exists():
            venv.create(environments / name, with_pip=True)
        print(f"installing {name} into {environments / name}", flush=True)
        command = [str(python), "-m", "pip", "install", "--quiet"]
        required = HERE / f"requirements-{name}.txt"
        alone = HERE / f"requirements-{name}-no-deps.txt"
        steps = [[*command, "-r", str(required)]]
        if alone.exists():
            steps.append([*command, "--no-deps", "-r", str(alone)])
        for step in steps:
            if subprocess.run(step, check=False).returncode:
                raise BenchmarkError(f"{name} could not be installed: {' '.join(step)} failed")


def _apart(python: Path, script: str, given: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Run a script in a process of its own and return the JSON object it ends with."""
    # The peak of a new process starts from that of its parent, so this one imports no torch.
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [str(python), str(HERE / script), json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        if done.returncode < 0:
            raise BenchmarkError(f"ended by signal {-done.returncode}: out of memory?")
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise BenchmarkError(f"ended with {done.returncode}: {said[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# -- what is measured ----------------------------------------------------------------------------


def measure(given: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Run every contestant once per round, in turns.

    Returns:
        The figures, ready for JSON.
    """
    here, threads = Path(sys.executable), given.threads
    log = _apart(here, "criteo_like.py", {"folder": str(cache), "shape": given.shape}, threads)
    model = given.model | {"log": str(cache), "threads": threads}
    left_out = {
        name: f"no environment; {Path(__file__).name} --install {CONTESTANTS[name].environment}"
        for name in given.contestants
        if not python_of(given.environments, CONTESTANTS[name].environment).exists()
    }
    rounds: dict[str, list[dict[str, Any]]] = {}
    for number in range(given.rounds):
        for name in given.contestants:
            if name in left_out:
                continue
            try:
                run = _run(name, model | {"seed": number}, given.environments, threads)
            except BenchmarkError as error:
                left_out[name] = str(error)
                rounds.pop(name, None)
                continue
            rounds.setdefault(name, []).append(run)
            said = f"round {number + 1}/{given.rounds}: {name}, {run['examples_per_second']:,}/s"
            print(said, file=sys.stderr, flush=True)
    found = {name: summary(runs) for name, runs in rounds.items()}
    ours = [name for name in given.contestants if name in OURS]
    default = given.shape == SHAPE and given.model == MODEL
    return {
        "benchmark": "training",
        "log": log,
        "model": given.model,
        "rounds": given.rounds,
        "threads": threads,
        "contestants": found,
        "left_out": left_out,
        "default_data": _default_data(given, ours) if given.data else {},
        "profile": {
            name: _run(name, model | {"profile": True}, given.environments, threads)
            for name in (ours if given.profile else [])
        },
        "roofline": roofline(log, given.model, threads, 0.2 if given.quick else 2.0),
        "targets": targets(found) if default else [],
        "code_version": fathom.__version__,
        "hardware": hardware(),
    }


def _run(name: str, task: Mapping[str, Any], environments: Path, threads: int) -> dict[str, Any]:
    who = CONTESTANTS[name]
    python = python_of(environments, who.environment)
    chosen = {"precision": who.precision, "variant": who.variant}
    return _apart(python, who.script, {**task, **chosen}, threads)


def _default_data(given: argparse.Namespace, ours: Sequence[str]) -> dict[str, Any]:
    """The encoded splits of a run, with the settings that it trains with."""
    task = {
        "log": "",
        "threads": given.threads,
        "data": str(given.data.absolute()),
        "training": str(given.training.absolute()),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ours}
    for _ in range(given.rounds):
        for name in ours:
            runs[name].append(_run(name, task, given.environments, given.threads))
    return {name: summary(found) for name, found in runs.items()}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; the least and the most of the rates; the highest peak."""
    rates = [run["examples_per_second"] for run in runs]
    last = runs[-1]
    return {
        "examples_per_second": round(statistics.median(rates)),
        "least": min(rates),
        "most": max(rates),
        "auc": round(statistics.median(run["auc"] for run in runs), 5),
        "logloss": round(statistics.median(run["logloss"] for run in runs), 5),
        "peak_mb": max(run["peak_mb"] for run in runs),
        **{name: last[name] for name in ("torch", "epochs", "batch_size") if name in last},
        "runs": list(runs),
    }


def flops_per_example(log: Mapping[str, Any], model: Mapping[str, Any]) -> int:
    """Of the deep part's products, forward and twice as many backward."""
    first = len(log["fields"]) * model["embedding"] + log["numeric"]
    widths = [first, *model["hidden"], 1]
    return 6 * sum(a * b for a, b in itertools.pairwise(widths))


def roofline(
    log: Mapping[str, Any], model: Mapping[str, Any], threads: int, seconds: float
) -> dict[str, Any]:
    """What the machine does at most, and the examples per second that follow."""
    hidden = [*model["hidden"], *model["hidden"]][:2]
    shape = {"rows": model["batch_size"], "inputs": hidden[0], "outputs": hidden[-1]}
    found = _apart(
        Path(sys.executable),
        "roofline.py",
        shape | {"threads": threads, "seconds": seconds},
        threads,
    )
    flops = flops_per_example(log, model)
    # Rows are read and put beside each other; so are their gradients; rows are read and written.
    moved = 6 * 4 * len(log["fields"]) * model["embedding"]
    bounds = {
        name: round(1e9 * found[f"{name}_gflops"] / flops) for name in ("float32", "bfloat16")
    }
    bounds["rows"] = round(1e9 * found["copy_gb_per_second"] / moved)
    return found | {"shape": shape, "flops": flops, "row_bytes": moved, "examples": bounds}


def targets(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, what was, and whether it is; of what was measured."""
    wanted: list[tuple[str, float, float | None]] = []
    for name, least in (("fathom-bf16", 90_000), ("fathom", 45_000)):
        if name in found:
            wanted.append((f"examples/s, {name}", found[name]["examples_per_second"], least))
    ours = [found[name] for name in OURS if name in found]
    peers = {name: found[name] for name in PEERS if name in found}
    if ours and peers:
        best = max(peers, key=lambda name: peers[name]["examples_per_second"])
        fastest = max(run["examples_per_second"] for run in ours)
        ratio = round(fastest / peers[best]["examples_per_second"], 2)
        wanted.append((f"times as fast as the fastest peer, {best}", ratio, 5))
        for name in ("torchrec-fused-bf16", "torchrec-fused"):
            if name in found:
                ratio = round(fastest / found[name]["examples_per_second"], 2)
                wanted.append((f"times as fast as {name}", ratio, None))
    others = {name: run for name, run in found.items() if name not in OURS}
    if ours and others:
        best = max(others, key=lambda name: others[name]["auc"])
        least_auc = min(run["auc"] for run in ours)
        wanted.append((f"test AUC, the lower of ours; best other: {best}", least_auc,
                       others[best]["auc"]))  # fmt: skip
    return [
        {"what": w, "found": f, "at_least": b, "met": None if b is None else f >= b}
        for w, f, b in wanted
    ]


# -- tables --------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    log, model, roof = figures["log"], figures["model"], figures["roofline"]
    layers = "x".join(str(width) for width in model["hidden"])
    lines = [
        f"{log['train']:,} + {log['test']:,} rows, {log['numeric']} numbers, "
        f"{len(log['fields'])} fields of {sum(log['fields']):,} ids, {len(log['crosses'])} crosses",
        f"embeddings of {model['embedding']}, layers {layers}, batches of {model['batch_size']:,}, "
        f"{figures['threads']} threads; AUC of the true probabilities {log['best_auc']:.4f}",
        "",
        *_rows(figures["contestants"]),
        *(f"{name:20} left out: {why}" for name, why in figures["left_out"].items()),
    ]
    if figures["default_data"]:
        lines += ["", "the default data, with the settings of its own", ""]
        lines += _rows(figures["default_data"])
    for name, run in figures["profile"].items():
        lines += ["", f"{name}: a step takes {run['step_ms']:.1f} ms, of which"]
        lines += [f"{share:8.1%} {part}" for part, share in run["profile"].items()]
    shape, bounds = roof["shape"], roof["examples"]
    lines += ["", f"roofline: {shape['rows']} x {shape['inputs']} x {shape['outputs']} products, "
              f"{roof['flops'] / 1e6:.2f} MFLOP and {roof['row_bytes'] / 1e3:.1f} kB of rows per "
              "example"]  # fmt: skip
    lines += [
        f"{roof[f'{name}_gflops']:10,.0f} GFLOP/s {name:9} → at most {bounds[name]:,} examples/s"
        for name in ("float32", "bfloat16")
    ]
    lines += [
        f"{roof['copy_gb_per_second']:10,.1f} GB/s of copies   → at most {bounds['rows']:,} "
        "examples/s",
        "",
        *(_verdict(target) for target in figures["targets"]),
        "",
        "examples/s: median of the rounds, each the median of windows of steps after a warm-up;",
        "AUC, logloss: of the test rows after one epoch; peak: of the process, data included",
        f"hardware: {figures['hardware']}",
    ]
    return "\n".join(lines)


def _rows(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"{'':20}examples/s        least      most     AUC  logloss  peak MB"]
    for name, run in found.items():
        lines.append(
            f"{name:20}{run['examples_per_second']:10,}   {run['least']:10,}{run['most']:10,}"
            f"  {run['auc']:.4f}   {run['logloss']:.4f}{run['peak_mb']:9,}"
        )
    return lines


def _verdict(target: Mapping[str, Any]) -> str:
    if target["met"] is None:
        return f"       {target['found']:>9} {target['what']}"
    verdict = "met" if target["met"] else "MISSED"
    return f"{verdict:7}{target['found']:>9} {target['what']} (at least {target['at_least']})"


# -- command line --------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    peers = sorted({who.environment for who in CONTESTANTS.values() if who.environment})
    parser = argparse.ArgumentParser(description="Training, here and in other libraries.")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="to compare; all")
    parser.add_argument("--rows", type=int, help="training rows; a fifth as many are tested on")
    parser.add_argument("--rounds", type=int, help="times that each runs (3)")
    parser.add_argument("--threads", type=int, default=cores or 1, help="of each (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder of a run, to train on its splits too")
    parser.add_argument(
        "--training", type=Path, default=ROOT / "conf" / "base" / "parameters_training.yml",
        help="settings for --data",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="where fathom's time goes")
    parser.add_argument("--cache", type=Path, help="folder to keep the log in")
    parser.add_argument(
        "--environments",
        type=Path,
        default=HERE / "environments",
        help="of the peers (%(default)s)",
    )
    parser.add_argument(
        "--install", nargs="*", choices=peers, metavar="PEER", help="make environments, and stop"
    )
    parser.add_argument("--quick", action="store_true", help="few rows, a small model, no peers")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    parsed = parser.parse_args()
    if parsed.install is not None:
        parsed.install = parsed.install or peers
    parsed.contestants = parsed.contestants or list(QUICK if parsed.quick else CONTESTANTS)
    parsed.rounds = parsed.rounds or (1 if parsed.quick else 3)
    parsed.shape = dict(QUICK_SHAPE if parsed.quick else SHAPE)
    parsed.model = dict(QUICK_MODEL if parsed.quick else MODEL)
    if parsed.rows:
        parsed.shape |= {"train": parsed.rows, "test": parsed.rows // 5}
    return parsed


def main() -> None:
    """Run from the command line."""
    given = _arguments()
    try:
        if given.install is not None:
            install(given.environments, given.install)
            return
        with tempfile.TemporaryDirectory(prefix="fathom-") as passing:
            figures = measure(given, given.cache or Path(passing))
    except BenchmarkError as error:
        raise SystemExit(f"training: {error}") from None
    print(table(figures))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
