"""What a MOSS-Audio checkpoint declares: shapes, special tokens, stop tokens.

Reads dictionaries already parsed from `config.json`, `processor_config.json` and
`generation_config.json`; opens no file. A setting that would change the arithmetic and is not
implemented is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from model.errors import CheckpointError
from model.json_file import positive

MODEL_TYPE = "moss_audio"
DIGITS = tuple(range(15, 25))  # '0' to '9' in Qwen's vocabulary


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Shapes of the audio encoder."""

    d_model: int
    output_dim: int
    num_mel_bins: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    downsample_hidden_size: int  # channels of the convolution stem
    tap_layers: tuple[int, ...]  # 0-based layers whose output is tapped, in rising order
    n_window: int  # half a block, in mel frames

    @property
    def block_frames(self) -> int:
        """Mel frames of a whole block: 400, 4.00 s."""
        return 2 * self.n_window

    @property
    def block_tokens(self) -> int:
        """Audio tokens of a whole block: 50."""
        return n_audio_tokens(self.block_frames)


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Shapes of the language model, a Qwen3."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float


@dataclass(frozen=True, slots=True)
class MossConfig:
    """Shapes of the whole model."""

    encoder: EncoderConfig
    language: LanguageConfig
    adapter_hidden_size: int
    n_deepstack: int  # language layers that get a tap of the encoder
    dtype: str | None  # as the checkpoint was stored


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids that are spliced in, never encoded from text."""

    audio: int = 151_654  # placeholder of an audio embedding; never generated
    audio_start: int = 151_669
    audio_end: int = 151_670
    digits: tuple[int, ...] = DIGITS  # ids of '0' to '9', for the time markers
    stop: tuple[int, ...] = (151_645,)  # any of these ends an answer
    has_markers: bool = True
    mel_dtype: str = "float32"  # the log-mel is rounded to this before anything else

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Ids that are never generated."""
        return (self.audio, self.audio_start, self.audio_end)


