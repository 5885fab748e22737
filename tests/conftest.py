"""Shared by all tests: a cache that outlives a run (models are fetched once), and hypothesis without deadlines."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("edge", deadline=None, derandomize=True)
settings.load_profile("edge")
