"""Turns as data names them (from and value, or role and content): text or parts, thinking, whether it is learned."""

from ovis25.constants import IMAGE_PLACEHOLDER, THINK_BEGIN, THINK_END, VIDEO_PLACEHOLDER
from ovis25.data.errors import SampleError, label
from ovis25.data.sources import VISUAL_KEYS, given, kind_of
from ovis25.data.spellings import LOSS_KEYS, REASONING_KEYS, check_key, matters, meant_key
from ovis25.data.turns import Turn
from ovis25.processing.chat import LEARNED_ROLE
from ovis25.text import nearest, shorten

TURN_KEYS = ("from", "value", "role", "content", *LOSS_KEYS, *REASONING_KEYS)
CONVERSATION_ROLES = {"system": "system", "human": "human", "gpt": LEARNED_ROLE, "ignored_gpt": "ignored_gpt"}
MESSAGE_ROLES = {"system": "system", "user": "human", "assistant": LEARNED_ROLE}
_ANY_ROLE = {**CONVERSATION_ROLES, **MESSAGE_ROLES, "developer": "system"}
_TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response")
_TOOL_CURE = (
    "Write the call and its result into the answer: "
    "<tool_call>Crop [0, 0, 0.5, 1]</tool_call><tool_response>...</tool_response>"
)
_WHO_AND_WHAT = (("from", "role"), ("value", "content"))
_PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
_PART_KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_PART_KEYS = ("type", "text", "image", "image_url", "video", "video_url", "path", "url", "bytes")
# keys of a turn that would change what is learned, and are not read
_REFUSED_IN_TURN = {
    **dict.fromkeys(("tool_calls", "function_call"), ("tool calls are not read", _TOOL_CURE)),
    **dict.fromkeys(
        (*VISUAL_KEYS, "audio"), ("it is not read inside a turn", "Name files in the row, or as parts of the content")
    ),
    "refusal": ("it is not read", "Write what is to be learned as the turn's text"),
}


