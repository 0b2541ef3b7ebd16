"""Which pipelines there are: every package of `fathom.pipelines`, found by name."""

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline

#: Not part of ``kedro run``: skew and outcomes read what a run does not make; tuning, comparison
#: and replay train many times; cross_search proposes what a person pastes; retraining has a split
#: of its own.
APART = frozenset(
    {"comparison", "cross_search", "outcomes", "replay", "retraining", "skew", "tuning"}
)


def register_pipelines() -> dict[str, Pipeline]:
    """Find every pipeline; ``__default__``, which ``kedro run`` runs, is their sum but for `APART`.

    Kedro orders the nodes of a sum by what they read and write, so the order of the names does
    not matter. A pipeline that fails to import is an error, not a warning: a run that skips a
    stage would look like a success.

    Raises:
        ImportError: a pipeline's package does not import or has no ``create_pipeline``.
    """
    found = find_pipelines(raise_errors=True)
    stages = {name: found[name] for name in sorted(found) if name != "__default__"}
    # With `--pipelines NAME` Kedro looks for that one alone and there is no sum to make.
    if "__default__" not in found:
        return stages
    summed = [stage for name, stage in stages.items() if name not in APART]
    return {"__default__": sum(summed, start=Pipeline([])), **stages}
