"""conversation.py: going on with a conversation says what a fresh process would say."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from running import MIXES, options_for, smallest_dram
from tiny_models import pack_folder, write_checkpoint

from m2c.bundle.bundle import Bundle
from m2c.bundle.strict import dump_json
from m2c.conversation import CachedIds, Conversation, Dialogue, Exchange, Messages
from m2c.engine import Engine, RunOptions
from m2c.errors import BadInput, UsageError
from m2c.generate import prefill, together
from m2c.modes import exact_options
from m2c.sampling import SamplingParams

REFUSES = "refuses system messages"
WARM = SamplingParams(temperature=0.8, seed=5)
GREEDY = SamplingParams()


# -- bookkeeping -----------------------------------------------------------------------------------


class Kv:
    def __init__(self, length: int = 0) -> None:
        self.length = length

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


ids_lists = st.lists(st.integers(0, 2), max_size=8)


@example(known=[1, 2], length=2, ids=[1, 2, 0])  # the last one's keys are not certain
@given(known=ids_lists, length=st.integers(0, 12), ids=ids_lists.filter(bool))
def test_what_is_reused_was_certain_and_is_the_prompt(
    known: list[int], length: int, ids: list[int]
) -> None:
    kv: Any = Kv(length)
    cached = CachedIds(kv)
    cached.settle(known)
    certain = known[: min(length, max(0, len(known) - 1))]
    count = cached.reuse(ids)
    assert count == kv.length < len(ids)
    assert ids[:count] == certain[:count]
    # and not one less than possible
    if count < min(len(certain), len(ids) - 1):
        assert ids[count] != certain[count]


def by_letters(messages: Messages) -> list[int]:
    return [ord(letter) for _, text in messages for letter in text]


def said(*lengths: int, system: str | None = None) -> Conversation:
    made = Conversation(system)
    made.exchanges += [Exchange("m" * (n // 2), "a" * (n - n // 2)) for n in lengths]
    return made


def asked(conversation: Conversation, message: str, *, room: int = 20) -> int:
    return len(conversation.prompt(message, by_letters, ctx_size=100, room=room))


def test_nothing_is_dropped_while_there_is_room() -> None:
    conversation = said(30, 40)
    assert asked(conversation, "x" * 10) == 80
    assert conversation.dropped == 0


def test_the_oldest_go_until_half_of_the_context_is_free() -> None:
    conversation = said(30, 20, 20, system="s" * 10)
    assert asked(conversation, "x" * 10) == 10 + 20 + 10
    assert conversation.dropped == 2
    assert len(conversation.exchanges) == 3
    assert conversation.messages("x", 2)[0] == ("system", "s" * 10)
    # they stay dropped, and room is left for some messages more
    assert asked(conversation, "x" * 20) == 50
    assert conversation.dropped == 2


def test_a_message_that_fits_only_alone_gets_the_context_to_itself() -> None:
    conversation = said(30, 20)
    assert asked(conversation, "x" * 95) == 95
    assert conversation.dropped == 2


def test_a_message_that_does_not_fit_changes_nothing() -> None:
    conversation = said(30, 20)
    with pytest.raises(UsageError, match="a prompt of 100 tokens, the context holds 100"):
        asked(conversation, "x" * 100)
    assert conversation.dropped == 0
    assert asked(conversation, "x") == 51


def test_dropping_and_taking_back() -> None:
    conversation = said(60, 30)
    asked(conversation, "x" * 20)
    assert conversation.dropped == 1
    assert conversation.pop() == Exchange("m" * 15, "a" * 15)
    conversation.pop()
    assert conversation.pop() is None
    assert conversation.dropped == 0


def test_saved_messages_come_back() -> None:
    conversation = said(4, system="be brief\n")
    conversation.exchanges.append(Exchange("<|im_end|> é", "", cut="interrupted"))
    conversation.dropped = 1
    data = b"".join(dump_json(record) + b"\n" for record in conversation.to_records())
    assert data.count(b"\n") == 5
    back = Conversation.of_lines(data, file=Path("f"))
    assert (back.system, back.exchanges) == (conversation.system, conversation.exchanges)
    assert back.dropped == 0


USER, ANSWER = '{"role":"user","content":"a"}', '{"role":"assistant","content":"b"}'
SYSTEM = '{"role":"system","content":"s"}'


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "does not end with an answer"),
        ([SYSTEM], "does not end with an answer"),
        ([USER], "does not end with an answer"),
        ([USER, ANSWER, USER], "does not end with an answer"),
        ([ANSWER], "line 1: not a message of the user"),
        ([USER, USER], "line 2: not a message of the assistant"),
        ([USER, SYSTEM, ANSWER], "line 2: not a message of the assistant"),
        ([USER, ANSWER, SYSTEM], "line 3: not a message of the user"),
        ([USER, "{"], "line 2: not valid JSON"),
        ([USER, "[]"], "line 2: the top level must be an object"),
        ([USER, '{"role":"assistant"}'], "line 2: key 'content' is missing"),
        ([USER, '{"role":"assistant","content":1}'], "line 2: content must be of type str"),
        ([USER, ANSWER[:-1] + ',"cut":"off"}'], "line 2: not a message"),
        (["\x00"], "line 1: not valid JSON"),
    ],
)
def test_files_that_are_no_conversation(lines: list[str], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        Conversation.of_lines("\n".join(lines).encode(), file=Path("f"))


# -- with an engine --------------------------------------------------------------------------------


def render(template: str, messages: list[dict[str, str]], **_: str) -> str:
    """What m2c.chat.render does in a child process, for a fixed format, a thousand times faster."""
    if template == REFUSES and messages[0]["role"] == "system":
        raise BadInput("no system")
    return "".join(f"<|{m['role']}|>{m['content']}" for m in messages) + "<|answer|>"


@pytest.fixture(autouse=True)
def fast_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2c.prompt.render", render)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    shape = {"num_hidden_layers": 4, "hidden_size": 120, "intermediate_size": 700}
    folder = tmp_path_factory.mktemp("spoken")
    return pack_folder(write_checkpoint(folder / "checkpoint", shape), folder / "bundle.m2c")


WAYS = ("0/0/100", "100/0/0", "streamed", "exact", "exact streamed", "looked up")


def options_of(way: str, bundle: Bundle) -> RunOptions:
    plain = options_for(MIXES["0/0/100"], ctx_size=256)
    if way in MIXES:
        return replace(plain, mix=MIXES[way])
    if way == "streamed":
        return replace(plain, dram=smallest_dram(bundle, plain))
    if way == "looked up":
        return exact_options(plain, "int4")
    exact = exact_options(plain)
    return exact if way == "exact" else replace(exact, dram=smallest_dram(bundle, exact))


@pytest.fixture(scope="module", params=WAYS)
def engines(request: pytest.FixtureRequest, spoken: Bundle) -> Iterator[tuple[Engine, Engine]]:
    """Two of the same: one for a conversation, one that knows nothing of it."""
    chosen = options_of(request.param, spoken)
    with Engine(spoken, chosen) as one, Engine(spoken, chosen) as other:
        assert bool(one.plan.streamed) == ("streamed" in request.param)
        assert one.speculates == (request.param in WAYS[3:])
        yield one, other


def dialogue_of(engine: Engine, params: SamplingParams = GREEDY, **changes: Any) -> Dialogue:
    engine.stop_when(lambda: False)
    return Dialogue(engine, "", params, **{"max_tokens": 12, **changes})


def ask(dialogue: Dialogue, message: str) -> list[int]:
    """Ids of the answer."""
    ids = dialogue.prompt(message)
    return [id for piece in dialogue.answer(message, ids) for id in piece.ids]


def afresh(engine: Engine, dialogue: Dialogue, message: str) -> list[int]:
    """Ids of the answer that an engine gives that has seen nothing, told the same messages."""
    other = dialogue_of(engine, replace(dialogue.sampler.params, seed=dialogue.sampler.seed))
    other.conversation.system = dialogue.conversation.system
    other.conversation.exchanges += dialogue.conversation.exchanges
    other.conversation.dropped = dialogue.conversation.dropped
    found = ask(other, message)
    assert other.figures[-1].cached_tokens == 0
    return found


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_conversation_says_what_a_fresh_process_says(
    engines: tuple[Engine, Engine], params: SamplingParams
) -> None:
    engine, other = engines
    dialogue = dialogue_of(engine, params, system="be brief")
    for message in ("he said", "go on", "and", "he said"):
        expected = afresh(other, dialogue, message)
        assert ask(dialogue, message) == expected
    assert len(dialogue.conversation.exchanges) == 4


def test_only_what_is_new_is_computed(engines: tuple[Engine, Engine]) -> None:
    engine, _ = engines
    dialogue = dialogue_of(engine)
    batches: list[int] = []
    forward = engine.model.forward

    def counted(ids: Any, **rest: Any) -> Any:
        batches.append(len(ids))
        return forward(ids, **rest)

    engine.model.forward = counted  # type: ignore[method-assign]
    try:
        before = 0
        for message in ("a first message of some length", "b", "c"):
            ids = dialogue.prompt(message)
            batches.clear()
            list(dialogue.answer(message, ids))
            figures = dialogue.figures[-1]
            assert batches[0] == len(ids) - figures.cached_tokens
            # the answer, encoded again, may differ from the ids that it came as
            assert figures.cached_tokens >= before - 8
            before = len(ids)
    finally:
        engine.model.forward = forward  # type: ignore[method-assign]
    assert together(dialogue.figures).cached_tokens > 0


def stop_after(engine: Engine, layers: int) -> None:
    count = itertools.count()
    engine.stop_when(lambda: next(count) >= layers)


def holds(engine: Engine) -> list[bytes]:
    """The bytes of all keys and values in the cache."""
    kv = engine.model.kv
    return [
        part[:, : kv.length].contiguous().numpy().tobytes()
        for layer in range(engine.config.num_hidden_layers)
        for part in kv.of_layer(layer)
    ]


def holding(engine: Engine, ids: list[int]) -> list[bytes]:
    """What a cache holds into which the exact model alone has put `ids`."""
    engine.model.kv.truncate(0)
    prefill(engine.model, ids)
    return holds(engine)


def test_an_interruption_anywhere_leaves_what_is_certain(engines: tuple[Engine, Engine]) -> None:
    """After any layer of the prompt, of a draft or of a pass."""
    engine, other = engines
    expected: dict[str, list[int]] = {}
    cuts = set()
    whole = ask(dialogue_of(other, max_tokens=24), "he said")
    for layers in (*range(12), *range(13, 80, 9)):
        dialogue = dialogue_of(engine, max_tokens=24)
        stop_after(engine, layers)
        part = ask(dialogue, "he said")
        assert part == whole[: len(part)]
        engine.stop_when(lambda: False)
        known = [*dialogue_of(engine).prompt("he said"), *part]
        assert holds(engine) == holding(other, known[: engine.model.kv.length]), layers
        kept = dialogue.conversation.exchanges
        assert bool(kept) == bool(dialogue.figures and kept)
        cuts.add(kept[0].cut if kept else "")
        dialogue.max_tokens = 12
        key = kept[0].answer if kept else ""
        if key not in expected:
            expected[key] = afresh(other, dialogue, "go on")
        assert ask(dialogue, "go on") == expected[key], layers
    assert {"", "interrupted"} <= cuts


def test_a_reader_that_leaves_in_the_middle(engines: tuple[Engine, Engine]) -> None:
    engine, other = engines
    for count in (1, 2, 5, 11):
        dialogue = dialogue_of(engine)
        pieces = dialogue.answer("he said", dialogue.prompt("he said"))
        for _ in range(count):
            next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        assert dialogue.conversation.exchanges == []
        assert ask(dialogue, "he said") == afresh(other, dialogue_of(other), "he said")


def test_a_full_context_drops_the_oldest_and_goes_on(engines: tuple[Engine, Engine]) -> None:
    engine, other = engines
    dialogue = dialogue_of(engine, system="be brief", max_tokens=20)
    dropped = []
    for n in range(8):
        message = f"message {n} of some length"
        ids = dialogue.prompt(message)
        assert len(ids) + 20 <= 256
        answer = [id for piece in dialogue.answer(message, ids) for id in piece.ids]
        dropped.append(dialogue.conversation.dropped)
        last = dialogue.conversation.pop()
        check = afresh(other, dialogue, message)
        assert answer[:12] == check[:12]
        assert last is not None
        dialogue.conversation.exchanges.append(last)
    assert dropped[0] == 0
    # not at every message: dropping moves what the KV cache holds
    assert 1 < len(set(dropped)) <= 5
    assert dialogue.conversation.system == "be brief"


def test_undo_and_another_seed(engines: tuple[Engine, Engine]) -> None:
    engine, other = engines
    dialogue = dialogue_of(engine, WARM)
    ask(dialogue, "he said")
    first = ask(dialogue, "go on")
    dialogue.conversation.pop()
    dialogue.set_sampling(seed=6)
    again = ask(dialogue, "go on")
    assert again != first
    dialogue.conversation.pop()
    assert again == afresh(other, dialogue, "go on")
    dialogue.set_sampling(seed=5)
    assert ask(dialogue, "go on") == first


def test_a_system_message_that_the_format_refuses_is_not_set(
    engines: tuple[Engine, Engine],
) -> None:
    engine, _ = engines
    dialogue = Dialogue(engine, REFUSES, GREEDY, max_tokens=2)
    with pytest.raises(BadInput, match="no system"):
        dialogue.set_system("be brief")
    assert dialogue.conversation.system is None
    dialogue.set_system(None)


def test_settings_out_of_range_change_nothing(engines: tuple[Engine, Engine]) -> None:
    dialogue = dialogue_of(engines[0])
    seed = dialogue.sampler.seed
    with pytest.raises(UsageError, match="--top-p is 2"):
        dialogue.set_sampling(top_p=2.0)
    dialogue.set_sampling(temperature=0.5)
    assert (dialogue.sampler.params.temperature, dialogue.sampler.params.top_p) == (0.5, 1.0)
    assert dialogue.sampler.seed == seed
