"""Other spellings of keys, and what a key that nothing reads may hold."""

import functools

from ovis25.data.errors import SampleError, label
from ovis25.data.sources import VISUAL_KEYS
from ovis25.text import lone_surrogate

LOSS_KEYS = ("weight", "loss")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# keys that tell about another one: an id, a size, a count
_ABOUT = ("_id", "_ids", "_index", "_idx", "_size", "_width", "_height", "_count", "_hash", "_source", "_type")
_MEANT = {
    **dict.fromkeys(("img", "img_path", "image_path", "image_file", "image_url", "picture", "photo"), "image"),
    **dict.fromkeys(("imgs", "image_paths", "image_files", "image_urls", "image_list", "pictures", "photos"), "images"),
    **dict.fromkeys(("video_path", "video_file", "video_url", "clip"), "video"),
    **dict.fromkeys(("frames", "frame_paths"), "video_frames"),
    **dict.fromkeys(("dialog", "dialogue", "dialogs", "dialogues", "chat", "turns"), "conversations"),
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
    **dict.fromkeys(("loss_mask", "label_mask", "loss_scale", "train", "trainable", "learn", "mask_history"), "loss"),
    **dict.fromkeys(("loss_weight", "sample_weight"), "weight"),
    **dict.fromkeys(("thought", "thoughts", "reasoning_details", "thinking_content"), "reasoning"),
}
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif")
_VIDEO_ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


def check_key(key, place: str) -> None:
    """Raise SampleError for a key that is no text."""
    if not isinstance(key, str) or lone_surrogate(key) is not None:
        raise SampleError(place, f"its key {label(repr(key), 60)} is no text", "Correct the key")


def meant_key(key: str, known: tuple[str, ...]) -> str | None:
    """The key that is read and that this one seems to mean."""
    return _meant_by(key[:60].strip().lower().replace("-", "_"), known)


# every row of a file has the same keys
@functools.lru_cache(4096)
def _meant_by(name: str, known: tuple[str, ...]) -> str | None:
    if name.endswith(_ABOUT) and name not in known:
        return None
    return _MEANT.get(name) or next((key for key in known if name == key or _is_typo(name, key)), None)


def _is_typo(name: str, key: str) -> bool:
    """One letter too many, too few or wrong, but not the first; or letters in another order. height is no weight."""
    if sorted(name) == sorted(key):
        return True
    if name[:1] != key[0]:
        return False
    short, long = sorted((name, key), key=len)
    if len(long) == len(short) + 1:
        return any(long[:place] + long[place + 1 :] == short for place in range(len(long)))
    return len(long) == len(short) > 4 and sum(a != b for a, b in zip(name, key, strict=True)) == 1


def matters(meant: str, value) -> bool:
    """Whether a value could be what the meant key holds: a number is neither a picture nor a text."""
    if meant in LOSS_KEYS:
        return True
    if meant in VISUAL_KEYS:
        is_number = isinstance(value, (bool, int, float)) or (isinstance(value, str) and value.strip().isdecimal())
        return not is_number
    return isinstance(value, (str, list, dict))


def media_key(value) -> str | None:
    """`image` or `video` where a value names such a file by its ending."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str) or len(first) > 4096 or "://" in first:
        return None
    if first.lower().endswith(_IMAGE_ENDINGS):
        return "image"
    return "video" if first.lower().endswith(_VIDEO_ENDINGS) else None


def holds_turns(value) -> bool:
    """Whether a value is a list of turns or messages."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(turn, dict) and bool({"role", "from"} & turn.keys()) for turn in value)
