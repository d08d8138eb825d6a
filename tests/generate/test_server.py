"""ServerGenerator against a loopback server with vLLM's routes: the same answers as in this process, and every failure said clearly."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from tests.families import tiny_model
from tests.generate import stub_server
from tests.generate.helpers import (
    ANSWERS,
    NumberTokenizer,
    generator,
    plain_greedy,
    plain_logits,
    prompts_with_prefix,
    reference_logprobs,
    tokens_of,
)
from tests.generate.stub_server import StubServer, error, serving
from tunesmith.errors import ModelError, RecipeError, RolloutFailed
from tunesmith.generate import GREEDY, Sampling, ServerGenerator, _http

PROMPTS = prompts_with_prefix(5)


@pytest.fixture
def serve(monkeypatch):
    """Starts a stub with the given behaviour and gives it with a generator on it."""
    monkeypatch.setattr(_http, "FIRST_WAIT", 0.001)
    started = []

    def start(*, url="{}", generator_settings=None, **behaviour):
        context = serving(StubServer(**behaviour))
        stub = context.__enter__()
        started.append(context)
        return stub, ServerGenerator(url.format(stub.url), "base", NumberTokenizer(0), **{"retries": 2, **(generator_settings or {})})

    yield start
    for context in started:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two folders of adapters for the stub's model."""
    folders = []
    for number in range(2):
        model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        folder = tmp_path_factory.mktemp(f"adapter{number}")
        model.save_pretrained(folder)
        folders.append(folder)
    return folders


def adapted_greedy(folder, prompt):
    return plain_greedy(PeftModel.from_pretrained(tiny_model("llama"), folder).eval(), prompt, 6, {0})


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=3), Sampling(1.0, top_p=0.8, top_k=20)])
@pytest.mark.parametrize("url", ["{}", "{}/v1", "{}/"])
def test_a_servers_generations_equal_those_of_the_same_model_in_this_process(serve, sampling, url):
    _, remote = serve(url=url, generator_settings={"stop_ids": [9]})
    local = generator(tiny_model("llama"), stop_ids=[9])
    seeds = [11, 12, 13, 14, 2**63 - 1]
    for given in ({}, {"seeds": seeds}):
        ours = local.generate(PROMPTS, max_new_tokens=8, sampling=sampling, logprobs=True, **given)
        theirs = remote.generate(PROMPTS, max_new_tokens=8, sampling=sampling, logprobs=True, **given)
        for one, other in zip(ours, theirs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert [generation.logprobs for generation in remote.generate(PROMPTS, max_new_tokens=2)] == [None] * 5


def test_scores_are_those_of_the_plain_model_and_an_empty_answer_has_none(serve):
    _, remote = serve()
    for scores, prompt, answer in zip(remote.logprobs(PROMPTS, ANSWERS[:5]), PROMPTS, ANSWERS, strict=False):
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, reference_logprobs(tiny_model("llama"), prompt, answer), atol=1e-5)
    assert remote.logprobs([[1, 2]], [[]])[0].shape == (0,)
    assert remote.generate([], max_new_tokens=3) == remote.logprobs([], []) == []


def test_every_setting_is_named_so_that_none_of_the_servers_own_adds_to_it(serve):
    stub, remote = serve()
    remote.generate(PROMPTS[:1], max_new_tokens=3, sampling=Sampling(0.5, 0.9, 7), seeds=[5])
    (_, _, body) = stub.requests[-1]
    assert body == {
        "model": "base", "prompt": PROMPTS[0], "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.0, "seed": 5,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": [0], "return_token_ids": True,
    }  # fmt: skip


def test_log_probabilities_that_are_not_of_the_sampled_distribution_are_refused(serve):
    _, raw = serve()
    assert raw.generate(PROMPTS, max_new_tokens=2, sampling=Sampling(1.0, top_p=0.5), logprobs=True)
    with pytest.raises(RolloutFailed, match=r"before the temperature of 0\.7") as refused:
        raw.generate(PROMPTS, max_new_tokens=2, sampling=Sampling(0.7), logprobs=True)
    assert "processed_logprobs" in refused.value.mend
    _, processed = serve(processed=True)
    sampling = Sampling(0.7, seed=2)
    theirs = processed.generate(PROMPTS, max_new_tokens=4, sampling=sampling, logprobs=True)
    ours = generator(tiny_model("llama"), stop_ids=[0]).generate(PROMPTS, max_new_tokens=4, sampling=sampling, logprobs=True)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    with pytest.raises(RolloutFailed, match="after top-p and top-k"):
        processed.generate(PROMPTS, max_new_tokens=2, sampling=Sampling(0.7, top_k=5), logprobs=True)


