"""The tokenizer of a text model, read from the files beside its weights.

The `tokenizers` library reads `tokenizer.json`, or the vocabulary of a BERT (`vocab.txt`), a GPT-2
or a RoBERTa (`vocab.json` and `merges.txt`). These files are data. Nothing in them is executed.
The classes of transformers are not used: a configuration can make them import code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ..checkpoints.tokenizer_files import check_tokenizer_json, guarded, is_failure, reason_of
from ..data.lines import lines_of
from ..errors import ArchitectureError, UsageError
from .extra import import_extra

#: The roles of tokens that are not words, as transformers names them.
_ROLES = (
    "pad_token",
    "unk_token",
    "cls_token",
    "sep_token",
    "mask_token",
    "bos_token",
    "eos_token",
)

#: A text that is longer than this many characters per token that is wanted is cut before it is
#: tokenised. No tokenizer has words that long, except for runs of one character.
_CHARACTERS_PER_TOKEN = 64


class TextTokenizer:
    """From texts to token ids and back.

    Attributes:
        size: One more than the largest token id.
        special: The ids of tokens that are not words, such as [CLS].
        pad_id: The id that fills up rows. Attention masks hide it.
        unknown_id: The id of what has no token; None if everything has one.
    """

    def __init__(
        self, files: Mapping[str, bytes], *, model_type: str, name: str, pad_id: int | None = None
    ) -> None:
        """Read a tokenizer.

        files: The files beside the weights, by name. model_type: As in `config.json`. name: The
        name of the model, for messages. pad_id: The model's own, which comes first.
        Raises ArchitectureError for files that are no tokenizer.
        """
        roles = _roles(files, name)
        self._rust: Any = _Guarded(_read(files, model_type, name), name)
        self._rust.no_padding()
        self._rust.no_truncation()
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ArchitectureError(f"{name}: its tokenizer has no tokens")
        self.size = 1 + max(vocabulary.values())
        added = self._rust.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}
        special |= {vocabulary[text] for text in roles.values() if text in vocabulary}
        self.special = frozenset(special)
        own = vocabulary.get(roles.get("pad_token", ""), vocabulary.get(roles.get("eos_token", "")))
        self.pad_id = next(index for index in (pad_id, own, 0) if index is not None)
        self.unknown_id: int | None = vocabulary.get(roles.get("unk_token", ""))

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Return the token ids of each text, with special tokens, at most `max_tokens` of them.

        Raises UsageError if `max_tokens` leaves no room for a word.
        """
        self._truncate(max_tokens)
        short = [text[: _CHARACTERS_PER_TOKEN * max_tokens] for text in texts]
        try:
            return [one.ids for one in self._rust.encode_batch(short)]
        finally:
            self._rust.no_truncation()

    def words(self, text: str) -> list[int]:
        """Return the token ids of a text without special tokens around it."""
        ids: list[int] = self._rust.encode(text, add_special_tokens=False).ids
        return ids

    def all_words(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `words` of each text."""
        return [one.ids for one in self._rust.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        text: str = self._rust.decode(list(tokens), skip_special_tokens=False)
        return text

    def all_decoded(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return `decode` of each row."""
        return list(self._rust.decode_batch([list(row) for row in rows], skip_special_tokens=False))

    def token(self, index: int) -> str:
        """Return a token as the vocabulary writes it; an empty text for other numbers."""
        return self._rust.id_to_token(index) or ""

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens before and after a text."""
        with_specials = self._rust.encode("a")
        mask = list(with_specials.special_tokens_mask)
        if 0 not in mask:
            return (), ()
        first, last = mask.index(0), len(mask) - mask[::-1].index(0)
        return tuple(with_specials.ids[:first]), tuple(with_specials.ids[last:])

    @cached_property
    def spaces_matter(self) -> bool:
        """Whether a word has other tokens at the beginning of a text than after a space.

        That is so for byte-level tokenizers (GPT-2, RoBERTa), in which a space belongs to the word
        after it.
        """
        return self.words("a a")[-len(self.words("a")) :] != self.words("a")

    def _truncate(self, max_tokens: int) -> None:
        room = max_tokens - self._rust.num_special_tokens_to_add(is_pair=False)
        if room < 1:
            raise UsageError(
                f"max_tokens is {max_tokens}, and {max_tokens - room} of them are special tokens; "
                f"expected at least {max_tokens - room + 1}"
            )
        self._rust.enable_truncation(max_length=max_tokens)


class _Guarded:
    """A tokenizer of the library whose methods raise ArchitectureError where they fail."""

    def __init__(self, rust: Any, name: str) -> None:
        self._rust, self._name = rust, name

    def __getattr__(self, key: str) -> Any:
        return guarded(getattr(self._rust, key), self._name)


def _roles(files: Mapping[str, bytes], name: str) -> dict[str, str]:
    """Return the text of each token with a role, from the files that tell it."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = _json(files, file, name)
        for role in _ROLES:
            given = content.get(role)
            text = given.get("content") if isinstance(given, dict) else given
            if isinstance(text, str):
                found[role] = text
    return found


def _json(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    if file not in files:
        return {}
    try:
        content = json.loads(files[file].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"{name}: {file} is not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ArchitectureError(f"{name}: {file} is not a JSON object")
    return content


def _read(files: Mapping[str, bytes], model_type: str, name: str) -> Any:
    tokenizers = import_extra("tokenizers", name)
    try:
        if "tokenizer.json" in files:
            check_tokenizer_json(files["tokenizer.json"])
            return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        if "vocab.txt" in files:
            return _word_pieces(tokenizers, files, name)
        if "vocab.json" in files and "merges.txt" in files:
            return _byte_pairs(tokenizers, files, model_type, name)
    except ArchitectureError as error:
        message = str(error)
        raise ArchitectureError(
            message if message.startswith(name) else f"{name}: {message}"
        ) from error
    except BaseException as error:  # the library raises whatever a file led it into
        if not is_failure(error):
            raise
        raise ArchitectureError(
            f"{name}: its tokenizer cannot be read: {reason_of(error)}"
        ) from error
    others = [
        file
        for file in ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
        if file in files
    ]
    if others:
        raise ArchitectureError(
            f"{name}: its tokenizer is the SentencePiece file {others[0]}; put a tokenizer.json "
            "beside it (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one)"
        )
    raise ArchitectureError(
        f"{name}: no tokenizer beside its weights; expected tokenizer.json, vocab.txt, or "
        "vocab.json with merges.txt"
    )


def _word_pieces(tokenizers: Any, files: Mapping[str, bytes], name: str) -> Any:
    """Return BERT's tokenizer of a `vocab.txt`: one token per line, its number is its id."""
    lines = lines_of(files["vocab.txt"].decode("utf-8"))
    vocabulary = {line: index for index, line in enumerate(lines)}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise ArchitectureError(f"{name}: vocab.txt has no token {missing[0]}")
    lowercase = bool(_json(files, "tokenizer_config.json", name).get("do_lower_case", True))
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    known = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocabulary]
    made.add_special_tokens(known)
    return made


def _byte_pairs(tokenizers: Any, files: Mapping[str, bytes], model_type: str, name: str) -> Any:
    """Return the byte-level tokenizer of GPT-2 or RoBERTa."""
    if model_type not in ("gpt2", "roberta", "gpt_neo", "gptj"):
        raise ArchitectureError(
            f"{name}: vocab.json and merges.txt do not tell how a {model_type!r} splits texts; put "
            "a tokenizer.json beside them"
        )
    vocabulary = _json(files, "vocab.json", name)
    lines = lines_of(files["merges.txt"].decode("utf-8"))
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    known = [
        t for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>") if t in vocabulary
    ]
    made.add_special_tokens(known)
    if model_type == "roberta":
        missing = [token for token in ("<s>", "</s>") if token not in vocabulary]
        if missing:
            raise ArchitectureError(f"{name}: vocab.json has no token {missing[0]}")
        made.post_processor = tokenizers.processors.RobertaProcessing(
            ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]), add_prefix_space=False
        )
    return made
