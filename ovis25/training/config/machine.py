"""What a config asks of this machine: packages, backends. Looked for before data and weights are touched."""

import importlib.util
import os
import re

import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import get_token
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ovis25.text import nearest, shorten
from ovis25.training.config.fields import TrainConfig
from ovis25.training.config.kinds import ConfigError

# names of optim that begin so or hold this -> (module, what pip calls it)
_OPTIMIZER_PACKAGES = {
    "8bit|bnb|paged|lion|ademamix": ("bitsandbytes", "bitsandbytes"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit|adamw_torch_8bit": ("torchao", "torchao"),
    "anyprecision": ("torchdistx", "torchdistx"),
    "xla": ("torch_xla", "torch-xla"),
    "npu": ("torch_npu", "torch-npu"),
}
_PLAIN_OPTIMIZER = "adamw_torch_fused"
# names of report_to -> modules, one of which must be there, and what pip calls it
_REPORTERS = {
    "azure_ml": (("azureml",), "azureml-core"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "flyte": (("flytekit",), "flytekit"),
}
_ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
_ATTENTIONS = ("sdpa", "eager", "flex_attention", *_ATTENTION_PACKAGES)


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_machine(config: TrainConfig) -> None:
    """Every package and backend that the config asks for is there.

    Raises:
        ConfigError: it is not; the message has the key, its value and the command that installs it.
    """
    _check_optimizer(config)
    _check_reporters(config)
    _check_attention(config)
    _check_compiler(config)
    _check_processes(config)
    if config.recipe == "trl" and not has_package("trl"):
        raise ConfigError("recipe is 'trl', which needs TRL: pip install 'ovis25[trl]'")
    if config.qlora and config.use_lora:
        if not torch.cuda.is_available():
            raise ConfigError("qlora needs a CUDA GPU, and this machine has none; train LoRA without it (qlora: false)")
        _need(("bitsandbytes",), "qlora is true, which", "'ovis25[qlora]'")
    if config.value("push_to_hub") and not (config.value("hub_token") or get_token()):
        raise ConfigError("push_to_hub is true, but there is no access token; run hf auth login, or remove it")


def _need(modules: tuple[str, ...], what: str, pip_name: str, otherwise: str = "") -> None:
    if not any(has_package(module) for module in modules):
        raise ConfigError(f"{what} needs {modules[0]}, which is not installed: pip install {pip_name}{otherwise}")


def _check_optimizer(config: TrainConfig) -> None:
    optim = getattr(config.value("optim"), "value", config.value("optim"))
    for names, (module, pip_name) in _OPTIMIZER_PACKAGES.items():
        is_torchao = optim.startswith("adamw_torch_") and module == "bitsandbytes"
        if re.search(names, optim) and not is_torchao:
            _need((module,), f"optim {optim}", pip_name, f', or take "optim": "{_PLAIN_OPTIMIZER}"')


def _check_reporters(config: TrainConfig) -> None:
    named = config.value("report_to")
    for name in named if isinstance(named, list) else [named]:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            guess = nearest(name, INTEGRATION_TO_CALLBACK)
            hint = f"did you mean {guess}?" if guess else f"choose of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise ConfigError(f"report_to is {shorten(name)}, which nobody knows; {hint}, or none")
        modules, pip_name = _REPORTERS.get(name, ((name,), name))
        _need(modules, f"report_to {name}", pip_name, ', or take "report_to": "none"')


def _check_attention(config: TrainConfig) -> None:
    name = config.attn_implementation
    if name is None:
        return
    if "/" in name:
        # a kernel of the hub
        _need(("kernels",), f"attn_implementation {name}", "kernels", ", or use sdpa")
        return
    if name not in _ATTENTIONS:
        guess = nearest(name, _ATTENTIONS)
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(f"attn_implementation is {shorten(name)}; choose one of {', '.join(_ATTENTIONS)}{hint}")
    if name in _ATTENTION_PACKAGES:
        module, pip_name = _ATTENTION_PACKAGES[name]
        if not has_package(module) or not torch.cuda.is_available():
            lacks = "a CUDA GPU, and this machine has none" if has_package(module) else f"{module}, not installed here"
            raise ConfigError(
                f"attn_implementation {name} cannot be used: it needs {lacks}; use sdpa, or pip install {pip_name}"
            )


def _check_compiler(config: TrainConfig) -> None:
    backend = config.trainer.get("torch_compile_backend")
    if backend is None:
        return
    known = {member.value.lower() for member in DynamoBackend} & {*torch.compiler.list_backends(exclude_tags=())}
    if backend not in known:
        guess = nearest(backend, known)
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(
            f"torch_compile_backend is {shorten(backend)}; choose one of {', '.join(sorted(known))}{hint}"
        )


def _check_processes(config: TrainConfig) -> None:
    if config.value("deepspeed"):
        _need(("deepspeed",), f"deepspeed {shorten(config.value('deepspeed'))}", "'ovis25[deepspeed]'")
    is_single = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if config.value("fsdp") and is_single:
        raise ConfigError(
            f"fsdp is {config.value('fsdp')!r}, but there is one process; start several (train_launch.sh CONFIG 2), or "
            "remove it"
        )
    backend = config.value("ddp_backend")
    if backend and not (torch.distributed.is_available() and torch.distributed.is_backend_available(backend)):
        raise ConfigError(f"ddp_backend is {backend!r}, which this torch does not have; remove it for the default")
