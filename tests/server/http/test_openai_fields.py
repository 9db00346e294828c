"""Every field of the ``openai`` package's types has a row in the table, at every level."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from openai.types import completion_create_params, file_create_params, file_list_params
from openai.types import fine_tuning as jobs
from openai.types.chat import (
    ChatCompletionContentPartParam,
    ChatCompletionContentPartRefusalParam,
    ChatCompletionMessage,
    ChatCompletionMessageParam,
    ChatCompletionStreamOptionsParam,
    ParsedChatCompletionMessage,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.fine_tuning import job_create_params, job_list_events_params, job_list_params
from openai.types.fine_tuning.jobs import checkpoint_list_params
from typing_extensions import is_typeddict

from server.http import fields, files, fine_tuning
from server.http.fields import Rules

LEVELS: list[tuple[Rules, tuple[Any, ...]]] = [
    (fields.CHAT, get_args(chat_create_params.CompletionCreateParams)),
    (fields.COMPLETION, get_args(completion_create_params.CompletionCreateParams)),
    (fields.STREAM_OPTIONS, (ChatCompletionStreamOptionsParam,)),
    (
        fields.MESSAGE,
        (*get_args(ChatCompletionMessageParam), ChatCompletionMessage, ParsedChatCompletionMessage),
    ),
    (fields.PART, (*get_args(ChatCompletionContentPartParam), ChatCompletionContentPartRefusalParam)),
    (fields.FILE, (file_create_params.FileCreateParams,)),
    (fields.JOB, (job_create_params.JobCreateParams,)),
    (fields.METHOD, (job_create_params.Method,)),
    (fields.SUPERVISED, (jobs.SupervisedMethodParam,)),
    (fields.HYPERPARAMETERS, (jobs.SupervisedHyperparametersParam, job_create_params.Hyperparameters)),
]
WALKED = {each for _, types in LEVELS for each in types}
each_type = pytest.mark.parametrize(
    ("rules", "kind"),
    [(rules, each) for rules, types in LEVELS for each in types],
    ids=lambda value: getattr(value, "__name__", ""),
)


def fields_of(kind: Any) -> dict[str, Any]:
    """The fields of a type, with their annotations."""
    if is_typeddict(kind):
        return get_type_hints(kind)
    return {name: field.annotation for name, field in kind.model_fields.items()}


def objects_in(annotation: Any) -> Iterator[Any]:
    """The objects (TypedDicts) that a value of this type may hold."""
    if is_typeddict(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from objects_in(part)


@each_type
def test_every_field_has_a_row(rules: Rules, kind: Any) -> None:
    names = set(fields_of(kind))
    assert names
    assert names <= set(rules)


@each_type
def test_every_object_in_a_served_field_is_walked_too(rules: Rules, kind: Any) -> None:
    for name, annotation in fields_of(kind).items():
        if rules[name].kind == "served":
            assert set(objects_in(annotation)) <= WALKED, name


def test_the_walk_finds_objects_inside_lists_and_unions() -> None:
    messages = get_type_hints(chat_create_params.CompletionCreateParamsNonStreaming)["messages"]
    assert set(objects_in(messages)) == set(get_args(ChatCompletionMessageParam))
    assert set(objects_in(typing.Optional[ChatCompletionStreamOptionsParam])) <= WALKED  # noqa: UP045


@pytest.mark.parametrize(
    ("query", "kind", "elsewhere"),
    [
        (files.LIST, file_list_params.FileListParams, set()),
        (fine_tuning.PAGE, job_list_params.JobListParams, {"metadata"}),
        (fine_tuning.EVENTS, job_list_events_params.JobListEventsParams, set()),
        (fine_tuning.CHECKPOINT_PAGE, checkpoint_list_params.CheckpointListParams, set()),
    ],
)
def test_every_query_parameter_is_served(query: dict[str, Any], kind: Any, elsewhere: set[str]) -> None:
    assert set(fields_of(kind)) - elsewhere <= set(query)
