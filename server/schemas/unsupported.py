"""Fields of other servers' APIs that would change an answer, so that they are refused instead of ignored.

They are those of OpenAI, vLLM, SGLang, llama.cpp, TGI, Mistral and OpenRouter as of 2026, and those that only some of
the APIs here have. Each has the values that ask for nothing; null always does.
"""

from __future__ import annotations

from typing import Any

UNSUPPORTED: dict[str, list[Any]] = {
    # Sampling.
    "use_beam_search": [False],
    "length_penalty": [1.0, 1],
    "bad_words": [[]],
    "allowed_token_ids": [],
    "logits_processors": [[]],
    "custom_logit_processor": [],
    "repetition_detection": [],
    "repeat_last_n": [-1],
    "typical_p": [1.0, 1],
    "tfs_z": [1.0, 1],
    "top_a": [0.0, 0],
    "top_n_sigma": [-1.0, -1],
    "mirostat": [0],
    "mirostat_mode": [0],
    "dynatemp_range": [0.0, 0],
    "dry_multiplier": [0.0, 0],
    "xtc_probability": [0.0, 0],
    "samplers": [],
    "n_probs": [0],
    "n_keep": [0],
    "do_sample": [True],
    "lora": [[]],
    "lora_path": [],
    # What the prompt is.
    "truncate_prompt_tokens": [],
    "truncation": ["disabled"],
    "truncate": [],
    "prompt_embeds": [],
    "documents": [[]],
    "chat_template": [],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "safe_prompt": [False],
    "prompt_mode": [],
    "images": [[]],
    "image_data": [[]],
    "plugins": [[]],
    "models": [[]],
    # Thoughts.
    "reasoning": [],
    "thinking": [{"type": "disabled"}],
    "enable_thinking": [],
    "thinking_budget": [],
    "thinking_token_budget": [],
    "separate_reasoning": [True],
    "include_reasoning": [True],
    # What is answered.
    "include_stop_str_in_output": [False],
    "no_stop_trim": [False],
    "stop_regex": [],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "prompt_logprobs": [],
    "return_token_ids": [False],
    "return_tokens_as_token_ids": [False],
    "structural_tag": [],
    "guided_whitespace_pattern": [],
    # Of completions, responses or messages, for the others.
    "prompt": [""],
    "suffix": [""],
    "echo": [False],
    "best_of": [1],
    "add_special_tokens": [False],
    "input": ["", []],
    "instructions": [""],
    "previous_response_id": [],
    "conversation": [],
    "background": [False],
    "text": [{}, {"format": {"type": "text"}}],
    "system": ["", []],
    "output_config": [{}],
    "container": [],
    "mcp_servers": [[]],
    "context_management": [[], {"edits": []}],
}

OF_CHAT: dict[str, list[Any]] = {
    "messages": [[]],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "reasoning_effort": ["none"],
    "chat_template_kwargs": [{}],
    "top_logprobs": [0],
    "web_search_options": [],
}
"""Fields of chat, for completions."""
NEUTRAL = OF_CHAT | {
    "n": [1],
    "stop": [[]],
    "stop_token_ids": [[]],
    "presence_penalty": [0.0, 0],
    "frequency_penalty": [0.0, 0],
    "repetition_penalty": [1.0, 1],
    "logit_bias": [{}],
    "logprobs": [False],
    "min_tokens": [0],
    "ignore_eos": [False],
    "store": [False],
    "parallel_tool_calls": [True],
    "stream_options": [{}],
}
"""Fields of chat, for responses and messages, as far as they have others in their place."""

SYNONYMS = {
    "regex": "guided_regex",
    "ebnf": "guided_grammar",
    "grammar": "guided_grammar",
    "json_schema": "guided_json",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "random_seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "stop_sequence": "stop",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "stop_tokens": "stop_token_ids",
    "num_return_sequences": "n",
}
"""Names by which other APIs call fields that are supported here."""