def test_the_temperature_is_seen_where_the_first_token_is_sure_under_every_one(serve, monkeypatch):
    monkeypatch.setattr(stub_server, "plain_logits", lambda model, ids: 60 * plain_logits(model, ids))
    stub, processed = serve(processed=True)
    assert processed.generate(PROMPTS[:1], max_new_tokens=1, sampling=Sampling(0.7), logprobs=True)
    assert [body["temperature"] for _, _, body in stub.requests] == [0, 2, 0.7]  # vLLM takes none above 2
    sure = stub.answer("/v1/completions", {}, stub.requests[1][2])[2]["choices"][0]["logprobs"]["top_logprobs"][0]
    assert max(sure.values()) > -0.01
    _, raw = serve()
    with pytest.raises(RolloutFailed, match="before the temperature"):
        raw.generate(PROMPTS[:1], max_new_tokens=1, sampling=Sampling(0.7), logprobs=True)


def test_adapters_are_loaded_under_new_names_used_and_unloaded(serve, adapters):
    stub, remote = serve()
    remote.load_adapter(adapters[0], "policy-1")
    assert tokens_of(remote.generate(PROMPTS, max_new_tokens=6)) == [adapted_greedy(adapters[0], prompt) for prompt in PROMPTS]
    remote.load_adapter(adapters[1], "policy-2")
    remote.unload_adapter("policy-1")
    assert (remote.adapter, list(stub.adapters)) == ("policy-2", ["policy-2"])
    second = [adapted_greedy(adapters[1], prompt) for prompt in PROMPTS]
    assert tokens_of(remote.generate(PROMPTS, max_new_tokens=6)) == second
    remote.unload_adapter("policy-2")
    base = [plain_greedy(tiny_model("llama"), prompt, 6, {0}) for prompt in PROMPTS]
    assert tokens_of(remote.generate(PROMPTS, max_new_tokens=6)) == base != second


def test_an_adapters_name_is_used_once_here_and_on_the_server(serve, adapters):
    stub, remote = serve()
    remote.load_adapter(adapters[0], "policy-1")
    remote.unload_adapter("policy-1")
    asked = len(stub.requests)
    for name in ("policy-1", "base"):
        with pytest.raises(RolloutFailed, match=f"'{name}' was used before"):
            remote.load_adapter(adapters[1], name)
    assert len(stub.requests) == asked
    stub.adapters["policy-7"] = str(adapters[0])  # by another client
    with pytest.raises(RolloutFailed, match="'policy-7' was used before"):
        remote.load_adapter(adapters[1], "policy-7")
    assert remote.adapter is None


def test_a_server_without_the_adapter_routes_is_told_from_one_without_the_adapter(serve, adapters, tmp_path):
    _, remote = serve(runtime_adapters=False)
    for change in (lambda: remote.load_adapter(adapters[0], "policy-1"), lambda: remote.unload_adapter("policy-1")):
        with pytest.raises(RolloutFailed, match="no route") as refused:
            change()
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in refused.value.mend
    stub, remote = serve()
    with pytest.raises(RolloutFailed, match="No adapter found"):
        remote.load_adapter(tmp_path, "policy-1")
    remote.load_adapter(adapters[0], "policy-1")  # a name that was not loaded is not used
    with pytest.raises(RolloutFailed, match="'policy-9' cannot be found"):
        remote.unload_adapter("policy-9")
    stub.adapters.clear()
    with pytest.raises(RolloutFailed, match="`policy-1` does not exist"):
        remote.generate(PROMPTS, max_new_tokens=1)


