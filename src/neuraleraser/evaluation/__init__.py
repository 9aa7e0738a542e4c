"""Measuring erasures: any `method.Method` with any judge.

`evaluate` does three things in a row. `draw`: cells (`protocol`) and methods to pictures and rows on disk
(`run_folder`). `measure`: the rows (`results`) to figures, by the definitions of `metrics` and, beside them, of others
(`official_metrics`). `report`: figures and pictures to a page, a JSON file and tables.
"""

from __future__ import annotations
