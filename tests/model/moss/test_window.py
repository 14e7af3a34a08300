"""The rolling cache: streaming equals offline, rollback, eviction, re-anchoring, a day."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.moss_parity import greedy_uncached, joined
from model.mel import log_mel
from model.moss import forward
from model.moss.checkpoint import Checkpoint, memory_need
from model.moss.encoder import FRAME_MULTIPLE, split_blocks
from model.moss.generate import Request, generate
from model.moss.geometry import MarkerMode, WindowSettings
from model.moss.language import Access, KvBuffers, rotary_angles, rotate
from model.moss.network import AudioEmbeddings, MossAudio
from model.moss.window import RollingCache, slot_bytes
from tests.model.moss.tiny import LAYOUT, Stream, feed, feed_tails, make_model, random_audio, random_pcm

MODEL = make_model()
SHALLOW = make_model(n_layers=1)  # its keys and values depend on nothing but their own token
QUESTION = LAYOUT.question("What?")
SMALL = WindowSettings(n_blocks=3, scratch_tokens=128)
EVERYTHING = WindowSettings(n_blocks=6, scratch_tokens=128)


def logits_of(cache: RollingCache, slot_idx: int, first_block: int | None = None) -> Tensor:
    """Logits at the end of the question, [vocab]."""
    logits = cache.extend([cache.reserve(slot_idx, first_block)], [QUESTION])[0]
    cache.release([slot_idx])
    return logits


def audio_of(blocks: Sequence[AudioEmbeddings]) -> AudioEmbeddings:
    """Blocks as one stretch, empty where there are none."""
    return joined(blocks) if blocks else random_audio(MODEL, 0, 0)


def offline_keys_values(
    model: MossAudio, ids: Sequence[int], audio: AudioEmbeddings
) -> tuple[Tensor, Tensor]:
    """Keys (rotated) and values of one uncached pass, [L, K, n, D], taken from inside the layers."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    config = model.config.language
    angles = rotary_angles(torch.arange(len(ids)), config)

    def on_key(_module: nn.Module, _inputs: object, normed: Tensor) -> None:
        keys.append(rotate(normed[0], angles))

    def on_value(_module: nn.Module, _inputs: object, flat: Tensor) -> None:
        values.append(flat[0].view(len(ids), config.num_key_value_heads, -1).transpose(0, 1))

    handles = []
    for layer in model.language_model.layers:
        attention: Any = layer.self_attn
        handles += [
            attention.k_norm.register_forward_hook(on_key),
            attention.v_proj.register_forward_hook(on_value),
        ]
    try:
        model.logits_of_prompt(torch.tensor(ids), audio, LAYOUT.special.audio)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(keys), torch.stack(values)


