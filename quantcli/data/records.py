"""Records of text data: which of their fields are text, and chats as one text.

Only fields whose names are known to hold text are read. Any other string may be an id, a path or a language.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantcli.errors import InputError

#: Turns of a chat, each with ``role`` and ``content``, as one text. Raises ValueError where they cannot be.
ChatText = Callable[[list[dict[str, str]]], str]

LABEL_KEYS = ("label", "labels")
#: Whole texts, those that come before a chat in the same record and those that come after.
_FIRST_KEYS = ("text",)
_TEXT_KEYS = ("sentence", "content", "document", "passage", "article")
_CHAT_KEYS = ("messages", "conversations", "conversation")
#: What is asked, and what is answered; an ``input`` goes with an ``instruction``.
_QUESTION_KEYS = ("prompt", "instruction", "question")
_ANSWER_KEYS = ("completion", "response", "chosen", "output", "answer")
_INPUT_KEY, _SYSTEM_KEYS = "input", ("system", "system_prompt")

KNOWN_KEYS = (
    *_FIRST_KEYS, *_CHAT_KEYS, *_TEXT_KEYS, *_QUESTION_KEYS, *_ANSWER_KEYS, _INPUT_KEY, *_SYSTEM_KEYS, *LABEL_KEYS,
)  # fmt: skip

_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
#: Speakers by other names, as chat templates call them.
_ROLES = {
    "human": "user", "prompter": "user", "instruction": "user",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "observation": "tool", "function": "tool", "developer": "system",
}  # fmt: skip

_HINT = (
    "Text is read from text, messages or conversations, prompt with completion or response or chosen, and "
    "instruction with output; rename the field that holds yours."
)


def plain_chat(turns: list[dict[str, str]]) -> str:
    """A chat without its roles: one turn after the other, a line apart."""
    return "\n".join(turn["content"] for turn in turns)


def text_of(record: Any, where: str, chat: ChatText = plain_chat) -> str:
    """The text of a record; empty where the fields that hold it are.

    Raises:
        InputError: none of its fields is known to hold text, or a chat is not made of turns.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise InputError(f"{where} is neither a text nor a record.")
    text = _first_text(record, _FIRST_KEYS)
    if text is not None:
        return text
    turns = _turns(record, where)
    if turns is not None:
        try:
            return chat(turns) if turns else ""
        except ValueError as error:
            raise InputError(f"{where} is a chat that the tokenizer's template does not take: {error}") from error
    text = _first_text(record, _TEXT_KEYS)
    if text is not None:
        return text
    known = {*_FIRST_KEYS, *_CHAT_KEYS, *_TEXT_KEYS, *_QUESTION_KEYS, *_ANSWER_KEYS} & record.keys()
    if known and all(record[key] is None for key in known):
        return ""
    raise unknown_fields(where, record)


def unknown_fields(where: str, names: Mapping[str, Any] | Sequence[str]) -> InputError:
    """None of the fields is known to hold text."""
    return InputError(f"{where} has no field that is known to hold text; it has {', '.join(names) or 'none'}.", _HINT)


def label_of(record: Any) -> int | None:
    """The class of a record; None where it has none, such as where it is a name."""
    label = next((record[key] for key in LABEL_KEYS if key in record), None) if isinstance(record, dict) else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _first_text(record: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these fields that is text; empty where all that are there are null."""
    texts = [record[key] for key in keys if isinstance(record.get(key), str)]
    return texts[0] if texts else None


def _turns(record: Mapping[str, Any], where: str) -> list[dict[str, str]] | None:
    """A chat's turns, under whichever key they are; None where there are none."""
    for key in _CHAT_KEYS:
        if record.get(key) is not None:
            return _parsed(record[key], f"{where}, field {key},", "user")
    asked = next((key for key in _QUESTION_KEYS if record.get(key) is not None), None)
    answered = next((key for key in _ANSWER_KEYS if record.get(key) is not None), None)
    if asked is None and answered != "chosen":
        return None
    system = _first_text(record, _SYSTEM_KEYS)
    turns = [{"role": "system", "content": system}] if system else []
    question = _parsed(record[asked], f"{where}, field {asked},", "user") if asked else []
    added = record.get(_INPUT_KEY)
    if question and isinstance(added, str) and added.strip():
        question[-1]["content"] += f"\n\n{added}"
    if answered is None:
        return turns + question
    answer = _parsed(record[answered], f"{where}, field {answered},", "assistant")
    # Preference data repeats the question in front of each answer.
    repeats = bool(answer) and answer[0]["role"] != "assistant"
    return answer if repeats else turns + question + answer


def _parsed(value: Any, where: str, speaker: str) -> list[dict[str, str]]:
    """Turns of a list of messages, or of a text that one speaker says."""
    if isinstance(value, str):
        return [{"role": speaker, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, Sequence):
        raise InputError(f"{where} is neither a text nor a list of turns.")
    return [_turn(message, where) for message in value]


def _turn(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InputError(f"{where} has a turn that is no record of a role and a content.")
    role = next((message[key] for key in _ROLE_KEYS if isinstance(message.get(key), str)), None)
    # A table has every field in every turn, null where there is none.
    key = next((key for key in _CONTENT_KEYS if message.get(key) is not None), None)
    key = key or next((key for key in _CONTENT_KEYS if key in message), None)
    if role is None or key is None:
        raise InputError(f"{where} has a turn with {', '.join(message) or 'nothing'}; it needs role and content.")
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": _content(message[key], where)}


def _content(value: Any, where: str) -> str:
    """What is said in a turn: a text, or parts of which only text is read; null where a tool is called."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Sequence):
        parts = [part if isinstance(part, str) else part.get("text") for part in value if isinstance(part, (str, dict))]
        return "".join(part for part in parts if isinstance(part, str))
    raise InputError(f"{where} has a turn whose content is neither a text nor parts of one.")
