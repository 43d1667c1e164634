"""chat.py: templates as published models write them, and templates that mean harm."""

import json
from typing import Any

import pytest

from m2c import chat
from m2c.chat import chat_template_of, render
from m2c.errors import BadInput

MESSAGES = [{"role": "user", "content": "Hi <b> & é"}, {"role": "assistant", "content": "Yes?"}]

CHATML = r"""{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' -}}
{% endif %}
"""


def test_a_prompt_ends_where_the_answer_begins() -> None:
    said = "<|im_start|>user\nHi <b> & é<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    assert render(CHATML, MESSAGES) == said + "<|im_start|>assistant\n"
    assert render(CHATML, MESSAGES, add_generation_prompt=False) == said


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b> & é"}'),
        ("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{% if tools is not none %}tools{% endif %}{{ missing }}", ""),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ 1 + 1 }}{% endgeneration %}!", "2!"),
        ("{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}", "2"),
        ("{{ messages[0].content.split()[-1].strip('é') or strftime_now('x') }}", "x"),
        ("{{ messages[0]['content'] | trim | length }}", "10"),
    ],
)
def test_what_published_templates_use(template: str, expected: str) -> None:
    assert render(template, MESSAGES, bos_token="<s>", eos_token="</s>") == expected


def test_a_format_without_a_place_for_a_system_message() -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = refusal + "{{ raise_exception('neither') }}"
    with pytest.raises(BadInput, match="no; try without a system message"):
        render(template, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    with pytest.raises(BadInput, match="neither; use another template"):
        render(template, [{"role": "user", "content": "y"}])


def test_text_that_is_not_valid_unicode_comes_back_as_it_went() -> None:
    assert render("{{ messages[0].content }}", [{"content": "a\udc80"}]) == "a\udc80"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 +", "unexpected"),
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('roles\n must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + none }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ 'a' * 10**11 }}", "memory"),
        ("{{ 'a' * (3 * 2**30) }}", "memory"),  # which this machine may well have
        ("{{ 'a'.ljust(10**11) }}", "memory"),
        ("{{ '%1000000000000d' % 1 }}", "memory"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange"),
        ("{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}", "longer than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{" + "(" * 50_000, "recursion"),
        ("a" * (chat.MAX_TEMPLATE_CHARS + 1), "characters long"),
    ],
)
def test_templates_that_fail_say_why(template: str, reason: str) -> None:
    with pytest.raises(BadInput, match=f"chat template.*{reason}") as caught:
        render(template, MESSAGES)
    assert "\n" not in str(caught.value)


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_CPU_SECONDS", 1)
    loop = "{% for i in range(99999) %}"
    with pytest.raises(BadInput, match="ran for more than 1 s"):
        render(loop * 3 + "{% endfor %}" * 3, MESSAGES)


def test_a_child_that_sleeps_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_WALL_SECONDS", 0)
    with pytest.raises(BadInput, match="does not come to an end"):
        render(CHATML, MESSAGES)


def test_the_folder_it_runs_in_decides_nothing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported from here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert render("fine", []) == "fine"


def config(template: Any) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}


def test_where_a_template_is_found() -> None:
    assert chat_template_of({}) is None
    assert chat_template_of({"tokenizer_config.json": b"{}"}) is None
    assert chat_template_of(config("A")) == "A"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert chat_template_of(config(named)) == "D"
    assert chat_template_of(config(named[:1])) is None
    assert chat_template_of({**config("A"), "chat_template.jinja": b"J"}) == "J"


@pytest.mark.parametrize("odd", [None, 1, {}, [], [1, "default"], [{"name": "default"}]])
def test_odd_template_entries_count_as_none(odd: Any) -> None:
    assert chat_template_of(config(odd)) is None


def test_malformed_sidecars_are_bad_input() -> None:
    for name, data in (
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": "a", "chat_template": "b"}'),
        ("chat_template.jinja", b"\xff"),
    ):
        with pytest.raises(BadInput, match=name.replace(".", r"\.")):
            chat_template_of({name: data})
