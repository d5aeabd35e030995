"""Which models vLLM serves with latent steps: the name of transformers' class, the name of ours."""

ARCHITECTURES = {
    "LlamaForCausalLM": "LiteReasonLlamaForCausalLM",
    "MistralForCausalLM": "LiteReasonMistralForCausalLM",
    "Qwen2ForCausalLM": "LiteReasonQwen2ForCausalLM",
    "Qwen3ForCausalLM": "LiteReasonQwen3ForCausalLM",
}
