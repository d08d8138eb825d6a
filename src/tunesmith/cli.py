"""The command line: each verb parses its words, calls one function of the public API, and prints what it gives."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from .errors import Interrupted, RecipeError, TunesmithError

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
Columns = Annotated[
    str | None, typer.Option("--columns", metavar="FIELD=COLUMN,...", help="As data.columns: prompt=text,completion=label.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier run in the same directory stopped.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, events as JSON lines on standard error.")]
GateFlag = Annotated[bool, typer.Option("--gate", help="Exit with status 5 unless the verdict is PASS.")]


class Tool(StrEnum):
    """What a launch file is for."""

    slurm = "slurm"
    sky = "sky"
    dstack = "dstack"


def _print_version(asked: bool) -> None:
    if asked:
        from .inspection import package_version

        print(f"tunesmith {package_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """What stands before a verb."""


def _verb(as_json: bool, work: Callable[[Any], Any], show: Callable[[Any], str]) -> Any:
    """Runs a verb's function with a display, prints its result, and gives it."""
    from .progress import Display, as_json_text, libraries_in_json, visible
    from .rundir import rank

    display = Display(as_json=as_json)
    with libraries_in_json() if as_json else nullcontext():
        try:
            result = work(display)
        finally:
            display.close()
    if rank() == 0:
        print(as_json_text(result, indent=2) if as_json else visible(show(result)))
    return result


@app.command(epilog="Example: tunesmith run recipes/quickstart.yaml --gate")
def run(
    recipe: RecipePath,
    set_: Sets = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=A,B,...", help="Run every combination, and compare: --sweep seed=0,1,2."),
    ] = None,
    out: Out = None,
    resume: Resume = False,
    gate: GateFlag = False,
    as_json: AsJson = False,
) -> None:
    """Do everything the recipe asks for: data, plan, training, evaluation, verdict, report."""
    if sweep:
        if gate:
            raise RecipeError(
                "--gate is for one run, and a sweep is many", where="--gate", mend="leave it out: sweep.json has each verdict"
            )
        from .sweep import require_all
        from .sweep import sweep as many

        swept = _verb(as_json, lambda display: many(recipe, sweep, sets=set_ or (), out=out, resume=resume, report=display), _sweep_words)
        require_all(swept)  # what is done is printed by now
        return
    _check_recipe(recipe, set_, out, resume)
    from .pipeline import require_pass
    from .pipeline import run as work

    result = _verb(as_json, lambda display: work(recipe, sets=set_ or (), out=out, resume=resume, report=display), _run_words)
    if gate:  # the verdict is printed by now
        require_pass(result)


@app.command(epilog="Example: tunesmith train recipes/quickstart.yaml --set stages.0.max_steps=20 --out runs/try")
def train(recipe: RecipePath, set_: Sets = None, out: Out = None, resume: Resume = False, as_json: AsJson = False) -> None:
    """Train without the evaluation."""
    _check_recipe(recipe, set_, out, resume)
    from .pipeline import train as work

    _verb(as_json, lambda display: work(recipe, sets=set_ or (), out=out, resume=resume, report=display), _run_words)


@app.command(epilog="Example: tunesmith evaluate recipes/quickstart.yaml")
def evaluate(recipe: RecipePath, set_: Sets = None, out: Out = None, gate: GateFlag = False, as_json: AsJson = False) -> None:
    """Evaluate what `train` left in the run directory; one that holds no trained run is refused."""
    _check_recipe(recipe, set_, out, True, train=False)
    from .pipeline import evaluate as work
    from .pipeline import require_pass

    result = _verb(as_json, lambda display: work(recipe, sets=set_ or (), out=out, report=display), _run_words)
    if gate:
        require_pass(result)


@app.command(epilog="Example: tunesmith plan recipes/quickstart.yaml")
def plan(recipe: RecipePath, set_: Sets = None, as_json: AsJson = False) -> None:
    """Say what would happen: memory, time, rows, and one rendered example with its mask. Nothing is written."""
    from .recipe import load_recipe

    load_recipe(recipe, set_ or ())
    from .pipeline import plan as work

    _verb(as_json, lambda display: work(recipe, sets=set_ or (), report=display), _plan_words)


