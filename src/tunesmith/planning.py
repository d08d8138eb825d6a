"""The plan of a session: what each phase will cost, from its own batches and the machine's measured speeds. Raises DoesNotFit."""

from __future__ import annotations

from typing import Any

import numpy as np

from .data.batching import DatasetSource
from .errors import DoesNotFit
from .models.load import has_fast_bf16
from .models.plan import (
    Phase,
    available_memory,
    decode_phase,
    forward_phase,
    measure_machine,
    model_shape,
    phase_json,
    train_memory,
    train_phase,
)
from .recipe import FullMethod, Stage
from .session import Session
from .train.memory import peak_memory_bytes, resident_bytes

SAMPLED_WINDOWS = 20  # updates looked at to know how many tokens are shared
SAMPLED_ROWS = 32


def make_plan(session: Session) -> dict[str, Any]:
    """plan.json's `predicted`: peak memory, seconds, tokens, what binds, and each phase; and notes on this machine."""
    shape, machine = model_shape(session.loaded), measure_machine(session.loaded.dtype)
    phases: list[Phase] = []
    peak, tokens = 0, 0
    for stage in session.stages:
        rows, computed, supervised, largest = _sample(session, stage)
        tokens += int(rows * stage.max_steps)
        phases.append(train_phase(shape, machine, stage, tokens=computed * stage.max_steps, supervised=supervised * stage.max_steps))
        need = train_memory(shape, stage, resident=peak_memory_bytes(), batch_tokens=largest, trainable=_trainable(session, stage))
        peak = max(peak, need)
        held_out = session.data_of(stage).validation
        if held_out is not None:
            length = float(held_out.lengths.sum()) * computed / max(rows, 1)
            evaluations = max(1, stage.max_steps // stage.eval_steps)
            phases.append(forward_phase(f"validate {stage.name}", shape, machine, tokens=length * evaluations, heads=supervised))
    phases += _evaluation(session, shape, machine)
    room = available_memory() + resident_bytes()
    if peak > room:
        raise DoesNotFit(
            f"the plan needs {peak / 1e9:.1f} GB of memory, this machine has {room / 1e9:.1f} GB to give",
            where="stages",
            mend="smaller per_device_train_batch_size with more gradient_accumulation_steps, gradient_checkpointing: true, or method lora",
        )
    longest = max(phases, key=lambda phase: phase.seconds)
    return {
        "peak_memory_bytes": peak,
        "seconds": sum(phase.seconds for phase in phases),
        "tokens": tokens,
        "bound_by": longest.bound_by,
        "phases": [phase_json(phase) for phase in phases],
        "machine": {"flops_per_second": machine.flops_per_second, "bytes_per_second": machine.bytes_per_second},
        "notes": []
        if has_fast_bf16()
        else ["this processor has no bfloat16 arithmetic: the base is held in float32 and takes about twice the time"],
    }


def _sample(session: Session, stage: Stage) -> tuple[float, float, float, int]:
    """Per update: row tokens, computed tokens, supervised tokens (means over some updates), and the largest batch's computed tokens."""
    source = DatasetSource(
        session.data_of(stage).train,
        batch_size=stage.per_device_train_batch_size,
        accumulation=stage.gradient_accumulation_steps,
        seed=session.recipe.seed,
    )
    windows = [source.window(step) for step in range(min(SAMPLED_WINDOWS, stage.max_steps))]
    totals = np.array(
        [
            [sum(int(b.forest.lengths_B.sum()) for b in w), sum(len(b.forest.tokens_T) for b in w), sum(len(b.forest.target_S) for b in w)]
            for w in windows
        ]
    )
    rows, computed, supervised = totals.mean(0)
    return float(rows), float(computed), float(supervised), max(len(batch.forest.tokens_T) for window in windows for batch in window)


def _trainable(session: Session, stage: Stage) -> int:
    if isinstance(stage.method, FullMethod):
        return sum(p.numel() for p in session.loaded.model.parameters())
    wanted = set(stage.method.target_modules)
    modules = session.loaded.model.named_modules()
    return sum(stage.method.r * sum(m.weight.shape) for name, m in modules if any(name == w or name.endswith(f".{w}") for w in wanted))


def _evaluation(session: Session, shape: Any, machine: Any) -> list[Phase]:
    """The candidates' answers and perplexities; an answer is taken to be as long as the training answers."""
    section, items = session.recipe.evaluate, len(session.data.test_records)
    if not items:
        return []
    answer = session.data.ledger.tokens["supervised"] / max(1, session.data.ledger.rows_trained)
    shared = _shared_beginning(session)  # computed once a batch
    own = max(1.0, session.data.lengths["mean"] - answer - shared)
    held = len(session.data.validation_records)
    trials = len(section.few_shot_k) * section.few_shot_sets * held if "few_shot" in section.candidates else 0
    counts = {"zero_shot": items, "few_shot": items + trials, "tuned": items}
    phases = []
    for name in section.candidates:
        if name in counts:
            n = counts[name]
            phases.append(forward_phase(f"read prompts {name}", shape, machine, tokens=n * own, heads=n))
            phases.append(decode_phase(f"answer {name}", shape, machine, items=n, new_tokens=answer, batch=section.batch_size))
            phases.append(forward_phase(f"perplexity {name}", shape, machine, tokens=items * (own + answer), heads=items * answer))
    return phases


def _shared_beginning(session: Session) -> int:
    """The tokens that the first rows all begin with: a system message that all have in common."""
    rows = [session.data.train[i][0] for i in range(min(SAMPLED_ROWS, len(session.data.train)))]
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))
