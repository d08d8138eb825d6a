"""The page of methods.py: tables, a picture, and whether what the field says of methods holds here, each with its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _measure import table

METRIC = {"quickstart": "exact_match", "banking77": "exact_match"}
# Bytes of a trained number: of a 16-bit weight its master's rest, two moments, a 16-bit gradient; of an adapter's all four in fp32.
WHOLE, ADAPTER = 12, 16
NO_ADAPTERS = ("full", "partial")
WARM_UP, TIMED = 3, 12  # updates whose costs are measured
MERGED_COST = 0.05  # a merged model is as fast as the base if its time is within this share
MISSING = "not measured"
COMMAND = "python benchmarks/methods.py --banking banking77 --write docs/methods"
COSTS = [
    "method",
    "trained (share)",
    "optimiser and gradients (of full)",
    "peak memory",
    "tokens/s",
    "result",
    "time a token, over the base's",
    "merged",
]
LEFT = "NOT MEASURED: the series has not come to this. It takes hours on two cores and goes on where it was stopped."


def write_page(
    target: Path,
    done: Mapping[str, Any],
    methods: Mapping[str, Any],
    rates: Mapping[str, list[float]],
    defaults: Mapping[str, float | None],
) -> None:
    """Writes TARGET-table.md, which docs/methods.md includes by its own words around it, and TARGET.svg."""
    target.parent.mkdir(parents=True, exist_ok=True)
    known = [name for name in methods if _runs(done, "quickstart", name) or _runs(done, "banking77", name)]
    sections = {
        "What each costs": _costs(done, methods),
        "What each reaches, and what it forgets": _scores(done, known),
        "The sweep of learning rates": _rates(done, methods, rates, defaults),
        "Does it hold what the field says?": _claims(done, known),
    }
    parts = [f"# Methods, measured\n\n    {COMMAND}", *(f"## {title}\n\n{text or LEFT}" for title, text in sections.items())]
    target.with_name(f"{target.name}-measured.md").write_text("\n\n".join(parts) + "\n")
    placed = [name for name in known if _runs(done, "quickstart", name) and f"costs {name}" in done]
    if placed:
        target.with_suffix(".svg").write_text(_picture(done, placed))


def _runs(done: Mapping[str, Any], task: str, name: str) -> list[dict[str, Any]]:
    return [found for key, found in sorted(done.items()) if key.startswith(f"{task} {name} seed=")]


def _value(run: Mapping[str, Any], task: str) -> dict[str, float]:
    return run["scores"]["task"]["tuned"][METRIC[task]]


def _accuracy(done: Mapping[str, Any], task: str, name: str) -> float | None:
    runs = _runs(done, task, name)
    return mean(_value(run, task)["value"] for run in runs) if runs else None


def _interval(done: Mapping[str, Any], task: str, name: str) -> tuple[float, float]:
    """The means of the runs' intervals over the test items."""
    values = [_value(run, task) for run in _runs(done, task, name)]
    return mean(v["low"] for v in values), mean(v["high"] for v in values)


def _forgetting(done: Mapping[str, Any], task: str, name: str) -> float | None:
    """The tuned model's perplexity on general text over the base's, mean over the seeds."""
    base = [run["scores"]["general"].get("zero_shot") for run in _runs(done, task, "lora")]
    base = [found for found in base if found]
    runs = _runs(done, task, name)
    if not base or not runs:
        return None
    return mean(run["scores"]["general"]["tuned"]["perplexity"]["value"] for run in runs) / base[0]["perplexity"]["value"]


