"""Ovis2.5: a vision encoder whose patches become soft visual words, put among the words of a Qwen3.

Shapes: B batch, T positions, H LLM width, N patches, K numbers per patch, M visual tokens, V vocabulary.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ovis25.checkpoint import CheckpointError, copy_side_files, hub_arguments, resolve_checkpoint
from ovis25.constants import INDICATOR_IDS, NUM_INDICATORS, PIXEL_TABLE, VISUAL_ATOM_ID
from ovis25.files import follow_umask
from ovis25.model.attention import PACKED_ATTENTION, Segments
from ovis25.model.config import Ovis2_5_Config
from ovis25.model.llm import build_llm
from ovis25.model.loss import next_token_loss
from ovis25.model.visual_tokenizer import VisualEmbedding, VisualTokenizer
from ovis25.weights import check_weights

LM_HEAD = "llm.lm_head.weight"
# arguments with which other weights are loaded than those that lie in the folder under the model's names
_OTHER_WEIGHTS = ("variant", "state_dict", "key_mapping", "ignore_mismatched_sizes", "subfolder", "gguf_file")


@dataclass
class Ovis2_5_Output(CausalLMOutputWithPast):
    """`loss` with labels; `logits` (B, T, V), or None where they were not needed; the KV cache.

    `token_metrics`: see `next_token_loss`.
    """

    token_metrics: torch.Tensor | None = None


class Ovis2_5(PreTrainedModel, GenerationMixin):
    """The whole model, under the released weight names."""

    config_class = Ovis2_5_Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["Qwen3DecoderLayer", "EncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # whose layers are computed again in the backward pass where gradient checkpointing is on
    checkpointed_towers = ("vision", "llm")

    def __init__(self, config: Ovis2_5_Config):
        super().__init__(config)
        self.llm = build_llm(config.llm_config)
        self.visual_tokenizer = VisualTokenizer(config)
        self.vte = VisualEmbedding(config.visual_vocab_size, config.hidden_size)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a folder or a hub name in the released layout; arguments as in transformers.

        Raises:
            FileNotFoundError: no such folder, or the hub cannot be reached; names where it looked.
            CheckpointError: weights that are missing, cut, or not of this model: nothing is half loaded.
            ValueError: a config that this model would compute wrongly.
        """
        with_info = kwargs.pop("output_loading_info", False)
        folder = resolve_checkpoint(pretrained_model_name_or_path, **hub_arguments(kwargs))
        if not any(kwargs.get(name) for name in _OTHER_WEIGHTS):
            check_stored_weights(folder, Ovis2_5_Config.from_pretrained(folder))
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        for kind in ("missing", "unexpected", "mismatched"):
            if names := sorted(map(str, info[f"{kind}_keys"])):
                if kind == "mismatched" and kwargs.get("ignore_mismatched_sizes"):
                    continue
                raise CheckpointError(f"{folder}: {len(names)} weights are {kind}: {', '.join(names[:3])}")
        # loading makes every parameter trainable again
        model.visual_tokenizer.vit.vision_model.post_layernorm.requires_grad_(False)
        model.base_folder = folder
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write the released layout: weights, `config.json`, and the side files of the folder this model came from."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        follow_umask(*Path(save_directory).glob("*.safetensors"))
        if state_dict := kwargs.get("state_dict"):
            # the weights that were written, which may have another dtype than those in memory
            written = copy.deepcopy(self.config)
            written.dtype = next(value.dtype for value in state_dict.values() if value.is_floating_point())
            written.save_pretrained(save_directory)
        if getattr(self, "base_folder", None):
            copy_side_files(self.base_folder, save_directory)

    def _init_weights(self, module):
        """Random weights for a model made from scratch; the LLM initialises its own."""
        std = self.config.llm_config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.llm.set_output_embeddings(new_embeddings)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        super()._set_gradient_checkpointing(*args, **kwargs)
        for tower, module in (("vision", self.visual_tokenizer), ("llm", self.llm)):
            if tower not in self.checkpointed_towers:
                for layer in module.modules():
                    if hasattr(layer, "gradient_checkpointing"):
                        layer.gradient_checkpointing = False

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each layer of both towers, for any number of rows; the first steps take minutes longer.

        Layers alone, because what surrounds them (chunks, segments) is Python that differs from batch to batch.
        """
        for layer in (*self.visual_tokenizer.vit.vision_model.encoder.layers, *self.llm.model.layers):
            layer.compile(dynamic=True, backend=backend)

    def get_visual_embeddings(self, pixel_values: torch.Tensor, grid_thws: torch.Tensor) -> torch.Tensor:
        """(N, K) pixels and (images, 3) grids -> (M, H), in the order of `grid_thws`.

        Pixels are the released float values, or bytes (uint8), which are turned into the same values here.
        """
        grids = [tuple(grid) for grid in grid_thws.tolist()]
        num_patches = sum(t * h * w for t, h, w in grids)
        if num_patches != len(pixel_values):
            raise ValueError(
                f"grid_thws {grids} describe {num_patches} patches, but pixel_values has {len(pixel_values)} rows"
            )
        if pixel_values.dtype == torch.uint8:
            table = torch.from_numpy(PIXEL_TABLE).to(pixel_values.device)
            pixel_values = table.index_select(0, pixel_values.flatten().int()).view(pixel_values.shape)
        # the words come out of a call, so that sharded weights (ZeRO-3) are gathered once for all chunks
        words_VH = self.vte(None)
        return self.visual_tokenizer(pixel_values.to(words_VH.dtype), grids, words_VH)

    def get_inputs_embeds(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        grid_thws: torch.Tensor | None = None,
        touch_vision: bool = False,
        visual_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed text, indicators and visual atoms: (B, T) ids with negative markers -> (B, T, H).

        `visual_embeds` (M, H), in the order of the visual positions, stand for `pixel_values` where they are known;
        (0, H) for a batch without visuals says that none are computed in any batch.

        While training, or with `touch_vision`, any other batch without visuals still runs four dummy patches whose
        result counts zero: every rank of a distributed run must touch the same parameters.

        Raises:
            ValueError: where the visual positions and the visual embeddings differ in number.
        """
        is_atom = input_ids == VISUAL_ATOM_ID
        is_indicator = (input_ids <= INDICATOR_IDS[0]) & (input_ids >= INDICATOR_IDS[-1])
        num_atoms, num_indicators, num_markers = (
            int(count) for count in torch.stack([is_atom.sum(), is_indicator.sum(), (input_ids < 0).sum()]).tolist()
        )
        if num_atoms + num_indicators != num_markers:
            unknown = input_ids[(input_ids < 0) & ~is_atom & ~is_indicator].unique().tolist()
            raise ValueError(f"input_ids holds negative ids that mark nothing: {unknown} (visual markers: -300..-304)")

        embeds = self.llm.get_input_embeddings()(input_ids.clamp(min=0))
        first_row = self.vte.num_embeddings - NUM_INDICATORS
        indicators = self.vte(first_row + INDICATOR_IDS[0] - input_ids[is_indicator])
        embeds = _put_rows(embeds, is_indicator, indicators)
        if pixel_values is not None:
            visual_embeds = self.get_visual_embeddings(pixel_values, grid_thws)
        if visual_embeds is not None:
            if num_atoms != len(visual_embeds):
                raise ValueError(
                    f"input_ids has {num_atoms} visual positions, but the visual inputs give {len(visual_embeds)} "
                    "embeddings. Each image or video takes t*h*w/4 positions; was the sequence cut?"
                )
            return _put_rows(embeds, is_atom, visual_embeds)
        if num_atoms:
            raise ValueError(
                f"input_ids has {num_atoms} visual positions, but there are 0 visual embeddings: "
                "pixel_values is missing"
            )
        return embeds + self._dummy_visual(input_ids.device) if self.training or touch_vision else embeds

    def _dummy_visual(self, device: torch.device) -> torch.Tensor:
        vit = self.config.vit_config
        pixels = torch.zeros(vit.hidden_stride**2, vit.num_channels * vit.patch_size**2, device=device)
        grid = torch.tensor([[1, vit.hidden_stride, vit.hidden_stride]], device=device)
        return self.get_visual_embeddings(pixels, grid).sum() * 0.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        grid_thws: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        sequence_lengths: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_type: str = "nll",
        with_token_metrics: bool = False,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> Ovis2_5_Output:
        """Run the model.

        Args:
            input_ids: (B, T) int64, with the released negative markers at visual positions.
            attention_mask: (B, T), 1 for real positions; padding may stand on either side.
            pixel_values: (N, K) patches of all visual inputs of the batch, in order.
            grid_thws: (images, 3) int64, frames, height and width in patches.
            labels: (B, T) int64, -100 where nothing is learned; shifted inside.
            inputs_embeds: (B, T, H) instead of `input_ids`.
            sequence_lengths: (S,) int64, for one row (B = 1) made of S whole sequences: attention stays inside each,
                and `position_ids` start again at 0 in each. The first label of each must be -100. Takes no
                attention_mask.
            visual_embeds: (M, H) in the order of the visual positions, instead of `pixel_values`.
            num_items_in_batch, label_smoothing, z_loss, loss_type, with_token_metrics: see `next_token_loss`.
            skip_logits: compute no logits beside the loss's own; the default while training with labels.
        """
        if inputs_embeds is None:
            # an evaluation gathers sharded weights just as training does
            inputs_embeds = self.get_inputs_embeds(
                input_ids, pixel_values, grid_thws, labels is not None, visual_embeds
            )
        if sequence_lengths is not None:
            kwargs["segments"] = self._segments(sequence_lengths, inputs_embeds, attention_mask, past_key_values)
            # taken as it is: no mask is made
            attention_mask = {"full_attention": None}
            if position_ids is None:
                position_ids = torch.cat([torch.arange(n, device=inputs_embeds.device) for n in sequence_lengths])[None]
        if self.training and labels is not None and use_cache is None:
            use_cache = False
        outputs = self.llm.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_BTH = outputs.last_hidden_state
        loss = logits = metrics = None
        if labels is not None:
            loss, metrics = next_token_loss(
                hidden_BTH, labels, self.llm.lm_head, num_items_in_batch,
                label_smoothing, z_loss, loss_type, with_token_metrics,
            )  # fmt: skip
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.llm.lm_head(hidden_BTH[:, kept])
        return Ovis2_5_Output(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_metrics=metrics,
        )

    def _segments(self, sequence_lengths, inputs_embeds, attention_mask, past_key_values) -> Segments:
        """The sequences of a packed row; from now on the LLM's attention is the one that knows them.

        Raises:
            ValueError: what a packed row cannot have.
        """
        lengths, llm = sequence_lengths.tolist(), self.llm.config
        if inputs_embeds.shape[:2] != (1, sum(lengths)):
            raise ValueError(
                f"sequence_lengths {lengths} describe one row of {sum(lengths)} positions, but the batch is "
                f"{tuple(inputs_embeds.shape[:2])}"
            )
        if attention_mask is not None or past_key_values is not None:
            raise ValueError("a packed row (sequence_lengths) takes neither attention_mask nor past_key_values")
        if llm._attn_implementation not in ("sdpa", PACKED_ATTENTION):
            raise ValueError(
                f"packed rows need the LLM's attn_implementation to be sdpa, not {llm._attn_implementation} "
                "(torch's own FlashAttention runs behind it on CUDA)"
            )
        if llm.attention_dropout and self.training or set(llm.layer_types) != {"full_attention"}:
            raise ValueError("packed rows need llm_config.attention_dropout 0 and full attention in every layer")
        llm._attn_implementation = PACKED_ATTENTION
        return Segments(lengths, inputs_embeds.device)

    @torch.no_grad()
    def generate(self, input_ids=None, attention_mask=None, pixel_values=None, grid_thws=None, **kwargs):
        """transformers' `generate`, over the embeddings of text and visuals.

        As in the released code, only new tokens count for the repetition penalty and other logits processors.
        Returns new tokens appended to `input_ids` (B, T + new), as transformers does; markers stay negative.
        A left-padded batch needs `attention_mask`.
        """
        if kwargs.get("inputs_embeds") is None:
            if input_ids is None:
                raise ValueError("generate needs input_ids (with pixel_values and grid_thws for visuals)")
            kwargs["inputs_embeds"] = self.get_inputs_embeds(input_ids, pixel_values, grid_thws)
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
        with warnings.catch_warnings():
            # that the penalties see new tokens alone is the released behaviour
            warnings.filterwarnings("ignore", message="Passing `.*` with `inputs_embeds`")
            output = super().generate(attention_mask=attention_mask, **kwargs)
        if input_ids is None:
            return output
        if isinstance(output, torch.Tensor):
            return torch.cat([input_ids.repeat_interleave(len(output) // len(input_ids), 0), output], dim=1)
        repeats = len(output.sequences) // len(input_ids)
        output.sequences = torch.cat([input_ids.repeat_interleave(repeats, 0), output.sequences], dim=1)
        return output


def check_stored_weights(folder: Path, config: Ovis2_5_Config) -> None:
    """Look through a folder's weights, by their headers, for exactly the tensors that the config describes.

    Raises:
        CheckpointError: see `check_weights`. Weights that a library has quantized have its own names and are not
            compared.
    """
    if getattr(config, "quantization_config", None) is None:
        check_weights(folder, weight_shapes(config), may_have=(LM_HEAD,))


def weight_shapes(config: Ovis2_5_Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model saves; a tied output layer is the embedding and not repeated."""
    with torch.device("meta"):
        model = Ovis2_5(copy.deepcopy(config))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.llm_config.tie_word_embeddings:
        shapes.pop(LM_HEAD, None)
    return shapes


def _put_rows(embeds_BTH: torch.Tensor, places_BT: torch.Tensor, rows_RH: torch.Tensor) -> torch.Tensor:
    """`embeds_BTH` with the rows at `places_BT` (R of them are true), in order, replaced."""
    flat = embeds_BTH.flatten(0, 1)
    return flat.index_copy(0, places_BT.flatten().nonzero()[:, 0], rows_RH.to(flat.dtype)).view_as(embeds_BTH)
