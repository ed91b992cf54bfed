"""Hugging Face's side of a comparison: `MixtralForCausalLM`, as transformers ships it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.protocol import read_options, serve
from benchmarks.sizes import benchmark_config
from benchmarks.torch_side import TorchSide, batches_of
from mhmoe_np.settings.model import ModelConfig


def mixtral(config: ModelConfig) -> MixtralForCausalLM:
    """The same architecture in Hugging Face's terms, with its own choices for speed."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def load(model: MixtralForCausalLM, weights: dict[str, Tensor]) -> None:
    """Copy a checkpoint's tensors (the names of spec 1) into the model, experts stacked."""
    state = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    config = model.config
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            which: torch.stack(
                [weights[f"{prefix}.{e}.{which}_proj.weight"] for e in range(config.num_local_experts)]
            )
            for which in ("gate", "up", "down")
        }
        state[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        state[f"{prefix}.down_proj"] = parts["down"]
    model.load_state_dict(state)


def main() -> None:
    options = read_options(__doc__ or "")
    torch.set_num_threads(options.threads)
    model = mixtral(benchmark_config(options.size, options.model))
    load(model, load_file(options.weights))

    def losses(tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=tokens[:, :-1]).logits
        nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return nll, nll

    serve(TorchSide(model, losses, batches_of(options)))


if __name__ == "__main__":
    main()
