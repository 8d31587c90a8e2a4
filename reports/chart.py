"""A plot as the tree that Plotly's script reads: traces and a layout.

    made = Chart(height=300); made.add("scatter", x=steps, y=means); made.xaxis(title="step")
    json = made.json()

Plotly's own classes look over every property of every trace, which takes longer than all else of
a report; a test has them look over every plot (`tests/reports/test_report_page.py`).
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from sarm.records import plain

TYPES = {"float64": "f8", "float32": "f4", "int32": "i4"}
"""Arrays of these go as bytes, by the names that Plotly's script has for them."""


class Chart:
    """`data` are the traces, `layout` the rest, both as Plotly names things."""

    def __init__(self, **layout: Any) -> None:
        self.data: list[dict[str, Any]] = []
        self.layout: dict[str, Any] = {"xaxis": {}, "yaxis": {}, **layout}

    def add(self, type_: str, **trace: Any) -> None:
        """A trace on top of those before it."""
        self.data.append({"type": type_, **trace})

    def xaxis(self, **settings: Any) -> None:
        self.layout["xaxis"] |= settings

    def yaxis(self, **settings: Any) -> None:
        self.layout["yaxis"] |= settings

    def vline(self, x: float, line: dict[str, Any], label: str = "") -> None:
        """A line across the whole height, its label to the right of its top."""
        ends = {"x0": x, "x1": x, "xref": "x", "y0": 0, "y1": 1, "yref": "y domain"}
        self._line(ends, line)
        if label:
            at = {"x": x, "xref": "x", "xanchor": "left", "y": 1, "yref": "y domain"}
            named = {"text": label, "showarrow": False, "yanchor": "top", **at}
            self.layout.setdefault("annotations", []).append(named)

    def hline(self, y: float, line: dict[str, Any]) -> None:
        """A line across the whole width."""
        self._line({"x0": 0, "x1": 1, "xref": "x domain", "y0": y, "y1": y, "yref": "y"}, line)

    def json(self) -> str:
        """NaN as null."""
        tree = {"data": list(map(_packed, self.data)), "layout": self.layout}
        return json.dumps(plain(tree), allow_nan=False, separators=(",", ":"))

    def _line(self, ends: dict[str, Any], line: dict[str, Any]) -> None:
        shape = {"type": "line", "line": line, **ends}
        self.layout.setdefault("shapes", []).append(shape)


def _packed(value: Any) -> Any:
    """The same tree with its arrays of numbers as bytes."""
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and str(value.dtype) in TYPES:
        bytes_ = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        packed = {"dtype": TYPES[str(value.dtype)], "bdata": bytes_}
        shape = {"shape": ", ".join(map(str, value.shape))} if value.ndim > 1 else {}
        return packed | shape
    return value
