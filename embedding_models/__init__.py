"""The frozen audio encoders, and how their frames become one vector per clip or track.

What is exported here is imported when it is asked for: reading the registry must not load audio libraries.
"""

import importlib
from typing import Any

from embedding_models.registry import ENCODERS

_LOCATIONS = {
    "AudioError": "embedding_models.audio",
    "enrich": "embedding_models.enrichment",
    **{name: module for module, _, name in (each.location.partition(":") for each in ENCODERS.values())},
}

__all__ = sorted(_LOCATIONS)


def __getattr__(name: str) -> Any:
    """An encoder's class under its own name, `AudioError` or `enrich`."""
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LOCATIONS[name]), name)
