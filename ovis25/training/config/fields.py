"""Every key of a training config: what it means, what it may be, and what a run takes where it is not set.

Own keys are the fields of `TrainConfig`; every other key is a name of transformers' TrainingArguments, or of SFTConfig.
"""

import dataclasses
from dataclasses import dataclass, field

from ovis25.constants import MAX_IMAGE_MEGAPIXELS, MULTIPLE_IMAGE_PIXELS, SINGLE_IMAGE_PIXELS, VIDEO_PIXELS
from ovis25.training.config.kinds import Kind, kind_of
from ovis25.training.config.trainer_keys import TRAINER_KINDS, default_of
from ovis25.training.config.trl_keys import PASSED_ON

# values of train_sampling_strategy for which every length must be known
LENGTH_STRATEGIES = ("group_by_length", "batch_rebalance")
_PIXELS = {"least": 1, "most": 10**10}
_TOKENS = {"least": 1, "most": 10**8}
_FRAMES = {"least": 1, "most": 10**6}
_NO_FLOAT16 = " (float16 weights lose the optimizer's small steps; on a GPU take float32 and fp16: true)"


def _setting(default, help: str, **limits):
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass
class TrainConfig:
    """Every own key of a training config, `trainer`: the TrainingArguments that the file sets, `trl`: SFTConfig's."""

    model_path: str = _setting("", "checkpoint folder, hub name, or tiny (needs no download)")
    data_path: str = _setting("", "training samples: .json, .jsonl, datainfo:FILE:a|b, or tiny:train:NUMBER")
    eval_data_path: str | None = _setting(None, "evaluation samples, in the same forms; turns early stopping on")
    image_folder: str | None = _setting(None, "where relative image and video paths start (default: the data's folder)")
    output_dir: str = _setting("output", "the final model, checkpoints, plan and report")
    overwrite_output_dir: bool = _setting(False, "start over: delete the checkpoints of an earlier run in output_dir")

    resume_anyway: bool = _setting(False, "go on with the run in output_dir though its data, base or settings changed")
    on_nonfinite: str = _setting(
        "stop", "at a loss or gradient that is no number: stop, or skip that step's update", choices=("stop", "skip")
    )

    train_modules: str = _setting("all", "what is trained, with own learning rates: visual_tokenizer:1e-5|llm|vte:5e-6")
    freeze_vision_tower: bool = _setting(False, "never train visual_tokenizer.vit")
    freeze_llm: bool = _setting(False, "never train llm")
    recipe: str = _setting(
        "standard", "standard: transformers' Trainer, or trl: TRL's SFTTrainer", choices=("standard", "trl")
    )
    dtype: str | None = _setting(
        None,
        "weights in memory: float32 or bfloat16 (default: chosen for the device)",
        choices=("auto", "float32", "bfloat16"),
        cure=_NO_FLOAT16,
    )
    attn_implementation: str | None = _setting(None, "the LLM's attention: sdpa, eager, flash_attention_2, ...")

    gradient_checkpointing_towers: str = _setting(
        "both", "with gradient_checkpointing: both, llm, or vision alone", choices=("both", "llm", "vision")
    )
    compile_layers: bool = _setting(False, "torch.compile for the layers of both towers (GPU; slow first steps)")
    z_loss: float = _setting(0.0, "weight of the squared log-sum-exp of the logits in the loss", least=0)

    multimodal_max_length: int = _setting(8192, "tokens of a sample with visuals, at most", **_TOKENS)
    text_max_length: int = _setting(4096, "tokens of a text sample, at most", **_TOKENS)
    single_image_min_pixels: int = _setting(SINGLE_IMAGE_PIXELS[0], "pixel budget of one image", **_PIXELS)
    single_image_max_pixels: int = _setting(SINGLE_IMAGE_PIXELS[1], "pixel budget of one image", **_PIXELS)
    multiple_image_min_pixels: int = _setting(
        MULTIPLE_IMAGE_PIXELS[0], "pixel budget of each of several images", **_PIXELS
    )
    multiple_image_max_pixels: int = _setting(
        MULTIPLE_IMAGE_PIXELS[1], "pixel budget of each of several images", **_PIXELS
    )
    video_min_pixels: int = _setting(VIDEO_PIXELS[0], "pixel budget of each video frame", **_PIXELS)
    video_max_pixels: int = _setting(VIDEO_PIXELS[1], "pixel budget of each video frame", **_PIXELS)
    max_image_megapixels: float = _setting(
        MAX_IMAGE_MEGAPIXELS, "largest picture file; a larger JPEG is read reduced", above=0, most=10**6
    )
    min_frames: int = _setting(8, "frames taken of a video, at least", **_FRAMES)
    max_frames: int = _setting(8, "frames taken of a video, at most", **_FRAMES)
    on_bad_sample: str = _setting(
        "error", "error, or skip: leave defective samples out and list them", choices=("error", "skip")
    )
    on_long_sample: str = _setting(
        "shrink", "shrink (lower its pixel budget), skip, or error", choices=("shrink", "skip", "error")
    )
    packing: bool = _setting(False, "rows of whole samples, up to multimodal_max_length tokens; a batch counts rows")

    cache_visual_embeddings: bool = _setting(False, "frozen vision: compute every picture's embeddings once, then read")
    visual_cache_dir: str | None = _setting(None, "where they lie (default: visual_cache in output_dir); may be shared")

    use_lora: bool = _setting(False, "train a LoRA adapter on the frozen model; output_dir is then an adapter folder")
    lora_r: int = _setting(16, "rank of the adapter", least=1, most=2**16)
    lora_alpha: float = _setting(32, "its scale: lora_alpha / lora_r (rsLoRA: / sqrt(lora_r))", above=0)
    lora_dropout: float = _setting(0.0, "dropout before the adapter", least=0, below=1)
    lora_target_modules: str | list = _setting("llm", "llm, vision, all-linear, or layer names such as q_proj,v_proj")
    lora_modules_to_save: str | list | None = _setting(None, "modules trained whole beside the adapter: vte, ...")
    apply_lora_to_vision: bool = _setting(False, "adapters in the vision encoder too")
    use_rslora: bool = _setting(False, "rank-stabilised LoRA")
    use_dora: bool = _setting(False, "weight-decomposed LoRA")
    qlora: bool = _setting(False, "the frozen LLM in 4 bits (needs a CUDA GPU and bitsandbytes)")

    early_stopping_patience: int | None = _setting(
        None,
        "evaluations without improvement before stopping; 0: never (default: 3 with an evaluation set)",
        least=0,
        most=10**9,
    )
    early_stopping_threshold: float = _setting(0.0, "the least decrease of the evaluation loss that counts", least=0)
    exam: bool = _setting(False, "tiny only: answer held-out questions at the end")

    trainer: dict = field(default_factory=dict)
    trl: dict = field(default_factory=dict)
    config_dir: str = ""
    notes: list[str] = field(default_factory=list)
    # new name -> the older one that the user wrote
    spelled: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The flat dict that is saved with the model and can be read as a config again."""
        own = {name: getattr(self, name) for name in OWN_KEYS}
        return {**own, **self.trainer, **self.trl}

    def value(self, name: str):
        """What the run takes for a key of TrainingArguments: the config's value, else the default.

        Defaults that depend on the machine or on the number of steps are chosen later (`build.training_arguments`).
        """
        given = self.trainer.get(name)
        return default_of(name) if given is None else given

    @property
    def given_trainer(self) -> dict:
        """The keys of TrainingArguments that the user set; null means the default, so it sets nothing."""
        return {name: value for name, value in self.trainer.items() if value is not None}


OWN_KEYS = {f.name: f for f in dataclasses.fields(TrainConfig) if "help" in f.metadata}
KINDS: dict[str, Kind] = {
    **{name: kind_of(f.type, f.default, **f.metadata["limits"]) for name, f in OWN_KEYS.items()},
    **TRAINER_KINDS,
    **PASSED_ON,
}
LORA_KEYS = [name for name in OWN_KEYS if name != "use_lora" and ("lora" in name or name == "use_dora")]
