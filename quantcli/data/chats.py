"""Chats as the text that a model reads: by the chat template of its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcli.data.records import plain_chat
from quantcli.errors import InputError


class ChatWriter:
    """Writes chats for one tokenizer. ``warnings`` says what was done where it has no chat template.

    With ``windows`` texts are tokenized as they are; else the tokenizer adds its special tokens itself, and what it
    adds in front is taken from the template's text.
    """

    def __init__(self, tokenizer: Any, folder: Path, *, windows: bool) -> None:
        self._tokenizer, self._folder, self._windows = tokenizer, folder, windows
        self.warnings: list[str] = []

    def text(self, turns: list[dict[str, str]]) -> str:
        """One chat. Raises ValueError where the template refuses it."""
        if not getattr(self._tokenizer, "chat_template", None):
            warning = f"The tokenizer of {self._folder} has no chat template: chats are read turn after turn, plainly."
            if warning not in self.warnings:
                self.warnings.append(warning)
            return plain_chat(turns)
        try:
            text = self._applied(turns)
        except ValueError:
            # Some templates know no system's turn: what it says then stands before the first question.
            if turns[0]["role"] != "system" or len(turns) < 2:
                raise
            (system, first), rest = turns[:2], turns[2:]
            text = self._applied([first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest])
        start = self._tokenizer.bos_token
        if self._windows or not start or not text.startswith(start):
            return text
        adds_start = self._tokenizer("")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        return text.removeprefix(start) if adds_start else text

    def _applied(self, turns: list[dict[str, str]]) -> str:
        try:
            from jinja2.exceptions import TemplateError
        except ImportError as error:
            raise InputError(
                f"The chat template of {self._folder} needs jinja2: {error}", "pip install jinja2"
            ) from error
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        except (TemplateError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(str(error) or type(error).__name__) from error
