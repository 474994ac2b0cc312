"""The tokenizer's files of a checkpoint folder: are they there and whole, and do they belong to the model beside them?

transformers makes a tokenizer of whatever it finds: without `vocab.json` it knows the added tokens alone and drops
every other character without a word. So the files are looked through first.
"""

from pathlib import Path

from tokenizers import pre_tokenizers

from ovis25.checkpoint import CheckpointError, check_file, cure_for, read_json
from ovis25.constants import THINK_BEGIN, THINK_END, TURN_BEGIN, TURN_END

CONFIG_NAME = "tokenizer_config.json"
_VOCAB, _MERGES, _WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
_NEEDED = (TURN_BEGIN, TURN_END, THINK_BEGIN, THINK_END)
# of the tokens of several characters, so many may lack the merge that makes them
_MOST_UNMADE = 0.01
# a tokenizer with fewer tokens than this share of the embedding's rows is not the model's
_LEAST_SHARE = 0.5


def check_tokenizer(folder: str | Path, num_rows: int | None = None) -> None:
    """Look through the tokenizer's files; `num_rows` are those of the embedding, where it is known.

    The embedding may have more rows than there are tokens (the released ones have 267 more), up to twice as many; a
    token without a row is an error.

    Raises:
        CheckpointError: a file is missing, empty, cut, a git-lfs pointer or contradicts another one.
    """
    folder = Path(folder)
    config = read_json(folder, CONFIG_NAME)
    tokens = _tokens(folder, config)
    source = folder / (_WHOLE if (folder / _WHOLE).exists() else _VOCAB)
    if lost := set(pre_tokenizers.ByteLevel.alphabet()) - tokens.keys():
        raise CheckpointError(
            f"{source} lacks {len(lost)} of the 256 byte tokens, so that text would lose characters; it is cut, or of "
            f"another kind of tokenizer; {cure_for(folder, source.name)}"
        )
    if lost := [token for token in _NEEDED if token not in tokens]:
        raise CheckpointError(
            f"the tokenizer of {folder} has no token {', '.join(lost)}, which every conversation needs; it is not that "
            f"of an Ovis2.5 model; {cure_for(folder, CONFIG_NAME)}"
        )
    if num_rows is not None:
        _check_size(folder, source, tokens, num_rows)


def check_template(folder: str | Path) -> None:
    """Raises CheckpointError: the folder holds no chat template."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").exists():
        check_file(folder, "chat_template.jinja")
        return
    names = [name for name in (CONFIG_NAME, "chat_template.json") if (folder / name).exists()]
    if not any(read_json(folder, name).get("chat_template") for name in names):
        raise CheckpointError(
            f"{folder} holds no chat template (chat_template.jinja, chat_template.json, or chat_template in "
            f"{CONFIG_NAME}); {cure_for(folder, 'chat_template.json')}"
        )


def _check_size(folder: Path, source: Path, tokens: dict[str, int], num_rows: int) -> None:
    last = max(tokens, key=tokens.get)
    if tokens[last] >= num_rows:
        raise CheckpointError(
            f"{source}: the token {last!r} has the id {tokens[last]:,}, but the embedding has {num_rows:,} rows "
            "(llm_config.vocab_size in config.json); tokenizer and weights are not of the same model (tokens that "
            "were added need model.resize_token_embeddings)"
        )
    if len(tokens) < _LEAST_SHARE * num_rows:
        raise CheckpointError(
            f"{source}: the tokenizer has {len(tokens):,} tokens, but the embedding has {num_rows:,} rows "
            "(llm_config.vocab_size in config.json); it is empty, cut, or of another model; "
            + cure_for(folder, source.name)
        )


def _tokens(folder: Path, config: dict) -> dict[str, int]:
    """Every token with its id, the added ones included."""
    if (folder / _WHOLE).is_symlink() or (folder / _WHOLE).exists():
        tokens = _of_whole(folder)
        for name in (_VOCAB, _MERGES):
            if (folder / name).is_symlink() or (folder / name).exists():
                check_file(folder, name)
    else:
        tokens = _of_parts(folder, config)
    return tokens | _added(folder, config)


def _added(folder: Path, config: dict) -> dict[str, int]:
    added = read_json(folder, "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    try:
        listed = config.get("added_tokens_decoder") or {}
        return {token: int(number) for token, number in added.items()} | {
            entry["content"]: int(number) for number, entry in listed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the added tokens in {folder} (added_tokens.json, {CONFIG_NAME}) are no map of tokens and ids ({error}); "
            + cure_for(folder, CONFIG_NAME)
        ) from error


def _of_whole(folder: Path) -> dict[str, int]:
    content, cure = read_json(folder, _WHOLE), cure_for(folder, _WHOLE)
    try:
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        added = {entry["content"]: int(entry["id"]) for entry in content.get("added_tokens", [])}
        pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
        vocab = {token: int(number) for token, number in vocab.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _WHOLE} describes no byte-pair tokenizer ({error!r}); {cure}") from error
    _check_merges(folder, _WHOLE, vocab, pairs, added.keys())
    return vocab | added


def _of_parts(folder: Path, config: dict) -> dict[str, int]:
    present = [name for name in (_VOCAB, _MERGES) if (folder / name).is_symlink() or (folder / name).exists()]
    if not present:
        raise CheckpointError(
            f"{folder} lacks its tokenizer: neither {_VOCAB} and {_MERGES} nor {_WHOLE} are there; "
            + cure_for(folder, _VOCAB).replace(f"--include {_VOCAB}", f"--include {_VOCAB} --include {_MERGES}")
        )
    vocab = read_json(folder, _VOCAB)
    if wrong := next((token for token, number in vocab.items() if type(number) is not int), None):
        raise CheckpointError(f"{folder / _VOCAB}: the id of {wrong!r} is no whole number; {cure_for(folder, _VOCAB)}")
    try:
        lines = check_file(folder, _MERGES).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{folder / _MERGES} is no text in UTF-8 ({error}); {cure_for(folder, _MERGES)}"
        ) from error
    pairs = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    _check_merges(folder, _MERGES, vocab, pairs, _added(folder, config).keys())
    return vocab


def _check_merges(folder: Path, name: str, vocab: dict, pairs: list[str], added) -> None:
    """A vocabulary and its merges belong together: every longer token is made by one, every one makes a token."""
    made = {pair.replace(" ", "", 1) for pair in pairs if pair.count(" ") == 1}
    longer = {token for token in vocab if len(token) > 1 and token not in added}
    strange = len(pairs) - len([pair for pair in pairs if pair.count(" ") == 1]) + len(made - vocab.keys())
    unmade = len(longer - made)
    if strange or unmade > _MOST_UNMADE * len(longer):
        raise CheckpointError(
            f"{folder / name}: of {len(longer):,} tokens, {unmade:,} are made by none of its {len(pairs):,} merges, "
            f"and {strange:,} merges make no token; the file is cut or damaged, or not of the same tokenizer as the "
            f"vocabulary; {cure_for(folder, name)}"
        )
