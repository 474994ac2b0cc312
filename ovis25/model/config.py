"""Ovis2.5's configuration: the released `config.json`, read and written back key for key."""

import copy

from transformers import PreTrainedConfig, Qwen3Config, __version__

from ovis25.constants import HIDDEN_STRIDE, MODEL_TYPE, NUM_INDICATORS, PATCH_SIZE

# What a configuration made from scratch writes beside its own values: the released files' other keys.
_RELEASED_KEYS = {
    "architectures": ["Ovis2_5"],
    "auto_map": {
        "AutoConfig": "configuration_ovis2_5.Ovis2_5_Config",
        "AutoModelForCausalLM": "modeling_ovis2_5.Ovis2_5",
    },
    "conversation_formatter_class": "Qwen3ConversationFormatter",
    "model_type": MODEL_TYPE,
}
_LLM_KEYS = (
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "max_window_layers", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "use_cache", "use_sliding_window", "vocab_size",
)  # fmt: skip
_VIT_KEYS = (
    "attention_dropout", "fullatt_block_indexes", "hidden_act", "hidden_size", "hidden_stride", "image_size",
    "intermediate_size", "layer_norm_eps", "model_type", "num_attention_heads", "num_channels", "num_hidden_layers",
    "num_patches", "patch_size", "preserve_original_pe", "temporal_patch_size", "use_rope", "window_size",
)  # fmt: skip

# Where a configuration came from, which transformers adds to what the file holds.
_NOT_SAVED = ("_name_or_path", "_commit_hash")


class SiglipNavitConfig(PreTrainedConfig):
    """The vision encoder's part of the configuration (`vit_config`), under the released names."""

    model_type = "siglip2_navit"
    base_config_key = "vit_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    num_patches: int = -1
    image_size: int = 512
    patch_size: int = PATCH_SIZE
    hidden_stride: int = HIDDEN_STRIDE
    temporal_patch_size: int = 1
    window_size: int = 112
    fullatt_block_indexes: list | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    use_rope: bool = True
    preserve_original_pe: bool = True


class Ovis2_5_Config(PreTrainedConfig):
    """The whole model's configuration.

    Args:
        llm_config: a `Qwen3Config` or its dict.
        vit_config: a `SiglipNavitConfig` or its dict.
        visual_vocab_size: rows of `vte.weight`, the four indicators included.
        hidden_size: width of the visual embeddings; must equal the LLM's.

    Saving starts from the keys of the file that was loaded and changes only what changed, so `rope_theta`,
    `torch_dtype` and the other released names survive transformers' renaming.

    Raises:
        ValueError: for a checkpoint that this model would compute wrongly; the message says why.
    """

    model_type = MODEL_TYPE
    sub_configs = {"llm_config": Qwen3Config, "vit_config": SiglipNavitConfig}

    llm_config: dict | PreTrainedConfig | None = None
    vit_config: dict | PreTrainedConfig | None = None
    visual_vocab_size: int = 65536
    hidden_size: int | None = None

    def __post_init__(self, **kwargs):
        _refuse_other_layouts(kwargs, self.llm_config, self.vit_config)
        if not isinstance(self.llm_config, PreTrainedConfig):
            self.llm_config = Qwen3Config(**(self.llm_config or {}))
        if not isinstance(self.vit_config, PreTrainedConfig):
            self.vit_config = SiglipNavitConfig(**(self.vit_config or {}))
        if self.hidden_size is None:
            self.hidden_size = self.llm_config.hidden_size
        _check_supported(self)
        super().__post_init__(**kwargs)
        self._base_dict, self._loaded_values = None, {}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._base_dict = {key: value for key, value in copy.deepcopy(config_dict).items() if key not in _NOT_SAVED}
        # of the file alone: what keyword arguments changed is written
        config._loaded_values = super().from_dict(config_dict)._released_values()
        return loaded

    def get_text_config(self, decoder=None, encoder=None):
        return self.llm_config

    def to_diff_dict(self):
        """The dict that `config.json` is written from: the loaded file's keys, with only what changed."""
        values, loaded = self._released_values(), self._loaded_values
        base = copy.deepcopy(self._base_dict or _RELEASED_KEYS)
        for path, value in values.items():
            if loaded.get(path, _ABSENT) != value:
                section = base.setdefault(path[0], {}) if len(path) == 2 else base
                section[path[-1]] = value
        base.setdefault("transformers_version", __version__)
        return base

    def _released_values(self) -> dict[tuple[str, ...], object]:
        """Every value under its released name: ("visual_vocab_size",) or ("llm_config", "rope_theta")."""
        values = {(key,): _released_value(self, key) for key in ("hidden_size", "visual_vocab_size", "torch_dtype")}
        for section, keys in (("llm_config", _LLM_KEYS), ("vit_config", _VIT_KEYS)):
            values |= {(section, key): _released_value(getattr(self, section), key) for key in keys}
        return values

    def _remove_keys_not_serialized(self, d):
        super()._remove_keys_not_serialized(d)
        d.pop("_base_dict", None)
        d.pop("_loaded_values", None)


