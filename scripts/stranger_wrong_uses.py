"""Wrong uses that strangers make, and the line that each must end with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TRAIN = "ovis25 train src_theo/train_config_tiny.json --output_dir {work}/run --exam false"
_DATA = f"{_TRAIN} --max_steps 2"
_INFER = "ovis25 infer {model} --max_new_tokens 4"
_PICTURE = "src_theo/sample_data/sample_small.png"


@dataclass
class Place:
    """The clone, a folder to work in, and how a line is typed: `type_in(command, folder)`."""

    clone: Path
    work: Path
    type_in: Callable


@dataclass
class WrongUse:
    """What is typed, in the clone, and what its one line must say.

    `prepare` makes what it needs; `interrupt_at`: Ctrl-C is pressed once that was printed; `codes`: how it may end.
    """

    name: str
    command: str
    says: str
    prepare: Callable[[Place], None] | None = None
    stdin: str = ""
    interrupt_at: str | None = None
    codes: tuple[int, ...] = (2,)
    is_short: bool = False


def _file(name: str, content: str | bytes) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        path = place.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def _rows(*rows, **changes) -> Callable[[Place], None]:
    """A data file of the given rows; without any, of one good row with `changes`."""
    good = {
        "id": "one",
        "image": "good.png",
        "conversations": [{"from": "human", "value": "<image>Read it."}, {"from": "gpt", "value": "12"}],
    }

    def prepare(place: Place) -> None:
        shutil.copy(place.clone / _PICTURE, place.work / "good.png")
        content = (place.work / "good.png").read_bytes()
        (place.work / "cut.png").write_bytes(content[: len(content) // 2])
        (place.work / "data.json").write_text(json.dumps(list(rows) or [{**good, **changes}]), encoding="utf-8")

    return prepare


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _model(place: Place, kind: str = "model") -> None:
    """A small trained folder, made once; `adapter` is one too."""
    if not (place.work / kind).is_dir():
        lora = " --use_lora true" if kind == "adapter" else ""
        config = "src_theo/train_config_tiny.json"
        command = f"ovis25 train {config} --max_steps 1 --exam false --output_dir '{place.work / kind}'{lora}"
        place.type_in(command, place.clone)


def _damaged(damage: Callable[[Path], None]) -> Callable[[Place], None]:
    """A copy of the model's folder with a damage, under the name `damaged`."""

    def prepare(place: Place) -> None:
        _model(place)
        shutil.rmtree(place.work / "damaged", ignore_errors=True)
        shutil.copytree(place.work / "model", place.work / "damaged")
        damage(place.work / "damaged")

    return prepare


def _adapter(place: Place) -> None:
    _model(place, "adapter")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000000\n")


def _without_vocabulary(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)


def _requests(place: Place) -> None:
    _model(place)
    lines = ('{"prompt": "Hi"}', '{"prompt": "Hi", "image": 5}', "no JSON", '{"prompt": null}')
    _file("requests.jsonl", "\n".join(lines))(place)


def _data(changes: str, *rows, says: str, **fields) -> WrongUse:
    return WrongUse(f"data: {changes}", f"{_DATA} --data_path {{work}}/data.json", says, _rows(*rows, **fields))


def _setting(arguments: str, says: str, is_short: bool = False) -> WrongUse:
    steps = "" if "max_steps" in arguments else " --max_steps 2"
    return WrongUse(f"setting: {arguments}", f"{_TRAIN}{steps} {arguments}", says, is_short=is_short)


LAUNCHER = (
    WrongUse("launcher: no config", "src_theo/train_launch.sh", "CONFIG is missing", is_short=True),
    WrongUse("launcher: a word for a number", "src_theo/train_launch.sh train_config_tiny.json two", "'two'"),
    WrongUse("launcher: a wrong recipe", "src_theo/train_launch.sh train_config_tiny.json 1 tlr", "'tlr'"),
    WrongUse("launcher: one word more", "src_theo/train_launch.sh train_config_tiny.json 1 trl now", "'now'"),
    WrongUse("launcher: a missing config", "src_theo/train_launch.sh nowhere.json 1", "nowhere.json was not found"),
    WrongUse(
        "upstream script: half a name", "scripts/run_ovis2_5_sft.sh --data_name a", "data_info_version is missing"
    ),
    WrongUse(
        "launcher: a folder as config", "src_theo/train_launch.sh src_theo 1", "src_theo.* (folder|directory|file)"
    ),
    WrongUse(
        "config: no JSON",
        "ovis25 train {work}/broken.json",
        "broken.json.*JSON",
        _file("broken.json", '{"model_path": '),
    ),
    WrongUse("config: a list", "ovis25 train {work}/list.json", "one JSON object", _file("list.json", "[1, 2]")),
)

