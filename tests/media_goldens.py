"""What upstream's processors of pictures and videos compute, as hashes: `data/media.json`.

    python tests/media_goldens.py > tests/data/media.json

Those processors need torchvision, whose builds do not fit a torch without CUDA, hence a file in
place of a live comparison. In a throw-away environment, `pip install --no-deps torchvision` beside
such a torch suffices once its `_meta_registrations.py` is emptied: that registers operators in C++
which the build lacks and preprocessing does not use. Made with transformers 5.23.0, torch 2.13.0
and torchvision 0.28.0.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from media import FRAME_SIZES, PICTURE_SETTINGS, PICTURE_SIZES, noise


def digest(patches: Any, positions: Any) -> str:
    """Of float32 patches and int64 positions."""
    assert patches.dtype == np.float32
    assert positions.dtype == np.int64
    content = np.ascontiguousarray(patches).tobytes() + np.ascontiguousarray(positions).tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def without_padding(patches: Any, positions: Any) -> str:
    real = positions[:, 0] >= 0
    assert not patches[~real].any()
    return digest(patches[real], positions[real])


def pictures() -> list[dict[str, Any]]:
    from PIL import Image
    from transformers.models.gemma4_unified.image_processing_gemma4_unified import (
        Gemma4UnifiedImageProcessor,
    )

    found = []
    for config in PICTURE_SETTINGS:
        processor = Gemma4UnifiedImageProcessor(**config)
        for size in PICTURE_SIZES:
            out = processor(Image.fromarray(noise(*size)), return_tensors="pt")
            patches, positions = out["pixel_values"][0], out["image_position_ids"][0]
            found.append(
                {
                    "settings": config,
                    "size": size,
                    "soft_tokens": int(out["num_soft_tokens_per_image"][0]),
                    "digest": without_padding(patches.numpy(), positions.numpy()),
                }
            )
    return found


def videos(unified: bool) -> list[dict[str, Any]]:
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
    from transformers.models.gemma4_unified.video_processing_gemma4_unified import (
        Gemma4UnifiedVideoProcessor,
    )

    found = []
    for config in PICTURE_SETTINGS:
        processor = (Gemma4UnifiedVideoProcessor if unified else Gemma4VideoProcessor)(**config)
        for size in FRAME_SIZES:
            video = np.stack([noise(*size, frame) for frame in range(2)])
            out = processor(
                [video], do_sample_frames=False, input_data_format="channels_last",
                return_tensors="pt",
            )  # fmt: skip
            frames = zip(out["pixel_values_videos"], out["video_position_ids"], strict=True)
            found.append(
                {
                    "settings": config,
                    "size": size,
                    "soft_tokens": int(out["num_soft_tokens_per_video"][0]),
                    "digests": [without_padding(p.numpy(), x.numpy()) for p, x in frames],
                }
            )
    return found


if __name__ == "__main__":
    goldens = {
        "unified_pictures": pictures(),
        "videos": videos(unified=False),
        "unified_videos": videos(unified=True),
    }
    print(json.dumps(goldens, indent=1))
