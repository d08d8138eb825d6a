"""Our loss, gradients and whole training against transformers with PEFT, and against TRL's SFTTrainer, in fp32 on the same rows."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from tests.toys import batch_of, loaded, make_job, make_rows, make_stage, tiny_model, tiny_tokenizer
from torch import nn

from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.recipe import FullMethod, LoraMethod
from tunesmith.rundir import RunDirectory
from tunesmith.train.loop import train
from tunesmith.train.window import run_window

METHODS = {"full": FullMethod(), "lora": LoraMethod(r=4, lora_alpha=8)}
ROWS = [(ids, (weights != 0).astype("float32")) for ids, weights in make_rows(8, shared=20)]  # the peers know no weights but 0 and 1


def make_model(method: str, family: str = "llama") -> nn.Module:
    return attach(loaded(tiny_model(family)), METHODS[method], seed=0)


def padded(rows: list) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels as the peers take them, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    batch = {"input_ids": torch.zeros(len(rows), longest, dtype=torch.long)}
    batch |= {"attention_mask": batch["input_ids"].clone(), "labels": torch.full_like(batch["input_ids"], -100)}
    for i, (ids, weights) in enumerate(rows):
        ids = torch.from_numpy(ids)
        batch["input_ids"][i, : len(ids)] = ids
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, : len(ids)] = torch.where(torch.from_numpy(weights) != 0, ids, -100)
    return batch


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_loss_and_gradients_are_those_of_transformers_and_peft(family, method):
    theirs, policy = make_model(method, family), Policy(make_model(method, family))
    loss = theirs(**padded(ROWS), use_cache=False).loss
    loss.backward()
    ours = run_window(policy, SFT(), [batch_of(ROWS[:3]), batch_of(ROWS[3:])])
    assert ours.loss == pytest.approx(loss.item(), rel=1e-5)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert wanted.keys() == got.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for name, want in wanted.items():
        assert float((got[name] - want).norm()) <= 1e-5 * max(float(want.norm()), 1e-2 * largest), name


@pytest.mark.parametrize("method", METHODS)
def test_six_steps_end_as_those_of_trls_sft_trainer(method, tmp_path):
    from trl import SFTConfig, SFTTrainer

    steps = 6
    model = make_model(method)
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(ROWS),
        num_train_epochs=steps,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        completion_only_loss=True,
        max_length=None,
        disable_tqdm=True,
        optim="adamw_torch",
        adam_epsilon=1e-5,
        activation_offloading=False,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)  # the tiny models' vocabulary is smaller
    rows = [{"input_ids": ids.tolist(), "completion_mask": weights.astype(int).tolist()} for ids, weights in ROWS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    wanted = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    policy = Policy(make_model(method))
    stage = make_stage(
        max_steps=steps, per_device_train_batch_size=len(ROWS), warmup_steps=1, weight_decay=0.1, max_grad_norm=0.5, adam_epsilon=1e-5
    )
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(policy, stage, run, ROWS))
        lines = [event for event in run.events() if "loss" in event]
    assert [line["loss"] for line in lines] == pytest.approx(wanted, abs=2e-4)  # the peer rounds what it logs to four digits
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-6)
    theirs = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in policy.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
