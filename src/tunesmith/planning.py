"""The plan of a session: what each phase will cost, from its own batches and the machine's measured speeds. Raises DoesNotFit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .data.batching import DatasetSource
from .data.preference import AnyRecord, kind_of_record
from .errors import DoesNotFit
from .generate.engine import BATCH_TOKENS, LOGIT_ELEMENTS
from .models.load import has_fast_bf16
from .models.methods import trainable_count
from .models.plan import (
    Machine,
    Phase,
    Shape,
    available_memory,
    decode_phase,
    evaluation_memory,
    forward_phase,
    measure_machine,
    model_shape,
    phase_json,
    train_memory,
    train_phase,
)
from .models.result import is_adapter, read_card
from .recipe import WHOLE, Stage
from .session import Session
from .train.memory import peak_memory_bytes, resident_bytes
from .train.offline import compares_with_reference
from .train.samplers import ROLLOUT_BATCH
from .train.scoring import locate_result, named_models
from .train.shaping import Shaping
from .train.work import learns_from_answers

SAMPLED_WINDOWS = 20  # updates looked at to know how many tokens are shared
SAMPLED_ROWS = 32
SLOW_PROCESSOR = "this processor has no bfloat16 arithmetic: the base is held in float32 and takes about twice the time"


def make_plan(session: Session) -> dict[str, Any]:
    """plan.json's `predicted`: peak memory, seconds, tokens, what binds, and each phase; and notes on this machine."""
    shape, machine = model_shape(session.loaded), measure_machine(session.loaded.dtype)
    phases: list[Phase] = []
    peak, tokens = 0, 0
    for stage in session.stages:
        update = _update(session, stage)
        tokens += int(update.rows * stage.max_steps) * session.recipe.launch.processes
        peak = max(peak, _stage_memory(session, shape, stage, update))
        phases += _stage_phases(session, shape, machine, stage, update)
    phases += _evaluation(session, shape, machine)
    room = available_memory() + resident_bytes()
    if peak > room:
        raise DoesNotFit(
            f"the plan needs {peak / 1e9:.1f} GB of memory, this machine has {room / 1e9:.1f} GB to give",
            where="stages",
            mend="smaller per_device_train_batch_size with more gradient_accumulation_steps, gradient_checkpointing: true, or method lora",
        )
    notes = [] if has_fast_bf16() else [SLOW_PROCESSOR]
    peak = max(peak, _evaluation_memory(session, shape, peak))
    if peak > room:
        notes.append(f"the evaluation may need {peak / 1e9:.1f} GB, this machine has {room / 1e9:.1f}: lower evaluate.batch_size")
    longest = max(phases, key=lambda phase: phase.seconds)
    return {
        "peak_memory_bytes": peak,
        "seconds": sum(phase.seconds for phase in phases),
        "tokens": tokens,
        "bound_by": longest.bound_by,
        "phases": [phase_json(phase) for phase in phases],
        "machine": {"flops_per_second": machine.flops_per_second, "bytes_per_second": machine.bytes_per_second},
        "notes": notes,
    }


class _Update(NamedTuple):
    """What an update takes, in tokens: of its rows, computed (shared ones once), supervised; and computed of its largest batch."""

    rows: float
    computed: float
    supervised: float
    largest: int


def _update(session: Session, stage: Stage) -> _Update:
    """The means over some updates; of answers yet to be sampled, see `_update_of_answers`."""
    if learns_from_answers(stage):
        return _update_of_answers(session, stage)
    source = DatasetSource(
        session.data_of(stage).items,
        batch_size=stage.per_device_train_batch_size,
        accumulation=stage.gradient_accumulation_steps,
        seed=session.recipe.seed,
    )
    windows = [source.window(step).batches for step in range(min(SAMPLED_WINDOWS, stage.max_steps))]
    totals = np.array(
        [
            [sum(int(b.forest.lengths_B.sum()) for b in w), sum(len(b.forest.tokens_T) for b in w), sum(len(b.forest.target_S) for b in w)]
            for w in windows
        ]
    )
    rows, computed, supervised = totals.mean(0)
    largest = max(len(batch.forest.tokens_T) for window in windows for batch in window)
    return _Update(float(rows), float(computed), float(supervised), largest)


