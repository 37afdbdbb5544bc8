"""The generated tasks: answers by independent rules, the same bytes for a seed, and no sequence in two splits."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from typing import Any

import numpy as np
import pytest

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.sequences import FORMAT, SEQUENCE_TASKS, SequenceSplit, generate
from hf_imgproc_attn.sequences.drawing import distinct, weighted_places
from hf_imgproc_attn.sequences.listops import ListOps

NAMES = pytest.mark.parametrize("name", SEQUENCE_TASKS)
SMALL = {"train": 60, "validation": 20, "test": 30}


def words_of(name: str, row: np.ndarray, **settings: Any) -> list[str]:
    import dataclasses

    rules = SEQUENCE_TASKS[name].rules
    vocabulary = dataclasses.replace(rules, **settings).vocabulary  # type: ignore[type-var]
    return [vocabulary[token] for token in row]


def answers_of(split: SequenceSplit, row: int) -> dict[int, int]:
    return {place: int(label) for place, label in enumerate(split.labels[row]) if label != -100}


def evaluated(words: list[str]) -> int:
    """What a ListOps sequence comes to: a stack machine over its words, with Python's own median."""
    stack: list[list[Any]] = [[]]
    for word in words:
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            operation, *numbers = stack.pop()
            value = {
                "[MIN": min,
                "[MAX": max,
                "[MED": lambda given: int(statistics.median(given)),
                "[SM": lambda given: sum(given) % 10,
            }[operation](numbers)
            stack[-1].append(value)
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return int(value)


@pytest.mark.parametrize("name", ["listops", "listops_short"])
def test_listops_answers_equal_an_independent_evaluator(name: str) -> None:
    rules = SEQUENCE_TASKS[name].rules
    assert isinstance(rules, ListOps)
    (split,) = generate(name, sizes={"train": 400, "validation": 0, "test": 0}).values()
    depths, arguments, operations = set(), set(), set()
    for row, label in zip(split.tokens, split.labels, strict=True):
        words = words_of(name, row)
        assert evaluated(words) == label
        assert rules.min_length < len(words) < rules.max_length
        operations |= {word for word in words if word.startswith("[")}
        depth, open_nodes = 1, [0]
        for word in words:
            if word == "]":
                arguments.add(open_nodes.pop())
            else:
                open_nodes[-1] += 1
                if word.startswith("["):
                    open_nodes.append(0)
                depth = max(depth, len(open_nodes))
        depths.add(depth)
    assert operations == {"[MIN", "[MAX", "[MED", "[SM"}
    assert arguments == set(range(2, rules.max_args + 1))
    assert max(depths) == rules.max_depth
    assert set(split.labels) == set(range(10))


def test_listops_trees_are_drawn_as_published() -> None:
    """A node is an operation with probability 1/4; 2 to 10 arguments are equally likely."""
    rules = ListOps()
    levels = rules._trees(np.random.default_rng(0), 4000)
    nodes = np.concatenate([level.arguments for level in levels[:-1]])
    assert np.mean(nodes > 0) == pytest.approx(0.25, abs=0.01)
    counts = np.bincount(nodes[nodes > 0])[2:]
    assert len(counts) == 9
    assert counts / counts.sum() == pytest.approx(np.full(9, 1 / 9), abs=0.02)
    assert len(levels) == rules.max_depth
    assert not levels[-1].arguments.any()


def test_published_sizes_of_listops() -> None:
    task = SEQUENCE_TASKS["listops"]
    assert task.sizes == {"train": 96_000, "validation": 2_000, "test": 2_000}
    assert (task.rules.longest, task.rules.classes) == (1999, tuple("0123456789"))


def recalled(words: list[str], place: int) -> str:
    """The word that last stood behind the word before ``place``."""
    key = words[place - 1]
    found = [words[index + 1] for index in range(place - 2, -1, -1) if words[index] == key]
    return found[0]


@pytest.mark.parametrize("name", ["mqar", "mqar_short"])
def test_mqar_is_answered_by_the_latest_pair(name: str) -> None:
    """Which it would not be if a filler could be a key: the fault of the public generator."""
    rules: Any = SEQUENCE_TASKS[name].rules
    split = generate(name, sizes=SMALL)["train"]
    fillers: Counter[str] = Counter()
    for row, tokens in enumerate(split.tokens):
        words, answers = words_of(name, tokens), answers_of(split, row)
        context, vocabulary = 2 * rules.pairs, SEQUENCE_TASKS[name].rules.vocabulary
        keys = words[0:context:2]
        assert len(set(keys)) == len(answers) == rules.pairs
        assert {words[place - 1] for place in answers} == set(keys), "each key is asked once"
        for place, answer in answers.items():
            assert place > context
            assert vocabulary[answer] == recalled(words, place)
        fillers.update(word for place, word in enumerate(words) if place >= context and place + 1 not in answers)
        assert not set(keys) & {
            word for place, word in enumerate(words) if place >= context and place + 1 not in answers
        }
    assert {word[0] for word in fillers} == {"k", "v"}, "fillers are keys of other sequences, and values"


