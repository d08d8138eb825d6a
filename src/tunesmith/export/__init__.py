"""What leaves a run directory: the tuned model merged into plain weights, or its adapter; proved equal to the live one; pushed to a hub.

export("runs/quickstart", to="merged")        # runs/quickstart/export/merged, loadable by transformers alone
"""

from __future__ import annotations

from ._export import Exported, export

__all__ = ["Exported", "export"]
