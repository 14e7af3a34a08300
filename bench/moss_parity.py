"""Our MOSS-Audio against what the published code computed: `python -m bench.moss_parity FOLDER...`.

FOLDER holds a checkpoint and cases as in `moss_reference`. Every case runs offline (the whole clip,
no cache) and streamed (random pieces, growing blocks heard and rolled back, a fork at the end).
Prints the largest error of each kind; exits 1 beyond the tolerance. With `--device cuda` the same on a
GPU in plain float32, the answers by captured graphs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.mel import DYNAMIC_RANGE, SILENCE, StreamingMel, log_mel
from model.moss import checkpoint
from model.moss.checkpoint import Checkpoint
from model.moss.encoder import Block, split_blocks
from model.moss.frontend import StreamingFrontend
from model.moss.generate import Request, generate
from model.moss.geometry import WindowSettings
from model.moss.network import AudioEmbeddings
from model.moss.step_graph import CudaGraphs
from model.moss.window import RollingCache

TOLERANCE = {"mel": 1e-5, "encoder": 1e-5, "taps": 1e-5, "logits": 1e-4, "prompt": 0.0, "greedy": 0.0}
N_LAST = 32  # prompt positions whose logits are stored


@dataclass(frozen=True, slots=True)
class Case:
    """One clip and what the published code made of it."""

    name: str
    prompt: str
    stored: Mapping[str, Tensor]

    @property
    def pcm(self) -> Tensor:
        """[n_samples] float32."""
        return self.stored["pcm"].float()


def cases(folder: Path) -> list[Case]:
    """The cases of a reference folder."""
    listed = json.loads((folder / "cases.json").read_text("utf-8"))["cases"]
    return [Case(c["name"], c["prompt"], load_file(folder / f"{c['name']}.safetensors")) for c in listed]


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ."""
    return float((a.cpu() - b).abs().max()) if a.shape == b.shape else float("inf")


def n_different(a: Sequence[int], b: Sequence[int]) -> float:
    """How many ids differ."""
    return float(sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b)))


def joined(heard: Sequence[AudioEmbeddings]) -> AudioEmbeddings:
    """The tokens of consecutive blocks."""
    return AudioEmbeddings(
        torch.cat([block.embeds for block in heard]), torch.cat([block.added for block in heard], dim=1)
    )


def greedy_uncached(ckpt: Checkpoint, ids: Sequence[int], audio: AudioEmbeddings, n: int) -> list[int]:
    """`n` greedy tokens, the whole sequence computed again for each."""
    special = ckpt.layout.special
    said: list[int] = []
    for _ in range(n):
        prompt = torch.tensor([*ids, *said], device=ckpt.model.device)
        last = ckpt.model.logits_of_prompt(prompt, audio, special.audio)[-1].clone()
        last[list(special.suppressed)] = -torch.inf
        said.append(int(last.argmax()))
    return said


@torch.inference_mode()
def offline_errors(ckpt: Checkpoint, case: Case) -> dict[str, float]:
    """Largest error of each kind, the whole clip at once and no cache."""
    model, stored = ckpt.model, case.stored
    mel = log_mel(case.pcm, model.config.encoder.num_mel_bins)
    errors = {"mel": difference(mel.T, stored["mel"])} if "mel" in stored else {}
    hidden, taps = model.encode_clip(mel)
    errors["encoder"] = difference(hidden, stored["encoder"])
    errors["taps"] = max((difference(t, stored[f"deepstack_{k}"]) for k, t in enumerate(taps)), default=0.0)
    ids = ckpt.layout.clip(hidden.shape[0], case.prompt)
    errors["prompt"] = n_different(ids, stored["input_ids"].tolist())
    audio = joined(model.embed_audio(split_blocks(mel, model.config.encoder)))
    logits = model.logits_of_prompt(torch.tensor(ids, device=model.device), audio, ckpt.layout.special.audio)
    errors["logits"] = difference(logits[-N_LAST:], stored["logits_last32"])
    said = greedy_uncached(ckpt, ids, audio, len(stored["greedy"]))
    errors["greedy"] = n_different(said, stored["greedy"].tolist())
    return errors