def test_mqar_queries_follow_the_power_law() -> None:
    near, even = (
        generate("mqar_short", sizes=SMALL, settings={"power": power})["train"].labels != -100 for power in (0.01, 1.0)
    )
    assert near[:, 16:40].sum() > 1.2 * even[:, 16:40].sum()
    plain = generate("mqar_short", sizes=SMALL, settings={"random_fillers": False})["train"]
    assert set(words_of("mqar_short", plain.tokens[0])) > {"_"}


def test_noisy_recall_asks_whatever_was_shown_before() -> None:
    split = generate("noisy_recall", sizes={"train": 300})["train"]
    vocabulary = SEQUENCE_TASKS["noisy_recall"].rules.vocabulary
    noisy = 0
    for row, tokens in enumerate(split.tokens):
        words, shown, expected = words_of("noisy_recall", tokens), {}, {}
        for place in range(0, len(words), 2):
            key, value = words[place], words[place + 1]
            if key.startswith("n"):
                noisy += 1
                assert value.startswith("n")
                continue
            if key in shown:
                expected[place + 1] = shown[key]
            assert shown.setdefault(key, value) == value
        assert {place: vocabulary[answer] for place, answer in answers_of(split, row).items()} == expected
        assert len(words) - 1 in expected, "the last pair asks for something that was shown"
    assert noisy / (300 * 64) == pytest.approx(0.2, abs=0.02)


def test_averaging_beats_copying_when_values_are_shown_wrongly() -> None:
    split = generate("corrupted_recall", sizes={"train": 500})["train"]
    right = Counter[str]()
    for row, tokens in enumerate(split.tokens):
        asked, shown = answers_of(split, row), {}
        for place in range(0, len(tokens), 2):
            key, value = int(tokens[place]), int(tokens[place + 1])
            before = shown.setdefault(key, [])
            assert bool(before) == (place + 1 in asked)
            if before:
                truth = asked[place + 1]
                right["asked"] += 1
                right["last"] += before[-1] == truth
                right["most"] += Counter(before).most_common(1)[0][0] == truth
                right["shown"] += value == truth
            before.append(value)
    assert right["shown"] / right["asked"] == pytest.approx(0.7, abs=0.02)
    assert right["last"] / right["asked"] == pytest.approx(0.7, abs=0.02)
    assert right["most"] / right["asked"] > 0.8


def test_selective_copying_asks_for_the_tokens_in_their_order() -> None:
    split = generate("selective_copying", sizes=SMALL)["train"]
    places = set()
    for row, tokens in enumerate(split.tokens):
        words = words_of("selective_copying", tokens)
        context = words[:256]
        assert set(words[256:]) == {">"}
        copied = [int(word) for word in context if word != "_"]
        assert list(answers_of(split, row).items()) == [(257 + index, token) for index, token in enumerate(copied)]
        assert len(copied) == 16
        places |= {place for place, word in enumerate(context) if word != "_"}
    assert len(places) > 240, "anywhere"


@NAMES
def test_a_seed_is_the_same_bytes_and_splits_share_nothing(name: str) -> None:
    splits, again = generate(name, sizes=SMALL), generate(name, sizes=SMALL)
    assert list(splits) == ["train", "validation", "test"]
    assert {split: part.fingerprint for split, part in splits.items()} == {
        split: part.fingerprint for split, part in again.items()
    }
    rows = [row.tobytes() for part in splits.values() for row in part.tokens]
    assert len(set(rows)) == len(rows) == sum(SMALL.values())
    other = generate(name, sizes=SMALL, seed=1)
    assert not set(rows) & {row.tobytes() for part in other.values() for row in part.tokens}
    # A limit on the training split moves nothing else.
    fewer = generate(name, sizes={**SMALL, "train": 7})
    assert fewer["test"].fingerprint == splits["test"].fingerprint
    assert [row.tobytes() for row in fewer["train"].tokens] == rows[:7]
    assert splits["train"].fingerprint["format"] == FORMAT