SETTINGS = (
    _setting("--lerning_rate 1e-5", "learning_rate", is_short=True),
    _setting("--learning_rate fast", "learning_rate.*'fast'"),
    _setting("--learning_rate -1", "learning_rate.*-1"),
    _setting("--num_train_epochs 0 --max_steps -1", "num_train_epochs.*0"),
    _setting("--gradient_accumulation_steps -1", "gradient_accumulation_steps.*-1"),
    _setting("--per_device_train_batch_size 0", "per_device_train_batch_size.*0"),
    _setting("--multimodal_max_length nan", "multimodal_max_length.*nan"),
    _setting("--report_to wandbx", "report_to.*wandbx"),
    _setting("--optim adamw_bnb_8bit", "bitsandbytes"),
    _setting("--lr_scheduler_type sometimes", "lr_scheduler_type.*sometimes"),
    _setting("--label_smoothing_factor 2", "label_smoothing_factor.*2"),
    _setting("--metric_for_best_model eval_accuracy", "metric_for_best_model.*eval_accuracy"),
    _setting("--dtype float16", "float16"),
    _setting("--deepspeed nowhere.json", "deepspeed.*nowhere.json"),
    _setting("--model_path nowhere/at/all", "nowhere/at/all"),
    _setting("--data_path nowhere.json", "data_path.*nowhere.json"),
    _setting("--data_path src_theo", "data_path.*folder"),
    _setting("--eval_data_path nowhere.json", "eval_data_path.*nowhere.json"),
    _setting("--output_dir ''", "output_dir"),
    _setting("--output_dir README.md", "output_dir.*README.md"),
    _setting("--output_dir README.md/below", "output_dir.*README.md"),
    _setting("--output_dir /proc/self/here", "output_dir.*/proc/self/here"),
    _setting("--dataloader_drop_last true --data_path tiny:train:8 --max_steps -1", "dataloader_drop_last|0 steps"),
    WrongUse(
        "output_dir is the model's folder", "ovis25 train src_theo/train_config_tiny.json --model_path {model} "
        "--output_dir {model} --max_steps 2", "output_dir.*model", _model, is_short=True,
    ),
)  # fmt: skip

DATA = (
    _data("a missing picture", says='data.json\\[0\\].*"one".*image.*gone.png', image="gone.png"),
    _data("a wrong case", says="did you mean .*good.png", image="GOOD.png"),
    _data("a cut picture", says="data.json\\[0\\].*cut.png", image="cut.png"),
    _data("an unknown key", says="imges.*image", imges="other.png"),
    _data("a lone </think>", says="think", conversations=_turns("<image>Read it.", "1+1=2</think>\n\n2")),
    _data("an unclosed <think>", says="think", conversations=_turns("<image>Read it.", "<think>1+1=2")),
    _data("an empty question", says="conversations\\[0\\]", image=None, conversations=_turns("", "2")),
    _data("half an emoji", says="surrogate|half a character", conversations=_turns("<image>\ud83d", "2")),
    _data("a number for a row", 12, says="data.json\\[0\\].*int"),
    _data("an image for a text", says="image", conversations=_turns("Read it.", "12")),
    WrongUse(
        "data: an empty file",
        _DATA + " --data_path {work}/data.json",
        "data.json",
        _file("data.json", ""),
        is_short=True,
    ),
    WrongUse("data: no JSON", _DATA + " --data_path {work}/data.json", "data.json.*JSON", _file("data.json", "[{")),
    WrongUse("data: a picture", _DATA + f" --data_path {_PICTURE}", "sample_small.png"),
)