_ABSENT = object()


def _released_value(config: PreTrainedConfig, key: str):
    """The value that the released name `key` has in `config`, which may keep it under transformers' newer name."""
    if key == "torch_dtype":
        return str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    if key == "rope_theta":
        return config.rope_parameters["rope_theta"]
    if key == "rope_scaling":
        scaling = {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"}
        return None if scaling.get("rope_type", "default") == "default" else scaling
    return getattr(config, key, None)


def _refuse_other_layouts(kwargs: dict, llm_config, vit_config) -> None:
    model_type = kwargs.get("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        raise ValueError(f"model_type is {model_type!r}; this package computes {MODEL_TYPE!r} checkpoints only")
    other = [key for key in ("text_config", "vision_config") if kwargs.get(key) is not None]
    if other:
        raise ValueError(
            f"config.json holds {' and '.join(other)}: this is the layout of the port under review in transformers, "
            "whose weights have other names. Use the released layout (llm_config and vit_config), "
            "for example AIDC-AI/Ovis2.5-2B or AIDC-AI/Ovis2.5-9B"
        )
    for section, config, expected in (
        ("llm_config", llm_config, Qwen3Config.model_type),
        ("vit_config", vit_config, SiglipNavitConfig.model_type),
    ):
        if isinstance(config, dict) and config.get("model_type", expected) != expected:
            raise ValueError(f"{section}.model_type is {config['model_type']!r}; Ovis2.5 needs {expected!r}")


def _check_supported(config: Ovis2_5_Config) -> None:
    llm, vit = config.llm_config, config.vit_config
    if vit.fullatt_block_indexes is not None:
        raise ValueError(
            f"vit_config.fullatt_block_indexes is {vit.fullatt_block_indexes}: windowed attention is not computed "
            "here. In the released Ovis2.5 checkpoints it is null (every layer attends to the whole frame)"
        )
    if not (vit.use_rope and vit.preserve_original_pe) or vit.temporal_patch_size != 1:
        raise ValueError(
            f"vit_config: use_rope={vit.use_rope}, preserve_original_pe={vit.preserve_original_pe}, "
            f"temporal_patch_size={vit.temporal_patch_size}; Ovis2.5 has true, true and 1"
        )
    if config.hidden_size != llm.hidden_size:
        raise ValueError(f"hidden_size {config.hidden_size} differs from llm_config.hidden_size {llm.hidden_size}")
    if vit.hidden_size % vit.num_attention_heads or (vit.hidden_size // vit.num_attention_heads) % 4:
        raise ValueError(
            f"vit_config: hidden_size {vit.hidden_size} over {vit.num_attention_heads} heads must give a head size "
            "that is a multiple of 4 (2-D rotary embedding)"
        )
    if config.visual_vocab_size <= NUM_INDICATORS:
        raise ValueError(f"visual_vocab_size {config.visual_vocab_size} must exceed the {NUM_INDICATORS} indicators")
