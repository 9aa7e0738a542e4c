"""Measuring erasure: verdicts (one row an image), metrics over them, and the report of both.

`verdicts` holds the table, `metrics` the definitions, `published` figures as others define them, `measure` a
value with its interval, `report` the plain data of a report, `page` its HTML, `pictures` its images.
"""

from __future__ import annotations
