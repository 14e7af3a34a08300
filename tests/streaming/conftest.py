"""Hypothesis settings of these tests."""

from __future__ import annotations

from hypothesis import settings

# The first call of a codec or of numpy may take longer than Hypothesis' default deadline.
settings.register_profile("streaming", deadline=None)
settings.load_profile("streaming")
