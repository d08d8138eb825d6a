"""The whole page: self-contained, bounded, honest about what is missing, and readable in both colour schemes."""

from __future__ import annotations

import errno
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tunesmith.errors import MissingFile, StorageFailed
from tunesmith.report import render_report, write_report
from tunesmith.rundir import storage

FILES = (
    "recipe.yaml",
    "manifest.json",
    "data/ledger.json",
    "data/health.json",
    "data/quarantine.jsonl",
    "plan.json",
    "events.jsonl",
    "evaluation.json",
    "samples/task.tuned.jsonl",
)
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Outline(HTMLParser):
    """Tags and attributes of a page, and whether every tag that opens closes."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open, self.unbalanced = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


def words_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</style>")[1]))


def test_the_report_lies_in_the_run_directory_and_is_one_file(run_path):
    before = {path for path in run_path.rglob("*") if path.is_file()}
    target = write_report(run_path)
    assert target == run_path / "report.html"
    assert {path for path in run_path.rglob("*") if path.is_file()} - before == {target}


def test_the_same_run_gives_the_same_bytes(run_path):
    first = write_report(run_path).read_bytes()
    assert write_report(run_path).read_bytes() == first


def test_a_full_disk_is_a_named_error_and_leaves_the_old_report(run_path, monkeypatch):
    write_report(run_path)
    old = (run_path / "report.html").read_bytes()
    (run_path / "recipe.yaml").write_text("name: other\n")

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write", refuse)
    with pytest.raises(StorageFailed):
        write_report(run_path)
    assert (run_path / "report.html").read_bytes() == old


def test_a_folder_that_is_not_there_or_holds_no_run_is_a_named_error_and_gets_no_page(tmp_path):
    with pytest.raises(MissingFile):
        write_report(tmp_path / "nothing")
    with pytest.raises(MissingFile, match="no run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_page_refers_to_nothing_outside_itself_and_holds_no_script(run_path):
    page = render_report(run_path)
    outline = Outline(page)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form", "audio", "video"} & set(outline.tags)
    references = [
        value for _, name, value in outline.attributes if name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster")
    ]
    assert references
    assert all(value.startswith("#") for value in references)
    assert not [name for _, name, _ in outline.attributes if name.startswith("on")]
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "@font-face" not in style


def test_the_content_security_policy_forbids_all_but_inline_style(run_path):
    (policy,) = [
        value
        for tag, name, value in Outline(render_report(run_path)).attributes
        if tag == "meta" and name == "content" and "default-src" in value
    ]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def test_every_tag_closes_ids_are_unique_and_anchors_lead_somewhere(run_path):
    outline = Outline(render_report(run_path))
    assert (outline.unbalanced, outline.open) == ([], [])
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value.removeprefix("#") for _, name, value in outline.attributes if name == "href"} <= set(ids)
    assert all(value in ids for _, name, value in outline.attributes if name == "aria-labelledby")


def test_headings_descend_without_a_gap_tables_have_captions_and_charts_have_names(run_path):
    page = render_report(run_path)
    outline = Outline(page)
    levels = [int(tag[1]) for tag in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert outline.tags.count("table") == outline.tags.count("caption")
    assert page.count('<svg class="chart"') == len(re.findall(r'<svg class="chart" [^>]*role="img" aria-label="[^"]{10,}"', page)) > 5


def test_the_verdict_comes_before_everything_else(run_path):
    sections = re.findall(r'<section id="([a-z]+)"', render_report(run_path))
    assert sections == ["verdict", "candidates", "learning", "costs", "examples", "ledger", "findings", "repeat"]


def test_an_empty_run_directory_says_not_measured_in_every_part(tmp_path):
    page = render_report(tmp_path)
    sections = re.split(r'<section id="[a-z]+"', page)[1:]
    assert len(sections) == 8
    assert all("NOT MEASURED" in section for section in sections)
    figures = re.findall(r"\d+(?:\.\d+)?%|\d+\.\d+", words_of(page))
    assert figures == []


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_costs_its_own_part_only(run_path, missing):
    (run_path / missing).unlink()
    page = render_report(run_path)
    assert "NOT MEASURED" in page
    assert "balances" in page or missing == "data/ledger.json"
    assert Outline(page).unbalanced == []


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"a": ' * 5000, b"7", b'{"tasks": [], "gates": {"a": 1}, "findings": 3}']
)
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_never_stops_the_report(run_path, name, content):
    (run_path / name).write_bytes(content)
    page = render_report(run_path)
    assert Outline(page).unbalanced == []


def test_a_file_that_cannot_be_read_is_named_on_the_page(run_path):
    (run_path / "plan.json").write_text("{torn")
    (run_path / "data" / "health.json").write_text("[]")
    page = words_of(render_report(run_path))
    assert "plan.json is not valid JSON" in page
    assert "health.json is not a JSON object" in page


WRONG = [None, "text", True, -1, [], {}, [None, 1, "x"], {"a": {"b": []}}, float("nan"), 1e400]


def places(value, path=()):
    """Every place in a JSON value; of a list the first only."""
    parts = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.parametrize(
    "name", ["evaluation.json", "plan.json", "data/ledger.json", "data/health.json", "manifest.json", "samples/task.tuned.jsonl"]
)
def test_a_value_of_the_wrong_type_never_stops_the_report(run_path, name):
    file = run_path / name
    source = file.read_text().splitlines()[0] if name.endswith("jsonl") else file.read_text()
    for index, path in enumerate(places(json.loads(source))):
        value = json.loads(source)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = WRONG[index % len(WRONG)]
        file.write_text(json.dumps(value))
        assert "</html>" in render_report(run_path), (path, WRONG[index % len(WRONG)])


def test_the_page_stays_under_a_megabyte_and_says_what_it_cut(run_path):
    long = "\"'<&>" * 8_000
    for path in (run_path / "samples").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()[:20]]
        for line in lines:
            line["prompt"][-1]["content"] = line["output"] = long
            line["reference"] = json.dumps({f"field {index} {long[:3000]}": long for index in range(13)})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_path / "recipe.yaml").write_text("name: quickstart\n# " + long + "\n")
    fair = long[:4000]
    finding = {"check": fair, "evidence": fair, "mend": fair, "row_ids": [fair] * 9}
    (run_path / "data" / "health.json").write_text(json.dumps({"findings": [finding] * 99}))
    (run_path / "manifest.json").write_text(json.dumps({fair[:20] + str(index): {fair: fair} for index in range(300)}))
    evaluation = json.loads((run_path / "evaluation.json").read_text())
    evaluation["gates"] = [{"name": fair, "result": "PASS", "reason": fair}] * 300
    (run_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = render_report(run_path)
    assert len(page.encode()) < 1_000_000
    assert "more characters in samples/" in page
    assert "more findings in data/health.json" in page
    assert "more entries in manifest.json" in page


def test_lone_surrogates_in_an_output_do_not_stop_the_writing(run_path):
    path = run_path / "samples" / "task.tuned.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["output"] = "\ud83d alone \udc00"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "\ufffd alone \ufffd" in write_report(run_path).read_text(encoding="utf-8")


def luminance(colour):
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_every_text_colour_stands_out_from_both_grounds(scheme):
    css = (Path(render_report.__code__.co_filename).parent / "templates" / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 3
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", blocks[scheme]))
    for ground in ("paper", "panel"):
        for ink in ("ink", "muted", "accent", "wrong"):
            light, dark = sorted((luminance(colours[ground]), luminance(colours[ink])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, ink)
    light, dark = sorted((luminance(colours["paper"]), luminance(colours["faint"])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 2.5  # lines and bars, not text


def test_a_sentence_of_the_page_reads_as_written(run_path):
    page = words_of(render_report(run_path))
    assert "The tuned model answers 86% of 150 test items exactly right; the same model with 4 examples in the prompt, 21%." in page
    assert "Use the tuned model." in page
    assert "The account balances." in page