def _costs(done: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    full = done.get("costs full")
    rows, where = [], set()
    for name in methods:
        one = done.get(f"costs {name}")
        if one is None:
            rows.append([name, *[MISSING] * (len(COSTS) - 1)])
            continue
        times = one["token_milliseconds"]
        state = _state(one, methods[name])
        of_full = f"{state / _state(full, methods['full']):.2%}" if full else MISSING
        rows.append(
            [
                name,
                f"{one['trainable']:,} ({one['trainable'] / (full or one)['parameters']:.2%})",
                f"{state / 1e6:,.1f} MB ({of_full})",
                f"{one['peak_memory_bytes'] / 1e9:.2f} GB",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['result_bytes'] / 1e6:,.2f} MB",
                f"{times['live'] / times['base']:.2f}",
                f"{times['merged'] / times['base']:.2f}" if "merged" in times else "-",
            ]
        )
        where.add(one["machine"])
    words = f"{WARM_UP + TIMED} updates, of which {TIMED} are timed, and answers to short prompts one at a time. On the quickstart's task"
    return f"{words}; {'; '.join(sorted(where))}.\n\n" + table(COSTS, rows) if where else ""


def _state(cost: Mapping[str, Any], method: Mapping[str, Any]) -> int:
    """Bytes of optimiser and gradients, in 16 bits."""
    return cost["trainable"] * (WHOLE if method["type"] in ("full", "partial") else ADAPTER)


def _scores(done: Mapping[str, Any], known: list[str]) -> str:
    tasks = [task for task in METRIC if any(_runs(done, task, name) for name in known)]
    rows = []
    for name in known:
        cells = [f"{name} ({next(_runs(done, task, name)[0]['rate'] for task in tasks if _runs(done, task, name)):g})"]
        for task in tasks:
            runs = _runs(done, task, name)
            if not runs:
                cells += [MISSING, MISSING]
                continue
            values = [_value(run, task) for run in runs]
            spread = f" ± {stdev(v['value'] for v in values):.3f}" if len(values) > 1 else ""
            low, high = mean(v["low"] for v in values), mean(v["high"] for v in values)
            seeds = f"{len(values)} seed" + ("s" if len(values) > 1 else "")
            cells.append(f"{mean(v['value'] for v in values):.3f}{spread} [{low:.3f}, {high:.3f}] ({seeds}, n = {values[0]['n']})")
            forgotten = _forgetting(done, task, name)
            cells.append(MISSING if forgotten is None else f"{forgotten:.2f}")
        rows.append(cells)
    header = [
        "method (rate)",
        *(cell for task in tasks for cell in (f"{task}: exact match", "perplexity on general text, over the base's")),
    ]
    words = "Mean over the seeds ± its standard deviation; in brackets the means of the runs' 95% intervals over the test items."
    return f"{words}\n\n" + table(header, rows) if rows else ""


def _rates(
    done: Mapping[str, Any], methods: Mapping[str, Any], rates: Mapping[str, list[float]], defaults: Mapping[str, float | None]
) -> str:
    rows, where = [], set()
    for name in methods:
        tried = {rate: done[key] for rate in rates[name] if (key := f"sweep {name} rate={rate:g}") in done}
        losses = {rate: math.inf if run["validation_loss"] is None else run["validation_loss"] for rate, run in tried.items()}
        best = min(losses, key=losses.__getitem__) if len(losses) == len(rates[name]) else None
        said = [
            (f"{rate:g}: {loss:.4f}" if math.isfinite(loss) else f"{rate:g}: not finite")
            + (" (best)" if rate == best else "")
            + (" (default)" if rate == defaults[name] else "")
            for rate, loss in losses.items()
        ]
        said += [f"{rate:g}: {MISSING}" for rate in rates[name] if rate not in losses]
        rows.append([name, ", ".join(said)])
        where |= {run["machine"] for run in tried.values()}
    words = (
        f"Validation loss after one epoch of the quickstart's task, one seed; {'; '.join(sorted(where))}. A method's default is the lowest "
        "rate whose loss is within 3% of the best."
    )
    return f"{words}\n\n" + table(["method", "rate: loss"], rows) if where else ""


