"""From a list of messages to the prompt that the model was trained on, by its chat template.

A template is a program from the internet. It is rendered by Jinja's sandbox in a child process
with a limit on memory, processor time and output: the sandbox keeps it from the machine, the
limits keep it from running for ever, which the sandbox alone does not.
Knows nothing about tokens; what a user types inside a message is escaped by no template.
"""

import json
import resource
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from m2c.errors import BadInput

MAX_TEMPLATE_CHARS = 1 << 20
MAX_PROMPT_CHARS = 16 << 20

_CPU_SECONDS = 5
_WALL_SECONDS = 60  # generous: the child sleeps only while it waits for a busy machine
_ADDRESS_SPACE_NBYTES = 1 << 30

_NO_SYSTEM = "try without a system message (no --system; in chat: /system alone)"
_OTHER_TEMPLATE = "use another template, or give the prompt without one"


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """The prompt for `messages`, each {"role": ..., "content": ...}.

    `add_generation_prompt` ends it where the assistant's answer begins. BadInput when the
    template is malformed, refuses the messages, or asks for more than the limits above.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise BadInput(f"the chat template is {len(template)} characters long", _OTHER_TEMPLATE)
    request = {
        "cpu_seconds": _CPU_SECONDS,
        "template": template,
        "variables": {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
            "eos_token": eos_token,
            # templates test these against none, and an undefined variable is not none
            "tools": None,
            "documents": None,
        },
    }
    answer = _in_child(json.dumps(request).encode())
    if "error" in answer:
        # not every model's format has a place for one: gemma's refuses it
        has_system = any(message.get("role") == "system" for message in messages)
        hint = _NO_SYSTEM if has_system else _OTHER_TEMPLATE
        raise BadInput(f"the chat template failed: {answer['error']}", hint)
    return answer["prompt"]


def chat_template_of(sidecars: dict[str, bytes]) -> str | None:
    """The template among a model's small files (name -> bytes), None where it has none.

    chat_template.jinja wins over tokenizer_config.json, where it is a string, or a list of
    {"name": ..., "template": ...} of which the one named "default" counts.
    """
    if "chat_template.jinja" in sidecars:
        try:
            return sidecars["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError:
            raise BadInput("chat_template.jinja is not UTF-8", _OTHER_TEMPLATE) from None
    if "tokenizer_config.json" not in sidecars:
        return None
    # imported here because the child, which runs none of this, starts faster without it
    from m2c.bundle.strict import parse_object

    config = parse_object(sidecars["tokenizer_config.json"], "tokenizer_config.json")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if type(entry) is dict}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _in_child(request: bytes) -> dict[str, str]:
    # -I: neither the environment nor the current folder decides what the child imports
    package_root = str(Path(__file__).resolve().parents[1])
    start = f"import sys; sys.path.insert(0, {package_root!r}); from m2c import chat; chat.serve()"
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-B", "-c", start],
            input=request,
            capture_output=True,
            start_new_session=True,  # Ctrl-C is for us
            timeout=_WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise BadInput("the chat template does not come to an end", _OTHER_TEMPLATE) from None
    if child.returncode == -signal.SIGKILL:
        raise BadInput(f"the chat template ran for more than {_CPU_SECONDS} s", _OTHER_TEMPLATE)
    try:
        return json.loads(child.stdout)
    except ValueError:
        reason = child.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        reason = reason or f"its process ended with {child.returncode}"
        raise BadInput(f"the chat template failed: {reason}", _OTHER_TEMPLATE) from None


def serve() -> None:
    """The child's side: one request on stdin, one answer on stdout, both JSON."""
    request = json.load(sys.stdin.buffer)
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_seconds"],) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_NBYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file grows; a pipe is not a file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = {"prompt": _render_here(request["template"], request["variables"])}
    except MemoryError:
        answer = {"error": f"it needs more than {_ADDRESS_SPACE_NBYTES >> 30} GiB of memory"}
    except Exception as error:  # a template can raise whatever its expressions raise
        answer = {"error": " ".join(str(error).split())[:500] or type(error).__name__}
    sys.stdout.buffer.write(json.dumps(answer).encode())


def _render_here(template: str, variables: dict[str, Any]) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    pieces: list[str] = []
    nchars = 0
    for piece in environment.from_string(template).generate(variables):
        nchars += len(piece)
        if nchars > MAX_PROMPT_CHARS:
            raise TemplateError(f"its output is longer than {MAX_PROMPT_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` marks what to train on; for a prompt, only what is inside counts."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which a model has never seen
    return json.dumps(value, ensure_ascii=False, indent=indent)
