"""Where `config.json` and the shapes of stored tensors say different things, with both values.

Shapes that do not fit are refused in any case. This names the one number behind hundreds of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from cabochon.checkpoint.headers import TensorMeta
from cabochon.config import (
    AudioConfig,
    FrameConfig,
    Gemma4Config,
    LayerConfig,
    PatchConfig,
    TextConfig,
    VisionConfig,
)
from cabochon.load.tree import AUDIO, AUDIO_PROJECTOR, EMBEDDER, TEXT, VISION

Stored = Mapping[str, TensorMeta]  # by canonical name


class Contradiction(NamedTuple):
    """`key` of the configuration is `said`, but `witness` (a tensor, or the file) has `found`."""

    key: str
    said: int
    found: int
    witness: str

    def __str__(self) -> str:
        return f"{self.key} is {self.said}, but {self.witness} has {self.found}"


class _Question(NamedTuple):
    key: str
    said: int
    tensor: str  # a tensor, or the module of a matrix
    axis: int
    divide_by: str = ""  # a tensor, whose length is what each of them takes


def contradictions(config: Gemma4Config, stored: Stored) -> Iterator[Contradiction]:
    """Everything that `stored` answers differently from `config`."""
    told: set[str] = set()
    for question in _questions(config):
        found = _answer(question, stored)
        if found is not None and found[0] != question.said and question.key not in told:
            told.add(question.key)
            yield Contradiction(question.key, question.said, *found)
    towers: list[tuple[str, str, int]] = [("text", f"{TEXT}.layers.", len(config.text.layers))]
    if isinstance(config.vision, VisionConfig):
        towers.append(("vision", f"{VISION}.encoder.layers.", config.vision.num_layers))
    if isinstance(config.audio, AudioConfig):
        towers.append(("audio", f"{AUDIO}.layers.", config.audio.num_layers))
    for part, prefix, said in towers:
        numbers = {n for name in stored if (n := _number(name, prefix)) is not None}
        if numbers and max(numbers) + 1 != said:
            yield Contradiction(f"{part} num_hidden_layers", said, max(numbers) + 1, "the file")


def _number(name: str, prefix: str) -> int | None:
    number = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
    return int(number) if number.isdecimal() else None


def _answer(question: _Question, stored: Stored) -> tuple[int, str] | None:
    """What the file says, and which tensor says so; None if it does not tell."""
    meta = _tensor(question.tensor, stored)
    if meta is None or question.axis >= len(meta.shape):
        return None
    found = meta.shape[question.axis]
    if question.divide_by:
        each = stored.get(question.divide_by)
        if each is None or len(each.shape) != 1 or not each.shape[0] or found % each.shape[0]:
            return None
        found //= each.shape[0]
    return found, f"{meta.name} {list(meta.shape)}"


def _tensor(name: str, stored: Stored) -> TensorMeta | None:
    """A tensor by its name, or that of a matrix whose first axis is its rows."""
    for leaf in ("", ".weight", ".weight_packed"):
        meta = stored.get(name + leaf)
        if meta is not None:
            # bytes may hold two rows each (ModelOpt), or a matrix in a single column (bitsandbytes)
            unclear = leaf == ".weight" and (meta.dtype == "U8" or meta.shape[1:] == (1,))
            return None if unclear else meta
    return None


def _questions(config: Gemma4Config) -> Iterator[_Question]:
    yield from _text(config.text)
    if isinstance(config.vision, VisionConfig):
        yield from _vision(config.vision)
    elif isinstance(config.vision, PatchConfig):
        yield from _patches(config.vision)
    if isinstance(config.audio, AudioConfig):
        yield from _audio(config.audio)
    elif isinstance(config.audio, FrameConfig):
        yield _Question("audio_embed_dim", config.audio.samples, AUDIO_PROJECTOR, 1)


def _text(text: TextConfig) -> Iterator[_Question]:
    first = f"{TEXT}.layers.0"
    yield _Question("text hidden_size", text.hidden_size, f"{TEXT}.norm.weight", 0)
    yield _Question("vocab_size", text.vocab_size, f"{TEXT}.embed_tokens", 0)
    width = text.layers[0].intermediate_size
    yield _Question("text intermediate_size", width, f"{first}.mlp.gate_proj", 0)
    for layer in _firsts(text):
        yield from _attention(text, layer)
    if text.experts is not None:
        count, inner = text.experts.count, text.experts.intermediate_size
        yield _Question("num_experts", count, f"{first}.router.per_expert_scale", 0)
        yield _Question("moe_intermediate_size", inner, f"{first}.experts.0.gate_proj", 0)
        yield _Question("moe_intermediate_size", inner, f"{first}.experts.down_proj", 2)
    if text.ple_dim:
        norm, table = f"{TEXT}.per_layer_projection_norm", f"{TEXT}.embed_tokens_per_layer"
        yield _Question("hidden_size_per_layer_input", text.ple_dim, norm, 0)
        yield _Question("vocab_size_per_layer_input", text.ple_vocab_size, table, 0)


def _firsts(text: TextConfig) -> tuple[LayerConfig, ...]:
    """The first layer of each kind."""
    return tuple({layer.kind: layer for layer in reversed(text.layers)}.values())


def _attention(text: TextConfig, layer: LayerConfig) -> Iterator[_Question]:
    name, of = f"{TEXT}.layers.{layer.index}.self_attn", f"of {layer.kind} layers"
    queries, keys = f"{name}.q_norm.weight", f"{name}.k_norm.weight"
    yield _Question(f"head_dim {of}", layer.head_dim, queries, 0)
    yield _Question("num_attention_heads", text.num_heads, f"{name}.q_proj", 0, queries)
    yield _Question(f"num_key_value_heads {of}", layer.kv_heads, f"{name}.k_proj", 0, keys)


def _vision(vision: VisionConfig) -> Iterator[_Question]:
    first, table = f"{VISION}.encoder.layers.0", f"{VISION}.patch_embedder.position_embedding_table"
    norm, attention = f"{first}.input_layernorm", f"{first}.self_attn"
    width, heads = vision.intermediate_size, vision.num_heads
    yield _Question("vision hidden_size", vision.hidden_size, norm, 0)
    yield _Question("vision intermediate_size", width, f"{first}.mlp.gate_proj.linear", 0)
    yield _Question("vision head_dim", vision.head_dim, f"{attention}.q_norm", 0)
    each = f"{attention}.q_norm.weight"
    yield _Question("vision num_attention_heads", heads, f"{attention}.q_proj.linear", 0, each)
    yield _Question("position_embedding_size", vision.position_table_size, table, 1)


def _patches(vision: PatchConfig) -> Iterator[_Question]:
    pixels, table = f"{EMBEDDER}.patch_ln1", f"{EMBEDDER}.pos_embedding"
    yield _Question("3 * (patch_size * pooling_kernel_size)^2", vision.pixels, pixels, 0)
    yield _Question("mm_embed_dim", vision.hidden_size, f"{EMBEDDER}.patch_ln2", 0)
    yield _Question("mm_posemb_size", vision.position_table_size, table, 0)


def _audio(audio: AudioConfig) -> Iterator[_Question]:
    subsample, first = f"{AUDIO}.subsample_conv_projection", f"{AUDIO}.layers.0"
    for index, channels in enumerate(audio.conv_channels):
        name = f"{subsample}.layer{index}.conv"
        yield _Question(f"subsampling_conv_channels[{index}]", channels, name, 0)
    kernel = f"{first}.lconv1d.depthwise_conv1d"
    yield _Question("audio hidden_size", audio.hidden_size, f"{first}.norm_out", 0)
    yield _Question("conv_kernel_size", audio.conv_kernel, kernel, 2)
    yield _Question("output_proj_dims", audio.output_size, f"{AUDIO}.output_proj.bias", 0)
