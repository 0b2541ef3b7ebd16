"""Negatives for logs that hold positives only: drawn at random, stably, with known probability.

A request with ``m`` draws from a pool of ``n`` items draws each time every item alike, with
replacement. Repeats count once, so an item of the pool is in the sample with probability
1 - (1 - 1/n)^m, which is recorded beside it. Draws come from MD5 of seed, request and number of
the draw, so that they are the same on every machine, with any number of threads, and whatever
other requests are in the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fathom.sources.canonical import builtin

if TYPE_CHECKING:
    import ibis.expr.types as ir

_BITS = 53  # of a double's mantissa, so that the quotient below is exact


def uniform(*parts: Any) -> Any:
    """A column of numbers in [0, 1) that depend on nothing but the values of ``parts``.

    Parts are columns or integers. Their text, joined by ``/``, goes through MD5; the last 8 bytes,
    little-endian, are a number of 64 bits, whose upper 53 are divided by 2^53.
    """
    import ibis

    texts = [ibis.literal(str(p)) if isinstance(p, int) else p.cast("string") for p in parts]
    joined = ibis.literal("/").join(texts)
    number = builtin("md5_number_lower", ("string",), "uint64")(joined)
    return (number >> (64 - _BITS)).cast("float64") / 2.0**_BITS


def draw(requests: ir.Table, key: str, seed: int) -> ir.Table:
    """Draw positions from the pool of each request.

    Args:
        requests: one row per request: ``key``, ``n`` (size of its pool), ``m`` (how many draws).
        key: name of the request's key column.
        seed: another seed, other draws.

    Returns:
        One row per request and distinct position: ``key``, ``position`` (0 to n - 1) and
        ``inclusion_probability``.
    """
    import ibis

    draws = requests.mutate(number=ibis.range(0, requests.m, 1).unnest())
    at = (uniform(seed, draws[key], draws.number) * draws.n).floor().cast("int64")
    probability = 1.0 - (1.0 - 1.0 / draws.n) ** draws.m
    return draws.select(key, position=at, inclusion_probability=probability).distinct()