def _claims(done: Mapping[str, Any], known: list[str]) -> str:
    """What is said of methods, each with this benchmark's figure."""
    lines = []
    costs = {key.removeprefix("costs "): found for key, found in done.items() if key.startswith("costs ")}
    full, lora = costs.get("full"), costs.get("lora")
    shares = {name: full["trainable"] / found["trainable"] for name, found in costs.items() if name not in NO_ADAPTERS} if full else {}
    if shares:
        inside = [name for name, factor in shares.items() if factor >= 10]
        least, most = min(shares.values()), max(shares.values())
        held = "holds" if len(inside) == len(shares) else f"holds for {', '.join(inside) or 'none'}"
        lines.append(f"- Adapters train 10 to 100 times fewer numbers than full tuning: {held} ({least:,.0f} to {most:,.0f} times).")
    for task in METRIC:
        ceiling = _accuracy(done, task, "full")
        others = {name: _accuracy(done, task, name) for name in known if name != "full"}
        others = {name: value for name, value in others.items() if value is not None}
        if ceiling is None or not others:
            continue
        best = max(others, key=others.__getitem__)
        verdict = "holds" if ceiling >= others[best] else "not reproduced"
        (low, high), (other_low, other_high) = (_interval(done, task, name) for name in ("full", best))
        apart = "" if low > other_high or other_low > high else "; the intervals overlap, so that the two are not told apart"
        lines.append(f"- Full tuning has the best ceiling, {task}: {verdict} (full {ceiling:.3f}, {best} {others[best]:.3f}){apart}.")
    if lora and full:
        ratio = lora["peak_memory_bytes"] / full["peak_memory_bytes"]
        lines.append(f"- LoRA needs little memory: {'holds' if ratio < 1 else 'not reproduced'} ({ratio:.2f} of full tuning's peak).")
    if lora and "merged" in lora["token_milliseconds"]:
        times = lora["token_milliseconds"]
        cost, live = (times[name] / times["base"] for name in ("merged", "live"))
        bases = [found["token_milliseconds"]["base"] for name, found in costs.items() if name != "qlora"]  # whose base is another
        swing = max(bases) / min(bases) - 1
        verdict = "holds" if cost <= 1 + MERGED_COST else "not reproduced"
        if swing > MERGED_COST and abs(cost - 1) <= swing:
            verdict = f"not shown, since the base's own time swung by {swing:.0%}"
        lines.append(f"- LoRA costs nothing once it is merged: {verdict} ({cost:.2f} of the base's time a token; live {live:.2f}).")
    return "\n".join(lines)


def _picture(done: Mapping[str, Any], known: list[str]) -> str:
    """Accuracy by trained numbers, a point a method, on a logarithmic axis."""
    from math import log10

    points = [(name, log10(done[f"costs {name}"]["trainable"]), _accuracy(done, "quickstart", name)) for name in known]
    width, height, margin = 640, 320, 44
    low, high = min((x for _, x, _ in points), default=3) - 0.3, max((x for _, x, _ in points), default=9) + 0.6
    at_x = lambda x: margin + (x - low) / (high - low) * (width - 2 * margin)  # noqa: E731
    at_y = lambda y: height - margin - y * (height - 2 * margin)  # noqa: E731
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="Exact match by trained numbers">',
        "<style>text{font:12px system-ui,sans-serif;fill:#666}circle{fill:#c2410c}line{stroke:#8886}</style>",
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line x1="{margin}" x2="{width - margin}" y1="{at_y(share):.1f}" y2="{at_y(share):.1f}"/>')
        parts.append(f'<text x="4" y="{at_y(share) + 4:.1f}">{share:.0%}</text>')
    for power in range(int(low) + 1, int(high) + 1):
        parts.append(f'<text x="{at_x(power):.1f}" y="{height - margin + 18}" text-anchor="middle">10^{power}</text>')
    for name, x, y in points:
        parts.append(
            f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4"/><text x="{at_x(x) + 6:.1f}" y="{at_y(y) + 4:.1f}">{name}</text>'
        )
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">numbers that train</text></svg>')
    return "\n".join(parts) + "\n"
