"""From a conversation to the generation of its answer: the same for every endpoint that takes one."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import ValidationError

from evospec.server.errors import body_error
from evospec.server.generation import Generation
from evospec.server.params import (
    TokenizedPrompt,
    check_prompts,
    check_request,
    default_max_tokens,
    encode_messages,
    encode_prediction,
    fit_max_tokens,
    to_sampling_params,
)
from evospec.server.schemas.chat import ChatCompletionRequest
from evospec.server.schemas.fields import CommonFields
from evospec.server.serving import Serving
from evospec.server.tenants import Tenant
from evospec.server.tools.structural_tag import chat_grammar, check_tools
from evospec.server.work_shares import RequestWork


def chat_request(common: CommonFields, **fields: Any) -> ChatCompletionRequest:
    """The chat request that a request of another API amounts to; None stands for fields left out.

    Raises ``ApiError``: 400 where it amounts to none.
    """
    values = common.model_dump(include=set(CommonFields.model_fields), exclude_unset=True)
    values |= {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatCompletionRequest.model_validate(values)
    except ValidationError as error:
        raise body_error(error, values) from None


def encode_chat(body: ChatCompletionRequest, serving: Serving) -> TokenizedPrompt:
    """The prompt of a chat request; raises ``ApiError`` 400 for one that the model's template cannot show it."""
    check_tools(body, serving.chat_format)
    info, variables = serving.engine_info, body.template_variables()
    return encode_messages(serving.tokenizer, body.messages, info, variables, body.usable_tools)


async def begin_chat(
    body: ChatCompletionRequest, session_header: str | None, tenant: Tenant, work: RequestWork, serving: Serving
) -> tuple[Generation, bool]:
    """The generation of an answer, not yet started, and whether the prompt has begun the model's thoughts.

    Raises ``ApiError``: 400 or 404 for what cannot be answered.
    """
    session_id = check_request(body, session_header, tenant, serving)
    info, n = serving.engine_info, body.n or 1
    prompts = [await work.run(encode_chat, body, serving)]
    check_prompts(prompts, "messages", info)
    prediction = await work.run(encode_prediction, serving.tokenizer, body.prediction, info)
    max_tokens = fit_max_tokens(body, default_max_tokens(prompts, n, info, tenant), prompts, serving)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = await work.run(to_sampling_params, body, max_tokens, serving, logprobs)
    is_thinking = serving.chat_format.is_thinking(prompts[0].text or "")
    grammar = await work.run(chat_grammar, body, sampling.grammar, serving.chat_format, is_thinking)
    sampling = msgspec.structs.replace(sampling, grammar=grammar)
    generation = Generation(serving, tenant, prompts, sampling, n, session_id=session_id, prediction=prediction)
    return generation, is_thinking
