"""The language model with its adapters, and all that is between text and losses.

- Text to tokens: `tokens`, `chat`, `rows`, `sentence`; `encode` puts examples into prompts.
- Tokens to tensors: `batch` lays out and packs rows, `sides` has the support and the query of episodes.
- Models: `catalog` finds, `load` loads, `zero` shards them; `weight_files`, `abilities` and `trials` refuse the unfit.
- Weights: `lora`, `soft_prompt`, `parameters`; `initialization` and `fine_tuning` for training; `peft_files` on disk.
- Forward and losses: `model`, with `frozen`, `pooling`, `label_trie` and `label_losses`.
- Answers: `option_scoring`, `queries` and `scorer` for labels; `decode`, `generate` and `sampling` for text.
- Speed: `precision` chooses dtype and attention.
"""
