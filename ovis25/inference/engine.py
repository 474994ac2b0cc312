"""Ask a model: one picture, several, a video, or text alone; single, streamed, or in batches of any mix."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from PIL import Image
from transformers.cache_utils import Cache

from ovis25.constants import (
    IMAGE_PLACEHOLDER,
    MULTIPLE_IMAGE_PIXELS,
    SINGLE_IMAGE_PIXELS,
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TURN_BEGIN,
    VIDEO_PLACEHOLDER,
)
from ovis25.inference.chat import Chat
from ovis25.inference.decoding import EARLY_STOP_TEXT, Appended, BudgetTokens, Row, start_decoding
from ovis25.inference.grounding import GROUNDING_PROMPTS, Grounding, parse_grounding
from ovis25.inference.reply import (
    Piece,
    Reply,
    ReplyStream,
    ToolCall,
    Transcript,
    reply_text,
)
from ovis25.loading import find_model
from ovis25.model import Ovis2_5
from ovis25.model.adapter import load_adapter
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.chat import tokenize, tool_result_ids
from ovis25.processing.image import ImageSource
from ovis25.processing.processor import Grid, VideoSource, visual_tensors
from ovis25.tools import Toolbox, toolbox

DEFAULT_THINKING_BUDGET = 2048
_OTHER_SEARCHES = ("assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers", "constraints")


class RequestError(ValueError):
    """A request that cannot be answered as it stands: says which argument is wrong, and why."""


@dataclass
class Request:
    """One question with its visuals: images or one video, or neither.

    `thinking_budget` (new tokens) ends the thinking when they are spent; it needs `enable_thinking`.
    `max_new_tokens` counts everything written, thinking and forced text included; where a budget would leave no room
    for an answer, it counts from the end of the thinking instead (raised by budget and forced text).
    Pixel budgets and `num_frames` default to those the model was trained with, else the released ones.
    `tools`: a `Toolbox` (in a dict also names of built-in tools), whose calls are run, `max_tool_calls` of them; tool
    results do not count as new tokens.
    """

    prompt: str
    images: list[ImageSource] = field(default_factory=list)
    video: VideoSource | None = None
    enable_thinking: bool = False
    thinking_budget: int | None = None
    max_new_tokens: int = 1024
    min_pixels: int | None = None
    max_pixels: int | None = None
    num_frames: int | None = None
    system: str | None = None
    tools: Toolbox | None = None
    max_tool_calls: int = 8

    def check(self) -> None:
        """Raises RequestError, naming the argument."""
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError("prompt is empty")
        for placeholder in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
            if placeholder in self.prompt:
                raise RequestError(f"prompt holds {placeholder}; leave it out, images and video go before the prompt")
        if self.images and self.video is not None:
            raise RequestError(f"{len(self.images)} images and a video were given; a request takes one or the other")
        for name in ("max_new_tokens", "thinking_budget", "min_pixels", "max_pixels", "num_frames"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RequestError(f"{name} is {value!r}; it must be a whole number, at least 1")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise RequestError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if not isinstance(self.max_tool_calls, int) or self.max_tool_calls < 0:
            raise RequestError(f"max_tool_calls is {self.max_tool_calls!r}; it must be a whole number, at least 0")
        if self.thinking_budget is not None and not self.enable_thinking:
            raise RequestError("a thinking budget needs enable_thinking=True")

    def messages(self) -> list[dict]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return [*messages, user_message(self.prompt, self.images, self.video)]


REQUEST_NAMES = tuple(f.name for f in fields(Request))


def make_request(prompt: str, images: Iterable[ImageSource] = (), video: VideoSource | None = None, **options):
    """A checked `Request` and the options that are none of its fields (generation arguments).

    `enable_thinking_budget=True` sets the budget to `thinking_budget`, 2048 by default; False takes it away.
    """
    if (with_budget := options.pop("enable_thinking_budget", None)) is not None:
        options["thinking_budget"] = (
            (options.get("thinking_budget") or DEFAULT_THINKING_BUDGET) if with_budget else None
        )
    own = {name: options.pop(name) for name in REQUEST_NAMES if name in options}
    request = Request(prompt, list(images), video, **own)
    request.check()
    return request, options


def user_message(prompt: str, images: Iterable[ImageSource], video: VideoSource | None) -> dict:
    visuals = [{"type": "image", "image": image} for image in images]
    if video is not None:
        visuals.append({"type": "video", "video": video})
    return {"role": "user", "content": [*visuals, {"type": "text", "text": prompt}]}


@dataclass
class Prompt:
    """A request, encoded: the text's ids with negative markers, and its visuals."""

    request: Request
    text: str
    ids: list[int]
    pixels: list
    grids: list[Grid]
    images: list[Image.Image]

    @property
    def is_thinking(self) -> bool:
        """The reply begins inside a thinking block: the template opened it, or a budget will close it."""
        _, is_opened, tail = self.text.rpartition(TURN_BEGIN)[2].rpartition(THINK_BEGIN)
        return self.request.thinking_budget is not None or bool(is_opened) and THINK_END not in tail


