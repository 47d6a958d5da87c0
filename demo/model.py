"""The model: every feature of Gemma 4 E2B at toy size."""

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, PreTrainedTokenizerFast

SLIDING, FULL = "sliding_attention", "full_attention"
VOCABULARY = 640
WINDOW = 64


def config(tokenizer: PreTrainedTokenizerFast) -> Gemma4Config:
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 128,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": 256,
        "num_hidden_layers": 7,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": WINDOW,
        "max_position_embeddings": 4096,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
        "eos_token_id": [1, 5],
        "bos_token_id": 2,
        "dtype": "bfloat16",
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 32,
        # A picture one soft token high is up to 210 patches wide.
        "position_embedding_size": 224,
        "use_clipped_linears": True,
        "dtype": "bfloat16",
    }
    return Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        boi_token_id=token("<|image>"),
        eoi_token_id=token("<image|>"),
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        boa_token_id=token("<|audio>"),
        eoa_token_index=token("<audio|>"),
        audio_token_id=token("<|audio|>"),
        eos_token_id=[1, 5],
        dtype="bfloat16",
    )


def build(tokenizer: PreTrainedTokenizerFast) -> Gemma4ForConditionalGeneration:
    model = Gemma4ForConditionalGeneration(config(tokenizer)).float()
    table = model.model.vision_tower.patch_embedder.position_embedding_table
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Gemma 4 does not scale its attention: with weights of 1 it would start one-hot.
                weight.fill_(0.42)
            elif weight.ndim == 2 and "embed_tokens" not in name:
                weight.normal_(0, 0.7 / weight.shape[1] ** 0.5)
        # Waves, so that places seen rarely resemble their neighbours from the start.
        place = torch.arange(table.shape[1])[:, None]
        period = 4.0 * 60.0 ** (torch.arange(table.shape[2] // 2) / (table.shape[2] // 2))
        angle = 2 * torch.pi * place / period
        table.copy_(0.2 * torch.cat([angle.sin(), angle.cos()], 1).expand_as(table))
        for depth, layer in enumerate(model.model.language_model.layers):
            layer.layer_scalar.fill_(1.0 - depth / 32)
    return model
