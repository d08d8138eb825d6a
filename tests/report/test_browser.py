"""The page in a real browser: hostile text does nothing, nothing is asked of any network, and no width scrolls sideways."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tests.report.stages import PPO, ppo_events, put

from tunesmith.report import render_report

MARK = "window.__ran=1"
PAYLOADS = [
    f"<script>{MARK}</script>",
    f"<img src=x onerror={MARK}>",
    f'"><svg onload={MARK}>',
    "</pre></details><iframe srcdoc='<script>parent.__ran=1</script>'></iframe>",
    f"' autofocus tabindex=1 onfocus={MARK} x='",
    f"</style><script>{MARK}</script>",
    f"</title><script>{MARK}</script>",
    f'<a href="javascript:{MARK}">x</a>',
    "{{ 7*7 }}{% for x in ().__class__.__base__.__subclasses__() %}x{% endfor %}",
    f'<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={MARK}&gt;">',
    f"</text></svg><script>{MARK}</script>",
    f'<body onload={MARK}><meta http-equiv="refresh" content="0;url=https://example.invalid/">',
]


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; the test is skipped only where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    with playwright.sync_playwright() as started:
        if found is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no Chromium was found on this machine")
        launched = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield launched
        launched.close()


def poisoned(value, payload):
    """A JSON value whose every text and every key carries the payload; the words that the report's logic reads stay."""
    if isinstance(value, dict):
        return {(key if key in LOGIC | KEPT else key + payload): poisoned(part, payload) for key, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part, payload) for part in value]
    return value + payload if isinstance(value, str) and value not in KEPT else value


KEPT = set(
    re.findall(
        r"\w+", "task general tuned few_shot zero_shot classical exact_match perplexity PASS phase phase_part evaluate resumed user system"
    )
)
LOGIC = set(
    re.findall(
        r"\w+",
        """tasks hash n skipped candidates metrics value low high not_measured decoding mean_output_tokens comparisons metric candidate
        baseline difference minimum_detectable task gates name result reason recommendation verdict few_shot selected table k set
        classical trials confidence findings check row_ids related_ids evidence mend rows_in rows_trained rows_held_out rows_dropped
        tokens total supervised truncated predicted measured bound_by peak_memory_bytes path line row event stage step loss of
        learning_rate eval_loss computed_tokens seconds item_id prompt role content reference output finish_reason scores""",
    )
)


def poison(run_path, payload):
    for path in [*run_path.rglob("*.json"), *run_path.rglob("*.jsonl")]:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        path.write_text("".join(json.dumps(poisoned(json.loads(line), payload)) + "\n" for line in lines))
    for path in (run_path / "samples").glob("*.jsonl"):  # an output that is no JSON any more is shown raw; half of them stay JSON
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines[::2]:
            line["output"] = json.dumps({"intent": payload, payload: payload, "summary": payload})
            line["reference"] = json.dumps({"intent": payload, "summary": "x" + payload})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = (run_path / "recipe.yaml").read_text().replace("name: quickstart", f"name: {json.dumps('quickstart' + payload)}", 1)
    (run_path / "recipe.yaml").write_text(
        recipe.replace("name: smollm2-135m-instruct", f"name: {json.dumps(payload)}", 1) + "# " + payload + "\n"
    )


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(1, 13))
def test_hostile_text_anywhere_in_a_run_does_nothing(browser, run_path, tmp_path, payload):
    """With the policy, and without it, since escaping must hold alone."""
    clean = render_report(run_path)
    poison(run_path, payload)
    page_text = render_report(run_path)
    without = page_text.replace('http-equiv="Content-Security-Policy"', 'name="none"')
    assert without != page_text
    for given in (page_text, without):
        does_nothing(browser, given, payload, clean, tmp_path / "page.html")


def does_nothing(browser, page_text: str, payload: str, clean: str, target: Path) -> None:
    """A page with a payload in it runs nothing, asks for nothing and has the parts of the clean one."""
    target.write_text(page_text, encoding="utf-8")
    tab, asked = browser.new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(target.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    tab.keyboard.press("Tab")
    tab.wait_for_timeout(50)
    assert tab.evaluate("window.__ran") is None
    assert asked == [target.as_uri()]
    foreign = "script, iframe, img, a[href^=javascript], math, mglyph, object, embed, meta[http-equiv=refresh]"
    handlers = "[onload], [onerror], [onfocus], [autofocus]"
    assert tab.evaluate(f"document.querySelectorAll({json.dumps(f'{foreign}, {handlers}')}).length") == 0
    assert tab.evaluate("document.body.innerText").count(payload) > 10
    assert "49" not in payload or "{{ 7*7 }}" in page_text
    sections = "[...document.querySelectorAll('body, main > section, footer')].map(one => one.tagName + one.id).join()"
    shape = tab.evaluate(sections)
    tab.set_content(clean)
    assert shape == tab.evaluate(sections)
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_no_width_scrolls_sideways_and_nothing_is_fetched(browser, run_path, tmp_path, width, scheme):
    target = tmp_path / "page.html"
    target.write_text(render_report(run_path), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    tab, asked = context.new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(target.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 20, 23)"}[scheme]
    assert asked == [target.as_uri()]
    context.close()


@pytest.mark.parametrize("payload", [PAYLOADS[0], PAYLOADS[3], PAYLOADS[10]], ids=range(3))
def test_hostile_or_endless_samples_names_and_rules_of_a_stage_that_samples_do_nothing(browser, run_path, tmp_path, payload):
    events = [{**event, "stage": f"ppo{payload}", f"reward/{payload}": 0.5} for event in ppo_events(stop={"rule": payload})]
    for event in events:
        for sample in event.get("samples", []):
            sample |= {"prompt": payload + sample["prompt"] + "x" * 700, "answer": payload + "y" * 700}
    put(run_path, events, {**PPO, "name": f"ppo{payload}", "objective": {"type": payload}})
    target = tmp_path / "page.html"
    target.write_text(render_report(run_path).replace('http-equiv="Content-Security-Policy"', 'name="none"'), encoding="utf-8")
    tab = browser.new_page(viewport={"width": 360, "height": 800})
    tab.goto(target.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    tab.wait_for_timeout(50)
    assert tab.evaluate("window.__ran") is None
    assert tab.evaluate("document.querySelectorAll('script, iframe, img, [onload]').length") == 0
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    assert tab.evaluate("document.querySelector('#learning').innerText").count(payload) > 10
    tab.close()


def test_a_long_word_in_an_output_does_not_widen_a_phone_page(browser, run_path, tmp_path):
    path = run_path / "samples" / "task.tuned.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["output"] = json.dumps({"intent": "x" * 700})
        line["prompt"][-1]["content"] = "y" * 700
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target = tmp_path / "page.html"
    target.write_text(render_report(run_path), encoding="utf-8")
    tab = browser.new_page(viewport={"width": 360, "height": 800})
    tab.goto(target.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    tab.close()


def test_folded_parts_are_printed_open(browser, run_path, tmp_path):
    target = tmp_path / "page.html"
    target.write_text(render_report(run_path), encoding="utf-8")
    tab = browser.new_page()
    tab.goto(target.as_uri())
    visible = "[...document.querySelectorAll('details:not([open]) table, details:not([open]) pre')].map(one => one.checkVisibility())"
    assert set(tab.evaluate(visible)) == {False}
    tab.emulate_media(media="print")
    assert set(tab.evaluate(visible)) == {True}
    tab.close()