class TurnReader:
    """Reads the turns of one row; collects the visuals of their parts and the keys that nothing reads."""

    def __init__(self):
        self.parts: list[tuple[str, object, str]] = []
        self.unused: list[str] = []

    def turns(self, turns, name: str, roles: dict[str, str], answers_are_learned: bool = True) -> list[Turn]:
        is_messages = roles is MESSAGE_ROLES
        example = '{"role": ..., "content": ...}' if is_messages else '{"from": "human", "value": "..."}'
        if not isinstance(turns, list) or not turns:
            what = "it is empty" if turns == [] else f"it is {kind_of(turns)}"
            raise SampleError(name, what, f"Give a list of turns like {example}")
        read = []
        for index, turn in enumerate(turns):
            place = f"{name}[{index}]"
            who, what = (_key_of(turn, keys) for keys in _WHO_AND_WHAT)
            is_call = isinstance(turn, dict) and any(given(turn.get(key)) for key in ("tool_calls", "function_call"))
            if who is None or (what is None and not is_call):
                lacks = "role or content" if is_messages else "from or value"
                raise SampleError(place, f"it lacks {lacks}", f"Write {example}")
            _check_twins(turn, place)
            role = _role(turn[who], f"{place}.{who}", roles)
            self._note_keys(turn, place, name)
            value = self._with_thinking(self._text(turn[what], f"{place}.{what}"), turn, role, place)
            learned = is_learned(turn, place, role)
            if role == LEARNED_ROLE and (learned is False or not answers_are_learned):
                role = "ignored_gpt"
            read.append(Turn(role, value, f"{place}.{what}"))
        return read

    def _text(self, content, place: str) -> str:
        """The text of a turn; visual parts become placeholders and are collected."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            cure = "Give text or a list of parts" if place.endswith("content") else "It must be text"
            raise SampleError(place, f"it is {kind_of(content)}", cure)
        # the chat template joins parts so
        return "\n".join(self._part(part, f"{place}[{number}]") for number, part in enumerate(content))

    def _part(self, part, place: str) -> str:
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type == "text" and isinstance(part.get("text"), str):
            return part["text"]
        kind = _PART_KINDS.get(part_type) if isinstance(part_type, str) else None
        if kind is None:
            what = f"of type {shorten(part_type)}" if isinstance(part_type, str) else kind_of(part)
            raise SampleError(place, f"unknown part: it is {what}", "Parts are text, image, image_url or video")
        keys = (part_type, kind, "bytes", "path", "url")
        named = next((part[key] for key in keys if given(part.get(key))), None)
        for key in part:
            check_key(key, place)
        self.unused += [f"part.{label(key, 60)}" for key in part if key not in _PART_KEYS and given(part[key])]
        self.parts.append((kind, named, place))
        return _PLACEHOLDERS[kind]

    def _note_keys(self, turn: dict, place: str, name: str) -> None:
        for key, value in turn.items():
            check_key(key, place)
            if key in TURN_KEYS or not given(value):
                continue
            meant = key if key in _REFUSED_IN_TURN else meant_key(key, (*TURN_KEYS, *_REFUSED_IN_TURN))
            if meant and (meant == key or matters(meant, value)):
                problem, cure = _REFUSED_IN_TURN.get(meant, ("no key of this name is read", f"Did you mean {meant}?"))
                raise SampleError(f"{place}.{label(key, 60)}", problem, cure)
            self.unused.append(f"{name}[].{label(key, 60)}")

    @staticmethod
    def _with_thinking(value: str, turn: dict, role: str, place: str) -> str:
        named = {key: turn[key] for key in REASONING_KEYS if given(turn.get(key))}
        if named and role not in (LEARNED_ROLE, "ignored_gpt"):
            raise SampleError(f"{place}.{next(iter(named))}", "only an answer has thinking", "Remove it")
        return with_thinking(value, named, place)


def with_thinking(value: str, named: dict, place: str) -> str:
    """An answer with the thinking that stands beside it, as the chat template writes it."""
    if not named:
        return value
    key, thinking = next(iter(named.items()))
    if any(other != thinking for other in named.values()):
        raise SampleError(f"{place}.{' and '.join(named)}", "they disagree", "Keep one of them")
    if not isinstance(thinking, str):
        raise SampleError(f"{place}.{key}", f"it is {kind_of(thinking)}", "It must be text")
    if not thinking.strip():
        return value
    if THINK_BEGIN in value or THINK_END in value:
        raise SampleError(f"{place}.{key}", "the answer has a <think> block as well", "Keep one of them")
    thinking, answer = thinking.strip("\n"), value.lstrip("\n")
    return f"{THINK_BEGIN}\n{thinking}\n{THINK_END}\n\n{answer}"


def _key_of(turn, keys: tuple[str, str]) -> str | None:
    """The key of the two that the turn has; both only where they say the same."""
    present = [key for key in keys if isinstance(turn, dict) and key in turn]
    filled = [key for key in present if turn[key] is not None]
    return next(iter(filled or present), None)


def _check_twins(turn: dict, place: str) -> None:
    for one, other in _WHO_AND_WHAT:
        first, second = turn.get(one), turn.get(other)
        is_same = first == second or (one == "from" and _ANY_ROLE.get(str(first)) == _ANY_ROLE.get(str(second), 0))
        if first is not None and second is not None and not is_same:
            raise SampleError(f"{place}.{one} and {other}", "they disagree", "Keep one of them")


def _role(role, place: str, roles: dict[str, str]) -> str:
    if not isinstance(role, str):
        raise SampleError(place, f"it is {kind_of(role)}", f"Roles are {', '.join(roles)}")
    if role in _TOOL_ROLES:
        raise SampleError(place, f"the role {role} is not read", _TOOL_CURE)
    if role in _ANY_ROLE:
        return _ANY_ROLE[role]
    near = nearest(role[:60], roles)
    hint = f"Did you mean {near}? " if near else ""
    raise SampleError(place, f"unknown role {shorten(role)}", f"{hint}Roles are {', '.join(roles)}")


def is_learned(owner: dict, place: str, role: str) -> bool | None:
    """Whether a turn or a row is learned, as `weight` and `loss` say; None where they say nothing."""
    flags = {}
    for key in LOSS_KEYS:
        value = owner.get(key)
        if value is None:
            continue
        where = f"{place}.{key}" if place else key
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            what = shorten(value) if isinstance(value, (str, int, float)) else kind_of(value)
            cure = "An answer is learned (1, true) or only shown (0, false); there are no shares"
            raise SampleError(where, f"it is {what}", cure)
        if value and role not in (LEARNED_ROLE, ""):
            raise SampleError(where, f"turns of {role} are never learned", "Remove it, or set it to 0")
        flags[key] = bool(value)
    if len(set(flags.values())) > 1:
        raise SampleError(f"{place}.weight and loss".lstrip("."), "they disagree", "Keep one of them")
    return next(iter(flags.values()), None)