@NAMES
def test_the_numbers_of_this_format_do_not_change(name: str) -> None:
    """If this fails, the generators have changed: FORMAT has to grow, and the numbers below with it."""
    expected = {
        "listops": "4fb5a493fc96 d1c7a2438ca4",
        "listops_short": "75580c8d9875 f3af5d34b5f9",
        "mqar": "87173d747bc5 6fbadfa2e6ba",
        "mqar_short": "8a68cc92d2d5 6ee7e1bbc5ba",
        "noisy_recall": "aa28ffdd160b 48e849f544e3",
        "corrupted_recall": "88477886c9c1 90f6881cc23c",
        "selective_copying": "52d2b753d6a3 a3f163885b2b",
    }
    assert FORMAT == 1
    found = generate(name, sizes={"train": 20, "validation": 0, "test": 20})
    assert [part.fingerprint["sha256"][:12] for part in found.values()] == expected[name].split()


@NAMES
def test_words_and_labels_are_in_range(name: str) -> None:
    rules = SEQUENCE_TASKS[name].rules
    assert len(set(rules.vocabulary)) == len(rules.vocabulary)
    assert all(re.fullmatch(r"\S+", word) for word in rules.vocabulary)
    split = generate(name, sizes=SMALL)["validation"]
    assert max(len(row) for row in split.tokens) <= rules.longest
    assert all(row.min() >= 0 and row.max() < len(rules.vocabulary) for row in split.tokens)
    assert SEQUENCE_TASKS[name].source.startswith("arXiv ")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("listop", {}, "task must be one of listops, .*got 'listop'; did you mean listops?"),
        ("mqar", {"seed": -1}, "seed must be an integer >= 0, got -1"),
        ("mqar", {"seed": "a"}, "seed must be an integer >= 0, got .a."),
        ("mqar", {"sizes": {"train": 1.5}}, "sizes must be integers >= 0 for .* got train=1.5"),
        ("mqar", {"sizes": {"train": -1}}, "sizes must be integers >= 0 for test, validation, train, got train=-1"),
        ("mqar", {"sizes": {"dev": 1}}, "got dev=1"),
        ("mqar", {"settings": {"pair": 3}}, "got 'pair'; did you mean pairs?"),
        ("mqar", {"settings": {"pairs": "3"}}, "pairs must be of type int, got '3'"),
        ("mqar", {"settings": {"pairs": True}}, "pairs must be of type int, got True"),
        ("mqar", {"settings": {"pairs": 65}}, "pairs must be from 1 to length / 4 = 64, got 65"),
        ("mqar", {"settings": {"length": 9}}, "length must be an even number >= 4, got 9"),
        ("mqar", {"settings": {"vocab_size": 20}}, "vocab_size must be from 2 [*] pairs [+] 4 = 36 to 32767, got 20"),
        ("mqar", {"settings": {"power": 0.0}}, "power must be above 0 and at most 1, got 0.0"),
        ("noisy_recall", {"settings": {"noise": 1}}, "noise must be at least 0 and below 1, got 1"),
        ("noisy_recall", {"settings": {"noise_vocab_size": 0}}, "noise_vocab_size must be from 1 to 16383, got 0"),
        ("corrupted_recall", {"settings": {"corruption": -0.1}}, "corruption must be at least 0 and below 1"),
        ("selective_copying", {"settings": {"copied": 300}}, "copied must be from 1 to length = 256, got 300"),
        ("listops", {"settings": {"max_length": 501}}, "max_length must be at least min_length [+] 2, got 501"),
        ("listops", {"settings": {"max_args": 1}}, "max_args must be an integer from 2 to 100, got 1"),
        ("listops", {"settings": {"max_depth": 1}}, "max_depth must be an integer from 2 to 20, got 1"),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(name, **options)


def test_more_sequences_than_there_are() -> None:
    settings = {"length": 2, "copied": 1, "vocab_size": 4}
    with pytest.raises(UsageError, match="the train split of selective_copying must have at most as many sequences"):
        generate("selective_copying", sizes={"train": 9, "validation": 0, "test": 0}, settings=settings)
    found = generate("selective_copying", sizes={"train": 2, "validation": 1, "test": 1}, settings=settings)
    assert sum(map(len, found.values())) == 4


def test_draws_without_replacement() -> None:
    rng = np.random.default_rng(0)
    for count, bound in ((3, 100), (5, 6)):
        rows = distinct(rng, 2000, count, bound)
        assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all()
        assert np.bincount(rows.ravel(), minlength=bound) == pytest.approx(2000 * count / bound, rel=0.4)
    # The first place drawn has the probabilities of the weights; the second those of what is left.
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    places = weighted_places(rng, 20_000, 2, weights)
    assert np.bincount(places[:, 0]) / 20_000 == pytest.approx(weights / 8, abs=0.02)
    after_first = places[places[:, 0] == 0, 1]
    assert np.bincount(after_first)[1:] / len(after_first) == pytest.approx(weights[1:] / 4, abs=0.02)
