"""The modules of the page against Python's runtime: noise, tokenizers, conditioning, loops, pictures."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from export import conditioning as text
from export.noise import noise
from export.picture import to_pictures
from export.resample import resample
from export.runtime import LatentSpec, Runtime
from export.step_plan import StepPlan
from export.tokenizer import Tokenizer
from tests import javascript
from tests.plain import SHAPE, SPLIT_SEGMENTS, given, random_plan, sampled
from tests.test_gate import GATES, gated_plan
from tests.test_levels import levelled
from tests.test_spans import split_plan

TAIL = 3.6541528  # beyond it a logarithm is taken, which C libraries round in their own ways


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[javascript.Script]:
    with javascript.scripts(tmp_path_factory.mktemp("modules")) as run:
        yield run


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (7, 1), (2**63 + 12345, 3), (2**64 - 1, 2**32 + 5)])
def test_noise_is_that_of_numpy(script: javascript.Script, seed: int, draw: int) -> None:
    found = script(
        "const { noise } = await load('noise.js'); return Array.from(noise(data.seed, data.draw, 200000));",
        seed=str(seed),
        draw=draw,
    )
    expected = noise([seed], draw, (200_000,))[0]
    near = np.abs(expected) <= TAIL
    assert (~near).sum() > 20
    np.testing.assert_array_equal(np.array(found, np.float32)[near], expected[near])
    np.testing.assert_array_max_ulp(np.array(found, np.float32), expected, maxulp=1)


def test_pictures_are_rounded_as_in_python(script: javascript.Script) -> None:
    halves = (np.arange(-2, 259, dtype=np.float32) + np.float32(0.5)) / np.float32(255) * 2 - 1
    sample = np.concatenate([halves, noise([1], 0, (3 * 16 * 17 - len(halves),))[0]]).astype(np.float32)
    found = script(
        """const { toPicture } = await load('picture.js');
        return Array.from(toPicture({ data: Float32Array.from(data.sample), shape: [1, 3, 16, 17] }).pixels);""",
        sample=sample.tolist(),
    )
    expected = to_pictures(sample.reshape(1, 3, 16, 17))[0]
    pixels = np.array(found, np.uint8).reshape(16, 17, 4)
    np.testing.assert_array_equal(pixels[..., :3], expected)
    assert (pixels[..., 3] == 255).all()


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((3, 5), (9, 5)), ((1, 2), (4, 13)), ((7, 6), (32, 24))])
def test_resampling_is_that_of_python(script: javascript.Script, old: tuple[int, int], new: tuple[int, int]) -> None:
    latent = noise([1], 0, (2, *old))
    found = script(
        """const { resample } = await load('loop.js');
        const latent = { data: Float32Array.from(data.latent), shape: [1, 2, ...data.old] };
        return Array.from(resample(latent, data.size).data);""",
        latent=latent.ravel().tolist(),
        old=old,
        size=new,
    )
    np.testing.assert_allclose(np.array(found).reshape(1, 2, *new), resample(latent, new), rtol=2e-7, atol=1e-7)


# Toy denoisers like those of `tests.plain`, of operations that every machine rounds alike.


def _squashed(value: np.ndarray) -> np.ndarray:
    return value / (1 + np.abs(value))


def _wide(value: np.ndarray) -> np.ndarray:
    return value.reshape(len(value), 1, 1, 1)


FUNCTIONS: dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "entry": lambda given: {"skip": _squashed(given["sample"] * (1 + _wide(given["timestep"]) / 7) + given["label"])},
    "deep": lambda given: {"up": _squashed(3 * given["skip"] - given["label"])},
    "exit": lambda given: {"out": given["up"] * np.float32(1.25) - given["skip"] * np.float32(0.5)},
    "encoder": lambda given: {"mid": _squashed(2 * given["sample"] + given["label"])},
    "embed": lambda given: {"emb": np.tile(_squashed(_wide(given["timestep"]) / 3 + given["label"]), (1, *SHAPE))},
    "decoder": lambda given: {"out": given["mid"] * (given["emb"] + np.float32(0.5))},
}


def plans() -> dict[str, StepPlan]:
    found = {f"random {seed}": random_plan(seed) for seed in range(24)}
    found |= {f"levels {seed}": levelled(seed) for seed in range(8)}
    for seed in range(6):
        found |= {f"spans {seed} {mode}": split_plan(seed, guidance=mode) for mode in (None, "cfg", "cfg_sequential")}
        found |= {
            f"gate {name} {seed} {mode}": gated_plan(gate, seed, guidance=mode)
            for name, gate in GATES.items()
            for mode in (None, "none", "cfg", "cfg_sequential")
        }
        mean = random_plan(100 + seed)
        slots = {name: replace(slot, halves="mean") for name, slot in mean.slots.items()}
        found[f"mean {seed}"] = replace(mean, slots=slots)
    return found


def test_loops_are_those_of_python_to_the_last_bit(script: javascript.Script) -> None:
    """Multistep updates, slots of all kinds, both halves, one after the other, spans, gates, levels, noise."""
    cond, uncond = (labels.ravel().tolist() for labels in given(1))
    run = plans()
    found = script(
        "return (await load('page_parts.mjs')).loops(data);",
        plans=[json.loads(plan.to_json()) for plan in run.values()],
        cond=cond,
        uncond=uncond,
        seed="11",
        shape=SHAPE,
    )
    wrong = []
    for (name, plan), latent in zip(run.items(), found, strict=True):
        functions = {key: FUNCTIONS[key] for key in plan.segments}
        assert set(plan.segments) <= {*FUNCTIONS, *SPLIT_SEGMENTS}
        expected = sampled(Runtime(plan, functions, {}, LatentSpec(SHAPE[0], downscale=1)), [11])
        got = np.array(latent, np.float32).reshape(expected.shape)
        # Matrix products resample in Python, so levels alone are not the same to the last bit.
        same = np.allclose(got, expected, rtol=1e-5, atol=1e-5) if "levels" in name else np.array_equal(got, expected)
        wrong += [] if same else [(name, float(np.abs(got - expected).max()))]
    assert not wrong


LETTERS = (
    "abcdefghijklmnopqrstuvwxyz" * 3
    + "ABCXYZ   ''0123456789.,!?-"
    + "éüßñçøıİΣσςẞ"
    + "e\u0301a\u0308n\u0303"
    + "日本語かな한국"
    "🙂👩\u200d🚀🇩🇪" + "\t\n\u00a0\u0085\u2003\u3000\ufeff" + "ﬁ①½™" + "_<>|/\\"
)


def texts(*specials: str) -> list[str]:
    """Words, odd characters, and the names of special tokens in the middle of it all."""
    dice = random.Random(3)
    made = ["", " ", "a large red circle on the left", "It's the cat's, they'll've", " two  spaces ", "A\tB\nC"]
    for _ in range(150):
        pieces = [
            dice.choice(specials)
            if specials and dice.random() < 0.1
            else "".join(dice.choices(LETTERS, k=dice.randint(1, 9)))
            for _ in range(dice.randint(1, 8))
        ]
        made.append(dice.choice(["", " "]).join(pieces))
    return made


CORPUS = ["the large red circle", "it's a small blue square above the yellow ring", "wörter, 日本語 and 🙂 0123"] * 40


def _padded(tokenizer: Any, **padding: Any) -> str:
    tokenizer.enable_padding(length=12, **padding)
    tokenizer.enable_truncation(12, direction=padding.get("direction", "right"))
    return str(tokenizer.to_str())


def gpt2_like() -> str:
    """Byte-level pairs with a prefix space, filled and cut on the left."""
    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _padded(tokenizer, pad_id=0, pad_token="<pad>", direction="left")


def llama_like() -> str:
    """Pairs over marked spaces; what is unknown falls into bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {name: at for at, name in enumerate(["<unk>", "<s>", *bytes_])}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "▁th", "▁the", "re", "red", "ci", "le"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("r", "e"), ("re", "d"), ("c", "i"), ("l", "e")]
    tokenizer = library.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _padded(tokenizer, pad_id=0, pad_token="<unk>")