def _update_of_answers(session: Session, stage: Stage) -> _Update:
    """One mini-batch of the answers that are learned from, each taken to be as long as it may; a prompt is computed once for its group."""
    prompt, new, group = _prompt_tokens(session, stage), stage.rollout.max_new_tokens, stage.objective.num_generations
    parts = Shaping.of(stage).parts
    answers = _learned(stage) / parts
    batch = min(math.ceil(answers), stage.per_device_train_batch_size)
    largest = math.ceil(batch / group) * prompt + batch * new
    prompts = min(stage.rollout.prompts_per_step / parts, answers)
    return _Update(answers * (prompt + new), prompts * prompt + answers * new, answers * new, int(largest))


def _prompt_tokens(session: Session, stage: Stage) -> float:
    return float(session.data_of(stage).train.lengths.mean())


def _sampled(stage: Stage) -> int:
    """Answers of an iteration."""
    return stage.rollout.prompts_per_step * stage.objective.num_generations


def _learned(stage: Stage) -> int:
    """Those of an iteration's answers that are learned from, where no two rewards are alike."""
    return len(Shaping.of(stage).select(np.arange(_sampled(stage), dtype=np.float64)))


def _stage_memory(session: Session, shape: Shape, stage: Stage, update: _Update) -> int:
    """Peak bytes of a stage, with the models that it holds beside its policy."""
    need = train_memory(shape, stage, resident=peak_memory_bytes(), batch_tokens=update.largest, trainable=_trainable(session, stage))
    if not learns_from_answers(stage):
        return need
    need += _models_beside(session, shape, stage)
    return max(need, _sampling_memory(session, shape, stage, need))


def _models_beside(session: Session, shape: Shape, stage: Stage) -> int:
    """Bytes of a sampling stage's reference, where it is a copy (of an adapter it is the base, or another adapter), and reward models.

    A reward model that is an adapter on the policy's base costs its weights; any other is a model of its own, and one of this run as large
    as the policy. Of what an earlier run or another tool made, the files' sizes count.
    """
    full, stages = stage.method.type in WHOLE, {one.name: one for one in session.stages}
    model = shape.parameters * shape.itemsize
    need = model if full else 0
    for name in named_models(stage.objective):
        if name in stages:
            one, whole = stages[name], model
            adapter = None if one.method.type in WHOLE else 4 * _trainable(session, one)
            base = _base(session, one)
        else:
            folder = locate_result(name, session.run.path)
            files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            adapter, whole = (files, model) if is_adapter(folder) else (None, files)
            base = None if read_card(folder).get("base", {}).get("sha256") == session.loaded.identity.sha256 else str(folder)
        if adapter is None:
            need += whole
        else:
            need += adapter + (whole if full or base != _base(session, stage) else 0)
    return need


def _base(session: Session, stage: Stage) -> str | None:
    """The stage or folder whose whole model a stage's adapter is on, by name; None for the recipe's base."""
    start, stages = stage.start_from, {one.name: one for one in session.stages}
    if start in stages:
        return start if stages[start].method.type in WHOLE else _base(session, stages[start])
    return None if start is None or is_adapter(locate_result(start, session.run.path)) else start


def _sampling_memory(session: Session, shape: Shape, stage: Stage, resident: int) -> int:
    """Peak bytes while a stage samples, beside what its updates hold."""
    return evaluation_memory(
        shape,
        resident=resident,
        items=_sampled(stage),
        batch_size=ROLLOUT_BATCH,
        prompt_tokens=float(session.data_of(stage).train.lengths.max()),
        new_tokens=stage.rollout.max_new_tokens,
        batch_tokens=BATCH_TOKENS,
        logit_elements=LOGIT_ELEMENTS,
    )


def _evaluation_memory(session: Session, shape: Shape, resident: int) -> int:
    """Peak bytes of the evaluation, for which the process still holds what training has freed; as if prompts were as long as training's."""
    items = len(session.data.test_records)
    if not items:
        return 0
    return evaluation_memory(
        shape,
        resident=resident,
        items=items,
        batch_size=session.recipe.evaluate.batch_size,
        prompt_tokens=max(1.0, float(session.data.train.lengths.max()) - _shared_beginning(session)),
        new_tokens=session.recipe.evaluate.max_new_tokens,
        batch_tokens=BATCH_TOKENS,
        logit_elements=LOGIT_ELEMENTS,
    )


