"""From validated request fields to token ids and ``SamplingParams``: the checks that need the model."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from evospec.engine.messages import EngineReady, SamplingParams
from evospec.engine.text.chat_template import ChatTemplateError
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.errors import ApiError, bad_request
from evospec.server.schemas.chat import Message, Prediction, text_of
from evospec.server.schemas.constraints import to_grammar
from evospec.server.schemas.fields import SamplingFields
from evospec.server.schemas.tools import Tool
from evospec.server.serving import Serving
from evospec.server.session_ids import MAX_NAME_CHARS, find_session_id, user_session_id
from evospec.server.session_store import no_such_session
from evospec.server.tenants import Tenant

_DEFAULT_PART = 4
"""Outputs whose length the client does not say have together one part in so many of a tenant's tokens a minute."""

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt; ``text`` is None where the client sent token ids, ``echo`` is what is put in front of its answers."""

    token_ids: list[int]
    text: str | None = None
    echo: str = ""


def find_session(sent: str, tenant: str) -> str:
    """The id of the session that ``tenant`` means by ``sent``; whether there is still such a session, Redis knows.

    400 for a name that is too long; 404 for an id that was made for somebody else.
    """
    if len(sent) > MAX_NAME_CHARS:
        raise bad_request(f"A session's name has at most {MAX_NAME_CHARS} characters.", "session_id")
    session_id = find_session_id(tenant, sent)
    if session_id is None:
        raise no_such_session(sent)
    return session_id


def check_request(body: SamplingFields, session_header: str | None, tenant: Tenant, serving: Serving) -> str | None:
    """The id of the session that a request is part of, None for none.

    400 for options of a stream where none is asked for; 404 for another model than the served one; and what
    ``find_session`` refuses.
    """
    check_model(body.model, serving.model)
    session_id, in_metadata = None, (body.metadata or {}).get("session_id")
    if named := body.session_id or session_header or (in_metadata if isinstance(in_metadata, str) else None):
        session_id = find_session(named, tenant.name)
    elif body.user and serving.sessions.config.from_user:
        session_id = user_session_id(tenant.name, body.user)
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true.", "stream_options")
    return session_id


def check_model(requested: str, served: str) -> None:
    """404 unless the client asked for the model that is served."""
    if requested != served:
        raise ApiError(
            404, f"The model {requested!r} does not exist. This server has {served!r}.", param="model",
            code="model_not_found",
        )  # fmt: skip


def encode_text(
    tokenizer: Tokenizer, text: str, field: str, info: EngineReady, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text; 400 if it is too long to be worth tokenising."""
    check_length(text, field, tokenizer, info)
    return tokenizer.encode(text, add_special_tokens)


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    info: EngineReady,
    variables: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] = (),
) -> TokenizedPrompt:
    """A conversation, ready for the assistant's answer; ``text`` is what the template makes of it.

    Some templates take the arguments of past calls only as objects. 400 as for ``encode_text``, and where the template
    cannot render the messages in either way.
    """

    def render(as_objects: bool) -> str:
        given = [message.for_template(as_objects) for message in messages]
        shown = [tool.for_template() for tool in tools] or None
        return tokenizer.apply_chat_template(given, tools=shown, variables=variables)

    calls = [call for message in messages for call in message.tool_calls or ()]
    try:
        try:
            text = render(as_objects=False)
        except ChatTemplateError:
            if not any(isinstance(call.function.arguments, str) for call in calls):
                raise
            text = render(as_objects=True)
    except ChatTemplateError as error:
        raise bad_request(str(error), "messages") from error
    # The template has written the special tokens out.
    return TokenizedPrompt(encode_text(tokenizer, text, "messages", info, add_special_tokens=False), text)


def encode_prediction(tokenizer: Tokenizer, prediction: Prediction | None, info: EngineReady) -> list[int]:
    """Token ids of what the client takes the answer to be, empty for none; 400 as for ``encode_text``."""
    if prediction is None:
        return []
    return encode_text(tokenizer, text_of(prediction.content), "prediction", info, add_special_tokens=False)


def tokenize_prompts(
    tokenizer: Tokenizer,
    prompt: str | list[int] | list[str] | list[list[int]],
    info: EngineReady,
    suffix: str | None = None,
    field: str = "prompt",
) -> list[TokenizedPrompt]:
    """All four forms of a prompt as a list, each with a gap before ``suffix``, if there is one.

    400, which names the prompt's ``field``, for a text that is too long to be worth tokenising, for a suffix where
    there can be none, and as for ``check_prompts``.
    """
    items: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    for item in items:
        if isinstance(item, str):
            check_length(item, field, tokenizer, info)
    if suffix:
        check_length(suffix, "suffix", tokenizer, info)
        # One text at a time: all prompts with the suffix together may be far more than the request.
        prompts = [TokenizedPrompt(tokenizer.encode(_with_gap(tokenizer, item, suffix))) for item in items]
    else:
        prompts = [
            TokenizedPrompt(tokenizer.encode(item), item) if isinstance(item, str) else TokenizedPrompt(item)
            for item in items
        ]
    check_prompts(prompts, field, info)
    return prompts


