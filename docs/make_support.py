"""Writes docs/support.md, the page of what works with what, from the table behind tests/support.

    python docs/make_support.py

`page()` gives the text; tests/test_docs.py compares it with the committed file. A green cell is a test of the suite by that name.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
HEAD = """\
<!-- Written by docs/make_support.py from tests/support/cells.py. Change that, then run it again. -->

# What works with what

A ● is a test that passes with the suite (`make test`), named below, on a tiny Llama, on a CPU. A – has its reason below. Nothing was run on
a GPU: for CUDA every cell reads NOT MEASURED.
"""


def page() -> str:
    """The whole page."""
    sys.path.insert(0, str(ROOT))
    from tests.support.cells import CAPABILITIES, METHODS, reason, test_name

    lines = [HEAD, "| method | " + " | ".join(CAPABILITIES) + " |", "| --- " * (len(CAPABILITIES) + 1) + "|"]
    grey: dict[str, list[str]] = {}
    for method in METHODS:
        cells = []
        for capability in CAPABILITIES:
            why = reason(method, capability)
            cells.append("–" if why else "●")
            if why:
                grey.setdefault(why, []).append(f"{method} × {capability}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "## What a column says", "", *(f"- **{name}**: {words}." for name, words in CAPABILITIES.items())]
    lines += ["", "## Why a cell is grey", "", *(f"- {', '.join(cells)}: {why}." for why, cells in grey.items())]
    lines += ["", "## The tests", ""]
    lines += [
        f"- {method}: " + ", ".join(f"`{test_name(method, c)}`" for c in CAPABILITIES if reason(method, c) is None) for method in METHODS
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