def known_peak(pcm: Tensor, n_mels: int) -> float:
    """What a front end must know of a clip before its first frame, log10 power.

    Nothing, except where the clip's maximum sets the floor of a cell: the published code looks at
    the whole clip first, and no stream can.
    """
    mel = StreamingMel(n_mels)
    frames = torch.cat([mel.push(pcm), mel.finish()])
    return mel.peak if bool((frames < mel.peak - DYNAMIC_RANGE).any()) else SILENCE


@torch.inference_mode()
def streamed_errors(ckpt: Checkpoint, case: Case, seed: int) -> dict[str, float]:
    """Largest error of each kind: random pieces, provisional tails in between, then a fork."""
    model, stored, config = ckpt.model, case.stored, ckpt.model.config.encoder
    rng = torch.Generator().manual_seed(seed)
    pcm = case.pcm
    n_blocks = pcm.shape[0] // 64_000 + 1
    settings = WindowSettings(n_blocks=n_blocks, max_position=40_960)
    cache = RollingCache(model, ckpt.layout, settings, n_slots=1)
    if model.device.type == "cuda":
        cache.decode_step.capture(CudaGraphs())
    frontend = StreamingFrontend(config, min_peak=known_peak(pcm, config.num_mel_bins))
    encoded: list[Block] = []
    at = 0
    while at < pcm.shape[0]:
        n = int(torch.randint(1, 40_000, (1,), generator=rng))
        complete = frontend.push(pcm[at : at + n])
        at += n
        for block in complete:
            cache.append({0: model.embed_audio([block])[0]})
        encoded += complete
        if (tail := frontend.tail()) is not None and torch.rand(1, generator=rng) < 0.5:
            cache.set_tail({0: model.embed_audio([tail])[0]})
    cache.drop_tail([0])
    if (tail := frontend.tail()) is not None:
        cache.set_tail({0: model.embed_audio([tail])[0]})
        encoded.append(tail)

    outputs = [model.audio_encoder.forward([block]) for block in encoded]

    def joined(pieces: Iterable[Tensor]) -> Tensor:
        return torch.cat([x[0, : out.n_tokens[0]] for x, out in zip(pieces, outputs, strict=True)])

    errors = {"encoder": difference(joined(out.hidden for out in outputs), stored["encoder"])}
    taps = [joined(out.taps[k] for out in outputs) for k in range(len(config.tap_layers))]
    errors["taps"] = max((difference(t, stored[f"deepstack_{k}"]) for k, t in enumerate(taps)), default=0.0)
    question = ckpt.layout.question(case.prompt)
    errors["prompt"] = n_different(cache.ids(0) + question, stored["input_ids"].tolist())
    n_last = min(N_LAST, len(question))
    continuation = cache.reserve(0)
    logits = torch.cat([cache.extend([continuation], [[token]]) for token in question])
    errors["logits"] = difference(logits[-n_last:], stored["logits_last32"][-n_last:])
    cache.release([0])
    answer = generate(cache, [Request(0, question, len(stored["greedy"]))], guard=None)[0]
    errors["greedy"] = n_different(answer.tokens, stored["greedy"].tolist())
    return errors


def main() -> int:
    """Check every folder; 1 where a tolerance was passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3, help="random chunkings of each case")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # else convolutions on a GPU round to 10 bits
    worst: dict[str, float] = {}
    for folder in options.folders:
        ckpt = checkpoint.load(str(folder), torch.float32, options.device)
        for case in cases(folder):
            runs = {"offline": offline_errors(ckpt, case)}
            runs |= {f"streamed/{seed}": streamed_errors(ckpt, case, seed) for seed in range(options.seeds)}
            for how, errors in runs.items():
                shown = "  ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
                print(f"{folder.name}/{case.name} {how}: {shown}")
                for kind, error in errors.items():
                    name = f"{how.partition('/')[0]}_{kind}"
                    worst[name] = max(worst.get(name, 0.0), error)
    # A NaN is beyond every tolerance.
    is_within = all(error <= TOLERANCE[name.partition("_")[2]] for name, error in worst.items())
    print(json.dumps({"worst": worst, "tolerance": TOLERANCE, "ok": is_within}))
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main())
