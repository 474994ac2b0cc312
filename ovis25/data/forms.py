"""The forms of rows that are read: each is one function from a row to turns, in the table FORMS.

| form | keys | known from |
|---|---|---|
| conversations | `conversations`: turns with from and value | the documented one, LLaVA, LLaMA-Factory (ShareGPT) |
| messages | `messages`: role and content, text or parts | OpenAI, ms-swift, TRL |
| completion | `prompt`, `completion`: texts or lists of messages; the completion alone is learned | TRL |
| output | `instruction`, `input`, `output`, `history` (or `query`, `response`) | LLaMA-Factory (Alpaca), ms-swift |

Beside each: `system`, `image` or `images`, `video` or `videos` or `video_frames`, `weight` or `loss`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ovis25.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ovis25.data.errors import SampleError
from ovis25.data.reader import CONVERSATION_ROLES, MESSAGE_ROLES, TurnReader, is_learned, with_thinking
from ovis25.data.sources import VISUAL_KEYS, Visuals, given, kind_of, row_visuals, source_of
from ovis25.data.spellings import LOSS_KEYS, REASONING_KEYS
from ovis25.data.turns import Turn
from ovis25.processing.chat import LEARNED_ROLE


@dataclass
class Reading:
    """A row in the one form that everything behind works on.

    `field_name` is the key that the turns stand under, `visual_field` that of the visuals; `unused` counts keys of
    turns that nothing reads. `num_placed`: visuals that nothing in the text names, put before the first question.
    """

    turns: list[Turn]
    field_name: str
    visuals: Visuals = field(default_factory=Visuals)
    visual_field: str = "image"
    num_placed: int = 0
    unused: list[str] = field(default_factory=list)
    # keys that this form reads beside those that every form has
    own_keys: tuple[str, ...] = ()


def _from_conversations(row: dict, reader: TurnReader) -> list[Turn]:
    return reader.turns(row["conversations"], "conversations", CONVERSATION_ROLES)


def _from_messages(row: dict, reader: TurnReader) -> list[Turn]:
    return reader.turns(row["messages"], "messages", MESSAGE_ROLES)


def _from_completion(row: dict, reader: TurnReader) -> list[Turn]:
    """As in TRL, answers that stand in the prompt are shown and not learned."""
    read = []
    for key, role in (("prompt", "human"), ("completion", LEARNED_ROLE)):
        value = row.get(key)
        if not given(value):
            raise SampleError(key, "it is missing", "prompt and completion belong together")
        if isinstance(value, str):
            read.append(Turn(role, value, key))
        else:
            read += reader.turns(value, key, MESSAGE_ROLES, answers_are_learned=key == "completion")
    return _with_row_thinking(read, row)


def _from_output(row: dict, reader: TurnReader) -> list[Turn]:
    question = [(key, row[key]) for key in ("instruction", "query", "input") if given(row.get(key))]
    answers = [(key, row[key]) for key in ("output", "response") if row.get(key) is not None]
    if not question or len(answers) != 1:
        lacking = "it has output and response" if len(answers) > 1 else "it is missing"
        place = "output" if question else "instruction"
        raise SampleError(place, lacking, "instruction (input) and output, or query and response, belong together")
    texts = [*question, *answers]
    for key, value in texts:
        if not isinstance(value, str):
            raise SampleError(key, f"it is {kind_of(value)}", "It must be text")
    turns = [*_history(row.get("history")), Turn("human", "\n".join(text for _, text in question), question[0][0])]
    turns.append(Turn(LEARNED_ROLE, answers[0][1], answers[0][0]))
    return _with_row_thinking(turns, row)


def _history(pairs) -> Iterator[Turn]:
    if not given(pairs):
        return
    for index, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise SampleError(place, f"it is {kind_of(pair)}", "Give pairs of texts: [[question, answer], ...]")
        yield Turn("human", pair[0], f"{place}[0]")
        yield Turn(LEARNED_ROLE, pair[1], f"{place}[1]")


def _with_row_thinking(turns: list[Turn], row: dict) -> list[Turn]:
    named = {key: row[key] for key in REASONING_KEYS if given(row.get(key))}
    last = turns[-1]
    if named and last.role == LEARNED_ROLE:
        last.value = with_thinking(last.value, named, "(row)")
    return turns


@dataclass(frozen=True)
class Form:
    """A form of rows: how it is read, the keys that it is known by, and all its keys."""

    read: Callable[[dict, TurnReader], list[Turn]]
    names: tuple[str, ...]
    keys: tuple[str, ...]
    # whether visuals that no text names stand before the first question: so does who reads this form elsewhere
    places_visuals: bool = False


FORMS = (
    Form(_from_conversations, ("conversations",), ("conversations",)),
    Form(_from_messages, ("messages",), ("messages",), places_visuals=True),
    Form(_from_completion, ("completion",), ("prompt", "completion"), places_visuals=True),
    Form(_from_output, ("output", "response"), ("instruction", "query", "input", "output", "response", "history")),
)
TEXT_KEYS = tuple(key for form in FORMS for key in form.keys)
ROW_KEYS = (*TEXT_KEYS, "system", *VISUAL_KEYS, *LOSS_KEYS)


def read_row(row: dict) -> Reading:
    """The row's turns and visuals. Raises SampleError: the first defect of its form."""
    form = _main_form(row)
    reading = _read_form(row, form)
    _check_other_texts(row, form, reading)
    return reading


