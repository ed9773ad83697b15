"""Parts and speakers of a corpus: its own split, and speakers by folder."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable

SPLIT_COLUMNS = ("split", "subset", "partition", "data_split", "dataset_split", "set")
_WORDS = {
    word: part
    for part, words in {
        "train": "train training trn",
        "val": "val valid validation validate dev devel development",
        "test": "test testing tst eval evaluation heldout holdout",
    }.items()
    for word in words.split()
}
LANGUAGES = frozenset(
    "ar auto bg bn ca cs da de el en es et eu fa fi fr he hi hr hu id it ja jp ka ko kr lt lv nl no pl pt ro ru sk sl "
    "sr sv sw ta te th tr uk ur vi yue zh".split()
)
# Genders and moods, which many speakers share.
SHARED = frozenset(
    "m f male female man woman men women boy girl happy happiness sad sadness angry anger neutral surprise surprised "
    "fear fearful disgust disgusted calm excited whisper whispered amused sleepy sleepiness emotional normal".split()
)
# Folders for one kind of file.
_OF_A_KIND = re.compile(
    r"wavs?\d*|wav\d*[-_]\w+|audios?|clips?|data|flac|mp3|ogg|opus|m4a|speech|txt|texts?|corpus|by_book", re.IGNORECASE
)
_FORMAT_FOLDERS = re.compile(r"(?<=/)(wavs?\d*|flac|mp3|ogg|opus|m4a|aac)(?=/)", re.IGNORECASE)
_RANK = {suffix: i for i, suffix in enumerate((".wav", ".flac", ".w64", ".aiff", ".aif", ".aifc", ".caf", ".au"))}


@functools.lru_cache(10_000)
def part_of(name: str) -> str | None:
    """Returns `train`, `val` or `test` for a part's name, such as `dev-clean` or `test_other`; None for others."""
    return next((_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _WORDS), None)


def speakers_in(folders: dict[str, tuple[str, ...]], clips: Iterable[str]) -> dict[str, str | None]:
    """Maps each folder of clips to its speaker: the innermost folder name, with its parents if it occurs twice.

    Parts of the corpus, languages, genders, moods and folders for one kind of file are not speakers. LibriSpeech's
    `84/121/84-121-0001` belongs to 84: the clip's name shows that 121 is a chapter.

    Args:
        folders: names below the corpus's root, outermost first, of each folder with clips.
        clips: paths of the clips.

    Returns:
        None for every folder if there are not at least two speakers.
    """
    named = {folder: tuple(filter(_may_be_speaker, names)) for folder, names in folders.items()}
    for folder, name in map(os.path.split, clips):
        names = named[folder]
        if len(names) > 1 and names[0].isdecimal() and re.match(rf"{names[0]}[-_]{re.escape(names[1])}[-_.]", name):
            named[folder] = names[:1]
    parents: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for names in filter(None, named.values()):
        parents[names[-1]].add(names)
    labels: dict[str, str | None] = {
        folder: (names[-1] if len(parents[names[-1]]) == 1 else "/".join(names)) if names else None
        for folder, names in named.items()
    }
    return labels if len({*labels.values()} - {None}) > 1 else dict.fromkeys(labels)


def _may_be_speaker(name: str) -> bool:
    word = name.lower()
    language = re.split("[-_]", word)[0]
    is_shared = word in SHARED or (language in LANGUAGES and len(word) <= len(language) + 3)
    return not is_shared and not _OF_A_KIND.fullmatch(name) and part_of(name) is None


def one_format_each(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Splits rows into (kept, the same clips and texts in another format); a lossless format is preferred.

    Repeated rows of the same file are kept, since they are probably intended.
    """
    if len({os.path.splitext(row["audio"])[1] for row in rows if "audio" in row}) < 2:
        return rows, []
    best: dict[tuple, str] = {}
    keys = [_clip_key(row) if "audio" in row else () for row in rows]
    for key, row in sorted(zip(keys, rows, strict=True), key=lambda pair: _rank(pair[1])):
        best.setdefault(key, row.get("audio", ""))
    is_best = [row.get("audio", "") == best[key] for key, row in zip(keys, rows, strict=True)]
    return list(itertools.compress(rows, is_best)), [row for row, kept in zip(rows, is_best, strict=True) if not kept]


def _clip_key(row: dict) -> tuple:
    stem = os.path.splitext(row["audio"])[0]
    return _FORMAT_FOLDERS.sub("*", stem), row["text"], row.get("offset"), row.get("duration"), row.get("channel")


def _rank(row: dict) -> int:
    return _RANK.get(os.path.splitext(row.get("audio", ""))[1].lower(), len(_RANK))