def check_equals_offline(cache: RollingCache, stream: Stream, pcm: Tensor) -> None:
    """Encoder outputs, keys, values and answers of a slot against one pass over the whole clip."""
    model = cache.model
    hidden, taps = model.encode_clip(log_mel(pcm, 128))
    assert len(stream.hidden) == max(0, len(pcm) - 40) // 64_000
    for block_idx, committed in enumerate(stream.hidden):
        at = slice(50 * block_idx, 50 * block_idx + 50)
        torch.testing.assert_close(committed, hidden[at], atol=1e-5, rtol=0)
        for tap, whole in zip(stream.taps[block_idx], taps, strict=True):
            torch.testing.assert_close(tap, whole[at], atol=1e-5, rtol=0)

    audio = joined(model.embed_audio(split_blocks(log_mel(pcm, 128), model.config.encoder)))
    ids = cache.ids(stream.slot_idx)
    assert ids == (*LAYOUT.prefix, *LAYOUT.audio(hidden.shape[0]))
    keys, values = offline_keys_values(model, ids, audio)
    held = cache.read(stream.slot_idx)
    assert held.position.tolist() == list(range(len(ids)))
    torch.testing.assert_close(held.k, keys, atol=1e-4, rtol=0)
    torch.testing.assert_close(held.v, values, atol=1e-4, rtol=0)

    offline = model.logits_of_prompt(torch.tensor([*ids, *QUESTION]), audio, LAYOUT.special.audio)[-1]
    torch.testing.assert_close(logits_of(cache, stream.slot_idx), offline, atol=1e-4, rtol=0)
    answer = generate(cache, [Request(stream.slot_idx, QUESTION, 6)], guard=None)[0]
    assert list(answer.tokens) == greedy_uncached(Checkpoint(model, LAYOUT), [*ids, *QUESTION], audio, 6)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seconds=st.lists(st.floats(0.4, 13.0), min_size=3, max_size=3),
    # The last keeps streams of single samples from taking a tick for each.
    chunks=st.lists(st.integers(1, 90_000), max_size=12).map(lambda few: [*few, 30_000]),
    joins=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    tails=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_streaming_equals_offline(
    seconds: list[float], chunks: list[int], joins: list[int], tails: list[bool]
) -> None:
    """Any chunking, neighbours that join late, ask in between and leave: all as one offline pass."""
    cache = RollingCache(MODEL, LAYOUT, EVERYTHING, n_slots=3)
    clips = [random_pcm(int(16_000 * s), seed) for seed, s in enumerate(seconds)]
    streams = [Stream(MODEL, slot_idx) for slot_idx in range(3)]
    heard = [0, 0, 0]
    tick = 0
    while any(heard[i] < clips[i].shape[0] for i in range(3)):
        due = []
        for i in range(3):
            n = chunks[(tick + i) % len(chunks)]
            if tick >= joins[i] and heard[i] < clips[i].shape[0]:
                due.append((streams[i], clips[i][heard[i] : heard[i] + n]))
                heard[i] += n
        feed(cache, due)
        provisional = [stream for stream, _ in due if tails[(tick + stream.slot_idx) % 3]]
        if tick % 3 == 1 and provisional:
            feed_tails(cache, provisional)
            # A neighbour asks something, in the same call as nobody else; it is forgotten.
            logits_of(cache, provisional[0].slot_idx)
        tick += 1
    feed_tails(cache, streams)
    leaver = 1
    cache.reset([leaver])
    for i in (0, 2):
        check_equals_offline(cache, streams[i], clips[i])
    # Whoever takes the place that was left hears nothing of the one before.
    newcomer = Stream(MODEL, leaver)
    feed(cache, [(newcomer, clips[leaver])])
    feed_tails(cache, [newcomer])
    check_equals_offline(cache, newcomer, clips[leaver])


def filled(
    model: MossAudio, window: WindowSettings, n_blocks: int, n_slots: int = 1, seed: int = 0
) -> RollingCache:
    """A cache whose slots have heard `n_blocks` blocks; slot s's block b has seed s * 1000 + b."""
    cache = RollingCache(model, LAYOUT, window, n_slots)
    for block in range(n_blocks):
        cache.append({s: random_audio(model, seed + s * 1000 + block) for s in range(n_slots)})
    return cache


def test_a_fork_leaves_the_cache_bit_identical() -> None:
    """Whatever is asked, everything before the scratch is the same, in all slots."""
    cache = filled(MODEL, SMALL, 5, n_slots=3)
    cache.set_tail({1: random_audio(MODEL, 9, 31)})
    cache.flush()
    n_fixed = cache.buffers.k.shape[3] - SMALL.scratch_tokens
    before = [t[:, :, :, 1:n_fixed].clone() for t in (cache.buffers.k, cache.buffers.v)]  # 0 takes padding
    held = [cache.read(slot_idx) for slot_idx in range(3)]
    first = generate(cache, [Request(s, QUESTION, 9) for s in (0, 1, 1, 2)])
    for old, new in zip(before, (cache.buffers.k, cache.buffers.v), strict=True):
        assert torch.equal(old, new[:, :, :, 1:n_fixed])
    for slot_idx in range(3):
        assert torch.equal(held[slot_idx].k, cache.read(slot_idx).k)
        assert torch.equal(held[slot_idx].position, cache.read(slot_idx).position)
    assert generate(cache, [Request(s, QUESTION, 9) for s in (0, 1, 1, 2)]) == first


