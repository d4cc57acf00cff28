"""The answer of /v1/responses: the whole response, or the events of its stream."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from evospec.server.answer import BlocksAnswer
from evospec.server.errors import ApiError
from evospec.server.generation import Generation
from evospec.server.responses.conversation import encode_stored
from evospec.server.responses.objects import (
    FailureDetail,
    FunctionCall,
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
    Status,
    ThoughtText,
)
from evospec.server.responses.request import Item, ResponsesRequest
from evospec.server.schemas.chat import ChatCompletionRequest
from evospec.server.serving import Serving
from evospec.server.sse import named_event
from evospec.server.tenants import Tenant
from evospec.server.tools.blocks import Block, Change

_PREFIXES = {"text": "msg", "call": "fc", "thoughts": "rs"}
_TEXTS = {"text": "output_text", "call": "function_call_arguments", "thoughts": "reasoning_text"}


class ResponsesAnswer(BlocksAnswer):
    """Answers ``body``, whose whole conversation is ``items``, and keeps both for later requests if they are to be."""

    def __init__(
        self,
        body: ResponsesRequest,
        items: Sequence[Item],
        chat: ChatCompletionRequest,
        generation: Generation,
        serving: Serving,
        is_thinking: bool,
        tenant: Tenant,
    ) -> None:
        super().__init__(chat, generation, serving, is_thinking)
        self._items, self._serving, self._tenant = items, serving, tenant
        self._numbers = itertools.count()
        self._output: list[OutputItem] = []
        store = body.store is not False and serving.responses.keeps_any
        self._response = _unanswered(body, generation, serving, store)

    def whole(self) -> ResponseObject:
        """The response with all of its output."""
        return self._response

    def begin(self) -> bytes:
        """Two events that say the same."""
        return self._event("response.created", response=self._response) + self._event(
            "response.in_progress", response=self._response
        )

    def change(self, change: Change) -> bytes:
        """An item of the output begins, goes on or ends."""
        block = change.block
        match change.kind:
            case "begin":
                added = self._event("response.output_item.added", block, item=_item(block, "in_progress"))
                return added if block.kind == "call" else added + self._part("added", block)
            case "more":
                return self._text("delta", block, delta=change.text)
            case "end":
                item = _item(block, "completed" if block.is_whole else "incomplete")
                self._output.append(item)
                if block.kind == "call":
                    done = self._text("done", block, name=block.name, arguments=block.text)
                else:
                    done = self._text("done", block, text=block.text) + self._part("done", block)
                return done + self._event("response.output_item.done", block, item=item)

    async def end(self) -> bytes:
        """Keep the conversation, then send the whole response."""
        assert self._last is not None
        is_cut_off = self._last.finish_reason == "length"
        status: Status = "incomplete" if is_cut_off else "completed"
        response = msgspec.structs.replace(
            self._response,
            status=status,
            completed_at=None if is_cut_off else int(time.time()),
            output=self._output,
            usage=await self._usage(),
            incomplete_details=IncompleteDetails() if is_cut_off else None,
        )
        is_kept = response.store and await self._keep(response)
        self._response = msgspec.structs.replace(response, store=is_kept)
        return self._event(f"response.{status}", response=self._response)

    def encode_failure(self, error: ApiError) -> bytes:
        """A response that has failed, if need be from its begin on."""
        begun = self.begin() if self._last is None else b""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = msgspec.structs.replace(
            self._response, status="failed", error=FailureDetail(code, error.message), output=self._output, store=False
        )
        return begun + self._event("response.failed", response=failed)

    async def _keep(self, response: ResponseObject) -> bool:
        serving, tenant = self._serving, self._tenant.name
        size = self._generation.usage().total_tokens  # of about four bytes each
        stored = await serving.work.run(tenant, 4 * size, encode_stored, self._items, response)
        return await serving.responses.save(tenant, response.id, stored)

    def _text(self, what: str, block: Block, **fields: Any) -> bytes:
        if block.kind != "call":
            fields["content_index"] = 0
        if block.kind == "text":
            fields["logprobs"] = []
        return self._event(f"response.{_TEXTS[block.kind]}.{what}", block, **fields)

    def _part(self, what: str, block: Block) -> bytes:
        part = OutputText(block.text) if block.kind == "text" else ThoughtText(block.text)
        return self._event(f"response.content_part.{what}", block, content_index=0, part=part)

    def _event(self, kind: str, block: Block | None = None, **fields: Any) -> bytes:
        if block is not None:
            fields["output_index"] = block.index
            if "item" not in fields:
                fields["item_id"] = _id(block)
        return named_event(kind, ResponseEvent(type=kind, sequence_number=next(self._numbers), **fields))

    async def _usage(self) -> ResponseUsage:
        usage = self._generation.usage()
        thoughts = "".join(block.text for block in self._writer.blocks if block.kind == "thoughts")
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        num_thoughts = len(await self._serving.work.run(self._tenant.name, len(thoughts), encode, thoughts))
        return ResponseUsage(
            usage.prompt_tokens,
            InputDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputDetails(min(num_thoughts, usage.completion_tokens)),
            usage.total_tokens,
        )


def _id(block: Block) -> str:
    return f"{_PREFIXES[block.kind]}_{block.id}"


def _item(block: Block, status: Status) -> OutputItem:
    has_text = status != "in_progress"
    match block.kind:
        case "text":
            content = [OutputText(block.text)] if has_text else []
            return OutputMessage(id=_id(block), status=status, content=content)
        case "thoughts":
            return OutputReasoning(id=_id(block), status=status, content=[ThoughtText(block.text)] if has_text else [])
        case "call":
            return FunctionCall(
                id=_id(block), status=status, call_id=f"call_{block.id}", name=block.name, arguments=block.text
            )


def _unanswered(body: ResponsesRequest, generation: Generation, serving: Serving, store: bool) -> ResponseObject:
    """The response while nothing of its output is there."""
    defaults = serving.sampling_defaults
    choice = body.tool_choice or "auto"
    text = body.text.model_dump(exclude_none=True, by_alias=True) if body.text else {}
    return ResponseObject(
        id=f"resp_{generation.id}",
        created_at=generation.created,
        status="in_progress",
        model=serving.model,
        output=[],
        store=store,
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        max_output_tokens=body.max_output_tokens,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        tools=_encoded([tool.model_dump() for tool in body.tools or ()]),
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        text=_encoded({"format": {"type": "text"}, **text}),
        reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        metadata=_encoded(body.metadata or {}),
        user=body.user,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
    )


def _encoded(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