@app.command(epilog="Example: tunesmith chat runs/quickstart")
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    system: Annotated[str | None, typer.Option(help="The system message; else the one of the training rows.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens; else the evaluation's.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Let code that the model brings run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Talk to a run's tuned model, a line at a time; end of input ends. It is one conversation: each question is asked with all before it
    and their answers. A line /reset begins a new one. With --json, a line of JSON an answer."""
    from .chat import Chat
    from .progress import as_json_text, libraries_in_json, visible

    with libraries_in_json() if as_json else nullcontext():
        talk = Chat(run, system=system, temperature=temperature, max_new_tokens=max_new_tokens, trust_remote_code=trust_remote_code)
        for text in _lines_of_input("you> " if sys.stdin.isatty() else ""):
            if text == "/reset":
                talk.reset()
            else:
                answer = talk.ask(text)
                print(as_json_text({"user": text, "assistant": answer}) if as_json else visible(answer), flush=True)


def _lines_of_input(prompt: str) -> Iterator[str]:
    """Lines of standard input that hold something, to its end; bytes that are no UTF-8 become question marks."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


@app.command(epilog="Example: tunesmith init tickets.csv --test held_out.csv")
def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file, or a hub data set.")],
    test: Annotated[str | None, typer.Option(help="A test file; else test.* beside FILE is looked for.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the recipe goes; else the current folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a data file and write a commented recipe that runs."""
    from .inspection import init as work

    _verb(
        as_json,
        lambda display: {"written": [str(path) for path in work(file, test, out=out or ".", force=force)]},
        _init_words,
    )


def _init_words(done: dict[str, Any]) -> str:
    """What was written, and how the file was read, as the recipe's second line says it."""
    holds = Path(done["written"][0]).read_text().splitlines()[1].removeprefix("# ")
    return f"{holds}\nwrote {', '.join(done['written'])}\nnext: tunesmith plan {done['written'][0]}"


@app.command(epilog="Example: tunesmith launch recipes/quickstart.yaml --print slurm > job.sbatch")
def launch(
    recipe: RecipePath,
    tool: Annotated[Tool, typer.Option("--print", help="The cluster's tool.")],
    set_: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Print the file that starts a recipe on the machines of its `launch` section, for the tool that submits it."""
    from .launch import cluster_file

    _verb(as_json, lambda display: {"file": cluster_file(recipe, tool.value, set_ or ())}, lambda done: done["file"])


@app.command(epilog="Example: tunesmith report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")], as_json: AsJson = False) -> None:
    """Write report.html again from what the run directory holds."""
    from .report import write_report

    _verb(as_json, lambda display: {"report": str(write_report(run))}, lambda done: done["report"])


@app.command(epilog="Example: tunesmith export runs/quickstart --to merged --push me/tickets")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    to: Annotated[str, typer.Option("--to", help="merged: plain weights; adapter: PEFT's layout.")] = "merged",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder; else RUN/export/merged (or adapter).")] = None,
    stage: Annotated[str | None, typer.Option(help="An earlier stage's result in place of the last.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of merged weights or a whole model's: float32, bfloat16 or float16; else the run's.")
    ] = None,
    push: Annotated[str | None, typer.Option("--push", metavar="REPO", help="A repository of the hub (HF_ENDPOINT, HF_TOKEN).")] = None,
    public: Annotated[bool, typer.Option("--public", help="Whether a repository made for it can be read by all.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Let code that the model brings run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's result for other tools, proved equal to the live model, or nothing."""
    from .export import export as work

    how: dict[str, Any] = {"out": out, "stage": stage, "dtype": dtype, "push": push, "public": public, "force": force}
    _verb(as_json, lambda display: work(run, to, **how, trust_remote_code=trust_remote_code, report=display), _export_words)


def _sweep_words(result: Any) -> str:
    lines = [f"{run['name']}: {run['verdict'] or 'NOT MEASURED'}" for run in result.runs]
    lines += [f"{run['name']}: failed: {run['error']['what']}" for run in result.failed]
    if result.best is None:
        lines.append(f"nothing is chosen: {result.why}")
    else:
        lines.append(f"chosen: {', '.join(f'{key} = {value}' for key, value in result.best.items())} ({result.why})")
    return "\n".join([*lines, f"page: {result.page}"])


def _export_words(result: Any) -> str:
    lines = [f"exported: {result.path}", *(f"note: {note}" for note in result.notes)]
    if result.parity is not None:
        p = result.parity
        lines.insert(1, f"KL to the live model: {p.kl_mean:.2g} nats a position, at most {p.kl_max:.2g} ({p.prompts} rows)")
    return "\n".join([*lines, *([f"pushed: {result.pushed}"] if result.pushed else [])])


@app.command(epilog="Example: tunesmith schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from .recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


@data_app.command("check", epilog="Example: tunesmith data check train.jsonl --test test.jsonl")
def data_check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Training rows.")],
    test: Annotated[Path | None, typer.Option(help="Test rows, looked for among the training rows.")] = None,
    columns: Columns = None,
    form: Annotated[str, typer.Option("--format", metavar="NAME", help="As data.format: the record format of every row.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Read and check a data file: format, bad rows, duplicates, near duplicates, test rows among the training rows."""
    from .inspection import check_data_file
    from .progress import check_words

    mapped = _mapping(columns or "")
    _verb(as_json, lambda display: check_data_file(path, test, columns=mapped, format=form), check_words)


def _mapping(words: str) -> dict[str, str]:
    """`a=b,c=d` as a dict. Raises RecipeError."""
    pairs = [part.partition("=") for part in words.split(",") if part.strip()]
    for field, equals, column in pairs:
        if not equals or not field.strip() or not column.strip():
            raise RecipeError(
                f"`{field}{equals}{column}` is not of the form FIELD=COLUMN",
                where="--columns",
                mend="write --columns prompt=text,completion=label",
            )
    return {field.strip(): column.strip() for field, _, column in pairs}


def _check_recipe(recipe: Path, sets: list[str] | None, out: Path | None, resume: bool, *, train: bool = True) -> None:
    """Refuses a wrong recipe or a run directory in use before anything heavy is imported; starts the other processes that it asks for."""
    from .launch import start, starts_others
    from .recipe import load_recipe
    from .rundir import rank, refuse_in_use

    checked = load_recipe(recipe, sets or (), out=out)
    if rank() == 0:
        refuse_in_use(Path(checked.output.dir or Path("runs") / checked.name), resume=resume)
    if train and starts_others(checked.launch):
        sys.exit(start(checked.launch, sys.argv[1:]))


def _run_words(result: Any) -> str:
    lines = []
    if result.evaluation:
        lines.append(f"verdict: {result.verdict}")
        lines += [f"  {gate['result']}: {gate['name']}: {gate['reason']}" for gate in result.evaluation["gates"]]
        recommended = result.evaluation["recommendation"]
        if recommended["candidate"] is None:
            lines.append(f"no recommendation: {recommended['reason'].removeprefix('NOT MEASURED: ')}")
        else:
            lines.append(f"recommended: {recommended['candidate']}: {recommended['reason']}")
        lines += [f"note: {note}" for note in result.evaluation["notes"]]
    lines.append(f"run: {result.path}\nreport: {result.report}")
    return "\n".join(lines)


def _plan_words(result: dict[str, Any]) -> str:
    """The plan in words; on a terminal the example's colours are printed at once, since colours are no words."""
    from rich.console import Console

    from .progress import example_text, example_words, plan_words

    console = Console()
    lines = [f"the recipe, with what was derived:\n{result['recipe']}"]
    if console.is_terminal:
        console.print("the first row; what is green carries loss:", example_text(result["example"]), sep="\n", highlight=False)
    else:
        lines.append(f"the first row; what stands between ⟦ and ⟧ carries loss:\n{example_words(result['example'])}")
    lines += [f"{finding['check']}: {finding['evidence']}" for finding in result["findings"]]
    notes = result["notes"] + result["plan"]["notes"]
    lines.append(plan_words({**result["plan"], "ledger": result["ledger"], "notes": notes, "warnings": result["warnings"]}))
    return "\n".join(lines)


def main() -> None:
    """Runs the command line; an error becomes its exit status (1 for one that nobody foresaw) and two lines on standard error, or one of
    JSON."""
    try:
        with _signals_end_the_verb():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own bars stand for the libraries'
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: spinning, they keep the others waiting too
            app()
    except TunesmithError as error:
        _print_error(error)
        sys.exit(error.exit_status)
    except Exception as error:  # whatever no part of the program foresaw
        if os.environ.get("TUNESMITH_TRACEBACK") == "1":
            raise
        what = f"{type(error).__name__}: {error}"
        _print_error(TunesmithError(what, mend="this is a bug; run with TUNESMITH_TRACEBACK=1 for the traceback"), type(error).__name__)
        sys.exit(1)


def _print_error(error: TunesmithError, kind: str | None = None) -> None:
    from .progress import print_event, visible

    if "--json" in sys.argv:
        about = error.to_json() | ({"kind": kind} if kind else {})
        print_event({"event": "error", **about, "exit_status": error.exit_status})
    else:
        print(visible(f"error: {error}"), file=sys.stderr)


@contextmanager
def _signals_end_the_verb() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted wherever no stage handles them: exit status 130, in place of a library's own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}", mend="run the same command again (a run goes on with --resume)")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":  # `-m tunesmith.cli`, which files for clusters may say
    main()