def test_a_tail_rolled_back_leaves_the_cache_bit_identical() -> None:
    """Provisional tails of any length, then none: the same bits, and the same bits from there on."""
    cache = filled(MODEL, SMALL, 4)
    twin = filled(MODEL, SMALL, 4)
    for n_tokens in (1, 24, 25, 26, 50, 7):
        cache.set_tail({0: random_audio(MODEL, n_tokens, n_tokens)})
        assert cache.n_tail(0) == n_tokens
    twin.set_tail({0: random_audio(MODEL, 7, 7)})  # a tail replaces the longer one before it
    assert torch.equal(logits_of(cache, 0), logits_of(twin, 0))
    cache.drop_tail([0])
    for other in (cache, twin):  # the twin's tail goes when its block is complete
        other.append({0: random_audio(MODEL, 77)})
    assert cache.ids(0) == twin.ids(0)
    assert cache.n_tail(0) == twin.n_tail(0) == 0
    assert torch.equal(cache.read(0).k, twin.read(0).k)
    assert torch.equal(cache.read(0).v, twin.read(0).v)
    assert torch.equal(logits_of(cache, 0), logits_of(twin, 0))


def test_slots_that_are_not_neighbours_share_a_call() -> None:
    """Blocks, tails and questions of slots 0 and 2, with 1 between them: as each alone."""
    together = filled(MODEL, SMALL, 2, n_slots=3)
    alone = filled(MODEL, SMALL, 2, n_slots=3)
    blocks = {s: random_audio(MODEL, 50 + s) for s in (0, 2)}
    tails = {s: random_audio(MODEL, 60 + s, 20 + s) for s in (0, 2)}
    together.append(blocks)
    together.set_tail(tails)
    for slot_idx in (0, 2):
        alone.append({slot_idx: blocks[slot_idx]})
        alone.set_tail({slot_idx: tails[slot_idx]})
        torch.testing.assert_close(together.read(slot_idx).k, alone.read(slot_idx).k, atol=1e-5, rtol=0)
    logits = together.extend([together.reserve(s) for s in (2, 0)], [QUESTION, QUESTION])
    for row, slot_idx in enumerate((2, 0)):
        torch.testing.assert_close(logits[row], logits_of(alone, slot_idx), atol=1e-4, rtol=0)


def test_reset_touches_only_its_slots() -> None:
    """A slot that is reset is as new; its neighbours keep every bit."""
    cache = filled(MODEL, SMALL, 5, n_slots=3)
    held = {s: cache.read(s) for s in (0, 2)}
    cache.reset([1])
    assert cache.ids(1) == LAYOUT.prefix
    cache.append({1: random_audio(MODEL, 8)})  # waits, and is forgotten before it is computed
    cache.reset([1])
    before = cache.buffers.k.clone()
    cache.flush()
    assert torch.equal(cache.buffers.k, before)
    for slot_idx, old in held.items():
        assert torch.equal(old.k, cache.read(slot_idx).k)
    cache.append({1: random_audio(MODEL, 5)})
    fresh = filled(MODEL, SMALL, 1, seed=5)
    torch.testing.assert_close(cache.read(1).k, fresh.read(0).k, atol=1e-5, rtol=0)


def spliced(model: MossAudio, ids: Tensor, audio: AudioEmbeddings) -> tuple[Tensor, list[Tensor]]:
    """Embeddings [n, H] of a row with its audio in place, and what DeepStack adds, each [1, n, H]."""
    is_audio = ids == LAYOUT.special.audio
    x = model.language_model.embed_tokens(ids)
    x[is_audio] = audio.embeds
    added = torch.zeros(len(audio.added), *x.shape)
    added[:, is_audio] = audio.added
    return x, [a[None] for a in added]


def fresh_logits(model: MossAudio, cache: RollingCache, blocks: Sequence[AudioEmbeddings]) -> Tensor:
    """The question's last logits by an uncached pass over what slot 0 holds, at the same positions."""
    ids = torch.tensor([*cache.ids(0), *QUESTION])
    held = cache.read(0).position
    position = torch.cat([held, torch.arange(len(QUESTION)) + int(held[-1]) + 1])
    x, deepstack = spliced(model, ids, audio_of(blocks))
    return model.lm_head(model.language_model.forward(x[None], position[None], deepstack))[0, -1]  # type: ignore[no-any-return]


