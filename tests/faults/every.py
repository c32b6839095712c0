"""All faults, in the order of the table: that in which these modules are imported."""

from __future__ import annotations

import importlib

from faults.fault import FAULTS

for _name in ("lost", "stuck", "calls", "data"):
    importlib.import_module(f"faults.{_name}")

__all__ = ["FAULTS"]
