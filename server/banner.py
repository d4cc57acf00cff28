"""What ``evospec serve`` prints once the server answers: where it is, and two calls that work as pasted."""

from __future__ import annotations

import json
import shlex
import sys

from evospec.engine.messages import EngineReady

_TEMPLATE = """
EvoSpec serves {model} at {url}/v1
{dtype} on {device}, {attention} attention; KV cache {kv}; draft {draft}

curl {url}/v1/chat/completions -H 'Content-Type: application/json'{curl_key} -d {body}

{python} - <<'PY'
import os
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key={python_key})
messages = [{{"role": "user", "content": "{prompt}"}}]
stream = client.chat.completions.create(model={model!r}, messages=messages, stream=True)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
PY
"""
_PROMPT = "Why is the sky blue?"


def banner(url: str, model: str, info: EngineReady, *, needs_key: bool) -> str:
    """The text for the server at ``url``, whose clients name the model ``model`` and whose engine is ``info``."""
    body = {"model": model, "messages": [{"role": "user", "content": _PROMPT}], "max_tokens": 64}
    return _TEMPLATE.format(
        url=url,
        dtype=info.dtype,
        device=info.device,
        attention=info.attention_backend,
        kv=_mebibytes(info.kv_bytes),
        draft=f"{info.draft} ({_mebibytes(info.draft_bytes)} with its KV cache)" if info.draft else "none",
        model=model,
        prompt=_PROMPT,
        body=shlex.quote(json.dumps(body)),
        python=shlex.quote(sys.executable),
        curl_key=' -H "Authorization: Bearer $EVOSPEC_API_KEY"' if needs_key else "",
        python_key='os.environ["EVOSPEC_API_KEY"]' if needs_key else '"none"',
    )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
