"""Does a recipe really learn? Runs it with several seeds, whole, and writes what came of each: the comparison, and the curves.

    python benchmarks/seeds.py recipes/grpo.yaml --stage grpo --metric exact_match --curves reward,kl --write docs/learning/grpo

Writes docs/learning/grpo.md and an SVG for each curve beside it. Every seed is in the table, also one that fails. A run that is there
already is taken as it is (`--resume`), so that an interrupted series goes on. `--json` ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.report.charts import Line, line_chart

STYLE = """<style>text{font:11px system-ui,sans-serif;fill:#666}.grid{stroke:#8884}.axis{stroke:#888}polyline{fill:none;stroke-width:1.5}
.train{stroke:#777}.validation{stroke:#c2410c}.rate{stroke:#1d4ed8}circle{fill:#c2410c}</style>"""
KINDS = ("train", "validation", "rate")
ROOT = Path(__file__).resolve().parents[1]
ABSOLUTE = re.compile(r"""(?:^|(?<=[\s=\[{,'"]))(?:~|\.\.)?/[^\s,}\]'"]*""")  # a path in a word, also inside a setting's YAML


def main() -> None:
    """Runs the seeds and writes the page."""
    wanted = _arguments()
    runs = [_run(wanted, seed) for seed in wanted.seeds]
    page = _page(wanted, runs)
    print(page)
    if wanted.write:
        target = Path(wanted.write)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".md").write_text(page)
        for curve in wanted.curves:
            target.with_name(f"{target.name}-{_word(curve)}.svg").write_text(_chart(wanted.stage, curve, runs))
    if wanted.json:
        print(json.dumps({"seeds": [{key: run[key] for key in ("seed", "verdict", "comparison", "seconds")} for run in runs]}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--stage", required=True, help="the stage whose curves are drawn")
    parser.add_argument("--metric", required=True, help="what tuned is compared in")
    parser.add_argument("--baseline", default="sft", help="the candidate that tuned is compared with")
    parser.add_argument("--curves", type=lambda text: text.split(","), default=["reward", "kl"])
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--out", default="runs", help="the folder of the runs")
    parser.add_argument("--title")
    parser.add_argument("--write", help="the page, without its ending")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _run(wanted: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One seed's run: its comparison and its events."""
    out = Path(wanted.out) / f"{Path(wanted.recipe).stem}-seed{seed}"
    print(f"seed {seed}: {out}", file=sys.stderr, flush=True)
    result = tunesmith.run(wanted.recipe, sets=[*wanted.sets, f"seed={seed}"], out=out, resume=True)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    evaluation = result.evaluation
    pairs = [
        row
        for row in evaluation["comparisons"]
        if (row["candidate"], row["baseline"], row["task"]) == ("tuned", wanted.baseline, "task")
        and _is_metric(row["metric"], wanted.metric)
    ]
    return {
        "seed": seed,
        "verdict": result.verdict,
        "comparison": next((row for row in pairs if row["metric"] == wanted.metric), None),
        "parts": [row for row in pairs if row["metric"] != wanted.metric],
        "candidates": evaluation["tasks"]["task"]["candidates"],
        "steps": [event for event in events if event.get("stage") == wanted.stage and "loss" in event],
        "stopped": next((event["rule"] for event in events if event.get("event") == "stopped"), None),
        "seconds": result.plan["measured"]["seconds"],
        "recipe": (out / "recipe.yaml").read_text(),
    }


def _is_metric(metric: str, wanted: str) -> bool:
    return metric == wanted or metric.startswith(f"{wanted}.")


def _page(wanted: argparse.Namespace, runs: list[dict[str, Any]]) -> str:
    lines = [f"# {wanted.title or Path(wanted.recipe).stem}", "", f"    {_command(wanted)}", ""]
    lines += [f"| seed | {wanted.baseline} | tuned | difference, 95% interval | n | KL at the end | stopped by | verdict | minutes |"]
    lines += ["| --- " * 9 + "|"]
    for run in runs:
        row, last = run["comparison"], run["steps"][-1]
        values = [_value(run["candidates"].get(name), wanted.metric) for name in (wanted.baseline, "tuned")]
        difference = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] | {row['n']}" if row else "not measured | "
        kl = f"{last['kl']:.2f}" if "kl" in last else "-"
        cells = [str(run["seed"]), *values, difference, kl, run["stopped"] or "-", str(run["verdict"]), f"{run['seconds'] / 60:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    names = [row["metric"] for row in runs[0]["parts"]]
    if names:
        lines += [
            "",
            f"Each part apart, tuned against {wanted.baseline}:",
            "",
            "| seed | " + " | ".join(names) + " |",
            "| --- " * (len(names) + 1) + "|",
        ]
        for run in runs:
            parts = {row["metric"]: f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" for row in run["parts"]}
            lines.append(f"| {run['seed']} | " + " | ".join(parts.get(name, "-") for name in names) + " |")
    name = Path(wanted.write).name if wanted.write else "curve"
    lines += ["", *(f"![{curve} by update, one line a seed]({name}-{_word(curve)}.svg)" for curve in wanted.curves), ""]
    return "\n".join(lines)


def _command(wanted: argparse.Namespace) -> str:
    """The command that makes the page again, without what only this machine has: see `_portable`."""
    words = ["python", "benchmarks/seeds.py", wanted.recipe, "--stage", wanted.stage, "--metric", wanted.metric]
    words += ["--baseline", wanted.baseline, "--curves", ",".join(wanted.curves), "--seeds", ",".join(map(str, wanted.seeds))]
    for given in wanted.sets:
        words += ["--set", given]
    words += ["--write", wanted.write] if wanted.write else []
    return shlex.join(map(_portable, words))


def _portable(word: str) -> str:
    """The word with each path that is not relative cut: to what it is in the repository, or to its last name."""

    def cut(found: re.Match[str]) -> str:
        path = Path(found[0]).expanduser().resolve()
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)

    return ABSOLUTE.sub(cut, word)


def _value(candidate: dict[str, Any] | None, metric: str) -> str:
    found = (candidate or {}).get("metrics", {}).get(metric)
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else "not measured"


def _chart(stage: str, curve: str, runs: list[dict[str, Any]]) -> str:
    lines = [
        Line(f"seed {run['seed']}", [(step["step"], step.get(curve)) for step in run["steps"]], KINDS[i % len(KINDS)])
        for i, run in enumerate(runs)
    ]
    svg = str(line_chart(lines, name=f"{curve} of stage {stage}", x_label="update", y_label=curve))
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{STYLE}", 1)


def _word(curve: str) -> str:
    return curve.replace("/", "-")


if __name__ == "__main__":
    main()
