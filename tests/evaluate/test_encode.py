"""At the tokenizer: the evaluation asks with the ids of the training render, and adds no BOS of its own."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tunesmith.data.records import Conversation, Message, Source
from tunesmith.data.render import render
from tunesmith.data.template import load_template
from tunesmith.evaluate import TemplateEncoder
from tunesmith.recipe import ModelSection

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, with a BOS that it adds to whatever it is asked to encode, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: code for code, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>")
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TemplateEncoder(load_template(tokenizer, ModelSection(name="tiny")), tokenizer)


MESSAGES = (Message("system", "be brief"), Message("user", "why?"), Message("assistant", "so"), Message("user", "and?"))


def test_prompt_and_answer_are_the_training_render_up_to_the_end_of_turn(encoder, tokenizer):
    prompt, answer = encoder.prompt(MESSAGES), encoder.answer(MESSAGES, "because")
    whole = Conversation((*MESSAGES, Message("assistant", "because")), "r", Source("a", 1))
    trained = render(whole, encoder.template, tokenizer, train_on="last")
    assert [*prompt, *answer] == trained.ids[: len(prompt) + len(answer)].tolist()
    assert answer.tolist() == trained.ids[trained.weights > 0].tolist()
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_evaluation_writes_no_bos_that_the_template_did_not_write(encoder, tokenizer):
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # the trap is there
    assert tokenizer.bos_token_id not in [*encoder.prompt(MESSAGES), *encoder.answer(MESSAGES, "because")]
    assert tokenizer.decode(encoder.prompt(MESSAGES[:1])).startswith("<|im_start|>system")


def test_the_encoder_carries_the_template_s_hash(encoder):
    assert encoder.sha256 == encoder.template.sha256
