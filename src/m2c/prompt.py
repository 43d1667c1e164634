"""From what a person typed to the token ids a model gets.

Knows nothing about where the text came from.
"""

import secrets
from collections.abc import Sequence

from m2c.chat import render
from m2c.tokenizer import Tokenizer


def chat_ids(
    tokenizer: Tokenizer, template: str, prompt: str, *, system: str | None = None
) -> list[int]:
    """Ids of one user turn in the model's chat format, ready for the answer."""
    said = [] if system is None else [("system", system)]
    return conversation_ids(tokenizer, template, [*said, ("user", prompt)])


def conversation_ids(
    tokenizer: Tokenizer, template: str, messages: Sequence[tuple[str, str]]
) -> list[int]:
    """Ids of messages, each (role, text), in the model's chat format, ready for the answer.

    Control tokens that somebody typed stay text: where a message spells one, the template is
    rendered around a placeholder and the typed text is encoded apart.
    """
    places: dict[str, str] = {}
    rendered_as = []
    for role, text in messages:
        shown = text
        if tokenizer.spells_control_token(text):
            shown = f"m2c{secrets.token_hex(16)}"
            places[shown] = text
        rendered_as.append({"role": role, "content": shown})
    bos, eos = (tokenizer.token_text(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    rendered = render(template, rendered_as, bos_token=bos, eos_token=eos)
    return _encode_around(tokenizer, rendered, places)


def raw_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of the text itself, after the model's beginning-of-text token if it wants one."""
    ids = tokenizer.encode(prompt)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    return ids


def _encode_around(tokenizer: Tokenizer, rendered: str, places: dict[str, str]) -> list[int]:
    for place, text in places.items():
        before, found, after = rendered.partition(place)
        if found:
            rest = {p: t for p, t in places.items() if p != place}
            return [
                *_encode_around(tokenizer, before, rest),
                *tokenizer.encode(text),
                *_encode_around(tokenizer, after, places),  # a template may say it twice
            ]
    return tokenizer.encode(rendered, special=True) if rendered else []
