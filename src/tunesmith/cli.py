"""The command line: each verb parses its words, calls one function of the public API, and prints what it gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import OutputInUse, TunesmithError

app = typer.Typer(
    help="Fine-tune a language model and prove what the tuning did: one recipe, one command, one verdict.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. stages.0.learning_rate=1e-4.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory; else runs/NAME.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier run in the same directory stopped.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, events as JSON lines on standard error.")]
GateFlag = Annotated[bool, typer.Option("--gate", help="Exit with status 5 unless the verdict is PASS.")]


def _verb(as_json: bool, work: Callable[[Any], Any], show: Callable[[Any], str]) -> None:
    """Runs a verb's function with a display and prints its result."""
    from .progress import Display

    display = Display(as_json=as_json)
    try:
        result = work(display)
    finally:
        display.close()
    print(json.dumps(_plain(result), indent=2, default=str) if as_json else show(result))


def _plain(result: Any) -> Any:
    from dataclasses import asdict, is_dataclass

    return asdict(result) if is_dataclass(result) and not isinstance(result, type) else result


@app.command(epilog="Example: tunesmith run recipes/quickstart.yaml --gate")
def run(
    recipe: RecipePath, set_: Sets = None, out: Out = None, resume: Resume = False, gate: GateFlag = False, as_json: AsJson = False
) -> None:
    """Do everything the recipe asks for: data, plan, training, evaluation, verdict, report."""
    _check_recipe(recipe, set_, out, resume)
    from .pipeline import run as work

    _verb(as_json, lambda display: work(recipe, sets=set_ or (), out=out, resume=resume, gate=gate, report=display), _run_words)


@app.command(epilog="Example: tunesmith train recipes/quickstart.yaml --set stages.0.max_steps=20 --out runs/try")
def train(recipe: RecipePath, set_: Sets = None, out: Out = None, resume: Resume = False, as_json: AsJson = False) -> None:
    """Train without the evaluation."""
    _check_recipe(recipe, set_, out, resume)
    from .pipeline import train as work

    _verb(as_json, lambda display: work(recipe, sets=set_ or (), out=out, resume=resume, report=display), _run_words)


@app.command(epilog="Example: tunesmith evaluate recipes/quickstart.yaml")
def evaluate(recipe: RecipePath, set_: Sets = None, out: Out = None, as_json: AsJson = False) -> None:
    """Evaluate what `train` left in the run directory."""
    _check_recipe(recipe, set_, out, True)
    from .pipeline import evaluate as work

    _verb(as_json, lambda display: work(recipe, sets=set_ or (), out=out, report=display), _run_words)


@app.command(epilog="Example: tunesmith plan recipes/quickstart.yaml")
def plan(recipe: RecipePath, set_: Sets = None, as_json: AsJson = False) -> None:
    """Say what would happen: memory, time, rows, and one rendered example with its mask. Nothing is written."""
    _check_recipe(recipe, set_, None, True)
    from .pipeline import plan as work
    from .progress import plan_words

    def show(result: dict[str, Any]) -> str:
        from rich.console import Console

        console = Console()
        console.print(result["recipe"], highlight=False, markup=False)
        console.print("the first row; what is green carries loss:", highlight=False)
        console.print(result["example"])
        for finding in result["findings"]:
            console.print(f"{finding['check']}: {finding['evidence']}", highlight=False, markup=False)
        notes = result["notes"] + result["plan"]["notes"]
        return plan_words({**result["plan"], "ledger": result["ledger"], "notes": notes})

    _verb(as_json, lambda display: work(recipe, sets=set_ or (), report=display), show)


@app.command(epilog="Example: tunesmith chat runs/quickstart")
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    system: Annotated[str | None, typer.Option(help="The system message; else the one of the training rows.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a run's tuned model, a line at a time; /reset begins anew, end of input ends."""
    from .chat import Chat

    talk = Chat(run, system=system, temperature=temperature, max_new_tokens=max_new_tokens)
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("you> " if interactive else "").strip()
        except EOFError:
            return
        if text == "/reset":
            talk.reset()
        elif text:
            answer = talk.ask(text)
            print(json.dumps({"user": text, "assistant": answer}, ensure_ascii=False) if as_json else answer, flush=True)


@app.command(epilog="Example: tunesmith init tickets.csv --test held_out.csv")
def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file, or a hub data set.")],
    test: Annotated[str | None, typer.Option(help="A test file; else test.* beside FILE is looked for.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the recipe goes; else the current folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a data file and write a commented recipe that runs."""
    from .data.inspect import propose_recipe

    folder = out or Path(".")
    files = propose_recipe(file, test, folder=folder)
    taken = [str(folder / name) for name in files if (folder / name).exists()]
    if taken and not force:
        raise OutputInUse(f"{', '.join(taken)} is there already", where=str(folder), mend="choose another --out, or add --force")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    written = [str(folder / name) for name in files]
    print(json.dumps({"written": written}) if as_json else f"wrote {', '.join(written)}\nnext: tunesmith plan {written[0]}")


@app.command(epilog="Example: tunesmith report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")], as_json: AsJson = False) -> None:
    """Write report.html again from what the run directory holds."""
    from .report import write_report

    path = str(write_report(run))
    print(json.dumps({"report": path}) if as_json else path)


@app.command(epilog="Example: tunesmith schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from .recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


@data_app.command("check", epilog="Example: tunesmith data check train.jsonl --test test.jsonl")
def data_check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Training rows.")],
    test: Annotated[Path | None, typer.Option(help="Test rows, looked for among the training rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read and check a data file: format, bad rows, duplicates, near duplicates, test rows among the training rows."""
    from .inspection import check_data_file

    _verb(as_json, lambda display: check_data_file(path, test), _check_words)


def _check_recipe(recipe: Path, sets: list[str] | None, out: Path | None, resume: bool) -> None:
    """Refuses a wrong recipe or a run directory in use before anything heavy is imported."""
    from .recipe import load_recipe
    from .rundir import refuse_in_use

    checked = load_recipe(recipe, sets or (), out=out)
    refuse_in_use(Path(checked.output.dir or Path("runs") / checked.name), resume=resume)


def _run_words(result: Any) -> str:
    lines = []
    if result.evaluation:
        lines.append(f"\nverdict: {result.verdict}")
        lines += [f"  {gate['result']}: {gate['name']}: {gate['reason']}" for gate in result.evaluation["gates"]]
        recommended = result.evaluation["recommendation"]
        lines.append(f"recommended: {recommended['candidate']}: {recommended['reason']}")
    lines.append(f"run: {result.path}\nreport: {result.report}")
    return "\n".join(lines)


def _check_words(result: dict[str, Any]) -> str:
    lines = [*result["notes"]]
    lines += [f"{row['path']}:{row['line']}: {row['reason']}" for row in result["rejected"]]
    lines += [f"dropped, {reason}: {count}" for reason, count in result["dropped"].items()]
    lines += [f"{finding['check']}: {finding['evidence']}\n  mend: {finding['mend']}" for finding in result["findings"]]
    return "\n".join(lines)


def main() -> None:
    """Runs the command line; a named error becomes its exit status and two lines on standard error."""
    try:
        app()
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
