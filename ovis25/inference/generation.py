"""Generation arguments: which there are, of what type, in which range.

transformers checks few of them, and some only after tokens were written; what one of many requests gets wrong must not
end the others.
"""

import math

from transformers import GenerationConfig

from ovis25.inference.checks import RequestError, check_flag, check_list, check_real, check_text, check_whole, refuse

# below this, logits over the temperature leave float32
_LOWEST_TEMPERATURE = 1e-5
_MAX_STOP_STRINGS, _MAX_STOP_CHARACTERS = 64, 256
_OTHER_SEARCHES = ("assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers", "constraints")
_POSITIVE = 1e-6

_FLAGS = ("do_sample", "renormalize_logits", "remove_invalid_values")
_WHOLE = {
    "top_k": (0, math.inf),
    "no_repeat_ngram_size": (0, 1024),
    "min_new_tokens": (0, math.inf),
    "num_beams": (1, 64),
    "seed": (0, 2**63 - 1),
}
_REAL = {
    "min_p": (0.0, 1.0),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "repetition_penalty": (0.001, 1000.0),
    "length_penalty": (-1000.0, 1000.0),
    "max_time": (_POSITIVE, math.inf),
}
_SHARES = ("top_p", "typical_p", "top_h")
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
# what one request of many may set for itself: every value is checked whole, before anything is generated
ITEM_NAMES = (
    "temperature", *_SHARES, *_FLAGS, *_WHOLE, *_REAL, *_TOKEN_LISTS, "bad_words_ids", "stop_strings", "early_stopping",
)  # fmt: skip
# objects and rarer arguments, for a whole call
_OF_A_CALL = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "generation_config",
    "negative_prompt_ids", "negative_prompt_attention_mask", "synced_gpus",
)  # fmt: skip
_REFUSED = {
    "num_return_sequences": "every request gets one reply; ask several times instead",
    "max_length": "max_new_tokens says how long a reply may be",
    "min_length": "min_new_tokens says how long a reply must be",
    "return_dict_in_generate": "a reply is a text or a Reply",
    "output_scores": "a Reply holds no scores",
    "output_logits": "a Reply holds no logits",
    "output_attentions": "a Reply holds no attentions",
    "output_hidden_states": "a Reply holds no hidden states",
    "streamer": "stream() gives a reply piece by piece",
}
_CONFIG_NAMES = tuple(name for name in vars(GenerationConfig()) if name[0] != "_" and name != "transformers_version")
GENERATION_NAMES = tuple(dict.fromkeys([*ITEM_NAMES, *_CONFIG_NAMES, *_OF_A_CALL, *_REFUSED]))


def check_generation(given: dict, vocab_size: float = math.inf) -> dict:
    """The generation arguments ready for transformers: without those left at None, so that the checkpoint's hold.

    A temperature of 0 becomes greedy decoding. `vocab_size` bounds token ids.

    Raises:
        RequestError: a type or a range is wrong; names the argument.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in _REFUSED and value not in (False, 1):
            raise RequestError(f"{name} must be left out: {_REFUSED[name]}")
        _check(name, value, vocab_size)
    # transformers refuses a whole number where it wants a fraction
    given |= {name: float(value) for name, value in given.items() if name in ("temperature", *_SHARES, *_REAL)}
    if given.get("temperature") == 0:
        given.pop("temperature")
        given["do_sample"] = False
    return given


def is_other_search(generation: dict) -> bool:
    """Beam search and its like, which transformers does whole."""
    return generation.get("num_beams", 1) > 1 or any(name in generation for name in _OTHER_SEARCHES)


def check_combination(request, generation: dict) -> None:
    """What a request asks for and how it is to be decoded fit each other. Raises RequestError."""
    cache = generation.get("cache_implementation", "dynamic")
    if cache not in ("dynamic", "static") and not is_other_search(generation):
        raise refuse("cache_implementation", cache, "dynamic or static (model.generate takes others)")
    if is_other_search(generation):
        if request.thinking_budget is not None or request.tools is not None:
            raise RequestError("a thinking budget or tools need num_beams=1 and no other search")
        if "seed" in generation:
            raise RequestError("seed needs num_beams=1 and no other search")
    if generation.get("cache_implementation") == "static" and request.tools is not None:
        raise RequestError("cache_implementation='static' has no room for tool results; leave it out with tools")


def _check(name: str, value, vocab_size: float) -> None:
    if name in _FLAGS:
        check_flag(name, value)
    elif name in _WHOLE:
        check_whole(name, value, *_WHOLE[name])
    elif name in _REAL:
        check_real(name, value, *_REAL[name])
    elif name in _SHARES:
        check_real(name, value, _POSITIVE, 1.0, "a number above 0 and at most 1")
    elif name == "temperature":
        wanted = f"0 (greedy), or a number, at least {_LOWEST_TEMPERATURE:g}"
        check_real(name, value, 0.0, wanted=wanted)
        if value:
            check_real(name, value, _LOWEST_TEMPERATURE, wanted=wanted)
    elif name in _TOKEN_LISTS:
        _check_token_ids(name, value, vocab_size)
    elif name == "bad_words_ids":
        check_list(name, value, "lists of token ids")
        for index, ids in enumerate(value):
            _check_token_ids(f"{name}[{index}]", ids, vocab_size)
    elif name == "stop_strings":
        _check_stop_strings(value)
    elif name == "early_stopping" and not isinstance(value, bool) and value != "never":
        raise refuse(name, value, 'true, false or "never"')


def _check_token_ids(name: str, value, vocab_size: float) -> None:
    check_list(name, value, "token ids")
    if not value:
        raise RequestError(f"{name} is empty; give token ids, or leave it out")
    for index, token in enumerate(value):
        check_whole(f"{name}[{index}]", token, 0, vocab_size - 1)


def _check_stop_strings(value) -> None:
    strings = [value] if isinstance(value, str) else value
    check_list("stop_strings", strings, "texts")
    if not 1 <= len(strings) <= _MAX_STOP_STRINGS:
        raise RequestError(f"stop_strings holds {len(strings)} texts; it must be 1 to {_MAX_STOP_STRINGS}")
    for index, string in enumerate(strings):
        check_text(f"stop_strings[{index}]", string)
        if not 1 <= len(string) <= _MAX_STOP_CHARACTERS:
            wanted = f"a text of 1 to {_MAX_STOP_CHARACTERS} characters"
            raise refuse(f"stop_strings[{index}]", string, wanted)