class Ovis25Inference:
    """A loaded checkpoint that answers.

    Every method takes the fields of `Request` and transformers' generation arguments as keywords: `enable_thinking`,
    `enable_thinking_budget`, `thinking_budget`, `max_new_tokens`, `min_pixels`, `max_pixels`, `num_frames`, `system`,
    `tools`, `max_tool_calls`; `do_sample`, `temperature` (0: greedy), `top_p`, `top_k`, `repetition_penalty`,
    `stop_strings` and so on, whose defaults come from the checkpoint's `generation_config.json`.
    Text comes back as a string, the answer without its thinking; `return_thinking=True` gives the whole `Reply`.
    Images are paths, http(s) addresses, bytes or PIL; what is wrong with a request is a `RequestError` (a ValueError).

    Args:
        model_path: a folder (released, or trained here; an adapter's loads its base), a hub name, or `tiny`.
        base: the base model of an adapter, where the adapter's own name for it does not lead there.
        check_base: refuse a base with other weights than those that the adapter was trained on.
        device: "cuda", "cpu", ...; the GPU where there is one by default.
        torch_dtype: bfloat16 on a GPU that has it and float32 on a CPU by default.
        attn_implementation: the LLM's attention, as in transformers.
    """

    def __init__(
        self,
        model_path: str | Path,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        base: str | Path | None = None,
        check_base: bool = True,
    ):
        found = find_model(model_path, base, check_base)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if torch_dtype is None:
            torch_dtype = torch.float32
            if self.device.type == "cuda":
                torch_dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        arguments = {"attn_implementation": attn_implementation} if attn_implementation else {}
        self.model = Ovis2_5.from_pretrained(found.weights, dtype=torch_dtype, **arguments)
        if found.adapter:
            load_adapter(self.model, found.adapter)
        self.model.to(self.device).eval()
        self.processor = Ovis2_5Processor.from_pretrained(found.processor)
        self._set_up()

    @classmethod
    def from_parts(cls, model: Ovis2_5, processor: Ovis2_5Processor) -> "Ovis25Inference":
        """An engine around a model that is loaded already."""
        engine = cls.__new__(cls)
        engine.model, engine.processor, engine.device = model.eval(), processor, model.device
        engine._set_up()
        return engine

    def _set_up(self) -> None:
        tokenizer = self.processor.tokenizer
        self._call_begin, self._call_end, think_end = tokenizer.convert_tokens_to_ids(
            [TOOL_CALL_BEGIN, TOOL_CALL_END, THINK_END]
        )
        forced = tokenizer(EARLY_STOP_TEXT, add_special_tokens=False)["input_ids"]
        self._budget_tokens = BudgetTokens(think_end, forced)

    def single_image_inference(self, image: ImageSource, prompt: str, enable_thinking: bool = False, **options):
        """Answer a question about one image. Pixel budget: the trained one, else 448^2 to 1792^2."""
        return self._ask(prompt, images=[image], enable_thinking=enable_thinking, **options)

    def multi_image_inference(
        self, images: list[ImageSource], prompt: str, enable_thinking: bool = False, **options
    ):  # fmt: skip
        """Answer about several images, shown in order before the prompt. Budget: the trained one, else to 896^2."""
        if self.processor.limits.multiple_image_max_pixels == SINGLE_IMAGE_PIXELS[1]:
            options.setdefault("max_pixels", MULTIPLE_IMAGE_PIXELS[1])
        return self._ask(prompt, images=images, enable_thinking=enable_thinking, **options)

    def video_inference(self, video: VideoSource, prompt: str, enable_thinking: bool = False, **options):
        """Answer about a video file or a list of frames; `num_frames` (8) are taken, evenly spread."""
        return self._ask(prompt, video=video, enable_thinking=enable_thinking, **options)

    def text_only_inference(self, prompt: str, enable_thinking: bool = False, **options):
        """Answer a question without a picture."""
        return self._ask(prompt, enable_thinking=enable_thinking, **options)

    def grounding_inference(
        self, image: ImageSource, prompt: str, request_type: str = "box", parse: bool = False, **options
    ) -> str | Reply | Grounding:
        """Ask where something is; the request's sentence ("Please provide the bounding box coordinates.") is added.

        `request_type` is "box" or "point". `parse=True` gives a `Grounding`: boxes and points in pixels of the upright
        image, and `draw()`.
        """
        if request_type not in GROUNDING_PROMPTS:
            raise RequestError(f"request_type is {request_type!r}; it is one of {', '.join(GROUNDING_PROMPTS)}")
        sentence = GROUNDING_PROMPTS[request_type]
        if prompt.strip() and sentence not in prompt:
            prompt = f"{prompt.rstrip()}\n{sentence}"
        picture = self._opened(image)
        reply = self.single_image_inference(picture, prompt, **options)
        if not parse:
            return reply
        return parse_grounding(reply if isinstance(reply, str) else reply.answer, picture)

    def single_image_inference_streaming(
        self, image: ImageSource | None, prompt: str, enable_thinking: bool = False, **options
    ) -> ReplyStream:
        """Pieces of text as they are written, each with its `kind`; the `Reply` at the end. None: no image."""
        return self.stream(prompt, [] if image is None else [image], enable_thinking=enable_thinking, **options)

    def stream(
        self, prompt: str, images: Iterable[ImageSource] = (), video: VideoSource | None = None, **options
    ) -> ReplyStream:
        """As `single_image_inference_streaming`, for any kind of request. Bad input raises here, before any piece."""
        request, generation = make_request(prompt, images, video, **options)
        prompt = self.encode(request)
        return ReplyStream(self.stream_prompt(prompt, self.embed([prompt])[0], None, generation, Row(0)))

    def batch_inference(self, requests: list[Request | dict], return_thinking: bool = False, **options) -> list:
        """Answer requests of any mix of kinds; arguments and order as in `replies`."""
        replies = self.replies(requests, **options)
        return replies if return_thinking else [reply.answer for reply in replies]

    def chat(self, **options) -> Chat:
        """A conversation that keeps its history, see `Chat`; `options` hold for every turn."""
        return Chat(self, **options)

    def replies(self, requests: list[Request | dict], batch_size: int = 8, **options) -> list[Reply]:
        """The whole replies in the requests' order; a dict holds fields of `Request` (`image` for one image).

        `options` hold for all: generation arguments, and fields for the dicts that lack them. `batch_size` requests
        share each forward pass.

        Raises:
            RequestError: names the request by its index; raised before anything is generated.
        """
        prompts, generation = [], {k: v for k, v in options.items() if not is_field(k)}
        defaults = {k: v for k, v in options.items() if is_field(k)}
        for index, request in enumerate(requests):
            try:
                prompts.append(self.encode(as_request(request, defaults)))
            except RequestError as error:
                raise RequestError(f"request {index}: {error}") from error
        replies = []
        for start in range(0, len(prompts), batch_size):
            replies += self.reply_to(prompts[start : start + batch_size], generation)
        return replies

    def _ask(self, prompt: str, return_thinking: bool = False, **options) -> str | Reply:
        request, generation = make_request(prompt, **options)
        reply = self.reply_to([self.encode(request)], generation)[0]
        return reply if return_thinking else reply.answer

    request = staticmethod(make_request)

    def _opened(self, image: ImageSource) -> Image.Image:
        try:
            return self.processor.open_image(image)
        except ValueError as error:
            raise RequestError(f"image: {error}") from error

    def encode(self, request: Request) -> Prompt:
        """Read the visuals and tokenize. Raises RequestError."""
        request.check()
        text = self.processor.apply_chat_template(
            request.messages(), add_generation_prompt=True, enable_thinking=request.enable_thinking
        )
        images = [self._opened(image) for image in request.images]
        try:
            pixels, grids = self.processor.preprocess(
                images, request.video, (request.min_pixels, request.max_pixels), request.num_frames, raw_pixels=True
            )
        except ValueError as error:
            raise RequestError(f"{'video' if request.video is not None else 'image'}: {error}") from error
        ids = tokenize(self.processor.tokenizer, text, grids)[0]
        self.check_length(len(ids))
        return Prompt(request, text, ids, pixels, grids, images if request.tools else [])

    def check_length(self, length: int) -> None:
        longest = self.model.config.llm_config.max_position_embeddings
        if length >= longest:
            raise RequestError(
                f"the prompt takes {length} positions, the model has {longest}; shorten it, or lower max_pixels"
            )

    @torch.no_grad()
    def embed(self, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H) embeddings, left-padded, and the (B, T) mask, None where nothing is padded."""
        padded = self.processor.pad_left([prompt.ids for prompt in prompts])
        visuals = visual_tensors([p for x in prompts for p in x.pixels], [g for x in prompts for g in x.grids])
        visuals = {name: tensor.to(self.device) for name, tensor in visuals.items()}
        mask = padded["attention_mask"].to(self.device)
        embeds = self.model.get_inputs_embeds(padded["input_ids"].to(self.device), **visuals)
        return embeds, None if mask.all() else mask

    def reply_to(self, prompts: list[Prompt], generation: dict) -> list[Reply]:
        """One batch of encoded requests."""
        embeds, mask = self.embed(prompts)
        rows, traces = [Row(0) for _ in prompts], [[] for _ in prompts]
        generation = _checked(generation)
        if _is_other_search(generation):
            self._search(prompts, rows, embeds, mask, generation)
        else:
            for _ in self._steps(prompts, rows, traces, embeds, mask, None, generation):
                pass
        return [self._reply(*parts) for parts in zip(prompts, rows, traces, strict=True)]

    def stream_prompt(
        self, prompt: Prompt, embeds: torch.Tensor, cache: Cache | None, generation: dict, row: Row
    ) -> Iterator[Piece]:
        """Decode one prompt, whose embeddings follow what `cache` holds; returns the reply."""
        generation = _checked(generation)
        if _is_other_search(generation):
            raise RequestError("num_beams and other searches know the text only at the end and cannot be streamed")
        trace: list[ToolCall] = []
        transcript, num_read = Transcript(self.processor.tokenizer, prompt.is_thinking), 0
        for _ in self._steps([prompt], [row], [trace], embeds, None, cache, generation):
            yield from transcript.read(row.ids[num_read:])
            num_read = len(row.ids)
        yield from transcript.finish()
        return self._reply(prompt, row, trace)

    def _steps(self, prompts, rows, traces, embeds, mask, cache, generation) -> Iterator[None]:
        for prompt, row in zip(prompts, rows, strict=True):
            row.max_new_tokens, row.thinking_budget = self._room(prompt.request), prompt.request.thinking_budget
        if generation.get("cache_implementation") == "static" and any(prompt.request.tools for prompt in prompts):
            raise RequestError("cache_implementation='static' has no room for tool results; leave it out with tools")

        def on_token(index: int, token: int) -> Appended | None:
            if token == self._call_end and prompts[index].request.tools is not None:
                return self._call(prompts[index], rows[index], traces[index])
            return None

        return start_decoding(
            self.model, self.processor.tokenizer, rows, embeds, mask, self._budget_tokens, on_token, cache, **generation
        )

    def _room(self, request: Request) -> int:
        """How many new tokens a reply may have."""
        if request.thinking_budget is None:
            return request.max_new_tokens
        spent = request.thinking_budget + len(self._budget_tokens.early_stop)
        return request.max_new_tokens if request.max_new_tokens > spent else spent + request.max_new_tokens

    @torch.no_grad()
    def _call(self, prompt: Prompt, row: Row, trace: list[ToolCall]) -> Appended | None:
        """Run the call that the row has just ended."""
        request, tokenizer = prompt.request, self.processor.tokenizer
        if len(trace) > request.max_tool_calls:
            row.stop_reason = "tool_calls"
            return None
        begins = [index for index, token in enumerate(row.ids) if token == self._call_begin]
        call = tokenizer.decode(row.ids[begins[-1] + 1 : -1] if begins else []).strip()
        if len(trace) == request.max_tool_calls:
            result = f"Error: the limit of {request.max_tool_calls} calls is reached; answer without further calls"
        else:
            result = request.tools.run(
                call, [*prompt.images, *(c.result for c in trace if not isinstance(c.result, str))]
            )
        trace.append(ToolCall(call, result))
        if isinstance(result, str):
            return tool_result_ids(tokenizer, result), None
        # a crop is shown with the budget of the request's own images
        kind = "multiple_image" if len(request.images) > 1 else "single_image"
        budget = self.processor.complete_budget((request.min_pixels, request.max_pixels), kind)
        pixels, grids = self.processor.preprocess([result], None, budget, raw_pixels=True)
        ids = tool_result_ids(tokenizer, grids[0])
        visuals = {name: tensor.to(self.device) for name, tensor in visual_tensors(pixels, grids).items()}
        return ids, self.model.get_inputs_embeds(torch.tensor([ids], device=self.device), **visuals)[0]

    def _search(self, prompts, rows, embeds, mask, generation) -> None:
        """Beam search and its like, which transformers does whole."""
        for prompt in prompts:
            if prompt.request.thinking_budget is not None or prompt.request.tools is not None:
                raise RequestError("a thinking budget or tools need num_beams=1 and no other search")
        mask = mask if mask is not None else torch.ones(embeds.shape[:2], dtype=torch.int64, device=self.device)
        limit = max(prompt.request.max_new_tokens for prompt in prompts)
        output = self.model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=limit, tokenizer=self.processor.tokenizer,
            **generation,
        )  # fmt: skip
        stops = self.model.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops])
        for prompt, row, ids in zip(prompts, rows, output.tolist(), strict=True):
            ends = [index for index, token in enumerate(ids) if token in stops]
            row.ids = ids[: ends[0] + 1 if ends else len(ids)][: prompt.request.max_new_tokens]
            row.num_new = len(row.ids)
            row.stop_reason = "stop" if row.ids and row.ids[-1] in stops else "length"

    def _reply(self, prompt: Prompt, row: Row, trace: list[ToolCall]) -> Reply:
        tokenizer = self.processor.tokenizer
        transcript = Transcript(tokenizer, prompt.is_thinking)
        transcript.read(row.ids)
        return Reply(
            answer=transcript.answer(),
            thinking=transcript.thinking(),
            text=reply_text(tokenizer, row.ids),
            prompt_tokens=len(prompt.ids),
            thinking_tokens=transcript.num_thinking_tokens(),
            new_tokens=row.num_new,
            stop_reason=row.stop_reason,
            budget_forced=row.budget_forced,
            tool_calls=trace,
        )


def as_request(request: Request | dict, defaults: dict) -> Request:
    """A dict's fields over the defaults. Raises RequestError: an unknown field, or a value that cannot be."""
    if isinstance(request, Request):
        return request
    given = {**defaults, **request}
    if "image" in given:
        given["images"] = [given.pop("image"), *given.get("images", ())]
    if isinstance(given.get("tools"), (list, tuple)):
        given["tools"] = _named_tools(given["tools"])
    if unknown := [name for name in given if not is_field(name)]:
        raise RequestError(f"unknown field {', '.join(unknown)}; the fields are image, {', '.join(REQUEST_NAMES)}")
    return make_request(given.pop("prompt", ""), **given)[0]


