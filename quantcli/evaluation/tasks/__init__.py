"""What outputs are judged by: a task is one file, and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from quantcli.system.text import lookup
from quantcli.system.user_functions import is_function

if TYPE_CHECKING:
    from quantcli.evaluation.tasks.base import Task

TASKS = {
    "classification": "quantcli.evaluation.tasks.classification",
    "speech-recognition": "quantcli.evaluation.tasks.speech_recognition",
    "language-modeling": "quantcli.evaluation.tasks.language_modeling",
    "embedding": "quantcli.evaluation.tasks.embedding",
    "fidelity": "quantcli.evaluation.tasks.fidelity",
}


def task_of(name: str) -> Task:
    """The task of this name, or one that a function of the user's own scores. Raises UsageError for neither."""
    if name not in TASKS and is_function(name):
        from quantcli.evaluation.tasks.custom import CustomTask

        return CustomTask(name)
    return cast("Task", lookup({"auto": "", **TASKS}, "task", name))
