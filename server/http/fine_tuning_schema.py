"""The body of ``POST /v1/fine_tuning/jobs``: OpenAI's fields, and ours (sent in ``extra_body``)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.errors import InvalidRequest
from server.finetune.jobs.store import JobRequest
from server.http import fields
from server.http.body import Body, Name

MAX_TAGS = 16
"""Most keys of a job's ``metadata``. The limit is OpenAI's."""


def _auto_as_none(value: object) -> object:
    return None if value == "auto" else value


HyperCount = Annotated[int, Field(ge=1, le=10_000)]
HyperFactor = Annotated[float, Field(ge=1e-3, le=1000)]
AutoOrCount = Annotated[
    HyperCount | None, BeforeValidator(_auto_as_none, Literal["auto"] | HyperCount | None)
]
AutoOrFactor = Annotated[
    HyperFactor | None, BeforeValidator(_auto_as_none, Literal["auto"] | HyperFactor | None)
]
Module = Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Modules = Annotated[
    list[Module],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value, Module | list[Module]),
]
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class Hyperparameters(Body):
    """OpenAI's three hyperparameters. ``"auto"`` becomes None: the training command chooses the value."""

    rules = fields.HYPERPARAMETERS

    n_epochs: AutoOrCount = None
    batch_size: AutoOrCount = None
    learning_rate_multiplier: AutoOrFactor = None

    def told(self) -> dict[str, Any]:
        """The fields as a job's object shows them: ``"auto"`` instead of None."""
        return {name: "auto" if value is None else value for name, value in self.model_dump().items()}


class Supervised(Body):
    """OpenAI's settings for supervised fine-tuning."""

    rules = fields.SUPERVISED

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Body):
    """OpenAI's ``method``. Only supervised fine-tuning is available."""

    rules = fields.METHOD

    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class Recipe(Body):
    """Our fields. ``manylora train --help`` explains each of them."""

    rules = fields.JOB

    adapter_method: Literal["lora", "rslora", "dora", "adalora"] | None = None
    r: Annotated[int, Field(ge=1, le=4096)] | None = None
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    dropout: Annotated[float, Field(ge=0, le=0.9)] | None = None
    target_modules: Annotated[Modules, Field(min_length=1, max_length=64)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    max_seq_len: Annotated[int, Field(ge=8, le=1 << 20)] | None = None
    max_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    packing: bool = False
    prune_rank: Annotated[float, Field(ge=0, le=100)] | None = None
    require_improvement: bool = False


class CreateJob(Recipe):
    """``POST /v1/fine_tuning/jobs``.

    ``name`` is our field too. The new adapter gets this name instead of ``ft:…``. A later job with the same
    name replaces the adapter.
    """

    longest: ClassVar = {"metadata": MAX_TAGS, "target_modules": 64}

    model: Name
    training_file: Name
    validation_file: Name | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] = ""
    name: Name | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    metadata: Annotated[dict[Key, Value], Field(max_length=MAX_TAGS)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fields_agree(self) -> CreateJob:
        if self.method is not None and self.hyperparameters is not None:
            raise InvalidRequest(
                "Send either 'method' or the older 'hyperparameters', not both.", "hyperparameters"
            )
        if self.name is not None and self.suffix:
            raise InvalidRequest("'name' sets the whole name; leave out 'suffix'.", "suffix")
        for field in ("prune_rank", "require_improvement"):
            if getattr(self, field) and self.validation_file is None:
                raise InvalidRequest(f"'{field}' needs a 'validation_file'; send one.", field)
        if self.learning_rate is not None and self._hyperparameters().learning_rate_multiplier is not None:
            raise InvalidRequest(
                "Send either 'learning_rate' or 'learning_rate_multiplier', not both.", "learning_rate"
            )
        return self

    def job_request(self) -> JobRequest:
        """The job that this body describes."""
        recipe = self.model_dump(include=set(Recipe.model_fields))
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            name=self.name,
            suffix=self.suffix,
            seed=self.seed,
            hyperparameters=self._hyperparameters().told(),
            recipe={name: value for name, value in recipe.items() if value},
            tags=dict(self.metadata),
        )

    def _hyperparameters(self) -> Hyperparameters:
        if self.method is not None:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()


def recipe_of(job_recipe: dict[str, Any]) -> dict[str, Any]:
    """Our fields as a job's object shows them; missing ones have their defaults."""
    return Recipe().model_dump() | job_recipe
