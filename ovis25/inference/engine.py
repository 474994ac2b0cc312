"""Ask a model: one picture, several, a video, or text alone; single, streamed, or in batches of any mix."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ovis25.constants import (
    MULTIPLE_IMAGE_PIXELS,
    SINGLE_IMAGE_PIXELS,
)
from ovis25.generate import Engine, GenerationOptions, Prompt, Sequence
from ovis25.generate.transcript import Piece, Reply, ReplyStream, Transcript
from ovis25.inference.batches import batches
from ovis25.inference.chat import Chat
from ovis25.inference.checks import check_flag, check_text, check_whole, refuse, shown
from ovis25.inference.generation import check_combination, check_generation, is_other_search
from ovis25.inference.grounding import GROUNDING_PROMPTS, Grounding, check_coordinates, parse_grounding
from ovis25.inference.prompt import Question, check_length, encode_request, opened, visual_budget
from ovis25.inference.request import Request, RequestError, as_request, make_request, split_options
from ovis25.loading import find_model
from ovis25.model import Ovis2_5
from ovis25.model.adapter import load_adapter
from ovis25.processing import Ovis2_5Processor
from ovis25.processing.image import ImageSource
from ovis25.processing.processor import VideoSource, visual_tensors


class Ovis25Inference:
    """A loaded checkpoint that answers.

    Every method takes the fields of `Request` and transformers' generation arguments as keywords: `enable_thinking`,
    `enable_thinking_budget`, `thinking_budget`, `max_new_tokens`, `min_pixels`, `max_pixels`, `num_frames`, `system`,
    `tools`, `max_tool_calls`; `do_sample`, `temperature` (0: greedy), `top_p`, `top_k`, `repetition_penalty`,
    `stop_strings`, `seed` and so on, whose defaults come from the checkpoint's `generation_config.json`.
    Text comes back as a string, the answer without its thinking; `return_thinking=True` gives the whole `Reply`.
    Images are paths, http(s) addresses, data: URLs, bytes or PIL; what is wrong with a request is a `RequestError` (a
    ValueError).

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
        self.core = Engine(self.model, self.processor)

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
        if video is None:
            raise refuse("video", video, "a path, or a list of pictures (its frames)")
        return self._ask(prompt, video=video, enable_thinking=enable_thinking, **options)

    def text_only_inference(self, prompt: str, enable_thinking: bool = False, **options):
        """Answer a question without a picture."""
        return self._ask(prompt, enable_thinking=enable_thinking, **options)

    def grounding_inference(
        self,
        image: ImageSource,
        prompt: str,
        request_type: str = "box",
        parse: bool = False,
        coordinates: str | None = None,
        **options,
    ) -> str | Reply | Grounding:
        """Ask where something is; the request's sentence ("Please provide the bounding box coordinates.") is added.

        `request_type` is "box" or "point". `parse=True` gives a `Grounding`: boxes and points in pixels of the upright
        image, `problems`, and `draw()`. `coordinates`: see `parse_grounding`.
        """
        if not isinstance(request_type, str) or request_type not in GROUNDING_PROMPTS:
            raise RequestError(f"request_type is {shown(request_type)}; it is one of {', '.join(GROUNDING_PROMPTS)}")
        check_flag("parse", parse)
        check_coordinates(coordinates)
        check_text("prompt", prompt)
        sentence = GROUNDING_PROMPTS[request_type]
        if prompt.strip() and sentence not in prompt:
            prompt = f"{prompt.rstrip()}\n{sentence}"
        picture = opened(self.processor, image)
        reply = self.single_image_inference(picture, prompt, **options)
        if not parse:
            return reply
        return parse_grounding(reply if isinstance(reply, str) else reply.answer, picture, coordinates)

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
        prompt = self.encode(request, generation)
        return self.stream_prompt(prompt, generation)

    def batch_inference(self, requests: list[Request | dict], return_thinking: bool = False, **options) -> list:
        """Answer requests of any mix of kinds; arguments and order as in `replies`."""
        check_flag("return_thinking", return_thinking)
        replies = self.replies(requests, **options)
        return replies if return_thinking else [reply.answer for reply in replies]

    def chat(self, **options) -> Chat:
        """A conversation that keeps its history, see `Chat`; `options` hold for every turn."""
        return Chat(self, **options)

    def replies(self, requests: list[Request | dict], batch_size: int = 8, **options) -> list[Reply]:
        """The whole replies in the requests' order; a dict holds fields of `Request` (`image` for one image).

        `options` hold for all: generation arguments, and fields for the dicts that lack them. A request's own
        generation arguments win. `batch_size` requests share each forward pass; where one has ended, the next begins.
        A reply does not depend on its neighbours.

        Raises:
            RequestError: names the request by its index; raised before anything is generated.
        """
        check_whole("batch_size", batch_size, 1)
        if not isinstance(requests, (list, tuple)):
            raise RequestError(f"requests is {shown(requests)}; it must be a list of requests")
        defaults, generation = split_options(options)
        # what is wrong for all is no fault of the first request
        make_request("all", **generation)
        prompts = []
        for index, request in enumerate(requests):
            try:
                prompts.append(self.encode(as_request(request, defaults), generation))
            except RequestError as error:
                raise RequestError(f"request {index}: {error}") from error
        return self.reply_to(prompts, generation, batch_size)

    def _ask(self, prompt: str, return_thinking: bool = False, **options) -> str | Reply:
        check_flag("return_thinking", return_thinking)
        request, generation = make_request(prompt, **options)
        reply = self.reply_to([self.encode(request, generation)], generation)[0]
        return reply if return_thinking else reply.answer

    request = staticmethod(make_request)

    @property
    def longest(self) -> int:
        """How many positions the model has."""
        return self.model.config.llm_config.max_position_embeddings

    def encode(self, request: Request, generation: dict | None = None) -> Question:
        """Read the visuals and tokenize; with the call's generation arguments also check that they fit the request.

        Raises:
            RequestError: what is wrong with it, before anything is generated.
        """
        if not isinstance(request, Request):
            raise RequestError(f"the request is {shown(request)}; engine.request(...) makes one")
        request.check()
        if generation is not None:
            check_combination(request, self._generation(request, generation))
        return encode_request(self.processor, request, self.longest)

    def check_length(self, length: int) -> None:
        check_length(length, self.longest)

    def _generation(self, request: Request, generation: dict) -> dict:
        """The call's generation arguments with the request's own over them, ready for transformers."""
        own = {name: value for name, value in request.generation.items() if value is not None}
        return check_generation({**generation, **own}, len(self.model.get_input_embeddings().weight))

    @torch.no_grad()
    def embed(self, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H) embeddings, left-padded, and the (B, T) mask, None where nothing is padded."""
        padded = self.processor.pad_left([prompt.ids for prompt in prompts])
        visuals = visual_tensors([p for x in prompts for p in x.pixels], [g for x in prompts for g in x.grids])
        visuals = {name: tensor.to(self.device) for name, tensor in visuals.items()}
        mask = padded["attention_mask"].to(self.device)
        embeds = self.model.get_inputs_embeds(padded["input_ids"].to(self.device), **visuals)
        return embeds, None if mask.all() else mask

    def reply_to(self, prompts: list[Question], generation: dict, batch_size: int | None = None) -> list[Reply]:
        """The replies to encoded requests, `batch_size` (all) of which are written at once."""
        batch_size = batch_size or len(prompts)
        chosen = [self._generation(prompt.request, generation) for prompt in prompts]
        searched = [index for index, one in enumerate(chosen) if is_other_search(one)]
        written = [index for index in range(len(prompts)) if index not in searched]
        replies = self._write([prompts[i] for i in written], [chosen[i] for i in written], batch_size)
        found = dict(zip(written, replies, strict=True))
        for indices in batches([prompts[index] for index in searched], batch_size):
            places = [searched[index] for index in indices]
            replies = self._search([prompts[place] for place in places], chosen[places[0]])
            found |= zip(places, replies, strict=True)
        return [found[index] for index in range(len(prompts))]

    def _write(self, prompts: list[Question], generations: list[dict], batch_size: int) -> list[Reply]:
        if not prompts:
            return []
        core = self._core(generations[0], batch_size)
        options = [self._options(prompt.request, one) for prompt, one in zip(prompts, generations, strict=True)]
        for one in options:
            core.check(one)
        sequences = [core.add(prompt, one) for prompt, one in zip(prompts, options, strict=True)]
        core.run(sequences)
        return [sequence.reply(self.processor.tokenizer) for sequence in sequences]

    def stream_prompt(
        self, prompt: Question, generation: dict, on_end: Callable[[Sequence], None] | None = None
    ) -> ReplyStream:
        """One encoded request, piece by piece; its arguments are checked now.

        `on_end` gets the sequence, with its KV cache, once it has ended or was given up.
        """
        chosen = self._generation(prompt.request, generation)
        if is_other_search(chosen):
            raise RequestError("num_beams and other searches know the text only at the end and cannot be streamed")
        core, options = self._core(chosen, 1), self._options(prompt.request, chosen)
        core.check(options)
        stream = ReplyStream()
        stream.pieces = self._pieces(core, prompt, options, on_end, stream)
        return stream

    def _pieces(self, core: Engine, prompt: Question, options, on_end, stream: ReplyStream) -> Iterator[Piece]:
        sequence = core.add(prompt, options, keeps_cache=on_end is not None)
        transcript = Transcript(self.processor.tokenizer, prompt.is_thinking)
        try:
            for ids in core.stream(sequence):
                yield from transcript.read(ids)
        finally:
            core.abort(sequence)
            if on_end is not None:
                on_end(sequence)
        yield from transcript.finish()
        stream.reply = sequence.reply(self.processor.tokenizer)

    def _core(self, generation: dict, num_rows: int) -> Engine:
        """The engine's own core; a static cache, whose rows begin together, takes one for itself."""
        is_static = generation.get("cache_implementation") == "static"
        core = Engine(self.model, self.processor, is_static=True) if is_static else self.core
        core.scheduler.max_rows = num_rows
        return core

    def _options(self, request: Request, generation: dict) -> GenerationOptions:
        """How the reply to a request is written; `generation` is checked, and the whole of it."""
        sampling = {name: value for name, value in generation.items() if name not in ("seed", "cache_implementation")}
        return GenerationOptions(
            thinking_budget=request.thinking_budget,
            max_new_tokens=request.max_new_tokens,
            sampling=sampling,
            seed=generation.get("seed"),
            tools=request.tools,
            max_tool_calls=request.max_tool_calls,
            # a crop is shown with the budget of the request's own images
            tool_pixels=visual_budget(self.processor, request),
        )

    @torch.no_grad()
    def _search(self, prompts: list[Question], generation: dict) -> list[Reply]:
        """Beam search and its like, which transformers does whole."""
        for prompt in prompts:
            check_combination(prompt.request, generation)
        embeds, mask = self.embed(prompts)
        mask = mask if mask is not None else torch.ones(embeds.shape[:2], dtype=torch.int64, device=self.device)
        limit = min(max(prompt.request.max_new_tokens for prompt in prompts), self.longest)
        try:
            output = self.model.generate(
                inputs_embeds=embeds, attention_mask=mask, max_new_tokens=limit, tokenizer=self.processor.tokenizer,
                **generation,
            )  # fmt: skip
        except (ValueError, TypeError, NotImplementedError) as error:
            raise RequestError(f"generation arguments: {error}") from error
        return [self._found(prompt, ids) for prompt, ids in zip(prompts, output.tolist(), strict=True)]

    def _found(self, prompt: Question, ids: list[int]) -> Reply:
        """The reply that a search has found, without what stands behind its end."""
        stops = self.model.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops])
        ends = [index for index, token in enumerate(ids) if token in stops]
        found = Sequence(self._options(prompt.request, {}), prompt)
        for token in ids[: ends[0] + 1 if ends else len(ids)][: prompt.request.max_new_tokens]:
            found.write(token)
        found.stop_reason = "stop" if found.ids and found.ids[-1] in stops else "length"
        return found.reply(self.processor.tokenizer)