def unigram_like(**more: Any) -> str:
    """Trained unigrams, in compatibility forms, with added tokens of all kinds."""
    tokenizer = library.Tokenizer(models.Unigram())
    tokenizer.normalizer = more.get(
        "normalizer", normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Lowercase()])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=more.get("scheme", "first"))
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [
            library.AddedToken("Ring", normalized=True),
            library.AddedToken("<mask>", normalized=False, lstrip=True),
            library.AddedToken("<sep>", normalized=False, rstrip=True),
            library.AddedToken("cat", normalized=False, single_word=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _padded(tokenizer, pad_id=0, pad_token="<pad>")


def charsmap(replacements: Mapping[str, str]) -> bytes:
    """SentencePiece's double-array trie of replacements, laid out one node after the other."""
    texts_, places = b"", {}
    for key, value in replacements.items():
        places[key.encode() + b"\0"] = len(texts_)
        texts_ += value.encode() + b"\0"
    units: dict[int, int] = {}
    free = [256]

    def lay(prefix: bytes, at: int, label: int) -> None:
        following = sorted({key[len(prefix)] for key in places if key.startswith(prefix) and len(key) > len(prefix)})
        base = free[0]
        free[0] += 256
        offset = at ^ base
        assert offset < 1 << 21
        units[at] = (offset << 10) | (0x100 if 0 in following else 0) | label
        for byte in following:
            if byte == 0:
                units[base] = places[prefix + b"\0"] | 1 << 31
            else:
                lay(prefix + bytes([byte]), base ^ byte, byte)

    lay(b"", 0, 0)
    trie = b"".join(struct.pack("<I", units.get(at, 0)) for at in range(free[0]))
    return struct.pack("<I", len(trie)) + trie + texts_


def t5_like() -> str:
    """Unigrams behind a map of characters, as SentencePiece writes them."""
    mapped = {"ﬁ": "fi", "\t": " ", "\u00a0": " ", "Ａ": "A", "e\u0301": "é", "½": "1/2", "\ufeff": ""}
    return unigram_like(normalizer=normalizers.Precompiled(charsmap(mapped)), scheme="always")


def clip() -> str:
    from tests import tiny

    return str(tiny.clip_tokenizer().backend_tokenizer.to_str())


def t5() -> str:
    from tests import tiny

    return str(tiny.t5_tokenizer().backend_tokenizer.to_str())


@pytest.mark.parametrize("made", [clip, t5, gpt2_like, llama_like, unigram_like, t5_like])
def test_tokenizers_read_as_in_python(script: javascript.Script, made: Callable[[], str]) -> None:
    content = json.loads(made())
    if content["padding"] is None:
        content["padding"] = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None}
        content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    prompts = texts(*(token["content"] for token in content["added_tokens"]))
    found = script(
        """const { Tokenizer } = await load('tokenizer.js');
        const tokenizer = new Tokenizer(data.content);
        return data.prompts.map((prompt) => tokenizer.encode(prompt, data.length));""",
        content=content,
        prompts=prompts,
        length=40,
    )
    ids, masks = Tokenizer(json.dumps(content)).encode(prompts, 40)
    assert len({tuple(row) for row in ids.tolist()}) > 100
    wrong = [
        (prompt, got["ids"], row.tolist())
        for prompt, got, row in zip(prompts, found, ids, strict=True)
        if got["ids"] != row.tolist()
    ]
    assert not wrong
    assert [got["mask"] for got in found] == masks.tolist()


def test_a_prompt_that_is_too_long_is_cut(script: javascript.Script) -> None:
    for made in (clip, gpt2_like):
        content = json.loads(made())
        content["padding"] = content["padding"] or {"pad_id": 0, "direction": "Right"}
        found = script(
            """const { Tokenizer } = await load('tokenizer.js');
            return new Tokenizer(data.content).encode('a red circle '.repeat(30), 12);""",
            content=content,
        )
        assert len(found["ids"]) == len(found["mask"]) == 12
        assert found["mask"] == [1] * 12


def test_what_a_tokenizer_has_and_the_page_has_not_is_refused(script: javascript.Script) -> None:
    content = json.loads(clip())
    content["padding"] = {"pad_id": 0, "direction": "Right"}
    content["normalizer"] = {"type": "BertNormalizer"}
    said = script(
        """const { Tokenizer } = await load('tokenizer.js');
        try { new Tokenizer(data.content); } catch (error) { return error.message; }""",
        content=content,
    )
    assert said == "tokenizer.json has the normalizer BertNormalizer, which this page cannot read"


ENCODERS = [
    {"part": "one", "tokenizer": "short", "max_length": 5, "hidden": "states", "pooled": "pool"},
    {"part": "two", "tokenizer": "short", "max_length": 5, "hidden": "states", "pooled": "pool"},
]
LONG = {"part": "long", "tokenizer": "long", "max_length": 7}
SPECS: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"encoders": [{**LONG, "part": "plain"}]},
    "stable-diffusion-xl": {"encoders": ENCODERS, "unconditional_zeros": True},
    "stable-diffusion-3": {"encoders": [*ENCODERS, LONG], "joint_attention_dim": 9, "max_sequence_length": 3},
    "stable-diffusion-3 without T5": {"encoders": ENCODERS, "joint_attention_dim": 9, "max_sequence_length": 3},
    "flux": {"encoders": [ENCODERS[0], LONG], "guidance": 3.5},
    "pixart": {"encoders": [LONG]},
    "class": {"classes": 10, "labels": {"ring": 4}},
}


