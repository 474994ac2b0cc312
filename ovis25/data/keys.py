"""Keys of a row that nothing reads: metadata that is counted, or a defect where it could change what is learned."""

from ovis25.data.errors import SampleError, label
from ovis25.data.forms import ROW_KEYS
from ovis25.data.sources import VISUAL_KEYS, Visuals, given
from ovis25.data.spellings import REASONING_KEYS, check_key, holds_turns, matters, meant_key, media_key

# written by this package itself, beside the user's `id`
ORIGIN_KEY = "_origin"
_QUIET = ("id", ORIGIN_KEY)
_EMPTY_TEXTS = ("[]", "{}", "null")
_PREFERENCE = ("preference pairs are not trained on", "Keep the chosen answer as the answer, or remove the sample")
# keys whose content would be lost
_REFUSED = {
    **dict.fromkeys(("tools", "functions"), ("it is not read", "Describe the tools in the system turn")),
    "objects": ("it is not read", "Write <ref>..</ref> and <box>(x1,y1),(x2,y2)</box> into the text"),
    **dict.fromkeys(("audio", "audios"), ("the model hears nothing", "Remove the sample, or the key")),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(REASONING_KEYS, ("it stands beside the turns", "Write it into the turn of its answer")),
}


def unused_keys(row: dict, form_keys: tuple[str, ...], visuals: Visuals) -> list[str]:
    """The keys of the row that hold something and that nothing reads.

    Args: `form_keys` are the keys that the row's form reads beside those that every form has.

    Raises:
        SampleError: such a key could matter; names the key that is read.
    """
    unused = []
    for key, value in row.items():
        check_key(key, "(row)")
        if key in ROW_KEYS or key in form_keys or key in _QUIET or not given(value):
            continue
        if key in _REFUSED:
            if _is_hollow(value):
                continue
            raise SampleError(key, *_REFUSED[key])
        meant = _meant(key, value, visuals)
        if meant:
            raise SampleError(label(key, 60), "no key of this name is read", f"Did you mean {meant}?")
        unused.append(label(key, 60))
    return unused


def _is_hollow(value) -> bool:
    """Lists and objects of nothing, also written as text."""
    if isinstance(value, dict):
        return not any(given(part) for part in value.values())
    return isinstance(value, str) and value.strip() in _EMPTY_TEXTS


def _meant(key: str, value, visuals: Visuals) -> str | None:
    """The known key that this one seems to mean, or None where it cannot matter."""
    meant = meant_key(key, ROW_KEYS)
    if meant and matters(meant, value):
        is_repeated = meant in VISUAL_KEYS and _is_among(value, visuals)
        return None if is_repeated else meant
    if holds_turns(value):
        return "conversations"
    return None if visuals else media_key(value)


def _is_among(value, visuals: Visuals) -> bool:
    known = [*visuals.images, *(visuals.video if isinstance(visuals.video, list) else [visuals.video])]
    return all(any(part == source for source in known) for part in (value if isinstance(value, list) else [value]))
