"""Fast paths against plain float32 arithmetic on the same numbers, before anything is timed.

An error is the largest difference over the largest plain value, of results and gradients.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from gpu_kernels import Case, is_compiled, llm_case, needs, vit_case
from gpu_run import Run
from gpu_training import packed_row, small_depth
from torch.nn.attention import SDPBackend, sdpa_kernel

from ovis25 import Ovis2_5
from ovis25.model.attention import Segments, sdpa_attention
from ovis25.model.loss import next_token_loss

# bfloat16 on a CPU gives 0.005, 0.005, 0.025 and 0.012; what is wrong gives about 1
BOUNDS = {"attention": 0.02, "loss": 0.02, "visual head": 0.06, "packed row": 0.05}
# what the model computes with: where one cannot run, the model cannot
OWN_PATHS = ("the model's", "next_token_loss", "get_visual_embeddings", "sequence_lengths")


def check(run: Run) -> None:
    """One row for each path; the model's own first, what takes long to compile last."""
    for what, path, errors in (
        ("packed row", "sequence_lengths", _packed_row),
        ("loss", "next_token_loss", _loss),
        ("visual head", "get_visual_embeddings", _visual_head),
    ):
        _compare(run, what, what, path, partial(errors, run), needs_s=10)
    lengths = (16, 36, 24) if run.is_small else (784, 196, 3136)
    cases = (vit_case("ragged", *lengths), llm_case("ragged", 16, *lengths))
    paths = [(case, name) for case in cases for name in case.kernels]
    for case, name in sorted(paths, key=lambda path: is_compiled(path[1])):
        _compare(run, "attention", case.name, name, partial(_attention, run, case, name), **needs(name))


def failures(run: Run) -> list[str]:
    """What is out of bounds, and paths of the model's own that could not be compared."""
    rows = [row for row in run.results["sections"].get("checks", []) if "path" in row]
    wrong = [
        row for row in rows if row["status"] == "out of bounds" or row["path"] in OWN_PATHS and row["status"] != "ok"
    ]
    missing = set(OWN_PATHS) - {row["path"] for row in rows}
    return [f"{row['case']}, {row['path']}: {row['status']}" for row in wrong] + [
        f"{path}: no check" for path in missing
    ]


def _compare(run: Run, what: str, case: str, path: str, errors, **needed) -> None:
    labels = {"case": case, "path": path, "bound": BOUNDS[what]}
    row = run.measure(labels, errors, **needed)
    if not all(value <= BOUNDS[what] for name, value in row.items() if name.endswith("error")):
        row["status"] = "out of bounds"
    if not row["status"].startswith("skipped"):
        run.clear()


def _error(fast: torch.Tensor, plain: torch.Tensor) -> float:
    return ((fast.float() - plain).abs().max() / plain.abs().max()).item()


def _errors(fast: list[torch.Tensor], plain: list[torch.Tensor]) -> dict[str, float]:
    """Of the result, the first of each list, and the worst of the gradients."""
    result, *gradients = (_error(*pair) for pair in zip(fast, plain, strict=True))
    return {"result_error": result, "gradient_error": max(gradients)}


def _with_gradients(function, inputs: list[torch.Tensor], gradient: torch.Tensor | None = None) -> list[torch.Tensor]:
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def _attention(run: Run, case: Case, name: str) -> dict[str, float]:
    segments, kernel = Segments(case.lengths, run.device), case.kernels[name]
    *inputs, gradient = case.inputs(run.device)
    half = [part.requires_grad_() for part in inputs]
    full = [part.detach().float().requires_grad_() for part in inputs]
    fast = _with_gradients(lambda *qkv: kernel(*qkv, segments, case.is_causal), half, gradient)
    with sdpa_kernel(SDPBackend.MATH):
        plain = _with_gradients(lambda *qkv: sdpa_attention(*qkv, segments, case.is_causal), full, gradient.float())
    return _errors(fast, plain)


def _loss(run: Run) -> dict[str, float]:
    """1,500 learned rows, more than one chunk."""
    model = small_depth(run)
    hidden = torch.randn(1, 1501, model.config.hidden_size, device=run.device, dtype=model.dtype, requires_grad=True)
    labels = torch.randint(model.config.llm_config.vocab_size, (1, 1501), device=run.device)
    head = model.llm.lm_head

    def plain_loss(hidden, weight):
        return F.cross_entropy(hidden[0, :-1] @ weight.T, labels[0, 1:])

    fast = _with_gradients(lambda hidden, _: next_token_loss(hidden, labels, head)[0], [hidden, head.weight])
    full = [part.detach().float().requires_grad_() for part in (hidden, head.weight)]
    return _errors(fast, _with_gradients(plain_loss, full))


def _visual_head(run: Run) -> dict[str, float]:
    """1,536 visual tokens, more than one chunk; the plain twin takes the encoder's own features."""
    model = small_depth(run)
    grids = torch.tensor([[1, 32, 64]] * 3)
    pixels = torch.rand(3 * 32 * 64, 768, device=run.device, dtype=model.dtype) * 2 - 1
    linear, norm = model.visual_tokenizer.head
    with torch.no_grad():
        features = model.visual_tokenizer.vit(pixels, [tuple(grid) for grid in grids.tolist()])
    features = features.unflatten(0, (-1, model.visual_tokenizer.block_size)).flatten(1).float()

    def plain_embeds(head_weight, table):
        logits = F.layer_norm(features @ head_weight.T, (len(head_weight),), norm.weight.float(), norm.bias.float())
        return logits.softmax(dim=-1) @ table[: len(head_weight)]

    weights = [linear.weight, model.vte.weight]
    full = [weight.detach().float().requires_grad_() for weight in weights]
    gradient = torch.randn(len(features), model.config.hidden_size, device=run.device)
    fast = _with_gradients(lambda *_: model.get_visual_embeddings(pixels, grids), weights, gradient.to(model.dtype))
    return _errors(fast, _with_gradients(plain_embeds, full, gradient.to(model.dtype).float()))


@torch.no_grad()
def _packed_row(run: Run) -> dict[str, float]:
    """Logits of a packed row against those of its samples one by one, in float32."""
    model = small_depth(run).eval()
    items, batch = packed_row(model.config, num_samples=3, side=8, num_text=60, device=run.device)
    labels = batch.pop("labels")
    packed = model(**batch).logits[0]
    plain_model = copy.deepcopy(model).float()
    plain = torch.cat([_logits_alone(plain_model, item, labels.device) for item in items])
    return {"result_error": _error(packed, plain)}


def _logits_alone(model: Ovis2_5, item: dict, device: torch.device) -> torch.Tensor:
    inputs = {name: item[name].to(device) for name in ("pixel_values", "grid_thws")}
    return model(input_ids=item["input_ids"][None].to(device), **inputs).logits[0]