@pytest.mark.parametrize("name", SPECS)
def test_conditioning_is_that_of_python(script: javascript.Script, name: str) -> None:
    """Text encoders that tell apart everything they are given."""
    spec = {**SPECS[name], "kind": name.partition(" ")[0]}
    prompts = ["4", "ring", None, ""] if name == "class" else ["A Red ring", None, ""]

    class Letters:
        def encode(self, prompts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
            rows = [[ord(letter) for letter in prompt][:max_length] for prompt in prompts]
            ids = np.array([row + [0] * (max_length - len(row)) for row in rows], np.int64)
            return ids, np.array([[1] * len(row) + [0] * (max_length - len(row)) for row in rows], np.int64)

    def states(ids: np.ndarray, width: int, factor: float) -> np.ndarray:
        places = np.arange(width, dtype=np.float32) + np.float32(factor)
        return ids[..., None].astype(np.float32) * places

    functions = {
        "one": lambda given: {
            "states": states(given["input_ids"], 3, 0.5),
            "pool": states(given["input_ids"][:, 0], 2, 1),
        },
        "two": lambda given: {
            "states": states(given["input_ids"], 4, 2.5),
            "pool": states(given["input_ids"][:, 0], 3, 4),
        },
        "long": lambda given: {"last_hidden_state": states(given["input_ids"] + 2 * given["attention_mask"], 9, 0.25)},
        "plain": lambda given: {"last_hidden_state": states(given["input_ids"], 6, 0.75)},
    }
    expected = text.encode(spec, {"short": Letters(), "long": Letters()}, functions, prompts)
    found = script("return (await load('page_parts.mjs')).conditioned(data);", spec=spec, prompts=prompts)
    for row, made in enumerate(found):
        assert set(made) == set(expected)
        for key, (values, shape) in made.items():
            want = expected[key][row : row + 1]
            assert tuple(shape) == want.shape, key
            np.testing.assert_array_equal(np.array(values, want.dtype).reshape(want.shape), want)


def test_an_unknown_class_is_refused(script: javascript.Script) -> None:
    said = script(
        """const { encode } = await load('conditioning.js');
        try { await encode({ kind: 'class', classes: 3 }, {}, {}, '7'); } catch (error) { return error.message; }"""
    )
    assert said == 'there is no class "7"; classes are 0 to 2 and the labels of the model'


def test_what_follows_from_the_size_is_that_of_python(script: javascript.Script) -> None:
    spec = {"kind": "stable-diffusion-xl", "residuals": {"down_0": [3, 8]}}
    expected = text.of_size(spec, {}, 1, 48, 32)
    found = script("return (await load('page_parts.mjs')).sized(data);", spec=spec, height=48, width=32)
    assert set(found) == set(expected)
    for name, (values, shape) in found.items():
        np.testing.assert_array_equal(np.array(values, np.float32).reshape(shape), expected[name])


def test_every_module_opens_with_one_sentence() -> None:
    for path in sorted(javascript.SITE.glob("*.js")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("// "), path.name
    assert len(list(javascript.SITE.glob("*.js"))) >= 14


def test_base64_of_a_map_of_characters_is_what_the_file_holds() -> None:
    """The format of the map that the tests make is the one that the tokenizer library reads."""
    content = json.loads(t5_like())["normalizer"]
    assert content["type"] == "Precompiled"
    assert base64.b64decode(content["precompiled_charsmap"])[4:8]
    assert normalizers.Precompiled(charsmap({"ﬁ": "fi"})).normalize_str("ﬁnd") == "find"