def _stage_phases(session: Session, shape: Shape, machine: Machine, stage: Stage, update: _Update) -> list[Phase]:
    """What a stage computes: its updates, and what comes before, between and beside them."""
    name, steps = stage.name, stage.max_steps
    phases = [train_phase(shape, machine, stage, tokens=update.computed * steps, supervised=update.supervised * steps)]
    if learns_from_answers(stage):
        return phases + _answer_phases(session, shape, machine, stage, update)
    data = session.data_of(stage)

    def pass_over(what: str, updates: float) -> Phase:
        """A forward pass over as many rows as so many updates have."""
        return forward_phase(f"{what} {name}", shape, machine, tokens=update.computed * updates, heads=update.supervised * updates)

    train, held_out = (0.0 if part is None else float(part.lengths.sum()) / max(update.rows, 1) for part in (data.train, data.validation))
    passes = 2 if stage.objective.type == "kto" else 1  # its estimate of the KL takes a pass over as many other rows
    if compares_with_reference(stage):
        phases.append(pass_over("reference", (train + held_out) * passes))
    if passes > 1:
        phases.append(pass_over("estimate", steps))
    if held_out:
        phases.append(pass_over("validate", held_out * passes * max(1, steps // stage.eval_steps)))
    return phases


def _answer_phases(session: Session, shape: Shape, machine: Machine, stage: Stage, update: _Update) -> list[Phase]:
    """What a stage that samples computes besides its updates: answers, a pass of each reward model over them, and of policy and reference
    over those that are learned from."""
    shaping, new, answers = Shaping.of(stage), stage.rollout.max_new_tokens, _sampled(stage)
    iterations = math.ceil(stage.max_steps / shaping.updates)
    learned, supervised = update.computed * shaping.parts, update.supervised * shaping.parts
    judged = (stage.rollout.prompts_per_step * _prompt_tokens(session, stage) + answers * new) * len(named_models(stage.objective))
    return [
        decode_phase(f"sample {stage.name}", shape, machine, items=answers * iterations, new_tokens=new, batch=ROLLOUT_BATCH),
        forward_phase(f"score {stage.name}", shape, machine, tokens=(2 * learned + judged) * iterations, heads=2 * supervised * iterations),
    ]


def _trainable(session: Session, stage: Stage) -> int:
    return trainable_count(session.loaded.model, stage.method)


def _evaluation(session: Session, shape: Shape, machine: Machine) -> list[Phase]:
    """The candidates' answers and perplexities; an answer is taken to be as long as the training answers."""
    section, items = session.recipe.evaluate, len(session.data.test_records)
    if not items:
        return []
    answer = session.data.ledger.tokens["supervised"] / max(1, session.data.ledger.rows_trained)
    shared = _shared_beginning(session)  # computed once a batch
    own = max(1.0, session.data.lengths["mean"] - answer - shared)
    held = len(session.data.validation_records)
    trials = len(section.few_shot_k) * section.few_shot_sets * held if "few_shot" in section.candidates else 0
    sides = {side for gate in section.gates for side in (gate.candidate, gate.better_than, gate.not_worse_than)}
    asked = dict.fromkeys([*section.candidates, *(stage.name for stage in session.stages if stage.name in sides)])
    phases = []
    for name in asked:
        if name in ("classical", "shorter"):
            continue
        n = items + trials if name == "few_shot" else items
        if preferred(session.data.test_records):  # each of two answers, by the model and by what it is compared with
            phases.append(forward_phase(f"compare {name}", shape, machine, tokens=4 * items * (own + answer), heads=4 * items * answer))
            continue
        phases.append(forward_phase(f"read prompts {name}", shape, machine, tokens=n * own, heads=n))
        phases.append(decode_phase(f"answer {name}", shape, machine, items=n, new_tokens=answer, batch=section.batch_size))
        phases.append(forward_phase(f"perplexity {name}", shape, machine, tokens=items * (own + answer), heads=items * answer))
    return phases


def preferred(records: Sequence[AnyRecord]) -> bool:
    """Whether what is measured is which of several answers is preferred."""
    return bool(records) and kind_of_record(records[0]) in ("pair", "ranking")


def _shared_beginning(session: Session) -> int:
    """The tokens that the first rows all begin with: a system message that all have in common."""
    rows = [session.data.train[i][0] for i in range(min(SAMPLED_ROWS, len(session.data.train)))]
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))
