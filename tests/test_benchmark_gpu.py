"""The GPU benchmark: without a GPU its tables hold no figure; its children run on a CPU with a tiny shape and learn the same."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = str(ROOT / "benchmarks" / "sft_gpu.py")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "head_dim": 8,
    "model_type": "llama",
    "tie_word_embeddings": True,
}
TINY = {"shape": SHAPE, "lengths": [12, 20, 24], "shared": 0, "dtype": "float32", "updates": 3, "warmup": 1}
DEVICE = {"gpu": None, "versions": "torch X"}


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("sft_gpu")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("sft_gpu", "_measure"):
        sys.modules.pop(name, None)


def cells(text: str) -> list[list[str]]:
    """The rows of all tables, without headings."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] not in ("work", "---")]


def test_without_a_gpu_every_figure_of_the_same_tables_reads_not_measured(bench):
    rows = cells(bench.report(dict.fromkeys(bench.CASES), DEVICE, 3, "command"))
    summary, numbers = rows[: len(bench.CASES)], rows[len(bench.CASES) :]
    assert [row[0] for row in summary] == list(bench.CASES)
    assert all(row[3:] == ["NOT MEASURED"] * 5 for row in summary)
    assert len(numbers) == len(bench.CASES) * len(bench.SYSTEMS)
    assert all(row[2:] == ["NOT MEASURED"] * 5 for row in numbers)


def test_with_runs_the_tables_hold_medians_ratios_and_the_share_of_the_devices_peak(bench):
    def runs(speeds, gib):
        one = {"flops_per_second": 494.5e12, "peak_bytes": gib * 2**30, "losses": [5.0, 4.0], "paths": "p"}
        return [one | {"tokens_per_second": speed} for speed in speeds]

    measured = {"1.2B LoRA": {"tunesmith": runs([90, 100, 300], 10), "tunesmith_checkpointing": runs([60], 5), "trl": runs([50], 20)}}
    (summary, ours, *_) = cells(bench.report(measured, DEVICE | {"gpu": "NVIDIA H100 80GB"}, 3, "command"))
    assert summary[3:] == ["2.00", "0.50", "1.20", "0.25", "0.00%"]
    assert ours[2:] == ["100 (90-300)", "50%", "10.0", "4.0000", "p"]


def test_an_update_of_each_case_has_16k_tokens_and_its_shape_the_weights_it_is_named_for(bench):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for shape, _, lengths, shared, *_ in bench.CASES.values():
        assert 16_000 < sum(lengths) <= 16_384
        assert shared in (0, 500)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**bench.SHAPES[shape]))
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1 if shape == "1.2B" else 2) == {"1.2B": 1.2, "0.14B": 0.13}[shape]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_all_systems_learn_the_same_from_the_same_rows(bench, method):
    pytest.importorskip("trl")
    child = {"trl": bench.run_trl}
    found = {name: child.get(name, bench.run_tunesmith)({**TINY, "method": method, "system": name}) for name in bench.SYSTEMS}
    for result in found.values():
        assert result["laps"] == 3
        assert result["tokens_per_second"] > 0
        assert result["losses"] == pytest.approx(found["tunesmith"]["losses"], rel=1e-4)
    assert found["tunesmith"]["losses"][0] != pytest.approx(found["tunesmith"]["losses"][-1], rel=1e-6)
    assert found["trl"]["paths"] == "sdpa, no Liger"


def test_in_a_process_of_its_own_a_prompt_that_all_rows_share_is_computed_once(bench):
    result = bench.run_child(FILE, {**TINY, "lengths": [24, 24, 24], "shared": 20, "method": "lora", "system": "tunesmith"}, threads=1)
    assert result["computed"] == 2 * (20 + 3 * 4)
    weights = 97 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + 32
    useful = 2 * 3 * 24
    assert result["flops_per_second"] == pytest.approx(4 * weights * result["computed"] * result["tokens_per_second"] / useful)
