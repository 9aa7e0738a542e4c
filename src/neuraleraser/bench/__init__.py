"""Measuring erasure: verdicts (one row an image), metrics over them, and the report of both."""

from __future__ import annotations
