"""All architectures by name (``training.model``). A new one is a file and a line here."""

from __future__ import annotations

from fathom.models import Builder
from fathom.models.attention import din
from fathom.models.autoencoder import hybrid_autoencoder
from fathom.models.cross_network import dcn, dcn_v2
from fathom.models.ensemble import ensemble
from fathom.models.factorization import deepfm, dot_product, neumf
from fathom.models.wide_deep import deep, wide, wide_deep

MODELS: dict[str, Builder] = {
    "wide": wide,
    "deep": deep,
    "wide_deep": wide_deep,
    "ensemble": ensemble,
    "deepfm": deepfm,
    "dcn": dcn,
    "dcn_v2": dcn_v2,
    "din": din,
    "dot_product": dot_product,
    "neumf": neumf,
    "hybrid_autoencoder": hybrid_autoencoder,
}
