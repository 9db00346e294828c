"""An adapter's chat format: its chat template and end-of-answer tokens, if they differ from the base's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterUnsupported
from adapters.text.renderer import ChatRenderer
from adapters.text.sandbox import MAX_CPU_SECONDS, SandboxedTemplate, TemplateSandbox, TemplateTooSlow
from adapters.text.special import SpecialTokens
from adapters.text.template import ChatTemplate, TemplateRefused

if TYPE_CHECKING:
    from adapters.artifact.chat_config import ChatConfig

_PROBE = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model's conversations are rendered, and which tokens end its answers.

    Attributes:
        renderer: None = there is no chat template.
        from_adapter: whether the template comes from an adapter.
    """

    renderer: ChatRenderer | None
    eos: frozenset[int]
    from_adapter: bool = False


@dataclass(eq=False)
class ChatFormats:
    """The chat formats of the base and of adapters. Thread-safe.

    Attributes:
        fast: the base's transformers tokenizer.
        vocab_size: the size of the model's logits.
        base: the base's chat format.
        generation_eos: the end tokens in the base's generation config.
        sandbox: renders adapters' templates.
    """

    fast: Any
    vocab_size: int
    base: ChatFormat
    generation_eos: frozenset[int]
    allow_special_tokens: bool = False
    sandbox: TemplateSandbox = field(default_factory=TemplateSandbox)

    def of(self, config: ChatConfig | None) -> ChatFormat:
        """The chat format for an adapter's settings.

        Raises AdapterUnsupported if the base cannot use them.
        """
        return self.base if config is None else self._of(config)

    def check(self, config: ChatConfig | None, seconds: float = MAX_CPU_SECONDS) -> None:
        """Render a greeting with the template.

        Raises:
            AdapterUnsupported: the base cannot use it, or the template renders nothing.
            TemplateTooSlow: it took more than ``seconds``, which is less than its usual limit.
        """
        chat_format = self.of(config)
        if not chat_format.from_adapter or chat_format.renderer is None:
            return
        try:
            text = self.sandbox.render(chat_format.renderer.template, _PROBE, True, seconds)
        except TemplateRefused as error:
            if isinstance(error, TemplateTooSlow) and seconds < MAX_CPU_SECONDS:
                raise
            raise _unusable(str(error)) from error
        if not text:
            raise _unusable("it renders nothing")

    def close(self) -> None:
        """Stop the sandbox's processes."""
        self.sandbox.close()

    @lru_cache(maxsize=1024)  # noqa: B019  (lives as long as the server)
    def _of(self, config: ChatConfig) -> ChatFormat:
        eos = self._eos(config)
        template = self._template(config)
        if template is None:
            if self.base.renderer is not None:
                self._check_vocabulary(config, self.base.renderer.template.source)
            return ChatFormat(self.base.renderer, eos)
        self._check_vocabulary(config, template.source)
        renderer = ChatRenderer(self._special, template, self.allow_special_tokens)
        return ChatFormat(renderer, eos, from_adapter=True)

    @property
    def _special(self) -> SpecialTokens:
        return self.base.renderer.special if self.base.renderer else SpecialTokens(self.fast)

    def _template(self, config: ChatConfig) -> ChatTemplate | None:
        """None if it is the base's."""
        if config.template is None:
            return None
        variables = dict(self.fast.special_tokens_map) | dict(config.tokens)
        base = self.base.renderer.template if self.base.renderer else None
        if base is not None and (base.source, dict(base.variables)) == (config.template, variables):
            return None
        return SandboxedTemplate(config.template, variables, self.sandbox)

    def _eos(self, config: ChatConfig) -> frozenset[int]:
        ids = set(config.eos_ids) or set(self.generation_eos)
        wrong = next((id_ for id_ in sorted(ids) if not 0 <= id_ < self.vocab_size), None)
        if wrong is not None:
            raise AdapterUnsupported(
                f"Its generation_config.json ends answers with token {wrong}, but the base's vocabulary has "
                f"{self.vocab_size} tokens; it was trained with another tokenizer."
            )
        text = dict(config.tokens).get("eos_token")
        ids |= {self.fast.eos_token_id} if text is None else {self._id_of(text, "eos_token")}
        return frozenset(ids - {None})

    def _id_of(self, text: str, name: str) -> int:
        id_: int | None = self.fast.backend_tokenizer.token_to_id(text)
        if id_ is None:
            raise AdapterUnsupported(
                f"Its {name} is {text!r:.80}, which is not a token of the base; it was trained with "
                "another tokenizer. Serve with --ignore-adapter-templates to use the base's own."
            )
        return id_

    def _check_vocabulary(self, config: ChatConfig, source: str) -> None:
        """Check that the template's special tokens have the ids that the adapter was trained with."""
        for id_, text in _written(config.added, source):
            if self.fast.backend_tokenizer.token_to_id(text) != id_:
                raise AdapterUnsupported(
                    f"Its chat template writes {text!r:.80}, which is token {id_} of its tokenizer but not "
                    "of the base's; it was trained with another vocabulary."
                )


def _unusable(reason: str) -> AdapterUnsupported:
    return AdapterUnsupported(
        f"Its own chat template cannot be used: {reason.rstrip('.')}. Repair it, or serve with "
        "--ignore-adapter-templates."
    )


def _written(added: Iterable[tuple[int, str]], source: str) -> Iterable[tuple[int, str]]:
    return ((id_, text) for id_, text in added if text and not text.isspace() and text in source)
