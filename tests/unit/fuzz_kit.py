"""How the fuzz tests search: the same examples every time, unless ``NEMO_KTO_FUZZ=wild`` asks for new and more."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("steady", derandomize=True, max_examples=60, **_COMMON)
settings.register_profile("wild", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("NEMO_KTO_FUZZ", "steady"))