@pytest.mark.parametrize("status", [429, 503])
def test_a_request_that_is_put_off_is_sent_again_and_at_last_given_up(serve, status):
    stub, remote = serve(failures=[(status, {}, "busy"), (status, {"Retry-After": "0"}, "busy")])
    assert remote.generate(PROMPTS[:1], max_new_tokens=1)
    assert len(stub.requests) == 3
    stub.failures = [(status, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "busy")] * 3
    with pytest.raises(RolloutFailed, match=f"refused with {status}: busy"):
        remote.generate(PROMPTS[:1], max_new_tokens=1)
    assert len(stub.requests) == 6


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (error(400, "maximum context length is 128"), "refused with 400: maximum context length is 128"),
        ((401, {}, {"error": "Unauthorized"}), "refused with 401: Unauthorized"),
        ((500, {}, "the engine is dead"), "refused with 500: the engine is dead"),
        ((422, {}, {"detail": [{"msg": "field required"}]}), "field required"),
    ],
)
def test_an_error_status_gives_the_servers_words_and_is_not_repeated(serve, failure, said):
    stub, remote = serve(failures=[failure])
    with pytest.raises(RolloutFailed, match=said) as refused:
        remote.generate(PROMPTS[:1], max_new_tokens=1)
    assert refused.value.where == f"{stub.url}/v1/completions"
    assert len(stub.requests) == 1


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed_so_that_the_token_goes_nowhere_else(serve, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    other, _ = serve()
    stub, remote = serve(failures=[(status, {"Location": f"{other.url}/v1/completions"}, "")])
    with pytest.raises(RolloutFailed, match=f"refused with {status}"):
        remote.generate(PROMPTS[:1], max_new_tokens=1)
    assert other.requests == []
    assert stub.requests[0][1]["Authorization"] == "Bearer sesame"


def test_no_token_is_sent_where_none_is_set(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stub, remote = serve()
    remote.generate(PROMPTS[:1], max_new_tokens=1)
    assert "Authorization" not in stub.requests[0][1]


def test_a_server_that_is_not_there_or_does_not_answer_in_time_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"  # bound, and not listened to
        with pytest.raises(RolloutFailed, match="nothing listens there"):
            ServerGenerator(url, "base", NumberTokenizer(0)).generate([[1]], max_new_tokens=1)
        taken.listen()  # takes the connection and never answers
        with pytest.raises(RolloutFailed, match=r"no answer within 0\.05 seconds"):
            ServerGenerator(url, "base", NumberTokenizer(0), timeout=0.05).generate([[1]], max_new_tokens=1)


def test_answers_that_hold_something_else_are_refused(serve):
    _, remote = serve(sane=False)
    with pytest.raises(RolloutFailed, match="no token_ids"):
        remote.generate([[1, 2]], max_new_tokens=1)
    with pytest.raises(RolloutFailed, match="log-probabilities of a prompt"):
        remote.logprobs([[1, 2]], [[3]])
    for answer in ("hello", {"choices": []}, {"choices": [{"token_ids": [1], "finish_reason": "abort"}]}):
        _, remote = serve(failures=[(200, {}, answer)])
        with pytest.raises(RolloutFailed, match="cannot be sampled from"):
            remote.generate([[1, 2]], max_new_tokens=1)
    _, remote = serve(failures=[(200, {}, {"choices": [{"token_ids": [1, 2], "finish_reason": "stop", "logprobs": None}]})])
    with pytest.raises(RolloutFailed, match="one log-probability a token"):
        remote.generate([[1, 2]], max_new_tokens=1, logprobs=True)


def test_bad_arguments_are_refused(serve):
    _, remote = serve()
    with pytest.raises(ModelError, match="constraint"):
        remote.generate([[1]], max_new_tokens=1, constraint=object())
    with pytest.raises(ValueError, match="1 prompts, 2 seeds"):
        remote.generate([[1]], max_new_tokens=1, seeds=[1, 2])
    with pytest.raises(ValueError, match="1 prompts, 2 answers"):
        remote.logprobs([[1]], [[1], [2]])
    for url in ("localhost:8000", "ftp://host", "http://", "http://user:secret@host"):
        with pytest.raises(RecipeError) as refused:
            ServerGenerator(url, "base", NumberTokenizer(0))
        assert "secret" not in str(refused.value)