def n_audio_tokens(n_frames: int) -> int:
    """Audio tokens of a block of `n_frames` mel frames: three convolutions of stride 2."""
    return -(-n_frames // 8)


def _integer(section: Mapping[str, Any], key: str, where: str) -> int:
    return positive(section, key, f"config.json: {where}")


@contextmanager
def _of_right_types(file: str) -> Iterator[None]:
    """Whatever has a type that nobody expects is one clear error."""
    try:
        yield
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as exc:
        raise CheckpointError(f"{file}: a value is of a type that cannot be used: {exc}"[:300]) from exc


def _expect(section: Mapping[str, Any], where: str, allowed: Mapping[str, tuple[object, ...]]) -> None:
    for key, values in allowed.items():
        if key in section and section[key] not in values:
            known = " or ".join(map(repr, values))
            raise CheckpointError(f"config.json: {where}{key} is {section[key]!r}; only {known} is known")


def _section(root: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        if isinstance(section := root.get(name), Mapping):
            return section
    raise CheckpointError(f"config.json: no section {' or '.join(names)}")


def _encoder(section: Mapping[str, Any]) -> EncoderConfig:
    where = "audio_config."
    _expect(
        section,
        where,
        {"activation_function": ("gelu",), "downsample_rate": (8,), "layer_norm_eps": (1e-5,)},
    )
    n_layers = _integer(section, "encoder_layers", where)
    taps = section.get("deepstack_encoder_layer_indexes") or ()
    if any(not isinstance(tap, int) or not 0 <= tap < n_layers for tap in taps):
        raise CheckpointError(
            f"config.json: {where}deepstack_encoder_layer_indexes {taps} of {n_layers} layers"
        )
    config = EncoderConfig(
        d_model=_integer(section, "d_model", where),
        output_dim=_integer(section, "output_dim" if section.get("output_dim") else "d_model", where),
        num_mel_bins=_integer(section, "num_mel_bins", where),
        encoder_layers=n_layers,
        encoder_attention_heads=_integer(section, "encoder_attention_heads", where),
        encoder_ffn_dim=_integer(section, "encoder_ffn_dim", where),
        downsample_hidden_size=_integer(section, "downsample_hidden_size", where),
        # The published code keeps a set and taps in layer order, whatever the order in the file.
        tap_layers=tuple(sorted(set(taps))),
        n_window=section.get("n_window") or 200,  # older files leave it out; every reader takes 200
    )
    if config.block_frames != 400:
        # Markers stand after every 25 audio tokens: other blocks would put them across two blocks.
        raise CheckpointError(f"config.json: {where}n_window is {config.n_window}; only 200 is known")
    if config.num_mel_bins != 128:  # fixed in the published stem: 16 bins after three halvings
        raise CheckpointError(f"config.json: {where}num_mel_bins is {config.num_mel_bins}; only 128 is known")
    return config


def _language(section: Mapping[str, Any]) -> LanguageConfig:
    where = "language_config."
    _expect(
        section,
        where,
        {
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "use_sliding_window": (False,),
            "tie_word_embeddings": (False,),
        },
    )
    # transformers 5 moved the rotary settings into one section; 4.57.1 has them flat.
    rope = section.get("rope_parameters") or {}
    scaling = section.get("rope_scaling")
    if (rope.get("rope_type", "default") != "default") or (
        scaling and scaling.get("rope_type", scaling.get("type")) != "default"
    ):
        raise CheckpointError(f"config.json: {where}rope scaling {scaling or rope} is not known")
    heads = _integer(section, "num_attention_heads", where)
    hidden = _integer(section, "hidden_size", where)
    config = LanguageConfig(
        vocab_size=_integer(section, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_integer(section, "intermediate_size", where),
        num_hidden_layers=_integer(section, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=_integer(section, "num_key_value_heads", where),
        head_dim=_integer(section, "head_dim", where) if section.get("head_dim") else hidden // heads,
        max_position_embeddings=_integer(section, "max_position_embeddings", where),
        rope_theta=float(rope.get("rope_theta", section.get("rope_theta", 1e6))),
        rms_norm_eps=float(section.get("rms_norm_eps", 1e-6)),
    )
    if heads % config.num_key_value_heads:
        raise CheckpointError(f"config.json: {heads} heads for {config.num_key_value_heads} key heads")
    return config


@_of_right_types("config.json")
def read_config(root: Mapping[str, Any]) -> MossConfig:
    """The shapes in a `config.json`.

    Both nestings are read: sections at the root, as on Hugging Face, or together inside one section
    (`thinker_config` or `model_config`), as some conversions write them. The language section is
    called `language_config` or `text_config`.

    Raises:
        CheckpointError: another model type, a missing key, or a setting that is not implemented.
    """
    if root.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"config.json: model_type is {root.get('model_type')!r}, not {MODEL_TYPE!r}")
    inner = root
    for name in ("thinker_config", "model_config"):
        if "audio_config" not in root and isinstance(root.get(name), Mapping):
            inner = {**root, **root[name]}
    encoder = _encoder(_section(inner, "audio_config"))
    language = _language(_section(inner, "language_config", "text_config"))
    _expect(inner, "", {"tie_word_embeddings": (False,)})
    n_inject = inner.get("deepstack_num_inject_layers")
    n_taps = len(encoder.tap_layers)
    n_deepstack = n_taps if n_inject is None else min(n_taps, int(n_inject))
    if n_deepstack > language.num_hidden_layers:
        raise CheckpointError(f"config.json: {n_deepstack} taps for {language.num_hidden_layers} layers")
    return MossConfig(
        encoder=encoder,
        language=language,
        adapter_hidden_size=_integer(inner, "adapter_hidden_size", ""),
        n_deepstack=n_deepstack,
        dtype=inner.get("dtype") or inner.get("torch_dtype"),
    )


@_of_right_types("processor_config.json or generation_config.json")
def read_special_tokens(
    processor: Mapping[str, Any], generation: Mapping[str, Any], root: Mapping[str, Any]
) -> SpecialTokens:
    """The special tokens of a checkpoint.

    Args:
        processor: `processor_config.json` (or `preprocessor_config.json`); empty where absent.
        generation: `generation_config.json`; empty where absent.
        root: `config.json`, for the stop id where the other files have none.

    Raises:
        CheckpointError: a mel setting other than the published one.
    """
    known = SpecialTokens()
    mel = processor.get("mel_config", processor)  # some revisions have the mel settings flat
    for key, value in {"mel_sr": 16_000, "mel_dim": 128, "mel_n_fft": 400, "mel_hop_length": 160}.items():
        if mel.get(key, value) != value:
            raise CheckpointError(f"processor_config.json: {key} is {mel[key]}; only {value} is known")
    stop = generation.get("eos_token_id", root.get("eos_token_id"))
    if stop is None:
        stop = known.stop
    return SpecialTokens(
        audio=processor.get("audio_token_id", known.audio),
        audio_start=processor.get("audio_start_id", known.audio_start),
        audio_end=processor.get("audio_end_id", known.audio_end),
        stop=(stop,) if isinstance(stop, int) else tuple(stop),
        # The processor's own default is no markers; every official file says true.
        has_markers=bool(processor.get("enable_time_marker", True)),
        mel_dtype=str(mel.get("mel_dtype", "float32")).removeprefix("torch."),
    )