def is_field(name: str) -> bool:
    return name in REQUEST_NAMES or name in ("image", "enable_thinking_budget")


def _named_tools(names: Iterable[str]) -> Toolbox:
    try:
        return toolbox(names)
    except ValueError as error:
        raise RequestError(f"tools: {error}") from error


def _checked(generation: dict) -> dict:
    """The generation arguments without those left at None, so that the checkpoint's hold. Raises RequestError."""
    given = {name: value for name, value in generation.items() if value is not None}
    if (temperature := given.get("temperature", 1.0)) < 0:
        raise RequestError(f"temperature is {temperature}; it must be at least 0 (0: greedy)")
    if temperature == 0:
        given.pop("temperature")
        given["do_sample"] = False
    if not 0 < (top_p := given.get("top_p", 1.0)) <= 1:
        raise RequestError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if (top_k := given.get("top_k", 0)) < 0:
        raise RequestError(f"top_k is {top_k}; it must be at least 0 (0: all)")
    if given.get("num_return_sequences", 1) != 1:
        raise RequestError("num_return_sequences must be 1: every request gets one reply; ask several times instead")
    return given


def _is_other_search(generation: dict) -> bool:
    return generation.get("num_beams", 1) > 1 or any(name in generation for name in _OTHER_SEARCHES)
