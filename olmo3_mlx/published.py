"""The published sizes of Olmo 3 as config.json has them, to look at without a download.

Source: the released config.json files of allenai/Olmo-3-7B-Instruct and allenai/Olmo-3.1-32B-Think.
"""

from typing import Any

_COMMON: dict[str, Any] = {
    "model_type": "olmo3",
    "vocab_size": 100278,
    "sliding_window": 4096,
    "rope_theta": 500000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.2079441541679836,
    },
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "eos_token_id": 100257,
}

SIZES: dict[str, dict[str, Any]] = {
    "7b": {
        **_COMMON,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "32b": {
        **_COMMON,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}