WINDOWS = [
    WindowSettings(n_blocks=3, scratch_tokens=64, prefix="follows"),
    WindowSettings(n_blocks=3, scratch_tokens=64, prefix="stays"),
    WindowSettings(n_blocks=3, scratch_tokens=64, prefix="follows", evict_blocks=2),
    WindowSettings(n_blocks=3, scratch_tokens=64, prefix="stays", max_position=700),  # re-anchors often
    WindowSettings(n_blocks=3, scratch_tokens=64, markers="restart"),
]


@pytest.mark.parametrize("window", WINDOWS, ids=["follows", "stays", "two at once", "re-anchored", "restart"])
def test_attention_over_what_remains_equals_a_fresh_prefill(window: WindowSettings) -> None:
    """Forty blocks through a window of three: constant memory, logits of a fresh prefill of the rest.

    One layer, where what remains cannot have seen what is gone; in mode `restart` nothing remains
    that has, so all layers are compared.
    """
    model = MODEL if window.markers == "restart" else SHALLOW
    cache = RollingCache(model, LAYOUT, window, n_slots=2)
    pointers = [tensor.data_ptr() for tensor in cache.tensors]
    n_bytes, n_ids = cache.n_bytes, 0
    for block in range(40):
        cache.append({0: random_audio(model, block), 1: random_audio(model, 500 + block)})
        held = cache.blocks(0)
        assert held.stop == block + 1
        assert len(held) <= 3
        assert cache.end_position(0) + 64 <= window.max_position
        kept = [random_audio(model, b) for b in held]
        torch.testing.assert_close(logits_of(cache, 0), fresh_logits(model, cache, kept), atol=1e-4, rtol=0)
        if block >= 3:
            n_ids = max(n_ids, len(cache.ids(0)))
    assert n_ids <= len(LAYOUT.prefix) + 3 * (50 + 2 * 3)
    assert cache.n_bytes == n_bytes
    assert [tensor.data_ptr() for tensor in cache.tensors] == pointers


def test_every_layer_equals_a_pass_over_all_with_a_mask() -> None:
    """What was evicted lives on in deeper layers, as in one pass where each block sees what was there."""
    window = WindowSettings(n_blocks=3, scratch_tokens=64, prefix="stays")
    cache = RollingCache(MODEL, LAYOUT, window, n_slots=1)
    blocks = [random_audio(MODEL, block) for block in range(12)]
    n_prefix = len(LAYOUT.prefix)
    ids = [*LAYOUT.prefix, *LAYOUT.audio(600)]
    ends = [n_prefix + len(LAYOUT.audio(50 * (k + 1))) for k in range(12)]
    starts = [n_prefix, *ends[:-1]]
    n = len(ids)
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    for block in range(12):
        cache.append({0: blocks[block]})
        mask[starts[block] : ends[block], n_prefix : starts[cache.blocks(0).start]] = False
    x, deepstack = spliced(MODEL, torch.tensor(ids), joined(blocks))
    buffers = KvBuffers.new(MODEL.config.language, 1, n, x)
    access = Access(buffers, (0,), torch.zeros(1, 1, dtype=torch.int64), torch.arange(n)[None], mask[None])
    MODEL.language_model.forward(x[None], torch.arange(n)[None], deepstack, access)
    held = cache.read(0)
    assert held.position.tolist() == [*range(n_prefix), *range(starts[9], n)]
    torch.testing.assert_close(held.k, buffers.k[:, 0, :, held.position], atol=1e-4, rtol=0)
    torch.testing.assert_close(held.v, buffers.v[:, 0, :, held.position], atol=1e-4, rtol=0)


def test_a_reanchored_cache_gives_the_same_logits() -> None:
    """Moved back by thousands of positions, prompt and window together: within 1e-3."""
    window = WindowSettings(n_blocks=3, scratch_tokens=64, max_position=40_960)
    cache, twin = (filled(MODEL, window, 150) for _ in range(2))
    for other in (cache, twin):
        other.set_tail({0: random_audio(MODEL, 4, 33)})
    far = cache.end_position(0)
    cache.reanchor(0)
    assert far > 8000
    assert cache.end_position(0) < 300
    assert cache.ids(0) == twin.ids(0)  # the markers do not change
    torch.testing.assert_close(logits_of(cache, 0), logits_of(twin, 0), atol=1e-3, rtol=0)
    assert torch.equal(cache.read(0).v, twin.read(0).v)
    for other in (cache, twin):
        other.append({0: random_audio(MODEL, 5)})
    torch.testing.assert_close(logits_of(cache, 0), logits_of(twin, 0), atol=1e-3, rtol=0)


