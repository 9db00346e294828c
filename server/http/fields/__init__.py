"""The one table of fields: what the server does with each field of each body, at each level of it.

It has all fields of OpenAI's API, vLLM's additions, and fields that clients of other servers send. A test
walks the types of the ``openai`` package, and fails until each field there has a row. ``docs/api.md`` has the
table too; ``python -m tests.api_docs`` writes it.

A null counts as absent. Any other value of a field without a row is refused by name. Inside a message, an
empty value is dropped.
"""

from collections.abc import Mapping

from server.http.fields.messages import MESSAGE, PART
from server.http.fields.others import FILE, HYPERPARAMETERS, JOB, LOAD, METHOD, SUPERVISED, UNLOAD
from server.http.fields.requests import CHAT, COMPLETION, STREAM_OPTIONS
from server.http.fields.rule import Rule, Rules

LEVELS: Mapping[str, Rules] = {
    "Chat completions": CHAT,
    "Completions": COMPLETION,
    "stream_options": STREAM_OPTIONS,
    "Messages": MESSAGE,
    "Parts of a message": PART,
    "Load an adapter": LOAD,
    "Unload an adapter": UNLOAD,
    "Upload a file": FILE,
    "Create a fine-tuning job": JOB,
    "method": METHOD,
    "method.supervised": SUPERVISED,
    "hyperparameters": HYPERPARAMETERS,
}
"""Every level of every body, by its heading in ``docs/api.md``."""

__all__ = [
    "CHAT",
    "COMPLETION",
    "FILE",
    "HYPERPARAMETERS",
    "JOB",
    "LEVELS",
    "LOAD",
    "MESSAGE",
    "METHOD",
    "PART",
    "STREAM_OPTIONS",
    "SUPERVISED",
    "UNLOAD",
    "Rule",
    "Rules",
]
