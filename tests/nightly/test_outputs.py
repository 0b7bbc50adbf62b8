"""A night told elsewhere: webhook over real HTTP, step summary, JUnit with hostile words."""

import json
import threading
import xml.etree.ElementTree as ET
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipeline.nightly import notify, outputs
from pipeline.nightly.night import Night
from pipeline.nightly.page import night_page

HOSTILE = "<script>alert(1)</script> & \"'\x00\x1b[31m|\ud800 ]]> \U0001f600"


def record(job, outcome="ok", state="ok", reasons=(), **more):
    return {
        "job": job,
        "night": "2026-11-25T02:37:00Z",
        "outcome": outcome,
        "state": state,
        "reasons": list(reasons),
        "watched": [],
        "errors": [],
        "changed": [],
        "figures": {"perplexity_ratio": 1.0021, "kl_divergence": None},
        "baseline": {},
        "runs": [{}],
        "seconds": 61.25,
        "machine": {"key": "k", "host": "h", "cpu": "c", "device": "cpu"},
        "versions": {"requant": "0.1.0"},
        "commit": "0123456789abcdef",
        "model": "m",
        "revision": None,
        "sums": None,
        "seed": 0,
    } | more


@pytest.fixture
def night(tmp_path):
    records = (
        record("well"),
        record("slow", "regression", "new", [HOSTILE]),
        record("gone", "broken", "still failing", ["no model"], figures={}),
    )
    return Night("2026-11-25T02:37:00Z", records, tmp_path)


class Hook:
    """A web server that takes messages and answers with one status."""

    def __init__(self, status):
        taken = self.taken = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                taken.append((self.path, self.headers["Content-Type"], json.loads(body)))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                """Quiet."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/SECRET"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def test_exit_codes(night, tmp_path):
    assert night.code == 2
    assert Night("n", night.records[:2], tmp_path).code == 1
    assert Night("n", night.records[:1], tmp_path).code == 0


def test_the_webhook_is_told(night, monkeypatch):
    said = []
    with Hook(200) as hook:
        monkeypatch.setenv(notify.WEBHOOK, hook.url)
        notify.notify(night, said.append)
    ((path, kind, body),) = hook.taken
    assert path == "/services/SECRET" and kind == "application/json" and said == []
    first, *lines = body["text"].split("\n")
    assert first == "requant nightly, 3 jobs: 1 ok, 1 regression, 1 broken"
    assert lines[-1] == "gone: broken (still failing); no model"


def test_a_night_without_news_is_not_told(night, tmp_path, monkeypatch):
    with Hook(200) as hook:
        monkeypatch.setenv(notify.WEBHOOK, hook.url)
        notify.notify(Night("n", night.records[:1], tmp_path), [].append)
    assert hook.taken == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/SECRET", "file:///SECRET", "SECRET", "//x y"])
def test_the_webhooks_url_is_told_to_nobody(night, monkeypatch, url):
    said = []
    monkeypatch.setenv(notify.WEBHOOK, url)
    notify.notify(night, said.append)
    assert len(said) == 1 and "SECRET" not in said[0] and notify.WEBHOOK in said[0]


def test_a_webhook_that_refuses(night, monkeypatch):
    said = []
    with Hook(404) as hook:
        monkeypatch.setenv(notify.WEBHOOK, hook.url)
        notify.notify(night, said.append)
    assert said == [f"the webhook of {notify.WEBHOOK} could not be told: it answered HTTP 404"]


def test_the_step_summary_is_added_to(night, tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv(notify.STEP_SUMMARY, str(path))
    notify.notify(Night("n", (night.records[0], night.records[2]), tmp_path), [].append)
    lines = path.read_text().splitlines()
    assert lines[:2] == ["before", "## 2 jobs: 1 ok, 1 broken"]
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4 and {row.count("|") for row in rows} == {len(outputs.HEAD) + 1}
    assert lines[-1] == "- gone: broken (still failing); no model"


def test_junit_holds_any_words(night):
    suites = ET.fromstring(outputs.junit(night))
    (failure,) = suites.iter("failure")
    assert failure.text == HOSTILE.replace("\x00", "?").replace("\x1b", "?").replace("\ud800", "?")
    assert failure.get("type") == "new"


def test_json_is_json(night):
    assert json.loads(json.dumps(outputs.as_dict(night)))["exit_code"] == 2


def test_the_page_holds_any_words(night):
    page = night_page(night, {r["job"]: [r] for r in night.records})
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