def test_positions_never_run_out() -> None:
    """A low limit makes the cache re-anchor by itself, again and again, to the same answers."""
    low, high = (WindowSettings(n_blocks=3, scratch_tokens=64, max_position=n) for n in (600, 40_960))
    cache, twin = filled(MODEL, low, 0), filled(MODEL, high, 0)
    n_moves = 0
    for block in range(40):
        before = cache.end_position(0)
        for other in (cache, twin):
            other.append({0: random_audio(MODEL, block)})
            other.set_tail({0: random_audio(MODEL, 100 + block, 1 + block % 50)})
        n_moves += cache.end_position(0) < before
        assert cache.end_position(0) + low.scratch_tokens <= 600
        torch.testing.assert_close(logits_of(cache, 0), logits_of(twin, 0), atol=1e-3, rtol=0)
    assert n_moves > 5


@pytest.mark.parametrize("markers", ["absolute", "restart"])
def test_memory_is_what_was_computed_beforehand(markers: MarkerMode) -> None:
    """Each slot takes `slot_bytes`; beside them only the prompt's keys and values are kept."""
    window = WindowSettings(n_blocks=3, scratch_tokens=64, markers=markers)
    two, five = (RollingCache(MODEL, LAYOUT, window, n).n_bytes for n in (2, 5))
    per_slot = slot_bytes(MODEL.config, window, len(LAYOUT.prefix), torch.float32)
    assert five - two == 3 * per_slot
    assert (
        two - 2 * per_slot == len(LAYOUT.prefix) * memory_need(MODEL.config, torch.float32).kv_bytes_per_token
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_run_and_stay_close(dtype: torch.dtype) -> None:
    """In half precision the same code gives about the same logits, also after re-anchoring."""
    model = make_model().to(dtype)
    cache = RollingCache(model, LAYOUT, WindowSettings(n_blocks=3, scratch_tokens=64, max_position=600), 1)
    exact = filled(MODEL, WindowSettings(n_blocks=3, scratch_tokens=64, max_position=600), 0)
    for block in range(12):
        audio = random_audio(MODEL, block)
        exact.append({0: audio})
        cache.append({0: AudioEmbeddings(audio.embeds.to(dtype), audio.added.to(dtype))})
    assert cache.buffers.k.dtype == dtype
    a, b = logits_of(cache, 0).float(), logits_of(exact, 0)
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.99


def test_calls_have_round_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a stream's growing block and the questions: few shapes, and no call beyond its bound."""
    monkeypatch.setattr(forward, "MAX_CALL_TOKENS", 160)
    cache = RollingCache(MODEL, LAYOUT, SMALL, n_slots=4)
    cache.flush()  # the prompt alone
    frames: set[int] = set()
    calls: set[tuple[int, int]] = set()
    conv, layer = MODEL.audio_encoder.conv1, MODEL.language_model.layers[0]
    handles = [
        conv.register_forward_pre_hook(lambda _module, inputs: frames.add(inputs[0].shape[-1])),
        layer.register_forward_pre_hook(lambda _module, inputs: calls.add(tuple(inputs[0].shape[:2]))),
    ]
    try:
        for n_samples in range(700, 64_000, 3100):
            streams = [Stream(MODEL, slot_idx) for slot_idx in range(4)]
            feed(cache, [(stream, random_pcm(n_samples + 160 * stream.slot_idx, 0)) for stream in streams])
            feed_tails(cache, streams)
            generate(cache, [Request(slot_idx, QUESTION, 1) for slot_idx in range(4)])
            cache.reset(range(4))
    finally:
        for handle in handles:
            handle.remove()
    assert frames == {*range(FRAME_MULTIPLE, 400, FRAME_MULTIPLE), 400}
    assert {width % forward.TOKEN_MULTIPLE for _, width in calls} == {0}
    assert max(n_rows for n_rows, _ in calls) > 1
    assert all(n_rows * width <= 160 for n_rows, width in calls if n_rows > 1)
