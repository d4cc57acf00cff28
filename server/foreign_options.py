"""Options of vLLM and llama.cpp that people bring along, and what each has in its place here."""

from __future__ import annotations

_BY_ADVICE = {
    "use --model": "-m",
    "give the hub's id as MODEL": "-hf -hfr --hf-repo",
    "use --max-model-len": "-c --ctx-size",
    "use --served-model-name": "-a --alias",
    "use --keys-file, whose lines `evospec keys new` prints": "--api-key-file",
    "use --max-num-seqs": "-np --parallel",
    "use --engine.scheduler.max_batched_tokens": "--max-num-batched-tokens -b --batch-size -ub --ubatch-size",
    "use --engine.runtime.threads": "-t --threads -tb --threads-batch",
    "use --engine.runtime.device": "-dev --device -ngl --gpu-layers --n-gpu-layers",
    "use --engine.runtime.attention_backend": "-fa --flash-attn",
    "use --no-engine.runtime.cuda_graphs": "--enforce-eager",
    "use --tensor-parallel-size": "-tp -pp --pipeline-parallel-size",
    "run several servers, docs/fleet.md": "-dp --data-parallel-size",
    "use --engine.cache.memory_fraction": "--gpu-memory-utilization",
    "use --kv-max-bytes": "--kv-cache-memory-bytes -cram --cache-ram",
    "use --engine.cache.num_blocks": "--num-gpu-blocks-override",
    "use --engine.model.dtype, which the KV cache has, too": "--kv-cache-dtype -ctk --cache-type-k -ctv --cache-type-v",
    "use --engine.cache.prefix_caching": "--enable-prefix-caching",
    "use --no-engine.cache.prefix_caching": "--no-enable-prefix-caching",
    "use --draft": "--speculative-config -md --model-draft",
    "use --engine.speculation.num_speculative_tokens": "--draft-n --draft-max --spec-draft-n-max",
    "use --engine.speculation.method": "--spec-type",
    "use --engine.model.cache_dir": "--download-dir",
    "use --log.level": "--uvicorn-log-level -v --verbose --log-disable --disable-log-requests --no-enable-log-requests",
    "use 2> FILE": "--log-file",
    "use --http.body_timeout": "-to --timeout",
    "put it into requests": "-s --seed -n --n-predict --temp --top-k --top-p --min-p",
    "put a proxy in front": "--ssl-keyfile --ssl-certfile --ssl-key-file --ssl-cert-file --root-path --api-prefix",
    "leave it out: the model's own is used": "--tokenizer --chat-template --chat-template-file --generation-config",
    "leave it out: files say what they are": "-q --quantization --load-format",
    "leave it out: tools and thoughts are what the chat template makes them": "--enable-auto-tool-choice "
    "--tool-call-parser --reasoning-parser --reasoning-format --jinja",
    "leave it out: it is always so": "--enable-chunked-prefill -cb --cont-batching --cache-prompt",
    "leave it out: /metrics is there": "--metrics --slots --disable-log-stats",
    "leave it out: no model's code is run": "--trust-remote-code",
    "leave it out: weights and KV stay in memory": "--mlock --no-mmap --swap-space --cpu-offload-gb",
    "not there: adapters of the model": "--enable-lora --lora",
    "not there: images": "--mmproj --limit-mm-per-prompt",
    "leave it out: /v1/embeddings is there": "--embedding --embeddings --task --runner --pooling",
}
ADVICE = {option: advice for advice, options in _BY_ADVICE.items() for option in options.split()}
"""What to do instead, by option."""
