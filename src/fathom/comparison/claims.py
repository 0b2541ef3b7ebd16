"""What the papers claim, as differences that data can support or contradict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from fathom.evaluation import Interval

SUPPORTED, CONTRADICTED = "supported", "contradicted"
#: The interval includes 0.
OPEN = "cannot tell"
MISSING = "not measured"

_CHENG = "Cheng et al. 2016"


@dataclass(frozen=True)
class Claim:
    """One model has a lower loss than another, on the whole test window or on a slice of it.

    Args:
        text: the claim in words. source: who makes it.
        better, worse: names of the models. part: the slice; None for the whole window.
    """

    text: str
    source: str
    better: str
    worse: str
    part: str | None = None

    @property
    def where(self) -> str:
        """The slice, in words."""
        return f"the slice {self.part}" if self.part else "the whole test window"


CLAIMS = (
    Claim("Wide and deep together are ahead of wide alone.", _CHENG, "wide_deep", "wide"),
    Claim("Wide and deep together are ahead of deep alone.", _CHENG, "wide_deep", "deep"),
    Claim(
        "Crosses memorise: where they contradict the trend, wide and deep together are ahead of "
        "deep alone.",
        _CHENG,
        "wide_deep",
        "deep",
        "exceptions",
    ),
    Claim(
        "Embeddings generalise: on pairs never seen, deep is ahead of wide.",
        _CHENG,
        "deep",
        "wide",
        "unseen pairs",
    ),
    Claim(
        "Crosses need not be chosen: a factorization machine with layers is ahead.",
        "Guo et al. 2017 (DeepFM)",
        "deepfm",
        "wide_deep",
    ),
    Claim(
        "Crosses need not be chosen: cross layers of vectors are ahead.",
        "Wang et al. 2017 (DCN)",
        "dcn",
        "wide_deep",
    ),
    Claim(
        "Crosses need not be chosen: cross layers of matrices are ahead.",
        "Wang et al. 2021 (DCN V2)",
        "dcn_v2",
        "wide_deep",
    ),
    Claim(
        "Attention over the history is ahead of its fixed pool.",
        "Zhou et al. 2018 (DIN)",
        "din",
        "deep",
    ),
    Claim(
        "Side information helps new items: there it is ahead of keys alone.",
        "Strub et al. 2016",
        "hybrid_autoencoder",
        "dot_product",
        "new items",
    ),
    Claim(
        "A tuned dot product is ahead of a learnt similarity.",
        "Rendle et al. 2020",
        "dot_product",
        "neumf",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A claim, what the data say of it, and why."""

    claim: str
    source: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Side:
    """A model of the ladder; losses are means over its seeds."""

    model: str
    hidden: list[int]
    parameters: int
    layer_parameters: int
    nonzero: int
    validation_loss: float
    loss: float
    spread: float


@dataclass(frozen=True)
class Step:
    """The two sides with the same layers, and the test loss of the joint one minus the other's."""

    joint: Side
    apart: Side
    difference: Interval | None


def judge(interval: Interval) -> str:
    """What the interval of a difference says of the claim that it is below 0."""
    if interval.hi < 0:
        return SUPPORTED
    return CONTRADICTED if interval.lo > 0 else OPEN


def verdict_on(claim: Claim, found: Interval | str, loss: str) -> Verdict:
    """A claim's verdict.

    Args:
        found: ``better`` minus ``worse``, or why there is no such difference.
    """
    if isinstance(found, str):
        return Verdict(claim.text, claim.source, MISSING, found)
    said = f"{loss} of {claim.better} minus that of {claim.worse} on {claim.where}: {shown(found)}"
    return Verdict(claim.text, claim.source, judge(found), said)


def equal_size(steps: list[Step], loss: str) -> Verdict:
    """Whether joint training is ahead of the ensemble with the same layers.

    At the layers with which the ensemble is best on the validation window, which favours it.
    """
    step = min(steps, key=lambda step: step.apart.validation_loss)
    said = f"with layers {step.apart.hidden}, with which the ensemble is best on the validation "
    text = "At equal size, joint training is ahead of an ensemble."
    if step.difference is None:
        return Verdict(text, _CHENG, MISSING, f"{said}window, there is no interval")
    said += f"window: {loss} of {step.joint.model} minus that of the ensemble: "
    return Verdict(text, _CHENG, judge(step.difference), said + shown(step.difference))


def equal_quality(
    steps: list[Step], loss: str, difference: Callable[[Side, Side], Interval | None]
) -> Verdict:
    """Whether a smaller jointly trained model is as good as the best ensemble.

    The best ensemble and the smallest joint model that is no worse are found on the validation
    window. The test window contradicts them if the joint model is behind there.

    Args:
        difference: of two sides' test losses.
    """
    step = min(steps, key=lambda step: step.apart.validation_loss)
    best = step.apart
    joints = [step.joint for step in steps]
    equals = [side for side in joints if side.validation_loss <= best.validation_loss]
    said = (
        f"the ensemble is best with layers {best.hidden}: validation {loss} "
        f"{best.validation_loss:.5f}, {best.parameters:,} parameters, {best.layer_parameters:,} of "
        "them of layers; "
    )
    if equals:
        joint = min(equals, key=lambda side: (side.layer_parameters, side.validation_loss))
        # Against the joint model with the same layers: an ensemble has some weights more anyway.
        saved = step.joint.layer_parameters - joint.layer_parameters
        verdict = SUPPORTED if saved > 0 else OPEN if saved == 0 else CONTRADICTED
        said += (
            f"the smallest {joint.model} that is no worse has layers {joint.hidden}: "
            f"{joint.parameters / best.parameters:.1%} of the parameters, "
            f"{joint.layer_parameters / best.layer_parameters:.1%} of those of layers"
        )
    else:
        joint = min(joints, key=lambda side: side.validation_loss)
        verdict = OPEN
        said += (
            f"no {joint.model} of the ladder is as good there; the best has layers {joint.hidden} "
            f"and {joint.validation_loss:.5f}"
        )
    interval = difference(joint, best)
    if interval is not None:
        said += f"; on the test window its {loss} minus the ensemble's is {shown(interval)}"
        verdict = CONTRADICTED if judge(interval) == CONTRADICTED else verdict
    text = "At equal quality, joint training needs a smaller model than an ensemble."
    return Verdict(text, _CHENG, verdict, said)


def shown(interval: Interval) -> str:
    """An interval as text.

    >>> shown(Interval(-0.001, -0.0021, 0.0001))
    '-0.00100 [-0.00210, +0.00010]'
    """
    return f"{interval.difference:+.5f} [{interval.lo:+.5f}, {interval.hi:+.5f}]"


def plain(interval: Interval | None) -> dict[str, float] | None:
    """An interval, ready for JSON."""
    return None if interval is None else asdict(interval)
