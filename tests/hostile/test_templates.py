"""Chat templates are programs of a stranger's: no code, no endless loop, no memory without end."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.calibration.templates import ChatTemplate, TemplateRefusal

MESSAGES = [
    {"role": "user", "content": "a < b"},
    {"role": "assistant", "content": "\u00fc\n{{ 1 }}"},
]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def template(micro):
    """`template(text)`: the micro model's tokenizer with that chat template."""

    def make(text, seconds=60.0):
        tokenizer = AutoTokenizer.from_pretrained(micro)
        tokenizer.chat_template = text
        return ChatTemplate(text, tokenizer.special_tokens_map, seconds), tokenizer

    return make


def test_the_text_is_transformers_own(template):
    text = (
        "{{ eos_token }}{% for m in messages %}{% if m.role == 'user' %}U{% continue %}{% endif %}"
        "{% generation %}{{ m.role | upper }}: {{ m.content | tojson }}{% endgeneration %}\n"
        "{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    ours, tokenizer = template(text)
    with ours:
        found = [ours.render(MESSAGES), ours.render(MESSAGES[1:])]
    wanted = [tokenizer.apply_chat_template(m, tokenize=False) for m in (MESSAGES, MESSAGES[1:])]
    assert found == wanted


def test_an_endless_loop_is_stopped(template):
    """The limit is a second here; the loop would take hours."""
    ours, _ = template(ENDLESS, 1.0)
    with ours:
        with pytest.raises(TemplateRefusal, match="longer than its time limit"):
            ours.render(MESSAGES)
        with pytest.raises(TemplateRefusal, match="its process ended"):
            ours.render(MESSAGES)
        process = ours._process
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ 'x' * 10**10 }}", "more than 1 GiB|its process ended|time limit"),
        ("{% set x = namespace(v='x') %}{% for i in range(40) %}{% set x.v = x.v + x.v %}"
         "{% endfor %}", "more than 1 GiB|its process ended|time limit"),
        ("{{ range(10**9) }}", "too big"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe|undefined"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no\\nway') }}", "no way"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "without end|its process ended"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)  # fmt: skip
def test_bad_templates(template, text, said):
    ours, _ = template(text)
    with ours, pytest.raises(TemplateRefusal, match=said) as caught:
        ours.render(MESSAGES)
    assert "\n" not in str(caught.value)


def test_no_secret_is_in_its_reach(template, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    ours, _ = template("{{ 1 }}")
    with ours:
        environment = Path(f"/proc/{ours._process.pid}/environ").read_bytes()
        assert b"x" * 34 not in environment and ours.render(MESSAGES) == "1"


def test_in_a_conversion(project, micro, cli, monkeypatch):
    """The line that a user reads, and no process left behind."""
    monkeypatch.setattr("pipeline.calibration.templates.ChatTemplate.__init__.__defaults__", (1.0,))
    source = shutil.copytree(micro, project.folder / "source")
    (source / "chat_template.jinja").write_text(ENDLESS)
    chat = project.folder / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    project.change(
        source={"model": str(source)}, calibration={"sources": [{"file": str(chat), "chat": True}]}
    )
    answer = cli("run", project.write())
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert "the chat template refuses it (it takes longer than its time limit" in answer.err
    assert not project.partial.exists()
