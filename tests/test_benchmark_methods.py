"""The benchmark of methods: which jobs are left, which rate is chosen, and what its page says of results."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tunesmith.recipe import Stage, load_recipe
from tunesmith.train.rates import SWEPT, swept_as

ROOT = Path(__file__).parents[1]


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("methods")
    for name in ("methods", "_methods_page", "_measure"):
        sys.modules.pop(name, None)


def wanted(methods, monkeypatch, *words: str):
    monkeypatch.setattr(sys, "argv", ["methods.py", *words])
    return methods._arguments()


def swept(methods, name: str, losses: list[float]) -> dict:
    rates = methods.RATES.get(name, methods.USUAL_RATES)
    return {f"sweep {name} rate={rate:g}": {"validation_loss": loss} for rate, loss in zip(rates, losses, strict=True)}


def test_a_method_is_swept_before_it_runs_and_runs_at_the_rate_of_lowest_validation_loss(methods, monkeypatch):
    asked = wanted(methods, monkeypatch, "--only", "lora", "--seeds", "0,1")
    assert [job["key"] for job in methods._jobs(asked, {})] == [f"sweep lora rate={rate:g}" for rate in methods.USUAL_RATES]
    done = swept(methods, "lora", [0.5, 0.3, 0.4])
    jobs = methods._jobs(asked, done)
    assert [job["key"] for job in jobs] == ["costs lora", "quickstart lora seed=0", "quickstart lora seed=1"]
    assert {job["rate"] for job in jobs} == {methods.USUAL_RATES[1]}


def test_a_sweep_whose_end_is_best_goes_on_beyond_it_at_most_twice(methods, monkeypatch):
    asked = wanted(methods, monkeypatch, "--only", "lora", "--seeds", "0", "--phases", "sweep,runs")

    def left(losses: dict[float, float | None]) -> list[tuple[str, float]]:
        """What is to be done next, and its rate; a loss of None did not stay finite."""
        done = {f"sweep lora rate={rate:g}": {"validation_loss": loss} for rate, loss in losses.items()}
        return [(job["key"], job["rate"]) for job in methods._jobs(asked, done)]

    falling = {2e-4: 0.5, 5e-4: 0.4, 1.5e-3: 0.3}
    assert left(falling) == [("sweep lora rate=0.0045", 0.0045)]
    assert left(falling | {0.0045: 0.2}) == [("sweep lora rate=0.013", 0.013)]
    assert left(falling | {0.0045: 0.2, 0.013: 0.1}) == [("quickstart lora seed=0", 0.013)]
    assert left(falling | {0.0045: None}) == [("quickstart lora seed=0", 1.5e-3)]
    assert left({2e-4: 0.2, 5e-4: 0.4, 1.5e-3: None}) == [("sweep lora rate=6.7e-05", 6.7e-5)]


def test_a_methods_default_is_the_lowest_rate_of_the_committed_sweep_that_is_nearly_best(methods):
    done = swept(methods, "lora", [0.309, 0.305, 0.3]) | {"sweep lora rate=0.0045": {"validation_loss": 5.0}}
    assert methods.default_rate(done, "lora") == 2e-4
    assert methods.default_rate(swept(methods, "lora", [0.31, 0.3, 0.4]), "lora") == 5e-4
    assert methods.default_rate({}, "lora") is None
    committed = methods._read(ROOT / "benchmarks" / "results" / "methods.json")
    assert {name: methods.default_rate(committed, name) for name in methods.METHODS} == SWEPT
    for name, method in methods.METHODS.items():
        settings = Stage(name="s", objective="sft", method=method).method
        assert swept_as(settings, quantised=name == "qlora") == name


def test_what_is_done_is_not_done_again(methods, monkeypatch):
    asked = wanted(methods, monkeypatch, "--only", "lora", "--seeds", "0", "--banking", "somewhere")
    done = swept(methods, "lora", [0.5, 0.3, 0.4]) | {"quickstart lora seed=0": {}}
    assert [job["key"] for job in methods._jobs(asked, done)] == ["costs lora", "banking77 lora seed=0"]
    assert [job["key"] for job in methods._jobs(asked, done | {"costs lora": {}})] == ["banking77 lora seed=0"]


def test_every_methods_recipe_is_one_that_the_loader_takes(methods, tmp_path):
    for name in methods.METHODS:
        spec = {"task": "quickstart", "method": name, "seed": 1, "rate": 1e-3, "epochs": None, "banking": None, "out": str(tmp_path / "x")}
        recipe = load_recipe(methods.recipe_of(spec))
        assert recipe.stages[0].method.type == methods.METHODS[name]["type"]
        assert load_recipe(methods.recipe_of(spec | {"steps": 5})).stages[0].max_steps == 5


def run(accuracy: float) -> dict:
    """A made-up result."""
    score = {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "n": 165}
    return {
        "rate": 0.001,
        "scores": {
            "task": {"tuned": {"exact_match": score}},
            "general": {"tuned": {"perplexity": {"value": 12.0}}, "zero_shot": {"perplexity": {"value": 8.0}}},
        },
    }


def costs(trainable: int, memory: float, **times: float) -> dict:
    """Made-up costs."""
    return {
        "trainable": trainable,
        "parameters": 1_000_000,
        "tokens_per_second": 100.0,
        "peak_memory_bytes": memory,
        "result_bytes": 4 * trainable,
        "token_milliseconds": times,
        "machine": f"{memory / 1e9:.0f} cores",
    }


def test_the_page_says_of_each_claim_whether_it_holds_with_the_figures(methods, tmp_path):
    done = {f"quickstart lora seed={seed}": run(0.5 + 0.1 * seed) for seed in (0, 1, 2)}
    done |= {"quickstart full seed=0": run(0.5), "costs full": costs(1_000_000, 4e9, base=10.0, live=10.0)}
    done |= {"costs lora": costs(20_000, 2e9, base=10.0, live=15.0, merged=12.0)}
    done |= {f"sweep lora rate={rate}": {"validation_loss": loss, "machine": "1 core"} for rate, loss in (("0.0001", 0.25), ("0.1", None))}
    grids = {name: [1e-4, 0.1] for name in methods.METHODS}
    methods.write_page(tmp_path / "methods", done, methods.METHODS, grids, dict.fromkeys(grids) | {"lora": 1e-4})
    page = (tmp_path / "methods-measured.md").read_text()
    assert "holds (50 to 50 times)" in page
    assert "0.0001: 0.2500 (best) (default), 0.1: not finite" in page
    assert "Full tuning has the best ceiling, quickstart: not reproduced (full 0.500, lora 0.600)" in page
    assert "LoRA needs little memory: holds (0.50 of full tuning's peak)" in page
    assert "LoRA costs nothing once it is merged: not reproduced (1.20 of the base's time a token; live 1.50)" in page
    assert "| lora (0.001) |" in page
    done["costs ia3"] = costs(20_000, 2e9, base=13.0, live=13.0, merged=13.0)  # the base is the same
    methods.write_page(tmp_path / "methods", done, methods.METHODS, grids, dict.fromkeys(grids) | {"lora": 1e-4})
    assert "merged: not shown, since the base's own time swung by 30% (1.20 of" in (tmp_path / "methods-measured.md").read_text()
    assert "0.600 ± 0.100 [0.550, 0.650] (3 seeds, n = 165)" in page
    assert "| 1.50 |" in page  # perplexity 12 over the base's 8
    assert "On the quickstart's task; 2 cores; 4 cores." in page  # where the costs were measured
    assert "| lora | 20,000 (2.00%) | 0.3 MB (2.67%) | 2.00 GB | 100 | 0.08 MB | 1.50 | 1.20 |" in page
    assert "| 100 | 4.00 MB | 1.00 | - |" in page
    assert f"| ia3 |{' not measured |' * 7}" in page
    assert "banking77: exact match" not in page
    assert "lora" in (tmp_path / "methods.svg").read_text()


@pytest.mark.parametrize(("full", "told"), [(0.9, True), (0.65, False)])
def test_methods_whose_intervals_overlap_are_not_told_apart(methods, full, told):
    done = {"quickstart lora seed=0": run(0.6), "quickstart full seed=0": run(full)}
    said = sys.modules["_methods_page"]._claims(done, ["full", "lora"])
    assert "best ceiling, quickstart: holds" in said
    assert ("not told apart" in said) is not told


def test_what_the_series_has_not_come_to_reads_not_measured_and_no_rate_is_the_best_of_half_a_grid(methods, tmp_path):
    done = {f"sweep lora rate={rate}": {"validation_loss": loss, "machine": "1 core"} for rate, loss in (("0.0001", 0.25), ("0.1", 0.5))}
    grids = {name: [1e-4, 0.1] for name in methods.METHODS} | {"lora": [1e-4, 1e-3, 0.1]}
    methods.write_page(tmp_path / "methods", done, methods.METHODS, grids, dict.fromkeys(grids))
    page = (tmp_path / "methods-measured.md").read_text()
    assert page.count("NOT MEASURED") == 3  # costs, scores, claims
    assert "| lora | 0.0001: 0.2500, 0.1: 0.5000, 0.001: not measured |" in page
    assert "| full | 0.0001: not measured, 0.1: not measured |" in page
    assert not (tmp_path / "methods.svg").exists()
