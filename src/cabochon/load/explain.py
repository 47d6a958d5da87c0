"""What the codes of problems mean, at length: `cabochon inspect --explain CODE`."""

from __future__ import annotations

from collections.abc import Mapping

from cabochon.errors import CabochonError

EXPLANATIONS: Mapping[str, str] = {
    "FOREIGN": """\
config.json names an architecture that is not run here: a drafter, a diffusion or embedding model,
an earlier Gemma, or no Gemma at all. Such files share tensor names with Gemma 4 and compute other
things, so names alone are not believed.

What to do: use the checkpoint of a model that writes text (Gemma4ForConditionalGeneration,
Gemma4UnifiedForConditionalGeneration, Gemma4ForCausalLM, Gemma4UnifiedForCausalLM).""",
    "CONFIG": """\
A number in config.json and the shapes of stored tensors contradict each other: so many layers, such
a hidden size, so many experts. The message has both values. Most other problems of the same report
follow from this one.

What to do: fetch config.json and the weights from the same revision of the same repository. If you
made the checkpoint, save the configuration of the model that was saved.""",
    "UNUSED": """\
A stored tensor has no place in the model that config.json describes. Other engines skip such
tensors; but a tensor that is skipped may be a scale, an expert or a whole layer, and then the model
answers, wrongly. Tensors that are known to be superfluous are dropped with a reason instead, which
the report lists.

What to do: check that config.json belongs to these weights. If the tensor is one that a new version
of a quantizer writes, it is a format this version does not know: please report it.""",
    "MISSING": """\
Nothing is stored for something the model needs. Other engines leave such weights as they happened
to be initialised.

What to do: check that the download is complete (every shard that the index names), and that
config.json belongs to these weights. A text-only file of a multimodal model needs vision_config and
audio_config set to null.""",
    "TWICE": """\
Two stored names mean the same tensor, in two spellings or in two shards, or a matrix is stored both
whole and in parts. Which one is right cannot be seen from outside.

What to do: remove one of them; `cabochon inspect --tensors` shows where each lies.""",
    "SHAPE": """\
A tensor does not have the shape that the model needs: the message has both. If all other tensors
fit, the file is damaged or was changed; if many do not, config.json is that of another model.""",
    "DTYPE": """\
A tensor is stored in a type that its place does not allow, such as a norm in bytes or a matrix in
64-bit floats. Stored bits are never reinterpreted: what is an int8 in the header is not read as a
float8.

What to do: export the tensor as bf16, f16 or f32.""",
    "SCHEME": """\
The tensors of a matrix do not make up any quantization scheme that this version loads, or
config.json asks for a computation (such as rounded activations or a transform) that this version
does not do. The message names the nearest scheme and what differs, or the format that was
recognised. What config.json says never decides against the tensors; it only breaks ties.

What to do: see docs/formats.md for what loads. If tensors are missing, the file is incomplete.""",
    "VALUE": """\
A value cannot be right: a weight or a scale that is not a number or infinite (also once it is
rounded to the dtype that computes), a shape or a global scale that contradicts the rest. This is
seen while weights are read, so `inspect` alone does not see it; it ends the load. A quantizer that
met an overflow leaves such files, and so does a damaged disk.

What to do: compare the file's SHA-256 with that of the repository. If they agree, the checkpoint
was published broken: tell its author, with the tensor's name.""",
    "UNREADABLE": """\
Something is not a file of its kind: a header that is cut off, spans that overlap or leave a gap, a
name given twice, an index that names files or tensors that are not there, JSON that is malformed.
Nothing is guessed from a damaged file.

What to do: download it again. `inspect` reads headers only and takes a second.""",
    "MEMORY": """\
The checkpoint would load, but not on this machine. `cabochon inspect` forecasts what is needed: the
weights in their stored bits, keys and values, and the program itself.

What to do: use a checkpoint with fewer bits, lower --max-context or --kv-cache-bytes, or close
other programs.""",
}


def explain(code: str) -> str:
    """The text for `code`, in any case.

    Raises:
        CabochonError: there is no such code; the message lists those there are.
    """
    name = code.upper()
    if name not in EXPLANATIONS:
        raise CabochonError(f"there is no code {code!r}; the codes are {', '.join(EXPLANATIONS)}")
    return f"{name}\n\n{EXPLANATIONS[name]}"
