"""How a problem becomes the text that the policy sees."""

import reprlib
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_lambdapo.data.presets import is_chat

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class PromptTemplate:
    """System prompt, wording of the user's turn, and whether the tokenizer's chat template is used.

    Attributes:
        system: system prompt. None for none.
        user: the user's turn. ``{prompt}`` in it is replaced literally by the problem, which may contain braces.
        chat: use the tokenizer's chat template. None uses it where there is one.
        chat_kwargs: further arguments of the chat template, such as ``enable_thinking``.
    """

    system: str | None = None
    user: str = "{prompt}"
    chat: bool | None = None
    chat_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "{prompt}" not in self.user:
            raise ValueError(f"`template.user` must contain {{prompt}}, got {self.user!r}.")

    def render(self, tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> str:
        """The prompt's text, ready for the tokenizer.

        Where the last message is the assistant's, its text is continued, with a chat template and without one, unless
        ``chat_kwargs`` has ``add_generation_prompt`` or ``continue_final_message``.

        Args:
            tokenizer: the policy's.
            prompt: a problem, which is put into ``user``, or whole chat messages, which are used as they are.

        Raises:
            ValueError: a prompt that is neither, messages that the chat template refuses, or ``chat=True`` with a
                tokenizer that has no chat template.
        """
        messages = self._messages(prompt)
        if self.uses_chat(tokenizer):
            options: dict[str, Any] = {"add_generation_prompt": True}
            if len(messages) > 1 and messages[-1].get("role") == "assistant":
                if messages[-1]["content"].strip():
                    options = {"continue_final_message": True}
                else:
                    messages = messages[:-1]
            if self.chat_kwargs.keys() & {"add_generation_prompt", "continue_final_message"}:
                options = {}
            try:
                return str(tokenizer.apply_chat_template(messages, tokenize=False, **options, **self.chat_kwargs))
            except (TemplateError, ValueError) as error:
                raise ValueError(f"The tokenizer's chat template refuses {reprlib.repr(messages)}: {error}") from error
        return "\n\n".join(message["content"] for message in messages)

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Token ids of a rendered prompt.

        A chat template writes its own special tokens, so none are added to its text. Text that was rendered beforehand,
        and begins with the beginning-of-sequence token, gets no second one. An end-of-sequence token that the tokenizer
        appends is removed, because the completion continues from here.
        """
        ids: list[int] = tokenizer(text, add_special_tokens=not self.uses_chat(tokenizer))["input_ids"]
        bos = tokenizer.bos_token
        if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token) else ids

    def uses_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the chat template is used with this tokenizer."""
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if self.chat and not has_template:
            raise ValueError(
                "`template.chat` is true and the tokenizer has no chat template. Set it to null for a plain prompt, or "
                "choose an instruction-tuned model."
            )
        return has_template if self.chat is None else self.chat

    def _messages(self, prompt: str | Messages) -> Messages:
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise ValueError(f"A prompt must be a text or a list of chat messages, got {reprlib.repr(prompt)}.")
        turns = (
            [{"role": "user", "content": self.user.replace("{prompt}", prompt)}] if isinstance(prompt, str) else prompt
        )
        if self.system is None or turns[0].get("role") == "system":
            return turns
        return [{"role": "system", "content": self.system}, *turns]