FOLDERS = (
    WrongUse(
        "model: no vocabulary", "ovis25 infer {work}/damaged --prompt Hello", "vocab.json|tokenizer",
        _damaged(_without_vocabulary),
    ),
    WrongUse(
        "model: cut weights", "ovis25 infer {work}/damaged --prompt Hello", "model.safetensors",
        _damaged(lambda folder: _cut(folder / "model.safetensors")), is_short=True,
    ),
    WrongUse(
        "model: a git-lfs pointer", "ovis25 infer {work}/damaged --prompt Hello", "git-lfs|pointer",
        _damaged(lambda folder: _pointer(folder / "model.safetensors")),
    ),
    WrongUse(
        "model: no weights", "ovis25 train src_theo/train_config_tiny.json --model_path {work}/damaged "
        "--output_dir {work}/weightless --max_steps 2", "safetensors",
        _damaged(lambda folder: (folder / "model.safetensors").unlink()),
    ),
    WrongUse(
        "model: another model's config", "ovis25 infer {work}/damaged --prompt Hello", "model_type|ovis2_5",
        _damaged(lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3"}')),
    ),
    WrongUse("merge: no adapter", "ovis25 merge --adapter_path {model} --output_path {work}/out", "adapter", _model),
    WrongUse(
        "merge: the output is in use", "ovis25 merge --adapter_path {work}/adapter --output_path {model}",
        "not empty", _adapter,
    ),
    WrongUse("merge: nothing there", "ovis25 merge --adapter_path nowhere --output_path {work}/out", "nowhere"),
)  # fmt: skip

ASKING = (
    WrongUse("infer: no such picture", _INFER + " --prompt Hi --image nowhere.png", "nowhere.png", _model),
    WrongUse("infer: a picture that is none", _INFER + " --prompt Hi --image README.md", "README.md", _model),
    WrongUse("infer: no prompt", _INFER, "--prompt", _model),
    WrongUse("infer: a wrong option", _INFER + " --prompt Hi --temprature 1", "temprature", _model),
    WrongUse("infer: an option out of range", _INFER + " --prompt Hi --top_p 2", "top_p", _model),
    WrongUse("infer: no such tool", _INFER + " --prompt Hi --tools Corp", "Corp", _model),
    WrongUse("infer: no such model", "ovis25 infer nowhere --prompt Hi", "nowhere"),
    WrongUse(
        "infer: no requests file", _INFER + " --requests nowhere.jsonl --output {work}/o.jsonl", "nowhere.jsonl", _model
    ),
    WrongUse(
        "infer: bad lines among good ones", _INFER + " --requests {work}/requests.jsonl --output {work}/replies.jsonl",
        "1 answered, 3 failed", _requests, codes=(1,), is_short=True,
    ),
    WrongUse(
        "chat: a missing picture, then a question", "ovis25 chat {model} --max_new_tokens 4", "nowhere.png", _model,
        stdin="/image nowhere.png\n/nonsense\nHello\n/exit\n", codes=(0,),
    ),
    WrongUse("plan: no amount of memory", "ovis25 plan src_theo/train_config.json --device-memory lots", "'lots'"),
    WrongUse("plan: no device", "ovis25 plan src_theo/train_config.json --devices 0", "--devices"),
    WrongUse("a wrong command", "ovis25 trian", "trian", is_short=True),
)  # fmt: skip

RUNS = (
    WrongUse(
        "Ctrl-C while training", "ovis25 train src_theo/train_config_tiny.json --output_dir {work}/stopped "
        "--logging_steps 1", "the same command goes on", interrupt_at=r"step +3/", codes=(130,), is_short=True,
    ),
    WrongUse(
        "going on with other settings",
        "ovis25 train src_theo/train_config_tiny.json --output_dir {work}/twice --max_steps 1 --exam false && "
        "ovis25 train src_theo/train_config_tiny.json --output_dir {work}/twice --max_steps 2 --exam false",
        "max_steps: 1 there, 2 now",
    ),
    WrongUse(
        "a released name without the hub", "HF_HUB_OFFLINE=1 ovis25 infer AIDC-AI/Ovis2.5-2B --prompt Hi", "hf download"
    ),
)  # fmt: skip

WRONG_USES = (*LAUNCHER, *SETTINGS, *DATA, *FOLDERS, *ASKING, *RUNS)