def _main_form(row: dict) -> Form:
    for form in FORMS:
        if any(row.get(name) is not None for name in form.names):
            return form
    for form in FORMS[2:]:
        if any(given(row.get(key)) for key in form.keys):
            return form
    raise SampleError(
        "conversations", "it is missing",
        'Give a list of turns with "from" and "value", or messages, prompt and completion, instruction and output',
    )  # fmt: skip


def _read_form(row: dict, form: Form) -> Reading:
    reader = TurnReader()
    turns = _with_system(form.read(row, reader), row)
    if is_learned(row, "", "") is False:
        key = next(key for key in LOSS_KEYS if row.get(key) is not None)
        raise SampleError(key, "it has no learned token: the whole row is not to be learned", "Remove the sample")
    field_name = next((name for name in form.names if row.get(name) is not None), form.names[0])
    own_keys = () if form in FORMS[:2] else REASONING_KEYS
    reading = Reading(turns, field_name, unused=reader.unused, own_keys=own_keys)
    reading.visuals, reading.visual_field = row_visuals(row)
    _add_parts(reading, reader.parts)
    if form.places_visuals and any(given(row.get(key)) for key in ("images", "videos")):
        _place_visuals(reading)
    return reading


def _with_system(turns: list[Turn], row: dict) -> list[Turn]:
    system = row.get("system")
    if not given(system):
        return turns
    if not isinstance(system, str):
        raise SampleError("system", f"it is {kind_of(system)}", "It must be text")
    own = [turn for turn in turns if turn.role == "system"]
    if not own:
        return [Turn("system", system, "system"), *turns]
    if any(turn.value.strip() != system.strip() for turn in own):
        raise SampleError(f"system and {own[0].place}", "they disagree", "Keep one of them")
    return turns


def _add_parts(reading: Reading, parts: list[tuple[str, object, str]]) -> None:
    """Parts name their files, or stand for those of the row."""
    named = [(kind, source_of(source, place, kind), place) for kind, source, place in parts if source is not None]
    of_row = reading.visuals
    if not named:
        bare = next((part for part in parts if not of_row), None)
        if bare:
            raise SampleError(bare[2], f"it names no {bare[0]}", f'Add "{bare[0]}": a path, or name it in the row')
        return
    if len(named) < len(parts):
        bare = next(part for part in parts if part[1] is None)
        raise SampleError(bare[2], f"it names no {bare[0]}, but other parts do", "Name all of them, or none")
    images = [source for kind, source, _ in named if kind == "image"]
    videos = [source for kind, source, _ in named if kind == "video"]
    if len(videos) > 1:
        raise SampleError(reading.field_name, f"it holds {len(videos)} videos", "A sample takes one video")
    if images and videos:
        raise SampleError(reading.field_name, "a sample takes images or one video, not both", "Make two samples of it")
    found = Visuals(images, videos[0] if videos else None)
    if of_row and of_row != found:
        where = f"{reading.visual_field} and {reading.field_name}"
        raise SampleError(where, "they name different files", "Name the files in the row, or in the parts")
    if not of_row:
        reading.visuals, reading.visual_field = found, reading.field_name


def _place_visuals(reading: Reading) -> None:
    placeholder = IMAGE_PLACEHOLDER if reading.visuals.images else VIDEO_PLACEHOLDER
    first = next((turn for turn in reading.turns if turn.role == "human"), None)
    if first is not None and not any(placeholder in turn.value for turn in reading.turns):
        reading.num_placed = len(reading.visuals.images) or 1
        first.value = f"{placeholder}\n" * reading.num_placed + first.value


def _check_other_texts(row: dict, main: Form, reading: Reading) -> None:
    """Keys of other forms must say the same, or be part of it."""
    said = [(turn.role, turn.value) for turn in reading.turns]
    for form in FORMS:
        keys = [key for key in form.keys if given(row.get(key))]
        if form is main or not keys:
            continue
        if any(row.get(name) is not None for name in form.names) and _says(row, form) == said:
            continue
        for key in keys:
            value = row[key]
            is_told = isinstance(value, str) and any(value.strip() in text for _, text in said)
            if isinstance(value, list) or (isinstance(value, str) and not is_told):
                place = f"{reading.field_name} and {key}"
                raise SampleError(place, "both hold text to learn, and they disagree", "Keep one of them")
            reading.unused.append(key)


def _says(row: dict, form: Form) -> list[tuple[str, str]] | None:
    try:
        return [(turn.role, turn.value) for turn in _read_form(row, form).turns]
    except SampleError:
        return None