def _with_gap(tokenizer: Tokenizer, before: Any, after: str) -> str:
    if not isinstance(before, str):
        raise bad_request("A suffix needs a prompt that is text.", "suffix")
    prompt = tokenizer.fill_in_prompt(before, after)
    if prompt is None:
        raise bad_request("This model has no tokens for a suffix: it has not learned to fill gaps.", "suffix")
    return prompt


def check_length(text: str, field: str, tokenizer: Tokenizer, info: EngineReady) -> None:
    """400 for a text that cannot fit: to find all of its tokens would take seconds for megabytes."""
    least = tokenizer.least_tokens(text)
    if least > info.max_model_len:
        raise bad_request(
            f"The text has {len(text)} characters, so {least} tokens at the very least. The model's context is "
            f"{info.max_model_len} tokens.",
            field,
            "context_length_exceeded",
        )


def check_prompts(prompts: Sequence[TokenizedPrompt], field: str, info: EngineReady) -> None:
    """400 for a prompt that is empty, leaves no room for output, or has ids beyond the vocabulary."""
    for prompt in prompts:
        length = len(prompt.token_ids)
        if length == 0:
            raise bad_request("The prompt is empty: at least one token is needed.", field)
        if length >= info.max_model_len:
            raise bad_request(
                f"The prompt has {length} tokens. The model's context is {info.max_model_len} tokens, "
                "prompt and output together.",
                field,
                "context_length_exceeded",
            )
        check_token_ids(prompt.token_ids, field, info.vocab_size)


def check_token_ids(token_ids: Sequence[int], field: str, vocab_size: int) -> None:
    """400 for ids beyond the vocabulary."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise bad_request(f"Token id {largest} is not in the vocabulary of {vocab_size} tokens.", field)


def default_max_tokens(prompts: Sequence[TokenizedPrompt], n: int, info: EngineReady, tenant: Tenant) -> int:
    """How long outputs may get if the client does not say: as long as nothing refuses the request for it.

    Bounded by the context, the KV cache, and the tenant's limit: all outputs together have a part of a full bucket, so
    that one which is not full pays for them as well, and no more than the prompts leave of it. At least 1: where not
    even that fits, the message of what refuses it says why.
    """
    rooms = [room_for_output(prompts, info)]
    if (full := tenant.tokens_per_minute) is not None:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        rooms.append(min(full // _DEFAULT_PART, full - prompt_tokens) // (len(prompts) * n))
    return max(1, min(rooms))


def room_for_output(prompts: Sequence[TokenizedPrompt], info: EngineReady) -> int:
    """How many tokens fit behind the longest prompt, by the context and by the KV cache."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    # The last token's keys and values are never needed.
    return min(info.max_model_len - longest, info.num_blocks * info.block_size - longest + 1)


def fit_max_tokens(body: SamplingFields, default: int, prompts: Sequence[TokenizedPrompt], serving: Serving) -> int:
    """The longest output that a request asks for, else ``default``, or as many tokens as there is room for.

    400 for more where the server is strict.
    """
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked: int | None = getattr(body, field)
    max_tokens, info = default if asked is None else asked, serving.engine_info
    room = room_for_output(prompts, info)
    if serving.strict and max_tokens > room:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        raise bad_request(
            f"The prompt has {longest} tokens and {field} is {max_tokens}, {longest + max_tokens} in all. "
            f"There is room for {longest + room} tokens (the model's context is {info.max_model_len}).",
            field,
            "context_length_exceeded",
        )
    return min(max_tokens, max(1, room))


def to_sampling_params(
    body: SamplingFields, max_tokens: int, serving: Serving, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """The engine's parameters for choice 0; the other choices differ in ``seed`` only.

    The engine always makes at least one token, so ``max_tokens`` 0 asks it for one.
    """
    defaults, vocab_size = serving.sampling_defaults, serving.engine_info.vocab_size
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(f"min_tokens ({min_tokens}) is more than max_tokens ({max_tokens}).", "min_tokens")
    check_token_ids(body.stop_token_ids or [], "stop_token_ids", vocab_size)
    return SamplingParams(
        max_tokens=max(1, max_tokens),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p) or 1.0,
        top_k=1 if body.top_p == 0 else max(0, _or(body.top_k, defaults.top_k)),  # top_p 0 keeps what is most likely
        min_p=_or(body.min_p, defaults.min_p),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos or False,
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=to_grammar(body),
        num_speculative_tokens=body.num_speculative_tokens,
    )


def _or(value: _Number | None, default: _Number) -> _Number:
    return default if value is None else value


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    result = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise bad_request(
                f"logit_bias: {key!r} is not a token id of the vocabulary of {vocab_size} tokens.", "logit_bias"
            )
        result[int(key)] = value
    return result
